//! What can go wrong with disks.

use std::io;
use std::path::{Path, PathBuf};

use fcvm_types::ByteSize;

/// A failure to make or look at a disk, one line each.
#[derive(Debug, thiserror::Error)]
pub enum StorageError {
    /// The host's file system is full.
    #[error("cannot {action} in {}: its file system is full; free some space or use another data directory", directory.display())]
    Full {
        /// What was being done.
        action: &'static str,
        /// Where.
        directory: PathBuf,
    },
    /// The directory can not be written to.
    #[error("cannot {action} in {}: {source}; use a data directory that you can write to", directory.display())]
    NotWritable {
        /// What was being done.
        action: &'static str,
        /// Where.
        directory: PathBuf,
        /// Read-only, or not permitted.
        source: io::Error,
    },
    /// The directory is not there any more.
    #[error("cannot {action} in {}: the directory is gone; make it again, or use another data directory", directory.display())]
    Gone {
        /// What was being done.
        action: &'static str,
        /// Where.
        directory: PathBuf,
    },
    /// A kept disk is not what its manifest says.
    #[error("the disk {} is damaged: {reason}; remove it and what was made from it, or bring the file back", path.display())]
    Damaged {
        /// The file, or the directory where it is about all of them.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// A size out of range.
    #[error("cannot make a scratch disk of {size}: it must be {min} to {max}")]
    Size {
        /// The size asked for.
        size: ByteSize,
        /// Smallest.
        min: ByteSize,
        /// Largest.
        max: ByteSize,
    },
    /// The file system can not hold a file of that size.
    #[error("cannot make a scratch disk of {size} in {}: its file system has no files that large", directory.display())]
    TooLarge {
        /// The size asked for.
        size: ByteSize,
        /// Where.
        directory: PathBuf,
    },
    /// The program that makes file systems could not be run.
    #[error("cannot run {}: {source}; it comes with the package e2fsprogs", path.display())]
    Mkfs {
        /// The program.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It gave up.
    #[error("cannot make the file system of a scratch disk: {} failed: {reason}", path.display())]
    MkfsFailed {
        /// The program.
        path: PathBuf,
        /// Its last line.
        reason: String,
    },
    /// Anything else that the host refused.
    #[error("cannot {action} in {}: {source}", directory.display())]
    Io {
        /// What was being done.
        action: &'static str,
        /// Where.
        directory: PathBuf,
        /// Why.
        source: io::Error,
    },
}

impl StorageError {
    /// The failure of `action` in `directory`.
    pub(crate) fn from_io(action: &'static str, directory: &Path, source: io::Error) -> Self {
        let directory = directory.to_owned();
        match source.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
                Self::Full { action, directory }
            }
            io::ErrorKind::ReadOnlyFilesystem | io::ErrorKind::PermissionDenied => {
                Self::NotWritable {
                    action,
                    directory,
                    source,
                }
            }
            io::ErrorKind::NotFound if !directory.exists() => Self::Gone { action, directory },
            _ => Self::Io {
                action,
                directory,
                source,
            },
        }
    }
}
