//! The blocks of the output file: which are in use, and writing to them.
//!
//! File data is written to its final place as it arrives. Blocks of files that later layers
//! replace are given to new files of at most that size; what stays unused in the end is zeroed, so
//! that no deleted content remains in the image. The choice depends on the order of the layers'
//! members only, never on timing.

use std::collections::BTreeSet;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use rustix::fs::{FallocateFlags, fallocate};

use super::tree::Extent;

/// EROFS block size; the guest kernel requires it to equal its page size.
pub(crate) const BLOCK_BYTES: u64 = 4096;

/// Writes of at least this size go to the file directly, smaller ones are gathered.
const DIRECT_WRITE_BYTES: usize = 128 * 1024;
const GATHER_BYTES: usize = 512 * 1024;

/// Number of blocks that hold `size_bytes`.
pub(crate) fn blocks_for(size_bytes: u64) -> u64 {
    size_bytes.div_ceil(BLOCK_BYTES)
}

/// Why blocks cannot be had or written.
#[derive(Debug)]
pub(crate) enum SpaceError {
    /// The image would exceed the caller's limit, or what the format can address.
    Full,
    Io(io::Error),
}

impl From<io::Error> for SpaceError {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

/// Allocates and writes blocks of the output file.
#[derive(Debug)]
pub(crate) struct Space<'a> {
    file: &'a File,
    end_block: u32,
    max_blocks: u32,
    /// Unused extents, ordered for best fit: by length, then by position.
    unused: BTreeSet<(u32, u32)>,
    gathered: Vec<u8>,
    gathered_at_bytes: u64,
}

impl<'a> Space<'a> {
    /// Starts with an empty file whose first `reserved_blocks` are the caller's.
    pub(crate) fn new(
        file: &'a File,
        reserved_blocks: u32,
        max_image_bytes: u64,
    ) -> io::Result<Self> {
        file.set_len(0)?;
        Ok(Self {
            file,
            end_block: reserved_blocks,
            // The highest address means "hole" in the format.
            max_blocks: u32::try_from(max_image_bytes / BLOCK_BYTES).unwrap_or(u32::MAX - 1),
            unused: BTreeSet::new(),
            gathered: Vec::with_capacity(GATHER_BYTES + DIRECT_WRITE_BYTES),
            gathered_at_bytes: 0,
        })
    }

    /// Blocks for a file that will be written without gaps to the end of its last block.
    pub(crate) fn allocate(&mut self, block_count: u64) -> Result<Extent, SpaceError> {
        let count = u32::try_from(block_count).map_err(|_| SpaceError::Full)?;
        let Some(&(length, start)) = self.unused.range((count, 0)..).next() else {
            return self.allocate_fresh(block_count);
        };
        self.unused.remove(&(length, start));
        if length > count {
            self.unused.insert((length - count, start + count));
        }
        Ok(Extent {
            start_block: start,
            block_count: count,
        })
    }

    /// Blocks that nothing was written to yet: they read as zeros.
    pub(crate) fn allocate_fresh(&mut self, block_count: u64) -> Result<Extent, SpaceError> {
        let end = u64::from(self.end_block) + block_count;
        if end > u64::from(self.max_blocks) {
            return Err(SpaceError::Full);
        }
        let start_block = self.end_block;
        self.end_block = end as u32;
        Ok(Extent {
            start_block,
            block_count: block_count as u32,
        })
    }

    /// Gives blocks back.
    pub(crate) fn free(&mut self, extent: Extent) {
        self.unused.insert((extent.block_count, extent.start_block));
    }

    /// First block behind everything that was allocated.
    pub(crate) fn end_block(&self) -> u32 {
        self.end_block
    }

    /// Writes `bytes` at an offset in the file.
    pub(crate) fn write(&mut self, offset_bytes: u64, bytes: &[u8]) -> io::Result<()> {
        let gathered_end = self.gathered_at_bytes + self.gathered.len() as u64;
        if offset_bytes != gathered_end || self.gathered.len() >= GATHER_BYTES {
            self.flush()?;
            self.gathered_at_bytes = offset_bytes;
        }
        if bytes.len() >= DIRECT_WRITE_BYTES {
            self.flush()?;
            self.file.write_all_at(bytes, offset_bytes)?;
            self.gathered_at_bytes = offset_bytes + bytes.len() as u64;
        } else {
            self.gathered.extend_from_slice(bytes);
        }
        Ok(())
    }

    /// Fills with zeros up to the next block boundary.
    pub(crate) fn pad_block(&mut self, offset_bytes: u64) -> io::Result<()> {
        const ZEROS: [u8; BLOCK_BYTES as usize] = [0; BLOCK_BYTES as usize];
        let used = (offset_bytes % BLOCK_BYTES) as usize;
        if used == 0 {
            Ok(())
        } else {
            self.write(offset_bytes, &ZEROS[used..])
        }
    }

    /// Hands all gathered bytes to the operating system.
    pub(crate) fn flush(&mut self) -> io::Result<()> {
        if !self.gathered.is_empty() {
            self.file
                .write_all_at(&self.gathered, self.gathered_at_bytes)?;
            self.gathered_at_bytes += self.gathered.len() as u64;
            self.gathered.clear();
        }
        Ok(())
    }

    /// Sets the size of the file; what was not written reads as zeros.
    pub(crate) fn set_block_count(&mut self, block_count: u64) -> io::Result<()> {
        self.file.set_len(block_count * BLOCK_BYTES)
    }

    /// Cuts unused blocks off the end and zeroes the others. Nothing may be allocated for file
    /// data after this: what lies behind [`end_block`](Self::end_block) may hold old bytes.
    pub(crate) fn settle(&mut self) -> io::Result<()> {
        self.flush()?;
        let mut by_position: Vec<(u32, u32)> = self
            .unused
            .iter()
            .map(|&(length, start)| (start, length))
            .collect();
        by_position.sort_unstable();
        self.unused.clear();
        while let Some(&(start, length)) = by_position.last()
            && start + length == self.end_block
        {
            by_position.pop();
            self.end_block = start;
        }
        self.file.set_len(u64::from(self.end_block) * BLOCK_BYTES)?;
        for (start, length) in by_position {
            self.zero(
                u64::from(start) * BLOCK_BYTES,
                u64::from(length) * BLOCK_BYTES,
            )?;
        }
        Ok(())
    }

    fn zero(&mut self, offset_bytes: u64, length_bytes: u64) -> io::Result<()> {
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        match fallocate(self.file, flags, offset_bytes, length_bytes) {
            Ok(()) => return Ok(()),
            Err(rustix::io::Errno::OPNOTSUPP | rustix::io::Errno::NOSYS) => {}
            Err(error) => return Err(error.into()),
        }
        let zeros = vec![0; DIRECT_WRITE_BYTES.min(length_bytes as usize)];
        let mut done_bytes = 0;
        while done_bytes < length_bytes {
            let length = (length_bytes - done_bytes).min(zeros.len() as u64);
            self.file
                .write_all_at(&zeros[..length as usize], offset_bytes + done_bytes)?;
            done_bytes += length;
        }
        Ok(())
    }
}
