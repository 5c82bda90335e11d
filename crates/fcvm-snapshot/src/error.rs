//! What can go wrong with snapshots.

use std::io;
use std::path::{Path, PathBuf};

use fcvm_memory::MemoryError;
use fcvm_storage::StorageError;
use fcvm_types::SnapshotTag;

/// A failure, one line each.
#[derive(Debug, thiserror::Error)]
pub enum SnapshotError {
    /// The tag is taken.
    #[error(
        "a snapshot '{0}' exists already: choose another tag, or remove it with 'fcvm snapshot rm {0}'"
    )]
    Exists(SnapshotTag),
    /// Another process is writing a snapshot of that tag.
    #[error(
        "a snapshot '{0}' is being created by another command: wait for it, or choose another tag"
    )]
    Busy(SnapshotTag),
    /// There is none of that tag.
    #[error("there is no snapshot '{0}': 'fcvm snapshot ls' shows those that there are")]
    NotFound(SnapshotTag),
    /// Other snapshots are differences to it.
    #[error(
        "the snapshot '{tag}' is needed by {}: remove those first, or all of them with --prune-children",
        join(children)
    )]
    Needed {
        /// The one that was to go.
        tag: SnapshotTag,
        /// Those made from it directly.
        children: Vec<SnapshotTag>,
    },
    /// A snapshot that this one is a difference to has been removed, or replaced.
    #[error(
        "the snapshot '{tag}' is a difference to '{parent}', which is gone: remove it, and create a whole one with --full"
    )]
    ParentGone {
        /// The difference.
        tag: SnapshotTag,
        /// What it is a difference to.
        parent: SnapshotTag,
    },
    /// Too many differences over one another.
    #[error(
        "the snapshot '{tag}' would be number {} in a line of snapshots, and {} is the most: create a whole one with --full",
        depth,
        crate::DEPTH_MAX
    )]
    TooDeep {
        /// The one that would be too deep.
        tag: SnapshotTag,
        /// Its place, the whole snapshot being 1.
        depth: usize,
    },
    /// Written by a later fcvm.
    #[error(
        "the snapshot '{tag}' has format version {found}, and this fcvm knows version {known}: use a newer fcvm"
    )]
    Version {
        /// Which one.
        tag: SnapshotTag,
        /// Its version.
        found: u32,
        /// The version that this program knows.
        known: u32,
    },
    /// A file is missing or is not what was written.
    #[error(
        "the snapshot '{tag}' is damaged: {reason}; remove it with 'fcvm snapshot rm {tag}' and create it again"
    )]
    Damaged {
        /// Which one.
        tag: SnapshotTag,
        /// What is wrong.
        reason: String,
    },
    /// The memory of a snapshot cannot be written, or it is not what was written.
    #[error("the memory of the snapshot '{tag}': {source}")]
    Memory {
        /// Which one.
        tag: SnapshotTag,
        /// What is wrong.
        source: MemoryError,
    },
    /// The disk of a snapshot cannot be kept, or it is not what was kept.
    #[error("the disk of the snapshot '{tag}': {source}")]
    Disk {
        /// Which one.
        tag: SnapshotTag,
        /// What is wrong.
        source: StorageError,
    },
    /// The caller left something out, or gave something that does not fit together.
    #[error("cannot write the snapshot '{tag}': {reason}")]
    Refused {
        /// Which one.
        tag: SnapshotTag,
        /// What is the matter.
        reason: String,
    },
    /// The file system of the snapshots is full.
    #[error("cannot {action} in {}: its file system is full; free some space ('fcvm system prune', 'fcvm snapshot rm') or use another data directory", directory.display())]
    Full {
        /// What was being done.
        action: &'static str,
        /// Where.
        directory: PathBuf,
    },
    /// Anything else that the system refused.
    #[error("cannot {action} in {}: {source}", directory.display())]
    Io {
        /// What was being done.
        action: &'static str,
        /// Where.
        directory: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
}

impl SnapshotError {
    pub(crate) fn io(action: &'static str, directory: &Path) -> impl Fn(io::Error) -> Self {
        let directory = directory.to_owned();
        move |source| {
            let directory = directory.clone();
            if is_full(&source) {
                Self::Full { action, directory }
            } else {
                Self::Io {
                    action,
                    directory,
                    source,
                }
            }
        }
    }

    /// A failure to write memory; `directory` is where.
    pub(crate) fn memory(tag: &SnapshotTag, directory: &Path, source: MemoryError) -> Self {
        match source {
            MemoryError::File {
                action: "write",
                source,
            } if is_full(&source) => Self::Full {
                action: "write the memory of a snapshot",
                directory: directory.to_owned(),
            },
            source => Self::Memory {
                tag: tag.clone(),
                source,
            },
        }
    }

    pub(crate) fn damaged(tag: &SnapshotTag, reason: impl Into<String>) -> Self {
        Self::Damaged {
            tag: tag.clone(),
            reason: reason.into(),
        }
    }
}

fn is_full(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded
    )
}

fn join(tags: &[SnapshotTag]) -> String {
    let quoted: Vec<String> = tags.iter().map(|tag| format!("'{tag}'")).collect();
    quoted.join(", ")
}
