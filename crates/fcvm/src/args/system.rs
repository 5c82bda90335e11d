//! `fcvm setup`, `fcvm system`, `fcvm test`.

use clap::{Args, Subcommand};

use super::Format;

/// `fcvm setup`.
#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  fcvm setup                           everything that run needs\n  fcvm setup preflight --format json    what this host can do, and the remedy for what it cannot"
)]
pub(crate) struct SetupArguments {
    /// One step; all that run needs where absent
    #[command(subcommand)]
    pub(crate) step: Option<SetupStep>,
}

/// A step of `fcvm setup`.
#[derive(Debug, Subcommand)]
pub(crate) enum SetupStep {
    /// Show what this host has, what it means and the remedy
    Preflight {
        /// Form of the output
        #[arg(long, value_enum, default_value = "table")]
        format: Format,
    },
    /// Fetch a release of Firecracker and its jailer, and compare it with its published checksum
    #[command(
        disable_version_flag = true,
        after_help = "Examples:\n  \
        fcvm setup firecracker                        the latest release\n  \
        fcvm setup firecracker --version 1.13.1       this one\n\n\
        An archive's checksum that you have from elsewhere (--sha256) is worth more than the one beside it."
    )]
    Firecracker {
        /// Version [default: the latest]
        #[arg(long, value_name = "VERSION")]
        version: Option<String>,
        /// SHA-256 of the archive, in place of the published one
        #[arg(long, value_name = "SUM", requires = "version")]
        sha256: Option<String>,
        /// Where releases are published
        #[arg(long, value_name = "URL", default_value = fcvm_hypervisor::firecracker::release::SERVER)]
        server: String,
    },
    /// Make the guest kernel ready and pack the initramfs
    Kernel {
        /// Which one guests boot from now on: guest-min, guest or guest-zfs (built from source where
        /// it is not there), the name of a built kernel, or packaged (Debian's) [default: the one in use,
        /// else packaged]
        #[arg(long, value_name = "PROFILE")]
        profile: Option<String>,
        /// Fetch again, also when it is there and intact
        #[arg(long)]
        force: bool,
    },
}

/// `fcvm system ...`.
#[derive(Debug, Subcommand)]
pub(crate) enum SystemCommand {
    /// Show what images, kernels, VMs and temporary files take
    Df {
        /// Form of the output
        #[arg(long, value_enum, default_value = "table")]
        format: Format,
    },
    /// Remove what nothing uses: ended VMs, leftovers of crashes, unnamed images, old root images
    Prune {
        /// Also images that no VM uses, and all start-up caches ('fcvm run --warm')
        #[arg(short, long)]
        all: bool,
        /// Also all start-up caches ('fcvm run --warm'), which the next runs make anew
        #[arg(long)]
        warm: bool,
        /// Do not ask
        #[arg(short, long)]
        force: bool,
    },
}

/// `fcvm test ...`.
#[derive(Debug, Subcommand)]
pub(crate) enum TestCommand {
    /// Boot a VM, run a command in it, exec, copy, stop: does this installation work?
    Sanity {
        /// Image to use [default: any that is there, else one is made of busybox]
        #[arg(long)]
        image: Option<String>,
    },
}
