//! The guest's counters, from the kernel's own files. Runs in the agent's root.

use std::fs;

use fcvm_types::guest::GuestStats;
use fcvm_wire::{Failure, Outcome};

/// Nanoseconds of one clock tick of `/proc` (`USER_HZ` is 100 on all of Linux).
pub(super) const TICK_NS: u64 = 10_000_000;
/// Bytes of a page in `/proc`.
pub(super) const PAGE_BYTES: u64 = 4096;
/// Bytes of a sector in /proc/diskstats, whatever the disk's own are.
const SECTOR_BYTES: u64 = 512;

fn text(path: &str) -> String {
    fs::read_to_string(path).unwrap_or_default()
}

/// Reads all counters.
pub(super) fn read() -> Result<Outcome, Failure> {
    let (network_received_bytes, network_sent_bytes) = network(&text("/proc/net/dev"));
    let (disk_read_bytes, disk_written_bytes) = disks(&text("/proc/diskstats"));
    let memory = text("/proc/meminfo");
    let resident = column(&text("/proc/1/statm"), 1);
    let processes = text("/cgroup/container/cgroup.procs").lines().count();
    Ok(Outcome::Stats(GuestStats {
        uptime_ns: uptime_ns(&text("/proc/uptime")),
        cpu_ns: cpu_ns(&text("/proc/stat")),
        memory_total_bytes: memory_bytes(&memory, "MemTotal:"),
        memory_available_bytes: memory_bytes(&memory, "MemAvailable:"),
        network_received_bytes,
        network_sent_bytes,
        disk_read_bytes,
        disk_written_bytes,
        process_count: u32::try_from(processes).unwrap_or(u32::MAX),
        agent_rss_bytes: resident.saturating_mul(PAGE_BYTES),
    }))
}

fn column(line: &str, index: usize) -> u64 {
    line.split_whitespace()
        .nth(index)
        .and_then(|field| field.parse().ok())
        .unwrap_or(0)
}

fn uptime_ns(text: &str) -> u64 {
    let (seconds, rest) = text.split_once('.').unwrap_or((text, "0"));
    let hundredths = rest.split_whitespace().next().unwrap_or("0");
    column(seconds, 0).saturating_mul(1_000_000_000) + column(hundredths, 0) * TICK_NS
}

/// All time of all processors but idle and waiting.
fn cpu_ns(text: &str) -> u64 {
    let line = text.lines().next().unwrap_or_default();
    // user nice system idle iowait irq softirq steal; guest time is part of user time.
    [1, 2, 3, 6, 7]
        .into_iter()
        .map(|index| column(line, index))
        .sum::<u64>()
        .saturating_mul(TICK_NS)
}

fn memory_bytes(text: &str, name: &str) -> u64 {
    let line = text.lines().find(|line| line.starts_with(name));
    column(line.unwrap_or_default(), 1).saturating_mul(1024)
}

fn network(text: &str) -> (u64, u64) {
    let mut sums = (0, 0);
    for line in text.lines().skip(2) {
        if let Some((name, counters)) = line.split_once(':')
            && name.trim() != "lo"
        {
            sums.0 += column(counters, 0);
            sums.1 += column(counters, 8);
        }
    }
    sums
}

fn disks(text: &str) -> (u64, u64) {
    let mut sums = (0, 0);
    for line in text.lines() {
        if line
            .split_whitespace()
            .nth(2)
            .is_some_and(|name| name.starts_with("vd"))
        {
            sums.0 += column(line, 5) * SECTOR_BYTES;
            sums.1 += column(line, 9) * SECTOR_BYTES;
        }
    }
    sums
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_are_read_from_the_kernels_tables() {
        assert_eq!(uptime_ns("12.34 10.00\n"), 12_340_000_000);
        assert_eq!(
            cpu_ns("cpu  1 2 3 400 500 6 7 8 9 10\ncpu0 1\n"),
            19 * TICK_NS
        );
        let memory = "MemTotal:  2048 kB\nMemFree: 1 kB\nMemAvailable: 1024 kB\n";
        assert_eq!(memory_bytes(memory, "MemAvailable:"), 1 << 20);
        let table =
            "Inter-| x\n face |y\n    lo: 9 9 0 0 0 0 0 0 9 9\n  eth0: 70 1 0 0 0 0 0 0 80 2\n";
        assert_eq!(network(table), (70, 80));
        let table = " 254 0 vda 10 0 8 5 20 0 16 5\n 7 0 loop0 1 1 1 1 1 1 1\n";
        assert_eq!(disks(table), (8 * 512, 16 * 512));
    }

    #[test]
    fn missing_tables_count_nothing() {
        assert_eq!(uptime_ns(""), 0);
        assert_eq!(cpu_ns(""), 0);
        assert_eq!(network(""), (0, 0));
    }
}
