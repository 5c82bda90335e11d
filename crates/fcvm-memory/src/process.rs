//! The memory of a guest as it is mapped in its hypervisor's process.
//!
//! Reading and writing go through /proc/PID/mem, which is allowed to the parent of the process. What is read
//! while a guest stands still is read by process_vm_readv(2), which copies once and not twice.

use std::fs::File;
use std::io::{BufRead, BufReader, IoSliceMut};
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;

use rustix::fs::{major, minor};

use crate::error::MemoryError;
use crate::page_file::PageFile;
use crate::pagemap::{AddressRange, private_pages};
use crate::{PAGE_BYTES, PageRun};

/// Bytes written at a time.
const CHUNK_BYTES: usize = 1 << 20;
/// Parts into which the kernel may have divided the mapping, more than any hypervisor causes.
const PARTS_MAX: usize = 4096;

/// Threads that read at once while a guest stands still.
const CAPTURE_THREADS_MAX: usize = 4;
/// Pieces that one call reads: IOV_MAX.
const VECTORS_MAX: usize = 1024;
/// Less than this is read faster than a thread starts.
const CAPTURE_SHARE_BYTES_MIN: usize = 2 << 20;

/// A part of the guest's memory to be read: its offset, and where its bytes go.
type Piece<'a> = (u64, &'a mut [u8]);

/// Where a process has a file mapped.
#[derive(Debug)]
pub struct GuestMapping {
    pid: i32,
    parts: Vec<Part>,
    memory: File,
    pagemap: File,
}

#[derive(Debug, Clone, Copy)]
struct Part {
    range: AddressRange,
    /// Offset in the file of the first byte.
    offset: u64,
}

/// Pages that were read out of a process.
#[derive(Debug, Default)]
pub struct CapturedPages {
    /// Which ones, in order.
    pub runs: Vec<PageRun>,
    /// Their bytes, one run after the other.
    pub bytes: Vec<u8>,
}

impl GuestMapping {
    /// Finds where the process has `file` mapped.
    ///
    /// # Errors
    ///
    /// It does not, or the process is not this one's child.
    pub fn find(pid: i32, file: impl AsFd) -> Result<Self, MemoryError> {
        let failed = |action| {
            move |source| MemoryError::Process {
                action,
                pid,
                source,
            }
        };
        let stat = rustix::fs::fstat(&file).map_err(|errno| failed("find")(errno.into()))?;
        let device = format!("{:02x}:{:02x}", major(stat.st_dev), minor(stat.st_dev));
        let inode = stat.st_ino.to_string();
        let maps = File::open(format!("/proc/{pid}/maps")).map_err(failed("find"))?;
        let mut parts = Vec::new();
        for line in BufReader::new(maps).lines() {
            let line = line.map_err(failed("find"))?;
            parts.extend(parse(&line, &device, &inode));
            if parts.len() > PARTS_MAX {
                break;
            }
        }
        parts.sort_by_key(|part| part.offset);
        if parts.is_empty() || parts.len() > PARTS_MAX {
            let reason = std::io::Error::other(format!("it is mapped in {} parts", parts.len()));
            return Err(failed("find")(reason));
        }
        let open = |name: &str, write| {
            File::options()
                .read(true)
                .write(write)
                .open(format!("/proc/{pid}/{name}"))
        };
        Ok(Self {
            pid,
            parts,
            memory: open("mem", true).map_err(failed("open"))?,
            pagemap: open("pagemap", false).map_err(failed("open"))?,
        })
    }

    fn failed(&self, action: &'static str) -> impl Fn(std::io::Error) -> MemoryError {
        let pid = self.pid;
        move |source| MemoryError::Process {
            action,
            pid,
            source,
        }
    }

    /// The pages that the process has written since it mapped the file copy-on-write.
    ///
    /// # Errors
    ///
    /// The process has ended.
    pub fn private_runs(&self) -> Result<Vec<PageRun>, MemoryError> {
        let mut runs = Vec::new();
        for part in &self.parts {
            let found = private_pages(&self.pagemap, part.range).map_err(self.failed("scan"))?;
            runs.extend(found.iter().map(|range| PageRun {
                first: (range.start - part.range.start + part.offset) / PAGE_BYTES,
                count: (range.end - range.start) / PAGE_BYTES,
            }));
        }
        Ok(runs)
    }

    /// Reads the private pages. The process must not write meanwhile; `pages` is reused so that a
    /// caller in a hurry can make room before.
    ///
    /// # Errors
    ///
    /// The process has ended.
    pub fn capture(&self, pages: &mut CapturedPages) -> Result<(), MemoryError> {
        pages.runs = self.private_runs()?;
        let total: u64 = pages.runs.iter().map(PageRun::bytes).sum();
        let total = usize::try_from(total).unwrap_or(usize::MAX);
        // What is there is written over: only growth has to be zeroed.
        if pages.bytes.len() < total {
            pages.bytes.resize(total, 0);
        }
        pages.bytes.truncate(total);
        let threads = std::thread::available_parallelism().map_or(1, usize::from);
        let share = total
            .div_ceil(threads.min(CAPTURE_THREADS_MAX))
            .max(CAPTURE_SHARE_BYTES_MIN);
        let mut shares = divided(&pages.runs, &mut pages.bytes, share).into_iter();
        let own = shares.next().unwrap_or_default();
        std::thread::scope(|scope| {
            let others: Vec<_> = shares
                .map(|share| scope.spawn(move || self.read_all(share)))
                .collect();
            let mut read = self.read_all(own);
            for other in others {
                let ended = other.join();
                read = read.and(ended.unwrap_or_else(|panic| std::panic::resume_unwind(panic)));
            }
            read
        })
    }

    fn read_all(&self, mut pieces: Vec<Piece<'_>>) -> Result<(), MemoryError> {
        for batch in pieces.chunks_mut(VECTORS_MAX) {
            if self.read_at_once(batch)? {
                continue;
            }
            // The slower way also tells what is wrong.
            for (offset, bytes) in batch {
                self.read(*offset, bytes)?;
            }
        }
        Ok(())
    }

    /// Reads in one call of the kernel; tells whether all has been read.
    fn read_at_once(&self, pieces: &mut [Piece<'_>]) -> Result<bool, MemoryError> {
        let mut here = Vec::with_capacity(pieces.len());
        let mut there = Vec::with_capacity(pieces.len());
        let mut total = 0;
        for (offset, bytes) in pieces {
            let (address, length) = self.locate(*offset, bytes.len())?;
            if length < bytes.len() {
                return Ok(false);
            }
            total += length;
            here.push(IoSliceMut::new(bytes));
            there.push(libc::iovec {
                iov_base: address as *mut libc::c_void,
                iov_len: length,
            });
        }
        // SAFETY: `IoSliceMut` is laid out as the kernel's iovec, and its slices are borrowed mutably until the
        // call returns; the addresses of `there` are of the other process, and the kernel checks them. No list is
        // longer than its length says.
        let read = unsafe {
            libc::process_vm_readv(
                self.pid,
                here.as_mut_ptr().cast(),
                here.len() as libc::c_ulong,
                there.as_ptr(),
                there.len() as libc::c_ulong,
                0,
            )
        };
        Ok(usize::try_from(read) == Ok(total))
    }

    /// Reads from the guest's memory.
    ///
    /// # Errors
    ///
    /// The range is not all mapped, or the process has ended.
    pub fn read(&self, offset: u64, bytes: &mut [u8]) -> Result<(), MemoryError> {
        let mut done = 0;
        while done < bytes.len() {
            let (address, length) = self.locate(offset + done as u64, bytes.len() - done)?;
            self.memory
                .read_exact_at(&mut bytes[done..done + length], address)
                .map_err(self.failed("read"))?;
            done += length;
        }
        Ok(())
    }

    /// Writes to the guest's memory. Where it is mapped copy-on-write the file does not change.
    ///
    /// # Errors
    ///
    /// The range is not all mapped, or the process has ended.
    pub fn write(&self, offset: u64, bytes: &[u8]) -> Result<(), MemoryError> {
        let mut done = 0;
        while done < bytes.len() {
            let (address, length) = self.locate(offset + done as u64, bytes.len() - done)?;
            self.memory
                .write_all_at(&bytes[done..done + length], address)
                .map_err(self.failed("write"))?;
            done += length;
        }
        Ok(())
    }

    /// Writes all pages of a page file.
    ///
    /// # Errors
    ///
    /// The file is damaged, or for memory of another size; or the process has ended.
    pub fn apply(&self, file: &PageFile) -> Result<(), MemoryError> {
        file.check_size(self.bytes())?;
        file.for_each_chunk(CHUNK_BYTES, |offset, bytes| self.write(offset, bytes))
    }

    /// Size of the guest's memory, as far as it is mapped.
    fn bytes(&self) -> u64 {
        self.parts
            .last()
            .map_or(0, |part| part.offset + part.range.end - part.range.start)
    }

    /// Address of an offset, and how much of `length` is mapped there in one part.
    fn locate(&self, offset: u64, length: usize) -> Result<(u64, usize), MemoryError> {
        let after = self.parts.partition_point(|part| part.offset <= offset);
        let part = after.checked_sub(1).map(|index| self.parts[index]);
        let found = part.and_then(|part| {
            let address = part.range.start + (offset - part.offset);
            let room = usize::try_from(part.range.end.checked_sub(address)?).ok()?;
            (room > 0).then(|| (address, length.min(room)))
        });
        found.ok_or_else(|| {
            let reason = format!("nothing is mapped at offset {offset}");
            self.failed("find")(std::io::Error::other(reason))
        })
    }
}

/// Divides runs, whose bytes follow each other in `bytes`, into shares of so many bytes; the last has
/// what is left.
fn divided<'a>(runs: &[PageRun], bytes: &'a mut [u8], share: usize) -> Vec<Vec<Piece<'a>>> {
    let mut shares = vec![Vec::new()];
    let (mut rest, mut room) = (bytes, share);
    for run in runs {
        let mut offset = run.offset();
        let mut left = usize::try_from(run.bytes()).unwrap_or(0);
        while left > 0 {
            if room == 0 {
                shares.push(Vec::new());
                room = share;
            }
            let (piece, later) = rest.split_at_mut(left.min(room));
            rest = later;
            room -= piece.len();
            left -= piece.len();
            let start = offset;
            offset += piece.len() as u64;
            if let Some(last) = shares.last_mut() {
                last.push((start, piece));
            }
        }
    }
    shares
}

/// A line of /proc/PID/maps, where it is about this file.
fn parse(line: &str, device: &str, inode: &str) -> Option<Part> {
    let mut fields = line.split_ascii_whitespace();
    let (addresses, _permissions, offset) = (fields.next()?, fields.next()?, fields.next()?);
    if fields.next()? != device || fields.next()? != inode {
        return None;
    }
    let (start, end) = addresses.split_once('-')?;
    let number = |text: &str| u64::from_str_radix(text, 16).ok();
    Some(Part {
        range: AddressRange {
            start: number(start)?,
            end: number(end)?,
        },
        offset: number(offset)?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_are_divided_into_equal_shares() {
        let page = usize::try_from(PAGE_BYTES).unwrap();
        let runs = [(3, 1), (10, 5), (20, 2)].map(|(first, count)| PageRun { first, count });
        let mut bytes = vec![0; 8 * page];
        let shares: Vec<Vec<(u64, usize)>> = divided(&runs, &mut bytes, 3 * page)
            .into_iter()
            .map(|share| {
                let pages = share.into_iter();
                pages
                    .map(|(offset, bytes)| (offset / PAGE_BYTES, bytes.len() / page))
                    .collect()
            })
            .collect();
        assert_eq!(
            shares,
            [vec![(3, 1), (10, 2)], vec![(12, 3)], vec![(20, 2)]]
        );
        assert!(divided(&[], &mut [], page)[0].is_empty());
    }

    #[test]
    fn lines_about_the_file_are_understood() {
        let line = "7f0a00000000-7f0a10000000 rw-p 00200000 00:01 4242    /memfd:fcvm (deleted)";
        let part = parse(line, "00:01", "4242").unwrap();
        assert_eq!(part.range.start, 0x7f0a_0000_0000);
        assert_eq!(part.range.end, 0x7f0a_1000_0000);
        assert_eq!(part.offset, 0x20_0000);
        for other in [
            "",
            "7f-80",
            "7f-80 rw-p 0 00:01 4243 x",
            "7f-80 rw-p 0 00:02 4242 x",
        ] {
            assert!(parse(other, "00:01", "4242").is_none(), "{other}");
        }
    }
}
