//! A disk in memory that records what is written, fails on purpose, and shows what a crash may leave.
//!
//! For the proofs of this crate; nothing in a program uses it.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use super::Disk;

/// What a crash tears: the medium keeps sectors of this size whole.
const SECTOR_BYTES: usize = 512;
/// Memory is kept in pieces of this size; one that was never written is not there.
const PIECE_BYTES: usize = 65_536;
/// What a punched range holds.
const PUNCHED: u8 = 0xa5;

/// What happened to the disk.
#[derive(Debug, Clone)]
pub enum Event {
    /// Bytes were written.
    Write {
        /// Where.
        offset_bytes: u64,
        /// What.
        bytes: Arc<[u8]>,
    },
    /// Everything before is durable.
    Flush,
    /// A remark of the test, which has no effect.
    Mark(u64),
}

/// What becomes of one write that was not flushed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CrashChoice {
    /// It reached the medium.
    Keep,
    /// It did not.
    Lose,
    /// Only so many of its first sectors did.
    Tear(usize),
    /// All but so many of its first sectors did.
    TearFront(usize),
}

/// When the disk fails: counted from the call of [`SimulatedDisk::set_fault`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// The read after so many others fails with EIO; those behind it do not.
    Read(usize),
    /// The write after so many others fails with EIO, and nothing of it is written.
    Write(usize),
    /// The write after so many others is cut in the middle.
    ShortWrite(usize),
    /// Every write after so many fails with ENOSPC.
    Full(usize),
    /// The flush after so many others fails; what was not flushed is lost.
    Flush(usize),
}

#[derive(Debug, Default)]
struct Content {
    size_bytes: u64,
    pieces: BTreeMap<u64, Box<[u8]>>,
}

impl Content {
    fn write(&mut self, mut offset: u64, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            let (piece, at) = (
                offset / PIECE_BYTES as u64,
                (offset % PIECE_BYTES as u64) as usize,
            );
            let length = bytes.len().min(PIECE_BYTES - at);
            let target = self
                .pieces
                .entry(piece)
                .or_insert_with(|| vec![0; PIECE_BYTES].into_boxed_slice());
            target[at..at + length].copy_from_slice(&bytes[..length]);
            bytes = &bytes[length..];
            offset += length as u64;
        }
    }

    fn read(&self, mut offset: u64, mut buffer: &mut [u8]) {
        while !buffer.is_empty() {
            let (piece, at) = (
                offset / PIECE_BYTES as u64,
                (offset % PIECE_BYTES as u64) as usize,
            );
            let length = buffer.len().min(PIECE_BYTES - at);
            let (now, rest) = buffer.split_at_mut(length);
            match self.pieces.get(&piece) {
                Some(source) => now.copy_from_slice(&source[at..at + length]),
                None => now.fill(0),
            }
            buffer = rest;
            offset += length as u64;
        }
    }

    fn check(&self, offset: u64, length: usize) -> io::Result<()> {
        match offset.checked_add(length as u64) {
            Some(end) if end <= self.size_bytes => Ok(()),
            _ => Err(io::ErrorKind::UnexpectedEof.into()),
        }
    }
}

#[derive(Debug, Default)]
struct Inner {
    content: Content,
    /// What the disk was like when recording began.
    start: Vec<(u64, Box<[u8]>)>,
    events: Option<Vec<Event>>,
    fault: Option<Fault>,
    failure_count: usize,
}

impl Inner {
    /// Records the whole sectors that a write touched: a medium has no smaller ones.
    fn record(&mut self, offset_bytes: u64, length: usize) {
        let Some(events) = self.events.as_mut().filter(|_| length > 0) else {
            return;
        };
        let sector = SECTOR_BYTES as u64;
        let begin = offset_bytes / sector * sector;
        let end = (offset_bytes + length as u64).next_multiple_of(sector);
        let mut bytes = vec![0; (end - begin) as usize];
        self.content.read(begin, &mut bytes);
        events.push(Event::Write {
            offset_bytes: begin,
            bytes: bytes.into(),
        });
    }

    /// Counts a call down; true when it is the one to fail.
    fn fails(&mut self, is_due: fn(&mut Fault) -> Option<&mut usize>) -> bool {
        let Some(count) = self.fault.as_mut().and_then(is_due) else {
            return false;
        };
        if *count == 0 {
            self.failure_count += 1;
            return true;
        }
        *count -= 1;
        false
    }
}

/// A disk in memory. Clones are the same disk.
#[derive(Debug, Clone, Default)]
pub struct SimulatedDisk {
    inner: Arc<Mutex<Inner>>,
}

impl SimulatedDisk {
    /// A disk of zeros.
    #[must_use]
    pub fn new(size_bytes: u64) -> Self {
        let disk = Self::default();
        disk.with(|inner| inner.content.size_bytes = size_bytes);
        disk
    }

    fn with<T>(&self, work: impl FnOnce(&mut Inner) -> T) -> T {
        // A test that panicked is over; the disk itself is never left half changed.
        work(&mut self.inner.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Records what happens from now on.
    pub fn start_recording(&self) {
        self.with(|inner| {
            inner.start = inner.content.pieces.clone().into_iter().collect();
            inner.events = Some(Vec::new());
        });
    }

    /// Puts a remark among the events; returns how many there are.
    pub fn mark(&self, remark: u64) -> usize {
        self.with(|inner| {
            let events = inner.events.get_or_insert_default();
            events.push(Event::Mark(remark));
            events.len()
        })
    }

    /// What happened since recording began.
    #[must_use]
    pub fn events(&self) -> Vec<Event> {
        self.with(|inner| inner.events.clone().unwrap_or_default())
    }

    /// Lets the disk fail, or not fail any more.
    pub fn set_fault(&self, fault: Option<Fault>) {
        self.with(|inner| inner.fault = fault);
    }

    /// How many calls failed on purpose.
    #[must_use]
    pub fn failure_count(&self) -> usize {
        self.with(|inner| inner.failure_count)
    }

    /// A copy of the disk as it is.
    #[must_use]
    pub fn copy(&self) -> Self {
        let copy = Self::default();
        let (pieces, size_bytes) =
            self.with(|inner| (inner.content.pieces.clone(), inner.content.size_bytes));
        copy.with(|inner| inner.content = Content { size_bytes, pieces });
        copy
    }

    /// What a crash leaves after the first `events` of what was recorded: everything flushed, and of each write
    /// that was not, what `choose` says.
    #[must_use]
    pub fn after_crash(&self, events: usize, mut choose: impl FnMut(usize) -> CrashChoice) -> Self {
        let copy = Self::default();
        let (start, size_bytes, recorded) = self.with(|inner| {
            let recorded = inner.events.clone().unwrap_or_default();
            (inner.start.clone(), inner.content.size_bytes, recorded)
        });
        let mut content = Content {
            size_bytes,
            pieces: start.into_iter().collect(),
        };
        let recorded = &recorded[..events.min(recorded.len())];
        let flushed = recorded
            .iter()
            .rposition(|event| matches!(event, Event::Flush))
            .unwrap_or(0);
        let mut unflushed_count = 0;
        for (index, event) in recorded.iter().enumerate() {
            let Event::Write {
                offset_bytes,
                bytes,
            } = event
            else {
                continue;
            };
            let choice = if index < flushed {
                CrashChoice::Keep
            } else {
                unflushed_count += 1;
                choose(unflushed_count - 1)
            };
            let cut = |sectors: usize| (sectors * SECTOR_BYTES).min(bytes.len());
            match choice {
                CrashChoice::Keep => content.write(*offset_bytes, bytes),
                CrashChoice::Lose => {}
                CrashChoice::Tear(sectors) => content.write(*offset_bytes, &bytes[..cut(sectors)]),
                CrashChoice::TearFront(sectors) => {
                    let at = cut(sectors);
                    content.write(*offset_bytes + at as u64, &bytes[at..]);
                }
            }
        }
        copy.with(|inner| inner.content = content);
        copy
    }

    /// Turns one bit over.
    pub fn flip_bit(&self, offset_bytes: u64, bit: u8) {
        self.with(|inner| {
            let mut byte = [0];
            inner.content.read(offset_bytes, &mut byte);
            inner
                .content
                .write(offset_bytes, &[byte[0] ^ (1 << (bit % 8))]);
        });
    }

    /// Begins of the pieces (64 KiB each) that were ever written.
    #[must_use]
    pub fn written_pieces(&self) -> Vec<u64> {
        self.with(|inner| {
            let pieces = inner.content.pieces.keys();
            pieces.map(|piece| piece * PIECE_BYTES as u64).collect()
        })
    }
}

impl Disk for SimulatedDisk {
    fn read_at(&self, buffer: &mut [u8], offset_bytes: u64) -> io::Result<()> {
        self.with(|inner| {
            if inner.fails(|fault| match fault {
                Fault::Read(count) => Some(count),
                _ => None,
            }) {
                inner.fault = None;
                return Err(io::Error::from_raw_os_error(5));
            }
            inner.content.check(offset_bytes, buffer.len())?;
            inner.content.read(offset_bytes, buffer);
            Ok(())
        })
    }

    fn write_at(&self, bytes: &[u8], offset_bytes: u64) -> io::Result<()> {
        self.with(|inner| {
            inner.content.check(offset_bytes, bytes.len())?;
            let is_short = matches!(inner.fault, Some(Fault::ShortWrite(_)));
            let is_full = matches!(inner.fault, Some(Fault::Full(_)));
            let failed = inner.fails(|fault| match fault {
                Fault::Write(count) | Fault::ShortWrite(count) | Fault::Full(count) => Some(count),
                _ => None,
            });
            let written = match failed {
                true if is_short => &bytes[..bytes.len() / 2],
                true => &bytes[..0],
                false => bytes,
            };
            if failed && !is_full {
                inner.fault = None;
            }
            inner.content.write(offset_bytes, written);
            inner.record(offset_bytes, written.len());
            match failed {
                true if is_full => Err(io::Error::from_raw_os_error(28)),
                true => Err(io::Error::from_raw_os_error(5)),
                false => Ok(()),
            }
        })
    }

    fn flush(&self) -> io::Result<()> {
        self.with(|inner| {
            if inner.fails(|fault| match fault {
                Fault::Flush(count) => Some(count),
                _ => None,
            }) {
                inner.fault = None;
                return Err(io::Error::from_raw_os_error(5));
            }
            if let Some(events) = &mut inner.events {
                events.push(Event::Flush);
            }
            Ok(())
        })
    }

    fn size_bytes(&self) -> io::Result<u64> {
        self.with(|inner| Ok(inner.content.size_bytes))
    }

    fn grow(&self, size_bytes: u64) -> io::Result<()> {
        self.with(|inner| {
            inner.content.size_bytes = inner.content.size_bytes.max(size_bytes);
            Ok(())
        })
    }

    /// Leaves something that nobody ever wrote: who still reads it is found out.
    fn punch(&self, offset_bytes: u64, length_bytes: u64) -> io::Result<()> {
        self.with(|inner| {
            inner.content.check(offset_bytes, length_bytes as usize)?;
            for at in (offset_bytes..offset_bytes + length_bytes).step_by(PIECE_BYTES) {
                let length = (offset_bytes + length_bytes - at).min(PIECE_BYTES as u64) as usize;
                inner.content.write(at, &vec![PUNCHED; length]);
                inner.record(at, length);
            }
            Ok(())
        })
    }
}
