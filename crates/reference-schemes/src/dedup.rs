//! A table by content, as deduplication has it: for each block its hash, its address and how many pointers there are.
//!
//! In memory and on disk it is the same: pages of entries in the order of their hashes, and a directory that finds a page by
//! the first bits of a hash (extendible hashing). Pages are 69 % full on average. A hash has no neighbours, whatever its
//! block has: what changes together lies apart.

use std::collections::BTreeSet;

use sha2::{Digest, Sha256};

use crate::scheme::{Content, Placed, Pointer, Scheme};

/// The hash is the key of the table, so the pointer has to have it.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct HashedPointer {
    hash: [u8; 32],
    address: u64,
}

impl Pointer for HashedPointer {
    fn address(&self) -> u64 {
        self.address
    }
}

/// 41 bytes: the hash, as many bytes of an address as the pool's pointers have, and a count.
#[derive(Debug, Clone)]
struct Entry {
    hash: [u8; 32],
    address: [u8; 5],
    count: [u8; 4],
}

impl Entry {
    fn address(&self) -> u64 {
        let mut bytes = [0; 8];
        bytes[..5].copy_from_slice(&self.address);
        u64::from_le_bytes(bytes)
    }

    fn count(&self) -> u32 {
        u32::from_le_bytes(self.count)
    }
}

/// What fits into a page of 4 KiB behind the pool's 32 bytes of header.
const ENTRIES_MAX: usize = 4064 / size_of::<Entry>();

#[derive(Debug, Clone, Default)]
struct Page {
    /// How many first bits all its hashes have in common.
    depth: u32,
    entries: Vec<Entry>,
}

impl Page {
    fn find(&self, hash: &[u8; 32]) -> Result<usize, usize> {
        self.entries.binary_search_by(|entry| entry.hash.cmp(hash))
    }
}

/// See the module.
#[derive(Debug, Clone)]
pub struct Dedup {
    depth: u32,
    /// The page of each beginning of `depth` bits.
    directory: Vec<u32>,
    pages: Vec<Page>,
    dirty: BTreeSet<u32>,
}

impl Default for Dedup {
    fn default() -> Self {
        Self {
            depth: 0,
            directory: vec![0],
            pages: vec![Page::default()],
            dirty: BTreeSet::new(),
        }
    }
}

/// The first bits of a hash, as a number.
fn beginning(hash: &[u8; 32], depth: u32) -> usize {
    let first = u32::from_be_bytes([hash[0], hash[1], hash[2], hash[3]]);
    (u64::from(first) >> (32 - depth)) as usize
}

impl Dedup {
    fn page_of(&self, hash: &[u8; 32]) -> u32 {
        self.directory[beginning(hash, self.depth)]
    }

    fn insert(&mut self, hash: &[u8; 32], address: u64) {
        loop {
            let number = self.page_of(hash);
            let page = &mut self.pages[number as usize];
            if page.entries.len() < ENTRIES_MAX {
                let at = page.find(hash).unwrap_or_else(|at| at);
                let mut bytes = [0; 5];
                bytes.copy_from_slice(&address.to_le_bytes()[..5]);
                let entry = Entry {
                    hash: *hash,
                    address: bytes,
                    count: 1_u32.to_le_bytes(),
                };
                page.entries.insert(at, entry);
                self.dirty.insert(number);
                return;
            }
            self.split(number);
        }
    }

    /// Makes two pages of one that is full, by the next bit.
    fn split(&mut self, number: u32) {
        let depth = self.pages[number as usize].depth + 1;
        if depth > self.depth {
            self.directory = self.directory.iter().flat_map(|page| [*page; 2]).collect();
            self.depth = depth;
        }
        let new = self.pages.len() as u32;
        let page = &mut self.pages[number as usize];
        page.depth = depth;
        let at = page
            .entries
            .partition_point(|entry| beginning(&entry.hash, depth).is_multiple_of(2));
        let mut entries = Vec::with_capacity(ENTRIES_MAX);
        entries.extend(page.entries.drain(at..));
        self.pages.push(Page { depth, entries });
        for (index, page) in self.directory.iter_mut().enumerate() {
            if *page == number && index >> (self.depth - depth) & 1 == 1 {
                *page = new;
            }
        }
        self.dirty.extend([number, new]);
    }

    /// Changes the count of an entry; returns the new one. An entry that has none left goes.
    fn change(&mut self, hash: &[u8; 32], by: i32) -> Option<u32> {
        let number = self.page_of(hash);
        let page = &mut self.pages[number as usize];
        let at = page.find(hash).ok()?;
        let count = page.entries[at].count().saturating_add_signed(by);
        if count == 0 {
            page.entries.remove(at);
        } else {
            page.entries[at].count = count.to_le_bytes();
        }
        self.dirty.insert(number);
        Some(count)
    }

    fn entry(&self, hash: &[u8; 32]) -> Option<&Entry> {
        let page = &self.pages[self.page_of(hash) as usize];
        page.find(hash).ok().map(|at| &page.entries[at])
    }
}

impl Scheme for Dedup {
    type Pointer = HashedPointer;
    const POINTER_BYTES: u64 = 16 + 32;

    fn place(
        &mut self,
        content: &Content,
        allocate: &mut dyn FnMut() -> u64,
    ) -> Placed<HashedPointer> {
        let hash: [u8; 32] = Sha256::digest(content).into();
        if let Some(address) = self.entry(&hash).map(Entry::address) {
            self.change(&hash, 1);
            return Placed::Known(HashedPointer { hash, address });
        }
        let address = allocate();
        self.insert(&hash, address);
        Placed::New(HashedPointer { hash, address })
    }

    fn place_again(&mut self, pointer: &HashedPointer) {
        if self.change(&pointer.hash, 1).is_none() {
            self.insert(&pointer.hash, pointer.address);
        }
    }

    fn share(&mut self, source: &mut HashedPointer) -> HashedPointer {
        self.change(&source.hash, 1);
        source.clone()
    }

    fn drop_one(&mut self, pointer: &HashedPointer, _: Vec<&mut HashedPointer>) -> bool {
        self.change(&pointer.hash, -1) == Some(0)
    }

    fn count(&self, pointer: &HashedPointer) -> u64 {
        let entry = self.entry(&pointer.hash);
        entry.map_or(0, |entry| u64::from(entry.count()))
    }

    fn writes_in_place(&self) -> bool {
        false
    }

    fn facts(&self) -> Vec<(u64, u64)> {
        let entries = self.pages.iter().flat_map(|page| &page.entries);
        entries
            .map(|entry| (entry.address(), u64::from(entry.count())))
            .collect()
    }

    fn memory_bytes(&self) -> u64 {
        let entries: usize = self.pages.iter().map(|page| page.entries.capacity()).sum();
        let pages = self.pages.len() * size_of::<Page>();
        (entries * size_of::<Entry>() + pages + self.directory.len() * size_of::<u32>()) as u64
    }

    fn disk_bytes(&self) -> u64 {
        let directory = (self.directory.len() * 4).div_ceil(4064) as u64;
        (self.pages.len() as u64 + directory) * 4096
    }

    fn take_dirty_pages(&mut self) -> u64 {
        let pages = self.dirty.len() as u64;
        self.dirty.clear();
        pages
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_placed_is_found_through_splits_and_gone_after_its_last_pointer() {
        let mut table = Dedup::default();
        let mut next = 0;
        let mut place = |table: &mut Dedup, number: u32| {
            table.place(&number.to_le_bytes(), &mut || {
                next += 1;
                next
            })
        };
        let mut pointers = Vec::new();
        for number in 0..10_000 {
            let Placed::New(pointer) = place(&mut table, number) else {
                panic!("{number} was there");
            };
            pointers.push(pointer);
        }
        for (number, pointer) in pointers.iter().enumerate() {
            assert_eq!(
                place(&mut table, number as u32),
                Placed::Known(pointer.clone())
            );
            assert_eq!(table.count(pointer), 2);
        }
        for pointer in &pointers {
            assert!(!table.drop_one(pointer, Vec::new()));
            assert!(table.drop_one(pointer, Vec::new()));
            assert_eq!(table.count(pointer), 0);
        }
        assert_eq!(table.facts(), []);
    }
}
