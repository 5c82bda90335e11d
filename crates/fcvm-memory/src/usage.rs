//! What a guest's memory takes of the host's, as the kernel counts it for a process.

use std::fs::File;
use std::io::{BufRead, BufReader};

use crate::error::MemoryError;

/// Name of the anonymous file that guest memory is, in /proc/PID/smaps.
const GUEST_MEMORY: &str = "/memfd:fcvm-guest-memory";

/// Memory of a hypervisor's process, in bytes (proc_pid_smaps(5)).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct MemoryUsage {
    /// Of the guest's memory: the process's part of what it shares, and what it has alone.
    pub guest_pss_bytes: u64,
    /// Of the guest's memory: what only this process has, because the guest wrote it.
    pub guest_private_bytes: u64,
    /// Of the guest's memory: what is mapped, shared or not.
    pub guest_resident_bytes: u64,
    /// All of the process's, hugepages too.
    pub pss_bytes: u64,
    /// All of the process's that the host has swapped out.
    pub swapped_bytes: u64,
}

/// Reads the usage of a process.
///
/// # Errors
///
/// It has ended, or is another user's.
pub fn usage(pid: i32) -> Result<MemoryUsage, MemoryError> {
    let failed = |source| MemoryError::Process {
        action: "measure",
        pid,
        source,
    };
    let smaps = File::open(format!("/proc/{pid}/smaps")).map_err(failed)?;
    sum(BufReader::new(smaps)).map_err(failed)
}

fn sum(smaps: impl BufRead) -> std::io::Result<MemoryUsage> {
    let mut usage = MemoryUsage::default();
    let mut is_guest = false;
    for line in smaps.lines() {
        let line = line?;
        let Some((name, value)) = line.split_once(':') else {
            continue;
        };
        // A field, or the line that begins a mapping: addresses, permissions, file.
        if name.contains(' ') {
            is_guest = line.contains(GUEST_MEMORY);
            continue;
        }
        let Some(kib) = value.trim().strip_suffix(" kB") else {
            continue;
        };
        let bytes = kib.trim().parse::<u64>().unwrap_or(0) * 1024;
        match name {
            "Pss" => {
                usage.pss_bytes += bytes;
                if is_guest {
                    usage.guest_pss_bytes += bytes;
                }
            }
            // Counted in neither Rss nor Pss. Where several processes map them each has them.
            "Private_Hugetlb" | "Shared_Hugetlb" => usage.pss_bytes += bytes,
            "Swap" => usage.swapped_bytes += bytes,
            "Private_Clean" | "Private_Dirty" if is_guest => usage.guest_private_bytes += bytes,
            "Rss" if is_guest => usage.guest_resident_bytes += bytes,
            _ => {}
        }
    }
    Ok(usage)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guest_memory_is_told_from_the_rest() {
        let text = "\
7f00-7f80 rw-p 00000000 00:01 42    /memfd:fcvm-guest-memory (deleted)
Size:             262144 kB
Rss:                9000 kB
Pss:                3500 kB
Private_Clean:         4 kB
Private_Dirty:      1000 kB
VmFlags: rd wr mr mw me
7f90-7f91 r--p 00000000 00:01 43    /usr/lib/x:y.so
Rss:                 100 kB
Pss:                  50 kB
Private_Dirty:        20 kB
Swap:                  8 kB
SwapPss:               4 kB
7fa0-7fa1 rw-p 00000000 00:0f 44    /anon_hugepage (deleted)
Pss:                   0 kB
Shared_Hugetlb:        0 kB
Private_Hugetlb:    4096 kB
";
        let usage = sum(text.as_bytes()).unwrap();
        assert_eq!(usage.guest_pss_bytes, 3500 << 10);
        assert_eq!(usage.guest_private_bytes, 1004 << 10);
        assert_eq!(usage.guest_resident_bytes, 9000 << 10);
        assert_eq!(usage.pss_bytes, (3550 + 4096) << 10);
        assert_eq!(usage.swapped_bytes, 8 << 10);
        assert!(
            super::usage(i32::try_from(std::process::id()).unwrap())
                .unwrap()
                .pss_bytes
                > 0
        );
    }
}
