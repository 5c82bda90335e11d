//! The settings of a plan: where each is written, its value and its reason.

use serde::Serialize;

use super::layout::CpuLayout;
use super::memory::Memory;
use super::{ArcChoice, Request, Workload, ZfsVersion, size};

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

/// Where a setting is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Place {
    /// `/etc/sysctl.d`.
    Sysctl,
    /// `/etc/modprobe.d`, and `zfs.NAME=VALUE` on the command line where ZFS is built in.
    ZfsModule,
    /// The kernel's command line.
    CommandLine,
    /// A file of sysfs, written at boot through `/etc/tmpfiles.d`.
    Sysfs,
}

/// One setting.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Setting {
    /// Where it is written.
    pub place: Place,
    /// Its name there.
    pub name: &'static str,
    /// Its value; empty for words of the command line that have none.
    pub value: String,
    /// Why this value, and what it costs.
    pub reason: String,
}

impl Setting {
    /// `name=value`, or the name alone.
    pub fn assignment(&self) -> String {
        if self.value.is_empty() {
            self.name.to_owned()
        } else {
            format!("{}={}", self.name, self.value)
        }
    }
}

/// Collects settings of one place after the other.
struct Sheet {
    settings: Vec<Setting>,
    place: Place,
}

impl Sheet {
    fn add(&mut self, name: &'static str, value: impl ToString, reason: impl Into<String>) {
        self.settings.push(Setting {
            place: self.place,
            name,
            value: value.to_string(),
            reason: reason.into(),
        });
    }

    fn at(&mut self, place: Place) -> &mut Self {
        self.place = place;
        self
    }
}

pub(super) fn settings(request: &Request, memory: &Memory, cpus: &CpuLayout) -> Vec<Setting> {
    let mut sheet = Sheet {
        settings: Vec::new(),
        place: Place::Sysctl,
    };
    sysctls(sheet.at(Place::Sysctl), request, memory);
    if request.pool_tib.is_some() {
        zfs(sheet.at(Place::ZfsModule), request, memory);
    }
    hugepages(sheet.at(Place::CommandLine), memory);
    command_line(sheet.at(Place::CommandLine), request.workload, cpus);
    sysfs(sheet.at(Place::Sysfs), cpus);
    sheet.settings
}

fn sysctls(sheet: &mut Sheet, request: &Request, memory: &Memory) {
    let rest = memory.total_bytes - memory.hugepage_bytes;
    let min_free = (rest / 256).clamp(8 * MIB, GIB).min(memory.host_bytes / 2);
    sheet.add(
        "vm.min_free_kbytes",
        min_free >> 10,
        format!(
            "{}, 1/256 of what is not in hugepages: the ARC gives memory back slower than guests take it; a part of \
             the host's share",
            size(min_free)
        ),
    );
    sheet.add(
        "vm.swappiness",
        if request.workload == Workload::Latency {
            1
        } else {
            10
        },
        "guests' memory is anonymous: swapping it out stalls them; the ARC shrinks first",
    );
    sheet.add(
        "vm.max_map_count",
        1 << 20,
        "a clone whose memory is mapped page by page has many mappings; costs nothing unused",
    );
    sheet.add(
        "fs.aio-max-nr",
        1 << 20,
        "each disk of a guest reserves requests; the default of 65536 ends at about 60 disks",
    );
    if memory.hugepage_count > 0 && memory.hugepage_size_bytes < GIB {
        sheet.add(
            "vm.nr_hugepages",
            memory.hugepage_count,
            "as on the command line, for a kernel that is not started anew (it may get fewer: see \
             HugePages_Total)",
        );
    }
    sysctls_of_workload(sheet, request.workload);
}

fn sysctls_of_workload(sheet: &mut Sheet, workload: Workload) {
    match workload {
        Workload::Latency => {
            sheet.add(
                "vm.stat_interval",
                10,
                "statistics wake each processor every 10 s, not every second",
            );
            sheet.add(
                "vm.compaction_proactiveness",
                0,
                "no compaction before memory is asked for: it stalls; costs huge pages on demand",
            );
            sheet.add(
                "kernel.nmi_watchdog",
                0,
                "frees a counter and an interrupt per processor; costs the report of hard lockups",
            );
            sheet.add(
                "kernel.timer_migration",
                1,
                "timers go to processors that are awake, away from guests",
            );
        }
        Workload::Throughput => {
            sheet.add(
                "vm.zone_reclaim_mode",
                0,
                "memory of another node is better than reclaim on this one",
            );
            sheet.add(
                "kernel.sched_autogroup_enabled",
                0,
                "VMs share by their weights, not by the session that started them",
            );
        }
    }
}

fn zfs(sheet: &mut Sheet, request: &Request, memory: &Memory) {
    let latency = request.workload == Workload::Latency;
    if request.arc != ArcChoice::ModuleDefault {
        let share = memory.shares.iter().find(|share| share.name == "arc");
        sheet.add(
            "zfs_arc_max",
            memory.arc_max_bytes,
            format!(
                "{}: {} (the default would be {})",
                size(memory.arc_max_bytes),
                share.map_or("", |share| &share.reason),
                size(memory.arc_default_bytes),
            ),
        );
        sheet.add(
            "zfs_arc_min",
            memory.arc_min_bytes,
            format!(
                "{}: 1/32 of what is not in hugepages, at least 32 MiB, at most half of zfs_arc_max; the default counts \
                 hugepages, and ZFS ignores a maximum that is not above the minimum",
                size(memory.arc_min_bytes)
            ),
        );
    }
    let rest = memory.total_bytes - memory.hugepage_bytes;
    let cap = if latency { GIB } else { 4 * GIB };
    let dirty = (rest / 10).min(cap).min(memory.arc_max_bytes / 2);
    sheet.add(
        "zfs_dirty_data_max",
        dirty,
        format!(
            "{}: 10 % of what is not in hugepages (the default counts those too), at most {} and half of the ARC; {}",
            size(dirty),
            size(cap),
            if latency { "less to write at once stalls writers for less long" } else { "more is gathered before it is written" }
        ),
    );
    if latency {
        sheet.add(
            "zfs_default_ibs",
            14,
            "indirect blocks of 16 KiB, like the records: a small write rewrites less; costs a level more in very large \
             files; of files written from now on",
        );
    }
    if request.zfs >= (ZfsVersion { major: 2, minor: 3 }) {
        sheet.add(
            "zfs_bclone_enabled",
            1,
            "copies of disks and images share their blocks (cp --reflink)",
        );
    }
}

fn hugepages(sheet: &mut Sheet, memory: &Memory) {
    if memory.hugepage_count == 0 {
        return;
    }
    let name = if memory.hugepage_size_bytes == GIB {
        "1G"
    } else {
        "2M"
    };
    sheet.add("hugepagesz", name, "the pages that the next word counts");
    sheet.add(
        "hugepages",
        memory.hugepage_count,
        format!(
            "{} for guests, taken at boot while memory is in one piece",
            size(memory.hugepage_bytes)
        ),
    );
}

fn command_line(sheet: &mut Sheet, workload: Workload, cpus: &CpuLayout) {
    sheet.add(
        "transparent_hugepage",
        "madvise",
        "only memory that asks for it gets large pages: they are made by compaction, which stalls",
    );
    if workload == Workload::Throughput {
        sheet.add(
            "preempt",
            "voluntary",
            "fewer switches; costs latency; needs PREEMPT_DYNAMIC",
        );
        return;
    }
    sheet.add(
        "preempt",
        "full",
        "a woken guest runs at once; costs some throughput; needs PREEMPT_DYNAMIC",
    );
    sheet.add(
        "threadirqs",
        "",
        "handlers of devices can be preempted and given priorities; costs a switch per interrupt",
    );
    sheet.add(
        "skew_tick",
        1,
        "processors tick one after the other: they do not wait for the same locks",
    );
    sheet.add(
        "rcutree.kthread_prio",
        2,
        "RCU's threads are FIFO: grace periods end on a busy host; needs RCU_BOOST",
    );
    if !cpus.is_isolated() {
        return;
    }
    let isolated = &cpus.isolated;
    sheet.add(
        "nohz_full",
        isolated,
        "no tick while one thread runs; costs a little at each entry into the kernel",
    );
    sheet.add(
        "rcu_nocbs",
        isolated,
        "RCU callbacks of these processors run on the housekeeping ones",
    );
    sheet.add("rcu_nocb_poll", "", "guests' processors need not wake the callback threads; these poll, on housekeeping processors");
    sheet.add(
        "irqaffinity",
        cpus.housekeeping(),
        "device interrupts go to the housekeeping processors",
    );
    sheet.add(
        "isolcpus",
        format!("managed_irq,{isolated}"),
        "also the interrupts that drivers place; not 'domain', which would end balancing and pile the virtual processors \
         on one",
    );
}

fn sysfs(sheet: &mut Sheet, cpus: &CpuLayout) {
    if cpus.is_isolated() {
        for name in [
            "/sys/devices/virtual/workqueue/cpumask",
            "/sys/bus/workqueue/devices/writeback/cpumask",
        ] {
            sheet.add(
                name,
                cpus.housekeeping_mask(),
                "unbound kernel work stays on the housekeeping processors",
            );
        }
    }
}
