//! Starting Firecracker, watching it, ending it.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::time::Duration;

use fcvm_process::{HelperCommand, HelperProcess};
use fcvm_types::record::ProcessIdentity;
use serde::Serialize;
use tokio::net::UnixListener;

use super::api::ApiClient;
use super::configuration::{
    Action, BootSource, DeviceLine, Drive, Entropy, MachineConfiguration, NetworkInterface, VSOCK,
    VmState, kernel_arguments,
};
use super::jail::Jail;
use super::metrics::{Counters, METRICS_NAME, Metrics, MetricsReader};
use super::place::Place;
use super::{Firecracker, NAME};
use crate::check::{check_file, check_hardware, setup_failed};
use crate::error::HypervisorError;
use crate::spec::{
    Accelerator, BootSpec, DiskSpec, HardwareSpec, LaunchSpec, MemoryMapping, NetworkBackend,
    NetworkSpec,
};
use crate::version::Version;
use crate::vm::{AgentChannel, ExitCause, VmEvent, VmExit};
use crate::{Launch, Pause};

/// Name of the process in messages and records.
pub(super) const ROLE: &str = "firecracker";
/// Most processors of a VM.
pub const CPU_COUNT_MAX: u32 = 32;
/// Name of the control socket.
pub(super) const API_NAME: &str = "api";
/// What messages call the files.
const KERNEL: &str = "the kernel";
const INITRAMFS: &str = "the initramfs";
/// Name of the file of device state.
pub(super) const STATE_NAME: &str = "state";
/// Name of the memory of a VM that begins with saved state.
pub(super) const MEMORY_NAME: &str = "memory";
/// How long Firecracker may take until it answers: 10 ms on an idle host, and half a minute where twenty start
/// at a time on one emulated processor.
const START_TIMEOUT: Duration = Duration::from_secs(120);
/// How long it may take to do what it is told, where that is not to write memory. It gives itself 30 s to hear
/// from its processors.
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
    /// The process's, which is not the helper's where it is jailed.
    identity: ProcessIdentity,
    metrics: MetricsReader,
    /// The user namespace that it is in, where that is not the owner's.
    pub(super) users: Option<OwnedFd>,
    /// The memory of a VM that begins with saved state, for its jail: it is not whole before the state is there.
    pub(super) memory: Option<File>,
    pub(super) place: Place,
}

impl Launch for Firecracker {
    type Vm = FirecrackerVm;

    async fn launch(&self, spec: LaunchSpec) -> Result<FirecrackerVm, HypervisorError> {
        let plan = Plan::new(self, &spec.hardware, &spec.boot)?;
        let vm = self.spawn(spec.hardware).await?;
        match plan.carry_out(&vm).await {
            Ok(()) => Ok(vm),
            Err(error) => Err(vm.explain(error).await),
        }
    }
}

impl Firecracker {
    /// Starts the process, which knows nothing of its VM yet.
    pub(super) async fn spawn(
        &self,
        mut spec: HardwareSpec,
    ) -> Result<FirecrackerVm, HypervisorError> {
        let mut place = Place::create(self)
            .map_err(setup_failed("the directory of the hypervisor's sockets"))?;
        let agent = place
            .bind_agent()
            .map_err(setup_failed("the agent channel"))?;
        let mut line = DeviceLine::new(&spec, Version::default());
        let (mut command, network) = self.command(&place, &mut spec)?;
        // The guest's console is the process's standard output.
        command.no_new_privileges().stdout(spec.console);
        let state = place
            .add_state(&mut command, STATE_NAME)
            .map_err(setup_failed("a file for the device state"))?;
        // One that boots has memory of its own.
        let memory = (spec.memory.mapping() == MemoryMapping::CopyOnWrite)
            .then(|| File::from(OwnedFd::from(spec.memory)));
        let memory = add_files(&mut place, &mut command, memory, spec.disks, self.jail())
            .map_err(setup_failed("the files"))?;
        let metrics = place
            .add_metrics()
            .map_err(setup_failed("the pipe for its counters"))?;
        tracing::trace!("{command:?}");
        let helper = command.spawn().map_err(|source| HypervisorError::Spawn {
            path: self.program().to_owned(),
            source,
        })?;
        let api = ApiClient::new(place.path().join(API_NAME));
        line.firecracker_version = self.connect(&helper, &api).await?;
        let identity = match self.jail() {
            None => helper.identity(),
            // The helper is what began the VM's processes.
            Some(_) => api.server().await?,
        };
        place
            .mount(identity)
            .map_err(setup_failed("the disks in the jail"))?;
        let vm = FirecrackerVm {
            helper,
            identity,
            api,
            agent: Some(agent),
            device_line: line,
            state,
            metrics,
            users: network.users,
            memory,
            place,
        };
        let metrics = Metrics {
            metrics_path: METRICS_NAME,
        };
        match put(&vm.api, "/metrics", &metrics).await {
            Ok(()) => Ok(vm),
            Err(error) => Err(vm.explain(error).await),
        }
    }

    /// The command that starts the process, and what it has to find of its network.
    fn command(
        &self,
        place: &Place,
        spec: &mut HardwareSpec,
    ) -> Result<(HelperCommand, Namespaces), HypervisorError> {
        let namespaces = match spec.network.take() {
            Some(NetworkSpec {
                backend: NetworkBackend::Tap { namespaces, .. },
                ..
            }) => namespaces,
            _ => Vec::new(),
        };
        if let Some(jail) = self.jail() {
            // The jailer opens the network's namespace by the owner's descriptor of it.
            let network = namespaces.into_iter().next_back();
            let mut command =
                jail.command(self.program(), self.directory(), spec, network.as_ref());
            command.args(self.bus());
            let users = None;
            return Ok((
                command,
                Namespaces {
                    users,
                    _network: network,
                },
            ));
        }
        let users = match namespaces.as_slice() {
            [users, _network] => Some(users.try_clone().map_err(setup_failed("the descriptors"))?),
            _ => None,
        };
        let mut command = HelperCommand::new(ROLE, self.program());
        command
            .namespaces(namespaces)
            .directory(place.path())
            .args(["--api-sock", API_NAME, "--id", "fcvm"])
            // What it has to say comes behind one another on standard error.
            .args(["--log-path", "/proc/self/fd/2", "--level", "Warning"])
            .args(self.bus());
        let _network = None;
        Ok((command, Namespaces { users, _network }))
    }

    /// What the program is told of the bus of its VM's devices.
    fn bus(&self) -> &'static [&'static str] {
        match self.pci() {
            true => &["--enable-pci"],
            false => &[],
        }
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

/// Makes memory and disks reachable; gives the memory back where a jail is to have it later.
fn add_files(
    place: &mut Place,
    command: &mut HelperCommand,
    mut memory: Option<File>,
    disks: Vec<DiskSpec>,
    jail: Option<&Jail>,
) -> io::Result<Option<File>> {
    if let Some(memory) = memory.take_if(|_| jail.is_none()) {
        place.add(command, memory, true, MEMORY_NAME)?;
    }
    for (index, mut disk) in disks.into_iter().enumerate() {
        if let Some(layer) = disk.layers.pop() {
            let name = format!("disk{index}");
            place.add(command, layer.file, disk.read_only, &name)?;
        }
    }
    Ok(memory)
}

/// Namespaces of a process that is being started.
struct Namespaces {
    /// The user namespace, where it has one of its own.
    users: Option<OwnedFd>,
    /// Kept until it has been entered.
    _network: Option<OwnedFd>,
}

/// The requests that make a VM and start it, in their order.
struct Plan {
    machine: MachineConfiguration,
    kernel: PathBuf,
    initramfs: Option<PathBuf>,
    boot_args: String,
    drives: Vec<Drive>,
    network: Option<NetworkInterface>,
}

impl Plan {
    /// Refuses what Firecracker would refuse, before it is started.
    fn new(
        firecracker: &Firecracker,
        hardware: &HardwareSpec,
        boot: &BootSpec,
    ) -> Result<Self, HypervisorError> {
        check(hardware, MemoryMapping::Shared)?;
        check_file(&boot.kernel, KERNEL)?;
        if let Some(path) = &boot.initramfs {
            check_file(path, INITRAMFS)?;
        }
        let drives = hardware.disks.iter().enumerate();
        Ok(Self {
            machine: MachineConfiguration::new(
                hardware.cpu_count,
                hardware.memory.size(),
                firecracker.hugepages(),
            )?,
            kernel: boot.kernel.clone(),
            initramfs: boot.initramfs.clone(),
            boot_args: kernel_arguments(
                &hardware.disks,
                firecracker.pci(),
                &boot.extra_kernel_args,
            ),
            drives: drives
                .map(|(index, disk)| Drive::new(index, disk))
                .collect::<Result<_, _>>()?,
            network: match &hardware.network {
                Some(network) => Some(NetworkInterface::new(network)?),
                None => None,
            },
        })
    }

    async fn carry_out(&self, vm: &FirecrackerVm) -> Result<(), HypervisorError> {
        let api = &vm.api;
        let boot = BootSource {
            kernel_image_path: vm.place.shown(&self.kernel, "kernel", KERNEL)?,
            initrd_path: match &self.initramfs {
                Some(path) => Some(vm.place.shown(path, "initramfs", INITRAMFS)?),
                None => None,
            },
            boot_args: self.boot_args.clone(),
        };
        put(api, "/machine-config", &self.machine).await?;
        put(api, "/boot-source", &boot).await?;
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
        self.identity
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

    /// What has happened in it so far, as Firecracker counts it.
    ///
    /// # Errors
    ///
    /// Firecracker does not answer.
    pub async fn counters(&self) -> Result<Counters, HypervisorError> {
        let before = self.metrics.line_count();
        let flush = Action {
            action_type: "FlushMetrics",
        };
        put(&self.api, "/actions", &flush).await?;
        let told = tokio::time::timeout(COMMAND_TIMEOUT, self.metrics.after(before)).await;
        told.map_err(|_| HypervisorError::Timeout {
            hypervisor: NAME,
            command: "FlushMetrics".to_owned(),
            timeout_s: COMMAND_TIMEOUT.as_secs(),
        })
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
