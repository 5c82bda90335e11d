//! Identifiers, specifications and records shared by every fcvm crate.
//!
//! Only plain data, its parsing and its rules live here: no file, socket, clock or environment is
//! touched. What goes over the guest channel is in `fcvm-wire`.

#![forbid(unsafe_code)]

pub mod capability;
pub mod guest;
pub mod id;
pub mod memory;
pub mod ports;
pub mod record;
pub mod size;

pub use id::{SnapshotTag, VmId, VmName};
pub use ports::{PortMapping, Protocol};
pub use record::{VmRecord, VmState};
pub use size::ByteSize;
