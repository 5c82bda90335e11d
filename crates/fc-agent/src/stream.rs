//! One stream: a process, its descriptors, and the flow of their bytes. What the frames of a stream mean
//! to the connection as a whole is server.rs's business.

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use fcvm_types::guest::ExitStatus;
use fcvm_wire::flow::WindowExceeded;
use fcvm_wire::{Channel, Failure, Frame, Opened, Outcome, ReceiveWindow, SendWindow, StreamId};
use fcvm_wire::{FrameKind, frame::MAX_GUEST_MESSAGE_BYTES};
use rustix::io::Errno;
use rustix::process::Pid;

use crate::failure::guest;
use crate::link::{DATA_BYTES, Link};
use crate::spawn::Spawned;

/// Most that is read from a terminal after its process has ended: what the kernel may hold.
const TERMINAL_REST_BYTES: u64 = 64 * 1024;
/// End-of-file character of a terminal.
const END_OF_TRANSMISSION: u8 = 4;

/// What runs in a stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// The container's first process.
    Container,
    /// A further process of the container.
    Exec,
    /// A helper of the agent.
    Helper,
}

/// Bytes from the host to the process.
struct Input {
    fd: Option<OwnedFd>,
    queue: VecDeque<u8>,
    window: ReceiveWindow,
    writable: bool,
    ended: bool,
    terminal: bool,
    /// So many bytes at the queue's start came from another host than the present one.
    foreign_bytes: usize,
}

impl Input {
    fn new(fd: Option<OwnedFd>, terminal: bool) -> Self {
        Self {
            fd,
            queue: VecDeque::new(),
            window: ReceiveWindow::default(),
            writable: true,
            ended: false,
            terminal,
            foreign_bytes: 0,
        }
    }

    /// The host is another one from now on, with a window of its own.
    fn renew(&mut self) {
        self.window = ReceiveWindow::default();
        self.foreign_bytes = self.queue.len();
    }

    /// Takes bytes from the host. Those that nobody will read are counted as read.
    fn receive(&mut self, bytes: &[u8]) -> Result<Option<u32>, WindowExceeded> {
        self.window.received(bytes.len())?;
        if self.fd.is_none() || self.ended {
            return Ok(self.window.taken(bytes.len()));
        }
        self.queue.extend(bytes);
        Ok(None)
    }

    fn end(&mut self) {
        if self.terminal && !self.ended && self.fd.is_some() {
            self.queue.push_back(END_OF_TRANSMISSION);
        }
        self.ended = true;
    }

    fn can_write(&self) -> bool {
        self.fd.is_some() && self.writable && (!self.queue.is_empty() || self.ended)
    }

    /// Writes what the process takes now; gives credit for the host.
    fn pump(&mut self) -> Option<u32> {
        let mut taken = 0;
        while let Some(fd) = self.fd.as_ref().filter(|_| self.writable) {
            if self.queue.is_empty() {
                if self.ended {
                    self.fd = None;
                }
                break;
            }
            match rustix::io::write(fd, self.queue.as_slices().0) {
                Ok(written) => {
                    self.queue.drain(..written);
                    taken += written;
                }
                Err(Errno::AGAIN) => self.writable = false,
                Err(Errno::INTR) => {}
                // The process has closed its input: the rest is of no use to anybody.
                Err(_) => {
                    taken += self.queue.len();
                    self.queue = VecDeque::new();
                    self.fd = None;
                }
            }
        }
        let foreign = taken.min(self.foreign_bytes);
        self.foreign_bytes -= foreign;
        match taken - foreign {
            0 => None,
            taken => self.window.taken(taken),
        }
    }
}

/// Bytes from the process to the host.
struct Output {
    channel: Channel,
    fd: Option<OwnedFd>,
    window: SendWindow,
    readable: bool,
    /// After the process has ended: how much of what is left is still read.
    rest_bytes: Option<u64>,
}

impl Output {
    fn new(channel: Channel, fd: Option<OwnedFd>) -> Self {
        Self {
            channel,
            fd,
            window: SendWindow::default(),
            readable: true,
            rest_bytes: None,
        }
    }

    fn can_read(&self) -> bool {
        self.fd.is_some()
            && self.window.available() > 0
            && (self.readable || self.rest_bytes.is_some())
    }

    /// Limits what is read to what is there now: a process that inherited the descriptor must not
    /// keep the stream open.
    fn finish(&mut self, terminal: bool) {
        if let Some(fd) = &self.fd {
            self.rest_bytes = Some(if terminal {
                TERMINAL_REST_BYTES
            } else {
                rustix::io::ioctl_fionread(fd).unwrap_or(0)
            });
        }
    }

    /// Reads what is there and forgets it: nobody listens.
    fn discard(&mut self) {
        let mut buffer = [0_u8; 4096];
        while self.fd.is_some() && (self.readable || self.rest_bytes.is_some()) {
            let rest = self.rest_bytes.unwrap_or(u64::MAX);
            let limit = buffer
                .len()
                .min(usize::try_from(rest).unwrap_or(usize::MAX));
            let result = match &self.fd {
                Some(fd) if limit > 0 => rustix::io::read(fd, &mut buffer[..limit]),
                _ => Ok(0),
            };
            match result {
                Ok(length @ 1..) => {
                    if let Some(rest) = &mut self.rest_bytes {
                        *rest -= length as u64;
                    }
                }
                Err(Errno::AGAIN) if self.rest_bytes.is_none() => self.readable = false,
                Err(Errno::INTR) => {}
                Ok(_) | Err(_) => self.fd = None,
            }
        }
    }

    /// Reads one frame's worth, as far as credit goes, and queues it.
    fn pump(&mut self, stream: StreamId, link: &mut Link) {
        if !self.can_read() {
            return;
        }
        let Some(fd) = &self.fd else { return };
        let rest = self.rest_bytes.unwrap_or(u64::MAX);
        let limit = self
            .window
            .available()
            .min(DATA_BYTES)
            .min(usize::try_from(rest).unwrap_or(usize::MAX));
        let result = match limit {
            0 => Ok(0),
            limit => link.send_data(stream, self.channel, limit, |buffer| {
                rustix::io::read(fd, buffer)
            }),
        };
        match result {
            Ok(length @ 1..) => {
                self.window.sent(length);
                if let Some(rest) = &mut self.rest_bytes {
                    *rest -= length as u64;
                }
            }
            Err(Errno::AGAIN) if self.rest_bytes.is_none() => self.readable = false,
            Err(Errno::INTR) => {}
            // The end; a terminal whose last user has gone says EIO.
            Ok(_) | Err(_) => {
                self.fd = None;
                link.send(&Frame::eof(stream, self.channel));
            }
        }
    }
}

/// One stream.
pub(crate) struct Stream {
    /// What runs in it.
    pub(crate) kind: Kind,
    /// Its process, in the agent's namespace.
    pub(crate) pid: Pid,
    id: StreamId,
    exit: Option<ExitStatus>,
    report: Option<OwnedFd>,
    reported: Vec<u8>,
    reset: bool,
    /// In a clone: its host is the source's, which is not there.
    orphaned: bool,
    terminal: bool,
    input: Input,
    outputs: [Output; 2],
}

impl Stream {
    /// A stream of a new process.
    pub(crate) fn new(id: StreamId, kind: Kind, spawned: Spawned) -> Self {
        Self {
            kind,
            pid: spawned.pid,
            id,
            exit: None,
            report: Some(spawned.report),
            reported: Vec::new(),
            reset: false,
            orphaned: false,
            terminal: spawned.terminal,
            input: Input::new(spawned.stdin, spawned.terminal),
            outputs: [
                Output::new(Channel::Stdout, spawned.stdout),
                Output::new(Channel::Stderr, spawned.stderr),
            ],
        }
    }

    /// Descriptors to register with epoll, edge-triggered, with the part that each is.
    pub(crate) fn descriptors(&self) -> impl Iterator<Item = (Part, BorrowedFd<'_>)> {
        let [stdout, stderr] = &self.outputs;
        [
            (Part::Stdin, &self.input.fd),
            (Part::Stdout, &stdout.fd),
            (Part::Stderr, &stderr.fd),
            (Part::Report, &self.report),
        ]
        .into_iter()
        .filter_map(|(part, fd)| Some((part, fd.as_ref()?.as_fd())))
    }

    /// A descriptor has become ready.
    pub(crate) fn woken(&mut self, part: Part) {
        match part {
            Part::Stdin => self.input.writable = true,
            Part::Stdout => self.outputs[0].readable = true,
            Part::Stderr => self.outputs[1].readable = true,
            Part::Report => {}
        }
    }

    /// Bytes for the process arrived; gives the credit frame to send, if one is due.
    pub(crate) fn receive(&mut self, bytes: &[u8]) -> Result<Option<Frame>, WindowExceeded> {
        let credit = self.input.receive(bytes)?;
        Ok(credit.map(|bytes| Frame::credit(self.id, Channel::Stdin, bytes)))
    }

    /// No more bytes for the process follow.
    pub(crate) fn end_input(&mut self) {
        self.input.end();
    }

    /// The host can take so many more bytes.
    pub(crate) fn credit(&mut self, channel: Channel, bytes: u32) {
        for output in &mut self.outputs {
            if output.channel == channel {
                output.window.credited(bytes);
            }
        }
    }

    /// Sets the terminal's size; nothing where there is no terminal.
    pub(crate) fn resize(&self, size: fcvm_types::guest::TerminalSize) {
        if let Some(fd) = self.outputs[0].fd.as_ref().filter(|_| self.terminal) {
            let _ = crate::spawn::set_terminal_size(fd, size);
        }
    }

    /// Sends a signal to the process.
    pub(crate) fn signal(&self, signal: i32) {
        if self.exit.is_none() {
            let _ = crate::sys::kill(self.pid.as_raw_nonzero().get(), signal);
        }
    }

    /// This guest is a clone now, and nobody listens to the stream. A helper's work was for the source;
    /// what runs in the container goes on, and what it says is dropped.
    pub(crate) fn orphan(&mut self) {
        if self.kind == Kind::Helper {
            self.reset();
        }
        self.orphaned = true;
    }

    /// The stream has another number from now on.
    pub(crate) fn renumber(&mut self, id: StreamId) {
        self.id = id;
    }

    /// There is a host again that listens.
    pub(crate) fn adopt(&mut self) {
        self.orphaned = false;
        self.input.renew();
        for output in &mut self.outputs {
            output.window = SendWindow::default();
        }
    }

    /// Nobody waits for its outcome.
    pub(crate) fn is_orphaned(&self) -> bool {
        self.orphaned
    }

    /// Process id in the container, once the program runs.
    pub(crate) fn container_pid(&self) -> Option<u32> {
        let pid = <[u8; 4]>::try_from(self.reported.as_slice()).ok()?;
        self.report.is_none().then(|| u32::from_le_bytes(pid))
    }

    /// The host has lost interest: ends the process and its group, and drops what they say.
    pub(crate) fn reset(&mut self) {
        self.reset = true;
        if self.exit.is_none() {
            let pid = self.pid.as_raw_nonzero().get();
            let _ = crate::sys::kill(-pid, libc::SIGKILL);
            let _ = crate::sys::kill(pid, libc::SIGKILL);
        }
        self.drop_descriptors();
    }

    fn drop_descriptors(&mut self) {
        self.input.fd = None;
        self.input.queue = VecDeque::new();
        for output in &mut self.outputs {
            output.fd = None;
        }
    }

    /// The process has ended.
    pub(crate) fn exited(&mut self, status: ExitStatus) {
        self.exit = Some(status);
        self.input.fd = None;
        self.input.queue = VecDeque::new();
        let terminal = self.terminal;
        self.outputs
            .iter_mut()
            .for_each(|output| output.finish(terminal));
    }

    /// The process has not been reaped.
    pub(crate) fn is_running(&self) -> bool {
        self.exit.is_none()
    }

    /// What it says is its own: a child's before its program runs would not be.
    fn has_started(&self) -> bool {
        self.kind == Kind::Helper || self.report.is_none()
    }

    /// Something can be done without a new event.
    pub(crate) fn has_work(&self, congested: bool) -> bool {
        if self.orphaned {
            return false;
        }
        self.input.can_write()
            || (!congested && self.has_started() && self.outputs.iter().any(Output::can_read))
    }

    /// Moves bytes both ways, one frame's worth for each output.
    pub(crate) fn pump(&mut self, link: &mut Link) {
        if self.orphaned {
            self.pump_orphaned();
            return;
        }
        if let Some(credit) = self.input.pump() {
            link.send(&Frame::credit(self.id, Channel::Stdin, credit));
        }
        if self.read_report() {
            self.started(link);
        }
        if !self.has_started() {
            return;
        }
        for output in &mut self.outputs {
            if !link.is_congested() {
                output.pump(self.id, link);
            }
        }
    }

    /// Keeps the process going while nobody listens: what was sent to it arrives, what it says is
    /// dropped. The container's own output waits for the host that will adopt it.
    fn pump_orphaned(&mut self) {
        if self.kind == Kind::Container {
            return;
        }
        let _ = self.input.pump();
        if self.read_report() {
            self.forget_failed_start();
        }
        if self.has_started() {
            self.outputs.iter_mut().for_each(Output::discard);
        }
    }

    /// Reads what the child says before its program runs; its end is the program's start, and is
    /// told once.
    fn read_report(&mut self) -> bool {
        let mut buffer = [0_u8; 4096];
        while let Some(report) = &self.report {
            match rustix::io::read(report, &mut buffer) {
                Ok(length @ 1..) if self.reported.len() <= MAX_GUEST_MESSAGE_BYTES => {
                    self.reported.extend_from_slice(&buffer[..length]);
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return false,
                Ok(_) | Err(_) => {
                    self.report = None;
                    return true;
                }
            }
        }
        false
    }

    fn started(&mut self, link: &mut Link) {
        if self.kind == Kind::Helper {
            return;
        }
        if let Some(pid) = self.container_pid() {
            link.send(&Frame::message(FrameKind::Opened, self.id, &Opened { pid }));
        }
        self.forget_failed_start();
    }

    /// Where the program did not start nothing that was written is the program's.
    fn forget_failed_start(&mut self) {
        if self.kind != Kind::Helper && self.container_pid().is_none() {
            self.drop_descriptors();
        }
    }

    /// How the stream ended, once all is over and sent.
    pub(crate) fn outcome(&self) -> Option<Outcome> {
        let exit = self.exit?;
        let over = self.report.is_none() && self.outputs.iter().all(|output| output.fd.is_none());
        if !over {
            return None;
        }
        if self.kind == Kind::Helper {
            return Some(self.helper_outcome());
        }
        Some(match self.reported.as_slice() {
            [_, _, _, _] => Outcome::Exited(exit),
            // The report holds the failure alone where it came before the process's id.
            report => Outcome::Failed(
                [report.get(4..), Some(report)]
                    .into_iter()
                    .flatten()
                    .find_map(|bytes| serde_json::from_slice::<Failure>(bytes).ok())
                    .unwrap_or_else(|| guest("the process was killed before its program ran")),
            ),
        })
    }

    fn helper_outcome(&self) -> Outcome {
        if self.reset {
            return Outcome::Failed(guest("the request was abandoned"));
        }
        if self.reported.len() > MAX_GUEST_MESSAGE_BYTES {
            return Outcome::Failed(guest("the answer is too long for one message"));
        }
        serde_json::from_slice(&self.reported)
            .unwrap_or_else(|_| Outcome::Failed(guest("the agent's helper was killed")))
    }
}

/// Which descriptor of a stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u64)]
pub(crate) enum Part {
    /// Its input.
    Stdin = 0,
    /// Its output.
    Stdout = 1,
    /// Its error output.
    Stderr = 2,
    /// What a child says before its program runs.
    Report = 3,
}

impl Part {
    /// From the number in an epoll event.
    pub(crate) fn from_number(number: u64) -> Option<Self> {
        [Self::Stdin, Self::Stdout, Self::Stderr, Self::Report]
            .into_iter()
            .find(|part| *part as u64 == number)
    }
}
