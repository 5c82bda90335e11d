//! `fcvm kernel tune`.

use std::path::PathBuf;

use clap::{Args, ValueEnum};
use fcvm_types::ByteSize;

use crate::args::Format;

/// `fcvm kernel tune`.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
        fcvm kernel tune                                        for this machine, nothing is changed\n  \
        fcvm kernel tune --guests 20 --guest-memory 2g          with room for VMs\n  \
        fcvm kernel tune --memory 128g --cpus 32 --pool-tib 40 --hugepages 48 --hugepage-size 1g\n  \
        fcvm kernel tune --hugepages auto --guests 8 --guest-memory 4g --apply-to /   write the settings\n\n\
        What is not told is read from the running machine; with --memory, which means another machine,\n\
        there are no hugepages unless told. A plan that cannot fit is refused, with the sum.")]
pub(crate) struct TuneArguments {
    /// Memory of the machine [default: this one's]
    #[arg(long, value_name = "SIZE")]
    pub(crate) memory: Option<ByteSize>,
    /// Hugepages for guests; 'auto' takes as many as the guests need [default: this machine's]
    #[arg(long, value_name = "N|auto", value_parser = parse_hugepages)]
    pub(crate) hugepages: Option<Hugepages>,
    /// Size of a hugepage: 2m or 1g [default: this machine's]
    #[arg(long, value_name = "SIZE")]
    pub(crate) hugepage_size: Option<ByteSize>,
    /// VMs that run at the same time
    #[arg(long, value_name = "N", requires = "guest_memory", default_value_t = 0)]
    pub(crate) guests: u64,
    /// Memory of each VM
    #[arg(long, value_name = "SIZE", requires = "guests")]
    pub(crate) guest_memory: Option<ByteSize>,
    /// Processors of the machine [default: this one's]
    #[arg(long, value_name = "N")]
    pub(crate) cpus: Option<u32>,
    /// Size of the ZFS pools in TiB
    #[arg(long, value_name = "N", default_value_t = 1, conflicts_with = "no_zfs")]
    pub(crate) pool_tib: u64,
    /// There is no ZFS on the machine
    #[arg(long, conflicts_with_all = ["zfs", "arc_max"])]
    pub(crate) no_zfs: bool,
    /// Version of ZFS, whose defaults differ [default: the loaded one's, else 2.3]
    #[arg(long, value_name = "VERSION")]
    pub(crate) zfs: Option<String>,
    /// Largest size of the ARC; 'default' leaves it to the module [default: planned]
    #[arg(long, value_name = "SIZE|default", value_parser = parse_arc)]
    pub(crate) arc_max: Option<ArcMax>,
    /// What the machine is for
    #[arg(long, value_enum, default_value = "latency")]
    pub(crate) workload: Workload,
    /// Write the settings below this directory: '/' for this machine
    #[arg(long, value_name = "DIR")]
    pub(crate) apply_to: Option<PathBuf>,
    /// Form of the output
    #[arg(long, value_enum, default_value = "table")]
    pub(crate) format: Format,
}

/// What a machine is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Workload {
    /// Short waits
    Latency,
    /// Much work
    Throughput,
}

/// A number of hugepages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Hugepages {
    /// As many as the guests need.
    Auto,
    /// So many.
    Count(u64),
}

fn parse_hugepages(text: &str) -> Result<Hugepages, String> {
    if text == "auto" {
        return Ok(Hugepages::Auto);
    }
    text.parse()
        .map(Hugepages::Count)
        .map_err(|_| "write a number of pages, or 'auto'".to_owned())
}

/// A largest size of the ARC.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ArcMax {
    /// What the module takes.
    Default,
    /// So much.
    Size(ByteSize),
}

fn parse_arc(text: &str) -> Result<ArcMax, String> {
    if text == "default" {
        return Ok(ArcMax::Default);
    }
    text.parse()
        .map(ArcMax::Size)
        .map_err(|error: fcvm_types::size::SizeError| error.to_string())
}
