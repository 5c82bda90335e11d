//! QEMU's `microvm` machine.
//!
//! The device line and the boot flags, with the reasons for them, are in `command_line.rs`; starting
//! and watching the process in `launch.rs`; the control protocol (QMP) in `api.rs`; finding the
//! program in `probe.rs`.

mod api;
mod command_line;
mod launch;
mod probe;

pub use api::VmEvent;
pub use command_line::DeviceLine;
pub use launch::{ExitCause, QemuVm, VmExit};
pub use probe::{MINIMUM_VERSION, Qemu, Version};
