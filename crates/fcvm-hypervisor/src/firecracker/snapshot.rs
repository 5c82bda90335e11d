//! Snapshots: the state of a paused VM and its memory, and VMs that begin with them.
//!
//! Disks are no part of a snapshot. Their paths are, and so is that of the vsock's socket: all are
//! names in the VM's directory, so that a clone finds its own disks and its own socket by them in its
//! own. Connections over vsock end with a snapshot, on both sides of it: the guest is told to forget them.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Duration;

use fcvm_process::{HelperCommand, HelperProcess};
use serde::Serialize;
use tokio::net::UnixListener;

use super::configuration::NetworkInterface;
use super::launch::{COMMAND_TIMEOUT, FirecrackerVm, MEMORY_NAME, STATE_NAME, check};
use super::place::Output;
use super::{Firecracker, NAME, hugepages};
use crate::RestoreState;
use crate::check::setup_failed;
use crate::error::HypervisorError;
use crate::spec::{HardwareSpec, MemoryMapping};
use crate::state::{DEVICE_STATE_BYTES_MAX, DeviceState, failed};
use crate::vm::{AgentChannel, MemoryBackend};

/// Bytes of memory a second that are written at the least: fewer than any disk that VMs are kept on takes.
const SAVED_BYTES_PER_S: u64 = 8 << 20;
/// A program that waits until it is killed.
const HOLDER: &str = "/bin/sleep";

/// Which memory is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SavedMemory {
    /// All of it.
    Full,
    /// Over what the file holds. Of a VM that booted, the pages that the host has in memory for it, and so not
    /// what the host has swapped out. Of one that began with saved state, the pages that were written
    /// since, or since it was saved the last time: first writes to a private mapping of a file are
    /// faults anyhow, and to track them costs next to nothing. In hugepages, which would be mapped in small pieces for
    /// it, nothing is tracked: all pages that came are taken for written.
    Difference,
}

#[derive(Serialize)]
struct CreateSnapshot {
    snapshot_type: &'static str,
    snapshot_path: &'static str,
    mem_file_path: String,
}

#[derive(Serialize)]
struct LoadSnapshot {
    snapshot_path: &'static str,
    mem_backend: Backend,
    track_dirty_pages: bool,
    /// The owner lets it go on when all is ready.
    resume_vm: bool,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    network_overrides: Vec<NetworkOverride>,
}

#[derive(Serialize)]
struct Backend {
    backend_type: &'static str,
    backend_path: String,
}

#[derive(Serialize)]
struct NetworkOverride {
    iface_id: &'static str,
    host_dev_name: String,
}

/// Where it writes its memory.
struct Target {
    mem_file_path: String,
    /// Its file in a jail, which is copied afterwards.
    output: Option<Output>,
    /// Who has the file for it.
    _holder: Option<HelperProcess>,
}

impl FirecrackerVm {
    /// Saves the state, and the memory into a file of its size. The VM must be paused and stays so; its agent
    /// connects anew when it goes on.
    ///
    /// # Errors
    ///
    /// It is not paused, or the host has no space left: what is in the file then is no memory, and only
    /// [`SavedMemory::Full`] will do the next time.
    pub async fn save(
        &self,
        memory: &File,
        saved: SavedMemory,
    ) -> Result<DeviceState, HypervisorError> {
        let Target {
            mem_file_path,
            output,
            _holder,
        } = self.target(memory)?;
        let request = CreateSnapshot {
            snapshot_type: match saved {
                SavedMemory::Full => "Full",
                SavedMemory::Difference => "Diff",
            },
            snapshot_path: STATE_NAME,
            mem_file_path,
        };
        let bytes = self.device_line().memory_bytes;
        self.api
            .put("/snapshot/create", &request, save_timeout(bytes))
            .await
            .map_err(|error| refused("saved", error))?;
        if let Some(output) = output {
            let copied = output.copy_to(memory);
            copied.map_err(|error| failed("saved", error.to_string()))?;
        }
        let read = || {
            let length = self.state.metadata()?.len();
            let length = length.min(DEVICE_STATE_BYTES_MAX + 1);
            let mut bytes = vec![0; usize::try_from(length).unwrap_or(0)];
            self.state.read_exact_at(&mut bytes, 0)?;
            self.state.set_len(0)?;
            Ok(bytes)
        };
        let bytes = read().map_err(|error: io::Error| failed("saved", error.to_string()))?;
        DeviceState::from_bytes(bytes)
    }

    /// How it can write to a file that has come when it ran already: by a name of its owner's where it may look
    /// at its owner, which is in no other user namespace.
    fn target(&self, memory: &File) -> Result<Target, HypervisorError> {
        let output = self.place.output(memory);
        let output = output.map_err(setup_failed("a file for the memory"))?;
        if output.is_some() {
            return Ok(Target {
                mem_file_path: Output::NAME.to_owned(),
                output,
                _holder: None,
            });
        }
        let by_name = |mem_file_path, _holder| Target {
            mem_file_path,
            output: None,
            _holder,
        };
        let path = |pid: i32, number: RawFd| format!("/proc/{pid}/fd/{number}");
        let Some(users) = &self.users else {
            let pid = rustix::process::getpid().as_raw_nonzero().get();
            return Ok(by_name(path(pid, memory.as_raw_fd()), None));
        };
        let hold = || {
            let mut command = HelperCommand::new("holder", Path::new(HOLDER));
            command.arg("infinity").namespaces(vec![users.try_clone()?]);
            let number = command.inherit(memory.try_clone()?.into())?;
            let holder = command.spawn()?;
            Ok(by_name(path(holder.identity().pid, number), Some(holder)))
        };
        hold().map_err(setup_failed("who holds a file for it"))
    }
}

/// How long a save may take: the memory is written meanwhile.
fn save_timeout(memory_bytes: u64) -> Duration {
    COMMAND_TIMEOUT + Duration::from_secs(memory_bytes / SAVED_BYTES_PER_S)
}

/// A process that waits for a snapshot. Dropping it ends it.
#[derive(Debug)]
pub struct FirecrackerStandby {
    vm: FirecrackerVm,
    track_dirty_pages: bool,
    network_overrides: Vec<(&'static str, String)>,
}

impl RestoreState for Firecracker {
    type Standby = FirecrackerStandby;

    async fn prepare(&self, hardware: HardwareSpec) -> Result<FirecrackerStandby, HypervisorError> {
        check(&hardware, MemoryMapping::CopyOnWrite)?;
        if self.hugepages() {
            hugepages::check(hardware.memory.size())?;
        }
        let network = match &hardware.network {
            Some(network) => Some(NetworkInterface::new(network)?),
            None => None,
        };
        let overrides = network.into_iter();
        Ok(FirecrackerStandby {
            track_dirty_pages: !self.hugepages(),
            network_overrides: overrides
                .map(|network| (network.iface_id, network.host_dev_name))
                .collect(),
            vm: self.spawn(hardware).await?,
        })
    }
}

impl FirecrackerStandby {
    /// The VM as it will be.
    pub fn vm(&self) -> &FirecrackerVm {
        &self.vm
    }

    /// The owner's end of the agent channel, to which the agent connects; the first call gets it.
    pub fn take_agent(&mut self) -> Option<AgentChannel> {
        self.vm.take_agent()
    }

    /// A jailed process reaches no memory server: it connects here, and whoever loads the state hands the connection
    /// to the server. Nothing without a jail.
    ///
    /// # Errors
    ///
    /// There is no place for a socket.
    pub fn memory_listener(&self) -> Result<Option<UnixListener>, HypervisorError> {
        let bound = self.vm.place.bind_memory();
        bound.map_err(setup_failed("a socket for the memory"))
    }

    /// Loads a snapshot. The VM is paused then: [`resume`](crate::Pause::resume) lets it go on.
    ///
    /// # Errors
    ///
    /// The state is damaged, or of another version or hardware, or nobody serves the memory. The process
    /// has ended then.
    pub async fn load(
        self,
        state: &DeviceState,
        memory: &MemoryBackend,
    ) -> Result<FirecrackerVm, HypervisorError> {
        let (backend_type, backend_path) = match memory {
            MemoryBackend::File => {
                if let Some(memory) = &self.vm.memory {
                    let laid_in = self.vm.place.lay_in(memory, MEMORY_NAME);
                    laid_in.map_err(setup_failed("the memory's file"))?;
                }
                ("File", MEMORY_NAME.to_owned())
            }
            MemoryBackend::Uffd(socket) => ("Uffd", self.vm.place.memory_socket(socket)?),
        };
        let file = &self.vm.state;
        let write = || {
            file.set_len(0)?;
            file.write_all_at(state.as_bytes(), 0)
        };
        write().map_err(|error| failed("loaded", error.to_string()))?;
        let overrides = self.network_overrides.into_iter();
        let request = LoadSnapshot {
            snapshot_path: STATE_NAME,
            mem_backend: Backend {
                backend_type,
                backend_path,
            },
            track_dirty_pages: self.track_dirty_pages,
            resume_vm: false,
            network_overrides: overrides
                .map(|(iface_id, host_dev_name)| NetworkOverride {
                    iface_id,
                    host_dev_name,
                })
                .collect(),
        };
        let loaded = self
            .vm
            .api
            .put("/snapshot/load", &request, COMMAND_TIMEOUT)
            .await;
        match loaded {
            Ok(()) => {
                // It is in memory twice otherwise.
                let _ = self.vm.state.set_len(0);
                Ok(self.vm)
            }
            Err(error) => Err(refused("loaded", self.vm.explain(error).await)),
        }
    }
}

/// Why a snapshot could not be saved or loaded, where that is known.
fn refused(what: &'static str, error: HypervisorError) -> HypervisorError {
    let reason = match error {
        HypervisorError::Refused { reason, .. } => format!("{NAME} says: {reason}"),
        HypervisorError::ExitedAtStart { reason } => reason,
        error => return error,
    };
    failed(what, reason)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn more_memory_has_more_time_to_be_saved() {
        let small = save_timeout(128 << 20);
        assert_eq!(small, COMMAND_TIMEOUT + Duration::from_secs(16));
        assert!(save_timeout(64 << 30) > Duration::from_secs(2 * 3600));
    }
}
