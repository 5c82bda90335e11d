//! What pages are served from: a snapshot's memory, mapped once for all of its clones.

use std::fs::File;
use std::io;

use super::mapping::SealedMapping;
use super::pages::PageSet;
use crate::error::MemoryError;
use crate::page_file::next_data;
use crate::{PAGE_BYTES, PageRun};

/// A whole memory in a sealed anonymous file. Pages that the file has no bytes for are zero, and take no
/// memory however often they are served.
#[derive(Debug)]
pub struct MemorySource {
    mapping: SealedMapping,
    present: PageSet,
    memory_bytes: u64,
}

impl MemorySource {
    /// Maps a memory.
    ///
    /// # Errors
    ///
    /// The file is not sealed ([`seal`](crate::page_file::seal)), or is not in whole pages.
    pub fn new(memory: &File) -> Result<Self, MemoryError> {
        let failed = MemoryError::file("map");
        let memory_bytes = memory.metadata().map_err(&failed)?.len();
        if memory_bytes == 0 || !memory_bytes.is_multiple_of(PAGE_BYTES) {
            let told = io::Error::other(format!("it has {memory_bytes} bytes, no whole pages"));
            return Err(failed(told));
        }
        let mapping = SealedMapping::new(memory).map_err(&failed)?;
        let mut present = PageSet::new(memory_bytes / PAGE_BYTES);
        let mut offset = 0;
        while let Some((start, end)) = next_data(memory, offset, memory_bytes).map_err(&failed)? {
            mapping.populate(start, end - start);
            present.insert(PageRun {
                first: start / PAGE_BYTES,
                count: (end - start) / PAGE_BYTES,
            });
            offset = end;
        }
        Ok(Self {
            mapping,
            present,
            memory_bytes,
        })
    }

    /// Size of the memory in bytes.
    pub fn memory_bytes(&self) -> u64 {
        self.memory_bytes
    }

    /// How many pages it has.
    pub fn page_count(&self) -> u64 {
        self.memory_bytes / PAGE_BYTES
    }

    /// The bytes of the first pages of a run, and how many pages they are; `None` where those are zero.
    /// The run is in the memory.
    pub(super) fn pages(&self, run: PageRun) -> (Option<&[u8]>, u64) {
        let (is_present, count) = self.present.uniform(run);
        let start = run.offset() as usize;
        let bytes = is_present.then(|| {
            let end = start + (count * PAGE_BYTES) as usize;
            &self.mapping.as_slice()[start..end]
        });
        (bytes, count)
    }
}
