//! When changes become durable: flushes, which write the log, and checkpoints, which make it unnecessary.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use crate::allocator::{Freed, Punchable};
use crate::error::{PoolError, Result};
use crate::layout::{BLOCK, BLOCK_BYTES, PagePointer, RECORD_BYTES, Superblock, TreeName};
use crate::log::{self, DATA_BLOCKS_MAX};
use crate::metadata::{Metadata, leaf_kind};
use crate::page::Page;
use crate::pool::{Inner, Pool, State, lock};

/// Pages that may wait for a checkpoint: 64 MiB.
const DIRTY_PAGES_MAX: usize = 16_384;
/// Pages that are kept in memory when nobody changes them: 256 MiB.
const CACHED_PAGES_MAX: usize = 65_536;
/// Leaves that a checkpoint frees of what was removed.
const REAPED_LEAVES: u64 = 256;

/// What the next flush has to put into the log.
#[derive(Debug, Default)]
pub(crate) struct Pending {
    /// Encoded, in the order in which they were done.
    pub(crate) operations: Vec<u8>,
    /// Blocks that they name for the first time, with the stripe that guards each.
    pub(crate) fresh: BTreeMap<u64, usize>,
    /// The log cannot tell what was done; only a checkpoint can.
    pub(crate) must_checkpoint: bool,
}

/// Where the log goes on.
#[derive(Debug)]
pub(crate) struct LogPosition {
    /// The checkpoint that it follows.
    pub(crate) txg: u64,
    pub(crate) index: u64,
    pub(crate) offset_bytes: u64,
    end_bytes: u64,
    /// The last record would be written over what is flushed after it.
    pub(crate) last_has_data: bool,
    /// Flushes that were asked for before this one began are done.
    covered: u64,
}

impl LogPosition {
    /// The beginning of the log after a checkpoint.
    pub(crate) fn after(superblock: &Superblock) -> Self {
        let offset_bytes = superblock.log_offset_bytes(superblock.txg);
        Self {
            txg: superblock.txg,
            index: 0,
            offset_bytes,
            end_bytes: offset_bytes + superblock.log_bytes(),
            last_has_data: false,
            covered: 0,
        }
    }
}

/// A checkpoint that is about to be written.
struct Prepared {
    superblock: Superblock,
    pages: Vec<(PagePointer, Arc<Page>)>,
    freed: Vec<Freed>,
}

impl Pool {
    /// Returns when everything that was done before the call is durable.
    ///
    /// # Errors
    ///
    /// It is not. After a failed flush of the disk the pool stops.
    pub fn flush(&self) -> Result<()> {
        let inner = &*self.inner;
        let arrival = inner.flush_arrivals.fetch_add(1, Ordering::SeqCst);
        let mut position = lock(&inner.log);
        if position.covered > arrival {
            // One that began after this one was asked for has ended.
            return Ok(());
        }
        let covered = inner.flush_arrivals.load(Ordering::SeqCst);
        inner.flush_locked(&mut position)?;
        position.covered = covered;
        Ok(())
    }

    /// Writes all metadata to its place and begins a new log. Space that was freed can be used again afterwards.
    ///
    /// # Errors
    ///
    /// The disk refused; unless it was a flush, the next one tries again.
    pub fn checkpoint(&self) -> Result<()> {
        let mut position = lock(&self.inner.log);
        self.inner.checkpoint_locked(&mut position)
    }

    /// A checkpoint if much waits for one.
    pub(crate) fn checkpoint_if_due(&self) -> Result<()> {
        let is_due = self.inner.state().is_checkpoint_due();
        if is_due { self.checkpoint() } else { Ok(()) }
    }
}

impl Inner {
    fn stop(&self, what: &str, error: &std::io::Error) -> PoolError {
        let reason = format!("{what} failed ({error})");
        let mut state = self.state();
        let reason = state.stopped.get_or_insert(reason).clone();
        PoolError::Stopped { reason }
    }

    fn flush_disk(&self) -> Result<()> {
        let result = self.disk.flush();
        result.map_err(|error| self.stop("a flush of the disk", &error))
    }

    fn flush_locked(&self, position: &mut LogPosition) -> Result<()> {
        let pending = {
            let mut state = self.state();
            state.check_running()?;
            let data_blocks = state.pending.fresh.len().min(DATA_BLOCKS_MAX);
            let length = log::record_length(state.pending.operations.len(), data_blocks);
            if state.pending.must_checkpoint
                || position.offset_bytes + length as u64 > position.end_bytes
            {
                drop(state);
                return self.checkpoint_locked(position);
            }
            if !state.pending.operations.is_empty() || position.last_has_data {
                state.log_index = position.index + 1;
            }
            std::mem::take(&mut state.pending)
        };
        let is_empty = pending.operations.is_empty();
        if is_empty && !position.last_has_data {
            return self.flush_disk();
        }
        let written = self.write_log(position, &pending);
        if written.is_err() {
            self.state().pending.must_checkpoint = true;
        }
        written
    }

    fn write_log(&self, position: &mut LogPosition, pending: &Pending) -> Result<()> {
        let mut data = Vec::new();
        if pending.fresh.len() > DATA_BLOCKS_MAX {
            self.flush_disk()?;
        } else {
            for (block, stripe) in &pending.fresh {
                let mut content = vec![0; BLOCK].into_boxed_slice();
                let _writers = self.lock_stripe(*stripe);
                self.disk
                    .read_at(&mut content, block * BLOCK_BYTES)
                    .map_err(PoolError::io("read data for the log"))?;
                data.push((*block, content));
            }
        }
        let bytes = log::encode(position.txg, position.index, &pending.operations, &data);
        self.disk
            .write_at(&bytes, position.offset_bytes)
            .map_err(PoolError::io("write the log"))?;
        self.flush_disk()?;
        position.index += 1;
        position.offset_bytes += bytes.len() as u64;
        position.last_has_data = !data.is_empty();
        Ok(())
    }

    pub(crate) fn checkpoint_locked(&self, position: &mut LogPosition) -> Result<()> {
        let prepared = {
            let mut state = self.state();
            state.check_running()?;
            let reaped = state.metadata.reap_some(REAPED_LEAVES);
            if !matches!(reaped, Ok(_) | Err(PoolError::Full)) {
                state.pending.must_checkpoint = true;
            }
            state
                .prepare()
                .inspect_err(|_| state.pending.must_checkpoint = true)?
        };
        if let Err(error) = self.write_pages(&prepared) {
            self.state().take_back(prepared);
            return Err(error);
        }
        self.flush_disk()?;
        let bytes = prepared.superblock.encode();
        for offset_bytes in Superblock::offsets_bytes(prepared.superblock.txg) {
            // From the first byte on it is unknown which checkpoint counts.
            self.disk
                .write_at(&bytes, offset_bytes)
                .map_err(|error| self.stop("writing a superblock", &error))?;
        }
        self.flush_disk()?;
        let covered = position.covered;
        *position = LogPosition {
            covered,
            ..LogPosition::after(&prepared.superblock)
        };
        let punchable = self.state().metadata.allocator.punchable(&prepared.freed);
        self.punch(&punchable);
        // Nobody reads what was freed any more once all reads that are on their way have ended.
        let _no_io = self
            .io_gate
            .write()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        let mut state = self.state();
        state
            .metadata
            .allocator
            .release(&prepared.freed, &punchable);
        state.metadata.shrink_cache();
        Ok(())
    }

    /// Gives space of records back to the host that no checkpoint names any more and that is not given out yet.
    fn punch(&self, punchable: &Punchable) {
        if punchable.runs.is_empty() {
            return;
        }
        // Reads that began before the records were freed have to end.
        drop(
            self.io_gate
                .write()
                .unwrap_or_else(std::sync::PoisonError::into_inner),
        );
        for (first, count) in &punchable.runs {
            let result = self.disk.punch(first * RECORD_BYTES, count * RECORD_BYTES);
            // Where the host cannot, the space is used again by the pool.
            if result.is_err() {
                break;
            }
        }
    }

    fn write_pages(&self, prepared: &Prepared) -> Result<()> {
        let mut writes: Vec<(u64, Vec<u8>)> = Vec::with_capacity(2 * prepared.pages.len());
        for (pointer, page) in &prepared.pages {
            let bytes = page.encode(*pointer, &prepared.superblock.pool_id);
            if pointer.second != 0 {
                writes.push((pointer.second, bytes.clone()));
            }
            writes.push((pointer.address, bytes));
        }
        writes.sort_unstable_by_key(|(address, _)| *address);
        let mut rest = &writes[..];
        while let Some((first, _)) = rest.first() {
            // Neighbours are written at once.
            let run = rest
                .iter()
                .zip(*first..)
                .take_while(|((address, _), expected)| address == expected)
                .count();
            let bytes: Vec<u8> = rest[..run]
                .iter()
                .flat_map(|(_, bytes)| bytes)
                .copied()
                .collect();
            self.disk
                .write_at(&bytes, first * BLOCK_BYTES)
                .map_err(PoolError::io("write metadata"))?;
            rest = &rest[run..];
        }
        Ok(())
    }
}

impl State {
    /// Whether much waits for a checkpoint.
    pub(crate) fn is_checkpoint_due(&self) -> bool {
        let log_bytes = self.metadata.log_records * RECORD_BYTES;
        self.metadata.dirty.len() > DIRTY_PAGES_MAX
            || self.pending.operations.len() as u64 > log_bytes / 2
    }

    fn prepare(&mut self) -> Result<Prepared> {
        let metadata = &mut self.metadata;
        metadata.store_leaves()?;
        let superblock = metadata.superblock();
        metadata.txg += 1;
        let dirty = std::mem::take(&mut metadata.dirty);
        let pages = dirty
            .into_values()
            .filter_map(|pointer| {
                Some((pointer, Arc::clone(metadata.cache.get(&pointer.address)?)))
            })
            .collect();
        let freed = metadata.allocator.take_freed();
        self.pending = Pending::default();
        self.log_index = 0;
        Ok(Prepared {
            superblock,
            pages,
            freed,
        })
    }

    /// The checkpoint was not written: the next one has to write what it had.
    fn take_back(&mut self, prepared: Prepared) {
        self.pending.must_checkpoint = true;
        let metadata = &mut self.metadata;
        // The number was not used: the next attempt goes to the same superblocks, beside those that count.
        metadata.txg = prepared.superblock.txg;
        metadata.allocator.put_freed_back(prepared.freed);
        for (pointer, _) in prepared.pages {
            if metadata.cache.contains_key(&pointer.address) {
                metadata.dirty.entry(pointer.address).or_insert(pointer);
            }
        }
    }
}

impl Metadata {
    /// Puts what is only in memory into pages.
    fn store_leaves(&mut self) -> Result<()> {
        while let Some(leaf) = self.catalog.first_dirty() {
            let payload = self.catalog.save_leaf(leaf);
            self.set_leaf(TreeName::Entries, leaf, payload)?;
            self.catalog.set_clean(leaf);
        }
        self.store_sums()?;
        while let Some(leaf) = self.records.first_dirty() {
            let payload = self.records.save_leaf(leaf);
            self.set_leaf(TreeName::RecordReferences, leaf, payload)?;
            self.records.set_clean(leaf);
        }
        while let Some(leaf) = self.pages.first_dirty() {
            let payload = self.pages.save_leaf(leaf);
            self.set_leaf(TreeName::PageReferences, leaf, payload)?;
            self.pages.set_clean(leaf);
        }
        // The pages of the space map need space themselves: first all that have to move do, then they are filled.
        let kind = leaf_kind(TreeName::Space);
        let mut moved = BTreeMap::new();
        while let Some(group) = self.allocator.next_dirty(&moved) {
            let mut tree = self.trees[TreeName::Space as usize];
            let owned = self.own_leaf(&mut tree, kind, group);
            self.trees[TreeName::Space as usize] = tree;
            moved.insert(group, owned?);
        }
        for (group, address) in moved {
            let payload = self.allocator.save_group(group);
            *self.page_mut(address)? = Page::Raw { kind, payload };
        }
        self.allocator.set_clean();
        Ok(())
    }

    fn superblock(&self) -> Superblock {
        Superblock {
            pool_id: self.pool_id,
            txg: self.txg,
            epoch: self.epoch,
            size_blocks: self.size_blocks,
            log_records: self.log_records,
            next_id: self.next_id,
            data_blocks: self.allocator.data_blocks(),
            trees: self.trees,
        }
    }

    /// Forgets pages that can be read again.
    fn shrink_cache(&mut self) {
        if self.cache.len() <= CACHED_PAGES_MAX {
            return;
        }
        let mut excess = self.cache.len() - CACHED_PAGES_MAX / 2;
        let dirty = &self.dirty;
        self.cache.retain(|address, _| {
            let keep = excess == 0 || dirty.contains_key(address);
            excess -= usize::from(!keep);
            keep
        });
    }
}
