//! The part of a scrub that reads data: everything that is not written in place any more has a checksum or gets one.
//!
//! Others work meanwhile. A record that is frozen stays so until it is free, and is not used again while `io_gate` is held,
//! so a leaf of a map is looked at under the lock and its data read without it.

use std::collections::HashMap;

use crate::catalog::EntryKind;
use crate::error::Result;
use crate::layout::{BLOCK, BLOCK_BYTES, RECORD, RECORD_BLOCKS, RECORD_BYTES};
use crate::object::is_own;
use crate::page::{PageKind, SLOTS, Slot};
use crate::pool::{Pool, State};
use crate::scrub::{Lost, ScrubReport};
use crate::sums::{Row, sum};

/// Blocks of records, and for each record why those cannot be used.
type Bad = HashMap<u64, (u16, String)>;

/// A leaf of the map of an object or snapshot.
struct Leaf {
    index: u64,
    slots: Box<[Slot; SLOTS]>,
    is_snapshot: bool,
    share_epoch: u64,
}

impl Leaf {
    /// The records of the pool that nobody writes in place, and which of their blocks what is seen here depends on.
    fn frozen(&self) -> impl Iterator<Item = (u64, u16)> {
        self.slots.iter().flat_map(|slot| {
            let may_change = !self.is_snapshot && is_own(slot.front, self.share_epoch);
            let front = (!may_change).then_some(slot.front);
            [front, Some(slot.back)]
                .into_iter()
                .flatten()
                .filter(|pointer| !pointer.is_null())
                .map(|pointer| (pointer.record, pointer.used_bits()))
        })
    }
}

impl State {
    /// The first leaf of a map from `from` on; none where there is no more, or where it was removed.
    fn leaf_from(&mut self, id: u64, from: u64) -> Result<Option<Leaf>> {
        let Some(entry) = self.metadata.catalog.get(id) else {
            return Ok(None);
        };
        let (map, share_epoch) = (entry.map, entry.share_epoch);
        let is_snapshot = entry.kind != EntryKind::Object;
        let Some(index) = self.metadata.next_leaf(map, PageKind::Map, from)? else {
            return Ok(None);
        };
        let Some(page) = self.metadata.leaf(map, PageKind::Map, index)? else {
            return Ok(None);
        };
        Ok(Some(Leaf {
            index,
            slots: Box::new(*page.slots()?),
            is_snapshot,
            share_epoch,
        }))
    }

    /// As [`Self::leaf_from`], but goes on behind leaves that cannot be read; those are told of by the scrub of pages.
    fn readable_leaf_from(&mut self, id: u64, mut from: u64, end: u64) -> Option<Leaf> {
        while from < end {
            match self.leaf_from(id, from) {
                Ok(found) => return found,
                Err(_) => from += 1,
            }
        }
        None
    }
}

impl Pool {
    /// Reads the data of all that is frozen, compares it with its checksums and makes those that are missing.
    pub(crate) fn scrub_data(
        &self,
        report: &mut ScrubReport,
        mut tell: impl FnMut(u64),
    ) -> Result<()> {
        let mut seen: HashMap<u64, u16> = HashMap::new();
        let mut bad = Bad::new();
        let ids = self.scrubbed_ids();
        for (id, leaf_count) in &ids {
            let mut from = 0;
            loop {
                let inner = &*self.inner;
                let _io = inner
                    .io_gate
                    .read()
                    .unwrap_or_else(std::sync::PoisonError::into_inner);
                let mut state = inner.state();
                state.check_running()?;
                let Some(leaf) = state.readable_leaf_from(*id, from, *leaf_count) else {
                    break;
                };
                from = leaf.index + 1;
                let mut work = Vec::new();
                for (record, map) in leaf.frozen() {
                    let known = seen.entry(record).or_default();
                    let blocks = map & !*known;
                    *known |= map;
                    if blocks != 0 && state.metadata.allocator.contains_record(record) {
                        work.push((record, blocks, state.metadata.sums_of(record)));
                    }
                }
                drop(state);
                for (record, blocks, row) in work {
                    self.scrub_record(record, blocks, &row, report, &mut bad);
                }
                tell(report.page_copies + report.data_blocks);
            }
            self.checkpoint_if_due()?;
        }
        if !bad.is_empty() {
            self.name_losses(&ids, &bad, report)?;
        }
        Ok(())
    }

    /// What has a map, and how many leaves that has at most.
    fn scrubbed_ids(&self) -> Vec<(u64, u64)> {
        let leaf_bytes = SLOTS as u64 * RECORD_BYTES;
        let state = self.inner.state();
        let entries = state.metadata.catalog.iter();
        entries
            .filter(|entry| matches!(entry.kind, EntryKind::Object | EntryKind::Snapshot))
            .map(|entry| (entry.id, entry.size_bytes.div_ceil(leaf_bytes)))
            .collect()
    }

    /// Reads blocks of one record. The caller holds `io_gate`.
    fn scrub_record(
        &self,
        record: u64,
        blocks: u16,
        row: &Row,
        report: &mut ScrubReport,
        bad: &mut Bad,
    ) {
        let mut content = vec![0; RECORD];
        let mut made = Row::default();
        let mut note = |block: u64, reason: String| {
            let known = bad.entry(record).or_insert((0, reason));
            known.0 |= 1 << block;
        };
        let at = record * RECORD_BYTES;
        let is_read = self.inner.disk.read_at(&mut content, at).is_ok();
        for block in (0..RECORD_BLOCKS).filter(|block| blocks >> block & 1 != 0) {
            report.data_blocks += 1;
            let piece = &mut content[block as usize * BLOCK..][..BLOCK];
            // One bad block makes the whole read fail; the others are read alone.
            let result = match is_read {
                true => Ok(()),
                false => self.inner.disk.read_at(piece, at + block * BLOCK_BYTES),
            };
            let found = sum(piece);
            let address = record * RECORD_BLOCKS + block;
            match (result, row[block as usize]) {
                (Err(error), _) => note(block, format!("block {address} cannot be read: {error}")),
                (Ok(()), 0) => {
                    made[block as usize] = found;
                    report.new_sums += 1;
                }
                (Ok(()), expected) if expected == found => {}
                (Ok(()), _) => note(
                    block,
                    format!("the data in block {address} is not what was written there"),
                ),
            }
        }
        if made != Row::default() {
            let mut state = self.inner.state();
            if state.metadata.need_pages(4).is_ok() {
                state.metadata.add_sums(record, &made);
            }
        }
    }

    /// Finds every object and snapshot that sees a bad block.
    fn name_losses(&self, ids: &[(u64, u64)], bad: &Bad, report: &mut ScrubReport) -> Result<()> {
        for (id, leaf_count) in ids {
            let mut from = 0;
            loop {
                let mut state = self.inner.state();
                state.check_running()?;
                let Some(leaf) = state.readable_leaf_from(*id, from, *leaf_count) else {
                    break;
                };
                from = leaf.index + 1;
                let Some(entry) = state.metadata.catalog.get(*id) else {
                    break;
                };
                let (name, size_bytes) =
                    (state.metadata.catalog.full_name(entry), entry.size_bytes);
                drop(state);
                for (index, slot) in leaf.slots.iter().enumerate() {
                    let offset_bytes = (leaf.index * SLOTS as u64 + index as u64) * RECORD_BYTES;
                    note_slot(*slot, bad, (&name, offset_bytes, size_bytes), report);
                }
            }
        }
        Ok(())
    }
}

/// Tells of the blocks of a slot that are bad; neighbours are one range.
fn note_slot(
    slot: Slot,
    bad: &Bad,
    (name, record_offset_bytes, size_bytes): (&str, u64, u64),
    report: &mut ScrubReport,
) {
    for block in 0..RECORD_BLOCKS {
        let Some(pointer) = slot.find(block) else {
            continue;
        };
        let needed = match pointer.packed {
            Some(_) => pointer.used_bits(),
            None => 1 << block,
        };
        let known = bad.get(&pointer.record);
        let Some((_, reason)) = known.filter(|(blocks, _)| blocks & needed != 0) else {
            continue;
        };
        let offset_bytes = record_offset_bytes + block * BLOCK_BYTES;
        let length_bytes = BLOCK_BYTES.min(size_bytes.saturating_sub(offset_bytes));
        match report.lost.last_mut() {
            Some(last)
                if last.name == name && last.offset_bytes + last.length_bytes == offset_bytes =>
            {
                last.length_bytes += length_bytes;
            }
            _ if length_bytes > 0 => report.lost.push(Lost {
                name: name.to_owned(),
                offset_bytes,
                length_bytes,
                reason: reason.clone(),
            }),
            _ => {}
        }
    }
}
