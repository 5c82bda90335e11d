//! How steps that can fail say what failed.

use fcvm_wire::{Failure, FailureKind};
use rustix::io::Errno;

/// The guest could not do it.
pub(crate) fn guest(message: impl Into<String>) -> Failure {
    Failure {
        kind: FailureKind::Guest,
        message: message.into(),
    }
}

/// The request is wrong.
pub(crate) fn bad_request(message: impl Into<String>) -> Failure {
    Failure {
        kind: FailureKind::BadRequest,
        message: message.into(),
    }
}

/// What an error number means, without the number.
pub(crate) fn reason(errno: Errno) -> String {
    let text = std::io::Error::from(errno).to_string();
    match text.find(" (os error") {
        Some(end) => text[..end].to_owned(),
        None => text,
    }
}

/// Says what was being done when a system call failed.
pub(crate) trait Context<T> {
    /// Turns the error into a [`FailureKind::Guest`] failure; `what` is like "mounting /proc".
    fn context(self, what: &str) -> Result<T, Failure>;
}

impl<T> Context<T> for Result<T, Errno> {
    fn context(self, what: &str) -> Result<T, Failure> {
        self.map_err(|errno| guest(format!("{what} failed in the guest: {}", reason(errno))))
    }
}

impl<T> Context<T> for std::io::Result<T> {
    fn context(self, what: &str) -> Result<T, Failure> {
        self.map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::IO))
            .context(what)
    }
}
