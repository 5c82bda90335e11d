//! One module per verb: what it does with its arguments.

pub(crate) mod clones;
pub(crate) mod cp;
pub(crate) mod documentation;
pub(crate) mod exec;
pub(crate) mod fork;
pub(crate) mod image;
pub(crate) mod inspect;
pub(crate) mod kernel;
pub(crate) mod lifecycle;
pub(crate) mod logs;
pub(crate) mod ls;
mod memory_stats;
pub(crate) mod pool;
pub(crate) mod preflight;
pub(crate) mod prepare;
pub(crate) mod run;
pub(crate) mod sanity;
pub(crate) mod setup;
pub(crate) mod snapshot;
pub(crate) mod stats;
pub(crate) mod system;
pub(crate) mod top;
pub(crate) mod zfs_send;
