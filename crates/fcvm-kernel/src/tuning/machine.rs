//! What the running kernel says of the machine. Texts in, numbers out; nothing is read here.

use super::ZfsVersion;

/// `/proc/meminfo`, as far as a plan needs it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemoryFacts {
    /// `MemTotal`.
    pub total_bytes: u64,
    /// `HugePages_Total`.
    pub hugepage_count: u64,
    /// `Hugepagesize`; 2 MiB where the kernel has none.
    pub hugepage_bytes: u64,
}

/// Reads `/proc/meminfo`; `None` where `MemTotal` is missing or no number.
pub fn parse_meminfo(text: &str) -> Option<MemoryFacts> {
    let number = |name: &str| -> Option<u64> {
        let line = text.lines().find_map(|line| line.strip_prefix(name))?;
        let mut words = line.strip_prefix(':')?.split_ascii_whitespace();
        let number: u64 = words.next()?.parse().ok()?;
        match words.next() {
            Some("kB") => number.checked_mul(1024),
            _ => Some(number),
        }
    };
    Some(MemoryFacts {
        total_bytes: number("MemTotal")?,
        hugepage_count: number("HugePages_Total").unwrap_or(0),
        hugepage_bytes: number("Hugepagesize").unwrap_or(2 << 20),
    })
}

/// Counts the processors of a list like `0-3,8`; `None` where it is none.
pub fn count_cpus(list: &str) -> Option<u32> {
    list.trim().split(',').try_fold(0_u32, |count, range| {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        let (first, last): (u32, u32) = (first.parse().ok()?, last.parse().ok()?);
        count.checked_add(last.checked_sub(first)?.checked_add(1)?)
    })
}

/// Reads a version like `2.3.9-1`, as in `/sys/module/zfs/version`.
pub fn parse_zfs_version(text: &str) -> Option<ZfsVersion> {
    let mut parts = text.trim().trim_start_matches("zfs-").split(['.', '-']);
    Some(ZfsVersion {
        major: parts.next()?.parse().ok()?,
        minor: parts.next()?.parse().ok()?,
    })
}
