//! A snapshot that is being written.

use std::fs::File;
use std::io::Write;
use std::path::PathBuf;

use fcvm_memory::page_file::{anonymous_file, seal};
use fcvm_memory::{Content, MemoryError, PageFile};
use fcvm_storage::{DiskManifest, FrozenDisk, StorageError};
use fcvm_types::{SnapshotTag, VmId};
use time::OffsetDateTime;

use crate::DEPTH_MAX;
use crate::error::SnapshotError;
use crate::files::{self, DISK, MANIFEST, MEMORY, POOL, STATE};
use crate::manifest::{
    DeviceStateManifest, Manifest, ManifestFields, MemoryKind, MemoryManifest, ParentRef,
    SnapshotId,
};
use crate::snapshot::Snapshot;
use crate::store::{DiskPlace, SnapshotStore};

/// A snapshot that nobody sees yet. Dropped unfinished it leaves nothing behind; a process that dies with
/// it leaves a hidden folder, which [`SnapshotStore::sweep`] and the next creator of the tag remove.
#[derive(Debug)]
pub struct Draft {
    store: SnapshotStore,
    tag: SnapshotTag,
    path: PathBuf,
    /// Locked as long as the draft is: how others see that its creator lives.
    folder: File,
    memory: Option<(MemoryManifest, Option<ParentRef>)>,
    device_state: Option<DeviceStateManifest>,
    disk: Option<DiskManifest>,
    is_finished: bool,
}

impl Draft {
    pub(crate) fn new(store: SnapshotStore, tag: SnapshotTag, path: PathBuf, folder: File) -> Self {
        Self {
            store,
            tag,
            path,
            folder,
            memory: None,
            device_state: None,
            disk: None,
            is_finished: false,
        }
    }

    /// Its tag.
    pub fn tag(&self) -> &SnapshotTag {
        &self.tag
    }

    /// Writes all of a memory: an anonymous file that nobody writes to, with the pages of `over` over it
    /// where there are any.
    ///
    /// # Errors
    ///
    /// The file system is full, `over` is damaged or of another size, or a memory was written before.
    pub fn write_memory_whole(
        &mut self,
        memory: &File,
        over: Option<&PageFile>,
    ) -> Result<(), SnapshotError> {
        self.write_memory(None, |target| match over {
            Some(over) => over.write_merged(memory, target),
            None => PageFile::write_whole(memory, target),
        })
    }

    /// Writes those pages of `over` that differ from `memory`, which must be what
    /// [`Snapshot::load_memory`] of `parent` gave.
    ///
    /// # Errors
    ///
    /// As [`write_memory_whole`](Self::write_memory_whole); or there are [`DEPTH_MAX`]
    /// snapshots in the line of `parent` already, or one of them is gone.
    pub fn write_memory_difference(
        &mut self,
        memory: &File,
        over: &PageFile,
        parent: &Snapshot,
    ) -> Result<(), SnapshotError> {
        self.check_line(over.memory_bytes(), parent)?;
        self.write_memory(Some(parent.reference()), |target| {
            over.write_changed(memory, target)
        })
    }

    /// Writes those pages of a whole memory that differ from that of `parent`, which is loaded for it.
    ///
    /// # Errors
    ///
    /// As [`write_memory_difference`](Self::write_memory_difference).
    pub fn write_memory_comparison(
        &mut self,
        memory: &File,
        parent: &Snapshot,
    ) -> Result<(), SnapshotError> {
        let failed = SnapshotError::io("read the memory of a VM", self.store.directory());
        self.check_line(memory.metadata().map_err(failed)?.len(), parent)?;
        let below = parent.load_unsealed(|_, _| {})?;
        self.write_memory(Some(parent.reference()), |target| {
            PageFile::write_comparison(memory, &below, target)
        })
    }

    /// Refuses a parent that a memory of this size cannot be a difference to.
    fn check_line(&self, memory_bytes: u64, parent: &Snapshot) -> Result<(), SnapshotError> {
        let depth = parent.depth()? + 1;
        if depth > DEPTH_MAX {
            return Err(SnapshotError::TooDeep {
                tag: self.tag.clone(),
                depth,
            });
        }
        let size = parent.manifest().memory.memory_bytes;
        if memory_bytes != size {
            return Err(self.refused(format!(
                "its memory has {memory_bytes} bytes, and that of its parent '{}' has {size}",
                parent.tag()
            )));
        }
        Ok(())
    }

    fn write_memory(
        &mut self,
        parent: Option<ParentRef>,
        write: impl FnOnce(&File) -> Result<(), MemoryError>,
    ) -> Result<(), SnapshotError> {
        if self.memory.is_some() {
            return Err(self.refused("its memory is written already"));
        }
        let failed = SnapshotError::io("write the memory of a snapshot", self.store.directory());
        let file = files::create(&self.path.join(MEMORY)).map_err(&failed)?;
        let told = |source| SnapshotError::memory(&self.tag, self.store.directory(), source);
        write(&file).map_err(told)?;
        file.sync_all().map_err(&failed)?;
        let pages = PageFile::open(file).map_err(told)?;
        let manifest = MemoryManifest {
            memory_bytes: pages.memory_bytes(),
            kind: match pages.content() {
                Content::Whole => MemoryKind::Whole,
                Content::Difference => MemoryKind::Difference,
            },
            file_bytes: pages.file_bytes().map_err(&failed)?,
            page_count: pages.page_count(),
            crc32c: pages.checksum(),
        };
        self.memory = Some((manifest, parent));
        Ok(())
    }

    /// Writes the state of the devices.
    ///
    /// # Errors
    ///
    /// The file system is full, or a state was written before.
    pub fn write_state(&mut self, state: &[u8]) -> Result<(), SnapshotError> {
        if self.device_state.is_some() {
            return Err(self.refused("its device state is written already"));
        }
        self.write_file(STATE, state)?;
        self.device_state = Some(DeviceStateManifest {
            file_bytes: state.len() as u64,
            crc32c: crc32c::crc32c(state),
        });
        Ok(())
    }

    /// Keeps the disk, see [`FrozenDisk::persist`]: its files get names here, and are copied only where
    /// they are on another file system.
    ///
    /// # Errors
    ///
    /// The file system is full, or a disk was written before.
    pub fn write_disk(&mut self, disk: &FrozenDisk) -> Result<(), SnapshotError> {
        if self.disk.is_some() {
            return Err(self.refused("its disk is written already"));
        }
        let place = self.begin_disk(disk)?;
        let kept = disk
            .persist(place.shelf(), DISK)
            .map_err(|error| match error {
                // The hidden folder is nobody's concern.
                StorageError::Full { action, .. } => SnapshotError::Full {
                    action,
                    directory: self.store.directory().to_owned(),
                },
                source => SnapshotError::Disk {
                    tag: self.tag.clone(),
                    source,
                },
            })?;
        self.disk = Some(kept);
        Ok(())
    }

    /// What is kept in the pool is told of before it is there, so that whoever removes the folder finds it.
    fn begin_disk(&self, disk: &FrozenDisk) -> Result<DiskPlace, SnapshotError> {
        let failed = SnapshotError::io("keep a disk", self.store.directory());
        if let Some(pool) = self.store.pool()
            && disk.is_partly_in(pool).map_err(&failed)?
        {
            let prefix = files::random_hex().map_err(&failed)?;
            self.write_file(POOL, prefix.as_bytes())?;
            self.folder.sync_all().map_err(&failed)?;
            self.store.sync().map_err(&failed)?;
        }
        DiskPlace::of(&self.store, &self.path).map_err(&failed)
    }

    /// Reads back what was written, with all checksums, for a trial before the snapshot gets its tag.
    /// `parent` is that of a difference.
    ///
    /// # Errors
    ///
    /// Something has not been written, or is not what was written.
    pub fn load(&self, parent: Option<&Snapshot>) -> Result<Stored, SnapshotError> {
        let failed = SnapshotError::io("read a snapshot back", self.store.directory());
        let told = |source| SnapshotError::memory(&self.tag, self.store.directory(), source);
        let pages = File::open(self.path.join(MEMORY)).map_err(&failed)?;
        let pages = PageFile::open(pages).map_err(told)?;
        let memory = match (pages.content(), parent) {
            (Content::Difference, Some(parent)) => parent.load_unsealed(|_, _| {})?,
            (Content::Difference, None) => {
                return Err(self.refused("it is a difference, and its parent is not known"));
            }
            (Content::Whole, _) => {
                anonymous_file("fcvm-guest-memory", pages.memory_bytes()).map_err(told)?
            }
        };
        pages.restore_into(&memory).map_err(told)?;
        seal(&memory).map_err(told)?;
        let device_state = std::fs::read(self.path.join(STATE)).map_err(&failed)?;
        let written = self.device_state.as_ref().map(|state| state.crc32c);
        if written != Some(crc32c::crc32c(&device_state)) {
            return Err(self.refused("its device state is not what was written"));
        }
        let disk_told = |source| SnapshotError::Disk {
            tag: self.tag.clone(),
            source,
        };
        let disk = match &self.disk {
            Some(manifest) => {
                let place = DiskPlace::of(&self.store, &self.path).map_err(&failed)?;
                manifest.verify(place.shelf()).map_err(disk_told)?;
                Some(FrozenDisk::open(place.shelf(), manifest).map_err(disk_told)?)
            }
            None => None,
        };
        Ok(Stored {
            memory,
            device_state,
            disk,
        })
    }

    /// Writes the manifest and gives the snapshot its tag: from here on it is there.
    ///
    /// # Errors
    ///
    /// Memory or device state have not been written, the file system is full, or the parent was removed
    /// meanwhile. Nothing is left then.
    pub fn finish(mut self, fields: ManifestFields) -> Result<Snapshot, SnapshotError> {
        let failed = SnapshotError::io("create a snapshot", self.store.directory());
        let (memory, parent) = self
            .memory
            .take()
            .ok_or_else(|| self.refused("its memory has not been written"))?;
        let device_state = self
            .device_state
            .take()
            .ok_or_else(|| self.refused("its device state has not been written"))?;
        let id: VmId = files::random_hex()
            .map_err(&failed)?
            .parse()
            .map_err(|error| failed(std::io::Error::other(error)))?;
        let manifest = Manifest {
            tag: self.tag.clone(),
            id: SnapshotId::new(id),
            created_at: OffsetDateTime::now_utc(),
            memory,
            parent,
            device_state,
            disk: self.disk.take(),
            fields,
        };
        self.write_file(MANIFEST, &manifest.encode()?)?;
        self.folder.sync_all().map_err(&failed)?;
        let lock = self.store.lock().map_err(&failed)?;
        if let Some(parent) = &manifest.parent {
            self.check_parent(parent)?;
        }
        files::rename(&self.path, &self.store.folder(&self.tag)).map_err(|error| {
            if error.kind() == std::io::ErrorKind::AlreadyExists {
                return SnapshotError::Exists(self.tag.clone());
            }
            failed(error)
        })?;
        let opened = self.store.sync().map_err(&failed);
        let opened = opened.and_then(|()| self.store.open(&self.tag));
        match opened {
            Ok(_) => self.is_finished = true,
            // It goes with the draft. Where that cannot be, it is there, and whole.
            Err(_) => drop(files::rename(&self.store.folder(&self.tag), &self.path)),
        }
        drop(lock);
        opened
    }

    fn check_parent(&self, parent: &ParentRef) -> Result<(), SnapshotError> {
        match self.store.open(&parent.tag) {
            Ok(found) if found.manifest().id == parent.id => Ok(()),
            Ok(_) | Err(SnapshotError::NotFound(_)) => Err(SnapshotError::ParentGone {
                tag: self.tag.clone(),
                parent: parent.tag.clone(),
            }),
            Err(error) => Err(error),
        }
    }

    fn write_file(&self, name: &str, bytes: &[u8]) -> Result<(), SnapshotError> {
        let write = || {
            let mut file = files::create(&self.path.join(name))?;
            file.write_all(bytes)?;
            file.sync_all()
        };
        write().map_err(SnapshotError::io(
            "write a snapshot",
            self.store.directory(),
        ))
    }

    fn refused(&self, reason: impl Into<String>) -> SnapshotError {
        SnapshotError::Refused {
            tag: self.tag.clone(),
            reason: reason.into(),
        }
    }
}

/// What a draft has on the disk.
#[derive(Debug)]
pub struct Stored {
    /// The memory, in a sealed anonymous file.
    pub memory: File,
    /// The state of the devices.
    pub device_state: Vec<u8>,
    /// The disk, open for reading alone.
    pub disk: Option<FrozenDisk>,
}

impl Drop for Draft {
    fn drop(&mut self) {
        if !self.is_finished {
            // What cannot be removed now is swept later.
            let _ = self.store.remove_folder(&self.path);
        }
    }
}
