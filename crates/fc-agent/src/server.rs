//! The event loop: frames from the host, bytes of processes, ends of processes. One thread, and
//! nothing in it waits except for the next event.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use fcvm_types::guest::{ExitStatus, ProcessPlan};
use fcvm_wire::{
    Channel, Control, Failure, FailureKind, Frame, FrameKind, Hello, Mark, Opened, Outcome,
    PROTOCOL_VERSION, Request, Role, StreamId,
};
use rustix::event::Timespec;
use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};
use rustix::process::{Pid, WaitOptions, WaitStatus};

use crate::container::{self, Container};
use crate::devices::Carrier;
use crate::failure::{Context, bad_request, guest};
use crate::link::{Link, LinkError, Received};
use crate::parking::Parking;
use crate::spawn::{self, Spawned};
use crate::stream::{Kind, Part, Stream};
use crate::{clone, console, helper, power, sys};

/// Streams that may be open at a time.
const MAX_STREAMS: usize = 512;
const LINK_TOKEN: u64 = u64::MAX;
const CHILDREN_TOKEN: u64 = u64::MAX - 1;
/// Numbers from here on are not the host's: streams of a clone's source have them.
const FIRST_ORPHAN: StreamId = 1 << 31;
/// An epoll token holds the stream's number above these bits, the part below.
const PART_BITS: u32 = 8;

/// Why the loop ended. In each case the guest is powered off.
pub(crate) enum End {
    /// The host asked for it on this stream.
    PowerOff(StreamId),
    /// The connection cannot go on.
    Broken(String),
}

/// The agent's state.
pub(crate) struct Server {
    epoll: OwnedFd,
    children: OwnedFd,
    /// The connection to the host.
    pub(crate) link: Link,
    /// The container, once it was asked for.
    pub(crate) container: Option<Container>,
    streams: BTreeMap<StreamId, Stream>,
    last_orphan: StreamId,
    /// What carries the connection.
    pub(crate) carrier: Carrier,
    /// The host's side is there.
    pub(crate) connected: bool,
    /// The host has said who it is.
    pub(crate) greeted: bool,
    /// Its session.
    pub(crate) host: Option<u64>,
    /// By which a later connection begins.
    pub(crate) mark: Option<Mark>,
    /// Whether the connection is being given up.
    pub(crate) parking: Parking,
    session: u64,
}

impl Server {
    /// A server on a descriptor of the host's.
    pub(crate) fn new(carrier: Carrier, port: OwnedFd) -> Result<Self, Failure> {
        let epoll = epoll::create(CreateFlags::CLOEXEC).context("making the event loop")?;
        let children = sys::child_signals().context("watching child processes")?;
        let link = Link::new(port);
        let mut session = [0_u8; 8];
        // Enough to tell two starts apart; nothing secret rests on it.
        let _ = rustix::rand::getrandom(&mut session, rustix::rand::GetRandomFlags::INSECURE);
        let server = Self {
            epoll,
            children,
            link,
            container: None,
            streams: BTreeMap::new(),
            last_orphan: FIRST_ORPHAN,
            carrier,
            connected: false,
            greeted: false,
            host: None,
            mark: None,
            parking: Parking::Not,
            session: u64::from_le_bytes(session),
        };
        server.watch_link()?;
        server.watch(CHILDREN_TOKEN, server.children.as_fd(), EventFlags::IN)?;
        Ok(server)
    }

    /// Waits for events of the connection, too.
    pub(crate) fn watch_link(&self) -> Result<(), Failure> {
        let flags = EventFlags::IN | EventFlags::OUT | EventFlags::RDHUP;
        self.watch(LINK_TOKEN, self.link.as_fd(), flags)
    }

    fn watch(&self, token: u64, fd: BorrowedFd<'_>, flags: EventFlags) -> Result<(), Failure> {
        let data = EventData::new_u64(token);
        epoll::add(&self.epoll, fd, data, flags | EventFlags::ET).context("watching a descriptor")
    }

    /// Serves until the guest is to be powered off.
    pub(crate) fn serve(&mut self) -> End {
        loop {
            self.wait();
            if let Err(end) = self.turn() {
                return end;
            }
        }
    }

    /// Waits for events, or only looks where there is work at hand.
    fn wait(&mut self) {
        let patience = match self.is_busy() {
            true => Some(Duration::ZERO),
            false => self.patience(),
        };
        let patience = patience.and_then(|patience| Timespec::try_from(patience).ok());
        let mut events = Vec::with_capacity(64);
        let space = rustix::buffer::spare_capacity(&mut events);
        if epoll::wait(&self.epoll, space, patience.as_ref()).is_err() {
            return;
        }
        for event in &events {
            let (token, flags) = (event.data.u64(), event.flags);
            match token {
                LINK_TOKEN => self.link_event(flags),
                CHILDREN_TOKEN => self.reap(),
                token => self.stream_event(token),
            }
        }
    }

    /// There is work at hand.
    fn is_busy(&self) -> bool {
        let congested = self.link.is_congested();
        let in_streams = || {
            let mut streams = self.streams.values();
            streams.any(|stream| stream.has_work(congested))
        };
        match self.parking {
            Parking::Not => self.connected && self.link.has_work() || in_streams(),
            Parking::Anew => self.connected && self.link.has_work(),
            Parking::Silent => self.link.can_write(),
            Parking::Lost(_) => false,
        }
    }

    fn link_event(&mut self, flags: EventFlags) {
        self.link.woken();
        if self.parking != Parking::Not {
            if flags.intersects(EventFlags::HUP | EventFlags::ERR | EventFlags::RDHUP) {
                self.connection_lost();
            } else if matches!(self.parking, Parking::Lost(_)) {
                // The host has connected its side of the port again.
                self.begin_anew();
            }
            return;
        }
        let connected = !flags.contains(EventFlags::HUP);
        if connected && !self.connected && !self.greeted {
            self.say_hello();
        }
        self.connected = connected;
    }

    /// Says who this is.
    pub(crate) fn say_hello(&mut self) {
        let hello = Hello {
            protocol: PROTOCOL_VERSION,
            role: Role::Agent,
            program: concat!("fc-agent ", env!("CARGO_PKG_VERSION")).to_owned(),
            session: self.session,
            mark: None,
        };
        self.link.send(&Frame::message(FrameKind::Hello, 0, &hello));
    }

    /// This guest has woken up as a clone: the streams' host is not there any more.
    fn renewed(&mut self) -> Result<(), Failure> {
        self.greeted = false;
        self.say_hello();
        self.orphan_streams()
    }

    /// What the streams' processes say is nobody's any more.
    pub(crate) fn orphan_streams(&mut self) -> Result<(), Failure> {
        for id in self.streams.keys().copied().collect::<Vec<_>>() {
            self.last_orphan = self.last_orphan.wrapping_add(1) | FIRST_ORPHAN;
            self.renumber(id, self.last_orphan)?;
        }
        self.streams.values_mut().for_each(Stream::orphan);
        Ok(())
    }

    fn stream_event(&mut self, token: u64) {
        let stream = StreamId::try_from(token >> PART_BITS).ok();
        let part = Part::from_number(token & ((1 << PART_BITS) - 1));
        if let (Some(stream), Some(part)) = (stream, part)
            && let Some(stream) = self.streams.get_mut(&stream)
        {
            stream.woken(part);
        }
    }

    fn reap(&mut self) {
        let mut record = [0_u8; 128];
        while matches!(rustix::io::read(&self.children, &mut record), Ok(1..)) {}
        while let Ok(Some((pid, status))) = rustix::process::wait(WaitOptions::NOHANG) {
            let status = exit_status(status);
            if let Some(container) = &mut self.container
                && container.pid == pid
            {
                container.ended = true;
            }
            if let Some(stream) = self.stream_of(pid) {
                stream.exited(status);
            }
        }
    }

    fn stream_of(&mut self, pid: Pid) -> Option<&mut Stream> {
        self.streams
            .values_mut()
            .find(|stream| stream.pid == pid && stream.is_running())
    }

    /// Does what can be done now: each stream moves at most one frame each way, so that none of them
    /// holds up the others or the host's requests.
    fn turn(&mut self) -> Result<(), End> {
        if let Parking::Lost(_) = self.parking {
            self.connect_again()?;
        }
        if !self.connected {
            if self.greeted && self.parking == Parking::Not {
                return Err(End::Broken(LinkError::Closed.to_string()));
            }
            return Ok(());
        }
        if self.parking != Parking::Silent {
            self.receive()?;
        }
        if self.parking == Parking::Not {
            self.pump_streams();
        }
        match self.link.flush() {
            Err(_) if self.parking != Parking::Not => {
                self.connection_lost();
                Ok(())
            }
            flushed => flushed.map_err(|error| End::Broken(error.to_string())),
        }
    }

    fn pump_streams(&mut self) {
        let mut over = Vec::new();
        for (id, stream) in &mut self.streams {
            stream.pump(&mut self.link);
            if let Some(outcome) = stream.outcome() {
                over.push((*id, outcome));
            }
        }
        for (id, outcome) in over {
            if let Some(stream) = self.streams.remove(&id)
                && !stream.is_orphaned()
            {
                self.close(id, &outcome);
            }
        }
    }

    fn receive(&mut self) -> Result<(), End> {
        loop {
            match self.link.receive() {
                Ok(Received::Frame(frame)) => {
                    self.frame(&frame)?;
                    if self.parking == Parking::Silent {
                        return Ok(());
                    }
                }
                Ok(Received::Renewed) => self
                    .renewed()
                    .map_err(|failure| End::Broken(failure.message))?,
                Ok(Received::Nothing) => return Ok(()),
                Err(LinkError::Closed | LinkError::Io(_)) if self.parking != Parking::Not => {
                    self.connection_lost();
                    return Ok(());
                }
                Err(LinkError::Closed) if !self.greeted => return Ok(()),
                Err(error) => return Err(End::Broken(error.to_string())),
            }
        }
    }

    fn close(&mut self, stream: StreamId, outcome: &Outcome) {
        self.link
            .send(&Frame::message(FrameKind::Closed, stream, outcome));
    }

    fn frame(&mut self, frame: &Frame) -> Result<(), End> {
        if !self.greeted {
            return self.greet(frame);
        }
        let broken = |error: &dyn std::fmt::Display| End::Broken(error.to_string());
        match frame.kind {
            FrameKind::Open => return self.open(frame),
            FrameKind::Data => self.data(frame)?,
            FrameKind::Eof => {
                if let Some(stream) = self.streams.get_mut(&frame.stream) {
                    stream.end_input();
                }
            }
            FrameKind::Credit => {
                let bytes = frame.parse_credit().map_err(|error| broken(&error))?;
                if let Some(stream) = self.streams.get_mut(&frame.stream) {
                    stream.credit(frame.channel, bytes);
                }
            }
            FrameKind::Control => {
                let control: Control = frame.parse().map_err(|error| broken(&error))?;
                if let Some(stream) = self.streams.get(&frame.stream) {
                    match control {
                        Control::Signal { signal } => stream.signal(signal),
                        Control::Resize { size } => stream.resize(size),
                    }
                }
            }
            FrameKind::Reset => {
                if let Some(stream) = self.streams.get_mut(&frame.stream) {
                    stream.reset();
                }
            }
            FrameKind::Park => self.park(frame)?,
            FrameKind::Hello | FrameKind::Opened | FrameKind::Closed => {
                let text = format!("the host sent a {:?} frame out of place", frame.kind);
                return Err(End::Broken(text));
            }
        }
        Ok(())
    }

    fn greet(&mut self, frame: &Frame) -> Result<(), End> {
        if frame.kind != FrameKind::Hello {
            let text = format!("the host began with a {:?} frame", frame.kind);
            return Err(End::Broken(text));
        }
        let hello: Hello = frame
            .parse()
            .map_err(|error| End::Broken(error.to_string()))?;
        if hello.protocol != PROTOCOL_VERSION {
            return Err(End::Broken(format!(
                "the host speaks protocol {} and this agent {PROTOCOL_VERSION}; \
                 both must come from the same build of fcvm",
                hello.protocol
            )));
        }
        self.greeted = true;
        self.mark = hello.mark;
        if let Some(mark) = hello.mark {
            self.link.expect_mark(mark);
        }
        self.recognise(hello.session)
    }

    fn data(&mut self, frame: &Frame) -> Result<(), End> {
        let Some(stream) = self.streams.get_mut(&frame.stream) else {
            // The stream ended while the bytes were under way.
            return Ok(());
        };
        if frame.channel != Channel::Stdin {
            return Err(End::Broken(
                "the host sent data on an output channel".into(),
            ));
        }
        match stream.receive(&frame.payload) {
            Ok(Some(credit)) => self.link.send(&credit),
            Ok(None) => {}
            Err(error) => return Err(End::Broken(error.to_string())),
        }
        Ok(())
    }

    fn open(&mut self, frame: &Frame) -> Result<(), End> {
        let id = frame.stream;
        if id == 0 || id >= FIRST_ORPHAN || self.streams.contains_key(&id) {
            return Err(End::Broken(format!("the host opened stream {id} again")));
        }
        let request = match frame.parse::<Request>() {
            Ok(Request::PowerOff) => return Err(End::PowerOff(id)),
            Ok(request) if self.streams.len() < MAX_STREAMS => request,
            Ok(_) => {
                let text = format!("{MAX_STREAMS} streams are open in the guest; end some first");
                self.close(id, &Outcome::Failed(guest(text)));
                return Ok(());
            }
            Err(error) => {
                let failure = Failure {
                    kind: FailureKind::Unsupported,
                    message: format!("the agent does not know this request: {error}"),
                };
                self.close(id, &Outcome::Failed(failure));
                return Ok(());
            }
        };
        match self.request(id, request) {
            Ok(Some(outcome)) => self.close(id, &outcome),
            Ok(None) => {}
            Err(failure) => self.close(id, &Outcome::Failed(failure)),
        }
        Ok(())
    }

    /// Starts what a request asks for; an outcome where that is all.
    fn request(&mut self, id: StreamId, request: Request) -> Result<Option<Outcome>, Failure> {
        match request {
            Request::Run { plan } => {
                if self.container.is_some() {
                    return Err(bad_request("the container has been started already"));
                }
                let (container, spawned) = Container::start(&plan)?;
                self.container = Some(container);
                self.add(id, Kind::Container, spawned)?;
            }
            Request::Adopt { plan } => {
                clone::adopt(&plan, self.container()?)?;
                self.adopt_container(id)?;
                if let Some(container) = &mut self.container {
                    container.thaw()?;
                }
            }
            Request::Exec { process } => self.exec(id, &process)?,
            Request::Signal { signal, all } => {
                self.container()?.signal(signal, all)?;
                return Ok(Some(Outcome::Done));
            }
            Request::SetClock { realtime_ns } => {
                container::set_clock(realtime_ns)?;
                return Ok(Some(Outcome::Done));
            }
            request => {
                let spawned = helper::start(request, self.container.as_ref())?;
                let streams = spawned.stdin.is_some() || spawned.stdout.is_some();
                self.add(id, Kind::Helper, spawned)?;
                if streams {
                    let opened = Opened { pid: 0 };
                    self.link
                        .send(&Frame::message(FrameKind::Opened, id, &opened));
                }
            }
        }
        Ok(None)
    }

    fn container(&self) -> Result<&Container, Failure> {
        self.container
            .as_ref()
            .ok_or_else(|| bad_request("the container has not been started"))
    }

    fn exec(&mut self, id: StreamId, process: &ProcessPlan) -> Result<(), Failure> {
        let spawned = spawn::further_process(process, self.container()?)?;
        self.add(id, Kind::Exec, spawned)
    }

    fn add(&mut self, id: StreamId, kind: Kind, spawned: Spawned) -> Result<(), Failure> {
        let stream = Stream::new(id, kind, spawned);
        if let Err(failure) = self.watch_stream(id, &stream) {
            stream.signal(libc::SIGKILL);
            return Err(failure);
        }
        self.streams.insert(id, stream);
        Ok(())
    }

    fn watch_stream(&self, id: StreamId, stream: &Stream) -> Result<(), Failure> {
        for (part, fd) in stream.descriptors() {
            let flags = match part {
                Part::Stdin => EventFlags::OUT,
                // The end is what counts; what was written before is read with it.
                Part::Report if stream.kind != Kind::Helper => EventFlags::empty(),
                _ => EventFlags::IN,
            };
            self.watch(u64::from(id) << PART_BITS | part as u64, fd, flags)?;
        }
        Ok(())
    }

    /// Gives the container's stream to the host that has adopted this clone, under a new number.
    fn adopt_container(&mut self, id: StreamId) -> Result<(), Failure> {
        let is_orphan = |stream: &Stream| stream.kind == Kind::Container && stream.is_orphaned();
        let old = self.streams.iter().find(|(_, stream)| is_orphan(stream));
        let old = *old
            .ok_or_else(|| bad_request("there is no container to adopt"))?
            .0;
        self.renumber(old, id)?;
        if let Some(stream) = self.streams.get_mut(&id) {
            stream.adopt();
            let pid = stream.container_pid().unwrap_or(0);
            self.link
                .send(&Frame::message(FrameKind::Opened, id, &Opened { pid }));
        }
        Ok(())
    }

    fn renumber(&mut self, old: StreamId, new: StreamId) -> Result<(), Failure> {
        let Some(mut stream) = self.streams.remove(&old) else {
            return Ok(());
        };
        for (_, fd) in stream.descriptors() {
            epoll::delete(&self.epoll, fd).context("watching a descriptor")?;
        }
        stream.renumber(new);
        self.watch_stream(new, &stream)?;
        self.streams.insert(new, stream);
        Ok(())
    }

    /// Ends all processes and powers the guest off.
    pub(crate) fn power_off(mut self, end: End) -> ! {
        if let End::Broken(reason) = &end {
            console::line(&format!("{reason}; powering off"));
        }
        power::end_processes(self.container.as_ref(), &self.children);
        let released = power::release_disks();
        if let End::PowerOff(stream) = end {
            let outcome = match released {
                Ok(()) => Outcome::Done,
                Err(failure) => Outcome::Failed(failure),
            };
            self.close(stream, &outcome);
            power::drain(&mut self.link);
        }
        power::off()
    }
}

fn exit_status(status: WaitStatus) -> ExitStatus {
    match (status.exit_status(), status.terminating_signal()) {
        (Some(code), _) => ExitStatus::Code(u8::try_from(code & 0xff).unwrap_or(u8::MAX)),
        (None, Some(signal)) => ExitStatus::Signal(u8::try_from(signal).unwrap_or(u8::MAX)),
        (None, None) => ExitStatus::Code(u8::MAX),
    }
}
