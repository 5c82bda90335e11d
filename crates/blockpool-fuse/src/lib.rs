//! A pool as a file system: datasets are directories, objects are files, and copying a file clones it.
//!
//! [`mount()`] gets the kernel's side from fusermount3, [`serve`] answers it until the file system is unmounted. Another process
//! can keep the kernel's side and a [`blockpool::Journal`] and start a new one that serves where one was
//! killed: what was not answered is asked again, and nobody above sees more than a pause. What is kept of a file and what is
//! not is in `docs/design/pool-mount.md`. No terminal and no environment is known here.

#![forbid(unsafe_code)]

mod attributes;
mod copy;
mod error;
mod filesystem;
mod mount;
mod namespace;
mod node;
mod passthrough;
mod serve;
mod wire;

pub use error::MountError;
pub use mount::{mount, unmount};
pub use passthrough::serve_passthrough;
pub use serve::{Options, serve};
