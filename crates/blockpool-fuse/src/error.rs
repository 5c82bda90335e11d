//! What can go wrong with a mount.

use std::io;
use std::path::PathBuf;

/// A failure, one line each.
#[derive(Debug, thiserror::Error)]
pub enum MountError {
    /// The helper that mounts for ordinary users is not there.
    #[error("cannot run fusermount3: {source}; install the package fuse3")]
    Helper {
        /// Why.
        source: io::Error,
    },
    /// It refused.
    #[error("cannot {action} {}: {reason}", directory.display())]
    Refused {
        /// Mount or unmount.
        action: &'static str,
        /// The directory.
        directory: PathBuf,
        /// What it said.
        reason: String,
    },
    /// The kernel's side could not be used.
    #[error("cannot {action}: {source}")]
    Device {
        /// What was being done.
        action: &'static str,
        /// Why.
        source: io::Error,
    },
    /// The pool could not be used.
    #[error(transparent)]
    Pool(#[from] blockpool::PoolError),
}
