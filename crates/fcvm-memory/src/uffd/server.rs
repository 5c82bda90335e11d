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
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd};
use rustix::io::Errno;
use rustix::process::Signal;

use super::faults::{FaultLoop, PROGRESS_PERIOD, Progress, SessionEnd, lock};
use super::handshake::{GuestLayout, HandshakeError, Received, receive};
use super::raw::{Userfault, peer_process};
use super::source::MemorySource;
use super::watch::{Notice, Question, Summary, encoded};
use super::watchers::Watchers;
use super::working_set::{Recorder, WorkingSet};

/// How long a connection may take until its message is there.
const HANDSHAKE_LIMIT: Duration = Duration::from_secs(10);
/// How long the clones' threads may take to end. They wait for nothing that takes time.
const STOP_LIMIT: Duration = Duration::from_secs(5);
/// How long one who has asked may take to read the answer.
const ANSWER_LIMIT: Duration = Duration::from_secs(1);
/// How long no connection is taken where there is no room for one, unless one ends before.
const PAUSE: Duration = Duration::from_millis(100);
/// Connections that can wait to be watched or served at a time: more than VMs fit into a host.
const CONNECTIONS_MAX: usize = 1024;

/// What a server is to do.
#[derive(Debug, Clone)]
pub struct ServerOptions {
    /// What the memory is of, for those who look for a server.
    pub name: String,
    /// How long the pages of a clone are recorded, where there is no complete working set.
    pub record_window: Duration,
    /// How often those who watch are told how much of what was recorded has come.
    pub progress_period: Duration,
    /// End when neither a clone nor one who watches is there any more, or when none has come for so long.
    pub idle_limit: Option<Duration>,
    /// What was recorded of the snapshot before.
    pub working_set: Option<WorkingSet>,
}

impl Default for ServerOptions {
    fn default() -> Self {
        Self {
            name: String::new(),
            record_window: Duration::from_secs(10),
            progress_period: PROGRESS_PERIOD,
            idle_limit: None,
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
    /// The pages of a clone were recorded: to be kept with the snapshot.
    Recorded(&'a WorkingSet),
}

/// What the threads tell the server.
enum Message {
    Notice(Notice),
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
    watchers: Watchers,
    /// A descriptor to give up where there are no more, so that a connection can be refused.
    spare: Option<OwnedFd>,
    /// No connection is taken before.
    paused_until: Option<Instant>,
    started: Instant,
    /// A clone or one who watches has been there.
    was_used: bool,
    is_stopping: bool,
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
            watchers: Watchers::default(),
            spare: None,
            paused_until: None,
            started: Instant::now(),
            was_used: false,
            is_stopping: false,
            ended: PageServiceStatistics::default(),
            ended_count: 0,
        })
    }

    /// What tells it to stop.
    pub fn stopper(&self) -> Stopper {
        Stopper(Arc::clone(&self.shared))
    }

    /// Serves until it is told to stop, or, if that is asked for, until nobody is there any more. Clones
    /// that are left are killed: they could not go on. `tell` is told what happens.
    ///
    /// # Errors
    ///
    /// The socket fails. Where the process has no room for another connection, that one is refused.
    pub fn run(mut self, mut tell: impl FnMut(ServerEvent<'_>)) -> Result<Summary, ServerError> {
        let served = self.serve(&mut tell);
        signal(&self.shared.stop);
        self.is_stopping = true;
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
            let [is_stopped, has_messages, may_accept, has_left] = self.wait()?;
            if is_stopped {
                return Ok(());
            }
            if has_messages {
                let _ = rustix::io::read(&self.shared.told, &mut [0; 8]);
                // What has ended leaves room.
                self.paused_until = None;
                self.hear(tell);
            }
            if has_left {
                self.watchers.sweep();
            }
            if may_accept || self.is_idle() {
                self.accept_all()?;
            }
            if self.is_idle() {
                return Ok(());
            }
        }
    }

    /// Waits for something to do; says what: to stop, to hear messages, to take connections, to look for watchers
    /// that have left.
    fn wait(&mut self) -> Result<[bool; 4], ServerError> {
        let now = Instant::now();
        self.paused_until.take_if(|until| *until <= now);
        let idle_at = self.shared.options.idle_limit;
        // Others that are there tell when they leave.
        let idle_at = idle_at.filter(|_| !self.was_used && self.sessions.is_empty());
        let until = [
            self.paused_until,
            idle_at.and_then(|limit| self.started.checked_add(limit)),
        ];
        let limit = until.into_iter().flatten().min();
        let limit = limit.map(|until| until.saturating_duration_since(now));
        let limit = limit.and_then(|limit| Timespec::try_from(limit).ok());
        let accepted = match self.paused_until {
            Some(_) => PollFlags::empty(),
            None => PollFlags::IN,
        };
        let mut polled = vec![
            PollFd::new(&self.shared.stop, PollFlags::IN),
            PollFd::new(&self.shared.told, PollFlags::IN),
            PollFd::new(&self.listener, accepted),
        ];
        polled.extend(self.watchers.polled());
        match rustix::event::poll(&mut polled, limit.as_ref()) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(errno) => return Err(io::Error::from(errno).into()),
        }
        let is_ready = |one: &PollFd<'_>| !one.revents().is_empty();
        let (own, watchers) = polled.split_at(3);
        let [stop, told, listener] = [0, 1, 2].map(|index| is_ready(&own[index]));
        Ok([stop, told, listener, watchers.iter().any(is_ready)])
    }

    /// Whether it is to end, as nobody is there any more or nobody has come.
    fn is_idle(&self) -> bool {
        let Some(limit) = self.shared.options.idle_limit else {
            return false;
        };
        let is_over = self.was_used || self.started.elapsed() >= limit;
        is_over && self.sessions.is_empty() && self.watchers.is_empty()
    }

    /// Takes the connections that wait.
    fn accept_all(&mut self) -> Result<(), ServerError> {
        loop {
            if self.spare.is_none() {
                self.spare = rustix::io::fcntl_dupfd_cloexec(&self.shared.stop, 0).ok();
            }
            let error = match self.listener.accept() {
                Ok((socket, _)) => {
                    self.start(socket);
                    continue;
                }
                Err(error) => error,
            };
            match Errno::from_io_error(&error) {
                Some(Errno::AGAIN) => return Ok(()),
                Some(Errno::INTR | Errno::CONNABORTED) => {}
                Some(Errno::MFILE | Errno::NFILE | Errno::NOMEM | Errno::NOBUFS) => {
                    if !self.refuse_next(&error) {
                        self.paused_until = Some(Instant::now() + PAUSE);
                        return Ok(());
                    }
                }
                _ => return Err(error.into()),
            }
        }
    }

    /// Refuses the next connection, where none can be taken; says whether that was possible.
    fn refuse_next(&mut self, error: &io::Error) -> bool {
        self.spare = None;
        let Ok((socket, _)) = self.listener.accept() else {
            return false;
        };
        if let Ok(peer) = rustix::net::sockopt::socket_peercred(&socket) {
            let told = format!("the memory server has no room for another: {error}");
            self.refuse(&socket, peer.pid.as_raw_nonzero().get(), told);
        }
        true
    }

    /// Hears a connection of the server's own user.
    fn start(&mut self, socket: UnixStream) {
        let Ok(peer) = rustix::net::sockopt::socket_peercred(&socket) else {
            return;
        };
        let pid = peer.pid.as_raw_nonzero().get();
        if peer.uid == rustix::process::geteuid() {
            self.listen_to(socket, pid, true);
        } else {
            let told = format!("user {} may not connect", peer.uid.as_raw());
            self.refuse(&socket, pid, told);
        }
    }

    /// Hears a connection in a thread of its own: its message may be long in coming.
    fn listen_to(&mut self, socket: UnixStream, pid: i32, may_ask: bool) {
        if self.sessions.len() >= CONNECTIONS_MAX {
            return self.refuse(&socket, pid, "too many are connected".to_owned());
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
        // The thread gets it when there is one.
        let (give, take) = channel();
        let spawned = std::thread::Builder::new()
            .name(format!("clone-{pid}"))
            .spawn(move || {
                if let Ok(socket) = take.recv() {
                    client.connected(socket);
                }
            });
        if let Err(error) = spawned {
            let told = format!("the memory server has no room for another: {error}");
            return self.refuse(&socket, pid, told);
        }
        let session = Session {
            pid,
            statistics,
            is_served: false,
        };
        // It says itself when it is done.
        self.sessions.push((id, session));
        let _ = give.send(socket);
    }

    /// Tells one who is not heard, and those who watch it.
    fn refuse(&self, socket: &UnixStream, pid: i32, reason: String) {
        let notice = Notice::Refused { pid, reason };
        answer_refused(socket, &notice);
        self.tell_self(Message::Notice(notice));
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
                self.watchers.tell(&notice);
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
        match rustix::net::sockopt::socket_peercred(&socket) {
            Ok(peer) => self.listen_to(socket, peer.pid.as_raw_nonzero().get(), false),
            Err(errno) => {
                let told = format!("what was handed over cannot be heard: {errno}");
                self.refuse(&socket, 0, told);
            }
        }
    }

    fn note(&mut self, id: u64, notice: &Notice) {
        let session = self.sessions.iter_mut().find(|(other, _)| *other == id);
        match notice {
            Notice::Started { .. } => {
                self.was_used = true;
                if let Some((_, session)) = session {
                    session.is_served = true;
                }
            }
            Notice::Ended { statistics, .. } => {
                self.ended.merge(statistics);
                self.ended_count += 1;
                self.sessions.retain(|(other, _)| *other != id);
            }
            Notice::Refused { .. } => self.sessions.retain(|(other, _)| *other != id),
            _ => {}
        }
    }

    fn answer(&mut self, mut socket: UnixStream, question: &[u8]) {
        match serde_json::from_slice(question) {
            // One that ends has nothing to tell.
            _ if self.is_stopping => {}
            Ok(Question::Watch { .. }) if self.watchers.count() >= CONNECTIONS_MAX => {
                let reason = "too many watch it".to_owned();
                answer_refused(&socket, &Notice::Refused { pid: 0, reason });
            }
            Ok(Question::Watch { pid }) => {
                self.was_used = true;
                self.watchers.add(socket, pid);
            }
            Ok(Question::Statistics) => {
                let answer = encoded(&self.summary());
                // One that does not read is not waited for.
                let _ = socket
                    .set_write_timeout(Some(ANSWER_LIMIT))
                    .and_then(|()| socket.write_all(&answer));
            }
            // It is told by the end of the connection.
            Ok(Question::Serve) | Err(_) => {}
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
        match self.hear(&socket) {
            Ok((Received::Question(question), _)) => self.tell(Message::Asked(socket, question)),
            Ok((Received::Handed(_, handed), _)) => self.tell(Message::Handed(handed.into())),
            Ok((Received::Hypervisor(message), process)) => {
                drop(socket);
                self.serve_process(message, &process);
            }
            Err(reason) => {
                let pid = self.pid;
                let notice = Notice::Refused { pid, reason };
                answer_refused(&socket, &notice);
                // What it took is free when that is told.
                drop(socket);
                self.tell(Message::Notice(notice));
            }
        }
    }

    /// What one has to say who may, and its process; or why it is not heard.
    fn hear(&self, socket: &UnixStream) -> Result<(Received, OwnedFd), String> {
        // Before it can have ended.
        let process = peer_process(socket);
        let received = self
            .wait_for_message(socket)
            .map_err(|error| error.to_string())?;
        match &received {
            Received::Hypervisor(_) => {}
            _ if !self.may_ask => return Err("what is handed over may not ask".to_owned()),
            Received::Handed(question, _) => {
                let asked = serde_json::from_slice(question);
                if !matches!(asked, Ok(Question::Serve)) {
                    return Err("what it hands over is not what is asked for".to_owned());
                }
            }
            Received::Question(_) => {}
        }
        // Looked up last, its end is no wonder.
        let process = process.map_err(|error| format!("its process cannot be watched: {error}"))?;
        Ok((received, process))
    }

    fn serve_process(
        &self,
        message: Result<(Vec<u8>, OwnedFd), HandshakeError>,
        process: &OwnedFd,
    ) {
        let set = lock(&self.shared.working_set).clone();
        self.tell(Message::Notice(Notice::Started {
            pid: self.pid,
            ahead_pages: set.as_ref().map_or(0, |set| set.page_count()),
        }));
        let serving = AssertUnwindSafe(|| self.serve(message, process.as_fd(), set));
        let end = catch_unwind(serving)
            .unwrap_or_else(|_| SessionEnd::Failed("a fault of the server itself".to_owned()));
        if end != SessionEnd::Exited {
            // It would wait for its pages for ever.
            let _ = rustix::process::pidfd_send_signal(process, Signal::KILL);
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
        let limit = Timespec::try_from(HANDSHAKE_LIMIT).ok();
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
        message: Result<(Vec<u8>, OwnedFd), HandshakeError>,
        process: BorrowedFd<'_>,
        set: Option<Arc<WorkingSet>>,
    ) -> SessionEnd {
        let shared = &*self.shared;
        let memory_bytes = shared.source.memory_bytes();
        let understood = message.and_then(|(message, descriptor)| {
            let layout = GuestLayout::parse(&message, memory_bytes)?;
            let userfault = Userfault::adopt(descriptor).map_err(HandshakeError::Descriptor)?;
            Ok((layout, userfault))
        });
        let (layout, userfault) = match understood {
            Ok(understood) => understood,
            Err(error) => return SessionEnd::Refused(error.to_string()),
        };
        let mut faults = FaultLoop::new(userfault, layout, &shared.source, &self.statistics);
        if let Some(set) = &set {
            faults.prefetch(set, shared.options.progress_period);
        }
        if set.as_ref().is_none_or(|set| !set.is_complete()) {
            let until = Instant::now() + shared.options.record_window;
            let pages = shared.source.page_count();
            faults.record(Recorder::new(pages, set.as_deref(), until));
        }
        let pid = self.pid;
        faults.run(process, shared.stop.as_fd(), |progress| match progress {
            Progress::Prefetching(pages) => {
                self.tell(Message::Notice(Notice::Prefetching { pid, pages }));
            }
            Progress::Prefetched(pages) => {
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

/// Tells one who is not heard why, if it reads that.
fn answer_refused(socket: &UnixStream, notice: &Notice) {
    if socket.set_nonblocking(true).is_ok() {
        let _ = (&*socket).write_all(&encoded(notice));
    }
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
