//! How to tune a host of VMs with ZFS: what fits into its memory, and the settings that make it so.
//!
//! Pure functions: [`plan`] makes a [`Plan`] of a [`Request`], the same for the same request. Reading
//! the running machine is the caller's business ([`machine`] understands what the kernel says), and so
//! is writing ([`Plan::files`] says what to write). Every number carries its reason.

mod files;
mod layout;
pub mod machine;
mod memory;
mod settings;
#[cfg(test)]
mod tests;

use serde::Serialize;

pub use files::PlannedFile;
pub use layout::{CpuLayout, KernelThread};
pub use memory::{Memory, Share, default_arc_max_bytes};
pub use settings::{Place, Setting};

/// What the host is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Workload {
    /// Short waits: processors without ticks and callbacks, small amounts of dirty data.
    Latency,
    /// Much work: no isolation, large amounts of dirty data.
    Throughput,
}

/// The part of a ZFS version that the defaults depend on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct ZfsVersion {
    /// 2 of 2.3.9.
    pub major: u32,
    /// 3 of 2.3.9.
    pub minor: u32,
}

/// How large the ARC may become.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ArcChoice {
    /// As large as the plan allows and the pool can use.
    Planned,
    /// What the module takes when nothing is said.
    ModuleDefault,
    /// So many bytes.
    Bytes(u64),
}

/// What is known of the machine and wanted from it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Request {
    /// All memory the kernel manages (`MemTotal`), hugepages included.
    pub memory_bytes: u64,
    /// Size of one hugepage.
    pub hugepage_bytes: u64,
    /// Number of hugepages, reserved for guests; `None` for as many as the guests need.
    pub hugepage_count: Option<u64>,
    /// Guests that run at the same time.
    pub guest_count: u64,
    /// Memory of each guest.
    pub guest_memory_bytes: u64,
    /// Online processors.
    pub cpu_count: u32,
    /// Size of the pools; `None` where there is no ZFS.
    pub pool_tib: Option<u64>,
    /// What the host is for.
    pub workload: Workload,
    /// The ZFS that runs.
    pub zfs: ZfsVersion,
    /// How large the ARC may become.
    pub arc: ArcChoice,
}

/// A plan: shares of the memory that fit, and the settings that make them so.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Plan {
    /// What the host is for.
    pub workload: Workload,
    /// The ZFS whose defaults were assumed; `None` without a pool.
    pub zfs: Option<ZfsVersion>,
    /// Where the memory goes.
    pub memory: Memory,
    /// Which processor does what.
    pub cpus: CpuLayout,
    /// Every setting, with its reason.
    pub settings: Vec<Setting>,
    /// What to know before it is used.
    pub warnings: Vec<String>,
}

/// Why there is no plan.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum TuningError {
    /// A number that means nothing.
    #[error("{what} cannot be {value}: {rule}")]
    Value {
        /// Which number.
        what: &'static str,
        /// What it was.
        value: u64,
        /// What it may be.
        rule: &'static str,
    },
    /// The shares are more than the memory.
    #[error(
        "this does not fit into {total}: {arithmetic} = {needed}, {missing} too much; {advice}"
    )]
    DoesNotFit {
        /// All memory.
        total: String,
        /// The shares, with their sizes, added.
        arithmetic: String,
        /// Their sum.
        needed: String,
        /// How much is missing.
        missing: String,
        /// What can be changed.
        advice: String,
    },
}

/// Makes a plan, or says why it cannot fit.
pub fn plan(request: &Request) -> Result<Plan, TuningError> {
    check(request)?;
    let memory = memory::divide(request)?;
    let cpus = layout::lay_out(request.cpu_count, request.workload);
    let settings = settings::settings(request, &memory, &cpus);
    Ok(Plan {
        workload: request.workload,
        zfs: request.pool_tib.map(|_| request.zfs),
        warnings: warnings(request, &memory),
        memory,
        cpus,
        settings,
    })
}

/// Beyond this no machine is, and no sum of the plan overflows.
const MEMORY_BYTES_MAX: u64 = 1 << 50;
const COUNT_MAX: u64 = 1 << 32;
/// 1 EiB of pool.
const POOL_TIB_MAX: u64 = 1 << 20;

fn check(request: &Request) -> Result<(), TuningError> {
    let ranges: [(&'static str, u64, bool, &'static str); 7] = [
        (
            "the memory",
            request.memory_bytes,
            (1..=MEMORY_BYTES_MAX).contains(&request.memory_bytes),
            "write the size of the machine's memory, at most 1 PiB",
        ),
        (
            "the hugepage size",
            request.hugepage_bytes,
            [2 << 20, 1 << 30].contains(&request.hugepage_bytes),
            "processors have hugepages of 2m and 1g",
        ),
        (
            "the number of hugepages",
            request.hugepage_count.unwrap_or(0),
            request.hugepage_count.unwrap_or(0) <= COUNT_MAX,
            "at most 2^32",
        ),
        (
            "the number of guests",
            request.guest_count,
            request.guest_count <= COUNT_MAX,
            "at most 2^32",
        ),
        (
            "the memory of a guest",
            request.guest_memory_bytes,
            request.guest_memory_bytes <= MEMORY_BYTES_MAX
                && (request.guest_count == 0) == (request.guest_memory_bytes == 0),
            "say both the number of guests and the memory of each, at most 1 PiB",
        ),
        (
            "the number of processors",
            request.cpu_count.into(),
            (1..=8192).contains(&request.cpu_count),
            "Linux has 1 to 8192",
        ),
        (
            "the pool's size in TiB",
            request.pool_tib.unwrap_or(0),
            request.pool_tib.unwrap_or(0) <= POOL_TIB_MAX,
            "at most 2^20",
        ),
    ];
    ranges
        .into_iter()
        .find(|(_, _, good, _)| !good)
        .map_or(Ok(()), |(what, value, _, rule)| {
            Err(TuningError::Value { what, value, rule })
        })
}

fn warnings(request: &Request, memory: &Memory) -> Vec<String> {
    let mut warnings = Vec::new();
    if let Some(reason) = memory::default_would_crash(request, memory) {
        warnings.push(reason);
    }
    if memory.hugepage_bytes > 0 {
        warnings.push(
            "hugepages are taken from everything else, and only guests that ask for them use them: VMs of fcvm do so with \
             --hypervisor firecracker --hugepages only"
                .to_owned(),
        );
    }
    if request.workload == Workload::Latency && request.cpu_count < layout::ISOLATION_CPUS_MIN {
        warnings.push(format!(
            "{} processors are too few to keep one free of interrupts and callbacks: that part of the latency \
             settings is left out (from {} on)",
            request.cpu_count,
            layout::ISOLATION_CPUS_MIN
        ));
    }
    warnings
}

/// A size as people write it.
fn size(bytes: u64) -> String {
    fcvm_types::ByteSize::from_bytes(bytes).to_string()
}
