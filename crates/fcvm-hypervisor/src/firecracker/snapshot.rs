//! Snapshots: the state of a paused VM and its memory, written to files, and VMs that begin with them.
//!
//! Disks are no part of a snapshot. Their paths are, and so is that of the vsock's socket: all are
//! names in the VM's directory, so that a clone finds its own disks and its own socket by them in its
//! own. Connections over vsock end with a snapshot, on both sides of it: the guest is told to forget them.

use std::path::{Path, PathBuf};

use serde::Serialize;

use super::configuration::NetworkInterface;
use super::launch::{COMMAND_TIMEOUT, FirecrackerVm, check};
use super::{Firecracker, NAME};
use crate::check::{check_file, text_path};
use crate::error::HypervisorError;
use crate::spec::{HardwareSpec, MemoryMapping};

/// Which memory is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SavedMemory {
    /// All of it.
    Full,
    /// The pages that the host has in memory for the VM; the file gets holes for the rest. For a clone
    /// these are all that the page cache has of the file it began with, written to or not: what is
    /// its own is told by pagemap(5) instead. Firecracker's own tracking of writes is not used, as each
    /// first write to a page would cost the guest an exit.
    Difference,
}

/// The files of a snapshot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SnapshotFiles {
    /// Processors and devices, in Firecracker's own format.
    pub state: PathBuf,
    /// Guest memory, byte for byte.
    pub memory: PathBuf,
}

/// Where a VM gets its memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum MemoryBackend {
    /// A file that is mapped privately: clones share what they do not write to.
    File(PathBuf),
    /// The socket of a process that serves page faults, userfaultfd(2).
    Uffd(PathBuf),
}

#[derive(Serialize)]
struct CreateSnapshot {
    snapshot_type: &'static str,
    snapshot_path: String,
    mem_file_path: String,
}

#[derive(Serialize)]
struct LoadSnapshot {
    snapshot_path: String,
    mem_backend: Backend,
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

impl FirecrackerVm {
    /// Writes a snapshot. The VM must be paused and stays so; its agent connects anew when it goes on.
    ///
    /// # Errors
    ///
    /// It is not paused, or a file cannot be written: what is in the files then is no snapshot.
    pub async fn save(
        &self,
        files: &SnapshotFiles,
        memory: SavedMemory,
    ) -> Result<(), HypervisorError> {
        let request = CreateSnapshot {
            snapshot_type: match memory {
                SavedMemory::Full => "Full",
                SavedMemory::Difference => "Diff",
            },
            snapshot_path: text_path(&files.state, "the state file")?,
            mem_file_path: text_path(&files.memory, "the memory file")?,
        };
        self.api
            .put("/snapshot/create", &request, COMMAND_TIMEOUT)
            .await
            .map_err(|error| refused("saved", error))
    }
}

/// A process that waits for a snapshot. Dropping it ends it.
#[derive(Debug)]
pub struct FirecrackerStandby {
    vm: FirecrackerVm,
    network_overrides: Vec<(&'static str, String)>,
}

impl Firecracker {
    /// Starts a process for a VM that begins with a snapshot of the same hardware. It has disks, a
    /// network and a console of its own; its memory comes with the snapshot.
    ///
    /// # Errors
    ///
    /// As [`Launch::launch`](crate::Launch::launch).
    pub async fn prepare(
        &self,
        hardware: HardwareSpec,
    ) -> Result<FirecrackerStandby, HypervisorError> {
        check(&hardware, MemoryMapping::CopyOnWrite)?;
        let network = match &hardware.network {
            Some(network) => Some(NetworkInterface::new(network)?),
            None => None,
        };
        let overrides = network.into_iter();
        Ok(FirecrackerStandby {
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

    /// Loads a snapshot. The VM is paused then: [`resume`](crate::Pause::resume) lets it go on.
    ///
    /// # Errors
    ///
    /// The files are not there, damaged, or of another version or hardware. The process has ended then.
    pub async fn load(
        self,
        state: &Path,
        memory: &MemoryBackend,
    ) -> Result<FirecrackerVm, HypervisorError> {
        check_file(state, "the state file")?;
        let (backend_type, path) = match memory {
            MemoryBackend::File(path) => {
                check_file(path, "the memory file")?;
                ("File", path)
            }
            MemoryBackend::Uffd(path) => ("Uffd", path),
        };
        let overrides = self.network_overrides.into_iter();
        let request = LoadSnapshot {
            snapshot_path: text_path(state, "the state file")?,
            mem_backend: Backend {
                backend_type,
                backend_path: text_path(path, "the memory's place")?,
            },
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
            Ok(()) => Ok(self.vm),
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
    HypervisorError::State { what, reason }
}
