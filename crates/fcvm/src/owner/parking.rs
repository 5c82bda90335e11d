//! The agent's channel around a save of its guest, where it does not outlive that: parked before, connected
//! anew afterwards.
//!
//! Under Firecracker the agent connects over vsock, and such connections end with a snapshot. So both sides
//! say all that they have to say and a last word, `Park`; what is written from then on waits. When the guest
//! goes on the agent connects again. Every process of the guest can connect there: the agent is the one that
//! shows the mark.

use std::cell::Cell;
use std::collections::VecDeque;
use std::time::Duration;

use anyhow::{Context as _, bail};
use fcvm_wire::{Decoder, Frame, FrameKind, MARK_BYTES, Mark, Role};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::unix::OwnedWriteHalf;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{Notify, mpsc};
use tokio::task::{AbortHandle, JoinSet};

use super::link::AgentLink;
use crate::connection::{FrameReader, hello};

/// How long the agent may take to be silent: it waits up to a second for the container to stand still.
const PARK_LIMIT: Duration = Duration::from_secs(10);
/// How long it may take to connect again.
const RETURN_LIMIT: Duration = Duration::from_secs(30);
/// Connections that have not shown a mark yet, of which the oldest gives way.
const STRANGERS_MAX: usize = 32;

/// Readers of later connections.
pub(super) type Successors = mpsc::Receiver<FrameReader>;

/// What of a link is there for parking.
pub(super) struct Parking {
    /// Where the agent connects; a port has none.
    listener: Option<UnixListener>,
    state: Cell<State>,
    changed: Notify,
    readers: mpsc::Sender<FrameReader>,
    writers: mpsc::Sender<OwnedWriteHalf>,
    /// How long the agent may take to be silent, and to connect again.
    limits: Cell<(Duration, Duration)>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// The connection is in use.
    Connected,
    /// The agent was told to park.
    Asked,
    /// Both sides are silent.
    Parked,
    /// The connection has ended for good.
    Ended,
}

impl Parking {
    /// Also where writer and reader get their later connections.
    pub(super) fn new(
        listener: Option<UnixListener>,
    ) -> (Self, mpsc::Receiver<OwnedWriteHalf>, Successors) {
        let (readers, successors) = mpsc::channel(1);
        let (writers, later) = mpsc::channel(1);
        let parking = Self {
            listener,
            state: Cell::new(State::Connected),
            changed: Notify::new(),
            readers,
            writers,
            limits: Cell::new((PARK_LIMIT, RETURN_LIMIT)),
        };
        (parking, later, successors)
    }

    /// The agent has parked; `false` where it was not asked to.
    pub(super) fn answer(&self) -> bool {
        let was_asked = self.state.get() == State::Asked;
        if was_asked {
            self.set(State::Parked);
        }
        was_asked
    }

    /// There is nothing to wait for any more.
    pub(super) fn abandon(&self) {
        self.set(State::Ended);
    }

    fn set(&self, state: State) {
        self.state.set(state);
        self.changed.notify_waiters();
    }

    async fn answered(&self) {
        loop {
            let changed = self.changed.notified();
            if self.state.get() != State::Asked {
                return;
            }
            changed.await;
        }
    }
}

impl AgentLink {
    /// Lets both sides fall silent, the container included. [`come_back`](Self::come_back) has to follow.
    pub(super) async fn park(&self) -> anyhow::Result<()> {
        let parking = &self.0.parking;
        self.check()?;
        if parking.state.get() != State::Connected {
            bail!("the guest's agent has not come back from an earlier fork: try again");
        }
        parking.state.set(State::Asked);
        let ask = async {
            let park = Frame::new(FrameKind::Park, 0, Vec::new());
            if self.0.outgoing.send(park).await.is_ok() {
                parking.answered().await;
            }
        };
        let (limit, _) = parking.limits.get();
        if tokio::time::timeout(limit, ask).await.is_err() {
            let link = self.clone();
            tokio::task::spawn_local(async move { link.come_back_late().await });
            bail!(
                "the guest's agent did not stop the container within {} s: the guest is overloaded, or hangs",
                limit.as_secs()
            );
        }
        self.check()
    }

    /// An answer that comes late is one all the same, and the agent waits for its connection's end.
    async fn come_back_late(&self) {
        self.0.parking.answered().await;
        if self.0.parking.state.get() == State::Parked {
            self.hang_up();
            if let Err(error) = self.come_back().await {
                tracing::warn!(target: "agent", "{error:#}");
            }
        }
    }

    /// Ends the present connection, which nothing else has ended.
    pub(super) fn hang_up(&self) {
        let both = rustix::net::Shutdown::Both;
        // Of one that has ended nothing is left to end.
        let _ = rustix::net::shutdown(&*self.0.socket.borrow(), both);
    }

    /// Waits until the agent has connected again, and goes on: all streams are what they were.
    pub(super) async fn come_back(&self) -> anyhow::Result<()> {
        let parking = &self.0.parking;
        let listener = parking.listener.as_ref();
        let listener = listener.context("the agent cannot connect on this channel")?;
        let returned = async {
            loop {
                let socket = accept(listener, self.0.mark).await?;
                match self.go_on_with(socket).await {
                    Ok(()) => return Ok::<_, anyhow::Error>(()),
                    // The agent tries again.
                    Err(error) => tracing::debug!(target: "agent", "{error:#}"),
                }
            }
        };
        let (_, limit) = parking.limits.get();
        let returned = tokio::time::timeout(limit, returned).await;
        returned.with_context(|| {
            let limit = limit.as_secs();
            format!("the guest's agent did not come back within {limit} s")
        })??;
        parking.set(State::Connected);
        Ok(())
    }

    async fn go_on_with(&self, socket: UnixStream) -> anyhow::Result<()> {
        use std::os::fd::AsFd;
        let copy = socket.as_fd().try_clone_to_owned()?;
        let (read, mut write) = socket.into_split();
        let decoder = Decoder::from_guest();
        let mut reader = FrameReader::behind(self.0.gate.clone(), read, decoder);
        reader.hello(Role::Agent).await?;
        let mut bytes = Vec::new();
        hello(Role::Owner, self.0.session, Some(self.0.mark)).encode(&mut bytes);
        write.write_all(&bytes).await?;
        *self.0.socket.borrow_mut() = copy;
        let ended = "the agent's channel closed";
        self.0
            .parking
            .readers
            .send(reader)
            .await
            .ok()
            .context(ended)?;
        self.0.parking.writers.send(write).await.ok().context(ended)
    }
}

/// The first connection that begins with the mark. Others are those of the guest's other processes: they
/// are not listened to.
pub(super) async fn accept(listener: &UnixListener, mark: Mark) -> anyhow::Result<UnixStream> {
    let mut strangers = JoinSet::new();
    let mut order: VecDeque<AbortHandle> = VecDeque::new();
    loop {
        tokio::select! {
            accepted = listener.accept() => {
                let (mut socket, _) = accepted.context("the agent's channel fails")?;
                if order.len() >= STRANGERS_MAX
                    && let Some(oldest) = order.pop_front()
                {
                    oldest.abort();
                }
                order.push_back(strangers.spawn_local(async move {
                    let mut shown = [0; MARK_BYTES];
                    let read = socket.read_exact(&mut shown).await;
                    (read.is_ok() && &shown == mark.as_bytes()).then_some(socket)
                }));
            }
            Some(ended) = strangers.join_next() => {
                if let Ok(Some(socket)) = ended {
                    return Ok(socket);
                }
                order.retain(|stranger| !stranger.is_finished());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use fcvm_wire::{Channel, Hello, Outcome, PROTOCOL_VERSION, Request};
    use tokio::task::LocalSet;

    use super::*;

    /// The guest's side of a connection.
    struct Agent {
        socket: UnixStream,
        decoder: Decoder,
        /// What the owner said last of itself.
        owner: Option<Hello>,
    }

    impl Agent {
        async fn connect(path: &Path, mark: Option<Mark>) -> Self {
            let mut socket = UnixStream::connect(path).await.unwrap();
            if let Some(mark) = mark {
                socket.write_all(mark.as_bytes()).await.unwrap();
            }
            let mut agent = Self {
                socket,
                decoder: Decoder::from_host(),
                owner: None,
            };
            let hello = Hello {
                protocol: PROTOCOL_VERSION,
                role: Role::Agent,
                program: String::new(),
                session: 7,
                mark: None,
            };
            agent
                .say(&Frame::message(FrameKind::Hello, 0, &hello))
                .await;
            agent
        }

        async fn say(&mut self, frame: &Frame) {
            let mut bytes = Vec::new();
            frame.encode(&mut bytes);
            self.socket.write_all(&bytes).await.unwrap();
        }

        /// The next frame; nothing at the end.
        async fn hear(&mut self) -> Option<Frame> {
            loop {
                if let Some(frame) = self.decoder.next_frame().unwrap() {
                    return Some(frame);
                }
                let mut buffer = [0; 4096];
                match self.socket.read(&mut buffer).await.unwrap() {
                    0 => return None,
                    length => self.decoder.push(&buffer[..length]),
                }
            }
        }

        async fn greeted(mut self) -> Self {
            let frame = self.hear().await.unwrap();
            self.owner = Some(frame.parse().unwrap());
            self
        }
    }

    /// A link, its agent, and where that connects.
    async fn linked(directory: &Path) -> (AgentLink, Agent) {
        let path = directory.join("agent");
        let listener = UnixListener::bind(&path).unwrap();
        let (agent, accepted) = tokio::join!(Agent::connect(&path, None), listener.accept());
        let socket = accepted.unwrap().0;
        let (link, agent) = tokio::join!(
            AgentLink::establish(socket, Some(listener)),
            agent.greeted()
        );
        (link.unwrap(), agent)
    }

    #[tokio::test]
    async fn streams_go_on_over_the_connection_that_shows_the_mark() {
        let test = async {
            let directory = tempfile::tempdir().unwrap();
            let (link, mut agent) = linked(directory.path()).await;
            let mark = agent.owner.as_ref().unwrap().mark.unwrap();
            assert!(mark == link.mark());
            let stream = link.open(&Request::Processes).await.unwrap();
            let id = agent.hear().await.unwrap().stream;
            let parked = tokio::task::spawn_local({
                let link = link.clone();
                async move { link.park().await }
            });
            assert_eq!(agent.hear().await.unwrap().kind, FrameKind::Park);
            agent
                .say(&Frame::data(id, Channel::Stdout, b"before".to_vec()))
                .await;
            agent.say(&Frame::new(FrameKind::Park, 0, Vec::new())).await;
            parked.await.unwrap().unwrap();
            assert_eq!(stream.next().await.unwrap().payload, b"before");
            // What is said now waits for the next connection.
            stream
                .send(Frame::credit(id, Channel::Stdout, 6))
                .await
                .unwrap();
            assert!(link.park().await.is_err());

            let path = directory.path().join("agent");
            // Those of other processes: silent ones, more than are listened to, and one that guesses.
            let mut strangers = Vec::new();
            for _ in 0..=STRANGERS_MAX {
                strangers.push(UnixStream::connect(&path).await.unwrap());
            }
            strangers.push(Agent::connect(&path, Some(mark.answer())).await.socket);
            let (back, agent) = tokio::join!(link.come_back(), async {
                Agent::connect(&path, Some(mark)).await.greeted().await
            });
            back.unwrap();
            let mut agent = agent;
            let owner = agent.owner.clone().unwrap();
            assert!(owner.session == link.0.session && owner.mark == Some(mark));
            let waited = agent.hear().await.unwrap();
            assert_eq!((waited.kind, waited.stream), (FrameKind::Credit, id));
            agent
                .say(&Frame::message(FrameKind::Closed, id, &Outcome::Done))
                .await;
            assert_eq!(stream.next().await.unwrap().kind, FrameKind::Closed);
        };
        LocalSet::new().run_until(test).await;
    }

    #[tokio::test]
    async fn an_agent_that_parks_unasked_loses_its_connection() {
        let test = async {
            let directory = tempfile::tempdir().unwrap();
            let (link, mut agent) = linked(directory.path()).await;
            let stream = link.open(&Request::Processes).await.unwrap();
            agent.say(&Frame::new(FrameKind::Park, 0, Vec::new())).await;
            let error = stream.next().await.unwrap_err();
            assert!(error.to_string().contains("parked unasked"), "{error}");
            assert!(link.park().await.is_err());
        };
        LocalSet::new().run_until(test).await;
    }

    #[tokio::test]
    async fn an_agent_that_parks_late_is_taken_back() {
        let test = async {
            let directory = tempfile::tempdir().unwrap();
            let (link, mut agent) = linked(directory.path()).await;
            let mark = link.mark();
            link.0.parking.limits.set((Duration::ZERO, RETURN_LIMIT));
            let error = link.park().await.unwrap_err();
            assert!(error.to_string().contains("did not stop"), "{error}");
            assert_eq!(agent.hear().await.unwrap().kind, FrameKind::Park);
            agent.say(&Frame::new(FrameKind::Park, 0, Vec::new())).await;
            // The owner ends this one.
            assert!(agent.hear().await.is_none());
            let path = directory.path().join("agent");
            let mut agent = Agent::connect(&path, Some(mark)).await.greeted().await;
            let stream = link.open(&Request::Processes).await.unwrap();
            let id = agent.hear().await.unwrap().stream;
            agent
                .say(&Frame::message(FrameKind::Closed, id, &Outcome::Done))
                .await;
            assert_eq!(stream.next().await.unwrap().kind, FrameKind::Closed);
        };
        LocalSet::new().run_until(test).await;
    }

    #[tokio::test]
    async fn an_agent_that_does_not_come_back_is_not_waited_for_without_end() {
        let test = async {
            let directory = tempfile::tempdir().unwrap();
            let (link, mut agent) = linked(directory.path()).await;
            let (parked, ()) = tokio::join!(link.park(), async {
                assert_eq!(agent.hear().await.unwrap().kind, FrameKind::Park);
                agent.say(&Frame::new(FrameKind::Park, 0, Vec::new())).await;
            });
            parked.unwrap();
            link.0.parking.limits.set((PARK_LIMIT, Duration::ZERO));
            let error = link.come_back().await.unwrap_err();
            assert!(error.to_string().contains("did not come back"), "{error}");
        };
        LocalSet::new().run_until(test).await;
    }
}
