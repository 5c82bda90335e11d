//! `fcvm kernel`.

pub(crate) mod tune;
pub(crate) mod zpool;

use clap::Subcommand;

/// `fcvm kernel ...`.
#[derive(Debug, Subcommand)]
pub(crate) enum KernelCommand {
    /// Plan memory, processors and settings of a host of VMs with ZFS
    Tune(tune::TuneArguments),
    /// Plan ZFS pools
    #[command(subcommand)]
    Zpool(zpool::ZpoolCommand),
}
