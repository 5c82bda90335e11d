//! Streams of snapshots: docs/format/pool-stream.md.
//!
//! `frame` has the bytes, `send` decides what is in a stream, `receive` makes objects of one.

mod difference;
mod frame;
mod receive;
mod send;
mod token;

pub use receive::{Partial, Received};
pub use send::Sent;

/// Where in a stream something is: object, and record of it.
pub(crate) type Position = (u32, u64);
