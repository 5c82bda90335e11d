//! The errors of configuring and building kernels. Each message is one line.

use std::io;
use std::path::{Path, PathBuf};

use crate::KernelError;

/// Why a kernel could not be configured or built.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BuildError {
    /// An operation on a file failed.
    #[error("cannot {action} {}", path.display())]
    File {
        /// What was tried.
        action: &'static str,
        /// On which file.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
    /// What it is built on failed.
    #[error(transparent)]
    Kernel(#[from] KernelError),
    /// No such profile.
    #[error(
        "there is no profile '{name}': known are {known}; a file of your own is given with its path (./{name}.toml)"
    )]
    UnknownProfile {
        /// What was asked for.
        name: String,
        /// All names.
        known: String,
    },
    /// A profile does not parse.
    #[error("the profile {name} cannot be read: {reason}")]
    Profile {
        /// Its name or file.
        name: String,
        /// What is wrong.
        reason: String,
    },
    /// A line of a fragment, or a `--set`, does not parse.
    #[error("{origin}: '{line}' is no setting: CONFIG_NAME=value or '# CONFIG_NAME is not set'")]
    Setting {
        /// The file and line, or the option.
        origin: String,
        /// What was written.
        line: String,
    },
    /// Two inputs ask for different values.
    #[error(
        "CONFIG_{symbol}: {first} sets {first_value}, {second} sets {second_value}: keep one, or override with --set CONFIG_{symbol}=VALUE"
    )]
    Contradiction {
        /// The symbol, without its prefix.
        symbol: String,
        /// Who asks first.
        first: String,
        /// For what.
        first_value: String,
        /// Who else asks.
        second: String,
        /// For what.
        second_value: String,
    },
    /// A source that cannot be understood.
    #[error("'{text}' is no source: {reason}")]
    Source {
        /// What was written.
        text: String,
        /// What is wrong, and what can be written.
        reason: String,
    },
    /// No OpenZFS for this kernel.
    #[error(
        "no OpenZFS fits Linux {kernel}: known are {known}; choose another --source, or --zfs none"
    )]
    ZfsMismatch {
        /// The kernel's version.
        kernel: String,
        /// Releases, with the kernels that they are for.
        known: String,
    },
    /// A file is not what it should be.
    #[error("{} has the SHA-256 {found}, and {expected} was expected: it is damaged or was tampered with", path.display())]
    Checksum {
        /// The file.
        path: PathBuf,
        /// What was expected.
        expected: String,
        /// What it is.
        found: String,
    },
    /// Programs or headers are missing.
    #[error("building needs {missing}: apt-get install {packages}")]
    Missing {
        /// Names of programs and headers.
        missing: String,
        /// Debian's packages.
        packages: String,
    },
    /// A program failed.
    #[error("{action} failed: {reason}{}", log.as_ref().map(|log| format!(" (all of it: {})", log.display())).unwrap_or_default())]
    Failed {
        /// What was being done.
        action: String,
        /// The first real error.
        reason: String,
        /// Where all is written.
        log: Option<PathBuf>,
    },
    /// The disk is full, or would be.
    #[error("no space: {} has {free_mb} MB free and {what} takes about {needed_mb} MB", path.display())]
    Space {
        /// Where.
        path: PathBuf,
        /// What is there.
        free_mb: u64,
        /// What would be needed.
        needed_mb: u64,
        /// For what.
        what: &'static str,
    },
    /// Not enough memory for what was asked for.
    #[error(
        "full LTO links the kernel in about {needed_mb} MB of memory and {available_mb} MB are available: use --lto thin"
    )]
    Memory {
        /// Estimate.
        needed_mb: u64,
        /// What is there.
        available_mb: u64,
    },
    /// No such built kernel.
    #[error("there is no built kernel '{name}': 'fcvm kernel ls' lists them")]
    NoKernel {
        /// What was asked for.
        name: String,
    },
    /// The name fits several.
    #[error("'{name}' fits several kernels: {candidates}")]
    Ambiguous {
        /// What was asked for.
        name: String,
        /// Their names.
        candidates: String,
    },
    /// Options that do not go together.
    #[error("{0}")]
    Options(String),
}

impl BuildError {
    /// For `map_err` on file operations.
    pub(crate) fn file(
        action: &'static str,
        path: impl AsRef<Path>,
    ) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::File {
            action,
            path: path.as_ref().to_owned(),
            source,
        }
    }
}
