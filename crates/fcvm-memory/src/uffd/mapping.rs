//! Mappings: the memory that pages are served from, and that of a process they are served to.

use std::fs::File;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::fs::SealFlags;
use rustix::mm::{Advice, MapFlags, ProtFlags};

use super::raw::Userfault;

/// Bytes of the words that [`GuestMemory`] is seen as.
const WORD_BYTES: u64 = 8;

/// A sealed file, mapped for reading: its bytes never change.
#[derive(Debug)]
pub(super) struct SealedMapping {
    start: *mut u8,
    bytes: usize,
}

// SAFETY: the mapping is only read, and nobody can change or shorten what is mapped.
unsafe impl Send for SealedMapping {}
// SAFETY: as above.
unsafe impl Sync for SealedMapping {}

impl SealedMapping {
    /// Maps all of a file.
    ///
    /// # Errors
    ///
    /// It is not sealed against writing and shrinking, it is empty, or there is no address space left.
    pub(super) fn new(file: &File) -> io::Result<Self> {
        let seals = rustix::fs::fcntl_get_seals(file).unwrap_or(SealFlags::empty());
        if !seals.contains(SealFlags::WRITE | SealFlags::SHRINK) {
            return Err(io::Error::other("it can still change: it must be sealed"));
        }
        let bytes = usize::try_from(file.metadata()?.len()).map_err(io::Error::other)?;
        // SAFETY: a new mapping at an address of the kernel's choice. Private, because older kernels
        // share no sealed file; without writing it has the file's own pages all the same.
        let start = unsafe {
            let null = std::ptr::null_mut();
            rustix::mm::mmap(null, bytes, ProtFlags::READ, MapFlags::PRIVATE, file, 0)
        }?;
        Ok(Self {
            start: start.cast(),
            bytes,
        })
    }

    pub(super) fn as_slice(&self) -> &[u8] {
        // SAFETY: the mapping is that long and there as long as `self`; its bytes cannot change, as
        // the file is sealed.
        unsafe { std::slice::from_raw_parts(self.start, self.bytes) }
    }

    /// Enters pages into the page table ahead, so that the kernel finds them when it copies. Where it
    /// cannot, the first copy of a page takes longer.
    pub(super) fn populate(&self, offset: u64, bytes: u64) {
        let (Ok(offset), Ok(bytes)) = (usize::try_from(offset), usize::try_from(bytes)) else {
            return;
        };
        if offset
            .checked_add(bytes)
            .is_some_and(|end| end <= self.bytes)
        {
            // SAFETY: the range is in the mapping, and the advice changes no bytes.
            let _ = unsafe {
                let start = self.start.add(offset).cast();
                rustix::mm::madvise(start, bytes, Advice::LinuxPopulateRead)
            };
        }
    }
}

impl Drop for SealedMapping {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours, and no slice of it outlives `self`.
        let _ = unsafe { rustix::mm::munmap(self.start.cast(), self.bytes) };
    }
}

/// Anonymous memory as a hypervisor gives to a guest: what a client of the memory server registers.
/// For tests and measurements of the server.
#[derive(Debug)]
pub struct GuestMemory {
    start: *mut u8,
    bytes: usize,
}

// SAFETY: it is reached by atomic words only.
unsafe impl Send for GuestMemory {}
// SAFETY: as above.
unsafe impl Sync for GuestMemory {}

impl GuestMemory {
    /// Memory in pages of 4096 bytes, or in hugepages of 2 MiB.
    ///
    /// # Errors
    ///
    /// The host has none, or not so many hugepages.
    pub fn anonymous(bytes: u64, is_huge: bool) -> io::Result<Self> {
        let bytes = usize::try_from(bytes).map_err(io::Error::other)?;
        let mut flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
        if is_huge {
            // Reserved, so that what the host does not have is told here.
            flags = MapFlags::PRIVATE | MapFlags::HUGETLB | MapFlags::HUGE_2MB;
        }
        let access = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice.
        let start =
            unsafe { rustix::mm::mmap_anonymous(std::ptr::null_mut(), bytes, access, flags) }?;
        let own = Self {
            start: start.cast(),
            bytes,
        };
        if !is_huge {
            // Pages are served one by one.
            // SAFETY: the mapping is ours.
            unsafe { rustix::mm::madvise(start, bytes, Advice::LinuxNoHugepage) }?;
        }
        Ok(own)
    }

    /// A copy-on-write view of a file, as a hypervisor that restores memory from one has.
    ///
    /// # Errors
    ///
    /// The file is empty, or there is no address space left.
    pub fn of_file(file: &File) -> io::Result<Self> {
        let bytes = usize::try_from(file.metadata()?.len()).map_err(io::Error::other)?;
        let access = ProtFlags::READ | ProtFlags::WRITE;
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
        // SAFETY: a new mapping at an address of the kernel's choice.
        let start =
            unsafe { rustix::mm::mmap(std::ptr::null_mut(), bytes, access, flags, file, 0) }?;
        Ok(Self {
            start: start.cast(),
            bytes,
        })
    }

    /// Where it begins.
    pub fn address(&self) -> u64 {
        self.start as u64
    }

    /// Its size in bytes.
    pub fn bytes(&self) -> u64 {
        self.bytes as u64
    }

    /// Has faults in a part of it told by `userfault`. The rest stays as it is.
    ///
    /// # Errors
    ///
    /// Another one has it.
    pub fn register(&self, userfault: &Userfault) -> io::Result<()> {
        // SAFETY: the mapping is ours, and reached only by atomic words, which may change at any time.
        unsafe { userfault.register(self.address(), self.bytes()) }
    }

    /// The word at an offset in bytes, a multiple of 8. Waits where its page is not there yet.
    ///
    /// # Panics
    ///
    /// There is no such word.
    pub fn word(&self, offset: u64) -> &AtomicU64 {
        assert!(offset.is_multiple_of(WORD_BYTES) && offset < self.bytes() & !(WORD_BYTES - 1));
        // SAFETY: in the mapping and aligned; memory that the kernel may fill is valid as any number.
        unsafe { &*self.start.add(offset as usize).cast::<AtomicU64>() }
    }

    /// Reads bytes in whole words.
    ///
    /// # Panics
    ///
    /// They are not in it.
    pub fn read(&self, offset: u64, bytes: &mut [u8]) {
        for (index, part) in bytes.as_chunks_mut::<8>().0.iter_mut().enumerate() {
            let at = offset + index as u64 * WORD_BYTES;
            *part = self.word(at).load(Ordering::Relaxed).to_ne_bytes();
        }
    }

    /// Gives pages back to the host: they are zero from now on. Returns when the server has been told.
    ///
    /// # Errors
    ///
    /// The range is not in whole pages of it.
    pub fn discard(&self, offset: u64, bytes: u64) -> io::Result<()> {
        let end = offset.checked_add(bytes);
        if end.is_none_or(|end| end > self.bytes()) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        // SAFETY: in the mapping, whose words may change at any time.
        let done = unsafe {
            let start = self.start.add(offset as usize).cast();
            rustix::mm::madvise(start, bytes as usize, Advice::LinuxDontNeed)
        };
        Ok(done?)
    }
}

impl Drop for GuestMemory {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours, and no word of it outlives `self`.
        let _ = unsafe { rustix::mm::munmap(self.start.cast(), self.bytes) };
    }
}
