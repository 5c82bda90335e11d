//! A VM that runs, as the owner's parts share it: its record, its machine and its agent.

use std::cell::{Cell, RefCell};
use std::time::Duration;

use anyhow::{Context as _, bail};
use fcvm_hypervisor::{VmEvent, VmExit};
use fcvm_network::ConnectionId;
use fcvm_types::record::{VmRecord, VmState};
use fcvm_wire::{Outcome, Request};
use tokio::sync::mpsc;

use super::link::{AgentLink, AgentStream};
use super::machine::Foundation;
use super::reserve::Reserves;
use super::slot::MachineSlot;
use crate::client::finished;
use crate::signals::SIGKILL;
use crate::state::StateStore;

/// The VM of this owner.
pub(super) struct RunningVm {
    pub(super) store: StateStore,
    pub(super) record: RefCell<VmRecord>,
    pub(super) machine: MachineSlot,
    pub(super) foundation: Foundation,
    pub(super) network: fcvm_network::Attachment,
    /// The machine's connection to the network's relay.
    pub(super) connection: Cell<Option<ConnectionId>>,
    pub(super) link: AgentLink,
    /// Requests to end the VM: seconds of grace.
    pub(super) stop_requests: mpsc::UnboundedSender<Option<u32>>,
    /// Kept from one pause to its end, so that two of them cannot cross.
    pub(super) pausing: Cell<bool>,
    /// One fork or snapshot at a time.
    pub(super) freezing: tokio::sync::Mutex<()>,
    /// Clones that are ready before they are asked for.
    pub(super) reserves: Reserves,
    /// Told when the record changes.
    pub(super) changed: tokio::sync::Notify,
    /// The machine stopped because the host had no space for its disk.
    pub(super) out_of_space: Cell<bool>,
    /// Why the owner has ended the machine, where the machine itself cannot tell.
    pub(super) lost: RefCell<Option<String>>,
}

/// How long the guest may take to set its clock; it cannot where the machine stopped again at once.
const CLOCK_LIMIT: Duration = Duration::from_secs(5);

impl RunningVm {
    /// Why the VM was lost, with its machine's end.
    pub(super) fn reason_of(&self, exit: &VmExit) -> String {
        let known = self.lost.borrow().clone();
        known.unwrap_or_else(|| exit.to_string())
    }

    /// Changes the record and writes it.
    pub(super) fn update(&self, change: impl FnOnce(&mut VmRecord)) {
        let mut record = self.record.borrow_mut();
        let before = record.clone();
        change(&mut record);
        if *record == before {
            return;
        }
        self.changed.notify_waiters();
        if let Err(error) = self.store.write(&record) {
            // The VM goes on: a full disk must not end what runs.
            tracing::warn!(target: "vm", "{error:#}");
        }
    }

    pub(super) fn state(&self) -> VmState {
        self.record.borrow().state
    }

    /// Opens a stream to the agent; refused while nothing in the guest can answer.
    pub(super) async fn open(&self, request: &Request) -> anyhow::Result<AgentStream> {
        match self.state() {
            VmState::Paused => bail!(self.paused()),
            VmState::Running | VmState::Stopping => self.link.open(request).await,
            _ => bail!("the VM is not running"),
        }
    }

    /// Why nothing in the guest answers, and what to do.
    pub(super) fn paused(&self) -> String {
        let name = &self.record.borrow().name;
        if self.out_of_space.get() {
            format!(
                "the VM is paused because the file system of its disk on the host is full: free space, then 'fcvm unpause {name}'"
            )
        } else {
            format!("the VM is paused: 'fcvm unpause {name}' lets it go on")
        }
    }

    /// Watches the machine's disks: where the host has no space left the machine stops itself, and
    /// its writes wait.
    pub(super) async fn watch_disks(&self) {
        while let Some(event) = self.machine.next_event().await {
            match event {
                VmEvent::DiskError { no_space: true, .. }
                    if matches!(self.state(), VmState::Running | VmState::Paused) =>
                {
                    // Each waiting write is an event.
                    if self.out_of_space.replace(true) {
                        continue;
                    }
                    self.update(|record| record.state = VmState::Paused);
                    tracing::warn!(target: "vm", "{}", self.paused());
                }
                VmEvent::DiskError {
                    no_space: false,
                    disk,
                    reason,
                    ..
                } => {
                    tracing::warn!(target: "vm", "the disk {disk} fails on the host: {reason}");
                }
                _ => {}
            }
        }
    }

    /// Asks the supervisor to end the VM.
    pub(super) fn stop(&self, timeout_s: Option<u32>) {
        // The supervisor outlives all who ask.
        let _ = self.stop_requests.send(timeout_s);
    }

    /// Sends a signal to the container.
    pub(super) async fn kill(&self, signal: i32) -> anyhow::Result<()> {
        if self.state() == VmState::Paused {
            if signal != SIGKILL {
                bail!(self.paused());
            }
            if self.out_of_space.get() {
                // It would stop again at once, and its agent would never hear of the signal.
                self.machine.kill();
                return Ok(());
            }
            self.unpause().await?;
        }
        finished(
            self.link
                .request(&Request::Signal { signal, all: false })
                .await?,
        )?;
        Ok(())
    }

    /// Stops the virtual processors.
    pub(super) async fn pause(&self) -> anyhow::Result<()> {
        if self.pausing.get() || self.state() != VmState::Running {
            bail!("the VM is not running");
        }
        self.pausing.set(true);
        self.network_holds();
        let paused = self.machine.pause().await.context("cannot pause the VM");
        if paused.is_err() {
            self.network_goes_on();
        }
        self.pausing.set(false);
        paused?;
        self.update(|record| record.state = VmState::Paused);
        Ok(())
    }

    /// Lets the virtual processors go on and sets the guest's clock, which stood still.
    pub(super) async fn unpause(&self) -> anyhow::Result<()> {
        if self.pausing.get() || self.state() != VmState::Paused {
            bail!("the VM is not paused");
        }
        self.pausing.set(true);
        // Set again by the machine's next event where there is still no space.
        self.out_of_space.set(false);
        self.network_goes_on();
        let resumed = self
            .machine
            .resume()
            .await
            .context("cannot let the VM go on");
        self.pausing.set(false);
        resumed?;
        if self.out_of_space.get() {
            bail!(self.paused());
        }
        self.update(|record| record.state = VmState::Running);
        self.set_clock().await;
        Ok(())
    }

    /// Sets the guest's clock, which stood still while the VM did.
    pub(super) async fn set_clock(&self) {
        let request = Request::SetClock {
            realtime_ns: super::realtime_ns(),
        };
        let set = tokio::time::timeout(CLOCK_LIMIT, self.link.request(&request)).await;
        match set
            .context("the guest does not answer")
            .flatten()
            .and_then(finished)
        {
            Ok(Outcome::Done) => {}
            Ok(other) => tracing::debug!(target: "agent", "an unexpected answer: {other:?}"),
            Err(error) => tracing::warn!(target: "agent", "the guest's clock is late: {error:#}"),
        }
    }
}
