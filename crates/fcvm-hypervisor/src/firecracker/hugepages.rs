//! Pages of 2 MiB of the host (hugetlbfs), in which a VM may have its memory: fewer faults and fewer
//! misses of the processor's address cache, for pages that nothing else on the host can use.

use std::io;
use std::path::Path;

use fcvm_types::ByteSize;

use super::NAME;
use crate::error::HypervisorError;

/// Size of such a page.
const PAGE_BYTES: u64 = 2 << 20;
/// What the kernel has of them (its Documentation/admin-guide/mm/hugetlbpage.rst).
const COUNTS: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB";

/// Refuses memory that cannot be in such pages: it is no multiple of them, or the host has not enough of
/// them now. They are not set aside for the VM: it takes one with each first touch, and is killed (SIGBUS)
/// where others have taken the last.
pub(super) fn check(memory: ByteSize) -> Result<(), HypervisorError> {
    let refused = |reason: String| {
        Err(HypervisorError::InvalidSpec {
            what: format!("{memory} of memory in hugepages"),
            reason,
        })
    };
    if !memory.bytes().is_multiple_of(PAGE_BYTES) {
        return refused(format!("{NAME} takes whole pages of 2 MiB"));
    }
    let wanted = memory.bytes() / PAGE_BYTES;
    match available(Path::new(COUNTS)) {
        Ok(available) if available >= wanted => Ok(()),
        Ok(available) => refused(format!(
            "it takes {wanted} pages of 2 MiB and the host has {available} to give: vm.nr_hugepages (sysctl) sets how many it keeps"
        )),
        Err(_) => refused("the host's kernel has no pages of 2 MiB".to_owned()),
    }
}

/// Pages that are free and promised to nobody, and those that the kernel may still make.
fn available(counts: &Path) -> io::Result<u64> {
    let count = |name: &str| -> io::Result<u64> {
        let text = std::fs::read_to_string(counts.join(name))?;
        text.trim().parse().map_err(io::Error::other)
    };
    let free = count("free_hugepages")?.saturating_sub(count("resv_hugepages")?);
    let more = count("nr_overcommit_hugepages")?.saturating_sub(count("surplus_hugepages")?);
    Ok(free + more)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn odd_sizes_are_refused_and_promised_pages_are_not_available() {
        let error = check(ByteSize::from_mib(129)).unwrap_err().to_string();
        assert_eq!(
            error,
            "cannot start a VM with 129 MiB of memory in hugepages: Firecracker takes whole pages of 2 MiB"
        );
        let counts = tempfile::tempdir().unwrap();
        for (name, text) in [
            ("free_hugepages", "100\n"),
            ("resv_hugepages", "30\n"),
            ("nr_overcommit_hugepages", "8\n"),
            ("surplus_hugepages", "3\n"),
        ] {
            std::fs::write(counts.path().join(name), text).unwrap();
        }
        assert_eq!(available(counts.path()).unwrap(), 75);
        let error = check(ByteSize::from_mib(1 << 40)).unwrap_err().to_string();
        assert!(error.contains("2 MiB"), "{error}");
    }
}
