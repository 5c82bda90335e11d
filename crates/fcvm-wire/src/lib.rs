//! The framed, multiplexed, versioned protocol between host and guest.
//!
//! The same frames travel over virtio-serial between the owner process and `fc-agent`, and over a
//! Unix socket between a command (`fcvm exec`, ...) and the owner. The bytes are described in
//! docs/format/wire.md. This crate does no I/O: it encodes, decodes and counts flow-control credit;
//! who reads and writes is the business of the two sides.

#![forbid(unsafe_code)]

pub mod flow;
pub mod frame;
pub mod mark;
pub mod message;

pub use flow::{INITIAL_WINDOW_BYTES, ReceiveWindow, SendWindow};
pub use frame::{
    Channel, Decoder, Frame, FrameError, FrameKind, HEADER_BYTES, MAX_DATA_BYTES, StreamId,
};
pub use mark::{MARK_BYTES, Mark, MarkScanner};
pub use message::{
    Control, Failure, FailureKind, Hello, Opened, Outcome, PROTOCOL_VERSION, Request, Role,
};
