//! Counts by address: the pool's own block reference table.
//!
//! A block with one reference is not in it. Making a second pointer adds one, wherever the other pointers are; dropping
//! one takes one away, or frees the block where there is nothing to take.

use std::collections::BTreeSet;

use blockpool::References;

use crate::scheme::{Content, Placed, Pointer, Scheme};

/// The pool's 16 bytes have the address, and which blocks of the record it is; no count.
impl Pointer for u64 {
    fn address(&self) -> u64 {
        *self
    }
}

/// See the module.
#[derive(Debug, Clone, Default)]
pub struct Brt {
    table: References,
    leaves_on_disk: BTreeSet<u64>,
}

impl Scheme for Brt {
    type Pointer = u64;
    const POINTER_BYTES: u64 = 16;

    fn place(&mut self, _: &Content, allocate: &mut dyn FnMut() -> u64) -> Placed<u64> {
        Placed::New(allocate())
    }

    fn place_again(&mut self, _: &u64) {}

    fn share(&mut self, source: &mut u64) -> u64 {
        // 2^32 references are more than anything here makes.
        let _ = self.table.add(*source);
        *source
    }

    fn drop_one(&mut self, pointer: &u64, _: Vec<&mut u64>) -> bool {
        !self.table.drop_one(*pointer)
    }

    fn count(&self, pointer: &u64) -> u64 {
        u64::from(self.table.extra(*pointer)) + 1
    }

    fn facts(&self) -> Vec<(u64, u64)> {
        let facts = self.table.iter();
        facts
            .map(|(address, extra)| (address, u64::from(extra)))
            .collect()
    }

    fn memory_bytes(&self) -> u64 {
        self.table.memory_bytes()
    }

    fn disk_bytes(&self) -> u64 {
        // 254 leaves to an inner page.
        let leaves = self.leaves_on_disk.len() as u64;
        (leaves + leaves.div_ceil(254)) * 4096
    }

    fn take_dirty_pages(&mut self) -> u64 {
        let mut pages = 0;
        while let Some(leaf) = self.table.first_dirty() {
            match self.table.save_leaf(leaf) {
                Some(_) => self.leaves_on_disk.insert(leaf),
                None => self.leaves_on_disk.remove(&leaf),
            };
            self.table.set_clean(leaf);
            pages += 1;
        }
        pages
    }
}
