//! The memory server: gives clones the pages of a snapshot when they ask for them (userfaultfd(2)).
//!
//! One [`Server`] has the memory of one snapshot mapped once ([`MemorySource`]) and serves any number of
//! hypervisors. Each sends where its guest's memory is ([`handshake`]) and is then served by a thread
//! of its own. The first one's pages are recorded ([`WorkingSet`]) and brought to later ones ahead. Whoever
//! looks after a VM watches the server ([`ServerWatch`]): a server that is gone leaves guests that wait
//! for ever, and one that cannot serve a clone kills its hypervisor.
//!
//! Not here: where sets are kept (`fcvm-snapshot`), what a socket is called and who may
//! connect (the caller), starting of hypervisors. `unsafe` is in `raw.rs` (the kernel's interface) and
//! `mapping.rs` alone.

mod faults;
pub mod handshake;
mod mapping;
mod pages;
mod raw;
mod server;
mod source;
mod watch;
mod watchers;
mod working_set;

pub use faults::SessionEnd;
pub use handshake::{GuestLayout, HUGE_PAGE_BYTES, HandshakeError, Region};
pub use mapping::GuestMemory;
pub use raw::{Faults, Userfault};
pub use server::{Server, ServerError, ServerEvent, ServerOptions, Stopper};
pub use source::MemorySource;
pub use watch::{Notice, ServerWatch, Summary, WatchError, hand_over};
pub use working_set::{WORKING_SET_BYTES_MAX, WorkingSet};
