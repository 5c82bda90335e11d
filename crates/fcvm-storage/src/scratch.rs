//! Scratch disks: an empty ext4 file system for the writable layer of a VM.
//!
//! `mkfs.ext4` runs once per size; its result is kept as a template, and a disk is a clone of it.
//! Templates are named by their size and by the options that made them, and are never changed.

use std::fs::{File, TryLockError};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use fcvm_types::ByteSize;
use rustix::io::Errno;

use crate::clone::{CloneMethod, clone_file};
use crate::error::StorageError;
use crate::host::{name_file, nameless_file};

/// Smallest scratch disk.
pub const SCRATCH_SIZE_MIN: ByteSize = ByteSize::from_mib(16);
/// Largest scratch disk: the largest file of an ext4 host.
pub const SCRATCH_SIZE_MAX: ByteSize = ByteSize::from_mib((16 << 20) - 1);

/// Features and sizes, written out so that /etc/mke2fs.conf has no say. No journal and no checksums
/// of metadata: a scratch disk ends with its VM, so there is no crash to recover from, and both cost
/// processor time in the guest. No room to grow (resize_inode), few spare superblocks. What the
/// guest finds free of inodes and bitmaps is not written here (uninit_bg).
const LAYOUT: [&str; 8] = [
    "-O",
    "none,64bit,dir_index,dir_nlink,ext_attr,extent,extra_isize,filetype,flex_bg,huge_file,\
     large_file,sparse_super2,uninit_bg",
    "-b",
    "4096",
    "-I",
    "256",
    "-i",
    "16384",
];
/// No blocks reserved for root; the same bytes at every run.
const IDENTITY: [&str; 6] = [
    "-m",
    "0",
    "-L",
    "fcvm-scratch",
    "-U",
    "66637666-6d00-4000-8000-000000000001",
];
/// The file is a hole, so there is nothing to zero, neither here nor by the guest in the background.
const EXTENDED: &str = "nodiscard,root_owner=0:0,lazy_itable_init=1,\
                        hash_seed=66637666-6d00-4000-8000-000000000002";
/// e2fsprogs from 1.46.6 on: marks the inode tables as zeroed, so that the guest does not do it.
const PREZEROED: &str = ",assume_storage_prezeroed=1";

/// Where scratch disks and their templates are made.
#[derive(Debug, Clone)]
pub struct ScratchStore {
    directory: PathBuf,
    mkfs: PathBuf,
}

/// A scratch disk: an ext4 file system labelled `fcvm-scratch`, empty but for `lost+found`.
#[derive(Debug)]
pub struct ScratchDisk {
    /// The disk, open for reading and writing. It has no name: it is gone when the last descriptor
    /// of it is closed.
    pub file: File,
    /// How it came from its template.
    pub method: CloneMethod,
}

/// Looks for mkfs.ext4 in the directories of `search_path` (a list as in the PATH variable) and then
/// in /usr/sbin and /sbin, which an ordinary user's list may lack.
pub fn find_mkfs(search_path: &str) -> Option<PathBuf> {
    std::env::split_paths(search_path)
        .filter(|directory| directory.is_absolute())
        .chain(["/usr/sbin", "/sbin"].map(PathBuf::from))
        .map(|directory| directory.join("mkfs.ext4"))
        .find(|path| {
            path.metadata()
                .is_ok_and(|data| data.is_file() && data.permissions().mode() & 0o111 != 0)
        })
}

impl ScratchStore {
    /// Scratch disks in `directory`, which is created when the first is made; `mkfs` is the program
    /// mkfs.ext4.
    pub fn new(directory: PathBuf, mkfs: PathBuf) -> Self {
        Self { directory, mkfs }
    }

    /// Makes a disk. Nothing of it is left when this fails or when the caller dies.
    ///
    /// # Errors
    ///
    /// The size is out of range, the directory can not be written to or is full, or mkfs.ext4 can
    /// not be run.
    pub fn create(&self, size: ByteSize) -> Result<ScratchDisk, StorageError> {
        // Whole blocks, of 4 KiB.
        let size = ByteSize::from_bytes(size.bytes() & !0xfff);
        if size < SCRATCH_SIZE_MIN || size > SCRATCH_SIZE_MAX {
            return Err(StorageError::Size {
                size,
                min: SCRATCH_SIZE_MIN,
                max: SCRATCH_SIZE_MAX,
            });
        }
        let template = self.template(size)?;
        let failed = |source| self.failed("make a scratch disk", size, source);
        let file = nameless_file(&self.directory).map_err(failed)?;
        let method = clone_file(&template, &file).map_err(failed)?;
        Ok(ScratchDisk { file, method })
    }

    /// Removes all templates and tells how many bytes that freed. Disks are not touched; a disk
    /// made later makes its template anew.
    ///
    /// # Errors
    ///
    /// A template can not be removed.
    pub fn prune(&self) -> Result<u64, StorageError> {
        let failed = |source| StorageError::from_io("remove templates", &self.directory, source);
        let entries = match self.directory.read_dir() {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(0),
            Err(error) => return Err(failed(error)),
        };
        let mut freed = 0;
        for entry in entries {
            let entry = entry.map_err(failed)?;
            let name = entry.file_name();
            if !name.to_string_lossy().starts_with(TEMPLATE_PREFIX) {
                continue;
            }
            let blocks = entry.metadata().map_or(0, |data| data.blocks());
            match std::fs::remove_file(entry.path()) {
                Ok(()) => freed += blocks * 512,
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(failed(error)),
            }
        }
        Ok(freed)
    }

    /// The template of a size, made where it is missing or damaged.
    fn template(&self, size: ByteSize) -> Result<File, StorageError> {
        let path = self.directory.join(template_name(size));
        if let Some(template) = open_template(&path, size) {
            return Ok(template);
        }
        let failed = |source| self.failed("make the template of scratch disks", size, source);
        std::fs::create_dir_all(&self.directory).map_err(failed)?;
        // The directory itself is the lock: no file is left, and the kernel frees it at death.
        let lock = File::open(&self.directory).map_err(failed)?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => lock.lock().map_err(failed)?,
            Err(TryLockError::Error(error)) => return Err(failed(error)),
        }
        if let Some(template) = open_template(&path, size) {
            return Ok(template);
        }
        let file = nameless_file(&self.directory).map_err(failed)?;
        file.set_len(size.bytes()).map_err(failed)?;
        self.make_file_system(&file, size)?;
        // Its bytes must be there before its name is.
        file.sync_all().map_err(failed)?;
        match publish(&file, &path) {
            Ok(()) => {}
            // A file that had a name can not get one again, see `nameless_file`: this file system
            // keeps no templates.
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(file),
            Err(error) => return Err(failed(error)),
        }
        open_template(&path, size).ok_or_else(|| StorageError::MkfsFailed {
            path: self.mkfs.clone(),
            reason: "its result is no ext4 file system".to_owned(),
        })
    }

    fn make_file_system(&self, file: &File, size: ByteSize) -> Result<(), StorageError> {
        let with_prezeroed = format!("{EXTENDED}{PREZEROED}");
        match self.run_mkfs(file, &with_prezeroed) {
            Err(StorageError::MkfsFailed { reason, .. }) if !is_full(&reason) => {
                tracing::trace!("{}: {reason}", self.mkfs.display());
                // An older one does not know the option.
                self.run_mkfs(file, EXTENDED)
            }
            result => result,
        }
        .map_err(|error| match error {
            StorageError::MkfsFailed { reason, .. } if is_full(&reason) => self.failed(
                "make the template of scratch disks",
                size,
                Errno::NOSPC.into(),
            ),
            other => other,
        })
    }

    fn run_mkfs(&self, file: &File, extended: &str) -> Result<(), StorageError> {
        // A file without a name is reached through this process's table of descriptors.
        let target = format!("/proc/{}/fd/{}", std::process::id(), file.as_raw_fd());
        let output = Command::new(&self.mkfs)
            .args(["-q", "-F"])
            .args(LAYOUT)
            .args(IDENTITY)
            .args(["-E", extended, &target])
            .env_clear()
            // The same time stamps at every run.
            .env("E2FSPROGS_FAKE_TIME", "1")
            .env("SOURCE_DATE_EPOCH", "1")
            .env("MKE2FS_CONFIG", "/dev/null")
            .stdin(Stdio::null())
            .output()
            .map_err(|source| StorageError::Mkfs {
                path: self.mkfs.clone(),
                source,
            })?;
        if output.status.success() {
            return Ok(());
        }
        let stderr = String::from_utf8_lossy(&output.stderr);
        let line = stderr.lines().map(str::trim).rfind(|line| !line.is_empty());
        Err(StorageError::MkfsFailed {
            path: self.mkfs.clone(),
            reason: match line {
                Some(line) => line.to_owned(),
                None => output.status.to_string(),
            },
        })
    }

    fn failed(&self, action: &'static str, size: ByteSize, source: io::Error) -> StorageError {
        if source.kind() == io::ErrorKind::FileTooLarge {
            return StorageError::TooLarge {
                size,
                directory: self.directory.clone(),
            };
        }
        StorageError::from_io(action, &self.directory, source)
    }
}

const TEMPLATE_PREFIX: &str = "scratch-ext4-";

fn template_name(size: ByteSize) -> String {
    let options = LAYOUT
        .iter()
        .chain(&IDENTITY)
        .chain([&EXTENDED, &PREZEROED]);
    let fingerprint = options
        .flat_map(|option| option.bytes())
        .fold(FNV_OFFSET, |hash, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(FNV_PRIME)
        });
    format!("{TEMPLATE_PREFIX}{fingerprint:016x}-{}", size.bytes())
}

/// FNV-1a, RFC 9923: names need to differ, nothing more.
const FNV_OFFSET: u64 = 0xcbf2_9ce4_8422_2325;
const FNV_PRIME: u64 = 0x0000_0100_0000_01b3;

/// A template that is whole as far as its size and its superblock tell. Anything else counts as
/// missing and is replaced.
fn open_template(path: &Path, size: ByteSize) -> Option<File> {
    let file = File::open(path).ok()?;
    let mut magic = [0; 2];
    // s_magic of the superblock, Documentation/filesystems/ext4/super.rst in Linux.
    file.read_exact_at(&mut magic, 1024 + 0x38).ok()?;
    (file.metadata().ok()?.len() == size.bytes() && magic == [0x53, 0xef]).then_some(file)
}

/// Gives a file without a name its name, replacing what has it.
fn publish(file: &File, path: &Path) -> io::Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    Ok(name_file(file, path)?)
}

fn is_full(reason: &str) -> bool {
    reason.contains("No space left on device") || reason.contains("Disk quota exceeded")
}
