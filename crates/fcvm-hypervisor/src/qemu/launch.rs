//! Starting QEMU, watching it, ending it.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::process::ExitStatusExt;
use std::time::Duration;

use fcvm_process::{HelperCommand, HelperProcess};
use fcvm_types::record::ProcessIdentity;
use rustix::io::Errno;
use rustix::net::{AddressFamily, RecvFlags, SocketFlags, SocketType};
use serde_json::Value;
use tokio::net::UnixStream;

use super::Qemu;
use super::api::QmpClient;
use super::command_line::{Backend, Boot, Descriptors, DeviceLine, Disk, Machine, Network};
use super::snapshot::StateFile;
use crate::check::{check_file, check_hardware, setup_failed, text_path};
use crate::error::HypervisorError;
use crate::spec::{CPU_COUNT_MAX, DiskSpec, HardwareSpec, LaunchSpec, NetworkBackend, NetworkSpec};
use crate::version::Version;
use crate::vm::{ExitCause, VmEvent, VmExit};
use crate::{Launch, Pause};

/// How long QEMU may take until it answers. It takes 50 ms on an idle host.
pub(super) const START_TIMEOUT: Duration = Duration::from_secs(30);
/// How long it may take to answer a command.
pub(super) const COMMAND_TIMEOUT: Duration = Duration::from_secs(10);
/// How long after its end its last events are waited for. They are in the socket already.
const LAST_EVENTS_TIMEOUT: Duration = Duration::from_secs(1);

/// A running VM. Dropping it kills QEMU and waits for its end.
#[derive(Debug)]
pub struct QemuVm {
    pub(super) helper: HelperProcess,
    pub(super) control: QmpClient,
    agent: Option<UnixStream>,
    /// The hypervisor's end of the agent channel, for a successor.
    pub(super) agent_peer: OwnedFd,
    pub(super) state: tokio::sync::Mutex<StateFile>,
    device_line: DeviceLine,
}

impl Launch for Qemu {
    type Vm = QemuVm;

    async fn launch(&self, spec: LaunchSpec) -> Result<QemuVm, HypervisorError> {
        check_file(&spec.boot.kernel, "the kernel")?;
        if let Some(path) = &spec.boot.initramfs {
            check_file(path, "the initramfs")?;
        }
        let boot = Boot {
            kernel: text_path(&spec.boot.kernel, "the kernel")?,
            initramfs: match &spec.boot.initramfs {
                Some(path) => Some(text_path(path, "the initramfs")?),
                None => None,
            },
            extra_args: spec.boot.extra_kernel_args,
        };
        let vm = self
            .spawn(spec.hardware, None, |_, machine| Ok(machine.boot(&boot)))
            .await?;
        let start = vm.control.execute("cont", Value::Null, START_TIMEOUT);
        start.await?;
        // That it runs is no news: the event comes before the answer.
        vm.control.forget_events().await;
        Ok(vm)
    }
}

impl Qemu {
    /// Starts the process, its guest stopped. `peer` is the hypervisor's end of an agent channel
    /// that there is already; `further` gives the rest of the command line.
    pub(super) async fn spawn(
        &self,
        spec: HardwareSpec,
        peer: Option<OwnedFd>,
        further: impl FnOnce(&mut HelperCommand, &Machine) -> io::Result<Vec<String>>,
    ) -> Result<QemuVm, HypervisorError> {
        check_hardware(&spec, CPU_COUNT_MAX)?;
        let machine = machine(&spec)?;
        let (control, qemu_control) = socket_pair("the control channel")?;
        let (agent, peer) = match peer {
            Some(peer) => (None, peer),
            None => {
                let (agent, peer) = socket_pair("the agent channel")?;
                (Some(agent), peer)
            }
        };
        let mut command = HelperCommand::new("qemu", self.program());
        command.no_new_privileges();
        let prepared = || -> io::Result<_> {
            let agent_peer = peer.try_clone()?;
            let (state, writer) = StateFile::new()?;
            let own = OwnEnds {
                control: qemu_control,
                agent: peer,
                state: writer,
            };
            let descriptors = inherit(&mut command, spec, own)?;
            let further = further(&mut command, &machine)?;
            command
                .args(machine.hardware(&descriptors))
                .args(Machine::process(&descriptors))
                .args(further);
            Ok((agent_peer, state))
        };
        let (agent_peer, state) = prepared().map_err(setup_failed("the descriptors"))?;
        tracing::trace!("{command:?}");
        let helper = command.spawn().map_err(|source| HypervisorError::Spawn {
            path: self.program().to_owned(),
            source,
        })?;
        let control = self.connect(&helper, control).await?;
        Ok(QemuVm {
            device_line: machine.device_line(control.version()),
            helper,
            control,
            agent,
            agent_peer,
            state: state.into(),
        })
    }

    /// Waits until QEMU answers on its control channel; tells why it ended, where it does not.
    async fn connect(
        &self,
        helper: &HelperProcess,
        control: UnixStream,
    ) -> Result<QmpClient, HypervisorError> {
        let error = match QmpClient::connect(control, START_TIMEOUT).await {
            Ok(client) => {
                self.require(client.version())?;
                return Ok(client);
            }
            Err(error @ HypervisorError::Disconnected { .. }) => error,
            Err(error) => return Err(error),
        };
        tracing::trace!("{error}");
        // The channel is closed, so QEMU is ending. A version that is too old explains any line it
        // may have printed about an option it does not know.
        helper.kill_after(LAST_EVENTS_TIMEOUT).await;
        let exit = helper.wait().await;
        self.check_version()?;
        Err(HypervisorError::ExitedAtStart {
            reason: exit.to_string(),
        })
    }
}

impl QemuVm {
    /// QEMU's process id and start time.
    pub fn identity(&self) -> ProcessIdentity {
        self.helper.identity()
    }

    /// The owner's end of the agent channel; the first call gets it. It is connected from the start:
    /// what the guest writes before it is read waits in it.
    pub fn take_agent(&mut self) -> Option<UnixStream> {
        self.agent.take()
    }

    /// Takes back what the owner wrote to the agent channel and the guest has not got: while the VM
    /// is stopped and the owner writes nothing more, device state then says exactly what the guest
    /// has.
    ///
    /// # Errors
    ///
    /// The channel is broken.
    pub fn take_unread(&self) -> io::Result<Vec<u8>> {
        let mut unread = Vec::new();
        let mut buffer = [0; 16 << 10];
        loop {
            match rustix::net::recv(&self.agent_peer, &mut buffer, RecvFlags::DONTWAIT) {
                Ok((0, _)) | Err(Errno::AGAIN) => return Ok(unread),
                Ok((length, _)) => unread.extend_from_slice(&buffer[..length]),
                Err(Errno::INTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
    }

    /// The virtual hardware, for the record of a snapshot.
    pub fn device_line(&self) -> &DeviceLine {
        &self.device_line
    }

    /// QEMU's version.
    pub fn version(&self) -> Version {
        self.device_line.qemu_version
    }

    /// The next event; `None` when there will be no more. May be cancelled without losing one.
    pub async fn next_event(&self) -> Option<VmEvent> {
        self.control.next_event().await
    }

    /// Waits until the VM has ended. May be called again, cancelled and called by many.
    pub async fn wait_exit(&self) -> VmExit {
        let process = self.helper.wait().await;
        let shutdown = tokio::time::timeout(LAST_EVENTS_TIMEOUT, self.control.drained()).await;
        let shutdown = shutdown.ok().flatten();
        let cause = match (process.status.signal(), shutdown.as_deref()) {
            (Some(signal), _) => ExitCause::Killed(signal),
            (None, Some("guest-shutdown")) => ExitCause::PoweredOff,
            (None, Some("guest-reset" | "guest-panic")) => ExitCause::Reset,
            (None, Some("host-qmp-quit" | "host-signal" | "host-ui")) => ExitCause::Terminated,
            (None, _) => ExitCause::Failed,
        };
        VmExit { cause, process }
    }

    /// Ends the VM at once, as pulling the plug does. [`wait_exit`](Self::wait_exit) tells when it
    /// has ended.
    pub fn kill(&self) {
        self.helper.kill();
    }

    /// Waits a moment for an end that has begun, then makes it happen.
    pub(super) async fn kill_soon(&self) {
        self.helper.kill_after(LAST_EVENTS_TIMEOUT).await;
    }

    /// Whether the virtual processors run.
    ///
    /// # Errors
    ///
    /// QEMU does not answer.
    pub async fn is_running(&self) -> Result<bool, HypervisorError> {
        let status = self.execute("query-status").await?;
        Ok(status["running"] == true)
    }

    async fn execute(&self, command: &str) -> Result<Value, HypervisorError> {
        self.control
            .execute(command, Value::Null, COMMAND_TIMEOUT)
            .await
    }
}

impl Pause for QemuVm {
    async fn pause(&self) -> Result<(), HypervisorError> {
        self.execute("stop").await.map(drop)
    }

    async fn resume(&self) -> Result<(), HypervisorError> {
        self.execute("cont").await.map(drop)
    }
}

fn machine(spec: &HardwareSpec) -> Result<Machine, HypervisorError> {
    let disk = |disk: &DiskSpec| Disk {
        serial: disk.serial.clone(),
        read_only: disk.read_only,
        layers: disk.layers.iter().map(|layer| layer.format).collect(),
    };
    Ok(Machine {
        cpu_count: spec.cpu_count,
        memory: spec.memory.size(),
        mapping: spec.memory.mapping(),
        accelerator: spec.accelerator,
        translation_cache: spec.translation_cache,
        disks: spec.disks.iter().map(disk).collect(),
        network: spec.network.as_ref().map(network).transpose()?,
    })
}

fn network(network: &NetworkSpec) -> Result<Network, HypervisorError> {
    let backend = match &network.backend {
        NetworkBackend::Stream(_) => Backend::Stream,
        NetworkBackend::User { forwards, ipv6 } => Backend::User {
            forwards: forwards.clone(),
            ipv6: *ipv6,
        },
        NetworkBackend::Tap { name, .. } => {
            return Err(HypervisorError::InvalidSpec {
                what: format!("the tap device '{name}'"),
                reason: "QEMU is given its network as a descriptor".to_owned(),
            });
        }
    };
    Ok(Network {
        mac: network.mac,
        backend,
    })
}

/// The hypervisor's ends of its channels to the owner.
struct OwnEnds {
    control: OwnedFd,
    agent: OwnedFd,
    state: OwnedFd,
}

/// Hands the specification's descriptors to the command.
fn inherit(
    command: &mut HelperCommand,
    spec: HardwareSpec,
    own: OwnEnds,
) -> io::Result<Descriptors> {
    let mut disks = Vec::with_capacity(spec.disks.len());
    for disk in spec.disks {
        let top = disk.layers.len().saturating_sub(1);
        let mut numbers = Vec::with_capacity(disk.layers.len());
        for (index, layer) in disk.layers.into_iter().enumerate() {
            let file = if index < top {
                reopen_read_only(&layer.file)?
            } else {
                layer.file.into()
            };
            numbers.push(command.inherit(file)?);
        }
        disks.push(numbers);
    }
    let network = match spec.network.map(|network| network.backend) {
        Some(NetworkBackend::Stream(socket)) => Some(command.inherit(socket)?),
        Some(NetworkBackend::User { .. } | NetworkBackend::Tap { .. }) | None => None,
    };
    Ok(Descriptors {
        memory: command.inherit(spec.memory.into())?,
        control: command.inherit(own.control)?,
        agent: command.inherit(own.agent)?,
        console: command.inherit(spec.console)?,
        state: command.inherit(own.state)?,
        disks,
        network,
    })
}

/// A frozen layer can not be written to through the hypervisor's descriptor, whatever the guest makes
/// of the hypervisor.
fn reopen_read_only(file: &File) -> io::Result<OwnedFd> {
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    Ok(File::open(path)?.into())
}

/// A pair of connected sockets: the owner's end, and QEMU's.
fn socket_pair(what: &'static str) -> Result<(UnixStream, OwnedFd), HypervisorError> {
    let pair = || {
        let (own, other) = rustix::net::socketpair(
            AddressFamily::UNIX,
            SocketType::STREAM,
            SocketFlags::CLOEXEC,
            None,
        )?;
        let own = std::os::unix::net::UnixStream::from(own);
        own.set_nonblocking(true)?;
        tracing::trace!(
            "{what}: descriptors {} {}",
            own.as_raw_fd(),
            other.as_raw_fd()
        );
        Ok((UnixStream::from_std(own)?, other))
    };
    pair().map_err(setup_failed(what))
}
