//! A count beside each pointer, and no table.
//!
//! Whoever makes a second pointer has two maps at hand and can raise two counts; whoever drops one has one. There may be more copies
//! of the pointer than those. [`Told`] says who is told; none of the three is right, and one that was would have to find
//! every copy, which is what a table is for.

use crate::scheme::{Content, Placed, Pointer, Scheme};

/// The address and the count, 4 bytes more than without.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct CountedPointer {
    address: u64,
    count: u32,
}

impl Pointer for CountedPointer {
    fn address(&self) -> u64 {
        self.address
    }
}

/// Whose counts change.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Told {
    /// The new pointer's alone: what it is cloned from is on disk and is not written for that.
    Copy,
    /// That of the new pointer and of the one it is cloned from.
    Both,
    /// Those, and when one goes, the copy in the file that it was cloned from and those in files cloned from it.
    Relatives,
}

/// See the module.
#[derive(Debug, Clone)]
pub struct InPointer {
    /// Whose counts change.
    pub told: Told,
}

impl Scheme for InPointer {
    type Pointer = CountedPointer;
    const POINTER_BYTES: u64 = 20;

    fn place(&mut self, _: &Content, allocate: &mut dyn FnMut() -> u64) -> Placed<CountedPointer> {
        let address = allocate();
        Placed::New(CountedPointer { address, count: 1 })
    }

    fn place_again(&mut self, _: &CountedPointer) {}

    fn share(&mut self, source: &mut CountedPointer) -> CountedPointer {
        let count = source.count + 1;
        if self.told != Told::Copy {
            source.count = count;
        }
        CountedPointer {
            address: source.address,
            count,
        }
    }

    fn drop_one(&mut self, pointer: &CountedPointer, relatives: Vec<&mut CountedPointer>) -> bool {
        if self.told == Told::Relatives {
            for other in relatives {
                if other.address == pointer.address {
                    other.count = other.count.saturating_sub(1);
                }
            }
        }
        pointer.count <= 1
    }

    fn count(&self, pointer: &CountedPointer) -> u64 {
        u64::from(pointer.count)
    }

    fn facts(&self) -> Vec<(u64, u64)> {
        Vec::new()
    }

    fn memory_bytes(&self) -> u64 {
        0
    }

    fn disk_bytes(&self) -> u64 {
        0
    }

    fn take_dirty_pages(&mut self) -> u64 {
        0
    }
}
