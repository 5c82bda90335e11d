//! Branching disks: freezing the state of one that is in use, and making disks from that state.
//!
//! Four ways, [`DiskStore`] is what they have in common. Which one fits is for [`choose`] to say.

use std::fmt;
use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::clone::{reflink, share_or_copy, sparse_copy};
use crate::disk::{Disk, FrozenDisk, Layer, LayerFormat, read_only};
use crate::error::StorageError;
use crate::host::{nameless_file, reflink_support};
use crate::qcow2;

/// A way to branch disks.
///
/// Disks and frozen disks of one store can be given to another: they are files and formats, and say
/// all that is needed.
pub trait DiskStore: fmt::Debug + Send + Sync {
    /// Which way it is.
    fn method(&self) -> BranchMethod;

    /// Makes ready what freezing a disk needs. The disk is in use meanwhile, and a disk that is
    /// prepared and not frozen has lost nothing.
    ///
    /// # Errors
    ///
    /// The store's directory is gone, full or can not be written to.
    fn prepare(&self, disk: &Disk) -> Result<Prepared, StorageError>;

    /// Freezes the state that the disk has now. Whoever writes to it must be stopped, with everything
    /// written to the files (QEMU does so when it stops a VM).
    ///
    /// # Errors
    ///
    /// As [`prepare`](Self::prepare). The disk is as it was, and can be gone on with.
    fn freeze(&self, prepared: Prepared) -> Result<Frozen, StorageError>;

    /// Makes a disk that begins with a frozen state.
    ///
    /// # Errors
    ///
    /// As [`prepare`](Self::prepare).
    fn branch(&self, frozen: &FrozenDisk) -> Result<Disk, StorageError>;

    /// Makes a disk that will begin with a state which is yet to be frozen, [`Prepared::expected`]: a
    /// hypervisor can open it, and must read it only after [`fill`](Self::fill).
    ///
    /// # Errors
    ///
    /// As [`prepare`](Self::prepare).
    fn branch_ahead(&self, expected: &FrozenDisk) -> Result<Disk, StorageError>;

    /// Gives a disk that was made ahead the state, once that is frozen.
    ///
    /// # Errors
    ///
    /// As [`prepare`](Self::prepare).
    fn fill(&self, disk: &Disk, frozen: &FrozenDisk) -> Result<(), StorageError>;
}

/// How a store branches disks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BranchMethod {
    /// A file shares its blocks with another until one of the two is written, ioctl_ficlone(2).
    Reflink,
    /// As that, by a mounted block-cloning pool, copy_file_range(2).
    Pool,
    /// A file holds what differs from the files below it.
    Overlay,
    /// The bytes are copied.
    Copy,
}

impl BranchMethod {
    /// `reflink`, `pool`, `overlay` or `copy`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Reflink => "reflink",
            Self::Pool => "pool",
            Self::Overlay => "overlay",
            Self::Copy => "copy",
        }
    }

    /// What the user should know of this way.
    pub fn warning(self) -> Option<&'static str> {
        match self {
            Self::Reflink | Self::Pool | Self::Overlay => None,
            Self::Copy => Some(
                "each clone's disk is a copy of the source's, which takes time and space: a data \
                 directory on btrfs, XFS or ZFS shares what is the same",
            ),
        }
    }
}

/// What freezing a disk needs, made ahead.
#[derive(Debug)]
pub struct Prepared {
    below: Vec<Layer>,
    top: Layer,
    size_bytes: u64,
    /// A new file of the same disk, for reading and writing.
    spare: File,
    /// The file that will be part of the frozen disk, for reading alone.
    frozen: File,
}

impl Prepared {
    /// The frozen disk as it will be: its files, some of which get their content when the disk is
    /// frozen.
    pub fn expected(&self) -> io::Result<FrozenDisk> {
        let mut layers = self.below.clone();
        layers.push(layer(self.frozen.try_clone()?, self.top.format));
        Ok(FrozenDisk::new(layers, self.size_bytes))
    }
}

/// A disk that was frozen.
#[derive(Debug)]
pub struct Frozen {
    /// Its state.
    pub frozen_disk: FrozenDisk,
    /// What the disk's VM has to go on with, before it writes anything: the file that it wrote to is
    /// part of the frozen state now. `None` where it goes on with what it has.
    pub continue_on: Option<Disk>,
}

/// The best way for files in `directory`, which is created where it is missing. `raw_only` is for
/// hypervisors that read no other format than raw bytes.
///
/// # Errors
///
/// No file can be written there.
pub fn choose(directory: &Path, raw_only: bool) -> Result<Box<dyn DiskStore>, StorageError> {
    std::fs::create_dir_all(directory)
        .map_err(|source| StorageError::from_io("keep disks", directory, source))?;
    let directory = directory.to_owned();
    Ok(if reflink_support(&directory)? {
        Box::new(ReflinkStore {
            directory,
            raw_only,
        })
    } else if raw_only {
        Box::new(CopyStore { directory })
    } else {
        Box::new(OverlayStore { directory })
    })
}

/// [`BranchMethod::Reflink`].
#[derive(Debug, Clone)]
pub struct ReflinkStore {
    directory: PathBuf,
    raw_only: bool,
}

/// [`BranchMethod::Pool`].
#[derive(Debug, Clone)]
pub struct PoolStore {
    directory: PathBuf,
}

/// [`BranchMethod::Overlay`].
#[derive(Debug, Clone)]
pub struct OverlayStore {
    directory: PathBuf,
}

/// [`BranchMethod::Copy`].
#[derive(Debug, Clone)]
pub struct CopyStore {
    directory: PathBuf,
}

impl PoolStore {
    /// Clones in `directory`, which is inside a mounted pool.
    pub fn new(directory: PathBuf) -> Self {
        Self { directory }
    }
}

impl OverlayStore {
    /// Overlays in `directory`.
    pub fn new(directory: PathBuf) -> Self {
        Self { directory }
    }
}

impl CopyStore {
    /// Copies in `directory`.
    pub fn new(directory: PathBuf) -> Self {
        Self { directory }
    }
}

impl DiskStore for ReflinkStore {
    fn method(&self) -> BranchMethod {
        BranchMethod::Reflink
    }

    fn prepare(&self, disk: &Disk) -> Result<Prepared, StorageError> {
        let failed = |source| StorageError::from_io(FREEZE, &self.directory, source);
        // The kernel writes a file out before it shares its blocks: now, rather than in the pause.
        disk.split().1.file.sync_data().map_err(failed)?;
        prepare_copy(&self.directory, disk)
    }

    fn freeze(&self, prepared: Prepared) -> Result<Frozen, StorageError> {
        freeze_copy(&self.directory, prepared, |source, target| {
            if !reflink(source, target)? {
                sparse_copy(source, target)?;
            }
            Ok(())
        })
    }

    fn branch(&self, frozen: &FrozenDisk) -> Result<Disk, StorageError> {
        let (below, top) = frozen.split();
        let failed = |source| StorageError::from_io(BRANCH, &self.directory, source);
        let file = nameless_file(&self.directory).map_err(failed)?;
        if reflink(&top.file, &file).map_err(failed)? {
            return Ok(new_disk(below, file, top.format, frozen.size_bytes()));
        }
        // The frozen disk is on another file system.
        if self.raw_only {
            CopyStore::new(self.directory.clone()).branch(frozen)
        } else {
            OverlayStore::new(self.directory.clone()).branch(frozen)
        }
    }

    fn branch_ahead(&self, expected: &FrozenDisk) -> Result<Disk, StorageError> {
        empty_like(&self.directory, expected)
    }

    fn fill(&self, disk: &Disk, frozen: &FrozenDisk) -> Result<(), StorageError> {
        let (source, target) = (&frozen.split().1.file, &disk.split().1.file);
        let fill = || -> io::Result<()> {
            if !reflink(source, target)? {
                sparse_copy(source, target)?;
            }
            Ok(())
        };
        fill().map_err(|source| StorageError::from_io(BRANCH, &self.directory, source))
    }
}

impl DiskStore for PoolStore {
    fn method(&self) -> BranchMethod {
        BranchMethod::Pool
    }

    fn prepare(&self, disk: &Disk) -> Result<Prepared, StorageError> {
        let failed = |source| StorageError::from_io(FREEZE, &self.directory, source);
        // The kernel sends what it gathered before it clones: now, rather than in the pause.
        disk.split().1.file.sync_data().map_err(failed)?;
        prepare_copy(&self.directory, disk)
    }

    fn freeze(&self, prepared: Prepared) -> Result<Frozen, StorageError> {
        freeze_copy(&self.directory, prepared, share_or_copy)
    }

    fn branch(&self, frozen: &FrozenDisk) -> Result<Disk, StorageError> {
        let (below, top) = frozen.split();
        let failed = |source| StorageError::from_io(BRANCH, &self.directory, source);
        let file = nameless_file(&self.directory).map_err(failed)?;
        if !on_one_file_system(&top.file, &file).map_err(failed)? {
            return OverlayStore::new(self.directory.clone()).branch(frozen);
        }
        share_or_copy(&top.file, &file).map_err(failed)?;
        Ok(new_disk(below, file, top.format, frozen.size_bytes()))
    }

    fn branch_ahead(&self, expected: &FrozenDisk) -> Result<Disk, StorageError> {
        empty_like(&self.directory, expected)
    }

    fn fill(&self, disk: &Disk, frozen: &FrozenDisk) -> Result<(), StorageError> {
        share_or_copy(&frozen.split().1.file, &disk.split().1.file)
            .map_err(|source| StorageError::from_io(BRANCH, &self.directory, source))
    }
}

fn on_one_file_system(one: &File, other: &File) -> io::Result<bool> {
    Ok(one.metadata()?.dev() == other.metadata()?.dev())
}

impl DiskStore for OverlayStore {
    fn method(&self) -> BranchMethod {
        BranchMethod::Overlay
    }

    fn prepare(&self, disk: &Disk) -> Result<Prepared, StorageError> {
        let (below, top) = disk.split();
        let failed = |source| StorageError::from_io(FREEZE, &self.directory, source);
        Ok(Prepared {
            below: below.to_vec(),
            top: top.clone(),
            size_bytes: disk.size_bytes(),
            spare: self.overlay(disk.size_bytes()).map_err(failed)?,
            frozen: read_only(&top.file).map_err(failed)?,
        })
    }

    fn freeze(&self, prepared: Prepared) -> Result<Frozen, StorageError> {
        let Prepared {
            mut below,
            top,
            size_bytes,
            spare,
            frozen,
        } = prepared;
        below.push(layer(frozen, top.format));
        Ok(Frozen {
            continue_on: Some(new_disk(&below, spare, LayerFormat::Qcow2, size_bytes)),
            frozen_disk: FrozenDisk::new(below, size_bytes),
        })
    }

    fn branch(&self, frozen: &FrozenDisk) -> Result<Disk, StorageError> {
        let size_bytes = frozen.size_bytes();
        let file = self
            .overlay(size_bytes)
            .map_err(|source| StorageError::from_io(BRANCH, &self.directory, source))?;
        Ok(new_disk(
            frozen.layers(),
            file,
            LayerFormat::Qcow2,
            size_bytes,
        ))
    }

    fn branch_ahead(&self, expected: &FrozenDisk) -> Result<Disk, StorageError> {
        self.branch(expected)
    }

    fn fill(&self, _disk: &Disk, _frozen: &FrozenDisk) -> Result<(), StorageError> {
        Ok(())
    }
}

impl OverlayStore {
    fn overlay(&self, size_bytes: u64) -> io::Result<File> {
        let file = nameless_file(&self.directory)?;
        qcow2::write_empty(&file, size_bytes)?;
        Ok(file)
    }
}

impl DiskStore for CopyStore {
    fn method(&self) -> BranchMethod {
        BranchMethod::Copy
    }

    fn prepare(&self, disk: &Disk) -> Result<Prepared, StorageError> {
        prepare_copy(&self.directory, disk)
    }

    fn freeze(&self, prepared: Prepared) -> Result<Frozen, StorageError> {
        freeze_copy(&self.directory, prepared, sparse_copy)
    }

    fn branch(&self, frozen: &FrozenDisk) -> Result<Disk, StorageError> {
        let (below, top) = frozen.split();
        let failed = |source| StorageError::from_io(BRANCH, &self.directory, source);
        let file = nameless_file(&self.directory).map_err(failed)?;
        sparse_copy(&top.file, &file).map_err(failed)?;
        Ok(new_disk(below, file, top.format, frozen.size_bytes()))
    }

    fn branch_ahead(&self, expected: &FrozenDisk) -> Result<Disk, StorageError> {
        empty_like(&self.directory, expected)
    }

    fn fill(&self, disk: &Disk, frozen: &FrozenDisk) -> Result<(), StorageError> {
        sparse_copy(&frozen.split().1.file, &disk.split().1.file)
            .map_err(|source| StorageError::from_io(BRANCH, &self.directory, source))
    }
}

const FREEZE: &str = "freeze a disk";
const BRANCH: &str = "make the disk of a clone";

/// A disk over the same layers, its own file empty and of the format of the frozen disk's last.
fn empty_like(directory: &Path, frozen: &FrozenDisk) -> Result<Disk, StorageError> {
    let (below, top) = frozen.split();
    let size_bytes = frozen.size_bytes();
    let file = empty_file(directory, top.format, size_bytes)
        .map_err(|source| StorageError::from_io(BRANCH, directory, source))?;
    Ok(new_disk(below, file, top.format, size_bytes))
}

/// A file that a hypervisor can open.
fn empty_file(directory: &Path, format: LayerFormat, size_bytes: u64) -> io::Result<File> {
    let file = nameless_file(directory)?;
    match format {
        LayerFormat::Raw => file.set_len(size_bytes)?,
        LayerFormat::Qcow2 => qcow2::write_empty(&file, size_bytes)?,
    }
    Ok(file)
}

fn prepare_copy(directory: &Path, disk: &Disk) -> Result<Prepared, StorageError> {
    let (below, top) = disk.split();
    let files = || {
        let spare = empty_file(directory, top.format, disk.size_bytes())?;
        let frozen = read_only(&spare)?;
        Ok((spare, frozen))
    };
    let (spare, frozen) =
        files().map_err(|source| StorageError::from_io(FREEZE, directory, source))?;
    Ok(Prepared {
        below: below.to_vec(),
        top: top.clone(),
        size_bytes: disk.size_bytes(),
        spare,
        frozen,
    })
}

fn freeze_copy(
    directory: &Path,
    prepared: Prepared,
    copy: impl FnOnce(&File, &File) -> io::Result<()>,
) -> Result<Frozen, StorageError> {
    let Prepared {
        mut below,
        top,
        size_bytes,
        spare,
        frozen,
    } = prepared;
    copy(&top.file, &spare).map_err(|source| StorageError::from_io(FREEZE, directory, source))?;
    below.push(layer(frozen, top.format));
    Ok(Frozen {
        frozen_disk: FrozenDisk::new(below, size_bytes),
        continue_on: None,
    })
}

fn layer(file: File, format: LayerFormat) -> Layer {
    Layer {
        file: Arc::new(file),
        format,
    }
}

fn new_disk(below: &[Layer], file: File, format: LayerFormat, size_bytes: u64) -> Disk {
    Disk::new(below, layer(file, format), size_bytes)
}
