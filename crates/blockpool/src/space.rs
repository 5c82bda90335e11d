//! What takes how much: the pool as a whole, and each object.

use std::collections::HashMap;

use crate::catalog::ObjectId;
use crate::error::Result;
use crate::layout::{BLOCK_BYTES, PagePointer};
use crate::metadata::Metadata;
use crate::page::{Page, PageKind};
use crate::pool::Pool;

/// Where the space of a pool is. `reserved + data + metadata + freeing + free = size`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct PoolSpace {
    /// All of it.
    pub size_bytes: u64,
    /// Superblocks and logs.
    pub reserved_bytes: u64,
    /// Records and extents of objects and snapshots, each once.
    pub data_bytes: u64,
    /// Pages.
    pub metadata_bytes: u64,
    /// Free with the next checkpoint.
    pub freeing_bytes: u64,
    /// Can be given out.
    pub free_bytes: u64,
    /// Records that have more than one reference of their own, without those that are shared as parts of a shared page.
    pub counted_records: u64,
    /// Pages and extents of compressed records that have more than one reference of their own.
    pub counted_pages: u64,
    /// Memory that the counts of references take.
    pub references_memory_bytes: u64,
}

/// What an object or snapshot takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ObjectSpace {
    /// Space of the records that it refers to.
    pub referenced_bytes: u64,
    /// Those that nothing else refers to: free when it is removed.
    pub exclusive_bytes: u64,
    /// Blocks that hold something, before they were compressed.
    pub written_bytes: u64,
}

impl ObjectSpace {
    /// How many bytes each byte of space holds; none where nothing is held. More than 1 is what compression gains, less what is
    /// in records of which others see more.
    #[must_use]
    pub fn ratio(&self) -> Option<f64> {
        (self.referenced_bytes > 0)
            .then(|| self.written_bytes as f64 / self.referenced_bytes as f64)
    }
}

impl std::ops::AddAssign for ObjectSpace {
    fn add_assign(&mut self, other: Self) {
        self.referenced_bytes += other.referenced_bytes;
        self.exclusive_bytes += other.exclusive_bytes;
        self.written_bytes += other.written_bytes;
    }
}

/// Parts of maps that several objects have, which need not be walked twice.
type Known = HashMap<u64, ObjectSpace>;

impl Pool {
    /// Where the space is.
    #[must_use]
    pub fn space(&self) -> PoolSpace {
        let state = self.inner.state();
        let metadata = &state.metadata;
        let allocator = &metadata.allocator;
        let data_bytes = allocator.data_blocks() * BLOCK_BYTES;
        let metadata_bytes = allocator.used_blocks() * BLOCK_BYTES - data_bytes;
        let size_bytes = metadata.size_blocks * BLOCK_BYTES;
        let reserved_bytes = allocator.first_block() * BLOCK_BYTES;
        let freeing_bytes = allocator.freeing_blocks() * BLOCK_BYTES;
        PoolSpace {
            size_bytes,
            reserved_bytes,
            data_bytes,
            metadata_bytes,
            freeing_bytes,
            free_bytes: size_bytes - reserved_bytes - data_bytes - metadata_bytes - freeing_bytes,
            counted_records: metadata.records.entry_count(),
            counted_pages: metadata.pages.entry_count(),
            references_memory_bytes: metadata.records.memory_bytes()
                + metadata.pages.memory_bytes(),
        }
    }

    /// What objects and snapshots take, in the order of `ids`. What was removed meanwhile takes nothing.
    ///
    /// # Errors
    ///
    /// A map cannot be read.
    pub fn object_space(&self, ids: &[ObjectId]) -> Result<Vec<ObjectSpace>> {
        let mut known = Known::new();
        let mut spaces = Vec::with_capacity(ids.len());
        for id in ids {
            // Others get their turn between two objects; what is known of shared pages may be of a moment ago.
            let mut state = self.inner.state();
            let metadata = &mut state.metadata;
            let map = metadata.entry(id.0).map(|entry| entry.map);
            spaces.push(match map {
                Ok(map) => metadata.space_below(map.root, map.height, false, &mut known)?,
                Err(_) => ObjectSpace::default(),
            });
        }
        Ok(spaces)
    }
}

impl Metadata {
    fn space_below(
        &mut self,
        pointer: PagePointer,
        level: u8,
        is_shared: bool,
        known: &mut Known,
    ) -> Result<ObjectSpace> {
        if pointer.is_null() {
            return Ok(ObjectSpace::default());
        }
        let is_shared = is_shared || self.pages.extra(pointer.address) > 0;
        if is_shared && let Some(found) = known.get(&pointer.address) {
            return Ok(*found);
        }
        let page = self.page(pointer, PageKind::Map, level)?;
        let mut space = ObjectSpace::default();
        match &*page {
            Page::Inner { children, .. } => {
                for child in children.iter() {
                    space += self.space_below(*child, level - 1, is_shared, known)?;
                }
            }
            page => {
                for slot in page.slots()?.iter() {
                    space.written_bytes += u64::from(slot.map().count_ones()) * BLOCK_BYTES;
                    for extent in slot.extents() {
                        space.referenced_bytes += extent.length_bytes();
                        if !is_shared && self.extra_references(extent) == 0 {
                            space.exclusive_bytes += extent.length_bytes();
                        }
                    }
                }
            }
        }
        if is_shared {
            known.insert(pointer.address, space);
        }
        Ok(space)
    }
}
