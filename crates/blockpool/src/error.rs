//! What can go wrong with a pool.

use std::io;
use std::path::PathBuf;

/// A failure, one line each.
#[derive(Debug, thiserror::Error)]
pub enum PoolError {
    /// The disk below the pool refused.
    #[error("cannot {action}: {source}")]
    Io {
        /// What was being done.
        action: &'static str,
        /// Why.
        source: io::Error,
    },
    /// The file could not be opened or made.
    #[error("cannot {action} {}: {source}", path.display())]
    File {
        /// What was being done.
        action: &'static str,
        /// The file or device.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Another process has it.
    #[error("the pool {} is in use by another process; one process at a time can have it open", path.display())]
    InUse {
        /// The file or device.
        path: PathBuf,
    },
    /// No valid superblock.
    #[error("this is not a pool: {reason}")]
    NotAPool {
        /// What is there instead.
        reason: &'static str,
    },
    /// Made by another version.
    #[error(
        "the pool has format version {found}, this program reads versions up to {}; use the program that made it",
        crate::layout::VERSION
    )]
    Version {
        /// Its version.
        found: u32,
    },
    /// Bytes that no pool has.
    #[error("the pool is damaged: {what}; 'fcvm pool scrub' lists what is lost")]
    Damaged {
        /// What and where.
        what: String,
    },
    /// What is kept once is damaged.
    #[error(
        "the pool's space accounting is damaged: {what}; 'fcvm pool check --repair' counts it anew"
    )]
    DamagedAccounting {
        /// What and where.
        what: String,
    },
    /// An earlier failure after which nothing can be believed.
    #[error("the pool stopped when {reason}; open it again, what was flushed is kept")]
    Stopped {
        /// What failed.
        reason: String,
    },
    /// No space is left.
    #[error("the pool is full; remove something or let it grow")]
    Full,
    /// A size out of range.
    #[error(
        "cannot use a size of {size_bytes} bytes for {what}: it must be {min_bytes} to {max_bytes} bytes"
    )]
    Size {
        /// Of what.
        what: &'static str,
        /// The size asked for.
        size_bytes: u64,
        /// Smallest.
        min_bytes: u64,
        /// Largest.
        max_bytes: u64,
    },
    /// A range outside an object.
    #[error(
        "{length_bytes} bytes at offset {offset_bytes} are not inside '{name}', which has {size_bytes} bytes"
    )]
    OutOfRange {
        /// The object.
        name: String,
        /// Begin.
        offset_bytes: u64,
        /// Length.
        length_bytes: u64,
        /// The object's size.
        size_bytes: u64,
    },
    /// A range that can not be shared.
    #[error("cannot clone a range: {reason}")]
    Range {
        /// Which rule it breaks.
        reason: &'static str,
    },
    /// Nothing has this name.
    #[error("'{name}' does not exist in this pool; 'fcvm pool ls' shows what does")]
    NotFound {
        /// The name.
        name: String,
    },
    /// Something has this name.
    #[error("'{name}' exists already; choose another name or remove it")]
    Exists {
        /// The name.
        name: String,
    },
    /// A name that can not be one.
    #[error("'{name}' is no name: {reason}")]
    Name {
        /// The name.
        name: String,
        /// Which rule it breaks.
        reason: &'static str,
    },
    /// A write to a snapshot.
    #[error("'{name}' is a snapshot and never changes; clone it to get something to write to")]
    ReadOnly {
        /// The snapshot.
        name: String,
    },
    /// Something else hangs on it.
    #[error("'{name}' has {what}; destroy them first, or with --recursive")]
    HasDependents {
        /// Its name.
        name: String,
        /// What hangs on it.
        what: &'static str,
    },
    /// A stream that cannot be received.
    #[error("cannot receive the stream: {what}")]
    Stream {
        /// What is wrong with it.
        what: String,
    },
    /// A stream of another version.
    #[error(
        "the stream has format version {found}, this program reads versions up to {known}; send it with the same program"
    )]
    StreamVersion {
        /// Its version.
        found: u32,
        /// The newest version that is read.
        known: u32,
    },
    /// A receive that can go on.
    #[error("{reason}; to go on, send it again with --resume {token}")]
    Interrupted {
        /// What stopped it.
        reason: Box<PoolError>,
        /// What the sender needs to go on.
        token: String,
    },
    /// A text that is no token.
    #[error("'{token}' is no token; 'fcvm pool receive --list' shows those of this pool")]
    Token {
        /// The text.
        token: String,
    },
    /// More references than can be counted.
    #[error("a block has more references than can be counted; copy in place of cloning")]
    TooManyReferences,
}

impl PoolError {
    /// What stopped a receive; other failures are what they are.
    #[must_use]
    pub fn reason(&self) -> &Self {
        match self {
            Self::Interrupted { reason, .. } => reason,
            other => other,
        }
    }

    /// Makes the failure of `action` on the pool's disk; a full disk is told apart from others by its text.
    pub(crate) fn io(action: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Io { action, source }
    }
}

/// The result of work on a pool.
pub type Result<T> = std::result::Result<T, PoolError>;
