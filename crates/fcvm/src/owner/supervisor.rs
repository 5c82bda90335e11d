//! From the container's start to the VM's end: output, signals, requests to stop, losses.

use std::rc::Rc;
use std::time::Duration;

use fcvm_types::guest::ExitStatus;
use fcvm_types::record::VmState;
use fcvm_wire::frame::Frame;
use fcvm_wire::{Control, FrameKind, Outcome, Request};
use tokio::sync::mpsc;
use tokio::time::Instant;

use super::link::AgentStream;
use super::log::ContainerLog;
use super::spec::VmSpec;
use super::vm::RunningVm;
use crate::attach::{LocalEvent, LocalIo, terminal_size};
use crate::client::Flow;
use crate::signals::{Arrived, Forwarded, SIGHUP, SIGINT, SIGKILL, SIGTERM};

/// How long the guest may take to end its processes after SIGKILL, and to power off.
const POWER_OFF_LIMIT: Duration = Duration::from_secs(10);

/// How a VM ended.
#[derive(Debug)]
pub(super) enum Ending {
    /// The container ended.
    Exited(ExitStatus),
    /// The machine or its agent is gone, and the container with it.
    Lost(String),
}

/// Watches a VM.
pub(super) struct Supervisor<'a> {
    vm: &'a RunningVm,
    stream: AgentStream,
    signals: Forwarded,
    stop_requests: mpsc::UnboundedReceiver<Option<u32>>,
    local: Option<LocalIo>,
    log: ContainerLog,
    flow: Flow,
    tty: bool,
    stop_timeout: Duration,
    /// When patience ends, and what comes then.
    deadline: Option<(Instant, Next)>,
}

/// What follows when a deadline has passed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Next {
    /// SIGKILL to the container.
    Kill,
    /// The machine is ended: the guest does not react.
    Abandon,
}

impl<'a> Supervisor<'a> {
    pub(super) fn new(
        vm: &'a Rc<RunningVm>,
        spec: &VmSpec,
        stream: AgentStream,
        signals: Forwarded,
        stop_requests: mpsc::UnboundedReceiver<Option<u32>>,
        local: Option<LocalIo>,
        log: ContainerLog,
    ) -> Self {
        Self {
            vm,
            stream,
            signals,
            stop_requests,
            local,
            log,
            flow: Flow::default(),
            tty: spec.process.terminal.is_some(),
            stop_timeout: spec.stop_timeout,
            deadline: None,
        }
    }

    /// Runs until the container has ended, one way or the other.
    pub(super) async fn run(mut self) -> Ending {
        let ending = loop {
            match self.step().await {
                Ok(None) => {}
                Ok(Some(ending)) => break ending,
                Err(error) => break self.lost(crate::errors::one_line(&error)).await,
            }
        };
        if let Some(local) = self.local.take() {
            crate::client::finish(local, &mut self.signals).await;
        }
        ending
    }

    /// The agent's channel fails when the machine ends: the machine's own reason tells more.
    async fn lost(&self, reason: String) -> Ending {
        let exit = tokio::time::timeout(Duration::from_secs(1), self.vm.machine.wait_exit()).await;
        Ending::Lost(exit.map_or(reason, |exit| self.vm.reason_of(&exit)))
    }

    fn stop_signal(&self) -> i32 {
        self.vm.record.borrow().stop_signal
    }

    async fn step(&mut self) -> anyhow::Result<Option<Ending>> {
        let stdin_open = self.flow.stdin_open();
        let local = async {
            match &mut self.local {
                Some(local) => local.next(stdin_open).await,
                None => std::future::pending().await,
            }
        };
        let deadline = async {
            match self.deadline {
                Some((at, next)) => {
                    tokio::time::sleep_until(at).await;
                    next
                }
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            frame = self.stream.next() => self.take(frame?).await,
            event = local => {
                self.take_local(event).await?;
                Ok(None)
            }
            signal = self.signals.next() => {
                self.take_signal(signal).await?;
                Ok(None)
            }
            Some(timeout_s) = self.stop_requests.recv() => {
                let grace = timeout_s.map_or(self.stop_timeout, |seconds| Duration::from_secs(seconds.into()));
                let signal = self.stop_signal();
                self.stop(signal, grace).await?;
                Ok(None)
            }
            exit = self.vm.machine.wait_exit() => Ok(Some(Ending::Lost(self.vm.reason_of(&exit)))),
            next = deadline => self.impatient(next).await,
        }
    }

    async fn take(&mut self, frame: Frame) -> anyhow::Result<Option<Ending>> {
        match frame.kind {
            FrameKind::Data => {
                self.flow.received(&frame)?;
                self.log.write(frame.channel, &frame.payload);
                match &mut self.local {
                    Some(local) => local.write(frame.channel, frame.payload),
                    None => {
                        self.give_credit(LocalEvent::Taken(frame.channel, frame.payload.len()))
                            .await?
                    }
                }
            }
            FrameKind::Credit => self.flow.stdin.credited(frame.parse_credit()?),
            FrameKind::Closed => {
                return Ok(Some(match frame.parse()? {
                    Outcome::Exited(status) => Ending::Exited(status),
                    Outcome::Failed(failure) => {
                        Ending::Lost(crate::errors::printable(&failure.message))
                    }
                    other => Ending::Lost(format!(
                        "the agent gave an answer that makes no sense ({other:?})"
                    )),
                }));
            }
            _ => {}
        }
        Ok(None)
    }

    async fn give_credit(&mut self, event: LocalEvent) -> anyhow::Result<()> {
        match self.flow.local(0, event) {
            Some(frame) => self.stream.send(frame).await,
            None => Ok(()),
        }
    }

    async fn take_local(&mut self, event: LocalEvent) -> anyhow::Result<()> {
        if matches!(event, LocalEvent::Broken) {
            // Nobody reads the output any more: `fcvm run ... | head` ends, as a pipe ends its writer.
            return self.stop(SIGTERM, Duration::ZERO).await;
        }
        self.give_credit(event).await
    }

    async fn take_signal(&mut self, arrived: Arrived) -> anyhow::Result<()> {
        match arrived {
            Arrived::Resized if self.tty && self.local.is_some() => {
                self.control(Control::Resize {
                    size: terminal_size(),
                })
                .await
            }
            Arrived::Resized => Ok(()),
            Arrived::Signal(signal @ (SIGHUP | SIGINT | SIGTERM)) => {
                // A foreground run passes on what it got; a detached owner is asked to end the VM.
                let signal = if self.local.is_some() {
                    signal
                } else {
                    self.stop_signal()
                };
                self.stop(signal, self.stop_timeout).await
            }
            Arrived::Signal(signal) => self.control(Control::Signal { signal }).await,
        }
    }

    async fn control(&self, control: Control) -> anyhow::Result<()> {
        self.stream
            .send(Frame::message(FrameKind::Control, 0, &control))
            .await
    }

    /// Begins to end the VM. A second request can only shorten the grace.
    async fn stop(&mut self, signal: i32, grace: Duration) -> anyhow::Result<()> {
        let state = self.vm.record.borrow().state;
        if state == VmState::Paused {
            self.vm.unpause().await?;
        }
        self.vm.update(|record| record.state = VmState::Stopping);
        let at = Instant::now() + grace;
        if self
            .deadline
            .is_none_or(|(before, next)| next == Next::Kill && at < before)
        {
            self.deadline = Some((at, Next::Kill));
        }
        self.control(Control::Signal { signal }).await
    }

    async fn impatient(&mut self, next: Next) -> anyhow::Result<Option<Ending>> {
        match next {
            Next::Kill => {
                self.deadline = Some((Instant::now() + POWER_OFF_LIMIT, Next::Abandon));
                self.control(Control::Signal { signal: SIGKILL }).await?;
                Ok(None)
            }
            Next::Abandon => Ok(Some(Ending::Lost(
                "the guest did not end the container after SIGKILL".to_owned(),
            ))),
        }
    }
}

/// Ends the machine: in order where the guest still answers, else at once.
pub(super) async fn power_off(vm: &RunningVm, ending: &Ending) {
    if matches!(ending, Ending::Exited(_)) {
        let orderly = async {
            // Held until the machine has ended: a dropped stream is reset.
            let stream = vm.link.open(&Request::PowerOff).await;
            let exit = vm.machine.wait_exit().await;
            tracing::debug!(target: "qemu", "{exit}");
            drop(stream);
        };
        if tokio::time::timeout(POWER_OFF_LIMIT, orderly).await.is_ok() {
            return;
        }
        tracing::warn!(target: "agent", "the guest did not power off in time");
    }
    vm.machine.kill();
    vm.machine.wait_exit().await;
}
