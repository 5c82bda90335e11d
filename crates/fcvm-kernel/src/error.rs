//! The errors of this crate. Each message is one line: what failed, why where no source tells it,
//! and what to do.

use std::io;
use std::path::{Path, PathBuf};

use crate::vmlinux::{Architecture, ImageError};

/// Why a guest kernel or an initramfs could not be had.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum KernelError {
    /// An operation on a file or directory failed.
    #[error("cannot {action} {}", path.display())]
    File {
        /// What was tried: `read`, `write`, ...
        action: &'static str,
        /// On which file.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
    /// A program that setup needs could not be started.
    #[error(
        "cannot start '{program}', which fetching Debian's kernel needs: run setup on a Debian system, or give a kernel of your own with --kernel FILE"
    )]
    Program {
        /// Its name.
        program: &'static str,
        /// Why it did not start.
        source: io::Error,
    },
    /// A program failed.
    #[error("{action} failed: {output}")]
    ProgramFailed {
        /// What was being done, with the program's name.
        action: String,
        /// The last error lines the program wrote, joined.
        output: String,
    },
    /// No package source of this host has the kernel.
    #[error(
        "the package sources of this host have no {package}: add Debian's to /etc/apt/sources.list.d, or give a kernel of your own with --kernel FILE"
    )]
    NoPackage {
        /// The package looked for.
        package: String,
    },
    /// The package does not hold what a kernel package holds.
    #[error("{} is not a usable kernel package: {reason}", path.display())]
    Package {
        /// The package's file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// A kernel image could not be used.
    #[error("{} cannot be booted", path.display())]
    Image {
        /// The image's file.
        path: PathBuf,
        /// What is wrong.
        source: ImageError,
    },
    /// The kernel is for another architecture.
    #[error("{} is a kernel for {found}, but the guest is {expected}", path.display())]
    Architecture {
        /// The image's file.
        path: PathBuf,
        /// What it is for.
        found: Architecture,
        /// What was asked for.
        expected: Architecture,
    },
    /// A wanted module is neither in the package nor built into the kernel.
    #[error("the kernel has no module '{module}', which {needed_by} needs")]
    ModuleMissing {
        /// The module.
        module: String,
        /// The module, or "the guest", that wants it.
        needed_by: String,
    },
    /// A module's file is not one.
    #[error("the kernel module {module} cannot be used: {reason}")]
    Module {
        /// The module.
        module: String,
        /// What is wrong.
        reason: String,
    },
    /// The stored kernel is not as setup left it.
    #[error(
        "the stored guest kernel is damaged: {} {reason}; repair it with 'fcvm setup'", path.display()
    )]
    Damaged {
        /// The damaged file.
        path: PathBuf,
        /// How it differs.
        reason: String,
    },
    /// The manifest was written by a later version of fcvm.
    #[error(
        "{} has format version {found}, and this fcvm reads up to {supported}: upgrade fcvm, or remove that directory and run 'fcvm setup'", path.display()
    )]
    FutureVersion {
        /// The manifest.
        path: PathBuf,
        /// Its version.
        found: u32,
        /// The latest version this program reads.
        supported: u32,
    },
    /// A kernel cannot be installed so.
    #[error("cannot install {}: {reason}", path.display())]
    Install {
        /// The kernel, or the file to change.
        path: PathBuf,
        /// What is wrong, and what to do.
        reason: String,
    },
    /// A system's programs do not make an emergency initramfs.
    #[error("cannot make an emergency initramfs of the programs in {}: {reason}", root.display())]
    Rescue {
        /// The system's root directory.
        root: PathBuf,
        /// What is wrong, and what to do.
        reason: String,
    },
    /// The agent's file cannot be the guest's first process.
    #[error("{} cannot be the guest's first process: {reason}", path.display())]
    Agent {
        /// The file.
        path: PathBuf,
        /// What is wrong, and what to do.
        reason: String,
    },
}

impl KernelError {
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
