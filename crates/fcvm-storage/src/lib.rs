//! Disks of VMs.
//!
//! [`ScratchStore`] makes the writable disk of a VM: a clone of an empty file system, in a file that
//! has no name, so that it ends with the processes that have it open. [`reflink_support`] and
//! [`free_bytes`] tell what the file system of a directory can do.
//!
//! Not here: the read-only root image (`fcvm-image`), and how a disk is presented to the guest
//! (`fcvm-hypervisor`).

#![forbid(unsafe_code)]

mod branch;
mod checksum;
mod clone;
mod disk;
mod error;
mod host;
mod persist;
mod qcow2;
mod scratch;

pub use branch::{
    BranchMethod, CopyStore, DiskStore, Frozen, OverlayStore, PoolStore, Prepared, ReflinkStore,
    choose,
};
pub use clone::{CloneMethod, clone_file};
pub use disk::{Disk, DiskUsage, FrozenDisk, Layer, LayerFormat, pool_file_bytes};
pub use error::StorageError;
pub use host::{free_bytes, nameless_file, naming_support, reflink_support};
pub use persist::{DiskManifest, LAYER_COUNT_MAX, LayerManifest, Shelf};
pub use qcow2::Qcow2Header;
pub use scratch::{SCRATCH_SIZE_MAX, SCRATCH_SIZE_MIN, ScratchDisk, ScratchStore, find_mkfs};
