//! The relay's thread: it waits, and lets the bytes move.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec};
use rustix::io::Errno;
use tokio::sync::watch;

use super::RelayEnd;
use super::state::{Interest, State};

/// After so long a silence the buffers' memory goes back.
const IDLE: Timespec = Timespec {
    tv_sec: 1,
    tv_nsec: 0,
};

/// What the owner and the thread share.
#[derive(Debug)]
pub(super) struct Shared {
    state: Mutex<State>,
    /// Changes that wait for the lock: the thread, which else takes it again as soon as it has given
    /// it back, lets them go first.
    changes: AtomicUsize,
    /// An eventfd(2): readable when the thread shall look at the state again.
    wake: OwnedFd,
}

impl Shared {
    pub(super) fn new() -> std::io::Result<Arc<Self>> {
        let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
        Ok(Arc::new(Self {
            state: Mutex::default(),
            changes: AtomicUsize::new(0),
            wake: rustix::event::eventfd(0, flags)?,
        }))
    }

    /// Nothing panics while the state is locked; a poisoned one is still good.
    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes the state and lets the thread see it. What the change forbids does not happen any
    /// more when this returns.
    pub(super) fn change<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        self.changes.fetch_add(1, Ordering::Relaxed);
        let mut state = self.lock();
        self.changes.fetch_sub(1, Ordering::Relaxed);
        let result = change(&mut state);
        drop(state);
        // It can fail only where 2^64 - 1 wake-ups wait already.
        let _ = rustix::io::write(&self.wake, &1_u64.to_ne_bytes());
        result
    }
}

/// Moves frames until the relay ends.
pub(super) fn run(shared: &Shared, ended: &watch::Sender<Option<RelayEnd>>) {
    let end = loop {
        let mut state = shared.lock();
        if state.end.is_none() && state.turn() {
            drop(state);
            while shared.changes.load(Ordering::Relaxed) > 0 {
                std::thread::yield_now();
            }
            continue;
        }
        if let Some(end) = state.end {
            break end;
        }
        let interests = state.interests();
        let timeout = state.can_release().then_some(IDLE);
        drop(state);
        if let Err(errno) = wait(shared, &interests, timeout.as_ref()) {
            tracing::error!("the VM's network is closed: poll failed: {errno}");
            shared.lock().finish(RelayEnd::Uplink);
        }
    };
    ended.send_replace(Some(end));
}

fn wait(shared: &Shared, interests: &[Interest], timeout: Option<&Timespec>) -> Result<(), Errno> {
    let wake = PollFd::new(&shared.wake, PollFlags::IN);
    let sockets = interests
        .iter()
        .map(|interest| PollFd::from_borrowed_fd(interest.fd.as_ref().as_fd(), interest.events));
    let mut fds: Vec<PollFd<'_>> = std::iter::once(wake).chain(sockets).collect();
    let happened = match rustix::event::poll(&mut fds, timeout) {
        Ok(happened) => happened,
        Err(Errno::INTR) => return Ok(()),
        Err(errno) => return Err(errno),
    };
    let mut state = shared.lock();
    if happened == 0 {
        state.release();
    }
    if !fds[0].revents().is_empty() {
        let mut count = [0; 8];
        let _ = rustix::io::read(&shared.wake, &mut count);
    }
    for (interest, fd) in interests.iter().zip(&fds[1..]) {
        if !fd.revents().is_empty() {
            state.happened(interest.who, fd.revents());
        }
    }
    Ok(())
}
