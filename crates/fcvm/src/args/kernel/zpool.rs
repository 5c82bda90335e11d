//! `fcvm kernel zpool`.

use std::path::PathBuf;

use clap::{Args, Subcommand, ValueEnum};
use fcvm_kernel::zpool::Layout;
use fcvm_types::ByteSize;

use crate::args::Format;

/// `fcvm kernel zpool ...`.
#[derive(Debug, Subcommand)]
pub(crate) enum ZpoolCommand {
    /// Propose a ZFS pool of some devices: the exact commands, and why
    Plan(PlanArguments),
}

/// `fcvm kernel zpool plan`.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
        fcvm kernel zpool plan /dev/sda /dev/sdb                    a pool for disks of VMs\n  \
        fcvm kernel zpool plan --workload files /dev/sd[a-f] --special /dev/nvme0n1 --special /dev/nvme1n1\n  \
        fcvm kernel zpool plan --layout raidz2 --yes /dev/sd[a-f]   make it, if the devices are empty\n  \
        fcvm kernel zpool plan --yes --destroy-data /dev/sda /dev/sda /dev/sdb\n\n\
        Nothing is run without --yes. A device that holds data is overwritten only where it is named a second time,\n\
        with --destroy-data; one in use, never.")]
pub(crate) struct PlanArguments {
    /// What the pool is for
    #[arg(long, value_enum, default_value = "vm")]
    pub(crate) workload: Workload,
    /// stripe, mirror, raidz1-3 or draid1-3 [default: by number, size and use]
    #[arg(long, value_name = "LAYOUT")]
    pub(crate) layout: Option<Layout>,
    /// Name of the pool
    #[arg(long, value_name = "NAME", default_value = "tank")]
    pub(crate) pool: String,
    /// Exponent of the sector size [default: the devices', at least 12]
    #[arg(long, value_name = "N")]
    pub(crate) ashift: Option<u32>,
    /// Size of records and volume blocks [default: by use, 16k for VMs]
    #[arg(long, value_name = "SIZE")]
    pub(crate) record_size: Option<ByteSize>,
    /// A device for metadata and small blocks
    #[arg(long, value_name = "DEVICE")]
    pub(crate) special: Vec<PathBuf>,
    /// A device for synchronous writes
    #[arg(long, value_name = "DEVICE")]
    pub(crate) log: Vec<PathBuf>,
    /// A device that caches reads
    #[arg(long, value_name = "DEVICE")]
    pub(crate) cache: Vec<PathBuf>,
    /// A device that takes the place of one that fails
    #[arg(long, value_name = "DEVICE")]
    pub(crate) spare: Vec<PathBuf>,
    /// Run the commands
    #[arg(long)]
    pub(crate) yes: bool,
    /// What is on this device may be lost
    #[arg(long, value_name = "DEVICE")]
    pub(crate) destroy_data: Vec<PathBuf>,
    /// Form of the output
    #[arg(long, value_enum, default_value = "table")]
    pub(crate) format: Format,
    /// Block devices, or files for tests
    #[arg(required = true)]
    pub(crate) devices: Vec<PathBuf>,
}

/// What a pool is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Workload {
    /// Disks of virtual machines
    Vm,
    /// Databases
    Database,
    /// Files of people and services
    Files,
    /// Copies of other machines
    Backup,
}
