//! Which pages of a mapping are private to a process: /proc/PID/pagemap.
//!
//! Linux 6.7 and later tell runs of them in one call (PAGEMAP_SCAN, Documentation/admin-guide/mm/pagemap.rst);
//! before, each page has a word with a bit for "belongs to a file".

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

/// A part of an address space, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct AddressRange {
    pub(crate) start: u64,
    pub(crate) end: u64,
}

const PAGE_BYTES: u64 = crate::PAGE_BYTES;
/// Runs that one call tells.
const REGIONS: usize = 512;

const PAGE_IS_FILE: u64 = 1 << 2;
const PAGE_IS_PRESENT: u64 = 1 << 3;
const PAGE_IS_SWAPPED: u64 = 1 << 4;
/// `_IOWR('f', 16, struct pm_scan_arg)`
const PAGEMAP_SCAN: libc::Ioctl = 0xc060_6610_u32 as libc::Ioctl;

/// `struct page_region`
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Region {
    start: u64,
    end: u64,
    categories: u64,
}

/// `struct pm_scan_arg`
#[repr(C)]
struct ScanArgument {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

/// Finds the private pages of a range, in order.
pub(crate) fn private_pages(pagemap: &File, range: AddressRange) -> io::Result<Vec<AddressRange>> {
    match scan(pagemap, range) {
        Err(error) if matches!(error.raw_os_error(), Some(libc::ENOTTY | libc::EINVAL)) => {
            read_words(pagemap, range)
        }
        result => result,
    }
}

fn scan(pagemap: &File, range: AddressRange) -> io::Result<Vec<AddressRange>> {
    let mut found = Vec::new();
    let mut regions = [Region::default(); REGIONS];
    let mut start = range.start;
    while start < range.end {
        let mut argument = ScanArgument {
            size: size_of::<ScanArgument>() as u64,
            flags: 0,
            start,
            end: range.end,
            walk_end: 0,
            vec: regions.as_mut_ptr() as u64,
            vec_len: REGIONS as u64,
            max_pages: 0,
            // Not of a file, and either in memory or in swap.
            category_inverted: PAGE_IS_FILE,
            category_mask: PAGE_IS_FILE,
            category_anyof_mask: PAGE_IS_PRESENT | PAGE_IS_SWAPPED,
            return_mask: 0,
        };
        // SAFETY: the argument is laid out as the kernel's and says its size; `vec` points to
        // `vec_len` regions that outlive the call, and nothing else is written to.
        let count = unsafe { libc::ioctl(pagemap.as_raw_fd(), PAGEMAP_SCAN, &raw mut argument) };
        if count < 0 {
            return Err(io::Error::last_os_error());
        }
        let told = &regions[..usize::try_from(count).unwrap_or(0).min(REGIONS)];
        found.extend(told.iter().map(|region| AddressRange {
            start: region.start,
            end: region.end,
        }));
        if argument.walk_end <= start {
            return Err(io::Error::other("the kernel's scan does not go on"));
        }
        start = argument.walk_end;
    }
    Ok(joined(found))
}

fn joined(ranges: Vec<AddressRange>) -> Vec<AddressRange> {
    let mut joined: Vec<AddressRange> = Vec::with_capacity(ranges.len());
    for range in ranges {
        match joined.last_mut() {
            Some(last) if last.end == range.start => last.end = range.end,
            _ => joined.push(range),
        }
    }
    joined
}

/// The way of older kernels: a word for each page.
fn read_words(pagemap: &File, range: AddressRange) -> io::Result<Vec<AddressRange>> {
    const PRESENT: u64 = 1 << 63;
    const SWAPPED: u64 = 1 << 62;
    const OF_A_FILE: u64 = 1 << 61;
    let mut found = Vec::new();
    let mut words = vec![0_u8; 64 << 10];
    let mut page = range.start / PAGE_BYTES;
    let end = range.end / PAGE_BYTES;
    while page < end {
        let count = (words.len() as u64 / 8).min(end - page);
        let part = &mut words[..usize::try_from(count * 8).unwrap_or(0)];
        pagemap.read_exact_at(part, page * 8)?;
        for word in part.as_chunks::<8>().0 {
            let word = u64::from_ne_bytes(*word);
            if word & (PRESENT | SWAPPED) != 0 && word & OF_A_FILE == 0 {
                let start = page * PAGE_BYTES;
                found.push(AddressRange {
                    start,
                    end: start + PAGE_BYTES,
                });
            }
            page += 1;
        }
    }
    Ok(joined(found))
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use rustix::mm::{MapFlags, ProtFlags};

    use super::*;

    /// A private mapping of a memory file, with some pages written, some read, some left alone.
    #[test]
    fn both_ways_find_the_pages_that_were_written() {
        let file = rustix::fs::memfd_create("fcvm-test", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        let pages = 3000_usize;
        let length = pages * PAGE_BYTES as usize;
        rustix::fs::ftruncate(&file, length as u64).unwrap();
        let prot = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice; it is unmapped at the end.
        let start = unsafe {
            rustix::mm::mmap(
                std::ptr::null_mut(),
                length,
                prot,
                MapFlags::PRIVATE,
                file.as_fd(),
                0,
            )
        }
        .unwrap();
        let is_written = |page: usize| page < 3 || page.is_multiple_of(7) || page == pages - 1;
        for page in 0..pages {
            // SAFETY: the address is within the mapping.
            unsafe {
                let byte = start.cast::<u8>().add(page * PAGE_BYTES as usize);
                if is_written(page) {
                    byte.write_volatile(1);
                } else if page.is_multiple_of(5) {
                    byte.read_volatile();
                }
            }
        }
        let range = AddressRange {
            start: start as u64,
            end: start as u64 + length as u64,
        };
        let pagemap = File::open("/proc/self/pagemap").unwrap();
        let numbers = |ranges: Vec<AddressRange>| -> Vec<usize> {
            ranges
                .iter()
                .flat_map(|found| {
                    (found.start - range.start) / PAGE_BYTES..(found.end - range.start) / PAGE_BYTES
                })
                .map(|page| page as usize)
                .collect()
        };
        let expected: Vec<usize> = (0..pages).filter(|page| is_written(*page)).collect();
        assert_eq!(numbers(read_words(&pagemap, range).unwrap()), expected);
        assert_eq!(numbers(private_pages(&pagemap, range).unwrap()), expected);
        match scan(&pagemap, range) {
            Ok(found) => assert_eq!(numbers(found), expected),
            Err(error) => println!("skipped: this kernel has no PAGEMAP_SCAN ({error})"),
        }
        // SAFETY: the mapping was made above and nothing refers to it any more.
        unsafe { rustix::mm::munmap(start, length).unwrap() };
    }
}
