//! A process's side of serving: the socket, a thread for each clone, and what is told of them.

use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use fcvm_types::memory::PageServiceStatistics;
use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd};
use rustix::io::Errno;
use rustix::process::Signal;

use super::faults::{FaultLoop, Progress, SessionEnd, lock};
use super::handshake::{GuestLayout, HandshakeError, Received, receive};
use super::raw::{Userfault, peer_process};
use super::source::MemorySource;
use super::watch::{Notice, Question, Summary, encoded};
use super::working_set::{Recorder, WorkingSet};

/// How long a connection may take until its message is there.
const HANDSHAKE_LIMIT: Duration = Duration::from_secs(10);
/// How long the clones' threads may take to end. They wait for nothing that takes time.
const STOP_LIMIT: Duration = Duration::from_secs(5);
/// Connections that can wait to be watched or served at a time: more than VMs fit into a host.
const CONNECTIONS_MAX: usize = 1024;

/// What a server is to do.
#[derive(Debug, Clone)]
pub struct ServerOptions {
    /// What the memory is of, for those who look for a server.
    pub name: String,
    /// How long the pages of a clone are recorded, where there is no complete working set.
    pub record_window: Duration,
    /// End when the last clone has ended.
    pub ends_when_idle: bool,
    /// What was recorded of the snapshot before.
    pub working_set: Option<WorkingSet>,
}

impl Default for ServerOptions {
    fn default() -> Self {
        Self {
            name: String::new(),
            record_window: Duration::from_secs(10),
            ends_when_idle: false,
            working_set: None,
        }
    }
}

/// Why a server cannot be.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    /// Another one is there.
    #[error("another process serves at {0}: end it, or choose another socket")]
    Busy(PathBuf),
    /// The socket cannot be used.
    #[error("cannot listen at {path}: {source}")]
    Socket {
        /// Where.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The kernel gives no more of something.
    #[error("the memory server cannot go on: {0}")]
    Kernel(#[from] io::Error),
}

/// What happens in a server, for its log.
#[derive(Debug)]
#[non_exhaustive]
pub enum ServerEvent<'a> {
    /// What those who watch are told too.
    Notice(&'a Notice),
    /// A connection that was no clone's.
    Refused {
        /// Who.
        pid: i32,
        /// Why.
        reason: &'a str,
    },
    /// The pages of a clone were recorded: to be kept with the snapshot.
    Recorded(&'a WorkingSet),
}

/// What the threads tell the server.
enum Message {
    Notice(Notice),
    Refused(i32, String),
    Recorded(WorkingSet),
    Asked(UnixStream, Vec<u8>),
    Handed(UnixStream),
}

/// What all threads have.
struct Shared {
    source: Arc<MemorySource>,
    options: ServerOptions,
    working_set: Mutex<Option<Arc<WorkingSet>>>,
    /// Can be read once the server is to stop, and stays so.
    stop: OwnedFd,
    /// Can be read when a message has come.
    told: OwnedFd,
}

/// A clone, as the server sees it.
struct Session {
    pid: i32,
    statistics: Arc<Mutex<PageServiceStatistics>>,
    is_served: bool,
}

/// A server of one snapshot's memory.
pub struct Server {
    path: PathBuf,
    listener: UnixListener,
    shared: Arc<Shared>,
    sender: Sender<(u64, Message)>,
    messages: Receiver<(u64, Message)>,
    sessions: Vec<(u64, Session)>,
    next_session: u64,
    watchers: Vec<UnixStream>,
    /// Those that are not served any more.
    ended: PageServiceStatistics,
    ended_count: u64,
}

/// Tells a server to stop.
#[derive(Clone)]
pub struct Stopper(Arc<Shared>);

impl Stopper {
    /// From now on no clone is served: all are killed, and [`Server::run`] returns.
    pub fn stop(&self) {
        signal(&self.0.stop);
    }
}

impl Server {
    /// Listens at a path, which is reachable for this user alone. What a dead server has left there is
    /// replaced.
    ///
    /// # Errors
    ///
    /// Another one listens there, or the directory cannot be written to.
    pub fn bind(
        path: &Path,
        source: Arc<MemorySource>,
        options: ServerOptions,
    ) -> Result<Self, ServerError> {
        let failed = |source| ServerError::Socket {
            path: path.to_owned(),
            source,
        };
        if UnixStream::connect(path).is_ok() {
            return Err(ServerError::Busy(path.to_owned()));
        }
        let _ = std::fs::remove_file(path);
        let listener = UnixListener::bind(path).map_err(failed)?;
        let private = std::fs::Permissions::from_mode(0o600);
        std::fs::set_permissions(path, private).map_err(failed)?;
        listener.set_nonblocking(true).map_err(failed)?;
        let event = || eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK);
        let shared = Shared {
            working_set: Mutex::new(options.working_set.clone().map(Arc::new)),
            source,
            options,
            stop: event().map_err(io::Error::from)?,
            told: event().map_err(io::Error::from)?,
        };
        let (sender, messages) = channel();
        Ok(Self {
            path: path.to_owned(),
            listener,
            shared: Arc::new(shared),
            sender,
            messages,
            sessions: Vec::new(),
            next_session: 0,
            watchers: Vec::new(),
            ended: PageServiceStatistics::default(),
            ended_count: 0,
        })
    }

    /// What tells it to stop.
    pub fn stopper(&self) -> Stopper {
        Stopper(Arc::clone(&self.shared))
    }

    /// Serves until it is told to stop, or, if that is asked for, until the last clone has ended. Clones
    /// that are left are killed: they could not go on. `tell` is told what happens.
    ///
    /// # Errors
    ///
    /// No connection can be taken any more.
    pub fn run(mut self, mut tell: impl FnMut(ServerEvent<'_>)) -> Result<Summary, ServerError> {
        let served = self.serve(&mut tell);
        signal(&self.shared.stop);
        // Those that have sent their memory and were not taken yet wait for it too.
        let _ = std::fs::remove_file(&self.path);
        let served = served.and_then(|()| self.accept_all());
        let until = Instant::now() + STOP_LIMIT;
        self.hear(&mut tell);
        while !self.sessions.is_empty() {
            let rest = until.saturating_duration_since(Instant::now());
            let Ok((id, message)) = self.messages.recv_timeout(rest) else {
                break;
            };
            self.take(id, message, &mut tell);
        }
        served?;
        Ok(self.summary())
    }

    fn serve(&mut self, tell: &mut impl FnMut(ServerEvent<'_>)) -> Result<(), ServerError> {
        loop {
            let shared = Arc::clone(&self.shared);
            let mut polled = [
                PollFd::new(&self.listener, PollFlags::IN),
                PollFd::new(&shared.stop, PollFlags::IN),
                PollFd::new(&shared.told, PollFlags::IN),
            ];
            match rustix::event::poll(&mut polled, None) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(errno) => return Err(io::Error::from(errno).into()),
            }
            let [may_accept, is_stopped, has_messages] =
                polled.map(|one| !one.revents().is_empty());
            if is_stopped {
                return Ok(());
            }
            if has_messages {
                let _ = rustix::io::read(&shared.told, &mut [0; 8]);
                self.hear(tell);
            }
            let may_be_idle = self.shared.options.ends_when_idle && self.ended_count > 0;
            if may_accept || may_be_idle {
                self.accept_all()?;
            }
            if may_be_idle && self.sessions.is_empty() {
                return Ok(());
            }
        }
    }

    /// Takes the connections that wait.
    fn accept_all(&mut self) -> Result<(), ServerError> {
        loop {
            match self.listener.accept() {
                Ok((socket, _)) => self.start(socket)?,
                Err(error) => match Errno::from_io_error(&error) {
                    Some(Errno::AGAIN) => return Ok(()),
                    Some(Errno::INTR | Errno::CONNABORTED) => {}
                    _ => return Err(error.into()),
                },
            }
        }
    }

    /// Hears a connection of the server's own user.
    fn start(&mut self, socket: UnixStream) -> Result<(), ServerError> {
        let Ok(peer) = rustix::net::sockopt::socket_peercred(&socket) else {
            return Ok(());
        };
        let pid = peer.pid.as_raw_nonzero().get();
        if peer.uid != rustix::process::geteuid() {
            let told = format!("user {} may not connect", peer.uid.as_raw());
            self.tell_self(Message::Refused(pid, told));
            return Ok(());
        }
        self.listen_to(socket, pid, true)
    }

    /// Hears a connection in a thread of its own: its message may be long in coming.
    fn listen_to(
        &mut self,
        socket: UnixStream,
        pid: i32,
        may_ask: bool,
    ) -> Result<(), ServerError> {
        if self.sessions.len() >= CONNECTIONS_MAX {
            self.tell_self(Message::Refused(pid, "too many are connected".to_owned()));
            return Ok(());
        }
        let id = self.next_session;
        self.next_session += 1;
        let statistics = Arc::default();
        let client = Client {
            id,
            pid,
            may_ask,
            shared: Arc::clone(&self.shared),
            sender: self.sender.clone(),
            statistics: Arc::clone(&statistics),
        };
        // It says itself when it is done.
        std::thread::Builder::new()
            .name(format!("clone-{pid}"))
            .spawn(move || client.connected(socket))?;
        let session = Session {
            pid,
            statistics,
            is_served: false,
        };
        self.sessions.push((id, session));
        Ok(())
    }

    fn tell_self(&self, message: Message) {
        // The receiver is this server's own.
        let _ = self.sender.send((u64::MAX, message));
        signal(&self.shared.told);
    }

    /// Takes what the threads have told.
    fn hear(&mut self, tell: &mut impl FnMut(ServerEvent<'_>)) {
        while let Ok((id, message)) = self.messages.try_recv() {
            self.take(id, message, tell);
        }
    }

    fn take(&mut self, id: u64, message: Message, tell: &mut impl FnMut(ServerEvent<'_>)) {
        match message {
            Message::Notice(notice) => {
                self.note(id, &notice);
                tell(ServerEvent::Notice(&notice));
                let line = encoded(&notice);
                // One that does not read is not waited for.
                self.watchers
                    .retain_mut(|watcher| watcher.write_all(&line).is_ok());
            }
            Message::Refused(pid, reason) => {
                self.sessions.retain(|(other, _)| *other != id);
                let reason = &reason;
                tell(ServerEvent::Refused { pid, reason });
            }
            Message::Recorded(set) => {
                let kept = lock(&self.shared.working_set).clone();
                // Not that of a clone that ended early, where another one's is whole.
                if set.is_complete() || kept.is_none_or(|kept| !kept.is_complete()) {
                    tell(ServerEvent::Recorded(&set));
                    *lock(&self.shared.working_set) = Some(Arc::new(set));
                }
            }
            Message::Asked(socket, question) => {
                self.sessions.retain(|(other, _)| *other != id);
                self.answer(socket, &question);
            }
            Message::Handed(socket) => {
                self.sessions.retain(|(other, _)| *other != id);
                self.take_over(socket);
            }
        }
    }

    /// Hears a connection that its own user has handed over, whoever has made it.
    fn take_over(&mut self, socket: UnixStream) {
        let heard = match rustix::net::sockopt::socket_peercred(&socket) {
            Ok(peer) => self.listen_to(socket, peer.pid.as_raw_nonzero().get(), false),
            Err(errno) => Err(io::Error::from(errno).into()),
        };
        if let Err(error) = heard {
            let told = format!("what was handed over cannot be heard: {error}");
            self.tell_self(Message::Refused(0, told));
        }
    }

    fn note(&mut self, id: u64, notice: &Notice) {
        let session = self.sessions.iter_mut().find(|(other, _)| *other == id);
        match notice {
            Notice::Started { .. } => {
                if let Some((_, session)) = session {
                    session.is_served = true;
                }
            }
            Notice::Ended { statistics, .. } => {
                self.ended.merge(statistics);
                self.ended_count += 1;
                self.sessions.retain(|(other, _)| *other != id);
            }
            _ => {}
        }
    }

    fn answer(&mut self, mut socket: UnixStream, question: &[u8]) {
        let answered = match serde_json::from_slice(question) {
            Ok(Question::Watch) => socket.write_all(&encoded(&Notice::Watching)),
            Ok(Question::Statistics) => {
                let _ = socket.write_all(&encoded(&self.summary()));
                return;
            }
            // It is told by the end of the connection.
            Ok(Question::Serve) | Err(_) => return,
        };
        if answered.is_ok() && socket.set_nonblocking(true).is_ok() {
            self.watchers.retain(|watcher| !has_ended(watcher));
            if self.watchers.len() < CONNECTIONS_MAX {
                self.watchers.push(socket);
            }
        }
    }

    fn summary(&self) -> Summary {
        let served = self
            .sessions
            .iter()
            .filter(|(_, session)| session.is_served);
        Summary {
            name: self.shared.options.name.clone(),
            served: served
                .map(|(_, session)| (session.pid, lock(&session.statistics).clone()))
                .collect(),
            ended_count: self.ended_count,
            ended: self.ended.clone(),
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        signal(&self.shared.stop);
        let _ = std::fs::remove_file(&self.path);
    }
}

/// A connection in its thread.
struct Client {
    id: u64,
    pid: i32,
    may_ask: bool,
    shared: Arc<Shared>,
    sender: Sender<(u64, Message)>,
    statistics: Arc<Mutex<PageServiceStatistics>>,
}

impl Client {
    fn tell(&self, message: Message) {
        // A server that has ended hears nothing.
        let _ = self.sender.send((self.id, message));
        signal(&self.shared.told);
    }

    fn connected(self, socket: UnixStream) {
        let process = peer_process(&socket);
        let refused = |reason: String| self.tell(Message::Refused(self.pid, reason));
        let received = match self.wait_for_message(&socket) {
            Ok(received) => received,
            Err(error) => return refused(error.to_string()),
        };
        let (message, descriptor) = match received {
            Received::Question(question) if self.may_ask => {
                return self.tell(Message::Asked(socket, question));
            }
            Received::Handed(question, descriptor) if self.may_ask => {
                return match serde_json::from_slice(&question) {
                    Ok(Question::Serve) => self.tell(Message::Handed(descriptor.into())),
                    _ => refused("what it hands over is not what is asked for".to_owned()),
                };
            }
            Received::Question(_) | Received::Handed(..) => {
                return refused("what is handed over may not ask".to_owned());
            }
            Received::Hypervisor(message, descriptor) => (message, descriptor),
        };
        drop(socket);
        // Looked up last, its end is no wonder.
        let process = match process {
            Ok(process) => process,
            Err(error) => return refused(format!("its process cannot be watched: {error}")),
        };
        let set = lock(&self.shared.working_set).clone();
        self.tell(Message::Notice(Notice::Started {
            pid: self.pid,
            ahead_pages: set.as_ref().map_or(0, |set| set.page_count()),
        }));
        let serving = AssertUnwindSafe(|| self.serve(&message, descriptor, process.as_fd(), set));
        let end = catch_unwind(serving)
            .unwrap_or_else(|_| SessionEnd::Failed("a fault of the server itself".to_owned()));
        if end != SessionEnd::Exited {
            // It would wait for its pages for ever.
            let _ = rustix::process::pidfd_send_signal(&process, Signal::KILL);
        }
        let statistics = Box::new(lock(&self.statistics).clone());
        self.tell(Message::Notice(Notice::Ended {
            pid: self.pid,
            reason: end.to_string(),
            is_failure: matches!(end, SessionEnd::Failed(_) | SessionEnd::Refused(_)),
            statistics,
        }));
    }

    fn wait_for_message(&self, socket: &UnixStream) -> Result<Received, HandshakeError> {
        let limit = rustix::event::Timespec::try_from(HANDSHAKE_LIMIT).ok();
        let mut polled = [
            PollFd::new(socket, PollFlags::IN),
            PollFd::new(&self.shared.stop, PollFlags::IN),
        ];
        rustix::event::poll(&mut polled, limit.as_ref()).map_err(io::Error::from)?;
        if polled[0].revents().is_empty() {
            return Err(io::Error::from(io::ErrorKind::TimedOut).into());
        }
        receive(socket)
    }

    fn serve(
        &self,
        message: &[u8],
        descriptor: OwnedFd,
        process: BorrowedFd<'_>,
        set: Option<Arc<WorkingSet>>,
    ) -> SessionEnd {
        let shared = &*self.shared;
        let memory_bytes = shared.source.memory_bytes();
        let understood = GuestLayout::parse(message, memory_bytes).and_then(|layout| {
            let userfault = Userfault::adopt(descriptor).map_err(HandshakeError::Descriptor)?;
            Ok((layout, userfault))
        });
        let (layout, userfault) = match understood {
            Ok(understood) => understood,
            Err(error) => return SessionEnd::Refused(error.to_string()),
        };
        let mut faults = FaultLoop::new(userfault, layout, &shared.source, &self.statistics);
        if let Some(set) = &set {
            faults.prefetch(set);
        }
        if set.as_ref().is_none_or(|set| !set.is_complete()) {
            let until = Instant::now() + shared.options.record_window;
            let pages = shared.source.page_count();
            faults.record(Recorder::new(pages, set.as_deref(), until));
        }
        faults.run(process, shared.stop.as_fd(), |progress| match progress {
            Progress::Prefetched(pages) => {
                let pid = self.pid;
                self.tell(Message::Notice(Notice::Prefetched { pid, pages }));
            }
            Progress::Recorded(set) => self.tell(Message::Recorded(set)),
        })
    }
}

/// Makes an eventfd readable.
fn signal(event: &OwnedFd) {
    // Where it cannot count further it is readable already.
    let _ = rustix::io::write(event, &1_u64.to_ne_bytes());
}

/// Whether the other end was closed.
fn has_ended(socket: &UnixStream) -> bool {
    let mut polled = [PollFd::new(socket, PollFlags::RDHUP)];
    let now = rustix::event::Timespec::default();
    rustix::event::poll(&mut polled, Some(&now)).is_ok() && !polled[0].revents().is_empty()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::PageRun;
    use crate::page_file::{anonymous_file, seal};

    fn server(directory: &Path) -> Server {
        let file = anonymous_file("fcvm-test", crate::PAGE_BYTES).unwrap();
        seal(&file).unwrap();
        let source = Arc::new(MemorySource::new(&file).unwrap());
        Server::bind(&directory.join("socket"), source, ServerOptions::default()).unwrap()
    }

    #[test]
    fn what_was_recorded_whole_is_not_given_up_for_a_part() {
        let directory = tempfile::tempdir().unwrap();
        let mut server = server(directory.path());
        let set = |is_complete| {
            let mut recorder = Recorder::new(1, None, Instant::now());
            recorder.note(PageRun { first: 0, count: 1 });
            recorder.finish(is_complete).unwrap()
        };
        let mut told = Vec::new();
        for is_complete in [false, true, false, true] {
            server.take(0, Message::Recorded(set(is_complete)), &mut |event| {
                if let ServerEvent::Recorded(set) = event {
                    told.push(set.is_complete());
                }
            });
        }
        assert_eq!(told, [false, true, true]);
        assert_eq!(
            lock(&server.shared.working_set).as_deref(),
            Some(&set(true))
        );
    }
}
