//! Starting Firecracker, watching it, ending it.

use std::fs::{self, File};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, symlink};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use fcvm_process::{HelperCommand, HelperProcess};
use fcvm_types::guest::AGENT_VSOCK_PORT;
use fcvm_types::record::ProcessIdentity;
use serde::Serialize;
use tokio::net::UnixListener;

use super::api::ApiClient;
use super::configuration::{
    Action, BootSource, DeviceLine, Drive, Entropy, MachineConfiguration, NetworkInterface, VSOCK,
    VSOCK_NAME, VmState, kernel_arguments,
};
use super::{Firecracker, NAME};
use crate::check::{check_file, check_hardware, setup_failed, text_path};
use crate::error::HypervisorError;
use crate::spec::{Accelerator, BootSpec, HardwareSpec, LaunchSpec, MemoryMapping};
use crate::version::Version;
use crate::vm::{AgentChannel, ExitCause, VmEvent, VmExit};
use crate::{Launch, Pause};

/// Name of the process in messages and records.
const ROLE: &str = "firecracker";
/// Most processors of a VM.
const CPU_COUNT_MAX: u32 = 32;
/// Name of the control socket.
const API_NAME: &str = "api";
/// Name of the file of device state.
pub(super) const STATE_NAME: &str = "state";
/// Name of the memory of a VM that begins with saved state.
pub(super) const MEMORY_NAME: &str = "memory";
/// How long Firecracker may take until it answers. It takes 10 ms on an idle host.
const START_TIMEOUT: Duration = Duration::from_secs(30);
/// How long it may take to do what it is told. It gives itself 30 s to hear from its processors.
pub(super) const COMMAND_TIMEOUT: Duration = Duration::from_secs(35);
/// How long an end that has begun may take.
const END_TIMEOUT: Duration = Duration::from_secs(1);

/// A running VM. Dropping it kills Firecracker and waits for its end.
#[derive(Debug)]
pub struct FirecrackerVm {
    helper: HelperProcess,
    pub(super) api: ApiClient,
    agent: Option<UnixListener>,
    device_line: DeviceLine,
    /// Where device state is saved and loaded from.
    pub(super) state: File,
    _directory: Directory,
}

impl Launch for Firecracker {
    type Vm = FirecrackerVm;

    async fn launch(&self, spec: LaunchSpec) -> Result<FirecrackerVm, HypervisorError> {
        let plan = Plan::new(&spec.hardware, &spec.boot)?;
        let vm = self.spawn(spec.hardware).await?;
        match plan.carry_out(&vm.api).await {
            Ok(()) => Ok(vm),
            Err(error) => Err(vm.explain(error).await),
        }
    }
}

impl Firecracker {
    /// Starts the process, which knows nothing of its VM yet.
    pub(super) async fn spawn(&self, spec: HardwareSpec) -> Result<FirecrackerVm, HypervisorError> {
        let directory = Directory::create(self.directory())
            .map_err(setup_failed("the directory of the hypervisor's sockets"))?;
        let agent = directory
            .path
            .join(format!("{VSOCK_NAME}_{AGENT_VSOCK_PORT}"));
        let agent = UnixListener::bind(agent).map_err(setup_failed("the agent channel"))?;
        let mut line = DeviceLine::new(&spec, Version::default());
        let state = state_file().map_err(setup_failed("a file for the device state"))?;
        let mut command = HelperCommand::new(ROLE, self.program());
        command
            .no_new_privileges()
            .directory(&directory.path)
            // The guest's console is the process's standard output.
            .stdout(spec.console)
            .args(["--api-sock", API_NAME, "--id", "fcvm"])
            // What it has to say comes behind one another on standard error.
            .args(["--log-path", "/proc/self/fd/2", "--level", "Warning"]);
        let mut linked = vec![(STATE_NAME.to_owned(), copy_of(&state)?)];
        if spec.memory.mapping() == MemoryMapping::CopyOnWrite {
            // One that boots has memory of its own.
            linked.push((MEMORY_NAME.to_owned(), spec.memory.into()));
        }
        for (index, mut disk) in spec.disks.into_iter().enumerate() {
            if let Some(layer) = disk.layers.pop() {
                linked.push((format!("disk{index}"), layer.file.into()));
            }
        }
        for (name, fd) in linked {
            link_descriptor(&mut command, fd, &directory.path.join(name))
                .map_err(setup_failed("the descriptors"))?;
        }
        tracing::trace!("{command:?}");
        let helper = command.spawn().map_err(|source| HypervisorError::Spawn {
            path: self.program().to_owned(),
            source,
        })?;
        let api = ApiClient::new(directory.path.join(API_NAME));
        line.firecracker_version = self.connect(&helper, &api).await?;
        Ok(FirecrackerVm {
            helper,
            api,
            agent: Some(agent),
            device_line: line,
            state,
            _directory: directory,
        })
    }

    /// Waits until Firecracker answers; tells why it ended, where it does not.
    async fn connect(
        &self,
        helper: &HelperProcess,
        api: &ApiClient,
    ) -> Result<Version, HypervisorError> {
        let answered = async {
            api.listening(START_TIMEOUT).await?;
            api.version(START_TIMEOUT).await
        };
        let exit = tokio::select! {
            version = answered => match version {
                Ok(version) => return self.require(version).map(|()| version),
                Err(error @ HypervisorError::Disconnected { .. }) => {
                    let Ok(exit) = tokio::time::timeout(END_TIMEOUT, helper.wait()).await else {
                        return Err(error);
                    };
                    exit
                }
                Err(error) => return Err(error),
            },
            exit = helper.wait() => exit,
        };
        // A version that is too old, or another program, explains what it may have printed.
        self.check_version()?;
        Err(HypervisorError::ExitedAtStart {
            reason: exit.to_string(),
        })
    }
}

/// An anonymous file.
fn state_file() -> io::Result<File> {
    let file = rustix::fs::memfd_create("fcvm-device-state", rustix::fs::MemfdFlags::CLOEXEC)?;
    Ok(file.into())
}

fn copy_of(file: &File) -> Result<OwnedFd, HypervisorError> {
    let copy = file.try_clone().map_err(setup_failed("the descriptors"))?;
    Ok(copy.into())
}

/// Makes a descriptor of the process reachable by a name in its directory.
fn link_descriptor(command: &mut HelperCommand, fd: OwnedFd, name: &Path) -> io::Result<()> {
    let number = command.inherit(fd)?;
    symlink(format!("/proc/self/fd/{number}"), name)
}

/// The requests that make a VM and start it, in their order.
struct Plan {
    machine: MachineConfiguration,
    boot: BootSource,
    drives: Vec<Drive>,
    network: Option<NetworkInterface>,
}

impl Plan {
    /// Refuses what Firecracker would refuse, before it is started.
    fn new(hardware: &HardwareSpec, boot: &BootSpec) -> Result<Self, HypervisorError> {
        check(hardware, MemoryMapping::Shared)?;
        check_file(&boot.kernel, "the kernel")?;
        if let Some(path) = &boot.initramfs {
            check_file(path, "the initramfs")?;
        }
        let drives = hardware.disks.iter().enumerate();
        Ok(Self {
            machine: MachineConfiguration::new(hardware.cpu_count, hardware.memory.size())?,
            boot: BootSource {
                kernel_image_path: text_path(&boot.kernel, "the kernel")?,
                initrd_path: match &boot.initramfs {
                    Some(path) => Some(text_path(path, "the initramfs")?),
                    None => None,
                },
                boot_args: kernel_arguments(&hardware.disks, &boot.extra_kernel_args),
            },
            drives: drives
                .map(|(index, disk)| Drive::new(index, disk))
                .collect::<Result<_, _>>()?,
            network: match &hardware.network {
                Some(network) => Some(NetworkInterface::new(network)?),
                None => None,
            },
        })
    }

    async fn carry_out(&self, api: &ApiClient) -> Result<(), HypervisorError> {
        put(api, "/machine-config", &self.machine).await?;
        put(api, "/boot-source", &self.boot).await?;
        for drive in &self.drives {
            put(api, &format!("/drives/{}", drive.drive_id), drive).await?;
        }
        if let Some(network) = &self.network {
            let path = format!("/network-interfaces/{}", network.iface_id);
            put(api, &path, network).await?;
        }
        put(api, "/vsock", &VSOCK).await?;
        put(api, "/entropy", &Entropy {}).await?;
        let start = Action {
            action_type: "InstanceStart",
        };
        put(api, "/actions", &start).await
    }
}

async fn put(api: &ApiClient, path: &str, body: &impl Serialize) -> Result<(), HypervisorError> {
    api.put(path, body, COMMAND_TIMEOUT).await
}

/// Refuses hardware that Firecracker cannot have, and memory that is not mapped as it has to be.
pub(super) fn check(
    hardware: &HardwareSpec,
    mapping: MemoryMapping,
) -> Result<(), HypervisorError> {
    check_hardware(hardware, CPU_COUNT_MAX)?;
    let refuse = |what: &str, reason: String| {
        Err(HypervisorError::InvalidSpec {
            what: what.to_owned(),
            reason,
        })
    };
    if hardware.accelerator != Accelerator::Kvm {
        return refuse("emulated instructions", format!("{NAME} needs KVM"));
    }
    if hardware.memory.mapping() != mapping {
        return match mapping {
            MemoryMapping::Shared => refuse(
                "the memory of another",
                "what boots has memory of its own".to_owned(),
            ),
            MemoryMapping::CopyOnWrite => refuse(
                "memory that it shares",
                "what starts from saved state has a private view of the memory".to_owned(),
            ),
        };
    }
    Ok(())
}

impl FirecrackerVm {
    /// Firecracker's process id and start time.
    pub fn identity(&self) -> ProcessIdentity {
        self.helper.identity()
    }

    /// The owner's end of the agent channel, to which the agent connects; the first call gets it.
    pub fn take_agent(&mut self) -> Option<AgentChannel> {
        self.agent.take().map(AgentChannel::Awaited)
    }

    /// Its hardware, and Firecracker's version.
    pub fn device_line(&self) -> &DeviceLine {
        &self.device_line
    }

    /// There are no events: waits until there can be none any more.
    pub async fn next_event(&self) -> Option<VmEvent> {
        self.helper.wait().await;
        None
    }

    /// Waits until the VM has ended. May be called again, cancelled and called by many.
    pub async fn wait_exit(&self) -> VmExit {
        let process = self.helper.wait().await;
        let cause = match (process.status.signal(), process.status.code()) {
            (Some(signal), _) => ExitCause::Killed(signal),
            // A guest cannot power off, only reset: the agent does as well.
            (None, Some(0)) => ExitCause::Reset,
            (None, _) => ExitCause::Failed,
        };
        VmExit { cause, process }
    }

    /// Ends the VM at once, as pulling the plug does. [`wait_exit`](Self::wait_exit) tells when it
    /// has ended.
    pub fn kill(&self) {
        self.helper.kill();
    }

    /// Whether the virtual processors run.
    ///
    /// # Errors
    ///
    /// Firecracker does not answer.
    pub async fn is_running(&self) -> Result<bool, HypervisorError> {
        Ok(self.api.state(COMMAND_TIMEOUT).await? == "Running")
    }

    async fn set_state(&self, state: &'static str) -> Result<(), HypervisorError> {
        self.api
            .patch("/vm", &VmState { state }, COMMAND_TIMEOUT)
            .await
    }

    /// The reason why a VM did not start: that the process ended tells more than a lost connection.
    pub(super) async fn explain(self, error: HypervisorError) -> HypervisorError {
        if !matches!(error, HypervisorError::Disconnected { .. }) {
            return error;
        }
        match tokio::time::timeout(END_TIMEOUT, self.helper.wait()).await {
            Ok(exit) => HypervisorError::ExitedAtStart {
                reason: exit.to_string(),
            },
            Err(_) => error,
        }
    }
}

impl Pause for FirecrackerVm {
    async fn pause(&self) -> Result<(), HypervisorError> {
        self.set_state("Paused").await
    }

    async fn resume(&self) -> Result<(), HypervisorError> {
        self.set_state("Resumed").await
    }
}

/// The directory of a VM's sockets, for this user alone. Dropping it removes it.
#[derive(Debug)]
struct Directory {
    path: PathBuf,
}

impl Directory {
    fn create(path: &Path) -> io::Result<Self> {
        fs::DirBuilder::new().mode(0o700).create(path)?;
        Ok(Self {
            path: path.to_owned(),
        })
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir_all(&self.path) {
            tracing::debug!("cannot remove {}: {error}", self.path.display());
        }
    }
}
