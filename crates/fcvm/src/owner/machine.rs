//! Assembling the machine: disks, network, hypervisor.

use std::cell::RefCell;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, bail};
use fcvm_hypervisor::firecracker::{Firecracker, Jail, release};
use fcvm_hypervisor::qemu::Qemu;
use fcvm_hypervisor::spec::{TRANSLATION_CACHE_BOOT, TRANSLATION_CACHE_CLONE};
use fcvm_hypervisor::{
    Accelerator, BootSpec, DiskFormat, DiskLayer, DiskSpec, GuestMemory, HardwareSpec, Hypervisor,
    HypervisorKind, Launch, LaunchSpec, NetworkBackend, NetworkSpec, RestoreState, Standby, Vm,
};
use fcvm_memory::page_file::anonymous_file;
use fcvm_network::{Attachment, Backend, Card, HostResolver, HostRoutes, NetworkOptions};
use fcvm_snapshot::SnapshotStore;
use fcvm_storage::{Disk, DiskStore, Layer, LayerFormat, ScratchStore};
use fcvm_types::guest::{ROOT_DISK_SERIAL, SCRATCH_DISK_SERIAL};
use fcvm_types::record::{ProcessIdentity, Resource, SnapshotReference};
use fcvm_types::{ByteSize, VmId};
use rustix::pipe::PipeFlags;

use super::jail::jailer;
use super::log::{console_tail, spawn_console};
use super::spec::VmSpec;
use super::{Entry, Stopwatch};
use crate::args::run::{AcceleratorChoice, NetworkMode};
use crate::context::Context;
use crate::disks::{Disks, Wanted};
use crate::template::{Template, TemplateMemory};

/// The group of jails. The users of jails are the 2^24 numbers after it: far above what hosts give to
/// people, services and containers.
const JAIL_GROUP: u32 = 0x7000_0000;
/// Name of the directory of the hypervisor's own sockets, below the VM's.
const HYPERVISOR_DIRECTORY: &str = "vm";
/// Lines of the console shown when a guest does not come up.
const CONSOLE_LINES: usize = 5;
/// Lines in which a panic is looked for.
const PANIC_LINES: usize = 60;

/// A machine whose processors run.
pub(super) struct Assembled {
    pub(super) machine: Vm,
    pub(super) foundation: Foundation,
    /// The network's guard; its helper's end is the network's.
    pub(super) network: Attachment,
    pub(super) console: tokio::task::JoinHandle<()>,
}

/// What a machine stands on and its owner keeps, for a successor and for clones.
pub(super) struct Foundation {
    pub(super) hypervisor: Hypervisor,
    pub(super) cpu_count: u32,
    pub(super) accelerator: Accelerator,
    /// The guest's memory as the present machine has it mapped.
    pub(super) memory: RefCell<GuestMemory>,
    /// What is known of its content without a look at it.
    pub(super) baseline: RefCell<Baseline>,
    pub(super) root: File,
    /// The VM's own disk; a read-only container has none.
    pub(super) scratch: RefCell<Option<Disk>>,
    /// How disks are branched.
    pub(super) store: Box<dyn DiskStore>,
    /// Where disks are.
    pub(super) disks: PathBuf,
    console: OwnedFd,
}

/// What is known of a guest's memory that only its hypervisor has mapped.
pub(super) enum Baseline {
    /// What the host has not in memory for it is zero: it booted.
    Zero,
    /// The file holds all but what was written since.
    Known(File),
    /// The snapshot does, from which a memory server brings it.
    Stored(SnapshotStore, SnapshotReference),
    /// Nothing.
    Unknown,
}

impl Foundation {
    /// Whether disks have to be files of raw bytes.
    pub(super) fn is_raw_only(&self) -> bool {
        matches!(self.hypervisor, Hypervisor::Firecracker(_))
    }

    /// The hardware, with this memory, this network and this disk.
    pub(super) fn hardware(
        &self,
        memory: GuestMemory,
        network: Option<NetworkSpec>,
        scratch: Option<&Disk>,
        translation_cache: ByteSize,
    ) -> anyhow::Result<HardwareSpec> {
        let copied = || -> std::io::Result<_> {
            let mut disks = vec![DiskSpec::raw(
                self.root.try_clone()?,
                ROOT_DISK_SERIAL,
                true,
            )];
            if let Some(scratch) = scratch {
                disks.push(disk_spec(scratch)?);
            }
            Ok((disks, self.console.try_clone()?))
        };
        let (disks, console) = copied().context("cannot hand the VM's disks on")?;
        Ok(HardwareSpec {
            cpu_count: self.cpu_count,
            memory,
            disks,
            network,
            accelerator: self.accelerator,
            translation_cache,
            console,
        })
    }
}

/// The VM's own disk as the hypervisor is told of it.
fn disk_spec(disk: &Disk) -> std::io::Result<DiskSpec> {
    let layer = |layer: &Layer| {
        Ok(DiskLayer {
            file: layer.file.try_clone()?,
            format: match layer.format {
                LayerFormat::Raw => DiskFormat::Raw,
                LayerFormat::Qcow2 => DiskFormat::Qcow2,
            },
        })
    };
    Ok(DiskSpec {
        layers: disk
            .layers()
            .iter()
            .map(layer)
            .collect::<std::io::Result<_>>()?,
        serial: SCRATCH_DISK_SERIAL.to_owned(),
        read_only: false,
    })
}

/// Acquires what the machine is made of, and starts it.
pub(super) async fn assemble(
    context: &Context,
    spec: &VmSpec,
    entry: &mut Entry,
    watch: &mut Stopwatch,
) -> anyhow::Result<Assembled> {
    let accelerator = accelerator(context, spec)?;
    watch.lap("accelerator");
    let root = open_root(spec)?;
    let Disks {
        directory: disks,
        store,
        choice,
    } = crate::disks::find(context, &wanted_disks(spec))?;
    entry.record.disk_store = choice;
    let scratch = match spec.read_only {
        true => None,
        false => Some(scratch(
            context,
            &disks,
            ByteSize::from_bytes(spec.disk_bytes),
        )?),
    };
    watch.lap("disks");
    let (network, interface) = connect(context, spec, entry, accelerator).await?;
    watch.lap("network");
    let (console, console_write) = console(entry)?;
    let memory = GuestMemory::new(ByteSize::from_bytes(spec.memory_bytes))
        .context("cannot make the guest's memory")?;
    let foundation = Foundation {
        hypervisor: hypervisor(context, spec, entry, &disks)?,
        cpu_count: spec.cpu_count,
        accelerator,
        memory: memory
            .try_clone()
            .context("cannot keep the guest's memory")?
            .into(),
        baseline: Baseline::Zero.into(),
        root,
        scratch: None.into(),
        store,
        disks,
        console: console_write,
    };
    let cache = TRANSLATION_CACHE_BOOT;
    let launch = LaunchSpec {
        hardware: foundation.hardware(memory, interface, scratch.as_ref(), cache)?,
        boot: BootSpec {
            kernel: spec.kernel.clone(),
            initramfs: Some(spec.initramfs.clone()),
            extra_kernel_args: Vec::new(),
        },
    };
    let machine = foundation.hypervisor.launch(launch).await?;
    *foundation.scratch.borrow_mut() = scratch;
    let role = machine.kind().name();
    enter_process(entry, machine.identity(), role)?;
    watch.lap("hypervisor");
    Ok(Assembled {
        machine,
        foundation,
        network,
        console,
    })
}

/// A machine that waits for the state of another.
pub(super) struct Prepared {
    pub(super) standby: Standby,
    pub(super) foundation: Foundation,
    pub(super) network: Attachment,
    pub(super) console: tokio::task::JoinHandle<()>,
}

/// Acquires what a clone is made of: its process waits for the state.
pub(super) async fn prepare_clone(
    context: &Context,
    spec: &VmSpec,
    accelerator: Accelerator,
    template: Template,
    entry: &mut Entry,
    watch: &mut Stopwatch,
) -> anyhow::Result<Prepared> {
    let root = open_root(spec)?;
    let Disks {
        directory: disks,
        store,
        choice,
    } = crate::disks::find(context, &wanted_disks(spec))?;
    entry.record.disk_store = choice;
    let scratch = match &template.disk {
        Some(expected) => Some(store.branch_ahead(expected)?),
        None => None,
    };
    watch.lap("disks");
    let (network, interface) = connect(context, spec, entry, accelerator).await?;
    watch.lap("network");
    let (console, console_write) = console(entry)?;
    let base = entry
        .record
        .lineage
        .as_ref()
        .and_then(|own| own.base.clone());
    let base = base.map(|base| (context.snapshots(), base));
    let (memory, baseline) = clone_memory(template.memory, spec.memory_bytes, base)?;
    let foundation = Foundation {
        hypervisor: hypervisor(context, spec, entry, &disks)?,
        cpu_count: spec.cpu_count,
        accelerator,
        memory: memory
            .try_clone()
            .context("cannot keep the guest's memory")?
            .into(),
        baseline: baseline.into(),
        root,
        scratch: None.into(),
        store,
        disks,
        console: console_write,
    };
    let cache = TRANSLATION_CACHE_CLONE;
    let hardware = foundation.hardware(memory, interface, scratch.as_ref(), cache)?;
    let standby = foundation.hypervisor.prepare(hardware).await?;
    *foundation.scratch.borrow_mut() = scratch;
    enter_process(entry, standby.identity(), spec.hypervisor.name())?;
    watch.lap("hypervisor");
    Ok(Prepared {
        standby,
        foundation,
        network,
        console,
    })
}

/// A clone's memory, and what is known of it.
fn clone_memory(
    memory: TemplateMemory,
    memory_bytes: u64,
    base: Option<(SnapshotStore, SnapshotReference)>,
) -> anyhow::Result<(GuestMemory, Baseline)> {
    let (file, baseline) = match memory {
        TemplateMemory::File(file) => {
            let base = File::from(file.try_clone()?);
            (file, Baseline::Known(base))
        }
        // It comes with the state: this says how much it is.
        TemplateMemory::Served(_) => {
            let file = anonymous_file("fcvm-guest-memory", memory_bytes)?;
            let stored = base.map(|(store, base)| Baseline::Stored(store, base));
            (file.into(), stored.unwrap_or(Baseline::Unknown))
        }
    };
    let memory = GuestMemory::copy_on_write(file).context("cannot use the memory")?;
    Ok((memory, baseline))
}

fn hypervisor(
    context: &Context,
    spec: &VmSpec,
    entry: &mut Entry,
    disks: &Path,
) -> anyhow::Result<Hypervisor> {
    Ok(match spec.hypervisor {
        HypervisorKind::Qemu => Hypervisor::Qemu(qemu(context)?),
        HypervisorKind::Firecracker => {
            Hypervisor::Firecracker(firecracker_of(context, spec, entry, disks)?)
        }
    })
}

fn wanted_disks(spec: &VmSpec) -> Wanted {
    Wanted {
        raw_only: spec.hypervisor == HypervisorKind::Firecracker,
        is_used: !spec.read_only,
    }
}

fn enter_process(entry: &mut Entry, identity: ProcessIdentity, role: &str) -> anyhow::Result<()> {
    entry.note(Resource::Process {
        identity,
        role: role.to_owned(),
    })
}

/// The task that logs the console, and where the machine writes it.
fn console(entry: &Entry) -> anyhow::Result<(tokio::task::JoinHandle<()>, OwnedFd)> {
    let (read, write) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC)
        .context("cannot make a pipe for the console")?;
    rustix::io::ioctl_fionbio(&read, true)?;
    Ok((spawn_console(read, &entry.paths.console_log())?, write))
}

/// Starts the network, which is waited for later, and enters it in the record; gives its guard and
/// the hypervisor's part.
async fn connect(
    context: &Context,
    spec: &VmSpec,
    entry: &mut Entry,
    accelerator: Accelerator,
) -> anyhow::Result<(Attachment, Option<NetworkSpec>)> {
    let mut network = attach_network(context, spec).await?;
    let helper = network.helper.as_ref().map(|helper| Resource::Process {
        identity: helper.identity(),
        role: "passt".to_owned(),
    });
    let mac = network.mac;
    let (shown, backend) = match std::mem::replace(&mut network.backend, Backend::None) {
        Backend::None => ("none", None),
        Backend::Passt(socket) => ("rootless (passt)", Some(NetworkBackend::Stream(socket))),
        Backend::Tap(tap) => (
            "rootless (passt)",
            Some(NetworkBackend::Tap {
                name: tap.name.to_owned(),
                namespaces: tap.namespaces,
            }),
        ),
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
    // A network that has heard nothing of the guest yet cannot reach its published ports.
    let announce = !spec.ports.is_empty();
    let interface = backend.map(|backend| NetworkSpec {
        backend,
        mac,
        announce,
    });
    Ok((network, interface))
}

fn open_root(spec: &VmSpec) -> anyhow::Result<File> {
    File::open(&spec.root_image)
        .with_context(|| format!("cannot open the root image {}", spec.root_image.display()))
}

fn scratch(context: &Context, disks: &Path, size: ByteSize) -> anyhow::Result<Disk> {
    let mkfs = fcvm_storage::find_mkfs(&context.search_path.to_string_lossy())
        .context("mkfs.ext4 is missing: install the package e2fsprogs")?;
    let disk = ScratchStore::new(disks.to_owned(), mkfs).create(size)?;
    tracing::debug!(target: "vm", "the writable disk was made: {:?}", disk.method);
    Disk::raw(disk.file).context("cannot use the writable disk")
}

async fn attach_network(context: &Context, spec: &VmSpec) -> anyhow::Result<Attachment> {
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
    let card = match spec.hypervisor {
        HypervisorKind::Qemu => Card::Stream,
        HypervisorKind::Firecracker => Card::Tap { maker: tap_maker() },
    };
    let mut attachment = fcvm_network::attach(mode, &options, card).await?;
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

/// What makes a VM's tap device, in a process of its own.
fn tap_maker() -> Command {
    let mut maker = Command::new("/proc/self/exe");
    // It has no data, and no environment that would say where data is.
    maker.args(["--data-dir", "/", "make-tap"]);
    maker
}

/// QEMU, as it is found in the search path.
pub(crate) fn qemu(context: &Context) -> anyhow::Result<Qemu> {
    Ok(Qemu::locate(None, &context.search_path.to_string_lossy())?)
}

/// Firecracker: what `FCVM_FIRECRACKER_BIN` names, else the release that setup fetched, else as it is
/// found in the search path. Its sockets are below the VM's directory of sockets.
pub(crate) fn firecracker(context: &Context, runtime: &Path) -> anyhow::Result<Firecracker> {
    let fetched = release::installed(&crate::commands::setup::firecracker_directory(context));
    let explicit = context.firecracker.as_deref().or(fetched.as_deref());
    let search_path = context.search_path.to_string_lossy();
    let directory = runtime.join(HYPERVISOR_DIRECTORY);
    Ok(Firecracker::locate(explicit, &search_path, directory)?)
}

/// The user of a VM's jail, by the VM's id, which is random.
fn jail_user(id: &VmId) -> u32 {
    const DIGITS: usize = 6;
    JAIL_GROUP + 1 + u32::from_str_radix(&id.short()[..DIGITS], 16).unwrap_or(0)
}

/// The Firecracker of a VM, in its jail where it has one; what that leaves after a crash is noted.
fn firecracker_of(
    context: &Context,
    spec: &VmSpec,
    entry: &mut Entry,
    disks: &Path,
) -> anyhow::Result<Firecracker> {
    let firecracker = firecracker(context, &entry.paths.runtime)?
        .with_pci(spec.pci)
        .with_hugepages(spec.hugepages);
    if !spec.jail {
        return Ok(firecracker);
    }
    let jail = Jail {
        jailer: jailer(context, &firecracker)?,
        id: spec.id.short().to_owned(),
        user: jail_user(&spec.id),
        group: JAIL_GROUP,
        disks: disks.to_owned(),
        init: (
            PathBuf::from("/proc/self/exe"),
            ["--data-dir", "/", "jail-init"].map(Into::into).to_vec(),
        ),
    };
    let firecracker = firecracker
        .in_directory(context.data_dir.join("jails"))
        .jailed(jail);
    for path in firecracker.leftovers().context("cannot find Firecracker")? {
        entry.note(Resource::Path {
            path: path.display().to_string(),
        })?;
    }
    Ok(firecracker)
}

/// Firecracker runs with KVM or not at all.
fn firecracker_accelerator(context: &Context) -> anyhow::Result<Accelerator> {
    let kvm = crate::commands::setup::probe(context).kvm;
    if !kvm.is_usable() {
        bail!(
            "--hypervisor firecracker needs KVM, which is {kvm}; --hypervisor qemu works without it"
        );
    }
    Ok(Accelerator::Kvm)
}

/// The accelerator to use.
pub(crate) fn accelerator(context: &Context, spec: &VmSpec) -> anyhow::Result<Accelerator> {
    match spec.hypervisor {
        HypervisorKind::Qemu => qemu_accelerator(context, spec.accelerator),
        HypervisorKind::Firecracker => firecracker_accelerator(context),
    }
}

fn qemu_accelerator(context: &Context, choice: AcceleratorChoice) -> anyhow::Result<Accelerator> {
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
            "{what}; its console is empty: is the kernel one that boots in a microVM, and the memory enough?"
        );
    }
    format!("{what}; the console's last lines: {}", lines.join(" | "))
}
