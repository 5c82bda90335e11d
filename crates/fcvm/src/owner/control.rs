//! The owner's control socket: other commands ask here for exec sessions, copies, stop, pause.
//!
//! Streams to the guest are passed through frame by frame with their numbers exchanged. Flow
//! control is the client's and the agent's: the owner holds no more of a stream than its window.

use std::collections::HashMap;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::rc::Rc;

use anyhow::{Context as _, bail};
use fcvm_wire::frame::Frame;
use fcvm_wire::{Decoder, Failure, FailureKind, FrameKind, Outcome, Request, Role, StreamId};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::mpsc;

use super::link::AgentStream;
use super::request::OwnerRequest;
use super::vm::RunningVm;
use crate::connection::{FrameReader, Gate, hello, new_session, spawn_writer};

/// Longest path of a Unix socket, `sun_path` of unix(7) less its final zero.
const MAX_SOCKET_PATH_BYTES: usize = 107;

/// Refuses a path that no socket can have.
pub(super) fn check_socket_path(path: &Path) -> anyhow::Result<()> {
    if path.as_os_str().len() > MAX_SOCKET_PATH_BYTES {
        bail!(
            "the path of the control socket is too long for the kernel ({}): choose a shorter --runtime-dir",
            path.display()
        );
    }
    Ok(())
}

/// Makes the socket; only this user can connect.
pub(super) fn bind(path: &Path) -> anyhow::Result<UnixListener> {
    check_socket_path(path)?;
    let listener = UnixListener::bind(path)
        .with_context(|| format!("cannot make the socket {}", path.display()))?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
    Ok(listener)
}

/// Serves clients until the VM ends.
pub(super) async fn serve(listener: UnixListener, vm: Rc<RunningVm>) {
    loop {
        match listener.accept().await {
            Ok((socket, _)) => {
                tokio::task::spawn_local(serve_client(socket, Rc::clone(&vm)));
            }
            Err(error) => {
                tracing::warn!(target: "vm", "the control socket fails: {error}");
                // Out of descriptors: until a client leaves there is nothing to accept with.
                tokio::time::sleep(std::time::Duration::from_millis(100)).await;
            }
        }
    }
}

async fn serve_client(socket: UnixStream, vm: Rc<RunningVm>) {
    if let Err(error) = Client::run(socket, vm).await {
        tracing::debug!(target: "vm", "a client left: {error:#}");
    }
}

/// A stream that is passed on to a client. Dropped while it runs, it is reset in the guest.
struct PassedOn {
    stream: Rc<AgentStream>,
    forwarding: tokio::task::AbortHandle,
}

impl Drop for PassedOn {
    fn drop(&mut self) {
        // The task holds the stream as well, and may wait for ever for a guest that says nothing.
        self.forwarding.abort();
    }
}

struct Client {
    vm: Rc<RunningVm>,
    outgoing: mpsc::Sender<Frame>,
    streams: HashMap<StreamId, PassedOn>,
    /// Streams whose forwarding has ended.
    ended: (
        mpsc::UnboundedSender<StreamId>,
        mpsc::UnboundedReceiver<StreamId>,
    ),
}

impl Client {
    async fn run(socket: UnixStream, vm: Rc<RunningVm>) -> anyhow::Result<()> {
        let peer = socket.peer_cred()?.uid();
        if peer != rustix::process::geteuid().as_raw() && peer != 0 {
            bail!("user {peer} is not allowed to connect");
        }
        let (read, write) = socket.into_split();
        let mut reader = FrameReader::new(read, Decoder::from_host());
        let outgoing = spawn_writer(Gate::default(), write);
        outgoing
            .send(hello(Role::Owner, new_session()?, None))
            .await?;
        reader.hello(Role::Command).await?;
        let mut client = Self {
            vm,
            outgoing,
            streams: HashMap::new(),
            ended: mpsc::unbounded_channel(),
        };
        loop {
            tokio::select! {
                frame = reader.next() => match frame? {
                    Some(frame) => client.take(frame).await?,
                    // Dropping the streams resets those that still run in the guest.
                    None => return Ok(()),
                },
                Some(id) = client.ended.1.recv() => { client.streams.remove(&id); }
            }
        }
    }

    async fn take(&mut self, frame: Frame) -> anyhow::Result<()> {
        let id = frame.stream;
        match frame.kind {
            FrameKind::Open if !self.streams.contains_key(&id) => {
                if let Err(error) = self.open(id, frame.parse()?).await {
                    let failure = Failure {
                        kind: FailureKind::BadRequest,
                        message: crate::errors::one_line(&error),
                    };
                    self.close(id, Outcome::Failed(failure)).await?;
                }
                Ok(())
            }
            FrameKind::Data
            | FrameKind::Eof
            | FrameKind::Credit
            | FrameKind::Control
            | FrameKind::Reset => {
                // A frame for a stream that has just ended is late, not wrong.
                match self.streams.get(&id) {
                    Some(passed_on) => passed_on.stream.send(frame).await,
                    None => Ok(()),
                }
            }
            kind => bail!("it sent a {kind:?} frame"),
        }
    }

    async fn close(&self, id: StreamId, outcome: Outcome) -> anyhow::Result<()> {
        Ok(self
            .outgoing
            .send(Frame::message(FrameKind::Closed, id, &outcome))
            .await?)
    }

    async fn open(&mut self, id: StreamId, request: OwnerRequest) -> anyhow::Result<()> {
        match request {
            OwnerRequest::Guest { request } => return self.pass_on(id, request).await,
            OwnerRequest::Stop { timeout_s } => self.vm.stop(timeout_s),
            OwnerRequest::Kill { signal } => self.vm.kill(signal).await?,
            OwnerRequest::Pause => self.vm.pause().await?,
            OwnerRequest::Unpause => self.vm.unpause().await?,
            OwnerRequest::Counters => {
                let counters = self.vm.machine.get().counters().await?;
                let counters = Outcome::Counters(counters.unwrap_or_default());
                return self.close(id, counters).await;
            }
        }
        self.close(id, Outcome::Done).await
    }

    async fn pass_on(&mut self, id: StreamId, request: Request) -> anyhow::Result<()> {
        if matches!(request, Request::Run { .. } | Request::PowerOff) {
            bail!("that request is the owner's own");
        }
        let stream = Rc::new(self.vm.open(&request).await?);
        let (outgoing, ended) = (self.outgoing.clone(), self.ended.0.clone());
        let forwarded = Rc::clone(&stream);
        let forwarding = tokio::task::spawn_local(async move {
            loop {
                let mut frame = forwarded.next().await.unwrap_or_else(|error| {
                    let failure = Failure {
                        kind: FailureKind::Guest,
                        message: error.to_string(),
                    };
                    Frame::message(FrameKind::Closed, id, &Outcome::Failed(failure))
                });
                frame.stream = id;
                let last = frame.kind == FrameKind::Closed;
                if outgoing.send(frame).await.is_err() || last {
                    break;
                }
            }
            // Fails when the client is gone, and the streams with it.
            let _ = ended.send(id);
        });
        let forwarding = forwarding.abort_handle();
        self.streams.insert(id, PassedOn { stream, forwarding });
        Ok(())
    }
}
