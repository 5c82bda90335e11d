//! The owner's end of the agent's channel: one reader and one writer, many streams.
//!
//! What arrives is put into the queue of its stream. A queue cannot grow beyond the flow-control
//! window of its channels: a guest that sends more has broken the protocol and loses the connection.

use std::cell::{Cell, RefCell};
use std::collections::{HashMap, VecDeque};
use std::os::fd::{AsFd, OwnedFd};
use std::rc::Rc;

use anyhow::{Context as _, bail};
use fcvm_types::guest::ClonePlan;
use fcvm_wire::frame::{Frame, MAX_DATA_BYTES};
use fcvm_wire::{Decoder, FrameKind, INITIAL_WINDOW_BYTES, Mark, Outcome, Request, Role, StreamId};
use tokio::io::AsyncWriteExt;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{Notify, mpsc};

use super::parking::{Parking, Successors};
use crate::connection::{FrameReader, Gate, Held, hello, new_session, spawn_parking_writer};

/// Streams that may be open at once.
const MAX_STREAMS: usize = 512;
/// Frames that may wait in one stream's queue: small ones are joined, so only a guest that
/// alternates channels byte by byte comes near.
const MAX_QUEUED_FRAMES: usize = 65_536;

/// Number of the stream by which a clone's container is adopted.
const ADOPTION_STREAM: StreamId = 1;

/// The connection to the agent. Clones share it.
#[derive(Clone)]
pub(crate) struct AgentLink(pub(super) Rc<Inner>);

pub(super) struct Inner {
    pub(super) outgoing: mpsc::Sender<Frame>,
    pub(super) gate: Gate,
    /// A second descriptor of the socket.
    pub(super) socket: RefCell<OwnedFd>,
    pub(super) mark: Mark,
    /// By which the agent knows this owner again.
    pub(super) session: u64,
    pub(super) parking: Parking,
    streams: RefCell<HashMap<StreamId, Rc<Queue>>>,
    last_stream: Cell<StreamId>,
    /// Why the connection ended, once it has.
    ended: RefCell<Option<String>>,
}

/// A link in the making, but for its reader.
struct Parts {
    outgoing: mpsc::Sender<Frame>,
    gate: Gate,
    socket: OwnedFd,
    parking: Parking,
    successors: Successors,
}

impl Parts {
    fn new(
        socket: UnixStream,
        listener: Option<UnixListener>,
    ) -> anyhow::Result<(FrameReader, Self)> {
        let gate = Gate::default();
        let (parking, writers, successors) = Parking::new(listener);
        let copy = socket.as_fd().try_clone_to_owned()?;
        let (read, write) = socket.into_split();
        let reader = FrameReader::behind(gate.clone(), read, Decoder::from_guest());
        let parts = Self {
            outgoing: spawn_parking_writer(gate.clone(), write, writers),
            gate,
            socket: copy,
            parking,
            successors,
        };
        Ok((reader, parts))
    }
}

#[derive(Default)]
struct Queue {
    frames: RefCell<VecDeque<Frame>>,
    bytes: RefCell<[usize; 3]>,
    arrived: Notify,
    /// Nobody reads it any more; it is there until the agent has closed the stream.
    abandoned: Cell<bool>,
}

impl Queue {
    /// Adds a frame; `false` when the guest exceeded what it may send.
    fn push(&self, frame: Frame) -> bool {
        if self.abandoned.get() {
            return true;
        }
        let mut frames = self.frames.borrow_mut();
        if frame.kind == FrameKind::Data {
            let bytes = &mut self.bytes.borrow_mut()[frame.channel as usize];
            *bytes += frame.payload.len();
            if *bytes > INITIAL_WINDOW_BYTES as usize {
                return false;
            }
        }
        match frames.back_mut() {
            Some(last)
                if frame.kind == FrameKind::Data
                    && last.kind == FrameKind::Data
                    && last.channel == frame.channel
                    && last.payload.len() + frame.payload.len() <= MAX_DATA_BYTES =>
            {
                last.payload.extend_from_slice(&frame.payload);
            }
            _ => frames.push_back(frame),
        }
        self.arrived.notify_one();
        frames.len() <= MAX_QUEUED_FRAMES
    }

    fn pop(&self) -> Option<Frame> {
        let frame = self.frames.borrow_mut().pop_front()?;
        if frame.kind == FrameKind::Data {
            self.bytes.borrow_mut()[frame.channel as usize] -= frame.payload.len();
        }
        Some(frame)
    }
}

impl AgentLink {
    /// Waits for the agent's hello and starts the reader and the writer. Where the agent connects, it does so
    /// again at the listener after it was parked.
    pub(crate) async fn establish(
        socket: UnixStream,
        listener: Option<UnixListener>,
    ) -> anyhow::Result<Self> {
        let (mut reader, parts) = Parts::new(socket, listener)?;
        reader.hello(Role::Agent).await?;
        let mark = Mark::from_random(crate::state::random()?);
        let session = new_session()?;
        parts
            .outgoing
            .send(hello(Role::Owner, session, Some(mark)))
            .await
            .context("the agent's channel closed")?;
        Ok(Self::start(reader, parts, mark, session))
    }

    /// Begins anew with the agent of a clone, and adopts its container. The bytes are on their way when this
    /// returns; [`Adopting::finish`] waits for the answer.
    ///
    /// On a port the agent is in the middle of its old connection and knows `old` as the mark: it reads this as
    /// soon as the clone runs. An agent that has connected to a listener has shown the mark already.
    pub(crate) async fn adopt(
        mut socket: UnixStream,
        listener: Option<UnixListener>,
        old: Mark,
        plan: ClonePlan,
    ) -> anyhow::Result<Adopting> {
        let mark = Mark::from_random(crate::state::random()?);
        let session = new_session()?;
        let plan = Box::new(plan);
        let mut bytes = match listener {
            Some(_) => Vec::new(),
            None => old.as_bytes().to_vec(),
        };
        hello(Role::Owner, session, Some(mark)).encode(&mut bytes);
        Frame::message(FrameKind::Open, ADOPTION_STREAM, &Request::Adopt { plan })
            .encode(&mut bytes);
        socket
            .write_all(&bytes)
            .await
            .context("the agent's channel closed")?;
        Ok(Adopting {
            socket,
            listener,
            old,
            mark,
            session,
        })
    }

    fn start(reader: FrameReader, parts: Parts, mark: Mark, session: u64) -> Self {
        let link = Self(Rc::new(Inner {
            outgoing: parts.outgoing,
            gate: parts.gate,
            socket: parts.socket.into(),
            mark,
            session,
            parking: parts.parking,
            streams: RefCell::default(),
            last_stream: Cell::new(0),
            ended: RefCell::default(),
        }));
        tokio::task::spawn_local(link.clone().read(reader, parts.successors));
        link
    }

    /// The mark by which the owner of a clone begins anew.
    pub(crate) fn mark(&self) -> Mark {
        self.0.mark
    }

    /// Nothing is written to the channel and nothing read from it while the guard is there.
    pub(crate) fn hold(&self) -> Held {
        self.0.gate.close()
    }

    /// Writes bytes again that were taken out of the channel before the guest had them. The channel
    /// must be held: they come before all that waits.
    pub(crate) fn give_back(&self, mut bytes: &[u8]) -> anyhow::Result<()> {
        while !bytes.is_empty() {
            // They were in the socket's buffer before, so there is room for them.
            let written = rustix::io::write(&*self.0.socket.borrow(), bytes)
                .context("the agent's channel does not take back what it held")?;
            bytes = &bytes[written..];
        }
        Ok(())
    }

    async fn read(self, mut reader: FrameReader, mut successors: Successors) {
        let reason = loop {
            match reader.next().await {
                Ok(Some(frame)) if frame.kind == FrameKind::Park => {
                    if !self.0.parking.answer() {
                        break "the agent broke the protocol: it parked unasked".to_owned();
                    }
                    // Gone with the link.
                    let Some(next) = successors.recv().await else {
                        return;
                    };
                    reader = next;
                }
                Ok(Some(frame)) => {
                    if let Err(error) = self.deliver(frame) {
                        break error.to_string();
                    }
                }
                Ok(None) => break "the agent's channel closed".to_owned(),
                Err(error) => break format!("the agent broke the protocol: {error}"),
            }
        };
        tracing::debug!(target: "agent", "{reason}");
        *self.0.ended.borrow_mut() = Some(reason);
        self.0.parking.abandon();
        for queue in self.0.streams.borrow().values() {
            queue.arrived.notify_one();
        }
    }

    fn deliver(&self, frame: Frame) -> anyhow::Result<()> {
        let closed = frame.kind == FrameKind::Closed;
        let id = frame.stream;
        match frame.kind {
            FrameKind::Opened | FrameKind::Data | FrameKind::Eof | FrameKind::Closed => {}
            FrameKind::Credit => {
                frame.parse_credit()?;
            }
            kind => bail!("the agent broke the protocol: it sent a {kind:?} frame"),
        }
        let Some(queue) = self.0.streams.borrow().get(&id).cloned() else {
            bail!(
                "the agent broke the protocol: it sent a frame for stream {id}, which is not open"
            );
        };
        if !queue.push(frame) {
            bail!(
                "the agent broke the protocol: it sent more on stream {id} than it was given credit for"
            );
        }
        if closed {
            self.0.streams.borrow_mut().remove(&id);
        }
        Ok(())
    }

    /// Opens a stream.
    pub(crate) async fn open(&self, request: &Request) -> anyhow::Result<AgentStream> {
        self.check()?;
        let id = {
            let mut streams = self.0.streams.borrow_mut();
            if streams.len() >= MAX_STREAMS {
                bail!(
                    "{MAX_STREAMS} requests are under way in this VM: wait until some have ended"
                );
            }
            let mut id = self.0.last_stream.get();
            loop {
                id = id.wrapping_add(1).max(1);
                if !streams.contains_key(&id) {
                    break;
                }
            }
            self.0.last_stream.set(id);
            streams.insert(id, Rc::default());
            id
        };
        let queue = self.0.streams.borrow()[&id].clone();
        let stream = AgentStream {
            id,
            link: self.clone(),
            queue,
            closed: Cell::new(false),
        };
        stream
            .send(Frame::message(FrameKind::Open, id, request))
            .await?;
        Ok(stream)
    }

    /// Opens a stream and waits for its end.
    pub(crate) async fn request(&self, request: &Request) -> anyhow::Result<Outcome> {
        let stream = self.open(request).await?;
        loop {
            let frame = stream.next().await?;
            if frame.kind == FrameKind::Closed {
                return Ok(frame.parse()?);
            }
        }
    }

    pub(super) fn check(&self) -> anyhow::Result<()> {
        match &*self.0.ended.borrow() {
            Some(reason) => bail!("{reason}"),
            None => Ok(()),
        }
    }
}

/// A clone whose agent has been sent its plan.
pub(crate) struct Adopting {
    socket: UnixStream,
    listener: Option<UnixListener>,
    old: Mark,
    mark: Mark,
    session: u64,
}

impl Adopting {
    /// Waits for the agent's answer; gives the link and the container's stream.
    pub(crate) async fn finish(self) -> anyhow::Result<(AgentLink, AgentStream)> {
        let is_port = self.listener.is_none();
        let (mut reader, parts) = Parts::new(self.socket, self.listener)?;
        if is_port {
            reader.skip_to(self.old.answer()).await?;
        }
        reader.hello(Role::Agent).await?;
        let queue = Rc::<Queue>::default();
        let link = AgentLink::start(reader, parts, self.mark, self.session);
        // No frame is read before the task that was just started runs.
        let inner = &link.0;
        inner.last_stream.set(ADOPTION_STREAM);
        inner
            .streams
            .borrow_mut()
            .insert(ADOPTION_STREAM, queue.clone());
        let stream = AgentStream {
            id: ADOPTION_STREAM,
            link: link.clone(),
            queue,
            closed: Cell::new(false),
        };
        Ok((link, stream))
    }
}

/// A stream that the owner opened. Dropping it before its end resets it.
pub(crate) struct AgentStream {
    id: StreamId,
    link: AgentLink,
    queue: Rc<Queue>,
    closed: Cell<bool>,
}

impl AgentStream {
    /// The next frame of the stream; the last one is `Closed`.
    pub(crate) async fn next(&self) -> anyhow::Result<Frame> {
        loop {
            let arrived = self.queue.arrived.notified();
            if let Some(frame) = self.queue.pop() {
                if frame.kind == FrameKind::Closed {
                    self.closed.set(true);
                }
                return Ok(frame);
            }
            self.link.check()?;
            arrived.await;
        }
    }

    /// Sends a frame; its stream number is set here.
    pub(crate) async fn send(&self, mut frame: Frame) -> anyhow::Result<()> {
        frame.stream = self.id;
        if self.link.0.outgoing.send(frame).await.is_err() {
            bail!("the agent's channel closed");
        }
        Ok(())
    }
}

impl Drop for AgentStream {
    fn drop(&mut self) {
        if self.closed.get() || self.link.check().is_err() {
            return;
        }
        self.queue.abandoned.set(true);
        self.queue.frames.borrow_mut().clear();
        let (outgoing, id) = (self.link.0.outgoing.clone(), self.id);
        tokio::task::spawn_local(async move {
            // Fails only when the connection is gone, and the stream with it.
            let _ = outgoing
                .send(Frame::new(FrameKind::Reset, id, Vec::new()))
                .await;
        });
    }
}
