//! QEMU's `microvm` machine.
//!
//! The device line and the boot flags, with the reasons for them, are in `command_line.rs`; starting
//! and watching the process in `launch.rs`; device state in `snapshot.rs`; the control protocol (QMP) in `api.rs`; finding the
//! program in `probe.rs`.

mod api;
mod command_line;
mod launch;
mod probe;
mod snapshot;

pub use command_line::DeviceLine;
pub use launch::QemuVm;
pub use probe::{MINIMUM_VERSION, Qemu};
pub use snapshot::QemuStandby;

/// The hypervisor's name in messages.
const NAME: &str = "QEMU";
