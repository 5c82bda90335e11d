//! Reading and writing what an object holds.
//!
//! A write goes to its place if nobody else can see that place, else to a new record, and the slot is changed when the data
//! is written. Where what is written is compressed it goes to a new extent with all of its record (`whole`). Writes to one record are ordered by its stripe; the map is only locked to look at it and to change it.

use std::collections::BTreeMap;
use std::sync::{Arc, PoisonError};

use crate::catalog::{CHECKED, EntryKind, ObjectId, compression_of};
use crate::compression::Method;
use crate::error::{PoolError, Result};
use crate::layout::{BLOCK, BLOCK_BYTES, Extent, RECORD, RECORD_BLOCKS, RECORD_BYTES};
use crate::map::block_bits;
use crate::metadata::Metadata;
use crate::operation::Operation;
use crate::page::{RecordPointer, Slot};
use crate::pool::{Inner, Pool};
use crate::sums::{Row, put_sums, sum};
use crate::sync::{RwLock, RwLockReadGuard};

/// An object or a snapshot of one, open. Clones are the same object.
#[derive(Debug, Clone)]
pub struct Object {
    pool: Pool,
    id: u64,
    gate: Arc<RwLock<()>>,
}

/// Where the bytes of one write to one record go.
pub(crate) struct Plan {
    /// What is written.
    pub(crate) target: Extent,
    /// It was reserved for this write.
    pub(crate) is_new: bool,
    pub(crate) old: Slot,
    pub(crate) new: Slot,
    /// Blocks that come over from the old slot.
    pub(crate) copied: u16,
    /// What is written gets checksums.
    pub(crate) is_checked: bool,
}

/// How a write is done.
enum Way {
    /// To blocks of a record.
    Blocks(Plan),
    /// With all of its record, compressed.
    Whole(Slot, Method),
}

/// What is known of a block that is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Check {
    /// It may be written in place, or is not read as a whole.
    Nothing,
    /// It has this checksum.
    Sum(u32),
    /// It never changes any more and has no checksum yet.
    Make,
}

/// A piece of an object that is in one place.
pub(crate) struct Piece {
    source: Source,
    length_bytes: usize,
    /// One for each block that it touches; of what is compressed, one for each block of the extent.
    checks: Vec<Check>,
}

/// Where a piece begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Source {
    Hole,
    /// Offset on the disk.
    Disk(u64),
    /// Offset in a compressed record.
    Packed(Extent, Method, usize),
}

/// Poisoning says that a thread panicked, not that what the gate guards is wrong: it guards an order.
fn shared(gate: &RwLock<()>) -> RwLockReadGuard<'_, ()> {
    gate.read().unwrap_or_else(PoisonError::into_inner)
}

impl Object {
    pub(crate) fn new(pool: &Pool, id: u64) -> Self {
        let gate = pool.inner.gate(id);
        Self {
            pool: pool.clone(),
            id,
            gate,
        }
    }

    /// Its id, which no other one ever has.
    #[must_use]
    pub fn id(&self) -> ObjectId {
        ObjectId(self.id)
    }

    /// The pool that it is in.
    #[must_use]
    pub fn pool(&self) -> &Pool {
        &self.pool
    }

    /// Its size.
    ///
    /// # Errors
    ///
    /// It was removed.
    pub fn size_bytes(&self) -> Result<u64> {
        let state = self.pool.inner.state();
        Ok(state.metadata.entry(self.id)?.size_bytes)
    }

    /// Fills `buffer` with what is at `offset_bytes`.
    ///
    /// # Errors
    ///
    /// The range is not inside the object, or cannot be read.
    pub fn read_at(&self, buffer: &mut [u8], offset_bytes: u64) -> Result<()> {
        let inner = &*self.pool.inner;
        let _io = shared(&inner.io_gate);
        let pieces = {
            let mut state = inner.state();
            let metadata = &mut state.metadata;
            metadata.check_range(self.id, offset_bytes, buffer.len() as u64)?;
            metadata.pieces(self.id, offset_bytes, buffer.len())?
        };
        let mut rest = buffer;
        for piece in pieces {
            let (bytes, left) = rest.split_at_mut(piece.length_bytes);
            inner.read_piece(bytes, &piece)?;
            rest = left;
        }
        Ok(())
    }

    /// The first range from `offset_bytes` on that may hold anything but zeros: begin and end, in bytes; none up to the end.
    ///
    /// # Errors
    ///
    /// The object was removed, or its map cannot be read.
    pub fn next_data(&self, offset_bytes: u64) -> Result<Option<(u64, u64)>> {
        let mut state = self.pool.inner.state();
        let entry = state.metadata.entry(self.id)?;
        let (map, size_bytes) = (entry.map, entry.size_bytes);
        let Some(block) = state
            .metadata
            .next_block(map, offset_bytes / BLOCK_BYTES, true)?
        else {
            return Ok(None);
        };
        let begin = (block * BLOCK_BYTES).max(offset_bytes);
        let end_block = state.metadata.next_block(map, block, false)?;
        let end = end_block.map_or(size_bytes, |block| (block * BLOCK_BYTES).min(size_bytes));
        Ok((begin < end).then_some((begin, end)))
    }

    /// Writes `bytes` at `offset_bytes`. Durable after the next [`Self::flush`].
    ///
    /// # Errors
    ///
    /// The range is not inside the object, the pool is full, or the disk refused; a part may be written then.
    pub fn write_at(&self, bytes: &[u8], offset_bytes: u64) -> Result<()> {
        let mut done = 0;
        let mut was_full = false;
        let mut is_due = false;
        while done < bytes.len() {
            match self.write_some(&bytes[done..], offset_bytes + done as u64, &mut is_due) {
                (written, Ok(())) => done += written,
                // What was removed becomes free with a checkpoint.
                (written, Err(PoolError::Full)) if !was_full => {
                    done += written;
                    was_full = true;
                    self.pool.checkpoint()?;
                }
                (_, Err(error)) => return Err(error),
            }
        }
        if is_due {
            self.pool.checkpoint_if_due()?;
        }
        Ok(())
    }

    /// Writes until the end or a failure; also tells how much was written, and whether a checkpoint is due.
    fn write_some(
        &self,
        bytes: &[u8],
        offset_bytes: u64,
        is_due: &mut bool,
    ) -> (usize, Result<()>) {
        let inner = &*self.pool.inner;
        let _io = shared(&inner.io_gate);
        let _writer = shared(&self.gate);
        let length_bytes = bytes.len() as u64;
        // Each piece is checked as it is written. Of several none is, where the last one is out of range.
        let is_one = offset_bytes % RECORD_BYTES + length_bytes <= RECORD_BYTES;
        let check = || {
            inner
                .state()
                .check_writable(self.id, offset_bytes, length_bytes)
        };
        if !is_one && let Err(error) = check() {
            return (0, Err(error));
        }
        let mut done = 0;
        while done < bytes.len() {
            let at = offset_bytes + done as u64;
            let in_record = (at % RECORD_BYTES) as usize;
            let length = (RECORD - in_record).min(bytes.len() - done);
            let piece = &bytes[done..done + length];
            match inner.write_record(self.id, at / RECORD_BYTES, in_record, piece) {
                Ok(due) => *is_due |= due,
                Err(error) => return (done, Err(error)),
            }
            done += length;
        }
        (done, Ok(()))
    }

    /// Makes a range read as zeros and gives its space back.
    ///
    /// # Errors
    ///
    /// The range is not inside the object, or the pool is out of order.
    pub fn punch_hole(&self, offset_bytes: u64, length_bytes: u64) -> Result<()> {
        self.pool.retry_when_full(|| {
            let inner = &*self.pool.inner;
            let _io = shared(&inner.io_gate);
            let _alone = self.gate.write().unwrap_or_else(PoisonError::into_inner);
            inner
                .state()
                .check_writable(self.id, offset_bytes, length_bytes)?;
            let end_bytes = offset_bytes + length_bytes;
            let first_block = offset_bytes.div_ceil(BLOCK_BYTES);
            let end_block = end_bytes / BLOCK_BYTES;
            if first_block > end_block {
                return inner.zero_in_block(self.id, offset_bytes, end_bytes);
            }
            inner.zero_in_block(self.id, offset_bytes, first_block * BLOCK_BYTES)?;
            inner.zero_in_block(self.id, end_block * BLOCK_BYTES, end_bytes)?;
            if first_block == end_block {
                return Ok(());
            }
            inner.state().commit(&Operation::Punch {
                id: self.id,
                first_block,
                block_count: end_block - first_block,
            })
        })
    }

    /// Changes the size; what is new reads as zeros.
    ///
    /// # Errors
    ///
    /// The size is out of range, or the pool is out of order.
    pub fn set_size(&self, size_bytes: u64) -> Result<()> {
        self.pool.retry_when_full(|| {
            let inner = &*self.pool.inner;
            let _io = shared(&inner.io_gate);
            let _alone = self.gate.write().unwrap_or_else(PoisonError::into_inner);
            inner.state().check_writable(self.id, 0, 0)?;
            let old_bytes = inner.state().metadata.entry(self.id)?.size_bytes;
            if size_bytes < old_bytes {
                let block_end = size_bytes.next_multiple_of(BLOCK_BYTES);
                inner.zero_in_block(self.id, size_bytes, block_end.min(old_bytes))?;
            }
            let id = self.id;
            inner.state().commit(&Operation::Resize { id, size_bytes })
        })
    }

    /// Returns when everything that was written to the pool before the call is durable.
    ///
    /// # Errors
    ///
    /// As [`Pool::flush`].
    pub fn flush(&self) -> Result<()> {
        self.pool.flush()
    }
}

impl crate::pool::State {
    fn check_writable(&self, id: u64, offset_bytes: u64, length_bytes: u64) -> Result<()> {
        self.check_running()?;
        let entry = self.metadata.entry(id)?;
        if entry.kind != EntryKind::Object {
            return Err(PoolError::ReadOnly {
                name: self.metadata.catalog.full_name(entry),
            });
        }
        self.metadata.check_range(id, offset_bytes, length_bytes)
    }
}

impl Metadata {
    pub(crate) fn check_range(&self, id: u64, offset_bytes: u64, length_bytes: u64) -> Result<()> {
        let entry = self.entry(id)?;
        match offset_bytes.checked_add(length_bytes) {
            Some(end) if end <= entry.size_bytes => Ok(()),
            _ => Err(PoolError::OutOfRange {
                name: self.catalog.full_name(entry),
                offset_bytes,
                length_bytes,
                size_bytes: entry.size_bytes,
            }),
        }
    }

    /// Where a range is, in order; neighbours on the disk are one piece.
    fn pieces(&mut self, id: u64, offset_bytes: u64, length_bytes: usize) -> Result<Vec<Piece>> {
        let entry = self.entry(id)?;
        let (map, share_epoch) = (entry.map, entry.share_epoch);
        let is_snapshot = entry.kind == EntryKind::Snapshot;
        let makes_sums = self.has_room_for_sums();
        let mut row = (0, Row::default());
        let mut pieces: Vec<Piece> = Vec::new();
        let mut slot = (u64::MAX, Slot::default());
        let mut done = 0;
        while done < length_bytes {
            let at = offset_bytes + done as u64;
            let (record_index, in_block) = (at / RECORD_BYTES, at % BLOCK_BYTES);
            if slot.0 != record_index {
                slot = (record_index, self.slot(map, record_index)?);
            }
            let block = at / BLOCK_BYTES % RECORD_BLOCKS;
            let length = (BLOCK - in_block as usize).min(length_bytes - done);
            let found = slot.1.find(block);
            let source = self.source_of(found, at % RECORD_BYTES)?;
            if let Some(last) = pieces.last_mut().filter(|last| last.is_followed_by(source)) {
                last.length_bytes += length;
            } else {
                pieces.push(Piece {
                    source,
                    length_bytes: length,
                    checks: Vec::new(),
                });
            }
            let Some(last) = pieces.last_mut() else {
                break;
            };
            let own = slot.1.front;
            let may_change = !is_snapshot && is_own(own, share_epoch) && found == Some(own);
            match (found, source) {
                (Some(pointer), Source::Packed(..)) if last.checks.is_empty() => {
                    last.checks = self.checks_of(pointer, makes_sums);
                }
                (Some(pointer), Source::Disk(_)) => {
                    if row.0 != pointer.record && !may_change {
                        row = (pointer.record, self.sums_of(pointer.record));
                    }
                    let makes_sum = makes_sums && length == BLOCK;
                    last.checks.push(match may_change {
                        true => Check::Nothing,
                        false => Check::of(row.1[block as usize], makes_sum),
                    });
                }
                _ => {}
            }
            done += length;
        }
        Ok(pieces)
    }

    /// Where a part of a record is that is seen through a pointer.
    fn source_of(&self, found: Option<RecordPointer>, in_record: u64) -> Result<Source> {
        let Some((pointer, extent)) = found.and_then(|found| Some((found, found.extent()?))) else {
            return Ok(Source::Hole);
        };
        if !self.allocator.contains_record(pointer.record) {
            return Err(PoolError::Damaged {
                what: format!("a map names {extent}, which the pool has not"),
            });
        }
        Ok(match pointer.packed {
            None => Source::Disk(extent.offset_bytes() + in_record),
            Some(packed) => Source::Packed(extent, packed.method, in_record as usize),
        })
    }

    /// What is known of the blocks of an extent.
    fn checks_of(&mut self, pointer: RecordPointer, makes_sums: bool) -> Vec<Check> {
        let row = self.sums_of(pointer.record);
        let bits = pointer.used_bits();
        let blocks = (0..row.len()).filter(|block| bits >> block & 1 != 0);
        blocks
            .map(|block| Check::of(row[block], makes_sums))
            .collect()
    }

    /// Where blocks of an older slot are, from the first of them on, as one piece.
    pub(crate) fn old_piece(
        &mut self,
        pointer: RecordPointer,
        first_block: u64,
        block_count: u64,
    ) -> Result<Piece> {
        let source = self.source_of(Some(pointer), first_block * BLOCK_BYTES)?;
        let checks = match pointer.packed {
            Some(_) => self.checks_of(pointer, false),
            None => {
                let row = self.sums_of(pointer.record);
                let sums = &row[first_block as usize..(first_block + block_count) as usize];
                sums.iter().map(|sum| Check::of(*sum, false)).collect()
            }
        };
        Ok(Piece {
            source,
            length_bytes: (block_count * BLOCK_BYTES) as usize,
            checks,
        })
    }

    /// Decides where blocks `bits` of a record of an object are written.
    fn plan(&mut self, id: u64, record_index: u64, bits: u16) -> Result<Way> {
        let entry = self.entry(id)?;
        let (map, share_epoch, parent) = (entry.map, entry.share_epoch, entry.parent);
        let options = self.catalog.get(parent).map_or(0, |entry| entry.options);
        let old = self.slot(map, record_index)?;
        if let Some(method) = compression_of(options).method() {
            return Ok(Way::Whole(old, method));
        }
        let is_checked = options & CHECKED != 0;
        if !is_checked && is_own(old.front, share_epoch) {
            self.source_of(Some(old.front), 0)?;
            let front = RecordPointer {
                map: old.front.map | bits,
                ..old.front
            };
            return Ok(Way::Blocks(Plan {
                target: Extent::of_record(front.record),
                is_new: false,
                old,
                new: Slot::normal(front, old.back),
                copied: 0,
                is_checked,
            }));
        }
        let target = self.reserve(RECORD_BLOCKS)?;
        let (front, back) = (old.front.without(bits), old.back.without(bits));
        // A slot has room for one older record. Of two, the one of which less is seen is copied.
        let (copied, kept) = if front.is_null() {
            (0, back)
        } else if back.is_null() {
            (0, front)
        } else if front.map.count_ones() <= back.map.count_ones() {
            (front.map, back)
        } else {
            (back.map, front)
        };
        let written = RecordPointer {
            birth: self.epoch,
            ..RecordPointer::to(target, bits | copied, is_checked, None)
        };
        // What has checksums stays as it is, also when the dataset has other options one day.
        let kept = RecordPointer {
            is_shared: kept.is_shared || (is_checked && !kept.is_null()),
            ..kept
        };
        Ok(Way::Blocks(Plan {
            target,
            is_new: true,
            old,
            new: Slot::normal(written, kept),
            copied,
            is_checked,
        }))
    }
}

/// Whether nobody else can see the record of a front pointer.
pub(crate) fn is_own(front: RecordPointer, share_epoch: u64) -> bool {
    !front.is_null() && !front.is_shared && front.packed.is_none() && front.birth > share_epoch
}

impl Check {
    fn of(sum: u32, makes_sum: bool) -> Self {
        match sum {
            0 if makes_sum => Self::Make,
            0 => Self::Nothing,
            sum => Self::Sum(sum),
        }
    }
}

impl Piece {
    fn is_followed_by(&self, source: Source) -> bool {
        let length = self.length_bytes;
        match (self.source, source) {
            (Source::Hole, Source::Hole) => true,
            (Source::Disk(begin), Source::Disk(next)) => begin + length as u64 == next,
            (Source::Packed(extent, _, begin), Source::Packed(other, _, next)) => {
                extent == other && begin + length == next
            }
            _ => false,
        }
    }
}

impl Inner {
    /// The gate of an object.
    pub(crate) fn gate(&self, id: u64) -> Arc<RwLock<()>> {
        let mut state = self.state();
        // Those that nobody holds are of objects that nobody uses.
        if state.gates.len() > 1024 && !state.gates.contains_key(&id) {
            state.gates.retain(|_, gate| Arc::strong_count(gate) > 1);
        }
        Arc::clone(state.gates.entry(id).or_default())
    }

    /// Writes inside one record; true when a checkpoint is due. The caller holds the gate of the object and `io_gate`.
    fn write_record(&self, id: u64, record_index: u64, at: usize, bytes: &[u8]) -> Result<bool> {
        let stripe = Self::stripe_of(id, record_index);
        let _only_writer = self.lock_stripe(stripe);
        let end = at + bytes.len();
        let first_block = (at / BLOCK) as u64;
        let bits = block_bits(first_block, end.div_ceil(BLOCK) as u64);
        let way = {
            let mut state = self.state();
            let offset_bytes = record_index * RECORD_BYTES + at as u64;
            state.check_writable(id, offset_bytes, bytes.len() as u64)?;
            state.metadata.plan(id, record_index, bits)?
        };
        let plan = match way {
            Way::Blocks(plan) => plan,
            Way::Whole(old, method) => {
                let place = (id, record_index, stripe);
                return self.write_whole(place, at, bytes, (old, method));
            }
        };
        let mut row = Row::default();
        let written = self
            .copy_blocks(&plan, &mut row)
            .and_then(|()| self.write_blocks(&plan, at, bytes, &mut row));
        if let Err(error) = written {
            self.give_up(&plan);
            return Err(error);
        }
        if plan.new == plan.old {
            return Ok(false);
        }
        let is_due = self.commit_write(id, record_index, &plan, &row, stripe);
        if is_due.is_err() {
            self.give_up(&plan);
        }
        is_due
    }

    /// What was written becomes a part of the object; true when a checkpoint is due.
    pub(crate) fn commit_write(
        &self,
        id: u64,
        record_index: u64,
        plan: &Plan,
        row: &Row,
        stripe: usize,
    ) -> Result<bool> {
        let mut state = self.state();
        let slot = plan.new;
        state.commit_later(&Operation::Slot {
            id,
            record_index,
            slot,
        })?;
        let fresh = match plan.is_new {
            true => plan.new.front.used_bits(),
            false => plan.new.front.map & !plan.old.front.map,
        };
        let record = plan.target.record();
        for block in (0..RECORD_BLOCKS).filter(|block| fresh >> block & 1 != 0) {
            let address = record * RECORD_BLOCKS + block;
            state.pending.fresh.insert(address, stripe);
        }
        if plan.is_checked {
            let sums = row.iter().copied().filter(|sum| *sum != 0).collect();
            let map = plan.new.front.used_bits();
            state.commit_later(&Operation::Sums { record, map, sums })?;
        }
        let is_due = state.is_checkpoint_due();
        let journal = state.journal.clone();
        drop(state);
        if let Some(journal) = journal {
            journal.write();
        }
        Ok(is_due)
    }

    /// Reads what is in one place and compares it with what is known of it.
    pub(crate) fn read_piece(&self, bytes: &mut [u8], piece: &Piece) -> Result<()> {
        let read = |buffer: &mut [u8], offset_bytes| {
            let result = self.disk.read_at(buffer, offset_bytes);
            result.map_err(PoolError::io("read data"))
        };
        let offset_bytes = match piece.source {
            Source::Hole => {
                bytes.fill(0);
                return Ok(());
            }
            Source::Packed(extent, method, at) => {
                let mut packed = vec![0; extent.length_bytes() as usize];
                read(&mut packed, extent.offset_bytes())?;
                self.check_blocks(&packed, extent.first_block, &piece.checks)?;
                let record = method.unpack(&packed).ok_or_else(|| PoolError::Damaged {
                    what: format!("{extent} holds no compressed record"),
                })?;
                bytes.copy_from_slice(&record[at..at + bytes.len()]);
                return Ok(());
            }
            Source::Disk(offset_bytes) => offset_bytes,
        };
        if piece.checks.iter().all(|check| *check == Check::Nothing) {
            return read(bytes, offset_bytes);
        }
        let first_block = offset_bytes / BLOCK_BYTES;
        let before = (offset_bytes % BLOCK_BYTES) as usize;
        let length = bytes.len();
        if before == 0 && length.is_multiple_of(BLOCK) {
            read(bytes, offset_bytes)?;
            return self.check_blocks(bytes, first_block, &piece.checks);
        }
        let mut whole = vec![0; (before + length).next_multiple_of(BLOCK)];
        read(&mut whole, first_block * BLOCK_BYTES)?;
        self.check_blocks(&whole, first_block, &piece.checks)?;
        bytes.copy_from_slice(&whole[before..before + length]);
        Ok(())
    }

    /// Compares blocks with their checksums, and makes those that are missing.
    fn check_blocks(&self, bytes: &[u8], first_block: u64, checks: &[Check]) -> Result<()> {
        let mut made: BTreeMap<u64, Row> = BTreeMap::new();
        for ((content, check), block) in bytes.chunks(BLOCK).zip(checks).zip(first_block..) {
            match check {
                Check::Nothing => {}
                Check::Sum(expected) if sum(content) == *expected => {}
                Check::Sum(_) => {
                    return Err(PoolError::Damaged {
                        what: format!("the data in block {block} is not what was written there"),
                    });
                }
                Check::Make => {
                    let row = made.entry(block / RECORD_BLOCKS).or_default();
                    row[(block % RECORD_BLOCKS) as usize] = sum(content);
                }
            }
        }
        if !made.is_empty() {
            let mut state = self.state();
            for (record, row) in &made {
                state.metadata.add_sums(*record, row);
            }
        }
        Ok(())
    }

    /// Gives a record back that no slot names.
    pub(crate) fn give_up(&self, plan: &Plan) {
        if !plan.is_new {
            return;
        }
        let mut state = self.state();
        let allocator = &mut state.metadata.allocator;
        if !allocator.is_used(plan.target.first_block) {
            allocator.give_back(plan.target);
        }
    }

    fn copy_blocks(&self, plan: &Plan, row: &mut Row) -> Result<()> {
        for block in (0..RECORD_BLOCKS).filter(|block| plan.copied >> block & 1 != 0) {
            let content = self.old_block(plan, block)?;
            put_sums(row, block as usize, &content);
            self.write_data(&content, plan.target, block as usize * BLOCK)?;
        }
        Ok(())
    }

    /// What a block was before the write.
    fn old_block(&self, plan: &Plan, block: u64) -> Result<Vec<u8>> {
        let mut content = vec![0; BLOCK];
        if let Some(pointer) = plan.old.find(block) {
            // What is damaged must not get a new place and a right checksum.
            let piece = self.state().metadata.old_piece(pointer, block, 1)?;
            self.read_piece(&mut content, &piece)?;
        }
        Ok(content)
    }

    pub(crate) fn write_data(&self, bytes: &[u8], extent: Extent, at: usize) -> Result<()> {
        self.disk
            .write_at(bytes, extent.offset_bytes() + at as u64)
            .map_err(PoolError::io("write data"))
    }

    /// Writes the bytes; a block that is not in the target yet is written as a whole.
    fn write_blocks(&self, plan: &Plan, at: usize, bytes: &[u8], row: &mut Row) -> Result<()> {
        let end = at + bytes.len();
        let is_there = |block: usize| !plan.is_new && plan.old.front.map >> block & 1 != 0;
        let first_block = at / BLOCK;
        let last_block = (end - 1) / BLOCK;
        let fills_first = !at.is_multiple_of(BLOCK) && !is_there(first_block);
        let fills_last = !end.is_multiple_of(BLOCK) && !is_there(last_block);
        if !fills_first && !fills_last {
            if plan.is_checked {
                put_sums(row, first_block, bytes);
            }
            return self.write_data(bytes, plan.target, at);
        }
        let mut whole = Vec::with_capacity(bytes.len() + 2 * BLOCK);
        let mut start = at;
        if fills_first {
            start = first_block * BLOCK;
            whole.extend_from_slice(&self.old_block(plan, first_block as u64)?[..at - start]);
        }
        whole.extend_from_slice(bytes);
        if fills_last {
            let rest = &self.old_block(plan, last_block as u64)?[end - last_block * BLOCK..];
            whole.extend_from_slice(rest);
        }
        if plan.is_checked {
            put_sums(row, first_block, &whole);
        }
        self.write_data(&whole, plan.target, start)
    }

    /// Writes zeros inside one block, where it has anything. The caller holds the gate exclusively.
    fn zero_in_block(&self, id: u64, begin_bytes: u64, end_bytes: u64) -> Result<()> {
        if begin_bytes >= end_bytes {
            return Ok(());
        }
        let record_index = begin_bytes / RECORD_BYTES;
        let block = begin_bytes / BLOCK_BYTES % RECORD_BLOCKS;
        let slot = {
            let mut state = self.state();
            let map = state.metadata.entry(id)?.map;
            state.metadata.slot(map, record_index)?
        };
        if slot.find(block).is_none() {
            return Ok(());
        }
        let zeros = [0; BLOCK];
        let length = (end_bytes - begin_bytes) as usize;
        let at = (begin_bytes % RECORD_BYTES) as usize;
        self.write_record(id, record_index, at, &zeros[..length])?;
        Ok(())
    }
}
