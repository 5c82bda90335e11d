//! A copy-on-write store of sparse objects in one file or block device: clones and snapshots of any size at once.
//!
//! [`Pool`] is the store, [`Object`] a disk in it. Bytes are described in `docs/format/pool.md`, what happens at each step of write,
//! clone, snapshot, free and replay in `docs/design/block-cloning.md`. No terminal, no environment and no other process
//! is known here.

#![forbid(unsafe_code)]

mod allocator;
mod apply;
mod catalog;
mod check;
mod compression;
mod disk;
mod error;
mod frozen;
mod identified;
mod journal;
mod layout;
mod log;
mod map;
mod metadata;
mod name;
mod namespace;
mod object;
mod operation;
mod page;
mod pool;
mod references;
mod replay;
mod scrub;
mod space;
mod stream;
mod sums;
mod sync;
mod txg;
mod whole;

pub use catalog::{ObjectId, check_name};
pub use check::CheckReport;
pub use compression::{Compression, parse_extent};
pub use disk::{CrashChoice, Disk, Event, Fault, FileDisk, SimulatedDisk};
pub use error::{PoolError, Result};
pub use journal::Journal;
pub use layout::{
    BLOCK_BYTES, OBJECT_MAX_BYTES, POOL_MAX_BYTES, POOL_MIN_BYTES, RECORD_BYTES, VERSION,
};
pub use name::Name;
pub use namespace::{DatasetOptions, Kind, Listed};
pub use object::Object;
pub use pool::Pool;
pub use references::References;
pub use replay::parse_log;
pub use scrub::{Lost, ScrubReport};
pub use space::{ObjectSpace, PoolSpace};
pub use stream::{Partial, Received, Sent};
