//! Checksums of blocks of data that nobody writes in place any more.
//!
//! A row has the checksums of one record. What changed since the last checkpoint is kept here, the rest in the pages of the sums
//! tree. A sum that is there is right: rows are dropped when their record is given to an object again, not when it is freed, so that
//! freeing needs nothing. A page of sums that is lost takes no data with it: its blocks are read without being verified, and get
//! new sums.

use std::collections::BTreeMap;

use crate::error::{PoolError, Result};
use crate::layout::{BLOCK, Extent, RECORD_BLOCKS, TreeName};
use crate::metadata::Metadata;
use crate::page::{PAYLOAD, PageKind};

/// The sums of the 16 blocks of a record; 0 where there is none.
pub(crate) type Row = [u32; RECORD_BLOCKS as usize];

const ROW_BYTES: usize = 4 * RECORD_BLOCKS as usize;
/// Rows of a leaf.
pub(crate) const ROWS: u64 = (PAYLOAD / ROW_BYTES) as u64;
/// Leaves that may wait for a checkpoint before no more sums are made on the way of reads.
const WAITING_LEAVES_MAX: usize = 4096;

/// The checksum of a block; 0 is kept for none.
pub(crate) fn sum(block: &[u8]) -> u32 {
    crc32c::crc32c(block).max(1)
}

/// Sums of whole blocks that lie one behind the other, the first of them at `first_block` of a record.
pub(crate) fn put_sums(row: &mut Row, first_block: usize, bytes: &[u8]) {
    for (sum_of, block) in row[first_block..].iter_mut().zip(bytes.chunks(BLOCK)) {
        *sum_of = sum(block);
    }
}

/// Rows that are not in pages yet, by leaf and record.
#[derive(Debug, Default)]
pub(crate) struct Sums {
    changed: BTreeMap<u64, BTreeMap<u64, Row>>,
}

impl Sums {
    fn get(&self, record: u64) -> Option<&Row> {
        self.changed.get(&(record / ROWS))?.get(&record)
    }

    fn put(&mut self, record: u64, row: Row) {
        let leaf = self.changed.entry(record / ROWS).or_default();
        leaf.insert(record, row);
    }

    /// Leaves that the next checkpoint writes.
    pub(crate) fn dirty_count(&self) -> usize {
        self.changed.len()
    }
}

fn decode_row(payload: &[u8; PAYLOAD], record: u64) -> Row {
    let at = (record % ROWS) as usize * ROW_BYTES;
    let mut row = Row::default();
    for (sum, bytes) in row.iter_mut().zip(payload[at..].chunks(4)) {
        *sum = u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
    }
    row
}

fn encode_row(payload: &mut [u8; PAYLOAD], record: u64, row: &Row) {
    let at = (record % ROWS) as usize * ROW_BYTES;
    for (sum, bytes) in row.iter().zip(payload[at..].chunks_mut(4)) {
        bytes.copy_from_slice(&sum.to_le_bytes());
    }
}

impl Metadata {
    /// Whether any record has a sum.
    fn has_sums(&self) -> bool {
        !self.trees[TreeName::Sums as usize].root.is_null() || !self.sums.changed.is_empty()
    }

    /// The sums of a record; none where they cannot be read.
    pub(crate) fn sums_of(&mut self, record: u64) -> Row {
        if !self.has_sums() {
            return Row::default();
        }
        if let Some(row) = self.sums.get(record) {
            return *row;
        }
        let tree = self.trees[TreeName::Sums as usize];
        let leaf = self.leaf(tree, PageKind::Sums, record / ROWS);
        match leaf
            .as_ref()
            .map(|page| page.as_ref().map(|page| page.payload()))
        {
            Ok(Some(Ok(payload))) => decode_row(payload, record),
            _ => Row::default(),
        }
    }

    /// Whether more sums can wait for the next checkpoint.
    pub(crate) fn has_room_for_sums(&self) -> bool {
        self.sums.dirty_count() < WAITING_LEAVES_MAX && self.need_pages(4).is_ok()
    }

    /// Adds sums to those of a record. The blocks are never written again until the record is free.
    pub(crate) fn add_sums(&mut self, record: u64, added: &Row) {
        let mut row = self.sums_of(record);
        for (sum, added) in row.iter_mut().zip(added).filter(|(_, added)| **added != 0) {
            *sum = *added;
        }
        self.sums.put(record, row);
    }

    /// A record, or a part of one, holds something new.
    pub(crate) fn forget_sums(&mut self, extent: Extent) {
        if !self.has_sums() {
            return;
        }
        let record = extent.record();
        if !extent.is_record() {
            let mut row = self.sums_of(record);
            for (block, sum) in row.iter_mut().enumerate() {
                *sum = if extent.bits() >> block & 1 != 0 {
                    0
                } else {
                    *sum
                };
            }
            self.sums.put(record, row);
            return;
        }
        let tree = self.trees[TreeName::Sums as usize];
        let has_none = self.sums.get(record).is_none()
            && match self.leaf(tree, PageKind::Sums, record / ROWS) {
                Ok(None) => true,
                Ok(Some(page)) => {
                    let payload = page.payload();
                    payload.is_ok_and(|payload| decode_row(payload, record) == Row::default())
                }
                // What cannot be read now may be readable later.
                Err(_) => false,
            };
        if !has_none {
            self.sums.put(record, Row::default());
        }
    }

    /// Puts the sums that changed into pages.
    pub(crate) fn store_sums(&mut self) -> Result<()> {
        while let Some((leaf, rows)) = self.sums.changed.first_key_value() {
            let (leaf, rows) = (*leaf, rows.clone());
            match self.store_sums_leaf(leaf, &rows) {
                // The tree is damaged above this leaf: data goes on without sums until a scrub has made it anew.
                Ok(()) | Err(PoolError::Damaged { .. }) => {}
                Err(error) => return Err(error),
            }
            self.sums.changed.remove(&leaf);
        }
        Ok(())
    }

    fn store_sums_leaf(&mut self, leaf: u64, rows: &BTreeMap<u64, Row>) -> Result<()> {
        let tree = self.trees[TreeName::Sums as usize];
        let mut payload = Box::new([0; PAYLOAD]);
        match self.leaf(tree, PageKind::Sums, leaf) {
            Ok(Some(page)) => payload.copy_from_slice(page.payload()?),
            Ok(None) => {}
            Err(PoolError::Damaged { .. }) => self.set_leaf(TreeName::Sums, leaf, None)?,
            Err(error) => return Err(error),
        }
        for (record, row) in rows {
            encode_row(&mut payload, *record, row);
        }
        for record in leaf * ROWS..(leaf + 1) * ROWS {
            let is_used = self.allocator.contains_record(record)
                && self.allocator.is_used_partly(Extent::of_record(record));
            if !is_used {
                encode_row(&mut payload, record, &Row::default());
            }
        }
        let is_empty = payload.iter().all(|byte| *byte == 0);
        self.set_leaf(TreeName::Sums, leaf, (!is_empty).then_some(payload))
    }

    /// Forgets all pages of sums, as a scrub does that found the tree damaged.
    pub(crate) fn drop_sums_tree(&mut self) {
        let tree = std::mem::take(&mut self.trees[TreeName::Sums as usize]);
        self.release(tree.root, PageKind::Sums, tree.height);
    }
}
