//! The seam below a pool: what it needs of a file, a block device, or a disk that fails on purpose.
//!
//! Nothing here knows the pool's format.

mod file;
mod simulated;

use std::io;

pub use file::FileDisk;
pub use simulated::{CrashChoice, Event, Fault, SimulatedDisk};

/// A range of bytes that keeps what is written to it.
///
/// Calls come from several threads at once, never for overlapping ranges of which one is a write, except where
/// users of an object write and read the same range concurrently.
pub trait Disk: Send + Sync {
    /// Fills `buffer` with the bytes at `offset_bytes`.
    ///
    /// # Errors
    ///
    /// The bytes cannot be read, or end before the buffer is full.
    fn read_at(&self, buffer: &mut [u8], offset_bytes: u64) -> io::Result<()>;

    /// Writes all of `bytes` at `offset_bytes`. Not durable before the next flush.
    ///
    /// # Errors
    ///
    /// Not all bytes were written; which of them were is unknown.
    fn write_at(&self, bytes: &[u8], offset_bytes: u64) -> io::Result<()>;

    /// Returns when all writes that ended before the call are durable.
    ///
    /// # Errors
    ///
    /// Any of them may be lost.
    fn flush(&self) -> io::Result<()>;

    /// The size, in bytes.
    ///
    /// # Errors
    ///
    /// It cannot be told.
    fn size_bytes(&self) -> io::Result<u64>;

    /// Makes the disk at least that large; new bytes read as zeros.
    ///
    /// # Errors
    ///
    /// It cannot grow, as a block device cannot.
    fn grow(&self, size_bytes: u64) -> io::Result<()>;

    /// Gives the space of a range back to whoever it came from, where that is possible. Nobody knows what the range holds afterwards.
    ///
    /// # Errors
    ///
    /// It is not possible; nothing is lost by that.
    fn punch(&self, _offset_bytes: u64, _length_bytes: u64) -> io::Result<()> {
        Ok(())
    }
}
