//! The block reference table: how many references a record or a page has beyond its first.
//!
//! What has one reference is not in it. A leaf is an array of counts, found by address without a search; leaves of nothing
//! but zeros are not kept. It is asked when a reference is added or dropped, never on the way of a read or a write
//! in place. Nothing here does I/O.

use std::collections::BTreeSet;

use crate::error::{PoolError, Result};
use crate::page::PAYLOAD;

/// Counts of a leaf.
pub(crate) const COUNTS: usize = PAYLOAD / 4;

/// A leaf and how many of its counts are not zero.
#[derive(Debug, Clone)]
struct Leaf {
    counts: Box<[u32; COUNTS]>,
    nonzero_count: u32,
}

/// Counts of references by address: of what has more than one. Public so that it can be checked and measured beside other
/// ways to count (`crates/reference-schemes`); a pool's own is not reached from outside.
#[derive(Debug, Clone, Default)]
pub struct References {
    leaves: Vec<Option<Leaf>>,
    dirty_leaves: BTreeSet<u64>,
    /// What is counted more than once.
    entry_count: u64,
}

fn position(index: u64) -> (usize, usize) {
    (
        (index / COUNTS as u64) as usize,
        (index % COUNTS as u64) as usize,
    )
}

impl References {
    /// References beyond the first.
    pub fn extra(&self, index: u64) -> u32 {
        let (leaf, at) = position(index);
        match self.leaves.get(leaf) {
            Some(Some(leaf)) => leaf.counts[at],
            _ => 0,
        }
    }

    /// Adds one.
    ///
    /// # Errors
    ///
    /// There are 2^32 already.
    pub fn add(&mut self, index: u64) -> Result<()> {
        let (leaf_index, at) = position(index);
        if leaf_index >= self.leaves.len() {
            self.leaves.resize(leaf_index + 1, None);
        }
        let leaf = self.leaves[leaf_index].get_or_insert_with(|| Leaf {
            counts: Box::new([0; COUNTS]),
            nonzero_count: 0,
        });
        let count = &mut leaf.counts[at];
        *count = count.checked_add(1).ok_or(PoolError::TooManyReferences)?;
        if *count == 1 {
            leaf.nonzero_count += 1;
            self.entry_count += 1;
        }
        self.dirty_leaves.insert(leaf_index as u64);
        Ok(())
    }

    /// Drops one; false when there was none beyond the first.
    pub fn drop_one(&mut self, index: u64) -> bool {
        let (leaf_index, at) = position(index);
        let Some(Some(leaf)) = self.leaves.get_mut(leaf_index) else {
            return false;
        };
        let count = &mut leaf.counts[at];
        if *count == 0 {
            return false;
        }
        *count -= 1;
        if *count == 0 {
            leaf.nonzero_count -= 1;
            self.entry_count -= 1;
            if leaf.nonzero_count == 0 {
                self.leaves[leaf_index] = None;
            }
        }
        self.dirty_leaves.insert(leaf_index as u64);
        true
    }

    /// Sets a count, as a recount does.
    pub(crate) fn set(&mut self, index: u64, extra: u32) -> Result<()> {
        while self.extra(index) < extra {
            self.add(index)?;
        }
        while self.extra(index) > extra {
            self.drop_one(index);
        }
        Ok(())
    }

    /// All that are not zero, in order.
    pub fn iter(&self) -> impl Iterator<Item = (u64, u32)> {
        self.leaves
            .iter()
            .enumerate()
            .flat_map(|(leaf_index, leaf)| {
                let counts = leaf.iter().flat_map(|leaf| leaf.counts.iter().enumerate());
                counts
                    .filter(|(_, count)| **count != 0)
                    .map(move |(at, count)| ((leaf_index * COUNTS + at) as u64, *count))
            })
    }

    /// How many are not zero.
    pub(crate) fn entry_count(&self) -> u64 {
        self.entry_count
    }

    /// Bytes of memory that the counts take.
    pub fn memory_bytes(&self) -> u64 {
        let leaf_count = self.leaves.iter().flatten().count();
        (leaf_count * 4 * COUNTS + self.leaves.len() * size_of::<Option<Leaf>>()) as u64
    }

    /// Takes over a stored leaf.
    pub(crate) fn load_leaf(&mut self, leaf_index: u64, payload: &[u8; PAYLOAD]) {
        let mut counts = Box::new([0; COUNTS]);
        for (count, bytes) in counts.iter_mut().zip(payload.chunks(4)) {
            *count = u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
        }
        let nonzero_count = counts.iter().filter(|count| **count != 0).count() as u32;
        let leaf_index = leaf_index as usize;
        if leaf_index >= self.leaves.len() {
            self.leaves.resize(leaf_index + 1, None);
        }
        self.entry_count += u64::from(nonzero_count);
        if nonzero_count > 0 {
            self.leaves[leaf_index] = Some(Leaf {
                counts,
                nonzero_count,
            });
        }
    }

    /// The payload of a leaf; none where it would be zeros.
    pub fn save_leaf(&self, leaf_index: u64) -> Option<Box<[u8; PAYLOAD]>> {
        let leaf = self.leaves.get(leaf_index as usize)?.as_ref()?;
        let mut payload = Box::new([0; PAYLOAD]);
        for (count, bytes) in leaf.counts.iter().zip(payload.chunks_mut(4)) {
            bytes.copy_from_slice(&count.to_le_bytes());
        }
        Some(payload)
    }

    /// A leaf that is out of date.
    pub fn first_dirty(&self) -> Option<u64> {
        self.dirty_leaves.first().copied()
    }

    /// A leaf is not out of date any more.
    pub fn set_clean(&mut self, leaf: u64) {
        self.dirty_leaves.remove(&leaf);
    }

    pub(crate) fn dirty_count(&self) -> usize {
        self.dirty_leaves.len()
    }

    /// How many leaves there may be; for tests.
    #[cfg(test)]
    fn leaf_count(&self) -> u64 {
        self.leaves.len() as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_survive_their_encoding_and_empty_leaves_are_gone() {
        let mut references = References::default();
        for index in [5, 5, 5, 2000, 10_000_000] {
            references.add(index).unwrap();
        }
        assert_eq!(references.entry_count(), 3);
        assert_eq!(references.extra(5), 3);
        let mut again = References::default();
        while let Some(leaf) = references.first_dirty() {
            references.set_clean(leaf);
            again.load_leaf(leaf, &references.save_leaf(leaf).unwrap());
        }
        assert!(again.iter().eq(references.iter()));
        assert!(again.drop_one(2000) && !again.drop_one(2000) && !again.drop_one(77_777_777));
        assert_eq!(again.save_leaf(1), None);
        assert_eq!(again.first_dirty(), Some(1));
    }

    #[test]
    fn ten_million_neighbours_take_little_more_than_four_bytes_each() {
        let mut references = References::default();
        for index in 0..10_000_000 {
            references.add(index).unwrap();
        }
        assert!(references.memory_bytes() * 10 <= 10_000_000 * 41);
        // On disk a leaf is a page, and 254 of them share an inner page.
        let leaf_count = references.leaf_count();
        let pages = leaf_count + leaf_count.div_ceil(254) + 1;
        assert!(pages * 4096 <= 10_000_000 * 5);
    }
}
