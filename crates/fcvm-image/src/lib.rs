//! OCI images: references, registries, the content store, and layers to one root image.
//!
//! Nothing here reads the environment, the home directory or the terminal: directories, credential
//! files and proxies are passed in by the caller.

#![forbid(unsafe_code)]

pub mod digest;
pub mod progress;
pub mod reference;
pub mod rootfs;

pub use digest::Digest;
pub use progress::{Progress, Silent, Task};
pub use reference::Reference;
