//! The server's side of watching: who is told what happens.

use std::io::Write;
use std::os::unix::net::UnixStream;

use rustix::event::{PollFd, PollFlags, Timespec};

use super::watch::{Notice, encoded};

/// Connections on which notices are told. None of them is waited for.
#[derive(Debug, Default)]
pub(super) struct Watchers(Vec<Watcher>);

#[derive(Debug)]
struct Watcher {
    socket: UnixStream,
    /// The process that is told of; all where there is none.
    pid: Option<i32>,
}

impl Watchers {
    /// Adds one, which is told that it is.
    pub(super) fn add(&mut self, mut socket: UnixStream, pid: Option<i32>) {
        let told = socket
            .set_nonblocking(true)
            .and_then(|()| socket.write_all(&encoded(&Notice::Watching)));
        if told.is_ok() {
            self.0.push(Watcher { socket, pid });
        }
    }

    /// Tells those whom it concerns. One whose buffer is full is given up, and with the end of a process those
    /// who watch it alone.
    pub(super) fn tell(&mut self, notice: &Notice) {
        let line = encoded(notice);
        let is_end = matches!(notice, Notice::Ended { .. } | Notice::Refused { .. });
        self.0.retain_mut(|watcher| match watcher.pid {
            Some(pid) if notice.pid() != Some(pid) => true,
            pid => watcher.socket.write_all(&line).is_ok() && !(is_end && pid.is_some()),
        });
    }

    /// Takes out those whose other end was closed.
    pub(super) fn sweep(&mut self) {
        let now = Timespec::default();
        self.0.retain(|watcher| {
            let mut polled = [polled(watcher)];
            let found = rustix::event::poll(&mut polled, Some(&now));
            found.is_err() || polled[0].revents().is_empty()
        });
    }

    /// What tells that the other ends were closed.
    pub(super) fn polled(&self) -> impl Iterator<Item = PollFd<'_>> {
        self.0.iter().map(polled)
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(super) fn count(&self) -> usize {
        self.0.len()
    }
}

fn polled(watcher: &Watcher) -> PollFd<'_> {
    PollFd::new(&watcher.socket, PollFlags::RDHUP)
}
