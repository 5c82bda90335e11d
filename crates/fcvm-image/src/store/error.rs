//! What can go wrong in the store, and the wording of it.

use std::io;
use std::path::{Path, PathBuf};

use crate::digest::Digest;
use crate::format::FormatError;
use crate::reference::ReferenceError;
use crate::rootfs::RootfsError;

/// Failure of an operation of the [`ImageStore`](super::ImageStore).
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StoreError {
    /// No image has this name or id.
    #[error("no image '{0}' is here; see 'fcvm image ls', or get it with 'fcvm image pull'")]
    NotFound(String),
    /// Several images begin with this id.
    #[error("'{text}' is the beginning of {count} image ids; write more of it")]
    Ambiguous {
        /// What was asked for.
        text: String,
        /// How many images match.
        count: usize,
    },
    /// The text is no name.
    #[error(transparent)]
    Reference(#[from] ReferenceError),
    /// The image is in use.
    #[error("image '{0}' is in use by a VM; remove the VM first, or force it")]
    InUse(String),
    /// Removing by id would take several names away.
    #[error("image {id} has {count} names; remove them one by one, or force it")]
    SeveralNames {
        /// Short id.
        id: String,
        /// How many names it has.
        count: usize,
    },
    /// Another process adds or removes images at this moment.
    #[error("another fcvm process is adding an image; try again when it has finished")]
    Busy,
    /// A file of the store does not hold what it should.
    #[error("{} is damaged: {reason}; {remedy}", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
        /// What to do.
        remedy: &'static str,
    },
    /// An image cannot be read.
    #[error(
        "image {image} is damaged: {} {reason}; remove it with 'fcvm image rm --force {image}' and \
         get it again",
        path.display()
    )]
    DamagedImage {
        /// Its first name, else its manifest digest.
        image: String,
        /// The file at fault.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// The store was made by a later version.
    #[error("{} is of the later layout version '{version}'; use a later fcvm", path.display())]
    LaterVersion {
        /// The file that says so.
        path: PathBuf,
        /// Its version.
        version: String,
    },
    /// Content that was added is not what it was announced to be.
    #[error("{what} has the digest {actual} instead of {expected}; nothing of it was kept")]
    DigestMismatch {
        /// What was added.
        what: String,
        /// The digest it should have.
        expected: Digest,
        /// The digest it has.
        actual: Digest,
    },
    /// Content that was added is longer or shorter than it was announced to be.
    #[error("{what} does not have the announced size of {expected_bytes} bytes")]
    SizeMismatch {
        /// What was added.
        what: String,
        /// Announced size.
        expected_bytes: u64,
    },
    /// The documents of an image cannot be used.
    #[error(transparent)]
    Format(#[from] FormatError),
    /// The layers cannot become a root image.
    #[error("image {image} cannot be converted")]
    Convert {
        /// Short id of the image.
        image: String,
        /// Why.
        source: Box<RootfsError>,
    },
    /// The operating system refused.
    #[error("cannot {action} {}", path.display())]
    Io {
        /// `read`, `write`, `lock`.
        action: &'static str,
        /// The file or directory.
        path: PathBuf,
        /// The operating system's answer.
        source: io::Error,
    },
}

impl StoreError {
    pub(crate) fn io(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Io {
            action,
            path: path.to_owned(),
            source,
        }
    }
}
