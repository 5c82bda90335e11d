//! `fcvm kernel`.

pub(crate) mod build;
pub(crate) mod install;
pub(crate) mod tune;
pub(crate) mod zpool;

use clap::Subcommand;

/// `fcvm kernel ...`.
#[derive(Debug, Subcommand)]
pub(crate) enum KernelCommand {
    /// Kernels from source, by profile
    #[command(flatten)]
    Source(build::SourceCommand),
    /// Plan memory, processors and settings of a host of VMs with ZFS
    Tune(tune::TuneArguments),
    /// Install a host kernel below a root directory: its files and boot entries
    Install(install::InstallArguments),
    /// List the boot entries that fcvm installed
    Entries(install::EntriesArguments),
    /// Start another kernel without the firmware
    Kexec(install::KexecArguments),
    /// Make an emergency initramfs: a shell, and what reads a pool
    RescueInitramfs(install::RescueArguments),
    /// Plan ZFS pools
    #[command(subcommand)]
    Zpool(zpool::ZpoolCommand),
}
