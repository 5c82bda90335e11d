//! OCI images: references, registries, the content store, and layers to one root image.
//!
//! Nothing here reads the environment, the home directory or the terminal: directories, credential
//! files and proxies are passed in by the caller.

#![forbid(unsafe_code)]

pub mod bootstrap;
mod compose;
pub mod digest;
pub mod format;
pub mod import;
pub mod progress;
pub mod pull;
pub mod reference;
pub mod rootfs;
pub mod store;
mod tool;

pub use bootstrap::{BootstrapOptions, bootstrap};
pub use digest::Digest;
pub use format::Platform;
pub use import::{ImportOptions, Source, import};
pub use progress::{Progress, Silent, Task};
pub use pull::{PullOptions, pull};
pub use reference::Reference;
pub use store::{Image, ImageStore, Layer, StoreError};
