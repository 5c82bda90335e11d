//! Freezing a running VM: its state, its memory and its disk as of one instant, while it goes on.
//!
//! The pause does not depend on the size of the memory. A VM that has its memory file to itself leaves
//! it behind as the frozen memory and goes on as a copy-on-write view of it, in a successor process
//! (*fork by succession*). A VM that is such a view already stays where it is, and only the pages that it
//! wrote are copied. Where the network cannot be moved to a successor the memory is copied.
//!
//! The VM is lost at no point: the old process can go on until the successor has loaded the state,
//! and from then on the successor can.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::rc::Rc;

use anyhow::{Context as _, bail};
use fcvm_hypervisor::qemu::{QemuStandby, QemuVm};
use fcvm_hypervisor::spec::TRANSLATION_CACHE_BOOT;
use fcvm_hypervisor::{
    DeviceState, GuestMemory, Hypervisor, HypervisorError, HypervisorKind, MemoryMapping,
    NetworkBackend, NetworkSpec, Pause, SaveState, Vm,
};
use fcvm_memory::page_file::{anonymous_file, seal, seal_ahead};
use fcvm_memory::{CapturedPages, GuestMapping, PageFile};
use fcvm_network::ConnectionId;
use fcvm_storage::{BranchMethod, Disk, DiskStore, DiskUsage, FrozenDisk};
use fcvm_types::record::{Resource, VmState};

use super::fork::{Estimate, Usage};
use super::vm::RunningVm;
use crate::template::{Template, TemplateMemory};

mod save;

/// Room that is made for pages which the guest writes between the preparation and the pause.
const SPARE_PAGE_BYTES: usize = 8 << 20;

/// A VM as of one instant.
pub(super) struct Frozen {
    pub(super) state: DeviceState,
    /// What clones map copy-on-write; sealed.
    pub(super) memory: OwnedFd,
    /// Pages over it: a page file.
    pub(super) difference: Option<File>,
    /// Microseconds of each stage; those up to `resume` are the pause.
    pub(super) timings_us: Vec<(String, u64)>,
    /// The process that the VM has left.
    left: Option<Rc<Vm>>,
}

impl Frozen {
    /// How long the VM stood still, in microseconds.
    pub(super) fn pause_us(&self) -> u64 {
        let mut pause_us = 0;
        for (stage, microseconds) in &self.timings_us {
            pause_us += microseconds;
            if stage == "resume" {
                break;
            }
        }
        pause_us
    }
}

/// How a VM is to be frozen.
pub(super) struct Plan {
    memory: MemoryPlan,
    disk: Option<DiskPlan>,
}

enum MemoryPlan {
    /// The VM goes on in another process, on the present memory.
    Succession,
    /// The VM stays, and its memory is copied to here.
    Copy(File),
    /// The VM stays, and the pages that it wrote are copied.
    Difference,
    /// The VM stays, and its hypervisor writes its memory here.
    Save(File),
}

/// How the disk is to be frozen. Either way its files are known before.
enum DiskPlan {
    /// The VM goes on with another file, in the successor.
    Leave { frozen: FrozenDisk, successor: Disk },
    /// The VM stays with its file, which is copied or shared in the pause.
    Copy {
        store: Box<dyn DiskStore>,
        prepared: fcvm_storage::Prepared,
        expected: FrozenDisk,
    },
}

/// What was made ready before the pause.
pub(super) struct Preparation {
    way: Way,
    disk: Option<DiskPlan>,
}

enum Way {
    Succession {
        successor: Box<QemuStandby>,
        connection: Option<ConnectionId>,
    },
    Copy(File),
    Difference {
        mapping: GuestMapping,
        pages: CapturedPages,
    },
    Save(save::Target),
}

/// Makes room for the pages that the guest has written, and some more.
fn make_room(mapping: &GuestMapping, pages: &mut CapturedPages) -> anyhow::Result<()> {
    let bytes: u64 = mapping.private_runs()?.iter().map(|run| run.bytes()).sum();
    let room = usize::try_from(bytes)?.saturating_add(SPARE_PAGE_BYTES);
    if pages.bytes.len() < room {
        // Not zero, so that the kernel gives the memory now and not in the pause.
        pages.bytes.resize(room, 1);
    }
    Ok(())
}

impl RunningVm {
    /// Decides how the VM is to be frozen.
    pub(super) fn plan_freeze(&self) -> anyhow::Result<Plan> {
        self.check_running()?;
        let memory = self.foundation.memory.borrow();
        let size = memory.size().bytes();
        let memory = match memory.mapping() {
            _ if matches!(self.foundation.hypervisor, Hypervisor::Firecracker(_)) => {
                MemoryPlan::Save(anonymous_file("fcvm-guest-memory", size)?)
            }
            MemoryMapping::CopyOnWrite => MemoryPlan::Difference,
            MemoryMapping::Shared
                if self.network.guest.is_some() && self.network.relay.is_none() =>
            {
                tracing::info!(target: "vm", "QEMU's own network cannot move to another process: the memory is copied");
                MemoryPlan::Copy(anonymous_file("fcvm-guest-memory", size)?)
            }
            MemoryMapping::Shared => MemoryPlan::Succession,
        };
        let disk = match &*self.foundation.scratch.borrow() {
            Some(disk) => Some(self.plan_disk(&memory, disk)?),
            None => None,
        };
        Ok(Plan { memory, disk })
    }

    fn plan_disk(&self, memory: &MemoryPlan, disk: &Disk) -> anyhow::Result<DiskPlan> {
        let store = &self.foundation.store;
        let is_overlay = store.method() == BranchMethod::Overlay;
        if is_overlay && matches!(memory, MemoryPlan::Succession) {
            // Nothing is copied by this: from the pause on the present file is left alone.
            let frozen = store.freeze(store.prepare(disk)?)?;
            let successor = frozen
                .continue_on
                .context("the successor has no disk to go on with")?;
            return Ok(DiskPlan::Leave {
                frozen: frozen.frozen_disk,
                successor,
            });
        }
        let store = crate::disks::another(
            &**store,
            &self.foundation.disks,
            self.foundation.is_raw_only(),
        )?;
        if let Some(warning) = store.method().warning().filter(|_| !is_overlay) {
            tracing::warn!(target: "vm", "{warning}");
        }
        let prepared = store.prepare(disk)?;
        let expected = prepared.expected().context("cannot hand the disk on")?;
        Ok(DiskPlan::Copy {
            store,
            prepared,
            expected,
        })
    }

    /// What a fork would cost now.
    pub(super) fn estimate(&self) -> anyhow::Result<Estimate> {
        self.check_running()?;
        let memory = self.foundation.memory.borrow();
        let usage = fcvm_memory::usage(self.machine.identity().pid)?;
        let saves = matches!(self.foundation.hypervisor, Hypervisor::Firecracker(_));
        let resident_bytes = match saves {
            // No file has it: the hypervisor itself is little.
            true => usage.pss_bytes,
            false => memory.resident_bytes()?,
        };
        let way = match memory.mapping() {
            _ if saves => "save",
            MemoryMapping::CopyOnWrite => "difference",
            MemoryMapping::Shared
                if self.network.guest.is_some() && self.network.relay.is_none() =>
            {
                "copy"
            }
            MemoryMapping::Shared => "succession",
        };
        let copied = match way {
            "succession" => 0,
            "difference" => usage.guest_private_bytes,
            _ => resident_bytes,
        };
        let disk = match &*self.foundation.scratch.borrow() {
            Some(disk) => Some(disk.usage()?),
            None => None,
        };
        Ok(Estimate {
            way: way.to_owned(),
            memory_bytes: memory.size().bytes(),
            resident_bytes,
            copied_bytes: copied,
            disk_method: disk.map(|_| self.foundation.store.method().name().to_owned()),
            disk_bytes: disk.map_or(0, |usage| usage.own_bytes),
        })
    }

    /// What the VM takes of its host.
    pub(super) fn usage(&self) -> anyhow::Result<Usage> {
        let memory = fcvm_memory::usage(self.machine.identity().pid)?;
        let disk = match &*self.foundation.scratch.borrow() {
            Some(disk) => disk.usage()?,
            None => DiskUsage::default(),
        };
        // What Firecracker maps from no file has no name: it is told with the little that is its own.
        let (guest_pss_bytes, guest_private_bytes) = match memory.guest_resident_bytes {
            0 => (memory.pss_bytes, memory.pss_bytes),
            _ => (memory.guest_pss_bytes, memory.guest_private_bytes),
        };
        Ok(Usage {
            memory_pss_bytes: memory.pss_bytes,
            guest_pss_bytes,
            guest_private_bytes,
            disk_private_bytes: disk.own_bytes,
            disk_shared_bytes: disk.shared_bytes,
        })
    }

    /// What clones will be made on: known before the VM is frozen.
    pub(super) fn template(&self, plan: &Plan) -> anyhow::Result<Template> {
        let memory = match &plan.memory {
            MemoryPlan::Copy(copy) | MemoryPlan::Save(copy) => copy.as_fd().try_clone_to_owned()?,
            MemoryPlan::Succession | MemoryPlan::Difference => {
                let memory = self.foundation.memory.borrow();
                // Nobody else will ever write to it, however long the present process takes to end.
                seal_ahead(&*memory)?;
                memory.as_fd().try_clone_to_owned()?
            }
        };
        let disk = plan.disk.as_ref().map(|disk| match disk {
            DiskPlan::Leave { frozen, .. } => frozen.clone(),
            DiskPlan::Copy { expected, .. } => expected.clone(),
        });
        let memory = TemplateMemory::File(memory);
        Ok(Template { memory, disk })
    }

    /// Makes ready what a freeze needs, while the VM runs.
    pub(super) async fn prepare_freeze(&self, plan: Plan) -> anyhow::Result<Preparation> {
        let foundation = &self.foundation;
        let way = match plan.memory {
            MemoryPlan::Succession => self.prepare_successor(plan.disk.as_ref()).await?,
            MemoryPlan::Copy(copy) => Way::Copy(copy),
            MemoryPlan::Save(file) => Way::Save(self.save_target(file)?),
            MemoryPlan::Difference => {
                let pid = self.machine.identity().pid;
                let mapping = GuestMapping::find(pid, &*foundation.memory.borrow())?;
                let mut pages = CapturedPages::default();
                make_room(&mapping, &mut pages)?;
                Way::Difference { mapping, pages }
            }
        };
        Ok(Preparation {
            way,
            disk: plan.disk,
        })
    }

    /// Brings a preparation up to date that was made some time ago.
    pub(super) fn refresh(&self, mut preparation: Preparation) -> anyhow::Result<Preparation> {
        if let Way::Difference { mapping, pages } = &mut preparation.way {
            make_room(mapping, pages)?;
        }
        Ok(preparation)
    }

    /// Nothing is frozen that does not run.
    pub(super) fn check_running(&self) -> anyhow::Result<()> {
        match self.state() {
            VmState::Running => Ok(()),
            VmState::Paused => bail!(self.paused()),
            _ => bail!("the VM is not running"),
        }
    }

    async fn prepare_successor(&self, disk: Option<&DiskPlan>) -> anyhow::Result<Way> {
        let foundation = &self.foundation;
        let copy = foundation.memory.borrow().as_fd().try_clone_to_owned()?;
        let memory = GuestMemory::copy_on_write(copy)?;
        let (connection, network) = match &self.network.relay {
            Some(relay) => {
                let (id, socket) = relay.connect().context("cannot connect the successor")?;
                let network = NetworkSpec {
                    backend: NetworkBackend::Stream(socket),
                    mac: self.network.mac,
                    // The same network as before.
                    announce: false,
                };
                (Some(id), Some(network))
            }
            None => (None, None),
        };
        let hardware = {
            let present = foundation.scratch.borrow();
            let scratch = match disk {
                Some(DiskPlan::Leave { successor, .. }) => Some(successor),
                Some(DiskPlan::Copy { .. }) | None => present.as_ref(),
            };
            foundation.hardware(memory, network, scratch, TRANSLATION_CACHE_BOOT)?
        };
        let present = self.machine.get();
        let (Hypervisor::Qemu(qemu), Vm::Qemu(machine)) = (&foundation.hypervisor, &*present)
        else {
            bail!("only QEMU has successors");
        };
        let successor = qemu
            .prepare_successor(machine, hardware)
            .await
            .inspect_err(|_| self.disconnect(connection))?;
        Ok(Way::Succession {
            successor: Box::new(successor),
            connection,
        })
    }

    fn disconnect(&self, connection: Option<ConnectionId>) {
        if let (Some(relay), Some(connection)) = (&self.network.relay, connection) {
            relay.disconnect(connection);
        }
    }

    /// Freezes the VM. Whether it succeeds or not, the VM goes on.
    pub(super) async fn freeze(&self, preparation: Preparation) -> anyhow::Result<Frozen> {
        self.check_running()?;
        if self.pausing.replace(true) {
            bail!("the VM is being paused by another command");
        }
        let present = self.machine.get();
        let frozen = match &*present {
            Vm::Qemu(machine) => self.freeze_running(&present, machine, preparation).await,
            Vm::Firecracker(machine) => self.save(machine, preparation).await,
        };
        self.pausing.set(false);
        frozen
    }

    /// Waits until nobody can write to the frozen memory any more. Clones need not wait for it: the
    /// process that the VM has left is stopped.
    pub(super) async fn settle(&self, frozen: Frozen) {
        if let Some(left) = &frozen.left {
            left.wait_exit().await;
        }
        if let Err(error) = seal(&frozen.memory) {
            tracing::warn!(target: "vm", "the memory that clones share is not sealed: {error}");
        }
    }

    async fn freeze_running(
        &self,
        present: &Vm,
        machine: &QemuVm,
        preparation: Preparation,
    ) -> anyhow::Result<Frozen> {
        let mut watch = super::Stopwatch::new(Vec::new());
        // Neither side of the agent's channel moves while the guest's side is being saved.
        let held = self.link.hold();
        match (&preparation.way, &self.network.relay) {
            // The process is left behind: it has to be rid of what it sends.
            (Way::Succession { .. }, _) => self.network_holds(),
            (_, Some(relay)) => relay.stand_still(),
            _ => {}
        }
        let stopped = async {
            machine.pause().await.context("cannot pause the VM")?;
            let unread = machine.take_unread().context("the agent's channel fails")?;
            Ok::<_, anyhow::Error>(unread)
        };
        let frozen = match stopped.await {
            Ok(unread) => {
                watch.lap("stop");
                let frozen = self.freeze_stopped(machine, preparation, &mut watch).await;
                self.link.give_back(&unread)?;
                frozen
            }
            Err(error) => Err(error),
        };
        if frozen.is_err() {
            self.go_on(present).await;
        }
        drop(held);
        frozen
    }

    /// After a failure: lets the present machine go on, whichever it is.
    async fn go_on(&self, machine: &Vm) {
        self.network_goes_on();
        if let Err(error) = self.machine.resume().await {
            // Where the process has ended meanwhile its supervisor tells that.
            if !matches!(error, HypervisorError::Disconnected { .. }) {
                tracing::error!(target: "vm", "the VM cannot go on: {error}");
            }
            machine.kill();
        }
    }

    /// Has the relay keep frames for the guest, a moment before the machine is stopped. What comes from it then may be cut.
    pub(super) fn network_holds(&self) {
        if let (Some(relay), Vm::Qemu(_)) = (&self.network.relay, &*self.machine.get()) {
            relay.hold();
        }
    }

    /// Ends that the relay holds frames, a moment before the machine goes on; the connection is there as long as that.
    /// A tap device is no part of the machine, and has not been stopped with it.
    pub(super) fn network_goes_on(&self) {
        if !matches!(*self.machine.get(), Vm::Qemu(_)) {
            return;
        }
        if let (Some(relay), Some(connection)) = (&self.network.relay, self.connection.get()) {
            let _ = relay.go_on(connection);
        }
    }

    async fn freeze_stopped(
        &self,
        machine: &QemuVm,
        preparation: Preparation,
        watch: &mut super::Stopwatch,
    ) -> anyhow::Result<Frozen> {
        let state = machine.save_state().await?;
        watch.lap("save");
        let foundation = &self.foundation;
        let continue_on = match preparation.disk {
            Some(DiskPlan::Leave { successor, .. }) => Some(successor),
            Some(DiskPlan::Copy {
                store, prepared, ..
            }) => {
                store.freeze(prepared)?;
                None
            }
            None => None,
        };
        watch.lap("disk");
        let present = foundation.memory.borrow().as_fd().try_clone_to_owned()?;
        let mut left = None;
        let (memory, difference) = match preparation.way {
            Way::Succession {
                successor,
                connection,
            } => {
                left = Some(self.succeed(*successor, connection, &state, watch).await?);
                if let Some(disk) = continue_on {
                    *foundation.scratch.borrow_mut() = Some(disk);
                }
                (present, None)
            }
            Way::Save(_) => bail!("QEMU's memory is not written by itself"),
            Way::Copy(copy) => {
                fcvm_storage::clone_file(&File::from(present), &copy)
                    .context("cannot copy the VM's memory")?;
                watch.lap("memory");
                self.network_goes_on();
                self.machine.resume().await?;
                watch.lap("resume");
                (copy.into(), None)
            }
            Way::Difference { mapping, mut pages } => {
                mapping.capture(&mut pages)?;
                watch.lap("memory");
                self.network_goes_on();
                self.machine.resume().await?;
                watch.lap("resume");
                let size = foundation.memory.borrow().size().bytes();
                let file = anonymous_file("fcvm-pages", 0)?;
                PageFile::write_difference(&pages, size, &file, |_, _| false)?;
                seal(&file)?;
                watch.lap("difference");
                (present, Some(file))
            }
        };
        Ok(Frozen {
            state,
            memory,
            difference,
            timings_us: std::mem::take(&mut watch.laps),
            left,
        })
    }

    /// Lets the VM go on in its successor; gives the process that it has left, which is ending.
    async fn succeed(
        &self,
        successor: QemuStandby,
        connection: Option<ConnectionId>,
        state: &DeviceState,
        watch: &mut super::Stopwatch,
    ) -> anyhow::Result<Rc<Vm>> {
        let loaded = successor.load(state).await;
        let successor = loaded.inspect_err(|_| self.disconnect(connection))?;
        watch.lap("load");
        // From here on the successor is the VM.
        let old = self.machine.replace(successor);
        old.kill();
        if let (Some(relay), Some(connection)) = (&self.network.relay, connection) {
            let before = self.connection.replace(Some(connection));
            if !relay.activate(connection) {
                bail!("the successor's network ended");
            }
            self.disconnect(before);
        }
        self.machine.resume().await?;
        watch.lap("resume");
        let copy = self
            .foundation
            .memory
            .borrow()
            .as_fd()
            .try_clone_to_owned()?;
        *self.foundation.memory.borrow_mut() = GuestMemory::copy_on_write(copy)?;
        let identity = self.machine.identity();
        self.update(|record| {
            for resource in &mut record.resources {
                if let Resource::Process { identity: of, role } = resource
                    && role == HypervisorKind::Qemu.name()
                {
                    *of = identity;
                }
            }
        });
        Ok(old)
    }
}
