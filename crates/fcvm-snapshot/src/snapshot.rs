//! A snapshot that is there.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use fcvm_memory::page_file::{anonymous_file, seal};
use fcvm_memory::uffd::{WORKING_SET_BYTES_MAX, WorkingSet};
use fcvm_memory::{Content, MemoryError, PAGE_BYTES, PageFile};
use fcvm_storage::FrozenDisk;
use fcvm_types::SnapshotTag;

use crate::DEPTH_MAX;
use crate::error::SnapshotError;
use crate::files::{self, MANIFEST, MEMORY, POOL, STATE, WORKING_SET};
use crate::manifest::{MANIFEST_BYTES_MAX, Manifest, MemoryKind, ParentRef};
use crate::store::{DiskPlace, SnapshotStore};

/// Largest device state that is read.
const STATE_BYTES_MAX: u64 = 64 << 20;

/// A snapshot, open: what was read of it stays readable when it is removed.
#[derive(Debug)]
pub struct Snapshot {
    store: SnapshotStore,
    path: PathBuf,
    manifest: Manifest,
    memory: PageFile,
    state: File,
    disk: Option<FrozenDisk>,
}

/// Space that a snapshot takes, in bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct DiskSpace {
    /// What is free when it goes: files that no other snapshot shares.
    pub own_bytes: u64,
    /// Layers of its disk that others have too.
    pub shared_bytes: u64,
}

impl Snapshot {
    pub(crate) fn open(store: &SnapshotStore, tag: &SnapshotTag) -> Result<Self, SnapshotError> {
        let path = store.folder(tag);
        match path.symlink_metadata() {
            Ok(metadata) if metadata.is_dir() => {}
            Ok(_) => return Err(SnapshotError::damaged(tag, "it is not a folder")),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Err(SnapshotError::NotFound(tag.clone()));
            }
            Err(error) => return Err(SnapshotError::io("open a snapshot", &path)(error)),
        }
        let unreadable = |name: &'static str| {
            let (tag, path) = (tag.clone(), path.clone());
            move |error: io::Error| match error.kind() {
                io::ErrorKind::PermissionDenied => {
                    SnapshotError::io("open a snapshot", &path)(error)
                }
                io::ErrorKind::NotFound if !path.exists() => SnapshotError::NotFound(tag.clone()),
                _ => SnapshotError::damaged(&tag, format!("{name} cannot be read: {error}")),
            }
        };
        let bytes = read_manifest(&path.join(MANIFEST)).map_err(unreadable(MANIFEST))?;
        let manifest = Manifest::parse(tag, &bytes)?;
        let memory = files::open(&path.join(MEMORY)).map_err(unreadable(MEMORY))?;
        let memory = PageFile::open(memory)
            .map_err(|source| SnapshotError::damaged(tag, source.to_string()))?;
        check_memory(&memory, &manifest).map_err(|reason| SnapshotError::damaged(tag, reason))?;
        let state = files::open(&path.join(STATE)).map_err(unreadable(STATE))?;
        let found = state.metadata().map_err(unreadable(STATE))?.len();
        let wanted = manifest.device_state.file_bytes;
        if found != wanted || found > STATE_BYTES_MAX {
            let reason = format!("{STATE} has {found} bytes and had {wanted}");
            return Err(SnapshotError::damaged(tag, reason));
        }
        let disk = manifest.disk.as_ref();
        let place = DiskPlace::of(store, &path).map_err(unreadable(POOL))?;
        let disk = disk
            .map(|disk| FrozenDisk::open(place.shelf(), disk))
            .transpose();
        let disk = disk.map_err(|source| SnapshotError::Disk {
            tag: tag.clone(),
            source,
        })?;
        Ok(Self {
            store: store.clone(),
            path,
            manifest,
            memory,
            state,
            disk,
        })
    }

    /// Its tag.
    pub fn tag(&self) -> &SnapshotTag {
        &self.manifest.tag
    }

    /// What is written down of it.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// How another one names it as its parent.
    pub fn reference(&self) -> ParentRef {
        ParentRef {
            tag: self.manifest.tag.clone(),
            id: self.manifest.id.clone(),
        }
    }

    /// Its place in the line of snapshots that it is a difference to: a whole one is 1.
    ///
    /// # Errors
    ///
    /// One of the line is gone or damaged.
    pub fn depth(&self) -> Result<usize, SnapshotError> {
        Ok(self.ancestors()?.len() + 1)
    }

    /// Loads the memory into a new anonymous file, which is sealed. Every page is checked. `progress` is
    /// told how many bytes of how many have been read.
    ///
    /// # Errors
    ///
    /// A snapshot of the line is gone or damaged, or the host has no memory left.
    pub fn load_memory(&self, progress: impl FnMut(u64, u64)) -> Result<File, SnapshotError> {
        let memory = self.load_unsealed(progress)?;
        seal(&memory).map_err(|source| self.memory_error(source))?;
        Ok(memory)
    }

    pub(crate) fn load_unsealed(
        &self,
        mut progress: impl FnMut(u64, u64),
    ) -> Result<File, SnapshotError> {
        let ancestors = self.ancestors()?;
        let size = self.manifest.memory.memory_bytes;
        let told = |source| self.memory_error(source);
        let memory = anonymous_file("fcvm-guest-memory", size).map_err(told)?;
        let line = || ancestors.iter().rev().chain([self]);
        let total: u64 = line().map(|one| one.memory.page_count() * PAGE_BYTES).sum();
        let mut done = 0;
        for one in line() {
            let advance = |pages| {
                done += pages * PAGE_BYTES;
                progress(done, total);
            };
            one.memory
                .restore_with_progress(&memory, advance)
                .map_err(|source| one.memory_error(source))?;
        }
        Ok(memory)
    }

    /// Reads and checks the state of the devices.
    ///
    /// # Errors
    ///
    /// It is not what was written.
    pub fn device_state(&self) -> Result<Vec<u8>, SnapshotError> {
        let length = usize::try_from(self.manifest.device_state.file_bytes).unwrap_or(0);
        let mut bytes = vec![0; length];
        self.state
            .read_exact_at(&mut bytes, 0)
            .map_err(|error| self.damaged(format!("{STATE} cannot be read: {error}")))?;
        if crc32c::crc32c(&bytes) != self.manifest.device_state.crc32c {
            return Err(self.damaged(format!("the checksum of {STATE} is wrong")));
        }
        Ok(bytes)
    }

    /// The pages that a clone asked for in its first seconds, where that was recorded.
    ///
    /// # Errors
    ///
    /// What is there is damaged, or of another snapshot: clones do without it, and it can be recorded anew.
    pub fn working_set(&self) -> Result<Option<WorkingSet>, SnapshotError> {
        let path = self.path.join(WORKING_SET);
        let file = match files::open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(SnapshotError::io("read a working set", &path)(error)),
        };
        let mut bytes = Vec::new();
        file.take(WORKING_SET_BYTES_MAX as u64 + 1)
            .read_to_end(&mut bytes)
            .map_err(SnapshotError::io("read a working set", &path))?;
        let memory_bytes = self.manifest.memory.memory_bytes;
        let set = WorkingSet::decode(&bytes, memory_bytes, &self.id_bytes());
        set.map(Some).map_err(|source| self.memory_error(source))
    }

    /// Keeps the pages that a clone asked for, in place of what was kept before, but not a part in place of
    /// what was recorded whole: says whether it is kept. It is there whole or not at all, and it is no
    /// loss when it is not.
    ///
    /// # Errors
    ///
    /// The snapshot was removed, or the file system is full.
    pub fn store_working_set(&self, set: &WorkingSet) -> Result<bool, SnapshotError> {
        let kept = self.working_set().ok().flatten();
        if !set.is_complete() && kept.is_some_and(|kept| kept.is_complete()) {
            return Ok(false);
        }
        let write = || {
            let path = self
                .path
                .join(format!(".{WORKING_SET}-{}", files::random_hex()?));
            let memory_bytes = self.manifest.memory.memory_bytes;
            let bytes = set.encode(memory_bytes, &self.id_bytes());
            let written = files::create(&path).and_then(|mut file| {
                file.write_all(&bytes)?;
                file.sync_all()?;
                std::fs::rename(&path, self.path.join(WORKING_SET))
            });
            if written.is_err() {
                let _ = std::fs::remove_file(&path);
            }
            written
        };
        write().map_err(SnapshotError::io("keep a working set", &self.path))?;
        Ok(true)
    }

    /// Its folder.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its id as 128 bits.
    fn id_bytes(&self) -> [u8; 16] {
        let number = u128::from_str_radix(self.manifest.id.as_str(), 16).unwrap_or(0);
        number.to_be_bytes()
    }

    /// Its disk, open for reading alone, where the VM has one.
    pub fn disk(&self) -> Option<FrozenDisk> {
        self.disk.clone()
    }

    /// Reads and checks every byte of it, and of the memory of those that it is a difference to.
    ///
    /// # Errors
    ///
    /// Something is not what was written.
    pub fn verify(&self) -> Result<(), SnapshotError> {
        self.device_state()?;
        for one in self.ancestors()?.iter().chain([self]) {
            one.memory
                .verify()
                .map_err(|source| one.memory_error(source))?;
        }
        if let Some(disk) = &self.manifest.disk {
            let place = DiskPlace::of(&self.store, &self.path)
                .map_err(|error| self.damaged(format!("{POOL} cannot be read: {error}")))?;
            disk.verify(place.shelf())
                .map_err(|source| SnapshotError::Disk {
                    tag: self.tag().clone(),
                    source,
                })?;
        }
        Ok(())
    }

    /// Space that it takes.
    ///
    /// # Errors
    ///
    /// Its folder cannot be read.
    pub fn disk_space(&self) -> Result<DiskSpace, SnapshotError> {
        let measure = || {
            let mut space = DiskSpace::default();
            for entry in std::fs::read_dir(&self.path)? {
                let metadata = entry?.metadata()?;
                let bytes = metadata.blocks() * 512;
                if metadata.nlink() > 1 {
                    space.shared_bytes += bytes;
                } else {
                    space.own_bytes += bytes;
                }
            }
            let in_pool = self.disk.as_ref().map(FrozenDisk::pool_usage);
            let in_pool = in_pool.unwrap_or_default();
            space.own_bytes += in_pool.own_bytes;
            space.shared_bytes += in_pool.shared_bytes;
            Ok(space)
        };
        measure().map_err(SnapshotError::io("measure a snapshot", &self.path))
    }

    /// Those that it is a difference to, the nearest first; the last one is whole.
    fn ancestors(&self) -> Result<Vec<Self>, SnapshotError> {
        let mut ancestors: Vec<Self> = Vec::new();
        let mut next = self.manifest.parent.clone();
        while let Some(wanted) = next {
            let child = ancestors.last().unwrap_or(self);
            let gone = || SnapshotError::ParentGone {
                tag: child.tag().clone(),
                parent: wanted.tag.clone(),
            };
            // Also where manifests lead in a circle.
            if ancestors.len() + 1 >= DEPTH_MAX {
                return Err(SnapshotError::TooDeep {
                    tag: self.tag().clone(),
                    depth: ancestors.len() + 2,
                });
            }
            let parent = match Self::open(&self.store, &wanted.tag) {
                Err(SnapshotError::NotFound(_)) => return Err(gone()),
                parent => parent?,
            };
            if parent.manifest.id != wanted.id {
                return Err(gone());
            }
            if parent.manifest.memory.memory_bytes != self.manifest.memory.memory_bytes {
                return Err(child.damaged("its parent's memory has another size"));
            }
            next = parent.manifest.parent.clone();
            ancestors.push(parent);
        }
        Ok(ancestors)
    }

    fn damaged(&self, reason: impl Into<String>) -> SnapshotError {
        SnapshotError::damaged(self.tag(), reason)
    }

    fn memory_error(&self, source: MemoryError) -> SnapshotError {
        match source {
            MemoryError::Damaged { reason } => {
                self.damaged(format!("the memory file is damaged: {reason}"))
            }
            source => SnapshotError::Memory {
                tag: self.tag().clone(),
                source,
            },
        }
    }
}

/// Why a memory file is not the one that the manifest tells of.
fn check_memory(memory: &PageFile, manifest: &Manifest) -> Result<(), String> {
    let kind = match memory.content() {
        Content::Whole => MemoryKind::Whole,
        Content::Difference => MemoryKind::Difference,
    };
    let wanted = &manifest.memory;
    let found_bytes = memory.file_bytes().map_err(|error| error.to_string())?;
    let is_it = kind == wanted.kind
        && memory.memory_bytes() == wanted.memory_bytes
        && memory.page_count() == wanted.page_count
        && found_bytes == wanted.file_bytes
        && memory.checksum() == wanted.crc32c;
    if is_it {
        return Ok(());
    }
    Err(format!("{MEMORY} is not the one that was written"))
}

/// The bytes of a manifest, no more than can be one.
pub(crate) fn read_manifest(path: &Path) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let limit = MANIFEST_BYTES_MAX as u64 + 1;
    files::open(path)?.take(limit).read_to_end(&mut bytes)?;
    Ok(bytes)
}
