//! Frames over a Unix socket: reading, and writing from a queue so that a slow peer holds up only
//! those who wait for it.

use anyhow::{Context as _, bail};
use fcvm_wire::frame::Frame;
use fcvm_wire::{Decoder, FrameKind, Hello, PROTOCOL_VERSION, Role};
use tokio::io::AsyncWriteExt;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::mpsc;

/// Frames that may wait for the peer's socket.
const QUEUED_FRAMES: usize = 32;
/// Bytes read or written at once.
const BATCH_BYTES: usize = 256 * 1024;

/// Reads frames.
pub(crate) struct FrameReader {
    socket: OwnedReadHalf,
    decoder: Decoder,
    buffer: Vec<u8>,
}

impl FrameReader {
    /// Reads what a peer sends that is decoded by `decoder`.
    pub(crate) fn new(socket: OwnedReadHalf, decoder: Decoder) -> Self {
        Self {
            socket,
            decoder,
            buffer: Vec::new(),
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

/// The hello of this program.
pub(crate) fn hello(role: Role) -> anyhow::Result<Frame> {
    let hello = Hello {
        protocol: PROTOCOL_VERSION,
        role,
        program: concat!("fcvm ", env!("CARGO_PKG_VERSION")).to_owned(),
        session: u64::from_le_bytes(crate::state::random()?),
    };
    Ok(Frame::message(FrameKind::Hello, 0, &hello))
}

/// Starts the task that writes frames; the queue's senders feed it, and it ends with the last one
/// or with the peer.
pub(crate) fn spawn_writer(mut socket: OwnedWriteHalf) -> mpsc::Sender<Frame> {
    let (sender, mut queue) = mpsc::channel::<Frame>(QUEUED_FRAMES);
    tokio::task::spawn_local(async move {
        while let Some(frame) = queue.recv().await {
            let mut bytes = Vec::with_capacity(frame.payload.len() + fcvm_wire::HEADER_BYTES);
            frame.encode(&mut bytes);
            while bytes.len() < BATCH_BYTES {
                let Ok(frame) = queue.try_recv() else { break };
                frame.encode(&mut bytes);
            }
            if let Err(error) = socket.write_all(&bytes).await {
                tracing::debug!("a connection ended while it was written to: {error}");
                return;
            }
        }
    });
    sender
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
