//! A pool that is open: its locks, and how it is made and opened.
//!
//! Order of the locks, outermost first: `log`, `io_gate`, the gates of objects by id, a stripe, `state`. Who does data I/O holds `io_gate`
//! shared, so that what is freed is not given out while somebody still reads it; the gate of an object is held shared by
//! its writers and exclusively by what must not happen while a write is on its way (clone, snapshot, resize).

use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, PoisonError};

use crate::allocator::Allocator;
use crate::catalog::Catalog;
use crate::disk::Disk;
use crate::error::{PoolError, Result};
use crate::journal::Journal;
use crate::layout::{BLOCK, BLOCK_BYTES, Superblock, TreeName};
use crate::metadata::{Metadata, leaf_kind, span};
use crate::operation::Operation;
use crate::page::PAYLOAD;
use crate::references::References;
use crate::sums::Sums;
use crate::sync::{AtomicU64, Mutex, MutexGuard, RwLock};
use crate::txg::{LogPosition, Pending};

/// Locks that order writes to one record of an object.
const STRIPES: usize = 256;

/// What `state` guards.
pub(crate) struct State {
    pub(crate) metadata: Metadata,
    pub(crate) pending: Pending,
    pub(crate) gates: HashMap<u64, Arc<RwLock<()>>>,
    /// Gets every operation as it is done.
    pub(crate) journal: Option<Arc<Journal>>,
    /// The log record that will have what is done now.
    pub(crate) log_index: u64,
    /// Why nothing more is done.
    pub(crate) stopped: Option<String>,
}

impl State {
    /// Fails when the pool stopped.
    pub(crate) fn check_running(&self) -> Result<()> {
        match &self.stopped {
            Some(reason) => Err(PoolError::Stopped {
                reason: reason.clone(),
            }),
            None => Ok(()),
        }
    }

    /// Does an operation and queues it for the log.
    pub(crate) fn commit(&mut self, operation: &Operation) -> Result<()> {
        self.commit_later(operation)?;
        if let Some(journal) = &self.journal {
            journal.write();
        }
        Ok(())
    }

    /// As [`Self::commit`], for who has the journal written when the lock is given back, and answers nobody before.
    pub(crate) fn commit_later(&mut self, operation: &Operation) -> Result<()> {
        self.check_running()?;
        let result = self.metadata.apply(operation);
        match &result {
            Ok(()) => {
                let begin = self.pending.operations.len();
                operation.encode(&mut self.pending.operations);
                if let Some(journal) = &self.journal {
                    let bytes = &self.pending.operations[begin..];
                    journal.queue(self.metadata.txg - 1, self.log_index, bytes);
                }
            }
            // It may be half done: what the log says is not what is in memory any more.
            Err(
                PoolError::Io { .. }
                | PoolError::Damaged { .. }
                | PoolError::Full
                | PoolError::TooManyReferences,
            ) => {
                self.pending.must_checkpoint = true;
            }
            Err(_) => {}
        }
        result
    }
}

/// See the module.
pub(crate) struct Inner {
    pub(crate) disk: Arc<dyn Disk>,
    pub(crate) log: Mutex<LogPosition>,
    pub(crate) io_gate: RwLock<()>,
    stripes: [Mutex<()>; STRIPES],
    state: Mutex<State>,
    /// Flushes that were asked for.
    pub(crate) flush_arrivals: AtomicU64,
}

impl Inner {
    pub(crate) fn state(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    /// The number of the stripe of a record.
    pub(crate) fn stripe_of(id: u64, record_index: u64) -> usize {
        (id.wrapping_mul(31).wrapping_add(record_index) % STRIPES as u64) as usize
    }

    pub(crate) fn lock_stripe(&self, stripe: usize) -> MutexGuard<'_, ()> {
        lock(&self.stripes[stripe])
    }
}

/// A thread that panicked while it held a lock left nothing half done that matters to the others more than going on would.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A pool of objects, open in this process. Clones are the same pool.
#[derive(Clone)]
pub struct Pool {
    pub(crate) inner: Arc<Inner>,
}

impl fmt::Debug for Pool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pool").finish_non_exhaustive()
    }
}

impl Pool {
    /// Makes an empty pool of `size_bytes` on `disk`, which has to be that large, and opens it. `pool_id` should be random.
    ///
    /// # Errors
    ///
    /// The size is out of range, or the disk cannot be written.
    pub fn create(disk: Arc<dyn Disk>, size_bytes: u64, pool_id: [u8; 16]) -> Result<Self> {
        let superblock = Superblock::new(pool_id, size_bytes)?;
        let failed = PoolError::io("find the size of the pool's disk");
        let disk_bytes = disk.size_bytes().map_err(failed)?;
        if disk_bytes < size_bytes {
            return Err(PoolError::Size {
                what: "a pool on this disk",
                size_bytes,
                min_bytes: crate::layout::POOL_MIN_BYTES,
                max_bytes: disk_bytes,
            });
        }
        // No superblock of an earlier pool may be left, and appending to the log must need no space.
        let zeros = vec![0; 1 << 20];
        let end = superblock.first_block() * BLOCK_BYTES;
        let mut at = 0;
        while at < end {
            let length = (end - at).min(zeros.len() as u64) as usize;
            disk.write_at(&zeros[..length], at)
                .map_err(PoolError::io("make the pool"))?;
            at += length as u64;
        }
        let pool = Self::assemble(disk, &superblock);
        pool.checkpoint()?;
        Ok(pool)
    }

    /// Opens the pool on `disk`; what was flushed before a crash is in it.
    ///
    /// # Errors
    ///
    /// There is none, it has another version, or it is damaged.
    pub fn open(disk: Arc<dyn Disk>) -> Result<Self> {
        let superblock = find_superblock(&*disk)?;
        let pool = Self::load(disk, &superblock)?;
        pool.replay(&superblock)?;
        pool.checkpoint()?;
        Ok(pool)
    }

    /// The pool as it was at its last checkpoint.
    pub(crate) fn load(disk: Arc<dyn Disk>, superblock: &Superblock) -> Result<Self> {
        let pool = Self::assemble(disk, superblock);
        {
            let mut state = pool.inner.state();
            state.metadata.load(true)?;
            state
                .metadata
                .allocator
                .set_data_blocks(superblock.data_blocks);
        }
        Ok(pool)
    }

    /// Opens the pool on `disk` and counts anew what is used and shared, whatever the pool says of it.
    ///
    /// # Errors
    ///
    /// There is none, or its maps are damaged too.
    pub fn open_and_recount(disk: Arc<dyn Disk>) -> Result<Self> {
        let superblock = find_superblock(&*disk)?;
        let pool = Self::assemble(disk, &superblock);
        {
            let mut state = pool.inner.state();
            state.metadata.load(false)?;
            state.metadata.recount()?;
        }
        pool.replay(&superblock)?;
        pool.checkpoint()?;
        Ok(pool)
    }

    fn assemble(disk: Arc<dyn Disk>, superblock: &Superblock) -> Self {
        let metadata = Metadata {
            disk: Arc::clone(&disk),
            pool_id: superblock.pool_id,
            txg: superblock.txg + 1,
            epoch: superblock.epoch,
            size_blocks: superblock.size_blocks,
            log_records: superblock.log_records,
            next_id: superblock.next_id,
            allocator: Allocator::new(superblock.first_block(), superblock.size_blocks),
            records: References::default(),
            pages: References::default(),
            catalog: Catalog::default(),
            sums: Sums::default(),
            trees: superblock.trees,
            cache: HashMap::new(),
            dirty: HashMap::new(),
            bad_copies: Vec::new(),
            has_wrong_counts: false,
            is_replaying: false,
        };
        let inner = Inner {
            disk,
            log: Mutex::new(LogPosition::after(superblock)),
            io_gate: RwLock::new(()),
            stripes: std::array::from_fn(|_| Mutex::new(())),
            state: Mutex::new(State {
                metadata,
                pending: Pending::default(),
                gates: HashMap::new(),
                journal: None,
                log_index: 0,
                stopped: None,
            }),
            flush_arrivals: AtomicU64::new(0),
        };
        Self {
            inner: Arc::new(inner),
        }
    }
}

/// The newest superblock.
pub(crate) fn find_superblock(disk: &dyn Disk) -> Result<Superblock> {
    let mut newest: Option<Superblock> = None;
    let mut failure = None;
    let disk_bytes = disk
        .size_bytes()
        .map_err(PoolError::io("find the size of the pool"))?;
    for offset_bytes in [0, 1].into_iter().flat_map(Superblock::offsets_bytes) {
        let mut bytes = vec![0; BLOCK];
        if offset_bytes + BLOCK_BYTES > disk_bytes {
            break;
        }
        disk.read_at(&mut bytes, offset_bytes)
            .map_err(PoolError::io("read a superblock"))?;
        match Superblock::decode(&bytes) {
            Ok(found) if newest.as_ref().is_none_or(|newest| newest.txg < found.txg) => {
                newest = Some(found);
            }
            Ok(_) => {}
            // Another version says more than an empty copy.
            Err(error @ PoolError::Version { .. }) => failure = Some(error),
            Err(error) => failure = failure.or(Some(error)),
        }
    }
    let superblock = newest.ok_or_else(|| {
        failure.unwrap_or(PoolError::NotAPool {
            reason: "it is too short",
        })
    })?;
    if superblock.size_blocks * BLOCK_BYTES > disk_bytes {
        return Err(PoolError::Damaged {
            what: format!(
                "it has {} bytes and {disk_bytes} of them are there",
                superblock.size_blocks * BLOCK_BYTES
            ),
        });
    }
    Ok(superblock)
}

impl Metadata {
    /// Reads what is kept in memory as long as the pool is open. Without `accounting` only what the rest follows from.
    fn load(&mut self, accounting: bool) -> Result<()> {
        self.each_leaf(TreeName::Entries, |metadata, leaf, payload| {
            metadata.catalog.load_leaf(leaf, payload)
        })?;
        if !self.catalog.is_consistent()
            || self.catalog.iter().any(|entry| entry.id >= self.next_id)
        {
            return Err(PoolError::Damaged {
                what: "its entries contradict each other".to_owned(),
            });
        }
        if !accounting {
            return Ok(());
        }
        let group_count = self.allocator.group_count();
        let limit = self.size_blocks;
        let loaded = self
            .each_leaf(TreeName::Space, |metadata, leaf, payload| {
                leaf < group_count && metadata.allocator.load_group(leaf, payload)
            })
            .and_then(|()| {
                self.each_leaf(TreeName::RecordReferences, |metadata, leaf, payload| {
                    let fits = leaf < limit;
                    if fits {
                        metadata.records.load_leaf(leaf, payload);
                    }
                    fits
                })
            })
            .and_then(|()| {
                self.each_leaf(TreeName::PageReferences, |metadata, leaf, payload| {
                    let fits = leaf < limit;
                    if fits {
                        metadata.pages.load_leaf(leaf, payload);
                    }
                    fits
                })
            });
        loaded.map_err(|error| match error {
            PoolError::Damaged { what } => PoolError::DamagedAccounting { what },
            other => other,
        })
    }

    /// Shows each leaf of a tree to `take`, which says whether it is good.
    fn each_leaf(
        &mut self,
        name: TreeName,
        mut take: impl FnMut(&mut Self, u64, &[u8; PAYLOAD]) -> bool,
    ) -> Result<()> {
        let tree = self.trees[name as usize];
        let kind = leaf_kind(name);
        let mut from = 0;
        while let Some(leaf) = self.next_leaf(tree, kind, from)? {
            let Some(page) = self.leaf(tree, kind, leaf)? else {
                break;
            };
            if !take(self, leaf, page.payload()?) {
                return Err(PoolError::Damaged {
                    what: format!("leaf {leaf} of its {name:?} has values that no pool has"),
                });
            }
            // What was taken over need not be in memory twice.
            self.forget_leaf(tree, kind, leaf)?;
            from = leaf + 1;
        }
        Ok(())
    }

    fn forget_leaf(
        &mut self,
        tree: crate::layout::Tree,
        kind: crate::page::PageKind,
        leaf: u64,
    ) -> Result<()> {
        let mut pointer = tree.root;
        for level in (1..=tree.height).rev() {
            let page = self.page(pointer, kind, level)?;
            let children = page.children()?;
            pointer = children[(leaf / span(level - 1)) as usize % children.len()];
        }
        if !self.dirty.contains_key(&pointer.address) {
            self.cache.remove(&pointer.address);
        }
        Ok(())
    }
}
