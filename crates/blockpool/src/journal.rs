//! What a process that is killed leaves to the next one: operations that no log has yet.
//!
//! The log is for a machine that stops: only what was flushed counts. When only the process ends, the system still has all data
//! that was written, and lacks but the operations since the last flush. They are appended here as they are done,
//! to a file in memory that another process keeps, so that the next one goes on where this one stood and not even
//! writes that nobody flushed are undone under those who go on using them.
//!
//! Two areas, one for the operations after an even checkpoint and one for those after an odd one; an entry tells the checkpoint and the log
//! record that it comes before. An area is emptied when the checkpoint after the next begins.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use rustix::fs::FallocateFlags;

use crate::disk::Disk;
use crate::error::{PoolError, Result};
use crate::layout::{Superblock, read_uint};
use crate::operation::Operation;
use crate::pool::{Pool, find_superblock, lock};
use crate::sync::Mutex;

/// Where the second area begins.
const AREA_BYTES: u64 = 1 << 40;
const HEADER: usize = 32;
/// No operation is longer.
const OPERATION_BYTES_MAX: usize = 1024;

/// A file of operations that are not flushed. The file should be in memory (memfd_create(2)): it is of no use after a restart of
/// the machine, and must not be given to a pool then.
#[derive(Debug)]
pub struct Journal {
    file: File,
    position: Mutex<Position>,
    /// Taken after `position` where both are.
    queue: Mutex<Queue>,
}

/// Entries that are not in the file yet.
#[derive(Debug, Default)]
struct Queue {
    /// Number of the next entry.
    number: u64,
    bytes: Vec<u8>,
    /// Where the entries after a checkpoint end.
    runs: Vec<(u64, usize)>,
}

#[derive(Debug, Default)]
struct Position {
    end_bytes: [u64; 2],
    /// The checkpoint whose operations an area has.
    txg: [u64; 2],
    /// Something could not be appended: what is there is of no use.
    is_broken: bool,
}

/// An operation that was done.
struct Entry {
    number: u64,
    txg: u64,
    index: u64,
    operation: Operation,
}

impl Journal {
    /// The journal in that file, which is empty or the one of a process that ended.
    #[must_use]
    pub fn new(file: File) -> Self {
        Self {
            file,
            position: Mutex::default(),
            queue: Mutex::default(),
        }
    }

    fn clear(&self) -> io::Result<()> {
        let mut position = lock(&self.position);
        self.file.set_len(0)?;
        *position = Position::default();
        *lock(&self.queue) = Queue::default();
        Ok(())
    }

    /// Takes what was done after checkpoint `txg`, to be in log record `index`: in the order in which it was done, so under the lock
    /// under which that is. [`Self::write`] has to follow before anybody is answered.
    pub(crate) fn queue(&self, txg: u64, index: u64, operation: &[u8]) {
        let mut queue = lock(&self.queue);
        let queue = &mut *queue;
        let (begin, first) = (queue.bytes.len(), queue.number);
        queue.bytes.extend_from_slice(&[0; 4]);
        queue
            .bytes
            .extend_from_slice(&(operation.len() as u32).to_le_bytes());
        for number in [first, txg, index] {
            queue.bytes.extend_from_slice(&number.to_le_bytes());
        }
        queue.bytes.extend_from_slice(operation);
        let checksum = crc32c::crc32c(&queue.bytes[begin + 4..]);
        queue.bytes[begin..begin + 4].copy_from_slice(&checksum.to_le_bytes());
        queue.number += 1;
        match queue.runs.last_mut() {
            Some((known, end)) if *known == txg => *end = queue.bytes.len(),
            _ => {
                let end = queue.bytes.len();
                queue.runs.push((txg, end));
            }
        }
    }

    /// Appends all that is queued. What others queued is written with it, so that they find nothing left to do.
    pub(crate) fn write(&self) {
        let mut position = lock(&self.position);
        let (all, runs) = {
            let mut queue = lock(&self.queue);
            let queue = &mut *queue;
            (
                std::mem::take(&mut queue.bytes),
                std::mem::take(&mut queue.runs),
            )
        };
        let mut begin = 0;
        for (txg, end) in runs {
            let bytes = &all[begin..end];
            begin = end;
            if !position.is_broken && self.append(&mut position, txg, bytes).is_err() {
                // A journal with a hole would be worse than none.
                position.is_broken = true;
                let _ = self.file.set_len(0);
            }
        }
    }

    fn append(&self, position: &mut Position, txg: u64, bytes: &[u8]) -> io::Result<()> {
        let area = (txg % 2) as usize;
        let begin = area as u64 * AREA_BYTES;
        if position.txg[area] != txg {
            let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            let old_bytes = position.end_bytes[area];
            if old_bytes > 0 {
                rustix::fs::fallocate(&self.file, flags, begin, old_bytes)?;
            }
            position.txg[area] = txg;
            position.end_bytes[area] = 0;
        }
        self.file
            .write_all_at(bytes, begin + position.end_bytes[area])?;
        position.end_bytes[area] += bytes.len() as u64;
        Ok(())
    }

    /// All entries, in the order in which they were done. An area ends where no whole entry is: what came there was not answered yet.
    fn entries(&self) -> io::Result<Vec<Entry>> {
        let mut entries = Vec::new();
        let end_bytes = self.file.metadata()?.len();
        for area in [0, AREA_BYTES] {
            let length = end_bytes.saturating_sub(area).min(AREA_BYTES);
            let mut at = 0;
            while at + HEADER as u64 <= length {
                let mut header = [0; HEADER];
                self.file.read_exact_at(&mut header, area + at)?;
                let operation_bytes = read_uint(&header[4..8]) as usize;
                if operation_bytes == 0
                    || operation_bytes > OPERATION_BYTES_MAX
                    || at + (HEADER + operation_bytes) as u64 > length
                {
                    break;
                }
                let mut bytes = header.to_vec();
                bytes.resize(HEADER + operation_bytes, 0);
                self.file
                    .read_exact_at(&mut bytes[HEADER..], area + at + HEADER as u64)?;
                if read_uint(&bytes[..4]) != u64::from(crc32c::crc32c(&bytes[4..])) {
                    break;
                }
                let mut rest = &bytes[HEADER..];
                let Some(operation) = Operation::decode(&mut rest).filter(|_| rest.is_empty())
                else {
                    break;
                };
                let number = |at: usize| read_uint(&bytes[at..at + 8]);
                entries.push(Entry {
                    number: number(8),
                    txg: number(16),
                    index: number(24),
                    operation,
                });
                at += (HEADER + operation_bytes) as u64;
            }
        }
        entries.sort_unstable_by_key(|entry| entry.number);
        Ok(entries)
    }
}

impl Pool {
    /// Opens the pool of a process that ended while the system went on, and does again what that process did and did not flush:
    /// nothing that it answered is undone. With an empty journal this is [`Self::open`].
    ///
    /// Everything that is done from now on goes into the journal.
    ///
    /// # Errors
    ///
    /// As [`Self::open`], or the journal cannot be read.
    pub fn open_with_journal(disk: Arc<dyn Disk>, journal: Arc<Journal>) -> Result<Self> {
        let failed = PoolError::io("read the journal of a process that ended");
        let entries = journal.entries().map_err(failed)?;
        let pool = if entries.is_empty() {
            Self::open(disk)?
        } else {
            Self::open_after_kill(disk, entries)?
        };
        journal
            .clear()
            .map_err(PoolError::io("empty the journal of a process that ended"))?;
        pool.inner.state().journal = Some(journal);
        Ok(pool)
    }

    fn open_after_kill(disk: Arc<dyn Disk>, entries: Vec<Entry>) -> Result<Self> {
        let superblock: Superblock = find_superblock(&*disk)?;
        let pool = Self::load(disk, &superblock)?;
        let last_txg = entries.iter().map(|entry| entry.txg).max();
        let missing = |record_count: u64| {
            entries
                .into_iter()
                .filter(|entry| (entry.txg, entry.index) >= (superblock.txg, record_count))
                .map(|entry| entry.operation)
                .collect()
        };
        pool.replay_all(&superblock, Some(missing))?;
        {
            // Should this process be killed too, no entry may count again once the checkpoint is there; and its superblock must not
            // go where the present one is.
            let metadata = &mut pool.inner.state().metadata;
            while last_txg.is_some_and(|txg| metadata.txg <= txg) {
                metadata.txg += 2;
            }
        }
        pool.checkpoint()?;
        Ok(pool)
    }
}
