//! Terminals: size, resize, keys that are signals, and the host's terminal as it was at the end.

use crate::base::IMAGE;
use crate::lab::Lab;
use crate::terminal::{TERM, Terminal};

#[test]
fn a_shell_in_a_terminal() {
    let Some(lab) = Lab::new() else { return };
    let arguments = [
        "run",
        "-it",
        "--name",
        "shell",
        "--network",
        "none",
        IMAGE,
        "sh",
    ];
    let mut terminal = Terminal::start(&lab, 31, 97, &arguments);
    // What is typed is echoed: the answers differ from the questions.
    terminal.output.wait_for("# ");
    assert!(!terminal.is_cooked());
    terminal.type_in("echo $(stty size) $TERM; tty | tr a-z A-Z\r");
    terminal.output.wait_for(&format!("31 97 {TERM}"));
    terminal.output.wait_for("/DEV/PTS/0");
    terminal.resize(40, 120);
    terminal
        .type_in("until [ \"$(stty size)\" = '40 120' ]; do usleep 10000; done; echo $((6*7))\r");
    terminal.output.wait_for("\n42");
    // Ctrl-C ends what runs in the foreground, not the shell.
    // What it gives back beside the echo shows that it has begun.
    terminal.output.clear();
    terminal.type_in("echo be''gun; cat\r");
    terminal.output.wait_for("\nbegun\r\n");
    terminal.type_in("probe\r");
    terminal.output.wait_for("probe\r\nprobe\r\n");
    terminal.output.clear();
    terminal.type_in("\x03");
    terminal.output.wait_for("# ");
    terminal.type_in("echo int=$?\r");
    terminal.output.wait_for("int=130");

    // A second terminal in the same VM, with a size of its own.
    let mut second = Terminal::start(&lab, 20, 50, &["exec", "-it", "shell", "sh"]);
    second.output.wait_for("# ");
    second.type_in("stty size; exit 6\r");
    second.output.wait_for("20 50");
    assert_eq!(second.wait(), 6);
    assert!(second.is_cooked());

    terminal.type_in("exit 4\r");
    assert_eq!(terminal.wait(), 4);
    assert!(terminal.is_cooked(), "the terminal was left in raw mode");
    assert_eq!(lab.ok(&["rm", "shell"]), "shell\n");
    lab.finish();
}

#[test]
fn a_terminal_is_restored_when_the_start_fails_or_the_vm_is_lost() {
    let Some(lab) = Lab::new() else { return };
    let mut terminal = Terminal::start(
        &lab,
        24,
        80,
        &["run", "-it", "--rm", IMAGE, "/no/such/program"],
    );
    assert_eq!(terminal.wait(), 127);
    assert!(terminal.is_cooked());

    let mut terminal = Terminal::start(&lab, 24, 80, &["run", "-it", "--rm", IMAGE, "sh"]);
    terminal.output.wait_for("# ");
    rustix::process::kill_process(lab.the_hypervisor(), rustix::process::Signal::KILL).unwrap();
    assert_eq!(terminal.wait(), 125);
    assert!(terminal.is_cooked(), "the terminal was left in raw mode");
    lab.finish();
}
