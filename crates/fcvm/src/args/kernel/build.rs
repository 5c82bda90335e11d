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
#[derive(Debug, Args)]
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
    /// Optimise across files, with clang
    #[arg(long, value_enum, default_value = "none")]
    pub(crate) lto: LtoChoice,
}

/// `fcvm kernel config`.
#[derive(Debug, Args)]
pub(crate) struct ConfigArguments {
    /// The inputs.
    #[command(flatten)]
    pub(crate) inputs: ConfigInputs,
    /// Write the resolved configuration to a file ('-': standard output)
    #[arg(short, long, value_name = "FILE")]
    pub(crate) output: Option<PathBuf>,
    /// Form of the output
    #[arg(long, value_enum, default_value = "table", conflicts_with = "output")]
    pub(crate) format: Format,
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
