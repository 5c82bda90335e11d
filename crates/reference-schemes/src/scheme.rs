//! What the three have in common.

use std::hash::Hash;

/// Bytes of a block: 4 KiB everywhere here.
pub const BLOCK_BYTES: usize = 4096;

/// What a block holds, as a scheme sees it: the block's bytes where they are measured, one byte where all that can be done is tried.
pub type Content = [u8];

/// What a map has for a block.
pub trait Pointer: Clone + Eq + Hash + std::fmt::Debug {
    /// Where the block is.
    fn address(&self) -> u64;
}

/// Where new content goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Placed<P> {
    /// To a block that nobody used.
    New(P),
    /// It is there already: the pointer counts as one more reference.
    Known(P),
}

/// A way to count references.
///
/// The state is what memory has between two checkpoints; a clone of it is what a checkpoint keeps.
pub trait Scheme: Clone {
    /// Its pointer.
    type Pointer: Pointer;

    /// Content is written. `allocate` gives a block that nobody uses.
    fn place(
        &mut self,
        content: &Content,
        allocate: &mut dyn FnMut() -> u64,
    ) -> Placed<Self::Pointer>;

    /// The log says that content was written and got this pointer.
    fn place_again(&mut self, pointer: &Self::Pointer);

    /// A second pointer is made from one that some map has, and is returned. Both maps are at hand: both pointers may change.
    fn share(&mut self, source: &mut Self::Pointer) -> Self::Pointer;

    /// A pointer goes; `relatives` are those in the same place of the map that this one was cloned from, and of those that were cloned from
    /// it. True when the block is free now.
    fn drop_one(&mut self, pointer: &Self::Pointer, relatives: Vec<&mut Self::Pointer>) -> bool;

    /// How many references the table, or the pointer, says that there are.
    fn count(&self, pointer: &Self::Pointer) -> u64;

    /// A block may be written in place where one file alone has it: not where its address follows from its content.
    fn writes_in_place(&self) -> bool {
        true
    }

    /// All that the state says, for finding out whether it was seen before.
    fn facts(&self) -> Vec<(u64, u64)>;

    /// Bytes of memory of the table.
    fn memory_bytes(&self) -> u64;

    /// Bytes of the table on disk, in pages of 4 KiB.
    fn disk_bytes(&self) -> u64;

    /// Pages of the table that changed since it was asked last: what the next checkpoint writes of it.
    fn take_dirty_pages(&mut self) -> u64;

    /// Bytes of a pointer on disk.
    const POINTER_BYTES: u64;
}
