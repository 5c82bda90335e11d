//! Guest kernels and the initramfs that carries the agent.
//!
//! [`setup`] fetches Debian's packaged cloud kernel with apt, as any user and without touching the
//! host's own packages, and keeps what a microVM boots from it: the uncompressed kernel and a few
//! modules. [`initramfs`] packs the agent and those modules. What happens at boot is the business of
//! the hypervisor's crate and of the agent. [`build`] makes kernels from source, by profile.
//!
//! A directory that the caller chooses holds everything:
//!
//! ```text
//! lock                  held by the one setup that runs
//! current -> NAME       the kernel in use, replaced by rename
//! NAME/                 release and content digest: manifest.json, vmlinux, config, modules/*.ko,
//!                       and modules/list with the modules' names in the order of loading
//! initramfs/DIGEST.cpio one per agent and set of modules
//! extracted/vmlinux-*   kernels that users gave as files, unpacked
//! sources/ work/ built/ kernels from source: see [`build`]
//! apt/                  package lists and downloads of an unfinished setup
//! .partial-*            what a killed setup left; the next one removes it
//! ```

#![forbid(unsafe_code)]

mod agent;
pub mod build;
mod custom;
mod debian;
mod decompress;
mod error;
mod files;
mod initramfs;
pub mod install;
mod manifest;
mod modules;
mod package;
mod progress;
pub mod send;
mod store;
pub mod tuning;
pub mod vmlinux;
pub mod zpool;

pub use custom::from_file;
pub use error::KernelError;
pub use initramfs::{Devices, initramfs, initramfs_bytes};
pub use manifest::{GuestKernel, GuestModule};
pub use modules::module_dependencies;
pub use progress::{SetupEvent, SetupStage};
pub use store::{DEFAULT_MODULES, SetupOptions, installed, setup, verify};
pub use vmlinux::Architecture;

/// Result of this crate's operations.
pub type Result<T> = std::result::Result<T, KernelError>;
