//! Guest memory of snapshots and clones.
//!
//! A clone maps the memory of its snapshot copy-on-write. What it writes are private pages of its
//! hypervisor process, which [`process`] finds, reads and writes; [`page_file`] is the form in which
//! pages are stored and handed on: those that are not zero, or those that differ from the
//! memory below. The bytes are described in docs/format/snapshot.md. [`uffd`] gives pages to hypervisors
//! that ask for them one by one.
//!
//! Not here: starting hypervisors (`fcvm-hypervisor`), and what belongs to a snapshot besides its memory.

mod error;
pub mod page_file;
mod pagemap;
pub mod process;
pub mod uffd;
mod usage;

pub use error::MemoryError;
pub use page_file::{Content, PageFile};
pub use process::{CapturedPages, GuestMapping};
pub use usage::{MemoryUsage, usage};

/// Size of a page in bytes, on x86-64.
pub const PAGE_BYTES: u64 = 4096;

/// Consecutive pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PageRun {
    /// Number of the first one, from the start of the guest's memory.
    pub first: u64,
    /// How many there are; not zero.
    pub count: u64,
}

impl PageRun {
    /// Offset of the first byte.
    pub fn offset(&self) -> u64 {
        self.first * PAGE_BYTES
    }

    /// Length in bytes.
    pub fn bytes(&self) -> u64 {
        self.count * PAGE_BYTES
    }
}
