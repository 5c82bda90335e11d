//! What can go wrong with guest memory.

use std::io;

/// A failure, one line each.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// A page file is not what it should be.
    #[error("the memory file is damaged: {reason}")]
    Damaged {
        /// What is wrong.
        reason: String,
    },
    /// A page file of a later version.
    #[error(
        "the memory file has version {found}, and this fcvm knows version {known}: use a newer fcvm"
    )]
    Version {
        /// Version of the file.
        found: u32,
        /// Version that this program knows.
        known: u32,
    },
    /// A page file for memory of another size.
    #[error("the memory file is for {found} bytes of memory, and this VM has {expected}")]
    Size {
        /// Size in the file.
        found: u64,
        /// Size of the VM's memory.
        expected: u64,
    },
    /// The memory of a process cannot be got at.
    #[error("cannot {action} the memory of process {pid}: {source}")]
    Process {
        /// What was being done.
        action: &'static str,
        /// Which process.
        pid: i32,
        /// Why it failed.
        source: io::Error,
    },
    /// Reading or writing a memory file failed.
    #[error("cannot {action} the memory file: {source}")]
    File {
        /// What was being done.
        action: &'static str,
        /// Why it failed.
        source: io::Error,
    },
}

impl MemoryError {
    pub(crate) fn damaged(reason: impl Into<String>) -> Self {
        Self::Damaged {
            reason: reason.into(),
        }
    }

    pub(crate) fn file(action: &'static str) -> impl Fn(io::Error) -> Self {
        move |source| Self::File { action, source }
    }
}
