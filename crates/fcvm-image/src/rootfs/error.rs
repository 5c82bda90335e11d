//! What can go wrong while layers become a root image, and the wording of it.

use std::fmt;
use std::io;
use std::path::PathBuf;

use crate::Digest;

/// Names one layer in messages: its position, counted from 1 at the bottom, and its `diff_id`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LayerName {
    /// Position in the image, 0 is the bottom layer.
    pub index: usize,
    /// The sha256 of the uncompressed layer that the image configuration promises.
    pub diff_id: Digest,
}

impl fmt::Display for LayerName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "layer {} (sha256:{})",
            self.index + 1,
            self.diff_id.short()
        )
    }
}

/// A member name or link target as it may be shown: escaped, on one line, and short.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ShownPath(String);

impl ShownPath {
    const MAX_CHARS: usize = 200;

    /// Escapes everything but printable ASCII and cuts long paths in the middle.
    pub fn new(path: &[u8]) -> Self {
        let mut text = path.escape_ascii().to_string();
        if text.len() > Self::MAX_CHARS {
            let tail = text.split_off(text.len() - Self::MAX_CHARS / 2);
            text.truncate(Self::MAX_CHARS / 2);
            text.push_str("...");
            text.push_str(&tail);
        }
        Self(text)
    }
}

impl fmt::Display for ShownPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Why one member of a layer was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Refusal {
    /// The member or link target names `..`.
    #[error("its path contains '..' and could leave the image")]
    ParentComponent,
    /// The member or hard link target starts with `/`.
    #[error("its path is absolute")]
    Absolute,
    /// A symbolic link on the way climbs above the root of the image.
    #[error("a symbolic link on its path leads out of the image")]
    LinkClimbsOut,
    /// More symbolic links on the way than Linux would follow.
    #[error("its path goes through too many symbolic links")]
    SymlinkLoop,
    /// A parent exists and is neither a directory nor a symbolic link to one.
    #[error("its parent {0} is not a directory")]
    ParentNotDirectory(ShownPath),
    /// The name is empty.
    #[error("it has no name")]
    EmptyName,
    /// A path component is longer than Linux allows.
    #[error("its name has {0} bytes and the limit is 255")]
    NameTooLong(usize),
    /// The whole path is longer than the caller's limit.
    #[error("its path has {length_bytes} bytes and the limit is {limit_bytes}")]
    PathTooLong {
        /// Length of the path.
        length_bytes: usize,
        /// The limit that was exceeded.
        limit_bytes: usize,
    },
    /// A path, link target or attribute name holds a NUL byte.
    #[error("its path or link target contains a NUL byte")]
    NulByte,
    /// A whiteout that names nothing, or that is used as a directory.
    #[error("it is not a valid whiteout")]
    BadWhiteout,
    /// The member would replace the root directory by something else.
    #[error("it would replace the root directory")]
    ReplacesRoot,
    /// A hard link to something that no earlier member or lower layer holds.
    #[error("its hard link target {0} does not exist in the image")]
    HardLinkMissing(ShownPath),
    /// A hard link to a directory.
    #[error("its hard link target {0} is a directory")]
    HardLinkToDirectory(ShownPath),
    /// A link without target, or a symbolic link target longer than Linux allows.
    #[error("its link target has {0} bytes and must have 1 to 4095")]
    LinkTarget(usize),
    /// A tar type flag that container images do not use.
    #[error("its type '{}' is not supported", .0.escape_ascii())]
    UnsupportedType(u8),
    /// Owner or group outside the range of Linux.
    #[error("its owner or group {0} does not fit 32 bits")]
    OwnerTooLarge(u64),
    /// Device numbers outside the range of Linux.
    #[error("its device number {major}:{minor} is out of range")]
    DeviceNumber {
        /// Major number, at most 4095.
        major: u32,
        /// Minor number, at most 1048575.
        minor: u32,
    },
    /// A PAX record whose value cannot be read.
    #[error("its PAX record '{0}' is malformed")]
    PaxRecord(&'static str),
    /// Extended attributes that the image format cannot hold.
    #[error("its extended attributes are too large ({size_bytes} bytes, limit {limit_bytes})")]
    XattrsTooLarge {
        /// Size of the attribute or of all of them.
        size_bytes: usize,
        /// The limit that was exceeded.
        limit_bytes: usize,
    },
    /// A sparse map that is unordered, overlaps or disagrees with the sizes.
    #[error("its sparse map is inconsistent")]
    SparseMap,
    /// A file larger than the image format can address.
    #[error("its size of {0} bytes is too large")]
    FileTooLarge(u64),
}

/// Failure of [`build`](super::build). The output file then holds nothing usable.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RootfsError {
    /// The layer's file cannot be opened or read.
    #[error("cannot read {layer} from {}", path.display())]
    ReadLayer {
        /// Which layer.
        layer: LayerName,
        /// Its file.
        path: PathBuf,
        /// The operating system's answer.
        source: io::Error,
    },
    /// The compressed data is damaged or cut short.
    #[error("{layer} holds damaged {compression} data; remove the image and pull it again")]
    Decompress {
        /// Which layer.
        layer: LayerName,
        /// `gzip` or `zstd`.
        compression: &'static str,
        /// The decoder's answer.
        source: io::Error,
    },
    /// The layer is compressed in a way that is not supported.
    #[error(
        "{layer} is compressed with {compression}; only gzip, zstd and plain tar are supported"
    )]
    UnsupportedCompression {
        /// Which layer.
        layer: LayerName,
        /// Name of the compression found.
        compression: &'static str,
    },
    /// The uncompressed layer is not what the image configuration promises.
    #[error(
        "{layer} does not have the content that the image promises (found {actual}); remove the image and pull it again"
    )]
    DiffIdMismatch {
        /// Which layer.
        layer: LayerName,
        /// The digest that was found.
        actual: Digest,
    },
    /// The tar stream itself is damaged.
    #[error("{layer} is not a valid tar archive after member '{member}': {reason}")]
    Tar {
        /// Which layer.
        layer: LayerName,
        /// The last member that was read, empty at the start.
        member: ShownPath,
        /// What is wrong.
        reason: String,
    },
    /// One member is refused.
    #[error("{layer}: member '{member}' is refused: {reason}")]
    Member {
        /// Which layer.
        layer: LayerName,
        /// Which member.
        member: ShownPath,
        /// Why.
        reason: Refusal,
    },
    /// The image exceeds a limit of the caller.
    #[error("{layer}: the image has more {what} than the limit of {limit}")]
    Limit {
        /// The layer in which it happened.
        layer: LayerName,
        /// What there is too much of, with its unit.
        what: &'static str,
        /// The limit.
        limit: u64,
    },
    /// The root image cannot be written.
    #[error("cannot write the root image")]
    Write {
        /// The operating system's answer.
        source: io::Error,
    },
    /// A helper thread could not be started or ended abnormally.
    #[error("cannot run the threads that convert the image")]
    Thread,
}
