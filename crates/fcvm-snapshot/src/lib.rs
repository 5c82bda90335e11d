//! Snapshots on disk: the memory, the device state and the disk of a VM as of one instant, under a tag.
//!
//! [`SnapshotStore`] is a directory with a folder per snapshot. A snapshot is written as a [`Draft`]
//! under a hidden name and gets its tag when all of it is on the disk, so that it is visible whole or
//! not at all. A [`Snapshot`] that was opened is checked as far as that takes no reading of all of
//! it; memory is checked while it is loaded. The files are described in docs/format/snapshot.md.
//!
//! Not here: freezing a VM and starting clones (the owner process of `fcvm`), the bytes of page files
//! (`fcvm-memory`) and of disk layers (`fcvm-storage`).

#![forbid(unsafe_code)]

mod draft;
mod error;
mod files;
mod manifest;
mod snapshot;
mod store;

pub use draft::{Draft, Stored};
pub use error::SnapshotError;
pub use manifest::{
    DeviceStateManifest, MANIFEST_BYTES_MAX, Manifest, ManifestFields, Mark, MemoryKind,
    MemoryManifest, ParentRef, RootImage, SnapshotId, VERSION,
};
pub use snapshot::{DiskSpace, Snapshot};
pub use store::{Listed, Removed, SnapshotStore, Swept};

/// Most memory files that are put over one another: a whole one and the differences to it.
pub const DEPTH_MAX: usize = 32;
