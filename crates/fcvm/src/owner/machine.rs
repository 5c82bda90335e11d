//! Assembling the machine: disks, network, hypervisor.

use std::fs::File;
use std::path::Path;

use anyhow::{Context as _, bail};
use fcvm_hypervisor::qemu::{Qemu, QemuVm};
use fcvm_hypervisor::spec::TRANSLATION_CACHE_BOOT;
use fcvm_hypervisor::{
    Accelerator, BootSpec, DiskSpec, GuestMemory, HardwareSpec, Launch, LaunchSpec, NetworkBackend,
    NetworkSpec,
};
use fcvm_network::{Attachment, Backend, HostResolver, HostRoutes, NetworkOptions};
use fcvm_storage::ScratchStore;
use fcvm_types::ByteSize;
use fcvm_types::guest::{GuestNetwork, ROOT_DISK_SERIAL, SCRATCH_DISK_SERIAL};
use fcvm_types::record::Resource;
use rustix::pipe::PipeFlags;

use super::log::{console_tail, spawn_console};
use super::spec::VmSpec;
use super::{Entry, Stopwatch};
use crate::args::run::{AcceleratorChoice, NetworkMode};
use crate::context::Context;

/// Lines of the console shown when a guest does not come up.
const CONSOLE_LINES: usize = 5;
/// Lines in which a panic is looked for.
const PANIC_LINES: usize = 60;

/// A machine whose processors run.
pub(super) struct Assembled {
    pub(super) machine: QemuVm,
    /// The network's guard; its helper's end is the network's.
    pub(super) network: Attachment,
    /// How the guest configures its interface.
    pub(super) guest_network: Option<GuestNetwork>,
    pub(super) console: tokio::task::JoinHandle<()>,
}

/// Acquires what the machine is made of, and starts it.
pub(super) async fn assemble(
    context: &Context,
    spec: &VmSpec,
    entry: &mut Entry,
    watch: &mut Stopwatch,
) -> anyhow::Result<Assembled> {
    let accelerator = accelerator(context, spec.accelerator)?;
    watch.lap("accelerator");
    let disks = disks(context, spec)?;
    watch.lap("disks");
    let (network, interface) = connect(context, spec, entry, accelerator)?;
    watch.lap("network");
    let (console_read, console_write) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC)
        .context("cannot make a pipe for the console")?;
    rustix::io::ioctl_fionbio(&console_read, true)?;
    let console = spawn_console(console_read, &entry.paths.console_log())?;
    let launch = LaunchSpec {
        hardware: HardwareSpec {
            cpu_count: spec.cpu_count,
            memory: GuestMemory::new(ByteSize::from_bytes(spec.memory_bytes))
                .context("cannot make the guest's memory")?,
            disks,
            network: interface,
            accelerator,
            translation_cache: TRANSLATION_CACHE_BOOT,
            console: console_write,
        },
        boot: BootSpec {
            kernel: spec.kernel.clone(),
            initramfs: Some(spec.initramfs.clone()),
            extra_kernel_args: Vec::new(),
        },
    };
    let machine = qemu(context)?.launch(launch).await?;
    entry.update(|record| {
        record.resources.push(Resource::Process {
            identity: machine.identity(),
            role: "qemu".to_owned(),
        });
    })?;
    watch.lap("hypervisor");
    Ok(Assembled {
        machine,
        guest_network: network.guest.clone(),
        network,
        console,
    })
}

/// Starts the network, which is waited for later, and enters it in the record; gives its guard and the hypervisor's part.
fn connect(
    context: &Context,
    spec: &VmSpec,
    entry: &mut Entry,
    accelerator: Accelerator,
) -> anyhow::Result<(Attachment, Option<NetworkSpec>)> {
    let mut network = attach_network(context, spec)?;
    let helper = network.helper.as_ref().map(|helper| Resource::Process {
        identity: helper.identity(),
        role: "passt".to_owned(),
    });
    let mac = network.mac;
    let (shown, backend) = match std::mem::replace(&mut network.backend, Backend::None) {
        Backend::None => ("none", None),
        Backend::Passt(socket) => ("rootless (passt)", Some(NetworkBackend::Stream(socket))),
        Backend::User { forwards, ipv6 } => (
            "rootless (QEMU user network)",
            Some(NetworkBackend::User { forwards, ipv6 }),
        ),
    };
    entry.update(|record| {
        record.accelerator = accelerator.name().to_owned();
        record.network = shown.to_owned();
        record.resources.extend(helper);
    })?;
    Ok((network, backend.map(|backend| NetworkSpec { backend, mac })))
}

/// The root image and the VM's own writable disk.
fn disks(context: &Context, spec: &VmSpec) -> anyhow::Result<Vec<DiskSpec>> {
    let root = File::open(&spec.root_image)
        .with_context(|| format!("cannot open the root image {}", spec.root_image.display()))?;
    let mut disks = vec![DiskSpec::raw(root, ROOT_DISK_SERIAL, true)];
    if !spec.read_only {
        let scratch = scratch(context, ByteSize::from_bytes(spec.disk_bytes))?;
        disks.push(DiskSpec::raw(scratch, SCRATCH_DISK_SERIAL, false));
    }
    Ok(disks)
}

fn scratch(context: &Context, size: ByteSize) -> anyhow::Result<File> {
    let mkfs = fcvm_storage::find_mkfs(&context.search_path.to_string_lossy())
        .context("mkfs.ext4 is missing: install the package e2fsprogs")?;
    let disk = ScratchStore::new(context.data_dir.join("disks"), mkfs).create(size)?;
    tracing::debug!(target: "vm", "the writable disk was made: {:?}", disk.method);
    Ok(disk.file)
}

fn attach_network(context: &Context, spec: &VmSpec) -> anyhow::Result<Attachment> {
    let mode = match spec.network {
        NetworkMode::None => fcvm_network::NetworkMode::None,
        NetworkMode::Rootless => fcvm_network::NetworkMode::Rootless,
        NetworkMode::Bridged => bail!("--network bridged is not in this version yet"),
    };
    let resolv_conf = std::fs::read_to_string("/etc/resolv.conf").unwrap_or_default();
    let options = NetworkOptions {
        ports: spec.ports.clone(),
        passt: context.find_program("passt"),
        resolver: HostResolver::parse(&resolv_conf),
        routes: HostRoutes::read(),
    };
    let mut attachment = fcvm_network::attach(mode, &options)?;
    if let Some(note) = &attachment.note {
        tracing::warn!(target: "network", "{note}");
    }
    if let Some(guest) = &mut attachment.guest
        && !spec.dns_servers.is_empty()
    {
        guest.dns_servers.clone_from(&spec.dns_servers);
    }
    Ok(attachment)
}

/// QEMU, as it is found in the search path.
pub(crate) fn qemu(context: &Context) -> anyhow::Result<Qemu> {
    Ok(Qemu::locate(None, &context.search_path.to_string_lossy())?)
}

/// The accelerator to use.
fn accelerator(context: &Context, choice: AcceleratorChoice) -> anyhow::Result<Accelerator> {
    let probe = crate::commands::setup::probe(context);
    let tcg = Accelerator::Tcg {
        tsc_khz: probe.tsc_khz,
    };
    match choice {
        AcceleratorChoice::Tcg => Ok(tcg),
        AcceleratorChoice::Auto if !probe.kvm.is_usable() => Ok(tcg),
        AcceleratorChoice::Kvm if !probe.kvm.is_usable() => {
            bail!(
                "--accel kvm: KVM is {}; 'fcvm setup preflight' tells more, and --accel tcg works without it",
                probe.kvm
            )
        }
        AcceleratorChoice::Auto | AcceleratorChoice::Kvm => Ok(Accelerator::Kvm),
    }
}

/// A message with the console's last lines, which say why a guest does not come up. A panic's reason
/// comes before its traces.
pub(super) fn boot_failure(what: &str, console_log: &Path) -> String {
    let mut lines = console_tail(console_log, PANIC_LINES);
    let panic = lines.iter().position(|line| line.contains("Kernel panic"));
    lines.drain(..panic.unwrap_or(lines.len().saturating_sub(CONSOLE_LINES)));
    lines.truncate(CONSOLE_LINES);
    if lines.is_empty() {
        return format!(
            "{what}; its console is empty: is the kernel one that boots in QEMU's microvm machine, and the memory enough?"
        );
    }
    format!("{what}; the console's last lines: {}", lines.join(" | "))
}
