//! Does an operation to the metadata: for the first time, or again when the log is replayed.
//!
//! What can be refused is refused before anything changed. An operation from a log may be anything; it fails with an error then.

use std::ops::Range;

use crate::catalog::{Entry, EntryKind, Origin, are_options, check_name};
use crate::error::{PoolError, Result};
use crate::layout::{BLOCK_BYTES, OBJECT_MAX_BYTES, RECORD_BLOCKS, RECORD_BYTES, Tree};
use crate::metadata::Metadata;
use crate::operation::Operation;
use crate::page::{FANOUT, PageKind, SLOTS, Slot};
use crate::sums::Row;

/// Pages that a change of one leaf may take: the path to it, two copies each, and a higher root.
const PATH_PAGES: u64 = 16;

impl Metadata {
    /// Does one operation.
    pub(crate) fn apply(&mut self, operation: &Operation) -> Result<()> {
        match operation {
            Operation::Create {
                id,
                kind,
                parent,
                size_bytes,
                unix_s,
                name,
            } => {
                if !matches!(kind, EntryKind::Dataset | EntryKind::Object) {
                    return Err(damaged("something is made that cannot be made"));
                }
                let entry = self.new_entry(*id, *kind, *parent, *unix_s, name)?;
                self.insert_entry(Entry {
                    size_bytes: *size_bytes,
                    ..entry
                })
            }
            Operation::Resize { id, size_bytes } => self.resize(*id, *size_bytes),
            Operation::Slot {
                id,
                record_index,
                slot,
            } => self.set_slot(*id, *record_index, *slot),
            Operation::Punch {
                id,
                first_block,
                block_count,
            } => self.punch_object(*id, *first_block, *block_count),
            Operation::CloneRange {
                source,
                source_first,
                target,
                target_first,
                record_count,
            } => self.clone_range(
                [*source, *source_first],
                [*target, *target_first],
                *record_count,
            ),
            Operation::Clone {
                source,
                id,
                kind,
                parent,
                unix_s,
                name,
            } => {
                if !matches!(kind, EntryKind::Snapshot | EntryKind::Object) {
                    return Err(damaged("something is cloned that cannot be cloned"));
                }
                let entry = self.new_entry(*id, *kind, *parent, *unix_s, name)?;
                self.clone_object(*source, entry)
            }
            Operation::Rollback { object, snapshot } => self.rollback(*object, *snapshot),
            Operation::Remove { id } => self.remove(*id),
            Operation::Rename { id, parent, name } => self.rename(*id, *parent, name),
            Operation::Options { id, options } => self.set_options(*id, *options),
            Operation::Sums { record, map, sums } => self.set_sums(*record, *map, sums),
            Operation::Origin { id, origin } => self.set_origin(*id, *origin),
            Operation::CloneAligned {
                source,
                target,
                first,
                record_count,
            } => self.clone_aligned(*source, *target, *first, *record_count),
        }
    }

    /// The entry of something that has a map.
    pub(crate) fn entry(&self, id: u64) -> Result<&Entry> {
        match self.catalog.get(id) {
            Some(entry) if entry.kind != EntryKind::Dying => Ok(entry),
            _ => Err(PoolError::NotFound {
                name: format!("object {id}"),
            }),
        }
    }

    fn object(&self, id: u64) -> Result<&Entry> {
        let entry = self.entry(id)?;
        match entry.kind {
            EntryKind::Object => Ok(entry),
            _ => Err(PoolError::ReadOnly {
                name: self.catalog.full_name(entry),
            }),
        }
    }

    fn new_entry(
        &self,
        id: u64,
        kind: EntryKind,
        parent: u64,
        unix_s: i64,
        name: &str,
    ) -> Result<Entry> {
        check_name(name)?;
        if id < self.next_id || id >= 1 << 48 {
            return Err(damaged("an id is given out twice"));
        }
        self.check_place(kind, parent, name)?;
        self.need_pages(PATH_PAGES)?;
        Ok(Entry {
            id,
            kind,
            parent,
            name: name.to_owned(),
            size_bytes: 0,
            map: Tree::default(),
            share_epoch: 0,
            created_epoch: self.epoch,
            created_unix_s: unix_s,
            options: 0,
            origin: Origin::default(),
        })
    }

    /// Whether an entry of that kind can have this name there.
    fn check_place(&self, kind: EntryKind, parent: u64, name: &str) -> Result<()> {
        let wanted = match kind {
            EntryKind::Object => Some(EntryKind::Dataset),
            EntryKind::Snapshot => Some(EntryKind::Object),
            _ => None,
        };
        if self.catalog.get(parent).map(|parent| parent.kind) != wanted {
            return Err(damaged("something is put where it cannot be"));
        }
        match self.catalog.find(parent, name) {
            Some(found) => Err(PoolError::Exists {
                name: self.catalog.full_name(found),
            }),
            None => Ok(()),
        }
    }

    fn insert_entry(&mut self, entry: Entry) -> Result<()> {
        if entry.size_bytes > OBJECT_MAX_BYTES {
            return Err(too_large(entry.size_bytes));
        }
        self.next_id = entry.id + 1;
        self.catalog.insert(entry);
        Ok(())
    }

    fn store_map(&mut self, id: u64, map: Tree) {
        // An entry whose map did not move is not written again.
        if self.catalog.get(id).is_some_and(|entry| entry.map == map) {
            return;
        }
        if let Some(entry) = self.catalog.get_mut(id) {
            entry.map = map;
        }
    }

    fn resize(&mut self, id: u64, size_bytes: u64) -> Result<()> {
        if size_bytes > OBJECT_MAX_BYTES {
            return Err(too_large(size_bytes));
        }
        let object = self.object(id)?;
        let (old_bytes, mut map) = (object.size_bytes, object.map);
        self.need_pages(2 * PATH_PAGES)?;
        if size_bytes < old_bytes {
            let result = self.shorten(&mut map, size_bytes.div_ceil(BLOCK_BYTES));
            self.store_map(id, map);
            result?;
        }
        if let Some(entry) = self.catalog.get_mut(id) {
            entry.size_bytes = size_bytes;
        }
        Ok(())
    }

    fn set_slot(&mut self, id: u64, record_index: u64, slot: Slot) -> Result<()> {
        let object = self.object(id)?;
        let mut map = object.map;
        if record_index >= object.size_bytes.div_ceil(RECORD_BYTES) {
            return Err(damaged("a slot is behind the end of its object"));
        }
        self.need_pages(PATH_PAGES)?;
        let result = self.replace_slot(&mut map, record_index, slot);
        self.store_map(id, map);
        result
    }

    fn punch_object(&mut self, id: u64, first_block: u64, block_count: u64) -> Result<()> {
        let object = self.object(id)?;
        let mut map = object.map;
        let end = first_block.checked_add(block_count);
        if end.is_none_or(|end| end > OBJECT_MAX_BYTES / BLOCK_BYTES) {
            return Err(damaged("a hole is behind the end of its object"));
        }
        let leaves = self.leaves_of(
            map,
            first_block / RECORD_BLOCKS,
            block_count.div_ceil(RECORD_BLOCKS),
        )?;
        self.need_pages(PATH_PAGES + 3 * leaves)?;
        let result = self.punch(&mut map, first_block, block_count);
        self.store_map(id, map);
        result
    }

    /// How many leaves a map has in that range of records.
    fn leaves_of(&mut self, map: Tree, first: u64, count: u64) -> Result<u64> {
        let end = first.saturating_add(count).div_ceil(SLOTS as u64);
        let mut leaf_count = 0;
        let mut from = first / SLOTS as u64;
        while let Some(leaf) = self
            .next_leaf(map, PageKind::Map, from)?
            .filter(|leaf| *leaf <= end)
        {
            leaf_count += 1;
            from = leaf + 1;
        }
        Ok(leaf_count)
    }

    fn clone_range(&mut self, source: [u64; 2], target: [u64; 2], count: u64) -> Result<()> {
        let source_entry = self.entry(source[0])?.clone();
        let target_entry = self.object(target[0])?.clone();
        let fits = |entry: &Entry, first: u64| {
            let end = first.checked_add(count);
            end.is_some_and(|end| end <= entry.size_bytes.div_ceil(RECORD_BYTES))
        };
        let is_same = source[0] == target[0];
        if !fits(&source_entry, source[1]) || !fits(&target_entry, target[1]) {
            return Err(damaged("a cloned range is behind the end of its object"));
        }
        if is_same && source[1].abs_diff(target[1]) < count {
            return Err(PoolError::Range {
                reason: "source and target overlap",
            });
        }
        let leaves = count / SLOTS as u64 + 2;
        self.need_pages(2 * (PATH_PAGES + 3 * leaves))?;
        let is_snapshot = source_entry.kind == EntryKind::Snapshot;
        let mut maps = [target_entry.map, source_entry.map];
        let source_map = usize::from(!is_same);
        let result = self.share_records(
            &mut maps,
            (source_map, source[1]),
            (0, target[1]),
            count,
            is_snapshot,
        );
        self.store_map(target[0], maps[0]);
        if !is_same {
            self.store_map(source[0], maps[1]);
        }
        result
    }

    /// Whole leaves of the maps are shared as pages, what is before and behind them as records.
    fn clone_aligned(&mut self, source: u64, target: u64, first: u64, count: u64) -> Result<()> {
        if source == target {
            return Err(PoolError::Range {
                reason: "source and target overlap",
            });
        }
        let (from, to) = (self.entry(source)?.clone(), self.object(target)?.clone());
        let range = AlignedRange::new(&from, &to, first, count)
            .ok_or_else(|| damaged("a cloned range is behind the end of its object"))?;
        self.need_pages(4 * (PATH_PAGES + 6) + 3 * range.pointer_count(from.map, to.map))?;
        let mut maps = [to.map, from.map];
        let is_snapshot = from.kind == EntryKind::Snapshot;
        let mut result = Ok(());
        for (first, count) in range.odd_records() {
            result = result.and_then(|()| {
                self.share_records(&mut maps, (1, first), (0, first), count, is_snapshot)
            });
        }
        let result = result.and_then(|()| {
            let [to, from] = &mut maps;
            self.share_leaves(to, *from, &range.leaves)
        });
        let share_epoch = self.begin_epoch();
        for (id, map) in [(target, maps[0]), (source, maps[1])] {
            self.store_map(id, map);
            if let Some(entry) = self.catalog.get_mut(id) {
                entry.share_epoch = share_epoch;
            }
        }
        result
    }

    fn clone_object(&mut self, source: u64, entry: Entry) -> Result<()> {
        let (size_bytes, map) = {
            let source = self.entry(source)?;
            if source.kind == EntryKind::Dataset {
                return Err(damaged("a dataset is cloned as an object"));
            }
            (source.size_bytes, source.map)
        };
        if !map.root.is_null() {
            self.pages.add(map.root.address)?;
        }
        let share_epoch = self.begin_epoch();
        if let Some(source) = self.catalog.get_mut(source) {
            source.share_epoch = share_epoch;
        }
        self.insert_entry(Entry {
            size_bytes,
            map,
            share_epoch,
            ..entry
        })
    }

    /// Ends the epoch: what was born until now may be shared from now on.
    fn begin_epoch(&mut self) -> u64 {
        self.epoch += 1;
        self.epoch - 1
    }

    fn rollback(&mut self, object: u64, snapshot: u64) -> Result<()> {
        let old = self.object(object)?.map;
        let source = self.entry(snapshot)?;
        if source.kind != EntryKind::Snapshot || source.parent != object {
            return Err(damaged(
                "an object is rolled back to what is not its snapshot",
            ));
        }
        let (size_bytes, map) = (source.size_bytes, source.map);
        self.need_pages(PATH_PAGES)?;
        if !map.root.is_null() {
            self.pages.add(map.root.address)?;
        }
        let share_epoch = self.begin_epoch();
        for id in [object, snapshot] {
            if let Some(entry) = self.catalog.get_mut(id) {
                entry.share_epoch = share_epoch;
            }
        }
        if let Some(entry) = self.catalog.get_mut(object) {
            entry.map = map;
            entry.size_bytes = size_bytes;
        }
        self.bury(old);
        Ok(())
    }

    /// Keeps a map that nobody uses any more until its pages and records are freed, step by step.
    pub(crate) fn bury(&mut self, map: Tree) {
        if map.root.is_null() {
            return;
        }
        let id = self.next_id;
        self.next_id += 1;
        self.catalog.insert(Entry {
            id,
            kind: EntryKind::Dying,
            parent: 0,
            name: String::new(),
            size_bytes: 0,
            map,
            share_epoch: self.epoch,
            created_epoch: self.epoch,
            created_unix_s: 0,
            options: 0,
            origin: Origin::default(),
        });
    }

    fn remove(&mut self, id: u64) -> Result<()> {
        let entry = self.entry(id)?;
        if self.catalog.children(id).next().is_some() {
            return Err(PoolError::HasDependents {
                name: self.catalog.full_name(entry),
                what: match entry.kind {
                    EntryKind::Dataset => "objects",
                    _ => "snapshots",
                },
            });
        }
        if let Some(entry) = self.catalog.remove(id) {
            self.bury(entry.map);
        }
        Ok(())
    }

    fn rename(&mut self, id: u64, parent: u64, name: &str) -> Result<()> {
        check_name(name)?;
        let kind = self.entry(id)?.kind;
        self.check_place(kind, parent, name)?;
        if let Some(entry) = self.catalog.remove(id) {
            self.catalog.insert(Entry {
                parent,
                name: name.to_owned(),
                ..entry
            });
        }
        Ok(())
    }

    fn set_options(&mut self, id: u64, options: u8) -> Result<()> {
        if self.entry(id)?.kind != EntryKind::Dataset || !are_options(options) {
            return Err(damaged("something gets options that it cannot have"));
        }
        if let Some(entry) = self.catalog.get_mut(id) {
            entry.options = options;
        }
        Ok(())
    }

    fn set_sums(&mut self, record: u64, map: u16, sums: &[u32]) -> Result<()> {
        let is_used = |block: u64| self.allocator.is_used(record * RECORD_BLOCKS + block);
        let mut named = (0..RECORD_BLOCKS).filter(|block| map >> block & 1 != 0);
        if !self.allocator.contains_record(record) || !named.all(is_used) {
            return Err(damaged("there are checksums of what holds no data"));
        }
        let mut row = Row::default();
        let blocks = (0..row.len()).filter(|block| map >> block & 1 != 0);
        for (block, sum) in blocks.zip(sums) {
            row[block] = *sum;
        }
        self.add_sums(record, &row);
        Ok(())
    }

    fn set_origin(&mut self, id: u64, origin: Origin) -> Result<()> {
        if self.entry(id)?.kind != EntryKind::Snapshot {
            return Err(damaged("something gets an origin that is no snapshot"));
        }
        if let Some(entry) = self.catalog.get_mut(id) {
            entry.origin = origin;
        }
        Ok(())
    }

    /// Frees up to `budget` leaves of what was removed; false when nothing is left to do.
    pub(crate) fn reap_some(&mut self, mut budget: u64) -> Result<bool> {
        while budget > 0 {
            let Some(id) = self.catalog.first_dying() else {
                return Ok(false);
            };
            let Some(mut map) = self.catalog.get(id).map(|entry| entry.map) else {
                return Ok(false);
            };
            self.need_pages(PATH_PAGES)?;
            let result = self.reap(&mut map.root, PageKind::Map, map.height, &mut budget);
            if map.root.is_null() {
                self.catalog.remove(id);
            } else {
                self.store_map(id, map);
            }
            result?;
        }
        Ok(self.catalog.first_dying().is_some())
    }
}

/// A range of records at the same place of two objects.
pub(crate) struct AlignedRange {
    first: u64,
    end: u64,
    /// Leaves of which nothing else is seen in either object; none where the end is not behind the beginning.
    pub(crate) leaves: Range<u64>,
}

impl AlignedRange {
    /// None where it is not inside both objects.
    pub(crate) fn new(source: &Entry, target: &Entry, first: u64, count: u64) -> Option<Self> {
        let end = first.checked_add(count)?;
        let record_counts = [source, target].map(|entry| entry.size_bytes.div_ceil(RECORD_BYTES));
        if record_counts.iter().any(|record_count| end > *record_count) {
            return None;
        }
        let leaf_begin = first.div_ceil(SLOTS as u64);
        let leaf_end = match record_counts {
            [a, b] if a == end && b == end && leaf_begin * (SLOTS as u64) < end => u64::MAX,
            _ => end / SLOTS as u64,
        };
        let leaves = leaf_begin..leaf_end;
        Some(Self { first, end, leaves })
    }

    /// First record and count of what is not in whole leaves.
    fn odd_records(&self) -> impl Iterator<Item = (u64, u64)> {
        let slots = SLOTS as u64;
        let (begin, end) = match self.leaves.is_empty() {
            true => (self.end, self.end),
            false => (
                self.leaves.start * slots,
                self.leaves.end.saturating_mul(slots),
            ),
        };
        [(self.first, begin.min(self.end)), (end, self.end)]
            .into_iter()
            .filter(|(first, end)| first < end)
            .map(|(first, end)| (first, end - first))
    }

    /// How many pages are shared at most: on each level fewer than two inner pages have.
    fn pointer_count(&self, a: Tree, b: Tree) -> u64 {
        if self.leaves == (0..u64::MAX) {
            return 1;
        }
        let height = u64::from(a.height.max(b.height));
        let leaf_count = self.end.div_ceil(SLOTS as u64) - self.first / SLOTS as u64;
        leaf_count.min(1 + 2 * FANOUT as u64 * height)
    }
}

fn damaged(what: &str) -> PoolError {
    PoolError::Damaged {
        what: format!("in its log, {what}"),
    }
}

fn too_large(size_bytes: u64) -> PoolError {
    PoolError::Size {
        what: "an object",
        size_bytes,
        min_bytes: 0,
        max_bytes: OBJECT_MAX_BYTES,
    }
}
