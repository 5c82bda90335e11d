//! What every hypervisor's VM tells of itself, how it is reached, and a VM of any of them.

use std::fmt;
use std::io;
use std::path::PathBuf;

use fcvm_process::HelperExit;
use fcvm_types::record::ProcessIdentity;
use serde::{Deserialize, Serialize};
use tokio::net::{UnixListener, UnixStream};

use crate::error::HypervisorError;
use crate::firecracker::{Counters, Firecracker, FirecrackerStandby, FirecrackerVm};
use crate::qemu::{Qemu, QemuStandby, QemuVm};
use crate::spec::{HardwareSpec, LaunchSpec};
use crate::state::{DeviceLine, DeviceState};
use crate::{Launch, Pause, RestoreState};

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

impl RestoreState for Hypervisor {
    type Standby = Standby;

    async fn prepare(&self, hardware: HardwareSpec) -> Result<Standby, HypervisorError> {
        Ok(match self {
            Self::Qemu(qemu) => Standby::Qemu(qemu.prepare(hardware).await?),
            Self::Firecracker(firecracker) => {
                Standby::Firecracker(firecracker.prepare(hardware).await?)
            }
        })
    }
}

/// Where a VM that begins with saved state gets its memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum MemoryBackend {
    /// The file of its hardware, mapped privately: clones share what they do not write to.
    File,
    /// The socket of a process that serves page faults, userfaultfd(2).
    Uffd(PathBuf),
}

/// A process of any of the hypervisors that waits for device state. Dropping it ends it.
#[derive(Debug)]
pub enum Standby {
    /// QEMU's.
    Qemu(QemuStandby),
    /// Firecracker's.
    Firecracker(FirecrackerStandby),
}

impl Standby {
    /// Process id and start time.
    pub fn identity(&self) -> ProcessIdentity {
        match self {
            Self::Qemu(standby) => standby.vm().identity(),
            Self::Firecracker(standby) => standby.vm().identity(),
        }
    }

    /// Its hardware.
    pub fn device_line(&self) -> DeviceLine {
        match self {
            Self::Qemu(standby) => DeviceLine::Qemu(standby.vm().device_line().clone()),
            Self::Firecracker(standby) => {
                DeviceLine::Firecracker(standby.vm().device_line().clone())
            }
        }
    }

    /// The owner's end of the agent channel; the first call gets it. To be had before the state is
    /// loaded, or what the guest was saying then is lost.
    pub fn take_agent(&mut self) -> Option<AgentChannel> {
        match self {
            Self::Qemu(standby) => standby.take_agent().map(AgentChannel::Connected),
            Self::Firecracker(standby) => standby.take_agent(),
        }
    }

    /// Where it connects to for its memory, if it cannot reach the socket of a memory server
    /// ([`FirecrackerStandby::memory_listener`]).
    ///
    /// # Errors
    ///
    /// There is no place for a socket.
    pub fn memory_listener(&self) -> Result<Option<UnixListener>, HypervisorError> {
        match self {
            Self::Qemu(_) => Ok(None),
            Self::Firecracker(standby) => standby.memory_listener(),
        }
    }

    /// Waits until the process has ended.
    pub async fn wait_exit(&self) -> VmExit {
        match self {
            Self::Qemu(standby) => standby.vm().wait_exit().await,
            Self::Firecracker(standby) => standby.vm().wait_exit().await,
        }
    }

    /// Loads device state. The VM is stopped then: [`resume`](Pause::resume) lets it go on.
    ///
    /// # Errors
    ///
    /// The state does not belong to this hardware, or is damaged, or the hypervisor cannot have its
    /// memory from there. The process has ended then.
    pub async fn load(
        self,
        state: &DeviceState,
        memory: &MemoryBackend,
    ) -> Result<Vm, HypervisorError> {
        match (self, memory) {
            (Self::Qemu(standby), MemoryBackend::File) => Ok(Vm::Qemu(standby.load(state).await?)),
            (Self::Qemu(_), MemoryBackend::Uffd(_)) => Err(HypervisorError::InvalidSpec {
                what: "memory that is served page by page".to_owned(),
                reason: "QEMU maps it as a file".to_owned(),
            }),
            (Self::Firecracker(standby), memory) => {
                Ok(Vm::Firecracker(standby.load(state, memory).await?))
            }
        }
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

    /// Its hardware.
    pub fn device_line(&self) -> DeviceLine {
        match self {
            Self::Qemu(vm) => DeviceLine::Qemu(vm.device_line().clone()),
            Self::Firecracker(vm) => DeviceLine::Firecracker(vm.device_line().clone()),
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

    /// What has happened in it so far by the hypervisor's own counters, where it has some.
    ///
    /// # Errors
    ///
    /// The hypervisor does not answer.
    pub async fn counters(&self) -> Result<Option<Counters>, HypervisorError> {
        match self {
            Self::Qemu(_) => Ok(None),
            Self::Firecracker(vm) => vm.counters().await.map(Some),
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
    /// The first connection, once there is one, and where later ones come in: these can be any
    /// process's of the guest.
    ///
    /// # Errors
    ///
    /// The socket is broken.
    pub async fn connected(self) -> io::Result<(UnixStream, Option<UnixListener>)> {
        match self {
            Self::Connected(stream) => Ok((stream, None)),
            Self::Awaited(listener) => Ok((listener.accept().await?.0, Some(listener))),
        }
    }
}
