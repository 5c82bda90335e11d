//! `fcvm kernel profiles|config|build|ls|show|rm|diff`.

use std::path::PathBuf;

use clap::{Args, Subcommand, ValueEnum};

use crate::args::Format;

/// The verbs for kernels from source.
#[derive(Debug, Subcommand)]
pub(crate) enum SourceCommand {
    /// List the profiles, or explain the lines of one
    Profiles {
        /// Explain this one: a name, or the path of a file
        name: Option<String>,
        /// Form of the output
        #[arg(long, value_enum, default_value = "table")]
        format: Format,
    },
    /// Resolve a profile with the source's Kconfig and check that nothing got lost
    Config(ConfigArguments),
    /// Build a kernel
    Build(BuildArguments),
    /// List the kernels that were built
    #[command(alias = "list")]
    Ls {
        /// Only names
        #[arg(short, long, conflicts_with = "format")]
        quiet: bool,
        /// Form of the output
        #[arg(long, value_enum, default_value = "table")]
        format: Format,
    },
    /// Show a kernel, and for each line of its profile why it is there and what it costs
    Show {
        /// Name, the beginning of one, or a profile (its newest)
        name: String,
        /// Form of the output
        #[arg(long, value_enum, default_value = "table")]
        format: Format,
    },
    /// Remove kernels
    Rm {
        /// Names
        #[arg(required = true)]
        names: Vec<String>,
    },
    /// Show the symbols in which two kernels, or files of configuration, differ
    Diff {
        /// Name, or path of a configuration
        first: String,
        /// Name, or path of a configuration
        second: String,
        /// Form of the output
        #[arg(long, value_enum, default_value = "table")]
        format: Format,
    },
}

/// What a configuration is made of.
#[derive(Debug, Clone, Args)]
pub(crate) struct ConfigInputs {
    /// Profile: a name of 'fcvm kernel profiles', or the path of a TOML file
    #[arg(short, long, value_name = "PROFILE", default_value = "guest-min")]
    pub(crate) profile: String,
    /// debian:6.1, debian:6.12, debian:7.2, tree:DIR, tar:FILE#sha256=SUM or git:URL#REF
    #[arg(short, long, value_name = "SOURCE", default_value = "debian:6.1")]
    pub(crate) source: String,
    /// Change a symbol; wins over the profile
    #[arg(long, value_name = "CONFIG_X=VALUE")]
    pub(crate) set: Vec<String>,
    /// Add the settings of a file; they may not contradict the profile
    #[arg(long, value_name = "FILE")]
    pub(crate) fragment: Vec<PathBuf>,
    /// Build OpenZFS in, of the version that fits the source, or leave it out [default: as the profile says]
    #[arg(long, value_enum)]
    pub(crate) zfs: Option<ZfsChoice>,
    /// Optimise across files, with clang
    #[arg(long, value_enum, default_value = "none")]
    pub(crate) lto: LtoChoice,
}

/// `fcvm kernel config`.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
        fcvm kernel config --profile guest --set CONFIG_XFS_FS=y         resolve, check, build nothing\n  \
        fcvm kernel config --profile host-full --output .config          and keep the configuration\n  \
        fcvm kernel config --interactive                                 answer some questions, get a profile\n  \
        fcvm kernel config --use host --prefer latency --hardware common --save-profile ./mine.toml")]
pub(crate) struct ConfigArguments {
    /// The inputs.
    #[command(flatten)]
    pub(crate) inputs: ConfigInputs,
    /// Answers that make a profile.
    #[command(flatten)]
    pub(crate) answers: AnswerArguments,
    /// Write the resolved configuration to a file ('-': standard output)
    #[arg(short, long, value_name = "FILE")]
    pub(crate) output: Option<PathBuf>,
    /// Form of the output
    #[arg(long, value_enum, default_value = "table", conflicts_with = "output")]
    pub(crate) format: Format,
}

/// Answers that make a profile.
#[derive(Debug, Args)]
#[command(next_help_heading = "A profile by answers")]
pub(crate) struct AnswerArguments {
    /// Ask what is not answered by an option
    #[arg(long, conflicts_with = "profile")]
    pub(crate) interactive: bool,
    /// Write the answers' profile to this file, then check it [with --interactive: ./kernel.toml]
    #[arg(
        long,
        value_name = "FILE",
        conflicts_with = "profile",
        default_value_if("interactive", "true", "kernel.toml")
    )]
    pub(crate) save_profile: Option<PathBuf>,
    /// What the kernel is for [default: guest]
    #[arg(long = "use", value_enum, requires = "save_profile")]
    pub(crate) used_for: Option<UseChoice>,
    /// A guest's kernel: how much it can do [default: small]
    #[arg(long, value_enum, requires = "save_profile")]
    pub(crate) features: Option<FeaturesChoice>,
    /// A host's kernel: what matters [default: throughput]
    #[arg(long, value_enum, requires = "save_profile")]
    pub(crate) prefer: Option<PreferChoice>,
    /// A host's kernel: how guests get memory [default: shared]
    #[arg(long, value_enum, requires = "save_profile")]
    pub(crate) guest_memory: Option<GuestMemoryChoice>,
    /// A host's kernel: what it runs on [default: all]
    #[arg(long, value_enum, requires = "save_profile")]
    pub(crate) hardware: Option<HardwareChoice>,
}

/// `--use`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum UseChoice {
    /// A microVM's guest
    Guest,
    /// A host on hardware or in a VM
    Host,
}

/// `--features`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum FeaturesChoice {
    /// What a container needs: boots fastest
    Small,
    /// Also IPv6, nftables, BPF, 9p, bridges, 32-bit programs
    Full,
}

/// `--prefer`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum PreferChoice {
    /// Full preemption, tickless, no debugging
    Latency,
    /// Much work done
    Throughput,
}

/// `--guest-memory`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum GuestMemoryChoice {
    /// No guests: without KVM
    None,
    /// As guests ask for it; equal pages can be merged
    Shared,
    /// Set aside in huge pages
    Reserved,
}

/// `--hardware`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum HardwareChoice {
    /// All that the profiles know: servers with SAS, InfiniBand, IPMI
    All,
    /// NVMe, SATA, Ethernet by Intel or Realtek
    Common,
    /// A virtual machine: virtio and NVMe
    Virtual,
}

/// `fcvm kernel build`.
#[derive(Debug, Args)]
pub(crate) struct BuildArguments {
    /// The inputs.
    #[command(flatten)]
    pub(crate) inputs: ConfigInputs,
    /// Compile for this processor: native, x86-64-v3, ...
    #[arg(long, value_name = "NAME")]
    pub(crate) march: Option<String>,
    /// Jobs at a time [default: one for each processor]
    #[arg(short, long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    pub(crate) jobs: Option<u16>,
    /// Also make a Debian package of a host's kernel, in this directory
    #[arg(long, value_name = "DIR", num_args = 0..=1, require_equals = true, default_missing_value = ".")]
    pub(crate) deb: Option<PathBuf>,
    /// Print nothing but the kernel's name
    #[arg(short, long)]
    pub(crate) quiet: bool,
}

/// `--lto`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum LtoChoice {
    /// None, with gcc
    None,
    /// Thin
    Thin,
    /// Full: about 6 GB of memory
    Full,
}

/// `--zfs`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum ZfsChoice {
    /// Built in
    Builtin,
    /// Left out
    None,
}
