//! Device state: saved from a stopped VM, loaded into a process that was started for it.
//!
//! Guest memory and disks are files of the owner and no part of it. QEMU's command for exactly this
//! is `xen-save-devices-state`, which is part of every build: one call, no migration to finalise, and
//! it does not matter how the memory is mapped. Loading is an incoming migration that carries no
//! memory.

use std::fs::File;
use std::io::{self, Seek};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;

use rustix::fs::MemfdFlags;
use rustix::pipe::PipeFlags;
use serde_json::json;
use tokio::io::AsyncWriteExt;
use tokio::net::UnixStream;
use tokio::net::unix::pipe;

use super::Qemu;
use super::command_line::STATE_SET;
use super::launch::{COMMAND_TIMEOUT, QemuVm, START_TIMEOUT};
use crate::error::HypervisorError;
use crate::spec::{HardwareSpec, MemoryMapping};
use crate::state::{DEVICE_STATE_BYTES_MAX, DeviceState, failed};
use crate::{RestoreState, SaveState};

/// The device state of a small VM then never waits for its reader. Far below what the kernel lets an
/// unprivileged user have in all pipes together (pipe(7)), also with a hundred VMs.
const PIPE_BYTES: usize = 256 << 10;

/// The anonymous file to which QEMU saves. QEMU truncates it first, which no pipe can be.
#[derive(Debug)]
pub(super) struct StateFile {
    file: File,
    /// QEMU's descriptor shares this one's position.
    position: File,
}

impl StateFile {
    /// The file, and QEMU's descriptor of it: QEMU takes one for writing only.
    pub(super) fn new() -> io::Result<(Self, OwnedFd)> {
        let file = rustix::fs::memfd_create("fcvm-device-state", MemfdFlags::CLOEXEC)?;
        let path = format!("/proc/self/fd/{}", file.as_raw_fd());
        let position = File::options().write(true).open(path)?;
        let writer = position.try_clone()?.into();
        let file = file.into();
        Ok((Self { file, position }, writer))
    }

    fn rewind(&self) -> io::Result<()> {
        (&self.position).rewind()
    }

    /// Takes what was saved out of the file.
    fn take(&self) -> Result<DeviceState, HypervisorError> {
        let read = || {
            let length = self.file.metadata()?.len();
            let mut bytes =
                vec![0; usize::try_from(length.min(DEVICE_STATE_BYTES_MAX + 1)).unwrap_or(0)];
            self.file.read_exact_at(&mut bytes, 0)?;
            self.file.set_len(0)?;
            Ok(bytes)
        };
        DeviceState::from_bytes(
            read().map_err(|error: io::Error| failed("saved", error.to_string()))?,
        )
    }
}

impl SaveState for QemuVm {
    type State = DeviceState;

    async fn save_state(&self) -> Result<DeviceState, HypervisorError> {
        let file = self.state.lock().await;
        file.rewind()
            .map_err(|error| failed("saved", error.to_string()))?;
        // Not live: the disks stay this VM's. What their formats had in memory was written out when
        // the VM stopped.
        let arguments = json!({ "filename": format!("/dev/fdset/{STATE_SET}"), "live": false });
        self.control
            .execute("xen-save-devices-state", arguments, COMMAND_TIMEOUT)
            .await?;
        file.take()
    }
}

/// A process that waits for device state. Dropping it ends it.
#[derive(Debug)]
pub struct QemuStandby {
    vm: QemuVm,
    /// Number of the reading end of the pipe in QEMU.
    incoming_number: i32,
    /// The end to write to.
    state: OwnedFd,
}

impl RestoreState for Qemu {
    type Standby = QemuStandby;

    async fn prepare(&self, hardware: HardwareSpec) -> Result<QemuStandby, HypervisorError> {
        self.standby(hardware, None).await
    }
}

impl Qemu {
    /// Starts a process that is to take over from `vm`: its agent channel is the same one, so that
    /// nothing of what is under way is lost. `vm` must have ended before the successor's guest is
    /// let go on.
    ///
    /// # Errors
    ///
    /// As a launch has them.
    pub async fn prepare_successor(
        &self,
        vm: &QemuVm,
        hardware: HardwareSpec,
    ) -> Result<QemuStandby, HypervisorError> {
        let peer = vm
            .agent_peer
            .try_clone()
            .map_err(|source| HypervisorError::Setup {
                what: "the agent channel",
                source,
            })?;
        self.standby(hardware, Some(peer)).await
    }

    async fn standby(
        &self,
        hardware: HardwareSpec,
        peer: Option<OwnedFd>,
    ) -> Result<QemuStandby, HypervisorError> {
        if hardware.memory.mapping() != MemoryMapping::CopyOnWrite {
            return Err(HypervisorError::InvalidSpec {
                what: "memory that it shares".to_owned(),
                reason: "what starts from saved state has a private view of the memory".to_owned(),
            });
        }
        let (incoming, state) = state_pipe().map_err(|source| HypervisorError::Setup {
            what: "a pipe for the device state",
            source,
        })?;
        let announces = hardware
            .network
            .as_ref()
            .is_some_and(|network| network.announce);
        let mut number = -1;
        let vm = self
            .spawn(hardware, peer, |command, _| {
                number = command.inherit(incoming)?;
                Ok(vec!["-incoming".to_owned(), "defer".to_owned()])
            })
            .await?;
        let capabilities = json!({ "capabilities": [{ "capability": "events", "state": true }] });
        vm.control
            .execute("migrate-set-capabilities", capabilities, START_TIMEOUT)
            .await?;
        if !announces {
            let rounds = json!({ "announce-rounds": 0 });
            vm.control
                .execute("migrate-set-parameters", rounds, START_TIMEOUT)
                .await?;
        }
        Ok(QemuStandby {
            vm,
            incoming_number: number,
            state,
        })
    }
}

impl QemuStandby {
    /// The VM as it will be.
    pub fn vm(&self) -> &QemuVm {
        &self.vm
    }

    /// The owner's end of the agent channel, as [`QemuVm::take_agent`] gives it. To be connected
    /// before the state is loaded, or what the guest was saying then is lost.
    pub fn take_agent(&mut self) -> Option<UnixStream> {
        self.vm.take_agent()
    }

    /// Loads device state. The VM is stopped then: [`resume`](crate::Pause::resume) lets it go on.
    ///
    /// # Errors
    ///
    /// The state does not belong to this hardware, or is damaged. The process has ended then.
    pub async fn load(self, state: &DeviceState) -> Result<QemuVm, HypervisorError> {
        let Self {
            vm,
            incoming_number,
            state: writer,
        } = self;
        let write = write_state(writer, state.as_bytes());
        let arguments = json!({ "uri": format!("fd:{incoming_number}") });
        let load = async {
            vm.control
                .execute("migrate-incoming", arguments, COMMAND_TIMEOUT)
                .await?;
            vm.control.migrated(COMMAND_TIMEOUT).await
        };
        let (written, loaded) = tokio::join!(write, load);
        match loaded {
            Ok(true) => {
                written.map_err(|error| failed("loaded", error.to_string()))?;
                vm.control.forget_events().await;
                Ok(vm)
            }
            Ok(false) | Err(HypervisorError::Disconnected { .. }) => {
                vm.kill_soon().await;
                let exit = vm.wait_exit().await;
                Err(failed("loaded", exit.to_string()))
            }
            Err(error) => Err(error),
        }
    }
}

fn state_pipe() -> io::Result<(OwnedFd, OwnedFd)> {
    let (reader, writer) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC)?;
    // Refused where the user has many pipes already; then it is slower.
    let _ = rustix::pipe::fcntl_setpipe_size(&writer, PIPE_BYTES);
    Ok((reader, writer))
}

async fn write_state(writer: OwnedFd, state: &[u8]) -> io::Result<()> {
    rustix::io::ioctl_fionbio(&writer, true)?;
    let mut writer = pipe::Sender::from_owned_fd(writer)?;
    writer.write_all(state).await
}
