//! Firecracker.

pub mod release;
