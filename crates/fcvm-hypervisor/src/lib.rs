//! Hypervisors behind small capability traits.
//!
//! A driver is a folder whose files have the same names in each: `probe.rs` (is it there, which
//! version), `launch.rs` (start a VM), `api.rs` (its control channel). There are [`qemu`] and
//! [`firecracker`]; [`Vm`] is a VM of either.
//! [`spec`] says what a VM consists of, in no hypervisor's words.
//!
//! [`probe`] finds out, by trying, whether the host's KVM runs guests, and how fast its time stamp
//! counter counts.
//!
//! Not here: what the disks and the network are made of (`fcvm-storage`, `fcvm-network`), and what
//! is said over the agent channel (`fcvm-wire`).

mod check;
mod error;
pub mod firecracker;
pub mod probe;
mod program;
pub mod qemu;
pub mod spec;
mod state;
mod version;
mod vm;

use std::future::Future;

pub use error::HypervisorError;
pub use spec::{
    Accelerator, BootSpec, DiskFormat, DiskLayer, DiskSpec, GuestMemory, HardwareSpec, LaunchSpec,
    MemoryMapping, NetworkBackend, NetworkSpec,
};
pub use state::{DEVICE_STATE_BYTES_MAX, DeviceLine, DeviceState};
pub use version::Version;
pub use vm::{
    AgentChannel, ExitCause, Hypervisor, HypervisorKind, MemoryBackend, Standby, Vm, VmEvent,
    VmExit,
};

/// A hypervisor that starts VMs.
pub trait Launch {
    /// A started VM. Dropping it ends it.
    type Vm;

    /// Starts a VM: when this returns, the hypervisor has accepted every part of the specification
    /// and the guest's first instruction is being run.
    ///
    /// # Errors
    ///
    /// Nothing is left of the VM where this fails.
    fn launch(
        &self,
        spec: LaunchSpec,
    ) -> impl Future<Output = Result<Self::Vm, HypervisorError>> + Send;
}

/// A VM whose virtual processors can be stopped and started again.
pub trait Pause {
    /// Stops the virtual processors. A stopped VM stays stopped.
    fn pause(&self) -> impl Future<Output = Result<(), HypervisorError>> + Send;

    /// Starts them again. A running VM keeps running.
    fn resume(&self) -> impl Future<Output = Result<(), HypervisorError>> + Send;
}

/// A VM whose processors and devices can be saved.
pub trait SaveState {
    /// What is saved.
    type State;

    /// Saves the state of the processors and devices. The VM must be paused and stays so; guest
    /// memory and disks are not part of it.
    fn save_state(&self) -> impl Future<Output = Result<Self::State, HypervisorError>> + Send;
}

/// A hypervisor that starts VMs from saved state.
pub trait RestoreState {
    /// A process that waits for the state. Dropping it ends it.
    type Standby;

    /// Starts a process with the hardware of the VM whose state it is to get. Its memory is mapped
    /// copy-on-write, and it touches neither memory nor disks before the state is loaded.
    ///
    /// # Errors
    ///
    /// As [`Launch::launch`].
    fn prepare(
        &self,
        hardware: HardwareSpec,
    ) -> impl Future<Output = Result<Self::Standby, HypervisorError>> + Send;
}
