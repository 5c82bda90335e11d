//! The metadata of a pool in memory, and the trees of pages that it is kept in.
//!
//! One lock guards all of it (`pool`). What a page is for is not known here but for its references: a page that several
//! trees name is copied before it is changed, which is what makes a clone of any size one added reference.

use std::collections::HashMap;
use std::sync::Arc;

use crate::allocator::{Allocator, Freed};
use crate::catalog::Catalog;
use crate::disk::Disk;
use crate::error::{PoolError, Result};
use crate::layout::{
    BLOCK, BLOCK_BYTES, Extent, PagePointer, RECORD_BLOCKS, TREE_COUNT, TREE_MAX_HEIGHT, Tree,
    TreeName,
};
use crate::page::{FANOUT, PAYLOAD, Page, PageKind};
use crate::references::References;
use crate::sums::Sums;

/// A page of which one copy is damaged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct BadCopy {
    pub(crate) pointer: PagePointer,
    /// Address of the damaged copy.
    pub(crate) address: u64,
    pub(crate) leaf_kind: PageKind,
    pub(crate) level: u8,
}

/// See the module.
pub(crate) struct Metadata {
    pub(crate) disk: Arc<dyn Disk>,
    pub(crate) pool_id: [u8; 16],
    /// Of the checkpoint that is being gathered.
    pub(crate) txg: u64,
    pub(crate) epoch: u64,
    pub(crate) size_blocks: u64,
    pub(crate) log_records: u64,
    pub(crate) next_id: u64,
    pub(crate) allocator: Allocator,
    pub(crate) records: References,
    pub(crate) pages: References,
    pub(crate) catalog: Catalog,
    pub(crate) sums: Sums,
    pub(crate) trees: [Tree; TREE_COUNT],
    pub(crate) cache: HashMap<u64, Arc<Page>>,
    /// Pages that the next checkpoint writes, by address: they may be changed in memory.
    pub(crate) dirty: HashMap<u64, PagePointer>,
    pub(crate) bad_copies: Vec<BadCopy>,
    /// Something was dropped that could not be read, or was free already: a recount is needed.
    pub(crate) has_wrong_counts: bool,
    /// The log is being done again.
    pub(crate) is_replaying: bool,
}

/// How many leaves an inner page of that level, or a leaf, stands for.
pub(crate) fn span(level: u8) -> u64 {
    (FANOUT as u64).pow(u32::from(level))
}

/// Whether pages of a tree are kept twice: those that do not follow from others.
fn is_kept_twice(leaf_kind: PageKind) -> bool {
    matches!(
        leaf_kind,
        PageKind::Map | PageKind::Entries | PageKind::Sums
    )
}

impl Metadata {
    /// The page at `pointer`, from memory or from the disk.
    pub(crate) fn page(
        &mut self,
        pointer: PagePointer,
        leaf_kind: PageKind,
        level: u8,
    ) -> Result<Arc<Page>> {
        if let Some(page) = self.cache.get(&pointer.address) {
            if page_level(page) == level {
                return Ok(Arc::clone(page));
            }
            return Err(damaged_page(pointer, "it is used at two levels"));
        }
        let page = Arc::new(self.read_page(pointer, leaf_kind, level)?);
        self.cache.insert(pointer.address, Arc::clone(&page));
        Ok(page)
    }

    fn read_page(&mut self, pointer: PagePointer, leaf_kind: PageKind, level: u8) -> Result<Page> {
        let mut failure = None;
        for address in [pointer.address, pointer.second] {
            if address == 0 {
                continue;
            }
            match self.read_copy(pointer, address, leaf_kind, level) {
                Ok(page) => {
                    if failure.is_some() {
                        let address = pointer.address;
                        self.bad_copies.push(BadCopy {
                            pointer,
                            address,
                            leaf_kind,
                            level,
                        });
                    }
                    return Ok(page);
                }
                Err(error) => failure = failure.or(Some(error)),
            }
        }
        Err(failure.unwrap_or_else(|| damaged_page(pointer, "it has no address")))
    }

    /// Reads one of the two copies of a page.
    pub(crate) fn read_copy(
        &self,
        pointer: PagePointer,
        address: u64,
        leaf_kind: PageKind,
        level: u8,
    ) -> Result<Page> {
        if !self.allocator.contains_block(address) {
            return Err(damaged_page(pointer, "it is not inside the pool"));
        }
        let mut bytes = vec![0; BLOCK];
        self.disk
            .read_at(&mut bytes, address * BLOCK_BYTES)
            .map_err(PoolError::io("read a page of metadata"))?;
        Page::decode(&bytes, pointer, &self.pool_id, leaf_kind, level)
            .map_err(|reason| damaged_page(pointer, reason))
    }

    fn insert_page(&mut self, page: Arc<Page>, leaf_kind: PageKind) -> Result<PagePointer> {
        let address = self.allocator.allocate_page(None).ok_or(PoolError::Full)?;
        let second = match is_kept_twice(leaf_kind) {
            true => self
                .allocator
                .allocate_page(Some(address))
                .ok_or(PoolError::Full)?,
            false => 0,
        };
        let pointer = PagePointer {
            address,
            second,
            birth: self.epoch,
        };
        self.cache.insert(address, page);
        self.dirty.insert(address, pointer);
        Ok(pointer)
    }

    /// Makes a page changeable: one that others name too is copied, one that a checkpoint names moves.
    pub(crate) fn own(
        &mut self,
        pointer: PagePointer,
        leaf_kind: PageKind,
        level: u8,
    ) -> Result<PagePointer> {
        if pointer.is_null() {
            return self.insert_page(Arc::new(Page::empty(leaf_kind, level)), leaf_kind);
        }
        let is_shared = self.pages.extra(pointer.address) > 0;
        if !is_shared && let Some(dirty) = self.dirty.get_mut(&pointer.address) {
            dirty.birth = self.epoch;
            return Ok(*dirty);
        }
        let page = self.page(pointer, leaf_kind, level)?;
        if is_shared {
            self.add_references(&page)?;
            self.pages.drop_one(pointer.address);
        } else {
            self.free_page(pointer);
        }
        self.insert_page(page, leaf_kind)
    }

    /// Another page names everything that `page` names.
    fn add_references(&mut self, page: &Page) -> Result<()> {
        match page {
            Page::Inner { children, .. } => {
                for child in children.iter().filter(|child| !child.is_null()) {
                    self.pages.add(child.address)?;
                }
            }
            Page::Map(slots) => {
                for extent in slots.iter().flat_map(|slot| slot.extents()) {
                    self.add_reference(extent)?;
                }
            }
            Page::Raw { .. } => {}
        }
        Ok(())
    }

    fn free_page(&mut self, pointer: PagePointer) {
        for address in [pointer.address, pointer.second] {
            if address == 0 {
                continue;
            }
            if self.allocator.contains_block(address) && self.allocator.is_used(address) {
                self.allocator.free(Freed::Page(address));
            } else {
                self.has_wrong_counts = true;
            }
        }
        self.cache.remove(&pointer.address);
        self.dirty.remove(&pointer.address);
    }

    /// The counts that have an extent's, and its number in them.
    pub(crate) fn counts_of(&mut self, extent: Extent) -> (&mut References, u64) {
        match extent.is_record() {
            true => (&mut self.records, extent.record()),
            false => (&mut self.pages, extent.first_block),
        }
    }

    /// Adds one reference to data.
    pub(crate) fn add_reference(&mut self, extent: Extent) -> Result<()> {
        let (counts, number) = self.counts_of(extent);
        counts.add(number)
    }

    /// References to data beyond the first.
    pub(crate) fn extra_references(&self, extent: Extent) -> u32 {
        match extent.is_record() {
            true => self.records.extra(extent.record()),
            false => self.pages.extra(extent.first_block),
        }
    }

    /// Drops one reference to data.
    pub(crate) fn release_extent(&mut self, extent: Extent) {
        let (counts, number) = self.counts_of(extent);
        if counts.drop_one(number) {
            return;
        }
        if self.allocator.is_used_extent(extent) {
            self.allocator.free(Freed::Data(extent));
        } else {
            self.has_wrong_counts = true;
        }
    }

    /// Drops one reference to a page, and with the last one those to all that it names. A page that cannot be read must
    /// not keep the rest from being freed: what it named is left for a recount to find.
    pub(crate) fn release(&mut self, pointer: PagePointer, leaf_kind: PageKind, level: u8) {
        if pointer.is_null() || self.pages.drop_one(pointer.address) {
            return;
        }
        match self.page(pointer, leaf_kind, level).as_deref() {
            Ok(Page::Inner { children, .. }) => {
                for child in children.iter() {
                    self.release(*child, leaf_kind, level - 1);
                }
            }
            Ok(Page::Map(slots)) => {
                for extent in slots.iter().flat_map(|slot| slot.extents()) {
                    self.release_extent(extent);
                }
            }
            Ok(Page::Raw { .. }) => {}
            // A leaf of sums names nothing.
            Err(_) => self.has_wrong_counts |= leaf_kind != PageKind::Sums || level > 0,
        }
        self.free_page(pointer);
    }

    /// The page at an address that [`Self::own`] returned.
    pub(crate) fn page_mut(&mut self, address: u64) -> Result<&mut Page> {
        debug_assert!(self.dirty.contains_key(&address), "only owned pages change");
        match self.cache.get_mut(&address) {
            Some(page) => Ok(Arc::make_mut(page)),
            None => Err(PoolError::Damaged {
                what: format!("the page at block {address} is not in memory"),
            }),
        }
    }

    /// A leaf; none where the tree has none.
    pub(crate) fn leaf(
        &mut self,
        tree: Tree,
        leaf_kind: PageKind,
        leaf: u64,
    ) -> Result<Option<Arc<Page>>> {
        if leaf >= span(tree.height) {
            return Ok(None);
        }
        let mut pointer = tree.root;
        for level in (1..=tree.height).rev() {
            if pointer.is_null() {
                return Ok(None);
            }
            let page = self.page(pointer, leaf_kind, level)?;
            pointer = page.children()?[(leaf / span(level - 1)) as usize % FANOUT];
        }
        if pointer.is_null() {
            return Ok(None);
        }
        self.page(pointer, leaf_kind, 0).map(Some)
    }

    /// Makes a leaf, or makes it changeable, and returns its address.
    pub(crate) fn own_leaf(
        &mut self,
        tree: &mut Tree,
        leaf_kind: PageKind,
        leaf: u64,
    ) -> Result<u64> {
        self.raise(tree, leaf_kind, leaf)?;
        tree.root = self.own(tree.root, leaf_kind, tree.height)?;
        let mut address = tree.root.address;
        for level in (1..=tree.height).rev() {
            let index = (leaf / span(level - 1)) as usize % FANOUT;
            let child = self.page_mut(address)?.children()?[index];
            let owned = self.own(child, leaf_kind, level - 1)?;
            if owned != child {
                self.page_mut(address)?.children_mut()?[index] = owned;
            }
            address = owned.address;
        }
        Ok(address)
    }

    /// Makes the tree high enough to have that leaf.
    pub(crate) fn raise(&mut self, tree: &mut Tree, leaf_kind: PageKind, leaf: u64) -> Result<()> {
        while leaf >= span(tree.height) {
            if tree.height == TREE_MAX_HEIGHT {
                return Err(PoolError::Damaged {
                    what: format!("leaf {leaf} is beyond what a tree can have"),
                });
            }
            if !tree.root.is_null() {
                let root = self.own(PagePointer::default(), leaf_kind, tree.height + 1)?;
                self.page_mut(root.address)?.children_mut()?[0] = tree.root;
                tree.root = root;
            }
            tree.height += 1;
        }
        Ok(())
    }

    /// Replaces the payload of a leaf; none takes the leaf away.
    pub(crate) fn set_leaf(
        &mut self,
        name: TreeName,
        leaf: u64,
        payload: Option<Box<[u8; PAYLOAD]>>,
    ) -> Result<()> {
        let kind = leaf_kind(name);
        let mut tree = self.trees[name as usize];
        let result = match payload {
            Some(payload) => self
                .own_leaf(&mut tree, kind, leaf)
                .and_then(|address| self.page_mut(address))
                .map(|page| *page = Page::Raw { kind, payload }),
            None if leaf < span(tree.height) => {
                self.clear_leaf(&mut tree.root, kind, tree.height, leaf)
            }
            None => Ok(()),
        };
        self.trees[name as usize] = tree;
        result
    }

    fn clear_leaf(
        &mut self,
        pointer: &mut PagePointer,
        kind: PageKind,
        level: u8,
        leaf: u64,
    ) -> Result<()> {
        if pointer.is_null() || level == 0 {
            self.release(*pointer, kind, level);
            *pointer = PagePointer::default();
            return Ok(());
        }
        *pointer = self.own(*pointer, kind, level)?;
        let index = (leaf / span(level - 1)) as usize % FANOUT;
        self.change_child(*pointer, index, |metadata, child| {
            metadata.clear_leaf(child, kind, level - 1, leaf)
        })?;
        let page = self.page_mut(pointer.address)?;
        if page.children()?.iter().all(|child| child.is_null()) {
            self.free_page(*pointer);
            *pointer = PagePointer::default();
        }
        Ok(())
    }

    /// Changes one child of an owned page; what `change` made of it is kept whether it failed or not.
    pub(crate) fn change_child(
        &mut self,
        parent: PagePointer,
        index: usize,
        change: impl FnOnce(&mut Self, &mut PagePointer) -> Result<()>,
    ) -> Result<PagePointer> {
        let mut child = self.page_mut(parent.address)?.children()?[index];
        let result = change(self, &mut child);
        self.page_mut(parent.address)?.children_mut()?[index] = child;
        result.map(|()| child)
    }

    /// Drops all leaves from `first_leaf` of the tree below `pointer` on.
    pub(crate) fn cut(
        &mut self,
        pointer: &mut PagePointer,
        kind: PageKind,
        level: u8,
        first_leaf: u64,
    ) -> Result<()> {
        if pointer.is_null() || first_leaf >= span(level) {
            return Ok(());
        }
        if first_leaf == 0 {
            self.release(*pointer, kind, level);
            *pointer = PagePointer::default();
            return Ok(());
        }
        let first_child = (first_leaf / span(level - 1)) as usize;
        let page = self.page(*pointer, kind, level)?;
        if page.children()?[first_child..]
            .iter()
            .all(|child| child.is_null())
        {
            return Ok(());
        }
        *pointer = self.own(*pointer, kind, level)?;
        for index in first_child..FANOUT {
            let first_leaf = if index == first_child {
                first_leaf % span(level - 1)
            } else {
                0
            };
            self.change_child(*pointer, index, |metadata, child| {
                metadata.cut(child, kind, level - 1, first_leaf)
            })?;
        }
        Ok(())
    }

    /// Drops up to `budget` leaves of a tree that nobody uses any more, from its end. Shared parts are let go as a whole.
    pub(crate) fn reap(
        &mut self,
        pointer: &mut PagePointer,
        kind: PageKind,
        level: u8,
        budget: &mut u64,
    ) -> Result<()> {
        let is_whole = level == 0
            || self.pages.extra(pointer.address) > 0
            || self.page(*pointer, kind, level).is_err();
        if pointer.is_null() || is_whole {
            *budget = budget.saturating_sub(u64::from(!pointer.is_null()));
            self.release(*pointer, kind, level);
            *pointer = PagePointer::default();
            return Ok(());
        }
        *pointer = self.own(*pointer, kind, level)?;
        for index in (0..FANOUT).rev() {
            if *budget == 0 {
                return Ok(());
            }
            let left = self.change_child(*pointer, index, |metadata, child| {
                metadata.reap(child, kind, level - 1, budget)
            })?;
            if !left.is_null() {
                return Ok(());
            }
        }
        self.free_page(*pointer);
        *pointer = PagePointer::default();
        Ok(())
    }

    /// Records that the next checkpoint may need for its own pages.
    pub(crate) fn checkpoint_need_records(&self) -> u64 {
        let dirty_leaves = self.allocator.dirty_count()
            + self.records.dirty_count()
            + self.pages.dirty_count()
            + 2 * self.catalog.dirty_count()
            + 2 * self.sums.dirty_count();
        // A leaf takes its inner pages with it, and frees on the way dirty other leaves of the space map.
        4 + dirty_leaves as u64 * 4 / RECORD_BLOCKS
    }

    /// Fails where `page_count` more pages and the next checkpoint would not fit.
    pub(crate) fn need_pages(&self, page_count: u64) -> Result<()> {
        if self.is_replaying {
            // It fitted once, in another order of allocations.
            return Ok(());
        }
        let records = self.checkpoint_need_records() + page_count.div_ceil(RECORD_BLOCKS / 2);
        if self.allocator.free_records() >= records {
            return Ok(());
        }
        Err(PoolError::Full)
    }

    /// Room for data. Some of the pool is kept for metadata, so that what is full can still be emptied.
    pub(crate) fn reserve(&mut self, block_count: u64) -> Result<Extent> {
        let kept = self.checkpoint_need_records() + 12 + self.allocator.total_records() / 64;
        if self.allocator.free_records() <= kept {
            return Err(PoolError::Full);
        }
        self.allocator.reserve(block_count).ok_or(PoolError::Full)
    }
}

/// The kind of the leaves of a tree of the superblock.
pub(crate) fn leaf_kind(name: TreeName) -> PageKind {
    match name {
        TreeName::Entries => PageKind::Entries,
        TreeName::Space => PageKind::Space,
        TreeName::RecordReferences => PageKind::RecordReferences,
        TreeName::PageReferences => PageKind::PageReferences,
        TreeName::Sums => PageKind::Sums,
    }
}

fn page_level(page: &Page) -> u8 {
    match page {
        Page::Inner { level, .. } => *level,
        _ => 0,
    }
}

pub(crate) fn damaged_page(pointer: PagePointer, reason: &str) -> PoolError {
    PoolError::Damaged {
        what: format!(
            "the page of metadata at block {} cannot be used: {reason}",
            pointer.address
        ),
    }
}
