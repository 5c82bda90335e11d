//! A pool in a file or on a block device.

use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

use rustix::fs::{FallocateFlags, FlockOperation};
use rustix::io::Errno;

use super::Disk;
use crate::error::{PoolError, Result};

/// A file or block device, locked for this process as long as it is open.
#[derive(Debug)]
pub struct FileDisk {
    file: File,
}

impl FileDisk {
    /// Makes a new file of that size, without any of its blocks, readable by its owner only.
    ///
    /// # Errors
    ///
    /// The file exists, or cannot be made.
    pub fn create(path: &Path, size_bytes: u64) -> Result<Self> {
        let failed = |source| PoolError::File {
            action: "make the pool",
            path: path.to_owned(),
            source,
        };
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(path)
            .map_err(failed)?;
        let disk = Self::lock(file, path)?;
        disk.file.set_len(size_bytes).map_err(failed)?;
        Ok(disk)
    }

    /// Opens what is there.
    ///
    /// # Errors
    ///
    /// It cannot be opened, or another process has it open as a pool.
    pub fn open(path: &Path) -> Result<Self> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .open(path)
            .map_err(|source| PoolError::File {
                action: "open the pool",
                path: path.to_owned(),
                source,
            })?;
        Self::lock(file, path)
    }

    fn lock(file: File, path: &Path) -> Result<Self> {
        match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(Self { file }),
            Err(Errno::WOULDBLOCK) => Err(PoolError::InUse {
                path: path.to_owned(),
            }),
            Err(errno) => Err(PoolError::File {
                action: "lock the pool",
                path: path.to_owned(),
                source: errno.into(),
            }),
        }
    }
}

impl Disk for FileDisk {
    fn read_at(&self, buffer: &mut [u8], offset_bytes: u64) -> io::Result<()> {
        self.file.read_exact_at(buffer, offset_bytes)
    }

    fn write_at(&self, bytes: &[u8], offset_bytes: u64) -> io::Result<()> {
        self.file.write_all_at(bytes, offset_bytes)
    }

    fn flush(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    fn size_bytes(&self) -> io::Result<u64> {
        // The length in the metadata of a block device is 0. Nothing else uses the file's position.
        (&self.file).seek(SeekFrom::End(0))
    }

    fn grow(&self, size_bytes: u64) -> io::Result<()> {
        if self.size_bytes()? >= size_bytes {
            return Ok(());
        }
        self.file.set_len(size_bytes)
    }

    fn punch(&self, offset_bytes: u64, length_bytes: u64) -> io::Result<()> {
        // A device may have to write zeros instead, which is no gain.
        if !self.file.metadata()?.is_file() {
            return Ok(());
        }
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        Ok(rustix::fs::fallocate(
            &self.file,
            flags,
            offset_bytes,
            length_bytes,
        )?)
    }
}
