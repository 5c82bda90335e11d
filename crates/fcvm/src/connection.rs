//! Frames over a Unix socket: reading, and writing from a queue so that a slow peer holds up only
//! those who wait for it.

use std::cell::Cell;
use std::rc::Rc;

use anyhow::{Context as _, bail};
use fcvm_wire::frame::Frame;
use fcvm_wire::{Decoder, FrameKind, Hello, Mark, MarkScanner, PROTOCOL_VERSION, Role};
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::{Notify, mpsc};

/// Frames that may wait for the peer's socket.
const QUEUED_FRAMES: usize = 32;
/// Bytes read or written at once.
const BATCH_BYTES: usize = 256 * 1024;

/// Bytes read at once while a mark is looked for.
const SKIP_BYTES: usize = 16 * 1024;
/// Most bytes of its source's that a clone may send before it has seen the mark: far more than its
/// agent and the virtual hardware hold.
const SKIPPED_BYTES_MAX: usize = 16 << 20;

/// Reads frames.
pub(crate) struct FrameReader {
    socket: OwnedReadHalf,
    decoder: Decoder,
    buffer: Vec<u8>,
    gate: Gate,
}

impl FrameReader {
    /// Reads what a peer sends that is decoded by `decoder`.
    pub(crate) fn new(socket: OwnedReadHalf, decoder: Decoder) -> Self {
        Self::behind(Gate::default(), socket, decoder)
    }

    /// The same behind a gate.
    pub(crate) fn behind(gate: Gate, socket: OwnedReadHalf, decoder: Decoder) -> Self {
        Self {
            socket,
            decoder,
            buffer: Vec::new(),
            gate,
        }
    }

    /// The next frame; `None` at the end. Cancellation loses nothing.
    pub(crate) async fn next(&mut self) -> anyhow::Result<Option<Frame>> {
        loop {
            if let Some(frame) = self.decoder.next_frame()? {
                return Ok(Some(frame));
            }
            // The buffer lives only while there is something to read: an idle owner stays small.
            self.socket.readable().await?;
            self.gate.passed().await;
            self.buffer.reserve_exact(BATCH_BYTES);
            match self.socket.try_read_buf(&mut self.buffer) {
                Ok(0) if self.decoder.pending_bytes() > 0 => {
                    bail!("the connection ended in the middle of a frame")
                }
                Ok(0) => return Ok(None),
                Ok(_) => {
                    self.decoder.push(&self.buffer);
                    self.buffer = Vec::new();
                }
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
                    self.buffer = Vec::new()
                }
                Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => {
                    return Ok(None);
                }
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Passes over what comes before a mark.
    pub(crate) async fn skip_to(&mut self, mark: Mark) -> anyhow::Result<()> {
        let mut scanner = MarkScanner::new(mark);
        let mut passed_over = 0;
        let mut buffer = vec![0; SKIP_BYTES];
        while passed_over < SKIPPED_BYTES_MAX {
            self.socket.readable().await?;
            match self.socket.try_read(&mut buffer) {
                Ok(0) => bail!("the connection ended before the guest had woken up"),
                Ok(length) => {
                    if let Some(end) = scanner.scan(&buffer[..length]) {
                        self.decoder.push(&buffer[end..length]);
                        return Ok(());
                    }
                    passed_over += length;
                }
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error.into()),
            }
        }
        bail!("the guest sent {passed_over} bytes and not the mark of a new connection")
    }

    /// Reads the peer's hello and checks that both speak the same protocol.
    pub(crate) async fn hello(&mut self, expected: Role) -> anyhow::Result<Hello> {
        let Some(frame) = self.next().await? else {
            bail!("the connection ended before it began")
        };
        if frame.kind != FrameKind::Hello || frame.stream != 0 {
            bail!("the peer did not introduce itself");
        }
        let hello: Hello = frame.parse()?;
        if hello.protocol != PROTOCOL_VERSION || hello.role != expected {
            bail!(
                "the {} speaks version {} of the protocol ({}), and this fcvm version {PROTOCOL_VERSION}: use the fcvm that started the VM",
                match hello.role {
                    Role::Agent => "guest's agent",
                    Role::Owner => "VM's owner",
                    Role::Command => "command",
                },
                hello.protocol,
                crate::errors::printable(&hello.program)
            );
        }
        Ok(hello)
    }
}

/// The number of a new session.
pub(crate) fn new_session() -> anyhow::Result<u64> {
    Ok(u64::from_le_bytes(crate::state::random()?))
}

/// The hello of this program; an owner tells the agent the mark of a later connection.
pub(crate) fn hello(role: Role, session: u64, mark: Option<Mark>) -> Frame {
    let hello = Hello {
        protocol: PROTOCOL_VERSION,
        role,
        program: concat!("fcvm ", env!("CARGO_PKG_VERSION")).to_owned(),
        session,
        mark,
    };
    Frame::message(FrameKind::Hello, 0, &hello)
}

/// Starts the task that writes frames; the queue's senders feed it, and it ends with the last one
/// or with the peer.
pub(crate) fn spawn_writer(gate: Gate, socket: OwnedWriteHalf) -> mpsc::Sender<Frame> {
    let (_, none) = mpsc::channel(1);
    spawn_parking_writer(gate, socket, none)
}

/// As [`spawn_writer`]; after a `Park` frame it goes on with the next of `later`, and ends where there is
/// none.
pub(crate) fn spawn_parking_writer(
    gate: Gate,
    mut socket: OwnedWriteHalf,
    mut later: mpsc::Receiver<OwnedWriteHalf>,
) -> mpsc::Sender<Frame> {
    let (sender, mut queue) = mpsc::channel::<Frame>(QUEUED_FRAMES);
    tokio::task::spawn_local(async move {
        while let Some(frame) = queue.recv().await {
            let mut bytes = Vec::with_capacity(frame.payload.len() + fcvm_wire::HEADER_BYTES);
            let mut parks = frame.kind == FrameKind::Park;
            frame.encode(&mut bytes);
            while bytes.len() < BATCH_BYTES && !parks {
                let Ok(frame) = queue.try_recv() else { break };
                parks = frame.kind == FrameKind::Park;
                frame.encode(&mut bytes);
            }
            if let Err(error) = write_all(&gate, &socket, &bytes).await {
                tracing::debug!("a connection ended while it was written to: {error}");
                return;
            }
            if parks {
                match later.recv().await {
                    Some(next) => socket = next,
                    None => return,
                }
            }
        }
    });
    sender
}

async fn write_all(gate: &Gate, socket: &OwnedWriteHalf, mut bytes: &[u8]) -> std::io::Result<()> {
    while !bytes.is_empty() {
        socket.writable().await?;
        gate.passed().await;
        match socket.try_write(bytes) {
            Ok(written) => bytes = &bytes[written..],
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Holds up a connection's reads and writes. Everything of it is on one thread, so that what has
/// passed the gate has been done before the gate can close.
#[derive(Debug, Clone, Default)]
pub(crate) struct Gate(Rc<GateState>);

#[derive(Debug, Default)]
struct GateState {
    closed: Cell<bool>,
    opened: Notify,
}

impl Gate {
    async fn passed(&self) {
        while self.0.closed.get() {
            self.0.opened.notified().await;
        }
    }

    /// Closes the gate until the guard is dropped.
    pub(crate) fn close(&self) -> Held {
        self.0.closed.set(true);
        Held(self.clone())
    }
}

/// A closed gate.
#[derive(Debug)]
pub(crate) struct Held(Gate);

impl Drop for Held {
    fn drop(&mut self) {
        self.0.0.closed.set(false);
        self.0.0.opened.notify_waiters();
    }
}

/// Connects to a socket and splits it.
pub(crate) async fn connect(
    path: &std::path::Path,
) -> anyhow::Result<(OwnedReadHalf, OwnedWriteHalf)> {
    let socket = tokio::net::UnixStream::connect(path)
        .await
        .with_context(|| format!("cannot connect to {}", path.display()))?;
    Ok(socket.into_split())
}
