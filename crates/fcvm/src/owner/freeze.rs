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

use anyhow::{Context as _, bail};
use fcvm_hypervisor::qemu::{DeviceState, QemuStandby, QemuVm};
use fcvm_hypervisor::spec::TRANSLATION_CACHE_BOOT;
use fcvm_hypervisor::{GuestMemory, MemoryMapping, NetworkBackend, NetworkSpec, Pause, SaveState};
use fcvm_memory::page_file::{anonymous_file, seal};
use fcvm_memory::{CapturedPages, GuestMapping, PageFile};
use fcvm_network::ConnectionId;
use fcvm_types::record::{Resource, VmState};

use super::machine::QEMU_ROLE;
use super::vm::RunningVm;

/// Room that is made for pages which the guest writes between the preparation and the pause.
const SPARE_PAGE_BYTES: usize = 8 << 20;

/// A VM as of one instant.
pub(super) struct Frozen {
    pub(super) state: DeviceState,
    /// What clones map copy-on-write; sealed.
    pub(super) memory: OwnedFd,
    /// Pages over it: a page file.
    pub(super) difference: Option<File>,
    /// The disk's content; no process writes to it.
    pub(super) scratch: Option<File>,
    /// Microseconds of each stage; those from `stop` to `resume` are the pause.
    pub(super) timings_us: Vec<(String, u64)>,
}

/// How a VM is to be frozen.
pub(super) enum Plan {
    /// The VM goes on in another process, on the present memory.
    Succession,
    /// The VM stays, and its memory is copied to here.
    Copy(File),
    /// The VM stays, and the pages that it wrote are copied.
    Difference,
}

/// What was made ready before the pause.
pub(super) struct Preparation {
    way: Way,
    /// The disk's copy, still empty.
    scratch: Option<File>,
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
}

impl RunningVm {
    /// Decides how the VM is to be frozen.
    pub(super) fn plan_freeze(&self) -> anyhow::Result<Plan> {
        self.check_running()?;
        let memory = self.foundation.memory.borrow();
        Ok(match memory.mapping() {
            MemoryMapping::CopyOnWrite => Plan::Difference,
            MemoryMapping::Shared
                if self.network.guest.is_some() && self.network.relay.is_none() =>
            {
                tracing::info!(target: "vm", "QEMU's own network cannot move to another process: the memory is copied");
                Plan::Copy(anonymous_file("fcvm-guest-memory", memory.size().bytes())?)
            }
            MemoryMapping::Shared => Plan::Succession,
        })
    }

    /// What clones will map: known before the VM is frozen.
    pub(super) fn template(&self, plan: &Plan) -> anyhow::Result<OwnedFd> {
        Ok(match plan {
            Plan::Copy(copy) => copy.as_fd().try_clone_to_owned()?,
            Plan::Succession | Plan::Difference => self
                .foundation
                .memory
                .borrow()
                .as_fd()
                .try_clone_to_owned()?,
        })
    }

    /// Makes ready what a freeze needs, while the VM runs.
    pub(super) async fn prepare_freeze(&self, plan: Plan) -> anyhow::Result<Preparation> {
        let foundation = &self.foundation;
        let way = match plan {
            Plan::Succession => self.prepare_successor().await?,
            Plan::Copy(copy) => Way::Copy(copy),
            Plan::Difference => {
                let pid = self.machine.identity().pid;
                let mapping = GuestMapping::find(pid, &*foundation.memory.borrow())?;
                let bytes: u64 = mapping.private_runs()?.iter().map(|run| run.bytes()).sum();
                let mut pages = CapturedPages::default();
                // Not zero, so that the kernel gives the memory now and not in the pause.
                let room = usize::try_from(bytes)?.saturating_add(SPARE_PAGE_BYTES);
                pages.bytes.resize(room, 1);
                Way::Difference { mapping, pages }
            }
        };
        let scratch =
            match &foundation.scratch {
                Some(_) => Some(fcvm_storage::nameless_file(&foundation.disks).with_context(
                    || format!("cannot make a disk in {}", foundation.disks.display()),
                )?),
                None => None,
            };
        Ok(Preparation { way, scratch })
    }

    fn check_running(&self) -> anyhow::Result<()> {
        match self.state() {
            VmState::Running => Ok(()),
            VmState::Paused => bail!(self.paused()),
            _ => bail!("the VM is not running"),
        }
    }

    async fn prepare_successor(&self) -> anyhow::Result<Way> {
        let foundation = &self.foundation;
        let copy = foundation.memory.borrow().as_fd().try_clone_to_owned()?;
        let memory = GuestMemory::copy_on_write(copy)?;
        let (connection, network) = match &self.network.relay {
            Some(relay) => {
                let (id, socket) = relay.connect().context("cannot connect the successor")?;
                let network = NetworkSpec {
                    backend: NetworkBackend::Stream(socket),
                    mac: self.network.mac,
                };
                (Some(id), Some(network))
            }
            None => (None, None),
        };
        let hardware = foundation.hardware(memory, network, TRANSLATION_CACHE_BOOT)?;
        let successor = foundation
            .qemu
            .prepare_successor(&self.machine.get(), hardware)
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
        let frozen = self.freeze_running(preparation).await;
        self.pausing.set(false);
        let Frozen { memory, .. } = frozen
            .as_ref()
            .map_err(|error| anyhow::anyhow!("{error:#}"))?;
        seal(memory)?;
        frozen
    }

    async fn freeze_running(&self, preparation: Preparation) -> anyhow::Result<Frozen> {
        let machine = self.machine.get();
        let mut watch = super::Stopwatch::new(Vec::new());
        // Neither side of the agent's channel moves while the guest's side is being saved.
        let held = self.link.hold();
        if let (Way::Succession { .. }, Some(relay)) = (&preparation.way, &self.network.relay) {
            relay.hold();
        }
        let stopped = async {
            machine.pause().await.context("cannot pause the VM")?;
            let unread = machine.take_unread().context("the agent's channel fails")?;
            Ok::<_, anyhow::Error>(unread)
        };
        let frozen = match stopped.await {
            Ok(unread) => {
                watch.lap("stop");
                let frozen = self.freeze_stopped(&machine, preparation, &mut watch).await;
                self.link.give_back(&unread)?;
                frozen
            }
            Err(error) => Err(error),
        };
        if frozen.is_err() {
            self.go_on(&machine).await;
        }
        drop(held);
        frozen
    }

    /// After a failure: lets the present machine go on, whichever it is.
    async fn go_on(&self, machine: &QemuVm) {
        if let (Some(relay), Some(connection)) = (&self.network.relay, self.connection.get()) {
            // Ends the hold; the connection is there as long as its machine.
            let _ = relay.activate(connection);
        }
        if let Err(error) = self.machine.resume().await {
            tracing::error!(target: "vm", "the VM cannot go on: {error}");
            machine.kill();
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
        if let (Some(scratch), Some(copy)) = (&foundation.scratch, &preparation.scratch) {
            fcvm_storage::clone_file(scratch, copy).context("cannot copy the VM's disk")?;
        }
        watch.lap("disk");
        let present = foundation.memory.borrow().as_fd().try_clone_to_owned()?;
        let (memory, difference) = match preparation.way {
            Way::Succession {
                successor,
                connection,
            } => {
                self.succeed(*successor, connection, &state, watch).await?;
                (present, None)
            }
            Way::Copy(copy) => {
                fcvm_storage::clone_file(&File::from(present), &copy)
                    .context("cannot copy the VM's memory")?;
                watch.lap("memory");
                self.machine.resume().await?;
                watch.lap("resume");
                (copy.into(), None)
            }
            Way::Difference { mapping, mut pages } => {
                mapping.capture(&mut pages)?;
                watch.lap("memory");
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
            scratch: preparation.scratch,
            timings_us: std::mem::take(&mut watch.laps),
        })
    }

    /// Lets the VM go on in its successor.
    async fn succeed(
        &self,
        successor: QemuStandby,
        connection: Option<ConnectionId>,
        state: &DeviceState,
        watch: &mut super::Stopwatch,
    ) -> anyhow::Result<()> {
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
        old.wait_exit().await;
        watch.lap("end of the old process");
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
                    && role == QEMU_ROLE
                {
                    *of = identity;
                }
            }
        });
        Ok(())
    }
}
