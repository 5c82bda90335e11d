//! The host's side of the protocol, as simple as a test can have it: a thread that sorts received
//! frames by stream. Credit is given when the test takes the data, not before.

use std::collections::{HashMap, VecDeque};
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use fcvm_types::guest::{ClonePlan, ExitStatus, GuestIdentity, GuestPlan, ProcessPlan};
use fcvm_wire::{
    Channel, Control, Decoder, Failure, Frame, FrameKind, Hello, MARK_BYTES, MAX_DATA_BYTES, Mark,
    MarkScanner, Opened, Outcome, PROTOCOL_VERSION, ReceiveWindow, Request, Role, SendWindow,
};

use crate::lab::{Guest, Tools};

/// Longer than anything takes on a loaded machine.
const LIMIT: Duration = Duration::from_secs(120);

/// While there is one, what arrives before its mark is passed over.
type Scanner = Arc<Mutex<Option<MarkScanner>>>;
type Routes = Arc<Mutex<HashMap<u32, Sender<Frame>>>>;

/// A booted guest and the connection to its agent.
pub(crate) struct Vm {
    /// The guest.
    pub guest: Guest,
    /// What the agent said first.
    pub(crate) hello: Hello,
    scanner: Scanner,
    socket: Arc<Mutex<UnixStream>>,
    routes: Routes,
    /// Sorts frames until the connection ends.
    sorting: Option<JoinHandle<()>>,
    next: u32,
}

impl Vm {
    /// Boots a guest and exchanges greetings.
    pub(crate) fn boot(tools: &Tools) -> Self {
        let (guest, socket) = Guest::boot(tools);
        Self::connect(guest, socket)
    }

    /// Waits for the agent's greeting.
    pub(crate) fn connect(guest: Guest, socket: UnixStream) -> Self {
        let routes = Routes::default();
        let (sender, receiver) = channel();
        routes.lock().unwrap().insert(0, sender);
        let reader = socket.try_clone().unwrap();
        let sorted = routes.clone();
        let scanner = Scanner::default();
        let waited_for = scanner.clone();
        let sorting = std::thread::spawn(move || sort_frames(reader, &sorted, &waited_for));
        let mut vm = Self {
            guest,
            hello: Hello {
                protocol: 0,
                role: Role::Owner,
                program: String::new(),
                session: 0,
                mark: None,
            },
            scanner,
            socket: Arc::new(Mutex::new(socket)),
            routes,
            sorting: Some(sorting),
            next: 1,
        };
        vm.hello = receiver
            .recv_timeout(LIMIT)
            .expect("the agent says hello")
            .parse()
            .unwrap();
        vm
    }

    /// Answers the greeting.
    pub(crate) fn greet(&self) {
        self.greet_with(Mark::from_random([1; 16]));
    }

    /// Answers the greeting with a mark of a later connection.
    pub(crate) fn greet_with(&self, mark: Mark) {
        self.greet_as(1, mark);
    }

    fn greet_as(&self, session: u64, mark: Mark) {
        let hello = Hello {
            protocol: PROTOCOL_VERSION,
            role: Role::Owner,
            program: "test".into(),
            session,
            mark: Some(mark),
        };
        self.send(&Frame::message(FrameKind::Hello, 0, &hello));
    }

    /// Does as the owner of a clone does: begins a new connection by the mark of the old one, in the
    /// middle of whatever is under way, and adopts the container.
    pub(crate) fn adopt(&mut self, mark: Mark, new: Mark, plan: ClonePlan) -> Stream {
        let (sender, greeting) = channel();
        {
            let mut routes = self.routes.lock().unwrap();
            routes.clear();
            routes.insert(0, sender);
        }
        *self.scanner.lock().unwrap() = Some(MarkScanner::new(mark.answer()));
        self.send_bytes(mark.as_bytes());
        self.greet_with(new);
        self.next = 1;
        let plan = Box::new(plan);
        let stream = self.open(&Request::Adopt { plan });
        let hello: Hello = greeting.recv_timeout(LIMIT).unwrap().parse().unwrap();
        assert_eq!(hello.session, self.hello.session);
        stream
    }

    /// Does as an owner does before and after its guest is saved: lets the agent fall silent, ends the
    /// connection, and waits for the mark on another one.
    pub(crate) fn park(&mut self, mark: Mark) {
        let (sender, answers) = channel();
        self.routes.lock().unwrap().insert(0, sender);
        self.send(&Frame::new(FrameKind::Park, 0, Vec::new()));
        let parked = answers.recv_timeout(LIMIT).expect("the agent parks");
        assert_eq!((parked.kind, parked.payload.len()), (FrameKind::Park, 0));
        let routes = std::mem::take(&mut *self.routes.lock().unwrap());
        let end = std::net::Shutdown::Both;
        self.socket.lock().unwrap().shutdown(end).unwrap();
        self.sorting.take().unwrap().join().unwrap();
        let mut socket = self.guest.connected();
        let mut shown = [0; MARK_BYTES];
        socket.read_exact(&mut shown).unwrap();
        assert_eq!(&shown, mark.as_bytes());
        *self.routes.lock().unwrap() = routes;
        let reader = socket.try_clone().unwrap();
        let (sorted, scanner) = (self.routes.clone(), self.scanner.clone());
        let sorting = std::thread::spawn(move || sort_frames(reader, &sorted, &scanner));
        self.sorting = Some(sorting);
        *self.socket.lock().unwrap() = socket;
        let hello: Hello = answers.recv_timeout(LIMIT).unwrap().parse().unwrap();
        assert_eq!(hello.session, self.hello.session);
    }

    /// Does as the owner of a clone does whose agent has connected: says who it is, and adopts the
    /// container.
    pub(crate) fn adopt_parked(&mut self, new: Mark, plan: ClonePlan) -> Stream {
        self.routes.lock().unwrap().clear();
        self.greet_as(2, new);
        self.next = 1;
        let plan = Box::new(plan);
        self.open(&Request::Adopt { plan })
    }

    /// Boots, greets, and runs a container.
    pub(crate) fn run(tools: &Tools, plan: &GuestPlan) -> (Self, Stream) {
        let mut vm = Self::boot(tools);
        vm.greet();
        let plan = Box::new(plan.clone());
        let stream = vm.open(&Request::Run { plan });
        (vm, stream)
    }

    /// Sends raw bytes.
    pub(crate) fn send_bytes(&self, bytes: &[u8]) {
        let _ = self.socket.lock().unwrap().write_all(bytes);
    }

    /// Sends a frame.
    pub(crate) fn send(&self, frame: &Frame) {
        let mut bytes = Vec::new();
        frame.encode(&mut bytes);
        self.send_bytes(&bytes);
    }

    /// Ends the connection.
    pub(crate) fn disconnect(&self) {
        let socket = self.socket.lock().unwrap();
        socket.shutdown(std::net::Shutdown::Both).unwrap();
    }

    /// Opens a stream.
    pub(crate) fn open(&mut self, request: &Request) -> Stream {
        let bytes = Frame::message(FrameKind::Open, 0, request).payload;
        self.open_raw(&bytes)
    }

    /// Opens a stream with whatever bytes.
    pub(crate) fn open_raw(&mut self, request: &[u8]) -> Stream {
        let id = self.next;
        self.next += 1;
        let (sender, receiver) = channel();
        self.routes.lock().unwrap().insert(id, sender);
        self.send(&Frame::new(FrameKind::Open, id, request.to_vec()));
        Stream {
            id,
            receiver,
            socket: self.socket.clone(),
            send: SendWindow::default(),
            receive: Default::default(),
            early: VecDeque::new(),
        }
    }

    /// Runs a shell command to its end, as root.
    pub(crate) fn shell(&mut self, script: &str) -> Output {
        self.exec(&shell(script)).collect()
    }

    /// Starts a process.
    pub(crate) fn exec(&mut self, process: &ProcessPlan) -> Stream {
        self.open(&Request::Exec {
            process: process.clone(),
        })
    }

    /// Asks for something that has no stream of bytes.
    pub(crate) fn ask(&mut self, request: &Request) -> Outcome {
        self.open(request).collect().outcome
    }

    /// Powers off and waits for QEMU's end.
    pub(crate) fn power_off(mut self) -> Guest {
        assert_eq!(self.ask(&Request::PowerOff), Outcome::Done);
        self.wait_end()
    }

    /// Waits for QEMU's end.
    pub(crate) fn wait_end(mut self) -> Guest {
        let status = self.guest.qemu.wait().unwrap();
        assert!(status.success(), "{status}");
        self.guest
    }
}

fn sort_frames(mut socket: UnixStream, routes: &Routes, scanner: &Scanner) {
    let mut decoder = Decoder::from_guest();
    let mut buffer = vec![0; 64 * 1024];
    while let Ok(length @ 1..) = socket.read(&mut buffer) {
        let mut bytes = &buffer[..length];
        {
            let mut scanner = scanner.lock().unwrap();
            if let Some(mark) = &mut *scanner {
                let Some(end) = mark.scan(bytes) else {
                    continue;
                };
                *scanner = None;
                decoder = Decoder::from_guest();
                bytes = &bytes[end..];
            }
        }
        decoder.push(bytes);
        while let Some(frame) = decoder.next_frame().expect("the agent sends frames") {
            if let Some(route) = routes.lock().unwrap().get(&frame.stream) {
                let _ = route.send(frame);
            }
        }
    }
    routes.lock().unwrap().clear();
}

/// All that a process said.
#[derive(Debug)]
pub(crate) struct Output {
    pub(crate) stdout: Vec<u8>,
    pub(crate) stderr: Vec<u8>,
    pub(crate) outcome: Outcome,
}

impl Output {
    /// Standard output as text.
    pub(crate) fn text(&self) -> &str {
        std::str::from_utf8(&self.stdout).unwrap()
    }

    /// Checks that it ended well, and gives its standard output.
    #[track_caller]
    pub(crate) fn ok(&self) -> &str {
        assert_eq!(
            self.outcome,
            Outcome::Exited(ExitStatus::Code(0)),
            "{} {}",
            self.text(),
            String::from_utf8_lossy(&self.stderr)
        );
        self.text()
    }

    /// The failure that it must be.
    #[track_caller]
    pub(crate) fn failure(&self) -> &Failure {
        match &self.outcome {
            Outcome::Failed(failure) => failure,
            outcome => panic!("{outcome:?}"),
        }
    }
}

/// An open stream.
pub(crate) struct Stream {
    id: u32,
    receiver: Receiver<Frame>,
    socket: Arc<Mutex<UnixStream>>,
    send: SendWindow,
    receive: [ReceiveWindow; 3],
    early: VecDeque<Frame>,
}

impl Stream {
    fn send_frame(&self, frame: &Frame) {
        let mut bytes = Vec::new();
        frame.encode(&mut bytes);
        let _ = self.socket.lock().unwrap().write_all(&bytes);
    }

    /// The next frame that is not credit; credit for its data is given.
    pub(crate) fn next(&mut self) -> Frame {
        loop {
            let frame = match self.early.pop_front() {
                Some(frame) => frame,
                None => self
                    .receiver
                    .recv_timeout(LIMIT)
                    .expect("the agent answers"),
            };
            match frame.kind {
                FrameKind::Credit => self.send.credited(frame.parse_credit().unwrap()),
                FrameKind::Data => {
                    let window = &mut self.receive[frame.channel as usize];
                    window.received(frame.payload.len()).expect("flow control");
                    if let Some(credit) = window.taken(frame.payload.len()) {
                        self.send_frame(&Frame::credit(self.id, frame.channel, credit));
                    }
                    return frame;
                }
                _ => return frame,
            }
        }
    }

    /// Waits until the process has started.
    pub(crate) fn opened(&mut self) -> Opened {
        let frame = self.next();
        assert_eq!(
            frame.kind,
            FrameKind::Opened,
            "{}",
            String::from_utf8_lossy(&frame.payload)
        );
        frame.parse().unwrap()
    }

    /// Reads standard output until a text appears.
    pub(crate) fn expect(&mut self, text: &str) -> String {
        let mut all = String::new();
        while !all.contains(text) {
            let frame = self.next();
            match frame.kind {
                FrameKind::Data => all.push_str(&String::from_utf8_lossy(&frame.payload)),
                FrameKind::Closed => panic!(
                    "'{text}' did not come: {all} {:?}",
                    frame.parse::<Outcome>()
                ),
                _ => {}
            }
        }
        all
    }

    /// Sends input as credit allows, until the stream ends.
    pub(crate) fn write(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            while self.send.available() == 0 {
                let frame = self
                    .receiver
                    .recv_timeout(LIMIT)
                    .expect("the agent gives credit");
                match frame.kind {
                    FrameKind::Credit => self.send.credited(frame.parse_credit().unwrap()),
                    FrameKind::Closed => {
                        self.early.push_back(frame);
                        return;
                    }
                    _ => self.early.push_back(frame),
                }
            }
            let length = bytes.len().min(MAX_DATA_BYTES).min(self.send.available());
            let (now, later) = bytes.split_at(length);
            self.send.sent(length);
            self.send_frame(&Frame::data(self.id, Channel::Stdin, now.to_vec()));
            bytes = later;
        }
    }

    /// Ends the input.
    pub(crate) fn end_input(&self) {
        self.send_frame(&Frame::eof(self.id, Channel::Stdin));
    }

    /// Sends a control message.
    pub(crate) fn control(&self, control: Control) {
        self.send_frame(&Frame::message(FrameKind::Control, self.id, &control));
    }

    /// Abandons the stream.
    pub(crate) fn reset(&self) {
        self.send_frame(&Frame::new(FrameKind::Reset, self.id, Vec::new()));
    }

    /// Reads to the end.
    pub(crate) fn collect(&mut self) -> Output {
        let mut output = Output {
            stdout: Vec::new(),
            stderr: Vec::new(),
            outcome: Outcome::Done,
        };
        let mut ended = [false; 3];
        loop {
            let frame = self.next();
            let channel = frame.channel as usize;
            match (frame.kind, frame.channel) {
                (FrameKind::Data, _) if ended[channel] => panic!("data after the end"),
                (FrameKind::Data, Channel::Stdout) => output.stdout.extend(frame.payload),
                (FrameKind::Data, Channel::Stderr) => output.stderr.extend(frame.payload),
                (FrameKind::Eof, _) => ended[channel] = true,
                (FrameKind::Opened, _) => {}
                (FrameKind::Closed, _) => {
                    output.outcome = frame.parse().unwrap();
                    return output;
                }
                other => panic!("{other:?}"),
            }
        }
    }
}

/// Podman's default capabilities.
pub(crate) const CAPABILITIES: [&str; 11] = [
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_KILL",
    "CAP_NET_BIND_SERVICE",
    "CAP_SETFCAP",
    "CAP_SETGID",
    "CAP_SETPCAP",
    "CAP_SETUID",
    "CAP_SYS_CHROOT",
];

/// A process with Podman's default capabilities.
pub(crate) fn process(arguments: &[&str]) -> ProcessPlan {
    ProcessPlan {
        args: arguments.iter().map(|text| (*text).to_owned()).collect(),
        env: vec!["PATH=/bin".into()],
        capabilities: CAPABILITIES.iter().map(|name| (*name).to_owned()).collect(),
        ..ProcessPlan::default()
    }
}

/// A shell command.
pub(crate) fn shell(script: &str) -> ProcessPlan {
    process(&["sh", "-c", script])
}

/// An offline guest of this name.
pub(crate) fn identity(hostname: &str) -> GuestIdentity {
    GuestIdentity {
        hostname: hostname.into(),
        machine_id: "0123456789abcdef0123456789abcdef".into(),
        network: None,
        extra_hosts: Vec::new(),
    }
}

/// A plan around a process.
pub(crate) fn plan(process: ProcessPlan) -> GuestPlan {
    GuestPlan {
        identity: identity("lab"),
        realtime_ns: 1_800_000_000_000_000_000,
        read_only: false,
        privileged: false,
        process,
    }
}
