//! A pseudo-terminal with a program in it.

use std::fs::File;
use std::io::Write;
use std::os::fd::OwnedFd;
use std::process::{Child, Command};

use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{Winsize, tcgetattr, tcsetwinsize};

use crate::lab::Lab;
use crate::process::{self, Collected};

/// A program in a terminal of its own.
pub(crate) struct Terminal {
    own: File,
    /// The program's side, kept open to look at its settings.
    other: OwnedFd,
    child: Child,
    pub(crate) output: Collected,
}

/// What the terminal is.
pub(crate) const TERM: &str = "vt220";

impl Terminal {
    /// Runs fcvm in a new terminal of this size.
    pub(crate) fn start(lab: &Lab, rows: u16, columns: u16, arguments: &[&str]) -> Self {
        let own = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
        grantpt(&own).unwrap();
        unlockpt(&own).unwrap();
        let name = ptsname(&own, Vec::new()).unwrap().into_string().unwrap();
        let open = || File::options().read(true).write(true).open(&name).unwrap();
        let terminal = open();
        tcsetwinsize(&own, size(rows, columns)).unwrap();
        // setsid makes the terminal the controlling one, so that a new size is a signal.
        let mut command: Command =
            lab.tool("setsid", &[&["-c", lab.program()], arguments].concat());
        command.stdin(open()).stdout(open()).stderr(open());
        command.env("TERM", TERM);
        let child = command.spawn().unwrap();
        drop(command);
        let own = File::from(own);
        let output = Collected::from(own.try_clone().unwrap());
        Self {
            own,
            other: terminal.into(),
            child,
            output,
        }
    }

    /// Types.
    pub(crate) fn type_in(&mut self, text: &str) {
        self.own.write_all(text.as_bytes()).unwrap();
    }

    /// Gives the terminal another size.
    pub(crate) fn resize(&self, rows: u16, columns: u16) {
        tcsetwinsize(&self.own, size(rows, columns)).unwrap();
    }

    /// The terminal edits lines and echoes, as it did at first.
    pub(crate) fn is_cooked(&self) -> bool {
        let modes = tcgetattr(&self.other).unwrap().local_modes;
        modes.contains(rustix::termios::LocalModes::ICANON | rustix::termios::LocalModes::ECHO)
    }

    /// Waits for the program's end; gives its exit code and the terminal as it is then.
    pub(crate) fn wait(&mut self) -> i32 {
        process::code(process::wait_for_child(
            &mut self.child,
            "fcvm in a terminal",
        ))
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn size(rows: u16, columns: u16) -> Winsize {
    Winsize {
        ws_row: rows,
        ws_col: columns,
        ws_xpixel: 0,
        ws_ypixel: 0,
    }
}
