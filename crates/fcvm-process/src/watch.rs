//! Waiting for a descriptor without blocking.

use std::io;
use std::os::fd::OwnedFd;

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Registers a descriptor with the current runtime, to wait until it can be read: a pidfd, an
/// inotify instance.
///
/// # Errors
///
/// The kernel cannot wait for such a descriptor.
pub fn watch_readable(fd: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an `OwnedFd` is one open descriptor from its making to its drop, and always the same.
    Ok(unsafe { AsyncFd::register_with_interest(fd, Interest::READABLE) }?)
}
