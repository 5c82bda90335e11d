//! What every hypervisor's VM tells of itself, how it is reached, and a VM of any of them.

use std::fmt;
use std::io;

use fcvm_process::HelperExit;
use fcvm_types::record::ProcessIdentity;
use serde::{Deserialize, Serialize};
use tokio::net::{UnixListener, UnixStream};

use crate::error::HypervisorError;
use crate::firecracker::{Firecracker, FirecrackerVm};
use crate::qemu::{Qemu, QemuVm};
use crate::spec::LaunchSpec;
use crate::{Launch, Pause};

/// Which hypervisor.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum HypervisorKind {
    /// QEMU's microvm machine.
    #[default]
    Qemu,
    /// Firecracker.
    Firecracker,
}

impl HypervisorKind {
    /// `qemu` or `firecracker`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Qemu => "qemu",
            Self::Firecracker => "firecracker",
        }
    }
}

impl fmt::Display for HypervisorKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Any of the hypervisors.
#[derive(Debug)]
pub enum Hypervisor {
    /// QEMU.
    Qemu(Qemu),
    /// Firecracker.
    Firecracker(Firecracker),
}

impl Launch for Hypervisor {
    type Vm = Vm;

    async fn launch(&self, spec: LaunchSpec) -> Result<Vm, HypervisorError> {
        Ok(match self {
            Self::Qemu(qemu) => Vm::Qemu(qemu.launch(spec).await?),
            Self::Firecracker(firecracker) => Vm::Firecracker(firecracker.launch(spec).await?),
        })
    }
}

/// A running VM of any of the hypervisors. Dropping it ends it.
#[derive(Debug)]
pub enum Vm {
    /// QEMU's.
    Qemu(QemuVm),
    /// Firecracker's.
    Firecracker(FirecrackerVm),
}

impl Vm {
    /// Which hypervisor's it is; also the role of its process.
    pub fn kind(&self) -> HypervisorKind {
        match self {
            Self::Qemu(_) => HypervisorKind::Qemu,
            Self::Firecracker(_) => HypervisorKind::Firecracker,
        }
    }

    /// The hypervisor's process id and start time.
    pub fn identity(&self) -> ProcessIdentity {
        match self {
            Self::Qemu(vm) => vm.identity(),
            Self::Firecracker(vm) => vm.identity(),
        }
    }

    /// The owner's end of the agent channel; the first call gets it.
    pub fn take_agent(&mut self) -> Option<AgentChannel> {
        match self {
            Self::Qemu(vm) => vm.take_agent().map(AgentChannel::Connected),
            Self::Firecracker(vm) => vm.take_agent(),
        }
    }

    /// The next event; `None` when there will be no more. May be cancelled without losing one.
    pub async fn next_event(&self) -> Option<VmEvent> {
        match self {
            Self::Qemu(vm) => vm.next_event().await,
            Self::Firecracker(vm) => vm.next_event().await,
        }
    }

    /// Waits until the VM has ended. May be called again, cancelled and called by many.
    pub async fn wait_exit(&self) -> VmExit {
        match self {
            Self::Qemu(vm) => vm.wait_exit().await,
            Self::Firecracker(vm) => vm.wait_exit().await,
        }
    }

    /// Ends the VM at once, as pulling the plug does.
    pub fn kill(&self) {
        match self {
            Self::Qemu(vm) => vm.kill(),
            Self::Firecracker(vm) => vm.kill(),
        }
    }
}

impl Pause for Vm {
    async fn pause(&self) -> Result<(), HypervisorError> {
        match self {
            Self::Qemu(vm) => vm.pause().await,
            Self::Firecracker(vm) => vm.pause().await,
        }
    }

    async fn resume(&self) -> Result<(), HypervisorError> {
        match self {
            Self::Qemu(vm) => vm.resume().await,
            Self::Firecracker(vm) => vm.resume().await,
        }
    }
}

/// Something that happened to a VM without being asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum VmEvent {
    /// The virtual processors stopped: [`pause`](crate::Pause::pause) or a full disk.
    Stopped,
    /// They run again.
    Resumed,
    /// A read or write of a disk failed on the host.
    DiskError {
        /// Serial number of the disk.
        disk: String,
        /// A write; otherwise a read.
        write: bool,
        /// The host's file system is full. The VM was stopped and its writes wait: it goes on
        /// where it was once there is space and [`resume`](crate::Pause::resume) was called.
        no_space: bool,
        /// The host's error.
        reason: String,
    },
}

/// How a VM ended.
#[derive(Debug, Clone)]
pub struct VmExit {
    /// What ended it.
    pub cause: ExitCause,
    /// The hypervisor's exit status and its last words.
    pub process: HelperExit,
}

/// What ended a VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ExitCause {
    /// The guest powered itself off.
    PoweredOff,
    /// The guest reset itself, which is what a kernel does after a panic.
    Reset,
    /// The hypervisor was asked to end, or ended by SIGTERM, SIGINT or SIGHUP.
    Terminated,
    /// The hypervisor was killed by this signal, or crashed with it.
    Killed(i32),
    /// The hypervisor gave up.
    Failed,
}

impl fmt::Display for VmExit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.cause {
            ExitCause::PoweredOff => f.write_str("the guest powered itself off"),
            ExitCause::Reset => f.write_str("the guest reset itself, as after a kernel panic"),
            ExitCause::Terminated => write!(f, "{} was told to end", self.process.role),
            ExitCause::Killed(_) | ExitCause::Failed => self.process.fmt(f),
        }
    }
}

/// The owner's end of the agent channel.
#[derive(Debug)]
pub enum AgentChannel {
    /// Connected from the start: what the guest writes before it is read waits in it.
    Connected(UnixStream),
    /// The guest connects when its agent has come up.
    Awaited(UnixListener),
}

impl AgentChannel {
    /// The connection, once there is one. Nobody else in the guest can connect afterwards.
    ///
    /// # Errors
    ///
    /// The socket is broken.
    pub async fn connected(self) -> io::Result<UnixStream> {
        match self {
            Self::Connected(stream) => Ok(stream),
            Self::Awaited(listener) => Ok(listener.accept().await?.0),
        }
    }
}
