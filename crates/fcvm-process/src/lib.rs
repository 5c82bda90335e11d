//! Helper processes that die with their owner: QEMU, passt.
//!
//! A helper is started with exactly the descriptors it was given, a clean environment and no
//! controlling terminal. It is killed when its [`HelperProcess`] is dropped and when the owner dies
//! in any other way. What it writes to standard error is kept, bounded, for error messages.
//!
//! The `unsafe` that starting a process needs is in `spawn.rs`, that of waiting for a descriptor in
//! `watch.rs`, that of mounting for another process in `mount.rs`, and nowhere else. What the helpers
//! are and how they are spoken to is the business of the crates that start them.

mod helper;
mod identity;
mod mount;
mod spawn;
mod tail;
mod watch;

pub use helper::{HelperExit, HelperProcess};
pub use identity::{is_running, kill, process_identity, terminate, wait_gone};
pub use mount::mount_for;
pub use spawn::HelperCommand;
pub use watch::watch_readable;
