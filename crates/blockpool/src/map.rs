//! The map of an object: from its records to those of the pool.
//!
//! A map is a tree whose leaves have a slot per record. Everything here changes metadata only; data was written before.

use std::ops::Range;

use crate::error::{PoolError, Result};
use crate::layout::{Extent, PagePointer, RECORD_BLOCKS, Tree};
use crate::metadata::{Metadata, span};
use crate::page::{PageKind, RecordPointer, SLOTS, Slot};

/// Where a record's slot is: leaf, and number in it.
fn position(record_index: u64) -> (u64, usize) {
    (
        record_index / SLOTS as u64,
        (record_index % SLOTS as u64) as usize,
    )
}

/// The bits of the blocks `first..end` of a record.
pub(crate) fn block_bits(first: u64, end: u64) -> u16 {
    (((1u32 << end) - 1) & !((1u32 << first) - 1)) as u16
}

impl Metadata {
    /// The slot of a record.
    pub(crate) fn slot(&mut self, map: Tree, record_index: u64) -> Result<Slot> {
        let (leaf, index) = position(record_index);
        match self.leaf(map, PageKind::Map, leaf)? {
            Some(page) => Ok(page.slots()?[index]),
            None => Ok(Slot::default()),
        }
    }

    /// Replaces a slot: what only the new one names was reserved and is used from now on, what only the old one names loses a reference.
    pub(crate) fn replace_slot(
        &mut self,
        map: &mut Tree,
        record_index: u64,
        slot: Slot,
    ) -> Result<()> {
        let old = self.slot(*map, record_index)?;
        let is_in = |extent: &Extent, slot: Slot| slot.extents().any(|other| other == *extent);
        for extent in slot.extents().filter(|extent| !is_in(extent, old)) {
            if !self.allocator.contains_record(extent.record())
                || self.allocator.is_used_partly(extent)
            {
                return Err(PoolError::Damaged {
                    what: format!("{extent} is given to an object and is not free"),
                });
            }
        }
        self.store_slot(map, record_index, slot)?;
        for extent in slot.extents().filter(|extent| !is_in(extent, old)) {
            self.allocator.take(extent);
            self.forget_sums(extent);
        }
        for extent in old.extents().filter(|extent| !is_in(extent, slot)) {
            self.release_extent(extent);
        }
        Ok(())
    }

    /// Stores a slot; references are the caller's.
    fn store_slot(&mut self, map: &mut Tree, record_index: u64, slot: Slot) -> Result<()> {
        let (leaf, index) = position(record_index);
        let address = self.own_leaf(map, PageKind::Map, leaf)?;
        self.page_mut(address)?.slots_mut()?[index] = slot;
        Ok(())
    }

    /// Takes blocks away: they read as zeros.
    pub(crate) fn punch(
        &mut self,
        map: &mut Tree,
        first_block: u64,
        block_count: u64,
    ) -> Result<()> {
        let end_block = first_block.saturating_add(block_count);
        let mut record_index = first_block / RECORD_BLOCKS;
        let end_record = end_block.div_ceil(RECORD_BLOCKS);
        while record_index < end_record {
            let (leaf, _) = position(record_index);
            let next_leaf_record = (leaf + 1) * SLOTS as u64;
            let Some(page) = self.leaf(*map, PageKind::Map, leaf)? else {
                record_index = self.skip_hole(*map, leaf)?.unwrap_or(end_record);
                continue;
            };
            while record_index < end_record.min(next_leaf_record) {
                let slot = page.slots()?[position(record_index).1];
                let record_block = record_index * RECORD_BLOCKS;
                let first = first_block.saturating_sub(record_block);
                let end = (end_block - record_block).min(RECORD_BLOCKS);
                let bits = block_bits(first, end);
                if slot.map() & bits != 0 {
                    let left = Slot::normal(slot.front.without(bits), slot.back.without(bits));
                    self.replace_slot(map, record_index, left)?;
                }
                record_index += 1;
            }
        }
        Ok(())
    }

    /// The first record of the next leaf behind `leaf` that is there.
    fn skip_hole(&mut self, map: Tree, leaf: u64) -> Result<Option<u64>> {
        let next = self.next_leaf(map, PageKind::Map, leaf + 1)?;
        Ok(next.map(|leaf| leaf * SLOTS as u64))
    }

    /// The first leaf from `from` on.
    pub(crate) fn next_leaf(
        &mut self,
        map: Tree,
        kind: PageKind,
        from: u64,
    ) -> Result<Option<u64>> {
        let mut from = from;
        while from < span(map.height) {
            let mut pointer = map.root;
            let mut level = map.height;
            while level > 0 && !pointer.is_null() {
                let page = self.page(pointer, kind, level)?;
                pointer =
                    page.children()?[(from / span(level - 1)) as usize % page.children()?.len()];
                level -= 1;
            }
            if !pointer.is_null() {
                return Ok(Some(from));
            }
            // Nothing in the whole part that the missing page stands for.
            from = (from / span(level) + 1) * span(level);
        }
        Ok(None)
    }

    /// The first block from `from` on that holds something, or that does not; none behind the last leaf.
    pub(crate) fn next_block(&mut self, map: Tree, from: u64, holds: bool) -> Result<Option<u64>> {
        let leaf_blocks = SLOTS as u64 * RECORD_BLOCKS;
        let mut from = from;
        while let Some(leaf) = self.next_leaf(map, PageKind::Map, from / leaf_blocks)? {
            if leaf * leaf_blocks > from {
                if !holds {
                    return Ok(Some(from));
                }
                from = leaf * leaf_blocks;
            }
            let Some(page) = self.leaf(map, PageKind::Map, leaf)? else {
                break;
            };
            let end = (leaf + 1) * leaf_blocks;
            let slots = page.slots()?;
            let found = (from..end).find(|block| {
                let slot = slots[position(block / RECORD_BLOCKS).1];
                (slot.map() >> (block % RECORD_BLOCKS) & 1 != 0) == holds
            });
            if found.is_some() {
                return Ok(found);
            }
            from = end;
        }
        Ok((!holds).then_some(from))
    }

    /// Drops everything behind `block_count` blocks.
    pub(crate) fn shorten(&mut self, map: &mut Tree, block_count: u64) -> Result<()> {
        let record_end = block_count.div_ceil(RECORD_BLOCKS);
        let first_whole_leaf = record_end.div_ceil(SLOTS as u64);
        self.cut(&mut map.root, PageKind::Map, map.height, first_whole_leaf)?;
        let left_end = first_whole_leaf * SLOTS as u64 * RECORD_BLOCKS;
        self.punch(map, block_count, left_end - block_count)?;
        if map.root.is_null() {
            map.height = 0;
        }
        Ok(())
    }

    /// Lets a map have the leaves `leaves` of another: the highest pages that hold nothing else are shared. What the map had
    /// there is freed later.
    pub(crate) fn share_leaves(
        &mut self,
        map: &mut Tree,
        source: Tree,
        leaves: &Range<u64>,
    ) -> Result<()> {
        if leaves.is_empty() {
            return Ok(());
        }
        if leaves.start == 0 && leaves.end >= span(map.height.max(source.height)) {
            let old = *map;
            if !source.root.is_null() {
                self.pages.add(source.root.address)?;
            }
            *map = source;
            self.bury(old);
            return Ok(());
        }
        let end = leaves.end.min(span(source.height));
        if leaves.start < end {
            self.raise(map, PageKind::Map, end - 1)?;
        }
        let mut source = source;
        while source.height > map.height && !source.root.is_null() {
            source = self.child_of(source, source.height, 0)?;
        }
        // What is behind the map's last leaf is empty in the source too.
        let leaves = leaves.start..leaves.end.min(span(map.height));
        self.share_below(&mut map.root, map.height, source, leaves)
    }

    /// The part of it below one page, which the source is not higher than.
    fn share_below(
        &mut self,
        pointer: &mut PagePointer,
        level: u8,
        source: Tree,
        leaves: Range<u64>,
    ) -> Result<()> {
        let is_whole = leaves == (0..span(level));
        if leaves.is_empty() || (source.root.is_null() && pointer.is_null()) {
            return Ok(());
        }
        if is_whole && (source.height == level || source.root.is_null()) {
            if source.root == *pointer {
                return Ok(());
            }
            if !source.root.is_null() {
                self.pages.add(source.root.address)?;
            }
            let root = std::mem::replace(pointer, source.root);
            self.bury(Tree {
                root,
                height: level,
            });
            return Ok(());
        }
        *pointer = self.own(*pointer, PageKind::Map, level)?;
        let below = span(level - 1);
        for index in leaves.start / below..=(leaves.end - 1) / below {
            let source = self.child_of(source, level, index)?;
            let begin = index * below;
            let part = leaves.start.saturating_sub(begin)..(leaves.end - begin).min(below);
            self.change_child(*pointer, index as usize, |metadata, child| {
                metadata.share_below(child, level - 1, source, part)
            })?;
        }
        Ok(())
    }

    /// What a tree of at most that height has below child `index` of a page of `level`.
    fn child_of(&mut self, tree: Tree, level: u8, index: u64) -> Result<Tree> {
        if !tree.root.is_null() && tree.height == level {
            let page = self.page(tree.root, PageKind::Map, level)?;
            return Ok(Tree {
                root: page.children()?[index as usize],
                height: level - 1,
            });
        }
        // A lower one stands where the first leaf is.
        Ok(if index == 0 { tree } else { Tree::default() })
    }

    /// Lets `count` records of one of the maps, from the first number on, and of another or the same have the same data.
    ///
    /// The pointers of both are marked, so that neither is overwritten in place again. Those of a snapshot need no mark.
    pub(crate) fn share_records(
        &mut self,
        maps: &mut [Tree],
        (source, source_first): (usize, u64),
        (target, target_first): (usize, u64),
        count: u64,
        is_snapshot: bool,
    ) -> Result<()> {
        let epoch = self.epoch;
        for offset in 0..count {
            let slot = self.slot(maps[source], source_first + offset)?;
            let old = self.slot(maps[target], target_first + offset)?;
            if slot.is_null() && old.is_null() {
                continue;
            }
            let marked = |pointer: RecordPointer| RecordPointer {
                is_shared: !pointer.is_null(),
                ..pointer
            };
            let kept = Slot {
                front: marked(slot.front),
                back: marked(slot.back),
            };
            if kept != slot && !is_snapshot {
                self.store_slot(&mut maps[source], source_first + offset, kept)?;
            }
            for extent in slot.extents() {
                self.add_reference(extent)?;
            }
            let born = |pointer: RecordPointer| RecordPointer {
                birth: if pointer.is_null() { 0 } else { epoch },
                ..pointer
            };
            let placed = Slot {
                front: born(kept.front),
                back: born(kept.back),
            };
            self.store_slot(&mut maps[target], target_first + offset, placed)?;
            for extent in old.extents() {
                self.release_extent(extent);
            }
        }
        Ok(())
    }
}
