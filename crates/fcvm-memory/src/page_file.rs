//! Page files: the pages of a guest's memory that are not zero, or that differ from the memory below.
//!
//! The same bytes are kept on disk and handed to a clone in an anonymous file. Everything read is
//! bounded and checked: a file that is damaged is found out before its pages are used.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;

use rustix::fs::{FallocateFlags, SeekFrom};
use rustix::io::Errno;

use crate::error::MemoryError;
use crate::{CapturedPages, PAGE_BYTES, PageRun};

/// First bytes of a page file.
const MAGIC: [u8; 8] = *b"FCVMPAGE";
/// Version that is written and read.
const VERSION: u32 = 1;
/// The header has a page of its own; the pages begin after it.
const DATA_OFFSET: u64 = PAGE_BYTES;
const HEADER_BYTES: usize = 48;
/// Where the bytes of the header end that say something; zeros follow.
const HEADER_CHECKED_END: usize = 44;
const ENTRY_BYTES: usize = 24;
/// Pages of one entry: what one checksum covers.
const RUN_PAGES_MAX: u64 = 256;
/// Largest memory: what fits into a guest's physical addresses.
const MEMORY_BYTES_MAX: u64 = 1 << 46;
/// Bytes read at a time while memory is written out.
const CHUNK_BYTES: usize = (RUN_PAGES_MAX * PAGE_BYTES) as usize;

/// What the pages that a file does not name are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Content {
    /// Zero: the file is a whole memory.
    Whole,
    /// As in the memory below: the file is a difference.
    Difference,
}

/// A page file, opened and checked but for its pages.
#[derive(Debug)]
pub struct PageFile {
    file: File,
    content: Content,
    memory_bytes: u64,
    checksum: u32,
    entries: Vec<Entry>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Entry {
    run: PageRun,
    /// Where its bytes are; zero pages have none.
    offset: Option<u64>,
    crc: u32,
}

impl PageFile {
    /// Opens a page file.
    ///
    /// # Errors
    ///
    /// It is none, of a later version, or its index is damaged.
    pub fn open(file: File) -> Result<Self, MemoryError> {
        let failed = MemoryError::file("read");
        let length = file.metadata().map_err(&failed)?.len();
        if length < DATA_OFFSET {
            return Err(MemoryError::damaged(format!("it has {length} bytes")));
        }
        let mut page = [0; DATA_OFFSET as usize];
        file.read_exact_at(&mut page, 0).map_err(&failed)?;
        let (bytes, unused) = page.split_at(HEADER_BYTES);
        let mut header = [0; HEADER_BYTES];
        header.copy_from_slice(bytes);
        let header = Header::decode(&header)?;
        if bytes[HEADER_CHECKED_END..]
            .iter()
            .chain(unused)
            .any(|byte| *byte != 0)
        {
            return Err(MemoryError::damaged("what follows its header is not zero"));
        }
        let index_bytes = header.entry_count * ENTRY_BYTES as u64;
        if header.index_offset.checked_add(index_bytes) != Some(length) {
            return Err(MemoryError::damaged(format!(
                "it has {length} bytes, and its header tells of {} more or fewer",
                length.abs_diff(header.index_offset.saturating_add(index_bytes))
            )));
        }
        let mut index = vec![0; usize::try_from(index_bytes).unwrap_or(usize::MAX)];
        file.read_exact_at(&mut index, header.index_offset)
            .map_err(&failed)?;
        if crc32c::crc32c_append(crc32c::crc32c(&header.checked), &index) != header.crc {
            return Err(MemoryError::damaged("the checksum of its index is wrong"));
        }
        let entries = decode_index(&index, &header)?;
        Ok(Self {
            file,
            content: header.content,
            memory_bytes: header.memory_bytes,
            checksum: header.crc,
            entries,
        })
    }

    /// What the pages that it does not name are.
    pub fn content(&self) -> Content {
        self.content
    }

    /// Size of the memory that it is of.
    pub fn memory_bytes(&self) -> u64 {
        self.memory_bytes
    }

    /// Pages that it names.
    pub fn page_count(&self) -> u64 {
        self.entries.iter().map(|entry| entry.run.count).sum()
    }

    /// CRC-32C over header and index, and so over the checksums of all pages: two files that have the
    /// same hold the same pages, but for damage that [`verify`](Self::verify) finds.
    pub fn checksum(&self) -> u32 {
        self.checksum
    }

    /// Length of the file in bytes.
    ///
    /// # Errors
    ///
    /// The kernel cannot tell.
    pub fn file_bytes(&self) -> io::Result<u64> {
        Ok(self.file.metadata()?.len())
    }

    /// A descriptor of it, to hand on.
    ///
    /// # Errors
    ///
    /// No descriptor is left.
    pub fn try_clone_file(&self) -> io::Result<File> {
        self.file.try_clone()
    }

    pub(crate) fn check_size(&self, expected: u64) -> Result<(), MemoryError> {
        if self.memory_bytes == expected {
            return Ok(());
        }
        Err(MemoryError::Size {
            found: self.memory_bytes,
            expected,
        })
    }

    fn check_difference(&self) -> Result<(), MemoryError> {
        match self.content {
            Content::Difference => Ok(()),
            Content::Whole => Err(MemoryError::damaged(
                "it is a whole memory, and pages over another were expected",
            )),
        }
    }

    /// Reads and checks every page.
    ///
    /// # Errors
    ///
    /// A page is not what was written.
    pub fn verify(&self) -> Result<(), MemoryError> {
        self.for_each_chunk(CHUNK_BYTES, |_, _| Ok(()))
    }

    /// Gives the pages in order, checked, at most `limit` bytes at a time with their offset in the
    /// memory.
    pub(crate) fn for_each_chunk(
        &self,
        limit: usize,
        mut take: impl FnMut(u64, &[u8]) -> Result<(), MemoryError>,
    ) -> Result<(), MemoryError> {
        let mut buffer = vec![0; CHUNK_BYTES];
        for entry in &self.entries {
            let bytes = &mut buffer[..usize::try_from(entry.run.bytes()).unwrap_or(0)];
            match entry.offset {
                Some(offset) => {
                    self.file
                        .read_exact_at(bytes, offset)
                        .map_err(MemoryError::file("read"))?;
                    if crc32c::crc32c(bytes) != entry.crc {
                        return Err(MemoryError::damaged(format!(
                            "the checksum of the pages at {:#x} is wrong",
                            entry.run.offset()
                        )));
                    }
                }
                None => bytes.fill(0),
            }
            for (index, part) in bytes.chunks(limit).enumerate() {
                take(entry.run.offset() + (index * limit) as u64, part)?;
            }
        }
        Ok(())
    }

    /// Writes the pages into an anonymous file that holds what is below.
    ///
    /// # Errors
    ///
    /// The page file is damaged or of another size; or the host has no memory left.
    pub fn restore_into(&self, memory: &File) -> Result<(), MemoryError> {
        self.restore_with_progress(memory, |_| ())
    }

    /// As [`restore_into`](Self::restore_into); `progress` is told of the pages that were written,
    /// as they are, which together are [`page_count`](Self::page_count).
    ///
    /// # Errors
    ///
    /// As those of `restore_into`.
    pub fn restore_with_progress(
        &self,
        memory: &File,
        mut progress: impl FnMut(u64),
    ) -> Result<(), MemoryError> {
        let failed = MemoryError::file("unpack");
        self.check_size(memory.metadata().map_err(&failed)?.len())?;
        self.for_each_chunk(CHUNK_BYTES, |offset, bytes| {
            memory.write_all_at(bytes, offset).map_err(&failed)?;
            progress(bytes.len() as u64 / PAGE_BYTES);
            Ok(())
        })?;
        // Zero pages take no memory.
        for entry in self.entries.iter().filter(|entry| entry.offset.is_none()) {
            let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            let _ = rustix::fs::fallocate(memory, flags, entry.run.offset(), entry.run.bytes());
        }
        Ok(())
    }

    /// Writes a whole memory that is an anonymous file. Nobody may write to it meanwhile.
    ///
    /// # Errors
    ///
    /// The target's file system is full.
    pub fn write_whole(memory: &File, target: &File) -> Result<(), MemoryError> {
        let size = memory_size(memory)?;
        let mut writer = Writer::new(target, Content::Whole, size);
        writer.push_memory(memory, 0, size)?;
        writer.finish()
    }

    /// Writes the whole memory that an anonymous file becomes with these pages over it, without
    /// making it. Nobody may write to the file meanwhile.
    ///
    /// # Errors
    ///
    /// These pages are damaged or of a memory of another size, or the target's file system is full.
    pub fn write_merged(&self, memory: &File, target: &File) -> Result<(), MemoryError> {
        let size = memory_size(memory)?;
        self.check_size(size)?;
        self.check_difference()?;
        let mut writer = Writer::new(target, Content::Whole, size);
        let mut done = 0;
        self.for_each_chunk(CHUNK_BYTES, |offset, bytes| {
            writer.push_memory(memory, done, offset)?;
            writer.push(offset, bytes, |_, _| false)?;
            done = offset + bytes.len() as u64;
            Ok(())
        })?;
        writer.push_memory(memory, done, size)?;
        writer.finish()
    }

    /// Writes those of these pages that differ from what `memory` holds, the memory below.
    ///
    /// # Errors
    ///
    /// These pages are damaged or of a memory of another size, or the target's file system is full.
    pub fn write_changed(&self, memory: &File, target: &File) -> Result<(), MemoryError> {
        let size = memory_size(memory)?;
        self.check_size(size)?;
        self.check_difference()?;
        let mut writer = Writer::new(target, Content::Difference, size);
        let mut below = vec![0; CHUNK_BYTES];
        self.for_each_chunk(CHUNK_BYTES, |offset, bytes| {
            let below = &mut below[..bytes.len()];
            memory
                .read_exact_at(below, offset)
                .map_err(MemoryError::file("read"))?;
            writer.push(offset, bytes, |at, page| {
                let start = usize::try_from(at - offset).unwrap_or(usize::MAX);
                below
                    .get(start..)
                    .is_some_and(|below| below.starts_with(page))
            })
        })?;
        writer.finish()
    }

    /// Writes the pages of a whole memory that differ from what `below` holds, the memory below. Nobody may
    /// write to either meanwhile.
    ///
    /// # Errors
    ///
    /// The two are of different sizes, or the target's file system is full.
    pub fn write_comparison(memory: &File, below: &File, target: &File) -> Result<(), MemoryError> {
        let failed = MemoryError::file("read");
        let (size, expected) = (memory_size(memory)?, memory_size(below)?);
        if size != expected {
            return Err(MemoryError::Size {
                found: size,
                expected,
            });
        }
        let mut writer = Writer::new(target, Content::Difference, size);
        let mut buffers = [vec![0; CHUNK_BYTES], vec![0; CHUNK_BYTES]];
        let mut offset = 0;
        while offset < size {
            let length = usize::try_from(size - offset)
                .unwrap_or(CHUNK_BYTES)
                .min(CHUNK_BYTES);
            let [own, other] = &mut buffers;
            let (own, other) = (&mut own[..length], &mut other[..length]);
            memory.read_exact_at(own, offset).map_err(&failed)?;
            below.read_exact_at(other, offset).map_err(&failed)?;
            if own != other {
                writer.push(offset, own, |at, page| {
                    let start = usize::try_from(at - offset).unwrap_or(usize::MAX);
                    other
                        .get(start..)
                        .is_some_and(|below| below.starts_with(page))
                })?;
            }
            offset += length as u64;
        }
        writer.finish()
    }

    /// Writes pages that were captured, but those of which `is_same` says, by their offset, that the
    /// memory below has them.
    ///
    /// # Errors
    ///
    /// The target's file system is full.
    pub fn write_difference(
        pages: &CapturedPages,
        memory_bytes: u64,
        target: &File,
        is_same: impl Fn(u64, &[u8]) -> bool,
    ) -> Result<(), MemoryError> {
        let mut writer = Writer::new(target, Content::Difference, memory_bytes);
        let mut rest = pages.bytes.as_slice();
        for run in &pages.runs {
            let (bytes, later) = rest.split_at(usize::try_from(run.bytes()).unwrap_or(0));
            writer.push(run.offset(), bytes, &is_same)?;
            rest = later;
        }
        writer.finish()
    }
}

fn memory_size(memory: &File) -> Result<u64, MemoryError> {
    let metadata = memory.metadata().map_err(MemoryError::file("read"))?;
    Ok(metadata.len())
}

/// The next part from `offset` on that is no hole, in whole pages.
pub(crate) fn next_data(memory: &File, offset: u64, size: u64) -> io::Result<Option<(u64, u64)>> {
    if offset >= size {
        return Ok(None);
    }
    let start = match rustix::fs::seek(memory, SeekFrom::Data(offset)) {
        Ok(start) if start >= size => return Ok(None),
        Ok(start) => (start & !(PAGE_BYTES - 1)).max(offset),
        Err(Errno::NXIO) => return Ok(None),
        Err(errno) => return Err(errno.into()),
    };
    let end = rustix::fs::seek(memory, SeekFrom::Hole(start))?;
    Ok(Some((start, end.next_multiple_of(PAGE_BYTES).min(size))))
}

struct Header {
    content: Content,
    memory_bytes: u64,
    entry_count: u64,
    index_offset: u64,
    crc: u32,
    /// What the checksum covers besides the index.
    checked: [u8; 40],
}

impl Header {
    fn decode(bytes: &[u8; HEADER_BYTES]) -> Result<Self, MemoryError> {
        let number32 = |at: usize| -> u32 {
            u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
        };
        let number64 = |at: usize| u64::from(number32(at)) | u64::from(number32(at + 4)) << 32;
        if bytes[..8] != MAGIC {
            return Err(MemoryError::damaged("it does not begin as one"));
        }
        let version = number32(8);
        if version != VERSION {
            return Err(MemoryError::Version {
                found: version,
                known: VERSION,
            });
        }
        let content = match number32(12) {
            0 => Content::Whole,
            1 => Content::Difference,
            other => return Err(MemoryError::damaged(format!("its kind is {other}"))),
        };
        let mut checked = [0; 40];
        checked.copy_from_slice(&bytes[..40]);
        let header = Self {
            content,
            memory_bytes: number64(16),
            entry_count: number64(24),
            index_offset: number64(32),
            crc: number32(40),
            checked,
        };
        let size = header.memory_bytes;
        if size == 0 || size > MEMORY_BYTES_MAX || !size.is_multiple_of(PAGE_BYTES) {
            return Err(MemoryError::damaged(format!(
                "it is of {size} bytes of memory"
            )));
        }
        if header.entry_count > size / PAGE_BYTES {
            return Err(MemoryError::damaged(format!(
                "it tells of {} runs of pages",
                header.entry_count
            )));
        }
        if header.index_offset < DATA_OFFSET || !header.index_offset.is_multiple_of(PAGE_BYTES) {
            return Err(MemoryError::damaged("its index is where no index can be"));
        }
        Ok(header)
    }

    fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        bytes[..40].copy_from_slice(&self.checked);
        bytes[40..44].copy_from_slice(&self.crc.to_le_bytes());
        bytes
    }
}

fn checked_part(
    content: Content,
    memory_bytes: u64,
    entry_count: u64,
    index_offset: u64,
) -> [u8; 40] {
    let kind: u32 = match content {
        Content::Whole => 0,
        Content::Difference => 1,
    };
    let mut bytes = [0; 40];
    bytes[..8].copy_from_slice(&MAGIC);
    bytes[8..12].copy_from_slice(&VERSION.to_le_bytes());
    bytes[12..16].copy_from_slice(&kind.to_le_bytes());
    bytes[16..24].copy_from_slice(&memory_bytes.to_le_bytes());
    bytes[24..32].copy_from_slice(&entry_count.to_le_bytes());
    bytes[32..40].copy_from_slice(&index_offset.to_le_bytes());
    bytes
}

/// Bit of the count that says that the pages are zero.
const ZERO: u64 = 1 << 63;

fn decode_index(index: &[u8], header: &Header) -> Result<Vec<Entry>, MemoryError> {
    let mut entries = Vec::with_capacity(index.len() / ENTRY_BYTES);
    let mut next_page = 0;
    let mut offset = DATA_OFFSET;
    let pages = header.memory_bytes / PAGE_BYTES;
    for bytes in index.as_chunks::<ENTRY_BYTES>().0 {
        let number = |at: usize| {
            let mut part = [0; 8];
            part.copy_from_slice(&bytes[at..at + 8]);
            u64::from_le_bytes(part)
        };
        let (first, count) = (number(0), number(8));
        let is_zero = count & ZERO != 0;
        let run = PageRun {
            first,
            count: count & !ZERO,
        };
        let fits = run.count > 0
            && run.count <= RUN_PAGES_MAX
            && first >= next_page
            && first < pages
            && run.count <= pages - first;
        if !fits {
            return Err(MemoryError::damaged(format!(
                "it tells of {} pages at page {first}",
                run.count
            )));
        }
        next_page = first + run.count;
        entries.push(Entry {
            run,
            offset: (!is_zero).then_some(offset),
            crc: u32::try_from(number(16) & u64::from(u32::MAX)).unwrap_or(0),
        });
        if !is_zero {
            offset += run.bytes();
        }
    }
    if offset != header.index_offset {
        return Err(MemoryError::damaged("its pages and its index do not meet"));
    }
    Ok(entries)
}

/// Writes a page file: pages, then the index, then the header that makes it one.
struct Writer<'a> {
    target: &'a File,
    content: Content,
    memory_bytes: u64,
    entries: Vec<Entry>,
    offset: u64,
}

impl<'a> Writer<'a> {
    fn new(target: &'a File, content: Content, memory_bytes: u64) -> Self {
        Self {
            target,
            content,
            memory_bytes,
            entries: Vec::new(),
            offset: DATA_OFFSET,
        }
    }

    /// Adds what an anonymous file holds from `start` to `end`, both at pages.
    fn push_memory(&mut self, memory: &File, start: u64, end: u64) -> Result<(), MemoryError> {
        let failed = MemoryError::file("read");
        let mut buffer =
            vec![0; CHUNK_BYTES.min(usize::try_from(end - start).unwrap_or(CHUNK_BYTES))];
        let mut offset = start;
        while let Some((mut at, data_end)) = next_data(memory, offset, end).map_err(&failed)? {
            while at < data_end {
                let length = usize::try_from(data_end - at)
                    .unwrap_or(CHUNK_BYTES)
                    .min(CHUNK_BYTES);
                let bytes = &mut buffer[..length];
                memory.read_exact_at(bytes, at).map_err(&failed)?;
                self.push(at, bytes, |_, _| false)?;
                at += length as u64;
            }
            offset = data_end;
        }
        Ok(())
    }

    /// Adds consecutive pages.
    fn push(
        &mut self,
        offset: u64,
        bytes: &[u8],
        is_same: impl Fn(u64, &[u8]) -> bool,
    ) -> Result<(), MemoryError> {
        let mut start = 0;
        let mut kind = None;
        for (index, page) in bytes.chunks(PAGE_BYTES as usize).enumerate() {
            let at = index * PAGE_BYTES as usize;
            let page_kind = self.kind(offset + at as u64, page, &is_same);
            let full = at - start >= CHUNK_BYTES;
            if kind != Some(page_kind) || full {
                self.add(offset + start as u64, &bytes[start..at], kind)?;
                start = at;
                kind = Some(page_kind);
            }
        }
        self.add(offset + start as u64, &bytes[start..], kind)
    }

    fn kind(&self, offset: u64, page: &[u8], is_same: impl Fn(u64, &[u8]) -> bool) -> PageKind {
        if is_same(offset, page) {
            return PageKind::Same;
        }
        match (is_zero(page), self.content) {
            (false, _) => PageKind::Stored,
            (true, Content::Whole) => PageKind::Same,
            (true, Content::Difference) => PageKind::Zero,
        }
    }

    fn add(
        &mut self,
        offset: u64,
        bytes: &[u8],
        kind: Option<PageKind>,
    ) -> Result<(), MemoryError> {
        let run = PageRun {
            first: offset / PAGE_BYTES,
            count: bytes.len() as u64 / PAGE_BYTES,
        };
        let stored = match kind {
            Some(PageKind::Stored) => true,
            Some(PageKind::Zero) => false,
            Some(PageKind::Same) | None => return Ok(()),
        };
        if run.count == 0 {
            return Ok(());
        }
        let mut entry = Entry {
            run,
            offset: None,
            crc: 0,
        };
        if stored {
            entry.offset = Some(self.offset);
            entry.crc = crc32c::crc32c(bytes);
            self.target
                .write_all_at(bytes, self.offset)
                .map_err(MemoryError::file("write"))?;
            self.offset += run.bytes();
        }
        self.entries.push(entry);
        Ok(())
    }

    fn finish(self) -> Result<(), MemoryError> {
        let mut index = Vec::with_capacity(self.entries.len() * ENTRY_BYTES);
        for entry in &self.entries {
            let zero = if entry.offset.is_none() { ZERO } else { 0 };
            index.extend(entry.run.first.to_le_bytes());
            index.extend((entry.run.count | zero).to_le_bytes());
            index.extend(u64::from(entry.crc).to_le_bytes());
        }
        let count = self.entries.len() as u64;
        let checked = checked_part(self.content, self.memory_bytes, count, self.offset);
        let header = Header {
            content: self.content,
            memory_bytes: self.memory_bytes,
            entry_count: count,
            index_offset: self.offset,
            crc: crc32c::crc32c_append(crc32c::crc32c(&checked), &index),
            checked,
        };
        let failed = MemoryError::file("write");
        let length = self.offset + index.len() as u64;
        self.target.set_len(length).map_err(&failed)?;
        self.target
            .write_all_at(&index, self.offset)
            .map_err(&failed)?;
        self.target
            .write_all_at(&header.encode(), 0)
            .map_err(&failed)
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum PageKind {
    Stored,
    Zero,
    /// Not stored: the memory below has it, or it is zero in a whole memory.
    Same,
}

fn is_zero(page: &[u8]) -> bool {
    // In words, which the compiler makes wide.
    let (chunks, rest) = page.as_chunks::<16>();
    chunks.iter().all(|chunk| u128::from_ne_bytes(*chunk) == 0)
        && rest.iter().all(|byte| *byte == 0)
}

/// An anonymous file for guest memory or pages.
///
/// # Errors
///
/// The kernel refused it.
pub fn anonymous_file(name: &str, size: u64) -> Result<File, MemoryError> {
    let make = || {
        let flags = rustix::fs::MemfdFlags::CLOEXEC | rustix::fs::MemfdFlags::ALLOW_SEALING;
        let file = rustix::fs::memfd_create(name, flags)?;
        rustix::fs::ftruncate(&file, size)?;
        Ok(File::from(file))
    };
    make().map_err(|errno: Errno| MemoryError::File {
        action: "make",
        source: errno.into(),
    })
}

/// Lets nobody map an anonymous file for writing or write to it from now on; mappings that are there
/// can still be written to.
///
/// # Errors
///
/// The file was not made by [`anonymous_file`], or the kernel is older than 5.1.
pub fn seal_ahead(file: impl AsFd) -> Result<(), MemoryError> {
    use rustix::fs::SealFlags;
    let seals = SealFlags::FUTURE_WRITE | SealFlags::SHRINK | SealFlags::GROW;
    rustix::fs::fcntl_add_seals(file, seals).map_err(|errno| MemoryError::File {
        action: "seal",
        source: errno.into(),
    })
}

/// Makes an anonymous file one that nobody can change any more. No process may have it mapped for
/// writing.
///
/// # Errors
///
/// A process still has.
pub fn seal(file: impl AsFd) -> Result<(), MemoryError> {
    use rustix::fs::SealFlags;
    let seals = SealFlags::WRITE | SealFlags::SHRINK | SealFlags::GROW;
    rustix::fs::fcntl_add_seals(file, seals).map_err(|errno| MemoryError::File {
        action: "seal",
        source: errno.into(),
    })
}
