//! In what two maps differ, and what of it is somewhere else: looked at in memory, data is not read.

use std::collections::HashMap;

use super::frame::Place;
use crate::error::Result;
use crate::layout::{Extent, PagePointer, RECORD_BLOCKS, Tree};
use crate::metadata::{Metadata, span};
use crate::page::{FANOUT, Page, PageKind, SLOTS, Slot};

/// The slots of a leaf, all empty where the map has none.
type Slots = Box<[Slot; SLOTS]>;

/// What the receiver has: which page and which data of the pool is where in it.
#[derive(Default)]
pub(crate) struct Known {
    /// Pages of maps by address: where they are, and their first leaf.
    pages: HashMap<u64, (Place, u64)>,
    /// Data with several references: a place and the number of the record there.
    extents: HashMap<Extent, (Place, u64)>,
}

/// Bits of the blocks of a record for which something is true.
fn bits(is_true: impl Fn(u64) -> bool) -> u16 {
    (0..RECORD_BLOCKS)
        .filter(|block| is_true(*block))
        .fold(0, |bits, block| bits | 1 << block)
}

/// What has to be done to a record of the receiver.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Change {
    pub(crate) record: u64,
    /// It is first made what this one is.
    pub(crate) reference: Option<(Place, u64)>,
    /// Blocks to make zeros.
    pub(crate) holes: u16,
    /// Blocks to send.
    pub(crate) data: u16,
}

impl Metadata {
    /// The page of a level that has a leaf below it; none where that is above the root.
    fn pointer_at(&mut self, tree: Tree, wanted: u8, leaf: u64) -> Result<Option<PagePointer>> {
        if leaf >= span(tree.height) {
            return Ok(Some(PagePointer::default()));
        }
        if wanted > tree.height {
            return Ok(None);
        }
        let mut pointer = tree.root;
        for level in (wanted + 1..=tree.height).rev() {
            if pointer.is_null() {
                break;
            }
            let page = self.page(pointer, PageKind::Map, level)?;
            pointer = page.children()?[(leaf / span(level - 1)) as usize % FANOUT];
        }
        Ok(Some(pointer))
    }

    /// The first leaf from `from` on that is not the same page in both maps.
    pub(crate) fn next_difference(&mut self, a: Tree, b: Tree, from: u64) -> Result<Option<u64>> {
        let height = a.height.max(b.height);
        let mut leaf = from;
        'leaves: while leaf < span(height) {
            for level in (0..=height).rev() {
                let found = (
                    self.pointer_at(a, level, leaf)?,
                    self.pointer_at(b, level, leaf)?,
                );
                if let (Some(a), Some(b)) = found
                    && a == b
                {
                    leaf = (leaf / span(level) + 1) * span(level);
                    continue 'leaves;
                }
            }
            return Ok(Some(leaf));
        }
        Ok(None)
    }

    pub(crate) fn slots_of(&mut self, map: Tree, leaf: u64) -> Result<Slots> {
        Ok(match self.leaf(map, PageKind::Map, leaf)? {
            Some(page) => Box::new(*page.slots()?),
            None => Box::new([Slot::default(); SLOTS]),
        })
    }

    /// Whether two maps have the same blocks.
    pub(crate) fn is_same_content(&mut self, a: Tree, b: Tree) -> Result<bool> {
        let mut from = 0;
        while let Some(leaf) = self.next_difference(a, b, from)? {
            let (a, b) = (self.slots_of(a, leaf)?, self.slots_of(b, leaf)?);
            let differs = |(a, b): (&Slot, &Slot)| {
                (0..RECORD_BLOCKS).any(|block| a.source(block) != b.source(block))
            };
            if a.iter().zip(b.iter()).any(differs) {
                return Ok(false);
            }
            from = leaf + 1;
        }
        Ok(true)
    }

    /// The place with which a map shares most, by its pages.
    pub(crate) fn nearest(&mut self, map: Tree, known: &Known) -> Result<Option<Place>> {
        let mut shared: Vec<(Place, u64)> = Vec::new();
        let mut waiting = vec![(map.root, map.height)];
        while let Some((pointer, level)) = waiting.pop() {
            if pointer.is_null() {
                continue;
            }
            if let Some((place, _)) = known.pages.get(&pointer.address) {
                match shared.iter_mut().find(|(found, _)| found == place) {
                    Some((_, leaf_count)) => *leaf_count += span(level),
                    None => shared.push((*place, span(level))),
                }
            } else if level > 0 {
                let page = self.page(pointer, PageKind::Map, level)?;
                waiting.extend(page.children()?.iter().map(|child| (*child, level - 1)));
            }
        }
        let most = shared.into_iter().max_by_key(|(_, leaf_count)| *leaf_count);
        Ok(most.map(|(place, _)| place))
    }

    /// Remembers what a map has that is not known yet.
    pub(crate) fn learn(&mut self, map: Tree, place: Place, known: &mut Known) -> Result<()> {
        let mut waiting = vec![(map.root, map.height, 0)];
        while let Some((pointer, level, first_leaf)) = waiting.pop() {
            if pointer.is_null() || known.pages.contains_key(&pointer.address) {
                continue;
            }
            known.pages.insert(pointer.address, (place, first_leaf));
            let page = self.page(pointer, PageKind::Map, level)?;
            if let Page::Inner { children, .. } = &*page {
                let children = children.iter().zip(0..);
                waiting.extend(children.map(|(child, index)| {
                    (*child, level - 1, first_leaf + index * span(level - 1))
                }));
                continue;
            }
            for (slot, index) in page.slots()?.iter().zip(0..) {
                for extent in slot.extents() {
                    if self.extra_references(extent) > 0 {
                        let at = first_leaf * SLOTS as u64 + index;
                        known.extents.entry(extent).or_insert((place, at));
                    }
                }
            }
        }
        Ok(())
    }

    /// What has to be done to a leaf of `start` to make it that of `map`, which is at `here`. What becomes known on the way is
    /// remembered.
    pub(crate) fn leaf_changes(
        &mut self,
        (map, start): (Tree, Tree),
        leaf: u64,
        here: Place,
        record_count: u64,
        known: &mut Known,
        map_of: impl Fn(&Self, Place) -> Option<Tree>,
    ) -> Result<Vec<Change>> {
        let (mine, theirs) = (self.slots_of(map, leaf)?, self.slots_of(start, leaf)?);
        let page = self.pointer_at(map, 0, leaf)?.unwrap_or_default();
        let same_page = known.pages.get(&page.address).copied();
        let mut changes = Vec::new();
        for (index, record) in (0..SLOTS).zip(leaf * SLOTS as u64..record_count) {
            let (mine, theirs) = (mine[index], theirs[index]);
            let matches = |other: Slot| {
                bits(|block| {
                    mine.source(block).is_some() && mine.source(block) == other.source(block)
                })
                .count_ones()
            };
            let differs = bits(|block| mine.source(block) != theirs.source(block));
            if differs != 0 {
                let by_page =
                    same_page.map(|(place, leaf)| (place, leaf * SLOTS as u64 + index as u64));
                let by_record = mine
                    .extents()
                    .filter_map(|extent| known.extents.get(&extent).copied());
                let mut best = (matches(theirs), None, theirs);
                for (place, there) in by_page.into_iter().chain(by_record) {
                    let Some(map) = map_of(self, place) else {
                        continue;
                    };
                    let slot = self.slot(map, there)?;
                    if matches(slot) > best.0 && (place, there) != (here, record) {
                        best = (matches(slot), Some((place, there)), slot);
                    }
                }
                let (_, reference, from) = best;
                let differs = |block| mine.source(block) != from.source(block);
                changes.push(Change {
                    record,
                    reference,
                    holes: bits(|block| differs(block) && mine.find(block).is_none()),
                    data: bits(|block| differs(block) && mine.find(block).is_some()),
                });
            }
            for found in mine.extents() {
                if self.extra_references(found) > 0 {
                    known.extents.entry(found).or_insert((here, record));
                }
            }
        }
        Ok(changes)
    }
}
