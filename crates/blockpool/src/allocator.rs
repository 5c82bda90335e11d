//! Which blocks are used, and which can be given out.
//!
//! Two maps: `used` is what the next checkpoint will say; `busy` also has what was freed since the last durable
//! checkpoint (which may still name it) and what a write in flight got that no slot names yet. Only what is not busy is given
//! out. Nothing here does I/O.

use std::collections::{BTreeMap, BTreeSet};

use crate::layout::{Extent, RECORD_BLOCKS};
use crate::page::PAYLOAD;

/// Blocks that a leaf of the space map tells of.
pub(crate) const GROUP_BLOCKS: u64 = PAYLOAD as u64 * 8;
const GROUP_RECORDS: u64 = GROUP_BLOCKS / RECORD_BLOCKS;
/// Records of one word of a map.
const WORD_RECORDS: u64 = 64 / RECORD_BLOCKS;
const FULL: u16 = u16::MAX;
/// Neighbours that are given back to the host: shorter runs are used again before that pays. So many from a multiple of it
/// on are given back with the last of them that is freed, whenever the others were.
const PUNCHED_RECORDS: u64 = 4;
/// Runs that are given back with one checkpoint, which others wait for.
const PUNCHED_RUNS: usize = 1024;

/// One bit per block.
#[derive(Debug, Default)]
struct Bits(Vec<u64>);

impl Bits {
    fn get(&self, block: u64) -> bool {
        self.0[(block / 64) as usize] >> (block % 64) & 1 != 0
    }

    fn set(&mut self, block: u64, value: bool) {
        let word = &mut self.0[(block / 64) as usize];
        let bit = 1 << (block % 64);
        *word = if value { *word | bit } else { *word & !bit };
    }

    /// The 16 bits of a record.
    fn record(&self, record: u64) -> u16 {
        (self.0[(record / WORD_RECORDS) as usize] >> (record % WORD_RECORDS * RECORD_BLOCKS)) as u16
    }

    fn fill(&mut self, extent: Extent, value: bool) {
        let record = extent.record();
        let word = &mut self.0[(record / WORD_RECORDS) as usize];
        let bits = u64::from(extent.bits()) << (record % WORD_RECORDS * RECORD_BLOCKS);
        *word = if value { *word | bits } else { *word & !bits };
    }
}

/// A piece of the pool that was freed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Freed {
    Data(Extent),
    Page(u64),
}

/// What goes back to the host.
#[derive(Debug, Default)]
pub(crate) struct Punchable {
    /// Runs of records, first and count; the longest ones.
    pub(crate) runs: Vec<(u64, u64)>,
    /// Records of them that were free before, and are busy until they are [released](Allocator::release).
    neighbours: Vec<u64>,
}

/// The one block of a page.
fn page_extent(block: u64) -> Extent {
    Extent {
        first_block: block,
        block_count: 1,
    }
}

/// The longest row of blocks of a record that are not set.
fn longest_run(record: u16) -> usize {
    let (mut longest, mut run) = (0, 0);
    for block in 0..RECORD_BLOCKS {
        run = if record >> block & 1 == 0 { run + 1 } else { 0 };
        longest = longest.max(run);
    }
    longest
}

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct Allocator {
    first_record: u64,
    record_count: u64,
    used: Bits,
    busy: Bits,
    /// Records of a group that are not busy at all.
    free_in_group: Vec<u32>,
    free_records: u64,
    /// Records cut into pages and extents that have room, and their longest rows of free blocks.
    partial: BTreeMap<u64, usize>,
    /// The same by the length of that row.
    runs: [BTreeSet<u64>; RECORD_BLOCKS as usize],
    /// Where the search for a free record goes on.
    cursor: u64,
    /// Blocks that hold data.
    data_blocks: u64,
    freed: Vec<Freed>,
    dirty_groups: BTreeSet<u64>,
}

impl Allocator {
    /// Everything from `first_block` on is free.
    pub(crate) fn new(first_block: u64, size_blocks: u64) -> Self {
        let mut allocator = Self {
            first_record: first_block / RECORD_BLOCKS,
            cursor: first_block / RECORD_BLOCKS,
            ..Self::default()
        };
        allocator.grow(size_blocks);
        allocator
    }

    /// Adds what is behind the old end.
    pub(crate) fn grow(&mut self, size_blocks: u64) {
        let words = size_blocks.div_ceil(64) as usize;
        self.used.0.resize(words, 0);
        self.busy.0.resize(words, 0);
        self.free_in_group
            .resize(size_blocks.div_ceil(GROUP_BLOCKS) as usize, 0);
        let old_count = self.record_count.max(self.first_record);
        self.record_count = size_blocks / RECORD_BLOCKS;
        for record in old_count..self.record_count {
            self.free_in_group[(record / GROUP_RECORDS) as usize] += 1;
        }
        self.free_records += self.record_count - old_count;
    }

    /// Takes over a leaf of the space map. False where it says that something is used that cannot be.
    pub(crate) fn load_group(&mut self, group: u64, payload: &[u8; PAYLOAD]) -> bool {
        let first = group * GROUP_RECORDS;
        for (index, lane) in payload.chunks(2).enumerate() {
            let bits = u16::from_le_bytes([lane[0], lane[1]]);
            if bits == 0 {
                continue;
            }
            let record = first + index as u64;
            if !(self.first_record..self.record_count).contains(&record) {
                return false;
            }
            // Data, pages or both: who walks the maps can tell, nothing here needs to.
            for block in (0..RECORD_BLOCKS).filter(|block| bits >> block & 1 != 0) {
                self.used.set(record * RECORD_BLOCKS + block, true);
                self.busy.set(record * RECORD_BLOCKS + block, true);
            }
            self.count_busy(record);
            self.update_partial(record);
        }
        self.dirty_groups.clear();
        true
    }

    /// The payload of a leaf of the space map.
    pub(crate) fn save_group(&self, group: u64) -> Box<[u8; PAYLOAD]> {
        let mut payload = Box::new([0; PAYLOAD]);
        let first = group * GROUP_RECORDS;
        for (index, lane) in payload.chunks_mut(2).enumerate() {
            let record = first + index as u64;
            if record < self.record_count {
                lane.copy_from_slice(&self.used.record(record).to_le_bytes());
            }
        }
        payload
    }

    /// A group whose leaf is out of date and that is not among `known`.
    pub(crate) fn next_dirty(&self, known: &BTreeMap<u64, u64>) -> Option<u64> {
        let mut dirty = self.dirty_groups.iter().copied();
        dirty.find(|group| !known.contains_key(group))
    }

    /// No group is out of date any more.
    pub(crate) fn set_clean(&mut self) {
        self.dirty_groups.clear();
    }

    /// Every group is out of date, as after a recount.
    pub(crate) fn set_dirty(&mut self) {
        self.dirty_groups = (0..self.group_count()).collect();
    }

    pub(crate) fn dirty_count(&self) -> usize {
        self.dirty_groups.len()
    }

    /// How many groups there are.
    pub(crate) fn group_count(&self) -> u64 {
        self.free_in_group.len() as u64
    }

    pub(crate) fn contains_record(&self, record: u64) -> bool {
        (self.first_record..self.record_count).contains(&record)
    }

    pub(crate) fn contains_block(&self, block: u64) -> bool {
        self.contains_record(block / RECORD_BLOCKS)
    }

    pub(crate) fn is_used(&self, block: u64) -> bool {
        self.used.get(block)
    }

    /// Whether all of an extent is used.
    pub(crate) fn is_used_extent(&self, extent: Extent) -> bool {
        let record = extent.record();
        self.contains_record(record) && self.used.record(record) & extent.bits() == extent.bits()
    }

    /// Whether any block of an extent is used.
    pub(crate) fn is_used_partly(&self, extent: Extent) -> bool {
        self.used.record(extent.record()) & extent.bits() != 0
    }

    /// Whether a block is in use, or was until the last checkpoint.
    pub(crate) fn is_busy(&self, block: u64) -> bool {
        self.busy.get(block)
    }

    /// Blocks that hold data.
    pub(crate) fn data_blocks(&self) -> u64 {
        self.data_blocks
    }

    /// What the superblock says of that; the space map does not tell data from pages.
    pub(crate) fn set_data_blocks(&mut self, count: u64) {
        self.data_blocks = count;
    }

    /// Where data and pages begin.
    pub(crate) fn first_block(&self) -> u64 {
        self.first_record * RECORD_BLOCKS
    }

    /// Blocks that are free with the next checkpoint.
    pub(crate) fn freeing_blocks(&self) -> u64 {
        let blocks = self.freed.iter().map(|freed| match freed {
            Freed::Data(extent) => extent.block_count,
            Freed::Page(_) => 1,
        });
        blocks.sum()
    }

    /// A page that a recount found.
    pub(crate) fn take_named_page(&mut self, block: u64) {
        self.take_page(block);
    }

    /// Records that can be given out now.
    pub(crate) fn free_records(&self) -> u64 {
        self.free_records
    }

    /// All records for data and pages.
    pub(crate) fn total_records(&self) -> u64 {
        self.record_count - self.first_record
    }

    /// Blocks that are used.
    pub(crate) fn used_blocks(&self) -> u64 {
        let words = &self.used.0;
        words.iter().map(|word| u64::from(word.count_ones())).sum()
    }

    fn count_busy(&mut self, record: u64) {
        self.free_in_group[(record / GROUP_RECORDS) as usize] -= 1;
        self.free_records -= 1;
    }

    fn count_free(&mut self, record: u64) {
        self.free_in_group[(record / GROUP_RECORDS) as usize] += 1;
        self.free_records += 1;
    }

    fn mark_dirty(&mut self, block: u64) {
        self.dirty_groups.insert(block / GROUP_BLOCKS);
    }

    /// Room for data, which is busy from now on; it has to be [`Self::take`]n or given back. Less than a record goes where a row of
    /// free blocks fits it best.
    pub(crate) fn reserve(&mut self, block_count: u64) -> Option<Extent> {
        let mut fitting = self.runs.iter().skip(block_count as usize);
        let record = match fitting.find_map(BTreeSet::first) {
            Some(record) => *record,
            None => self.find_free_record()?,
        };
        let busy = self.busy.record(record);
        let extent = (0..=RECORD_BLOCKS - block_count)
            .map(|first| Extent {
                first_block: record * RECORD_BLOCKS + first,
                block_count,
            })
            .find(|extent| extent.bits() & busy == 0)?;
        self.set_busy(extent, true);
        Some(extent)
    }

    fn find_free_record(&mut self) -> Option<u64> {
        if self.free_records == 0 {
            return None;
        }
        let mut record = self.cursor;
        loop {
            if record >= self.record_count {
                record = self.first_record;
            }
            if self.free_in_group[(record / GROUP_RECORDS) as usize] == 0 {
                record = (record / GROUP_RECORDS + 1) * GROUP_RECORDS;
                continue;
            }
            if self.busy.record(record) == 0 {
                break;
            }
            record += 1;
        }
        self.cursor = record + 1;
        Some(record)
    }

    fn set_busy(&mut self, extent: Extent, value: bool) {
        let record = extent.record();
        let was_free = self.busy.record(record) == 0;
        self.busy.fill(extent, value);
        let is_free = self.busy.record(record) == 0;
        match (was_free, is_free) {
            (true, false) => self.count_busy(record),
            (false, true) => self.count_free(record),
            _ => {}
        }
        self.update_partial(record);
    }

    /// Makes data busy that the log names. False where it is outside.
    pub(crate) fn reserve_named(&mut self, extent: Extent) -> bool {
        if !self.contains_record(extent.record()) {
            return false;
        }
        self.set_busy(extent, true);
        true
    }

    /// Gives back what was reserved and never used.
    pub(crate) fn give_back(&mut self, extent: Extent) {
        self.set_busy(extent, false);
    }

    /// What was reserved is used.
    pub(crate) fn take(&mut self, extent: Extent) {
        self.reserve_named(extent);
        self.used.fill(extent, true);
        self.data_blocks += extent.block_count;
        self.mark_dirty(extent.first_block);
    }

    /// A free block for a page. That of a second copy is far from the first, which is `other`, where there is room.
    pub(crate) fn allocate_page(&mut self, other: Option<u64>) -> Option<u64> {
        let middle = self.record_count / 2;
        let found = match other {
            None => self.partial.range(..middle).next(),
            Some(_) => self.partial.range(middle..).next_back(),
        };
        let record = match found {
            Some((record, _)) => *record,
            None => match self.find_record_for_pages(other.is_some()) {
                Some(record) => record,
                // Better near the first copy than not at all.
                None => *self.partial.first_key_value()?.0,
            },
        };
        let index = u64::from((!self.busy.record(record)).trailing_zeros());
        let block = record * RECORD_BLOCKS + index;
        self.take_page(block);
        Some(block)
    }

    /// First copies are put at the beginning of the pool, second ones at its end.
    fn find_record_for_pages(&self, high: bool) -> Option<u64> {
        let mut groups = 0..self.free_in_group.len();
        let has_free = |group: &usize| self.free_in_group[*group] > 0;
        let group = if high {
            groups.rfind(has_free)
        } else {
            groups.find(has_free)
        }? as u64;
        let end = ((group + 1) * GROUP_RECORDS).min(self.record_count);
        let mut records = (group * GROUP_RECORDS).max(self.first_record)..end;
        let is_free = |record: &u64| self.busy.record(*record) == 0;
        if high {
            records.rfind(is_free)
        } else {
            records.find(is_free)
        }
    }

    fn take_page(&mut self, block: u64) {
        self.used.set(block, true);
        self.set_busy(page_extent(block), true);
        self.mark_dirty(block);
    }

    fn update_partial(&mut self, record: u64) {
        let busy = self.busy.record(record);
        let new = (!matches!(busy, 0 | FULL)).then(|| longest_run(busy));
        let old = match new {
            Some(longest) => self.partial.insert(record, longest),
            None => self.partial.remove(&record),
        };
        if old != new {
            if let Some(longest) = old {
                self.runs[longest].remove(&record);
            }
            if let Some(longest) = new {
                self.runs[longest].insert(record);
            }
        }
    }

    /// Frees a record or page for the time after the next checkpoint.
    pub(crate) fn free(&mut self, freed: Freed) {
        match freed {
            Freed::Data(extent) => {
                self.used.fill(extent, false);
                self.data_blocks = self.data_blocks.saturating_sub(extent.block_count);
                self.mark_dirty(extent.first_block);
            }
            Freed::Page(block) => {
                self.used.set(block, false);
                self.mark_dirty(block);
            }
        }
        self.freed.push(freed);
    }

    /// What was freed until now, to be released when the checkpoint is durable.
    pub(crate) fn take_freed(&mut self) -> Vec<Freed> {
        std::mem::take(&mut self.freed)
    }

    /// The checkpoint failed: wait for the next one.
    pub(crate) fn put_freed_back(&mut self, mut freed: Vec<Freed>) {
        freed.append(&mut self.freed);
        self.freed = freed;
    }

    /// What the host gets back now that no checkpoint names what was freed.
    pub(crate) fn punchable(&mut self, freed: &[Freed]) -> Punchable {
        let mut freed_bits: BTreeMap<u64, u16> = BTreeMap::new();
        for freed in freed {
            // The checkpoint before is of use for a repair as long as its pages are there.
            if let Freed::Data(extent) = freed {
                *freed_bits.entry(extent.record()).or_default() |= extent.bits();
            }
        }
        let mut records: BTreeSet<u64> = freed_bits
            .into_iter()
            .filter(|(record, bits)| self.busy.record(*record) == *bits)
            .map(|(record, _)| record)
            .collect();
        let neighbours = self.free_neighbours(&records);
        for record in &neighbours {
            self.set_busy(Extent::of_record(*record), true);
        }
        records.extend(&neighbours);
        let mut runs: Vec<(u64, u64)> = Vec::new();
        for record in records {
            match runs.last_mut() {
                Some((first, count)) if *first + *count == record => *count += 1,
                _ => runs.push((record, 1)),
            }
        }
        runs.retain(|(_, count)| *count >= PUNCHED_RECORDS);
        runs.sort_unstable_by_key(|(_, count)| std::cmp::Reverse(*count));
        runs.truncate(PUNCHED_RUNS);
        Punchable { runs, neighbours }
    }

    /// Free records that make whole groups of [`PUNCHED_RECORDS`] of those that become free.
    fn free_neighbours(&self, freed: &BTreeSet<u64>) -> Vec<u64> {
        let mut groups: Vec<u64> = freed
            .iter()
            .map(|record| record / PUNCHED_RECORDS)
            .collect();
        groups.dedup();
        let is_free =
            |record: &u64| self.contains_record(*record) && self.busy.record(*record) == 0;
        groups
            .into_iter()
            .map(|group| group * PUNCHED_RECORDS..(group + 1) * PUNCHED_RECORDS)
            .filter(|group| {
                group
                    .clone()
                    .all(|record| freed.contains(&record) || is_free(&record))
            })
            .flatten()
            .filter(|record| !freed.contains(record))
            .collect()
    }

    /// What was freed can be given out.
    pub(crate) fn release(&mut self, freed: &[Freed], punched: &Punchable) {
        for record in &punched.neighbours {
            self.give_back(Extent::of_record(*record));
        }
        for freed in freed {
            match *freed {
                Freed::Data(extent) => self.give_back(extent),
                Freed::Page(block) => self.give_back(page_extent(block)),
            }
        }
    }
}
