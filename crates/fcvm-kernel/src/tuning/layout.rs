//! Which processor does what: housekeeping (interrupts, RCU callbacks, timers, kernel threads) on the
//! first ones, guests on the others, and how the kernel's threads are scheduled.

use serde::Serialize;

use super::Workload;

/// With fewer processors, one that does only housekeeping costs more than it gives.
pub(super) const ISOLATION_CPUS_MIN: u32 = 4;

/// The division of the processors.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct CpuLayout {
    /// Online processors.
    pub cpu_count: u32,
    /// Processors for housekeeping, from 0 on; all where there is no isolation.
    pub housekeeping_count: u32,
    /// The others, as the kernel writes lists; empty where there is no isolation.
    pub isolated: String,
    /// Why this division.
    pub reason: String,
    /// How kernel threads are scheduled.
    pub threads: Vec<KernelThread>,
}

/// How kernel threads are scheduled.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct KernelThread {
    /// Pattern of their names, for `pgrep`.
    pub pattern: &'static str,
    /// Scheduling policy: `fifo` or `other`.
    pub policy: &'static str,
    /// Priority of FIFO (1 lowest), nice value otherwise.
    pub priority: i32,
    /// Processors they may run on, as a list; `None` where the kernel binds them.
    pub cpus: Option<String>,
    /// Why.
    pub reason: &'static str,
}

impl CpuLayout {
    /// Whether some processors are kept free of housekeeping.
    pub fn is_isolated(&self) -> bool {
        !self.isolated.is_empty()
    }

    /// The housekeeping processors as a list.
    pub fn housekeeping(&self) -> String {
        list(0, self.housekeeping_count - 1)
    }

    /// The housekeeping processors as a mask: hexadecimal words of 32 bits, the highest first.
    pub fn housekeeping_mask(&self) -> String {
        let words: Vec<String> = (0..self.housekeeping_count.div_ceil(32))
            .rev()
            .map(|word| {
                let bits = (self.housekeeping_count - word * 32).min(32);
                format!("{:08x}", (1_u64 << bits) - 1)
            })
            .collect();
        words.join(",")
    }
}

fn list(first: u32, last: u32) -> String {
    if first == last {
        first.to_string()
    } else {
        format!("{first}-{last}")
    }
}

pub(super) fn lay_out(cpu_count: u32, workload: Workload) -> CpuLayout {
    if workload == Workload::Throughput || cpu_count < ISOLATION_CPUS_MIN {
        return CpuLayout {
            cpu_count,
            housekeeping_count: cpu_count,
            isolated: String::new(),
            reason: match workload {
                Workload::Throughput => {
                    "every processor does everything: isolation costs throughput"
                }
                Workload::Latency => "too few processors to set one aside",
            }
            .to_owned(),
            threads: shared_threads(workload),
        };
    }
    // ZFS checksums and compresses on the housekeeping processors too, as far as its threads are bound.
    let housekeeping_count = (cpu_count / 8).clamp(1, 8);
    let housekeeping = list(0, housekeeping_count - 1);
    let isolated = list(housekeeping_count, cpu_count - 1);
    CpuLayout {
        cpu_count,
        housekeeping_count,
        reason: format!(
            "one in eight processors, at least 1 and at most 8, does the housekeeping ({housekeeping}); guests have the \
             others ({isolated}) without ticks, callbacks and device interrupts"
        ),
        threads: isolated_threads(&housekeeping),
        isolated,
    }
}

fn shared_threads(workload: Workload) -> Vec<KernelThread> {
    let mut threads = vec![KernelThread {
        pattern: "^z_wr_iss",
        policy: "other",
        priority: 10,
        cpus: None,
        reason: "compression and checksums of ZFS must not starve guests",
    }];
    if workload == Workload::Latency {
        threads.push(KernelThread {
            pattern: "^rcu(_preempt|b/|c/)",
            policy: "fifo",
            priority: 1,
            cpus: None,
            reason: "grace periods end although guests keep the processors busy",
        });
    }
    threads
}

fn isolated_threads(housekeeping: &str) -> Vec<KernelThread> {
    let on_housekeeping = || Some(housekeeping.to_owned());
    vec![
        KernelThread {
            pattern: "^irq/",
            policy: "fifo",
            priority: 50,
            cpus: on_housekeeping(),
            reason: "handlers of devices come before all other work (the kernel's own priority)",
        },
        KernelThread {
            pattern: "^rcu(_preempt|b/|c/)",
            policy: "fifo",
            priority: 2,
            cpus: None,
            reason: "grace periods end although guests keep the processors busy; above the callbacks they wait for",
        },
        KernelThread {
            pattern: "^rcuo",
            policy: "fifo",
            priority: 1,
            cpus: on_housekeeping(),
            reason: "callbacks of the guests' processors run here instead",
        },
        KernelThread {
            pattern: "^(kswapd|kcompactd|khugepaged|ksmd)",
            policy: "other",
            priority: 0,
            cpus: on_housekeeping(),
            reason: "reclaim and compaction hold locks for long",
        },
        KernelThread {
            pattern: "^(txg_sync|txg_quiesce|arc_|dbuf_evict|l2arc_feed|z_wr_iss)",
            policy: "other",
            priority: 0,
            cpus: on_housekeeping(),
            reason: "a transaction group's burst of compression stays away from guests",
        },
    ]
}
