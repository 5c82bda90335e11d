//! A command's end of an owner's control socket.

use std::cell::Cell;

use anyhow::{Context as _, bail};
use fcvm_types::record::{VmRecord, VmState};
use fcvm_wire::frame::Frame;
use fcvm_wire::{
    Channel, Control, Decoder, FrameKind, Opened, Outcome, ReceiveWindow, Request, Role, SendWindow,
};
use tokio::sync::mpsc;

use crate::attach::{LocalEvent, LocalIo, terminal_size};
use crate::connection::{FrameReader, Gate, hello, new_session, spawn_writer};
use crate::errors::guest_failure;
use crate::owner::OwnerRequest;
use crate::signals::{Arrived, Forwarded};
use crate::state::StateStore;

/// A connection to an owner. It carries one stream.
pub(crate) struct Client {
    reader: FrameReader,
    outgoing: mpsc::Sender<Frame>,
    opened: Cell<bool>,
}

const STREAM: u32 = 1;

impl Client {
    /// Connects to the owner of a VM that runs.
    pub(crate) async fn connect(store: &StateStore, record: &VmRecord) -> anyhow::Result<Self> {
        match record.state {
            VmState::Exited => bail!("VM '{}' is not running", record.name),
            VmState::Standby => bail!(
                "VM '{}' is not wanted by anybody yet: it waits to become a clone",
                record.name
            ),
            VmState::Created | VmState::Booting => bail!(
                "VM '{}' is still starting: try again when 'fcvm ls' shows it as up",
                record.name
            ),
            VmState::Running | VmState::Paused | VmState::Stopping => {}
        }
        let path = store.paths(&record.id).control_socket();
        // The owner takes its socket away when the container has ended.
        let connected = crate::connection::connect(&path).await;
        let (read, write) = connected.with_context(|| {
            format!(
                "VM '{}' is ending, or its owner does not answer",
                record.name
            )
        })?;
        let mut reader = FrameReader::new(read, Decoder::from_guest());
        let outgoing = spawn_writer(Gate::default(), write);
        outgoing
            .send(hello(Role::Command, new_session()?, None))
            .await?;
        reader.hello(Role::Owner).await?;
        Ok(Self {
            reader,
            outgoing,
            opened: Cell::new(false),
        })
    }

    async fn open(&self, request: &OwnerRequest) -> anyhow::Result<()> {
        debug_assert!(!self.opened.replace(true), "a client carries one stream");
        self.send(Frame::message(FrameKind::Open, STREAM, request))
            .await
    }

    /// Sends a frame of the stream.
    pub(crate) async fn send(&self, frame: Frame) -> anyhow::Result<()> {
        self.outgoing
            .send(frame)
            .await
            .ok()
            .context("the VM's owner closed the connection")
    }

    /// The next frame of the stream.
    pub(crate) async fn next(&mut self) -> anyhow::Result<Frame> {
        match self.reader.next().await? {
            Some(frame) if frame.stream == STREAM => Ok(frame),
            Some(_) => bail!("the VM's owner sent a frame of another stream"),
            None => bail!("the VM ended"),
        }
    }

    /// Asks, and waits for the answer.
    pub(crate) async fn request(self, request: &OwnerRequest) -> anyhow::Result<Outcome> {
        self.open(request).await?;
        finished(self.outcome().await?)
    }

    /// Asks the agent, and waits for the answer.
    pub(crate) async fn guest(self, request: Request) -> anyhow::Result<Outcome> {
        self.request(&OwnerRequest::Guest { request }).await
    }

    /// Opens a stream that carries data, for `transfer`.
    pub(crate) async fn start(self, request: Request) -> anyhow::Result<Self> {
        self.open(&OwnerRequest::Guest { request }).await?;
        Ok(self)
    }

    /// How the stream ended, failures included.
    pub(crate) async fn outcome(mut self) -> anyhow::Result<Outcome> {
        loop {
            let frame = self.next().await?;
            if frame.kind == FrameKind::Closed {
                return Ok(frame.parse()?);
            }
        }
    }

    /// Joins the stream with this process's standard streams until it ends.
    pub(crate) async fn attach(mut self, interactive: bool, tty: bool) -> anyhow::Result<Outcome> {
        let mut local = LocalIo::start(interactive, tty)?;
        let mut signals = Forwarded::new()?;
        let mut flow = Flow::default();
        let outcome = loop {
            tokio::select! {
                frame = self.next() => {
                    let frame = frame?;
                    match frame.kind {
                        FrameKind::Data => {
                            flow.received(&frame)?;
                            local.write(frame.channel, frame.payload);
                        }
                        FrameKind::Credit => flow.stdin.credited(frame.parse_credit()?),
                        FrameKind::Closed => break finished(frame.parse()?),
                        FrameKind::Opened => { let _: Opened = frame.parse()?; }
                        _ => {}
                    }
                }
                event = local.next(flow.stdin_open()) => {
                    if let Some(frame) = flow.local(STREAM, event) {
                        self.send(frame).await?;
                    }
                }
                signal = signals.next() => {
                    let control = match signal {
                        Arrived::Resized if tty => Control::Resize { size: terminal_size() },
                        Arrived::Resized => continue,
                        Arrived::Signal(signal) => Control::Signal { signal },
                    };
                    self.send(Frame::message(FrameKind::Control, STREAM, &control)).await?;
                }
            }
        };
        finish(local, &mut signals).await;
        outcome
    }
}

/// Waits until all output is written; a signal gives up the rest, whose reader does not read.
pub(crate) async fn finish(local: LocalIo, signals: &mut Forwarded) {
    let interrupted = async { while signals.next().await == Arrived::Resized {} };
    tokio::select! {
        () = local.finish() => {}
        () = interrupted => {}
    }
}

/// Flow control of a stream that is joined with standard streams.
#[derive(Default)]
pub(crate) struct Flow {
    pub(crate) stdin: SendWindow,
    output: [ReceiveWindow; 2],
}

impl Flow {
    /// There is credit for a whole read of standard input.
    pub(crate) fn stdin_open(&self) -> bool {
        self.stdin.available() >= fcvm_wire::MAX_DATA_BYTES
    }

    /// Counts data that arrived.
    pub(crate) fn received(&mut self, frame: &Frame) -> anyhow::Result<()> {
        Ok(self.output[output_index(frame.channel)].received(frame.payload.len())?)
    }

    /// Counts data that was taken out; the frame that gives credit for it, when it is time for one.
    pub(crate) fn taken(&mut self, stream: u32, channel: Channel, bytes: usize) -> Option<Frame> {
        let credit = self.output[output_index(channel)].taken(bytes)?;
        Some(Frame::credit(stream, channel, credit))
    }

    /// The frame that follows from what happened to the standard streams.
    pub(crate) fn local(&mut self, stream: u32, event: LocalEvent) -> Option<Frame> {
        match event {
            LocalEvent::Stdin(bytes) => {
                self.stdin.sent(bytes.len());
                Some(Frame::data(stream, Channel::Stdin, bytes))
            }
            LocalEvent::StdinEnd => Some(Frame::eof(stream, Channel::Stdin)),
            LocalEvent::Taken(channel, bytes) => self.taken(stream, channel, bytes),
            // As a pipe does to its writer: `fcvm exec VM yes | head` ends.
            LocalEvent::Broken => Some(Frame::new(FrameKind::Reset, stream, Vec::new())),
        }
    }
}

fn output_index(channel: Channel) -> usize {
    usize::from(channel == Channel::Stderr)
}

/// A failed outcome as an error.
pub(crate) fn finished(outcome: Outcome) -> anyhow::Result<Outcome> {
    match outcome {
        Outcome::Failed(failure) => Err(guest_failure(failure)),
        outcome => Ok(outcome),
    }
}
