//! The memory server and real processes that register their memory with it, as hypervisors do.
//!
//! The clients are this program again (`client_process`), and so is a server that is killed
//! (`server_process`). They are told by lines what to do, and tell by lines what they found.

use std::io::{BufRead, BufReader, Lines, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, channel};
use std::thread::JoinHandle;
use std::time::Duration;

use fcvm_memory::page_file::{anonymous_file, seal};
use fcvm_memory::uffd::{
    Faults, GuestMemory, HUGE_PAGE_BYTES, MemorySource, Notice, Region, Server, ServerError,
    ServerEvent, ServerOptions, ServerWatch, Stopper, Summary, Userfault, WorkingSet, hand_over,
    handshake,
};
use fcvm_memory::{PAGE_BYTES, PageRun};
use rustix::event::{PollFd, PollFlags};
use rustix::process::{Pid, Resource, Rlimit, prlimit, setrlimit};

const PAGES: u64 = 2048;
const MEMORY_BYTES: u64 = PAGES * PAGE_BYTES;
const WORDS: u64 = PAGE_BYTES / 8;
/// Every third page is zero in the snapshot, and each word of another one is its number.
fn expected(page: u64, word: u64) -> u64 {
    if page.is_multiple_of(3) {
        0
    } else {
        page * WORDS + word + 1
    }
}

fn source(pages: u64) -> Arc<MemorySource> {
    let file = anonymous_file("fcvm-test", pages * PAGE_BYTES).unwrap();
    for page in (0..pages).filter(|page| expected(*page, 0) != 0) {
        let bytes: Vec<u8> = (0..WORDS)
            .flat_map(|word| expected(page, word).to_ne_bytes())
            .collect();
        file.write_all_at(&bytes, page * PAGE_BYTES).unwrap();
    }
    seal(&file).unwrap();
    Arc::new(MemorySource::new(&file).unwrap())
}

/// What happened in a server, without borrowing.
#[derive(Debug, PartialEq)]
enum Happened {
    Notice(Notice),
    Refused(String),
    Recorded(WorkingSet),
}

struct Running {
    directory: tempfile::TempDir,
    stopper: Stopper,
    events: Receiver<Happened>,
    thread: JoinHandle<Result<Summary, ServerError>>,
}

impl Running {
    fn start(options: ServerOptions) -> Self {
        Self::with_source(source(PAGES), options)
    }

    fn with_source(source: Arc<MemorySource>, options: ServerOptions) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let server = Server::bind(&directory.path().join("socket"), source, options).unwrap();
        let stopper = server.stopper();
        let (sender, events) = channel();
        let thread = std::thread::spawn(move || {
            server.run(|event| {
                let happened = match event {
                    ServerEvent::Notice(Notice::Refused { reason, .. }) => {
                        Happened::Refused(reason.clone())
                    }
                    ServerEvent::Notice(notice) => Happened::Notice(notice.clone()),
                    ServerEvent::Recorded(set) => Happened::Recorded(set.clone()),
                    _ => return,
                };
                let _ = sender.send(happened);
            })
        });
        Self {
            directory,
            stopper,
            events,
            thread,
        }
    }

    fn socket(&self) -> PathBuf {
        self.directory.path().join("socket")
    }

    fn next(&self) -> Happened {
        self.events.recv_timeout(Duration::from_secs(60)).unwrap()
    }

    /// The next end of a client: why, whether it is a failure, faults and prefetched pages.
    fn ended(&self) -> (i32, String, bool, fcvm_types::memory::PageServiceStatistics) {
        loop {
            if let Happened::Notice(Notice::Ended {
                pid,
                reason,
                is_failure,
                statistics,
            }) = self.next()
            {
                return (pid, reason, is_failure, *statistics);
            }
        }
    }

    fn stop(self) -> Summary {
        self.stopper.stop();
        self.thread.join().unwrap().unwrap()
    }
}

/// This program again, as something else. Killed when it is dropped.
struct Process {
    child: Child,
    input: ChildStdin,
    output: Lines<BufReader<ChildStdout>>,
}

impl Process {
    fn start(what: &str, socket: &Path, page_bytes: u64) -> Self {
        let variable = ("FCVM_TEST_PAGE_BYTES", page_bytes.to_string());
        Self::with(what, socket, [variable])
    }

    fn with(
        what: &str,
        socket: &Path,
        variables: impl IntoIterator<Item = (&'static str, String)>,
    ) -> Self {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--ignored", "--exact", what, "--nocapture"])
            .env("FCVM_TEST_SOCKET", socket)
            .envs(variables)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let input = child.stdin.take().unwrap();
        let output = BufReader::new(child.stdout.take().unwrap()).lines();
        Self {
            child,
            input,
            output,
        }
    }

    fn client(socket: &Path) -> Self {
        let mut client = Self::start("client_process", socket, PAGE_BYTES);
        assert_eq!(client.read(), "registered");
        client
    }

    fn read(&mut self) -> String {
        loop {
            let line = self.output.next().expect("the process ended").unwrap();
            // What is before it is of the test harness.
            if let Some((_, told)) = line.split_once("> ") {
                return told.to_owned();
            }
        }
    }

    fn tell(&mut self, line: &str) {
        writeln!(self.input, "{line}").unwrap();
    }

    fn ask(&mut self, line: &str) -> String {
        self.tell(line);
        self.read()
    }

    fn pid(&self) -> i32 {
        self.child.id().cast_signed()
    }

    fn end(mut self) {
        self.tell("end");
        self.child.wait().unwrap();
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn userfault() -> Option<Userfault> {
    let all = Userfault::create(Faults::All);
    all.or_else(|_| Userfault::create(Faults::OfUserMode)).ok()
}

fn is_possible() -> bool {
    let possible = userfault().is_some();
    if !possible {
        println!("skipped: this user may not use userfaultfd");
    }
    possible
}

/// A guest's memory in two mappings, in the other order than in the snapshot.
struct Guest {
    low: GuestMemory,
    high: GuestMemory,
}

impl Guest {
    fn new(page_bytes: u64) -> Self {
        let half = || GuestMemory::anonymous(half_bytes(page_bytes), page_bytes != PAGE_BYTES);
        Self {
            low: half().unwrap(),
            high: half().unwrap(),
        }
    }

    fn regions(&self, page_bytes: u64) -> [Region; 2] {
        let region = |memory: &GuestMemory, offset| Region {
            address: memory.address(),
            bytes: memory.bytes(),
            offset,
            page_bytes,
        };
        [region(&self.low, self.high.bytes()), region(&self.high, 0)]
    }

    /// The mapping and the offset in it of a page of the memory.
    fn page(&self, page: u64) -> (&GuestMemory, u64) {
        let offset = page * PAGE_BYTES;
        match offset.checked_sub(self.high.bytes()) {
            Some(offset) => (&self.low, offset),
            None => (&self.high, offset),
        }
    }

    fn check(&self, page: u64, content: impl Fn(u64) -> u64) {
        let (memory, offset) = self.page(page);
        for word in [0, 1, WORDS / 2, WORDS - 1] {
            let found = memory.word(offset + word * 8).load(Ordering::Relaxed);
            assert_eq!(found, content(word), "page {page}, word {word}");
        }
    }

    fn touch(&self, page: u64) -> u64 {
        let (memory, offset) = self.page(page);
        memory.word(offset + 8).load(Ordering::Relaxed)
    }
}

fn half_bytes(page_bytes: u64) -> u64 {
    if page_bytes == PAGE_BYTES {
        MEMORY_BYTES / 2
    } else {
        5 * HUGE_PAGE_BYTES
    }
}

/// Numbers that look random, the same each time (splitmix64).
struct Numbers(u64);

impl Numbers {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut number = self.0;
        number = (number ^ (number >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        number = (number ^ (number >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (number ^ (number >> 31)) % limit
    }
}

#[derive(Clone, Copy, PartialEq)]
enum Page {
    Snapshot,
    Zero,
    Written(u64),
}

/// A thread's random accesses: reads of what all share, and reads, writes and discards of its own quarter
/// of the rest, against what must be there.
fn exercise(guest: &Guest, thread: u64, unit: u64, pages: u64) {
    let units = pages / unit;
    let shared = units / 4;
    let own = (units - shared) / 4;
    let first = shared + thread * own;
    let mut model = vec![Page::Snapshot; own as usize];
    let mut numbers = Numbers(thread);
    let content = |page: u64, state: Page| {
        move |word: u64| match state {
            Page::Snapshot => expected(page, word),
            Page::Zero => 0,
            Page::Written(value) if word == 1 => value,
            Page::Written(_) => u64::MAX,
        }
    };
    for step in 0..4000_u64 {
        if unit == 1 || step % 4 == 0 {
            // The same for all threads, so that several wait for one page.
            let page = Numbers(step).below(shared * unit);
            guest.check(page, content(page, Page::Snapshot));
        }
        let index = numbers.below(own);
        let page = (first + index) * unit;
        let (memory, offset) = guest.page(page);
        match numbers.below(8) {
            0 => {
                let count = (1 + numbers.below(12)).min(own - index);
                // Not over the end of a mapping.
                let count = count.min((memory.bytes() - offset) / (unit * PAGE_BYTES));
                memory.discard(offset, count * unit * PAGE_BYTES).unwrap();
                model[index as usize..(index + count) as usize].fill(Page::Zero);
            }
            1 | 2 => {
                (0..WORDS).for_each(|word| {
                    let value = if word == 1 { step } else { u64::MAX };
                    memory
                        .word(offset + word * 8)
                        .store(value, Ordering::Relaxed);
                });
                model[index as usize] = Page::Written(step);
            }
            _ => guest.check(page, content(page, model[index as usize])),
        }
    }
}

/// What is asked of a client by a line; what it answers.
fn obey(guest: &Guest, page_bytes: u64, line: &str) -> String {
    let words: Vec<&str> = line.split(' ').collect();
    let number = |index: usize| words[index].parse::<u64>().unwrap();
    let pages = 2 * half_bytes(page_bytes) / PAGE_BYTES;
    match words[0] {
        "touch" => {
            let sum = (number(1)..number(2))
                .map(|page| guest.touch(page))
                .sum::<u64>();
            sum.to_string()
        }
        "exercise" => {
            std::thread::scope(|scope| {
                for thread in 0..4 {
                    scope.spawn(move || exercise(guest, thread, page_bytes / PAGE_BYTES, pages));
                }
            });
            "fine".to_owned()
        }
        // Asks for pages and gives them back for ever, on two threads.
        "storm" => {
            println!("> storming");
            std::thread::scope(|scope| {
                for thread in 0..2 {
                    scope.spawn(move || {
                        loop {
                            let first = thread * PAGES / 2;
                            (first..first + PAGES / 2).for_each(|page| {
                                let _ = guest.touch(page);
                            });
                            let (memory, offset) = guest.page(first);
                            memory.discard(offset, MEMORY_BYTES / 2).unwrap();
                        }
                    });
                }
            });
            unreachable!("the threads never end")
        }
        other => panic!("'{other}' is not understood"),
    }
}

#[test]
#[ignore = "the client of the other tests: a process of its own"]
fn client_process() {
    let Some(socket) = std::env::var_os("FCVM_TEST_SOCKET") else {
        return;
    };
    let page_bytes: u64 = std::env::var("FCVM_TEST_PAGE_BYTES")
        .unwrap()
        .parse()
        .unwrap();
    let guest = Guest::new(page_bytes);
    let userfault = userfault().unwrap();
    guest.low.register(&userfault).unwrap();
    guest.high.register(&userfault).unwrap();
    let connection = UnixStream::connect(socket).unwrap();
    handshake::send(&connection, &guest.regions(page_bytes), &userfault).unwrap();
    // As Firecracker does.
    drop(connection);
    println!("> registered");
    for line in std::io::stdin().lock().lines() {
        match line.unwrap().as_str() {
            "end" => std::process::exit(0),
            line => println!("> {}", obey(&guest, page_bytes, line)),
        }
    }
}

#[test]
#[ignore = "the server of the other tests: a process of its own"]
fn server_process() {
    let Some(socket) = std::env::var_os("FCVM_TEST_SOCKET") else {
        return;
    };
    if let Some(limit) = std::env::var_os("FCVM_TEST_DESCRIPTORS") {
        let limit = limit.to_str().unwrap().parse().ok();
        let (current, maximum) = (limit, limit);
        setrlimit(Resource::Nofile, Rlimit { current, maximum }).unwrap();
    }
    let options = ServerOptions::default();
    let server = Server::bind(Path::new(&socket), source(PAGES), options).unwrap();
    println!("> listening");
    server.run(|_| {}).unwrap();
}

/// Sum of a touched range, as a client tells it.
fn sum(pages: std::ops::Range<u64>) -> String {
    pages.map(|page| expected(page, 1)).sum::<u64>().to_string()
}

#[test]
fn a_connection_that_is_handed_over_is_the_processes_own() {
    if !is_possible() {
        return;
    }
    let server = Running::start(ServerOptions::default());
    let elsewhere = tempfile::tempdir().unwrap();
    let path = elsewhere.path().join("socket");
    let listener = UnixListener::bind(&path).unwrap();
    let mut client = Process::client(&path);
    let (connection, _) = listener.accept().unwrap();
    hand_over(&server.socket(), connection.as_fd()).unwrap();
    drop(connection);
    assert_eq!(client.ask("touch 0 100"), sum(0..100));
    let summary = Summary::ask(&server.socket()).unwrap();
    assert_eq!(summary.served.len(), 1);
    assert_eq!(summary.served[0].0, client.pid());
    client.end();
    // What is no connection, and what is none that it may be asked about.
    let file = tempfile::tempfile().unwrap();
    hand_over(&server.socket(), file.as_fd()).unwrap();
    let socket = UnixStream::connect(server.socket()).unwrap();
    handshake::send_message(&socket, b"{\"question\":\"watch\"}\n", &[file.as_fd()]).unwrap();
    let mut refused = 0;
    while refused < 2 {
        refused += usize::from(matches!(server.next(), Happened::Refused(_)));
    }
    assert_eq!(server.stop().ended_count, 1);
}

#[test]
fn several_clones_see_the_snapshot_and_what_they_did_to_it() {
    if !is_possible() {
        return;
    }
    let server = Running::start(ServerOptions::default());
    let mut clients = [(); 3].map(|()| Process::client(&server.socket()));
    clients
        .iter_mut()
        .for_each(|client| client.tell("exercise"));
    for client in &mut clients {
        assert_eq!(client.read(), "fine");
    }
    let summary = Summary::ask(&server.socket()).unwrap();
    let served: Vec<i32> = summary.served.iter().map(|(pid, _)| *pid).collect();
    assert_eq!(served.len(), 3);
    assert!(clients.iter().all(|client| served.contains(&client.pid())));
    clients.into_iter().for_each(Process::end);
    for _ in 0..3 {
        let (_, reason, is_failure, statistics) = server.ended();
        assert!(!is_failure, "{reason}");
        assert!(
            statistics.faults > 1000 && statistics.zero_faults > 300,
            "{statistics}"
        );
        assert!(statistics.removed_pages > 100, "{statistics}");
        assert_eq!(statistics.latency.count(), statistics.faults);
        let copied = statistics.faults - statistics.zero_faults - statistics.repeated_faults;
        assert_eq!(statistics.fault_bytes, copied * PAGE_BYTES);
    }
    let summary = server.stop();
    assert_eq!((summary.served.len(), summary.ended_count), (0, 3));
}

#[test]
fn hugepages_are_served_whole() {
    if !is_possible() {
        return;
    }
    let free = std::fs::read_to_string("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages");
    let free: u64 = free
        .ok()
        .and_then(|text| text.trim().parse().ok())
        .unwrap_or(0);
    if free < 10 {
        println!("skipped: the host has {free} free hugepages of 2 MiB, and the test needs 10");
        return;
    }
    let pages = 2 * half_bytes(HUGE_PAGE_BYTES) / PAGE_BYTES;
    let server = Running::with_source(source(pages), ServerOptions::default());
    let start = || {
        let mut client = Process::start("client_process", &server.socket(), HUGE_PAGE_BYTES);
        assert_eq!(client.read(), "registered");
        client
    };
    let mut client = start();
    assert_eq!(client.ask("touch 3 700"), sum(3..700));
    client.end();
    assert_eq!(server.ended().3.faults, 2);
    // What was recorded comes ahead, the rest when it is asked for.
    let mut client = start();
    let pid = client.pid();
    let prefetched = Happened::Notice(Notice::Prefetched { pid, pages: 1024 });
    while server.next() != prefetched {}
    assert_eq!(client.ask("exercise"), "fine");
    client.end();
    let (_, reason, is_failure, statistics) = server.ended();
    assert!(!is_failure, "{reason}");
    assert!(statistics.faults > 8, "{statistics}");
    server.stop();
}

#[test]
fn what_the_first_clone_asked_for_is_there_before_the_next_ones_ask() {
    if !is_possible() {
        return;
    }
    let server = Running::start(ServerOptions::default());
    let mut client = Process::client(&server.socket());
    assert_eq!(client.ask("touch 1500 1600"), sum(1500..1600));
    assert_eq!(client.ask("touch 100 400"), sum(100..400));
    assert_eq!(client.ask("touch 90 110"), sum(90..110));
    client.end();
    let started = server.next();
    assert!(matches!(started, Happened::Notice(Notice::Started { .. })));
    let Happened::Recorded(set) = server.next() else {
        panic!("nothing was recorded");
    };
    let runs = [(1500, 100), (100, 300), (90, 10)];
    let runs = runs.map(|(first, count)| PageRun { first, count });
    assert_eq!(set.runs(), runs);
    assert!(!set.is_complete(), "the clone ended before the window did");
    assert_eq!(server.ended().3.faults, 410);
    server.stop();

    // Another server of the snapshot, with what was kept; recording goes on for no time at all.
    let server = Running::start(ServerOptions {
        working_set: Some(set.clone()),
        record_window: Duration::ZERO,
        progress_period: Duration::ZERO,
        ..ServerOptions::default()
    });
    let watch = ServerWatch::connect(&server.socket());
    let mut watch = watch.unwrap();
    let mut client = Process::client(&server.socket());
    let pid = client.pid();
    let ahead_pages = 410;
    assert_eq!(
        watch.next().unwrap(),
        Some(Notice::Started { pid, ahead_pages })
    );
    // With each piece, in this server.
    let mut counts = Vec::new();
    let told = loop {
        match watch.next().unwrap() {
            Some(Notice::Prefetching { pages, .. }) => counts.push(pages),
            told => break told,
        }
    };
    assert!(counts.is_sorted() && counts.ends_with(&[410]), "{counts:?}");
    assert_eq!(told, Some(Notice::Prefetched { pid, pages: 410 }));
    assert_eq!(client.ask("touch 90 400"), sum(90..400));
    assert_eq!(client.ask("touch 1500 1605"), sum(1500..1605));
    client.end();
    let told = watch.next().unwrap();
    let Some(Notice::Ended { statistics, .. }) = told else {
        panic!("{told:?}");
    };
    assert_eq!((statistics.faults, statistics.prefetched_pages), (5, 410));
    let events: Vec<Happened> = server.events.try_iter().collect();
    let complete = events.iter().find_map(|event| match event {
        Happened::Recorded(set) => Some(set.is_complete()),
        _ => None,
    });
    assert_eq!(complete, Some(true));
    server.stop();
    assert_eq!(
        watch.next().unwrap(),
        None,
        "the watch ends with the server"
    );
}

#[test]
fn a_clone_that_is_killed_while_it_waits_disturbs_no_other() {
    if !is_possible() {
        return;
    }
    let server = Running::start(ServerOptions::default());
    let mut steady = Process::client(&server.socket());
    for _ in 0..8 {
        let mut storm = Process::client(&server.socket());
        assert_eq!(storm.ask("storm"), "storming");
        assert_eq!(steady.ask("touch 0 64"), sum(0..64));
        let pid = storm.pid();
        drop(storm);
        let (ended, reason, is_failure, _) = server.ended();
        assert_eq!((ended, is_failure), (pid, false), "{reason}");
        assert_eq!(reason, "it has ended");
    }
    assert_eq!(steady.ask("touch 0 2048"), sum(0..PAGES));
    steady.end();
    server.stop();
}

#[test]
fn a_server_that_stops_kills_its_clones() {
    if !is_possible() {
        return;
    }
    let server = Running::start(ServerOptions::default());
    let mut client = Process::client(&server.socket());
    assert_eq!(client.ask("touch 0 8"), sum(0..8));
    let mut storm = Process::client(&server.socket());
    assert_eq!(storm.ask("storm"), "storming");
    let summary = server.stop();
    assert_eq!((summary.served.len(), summary.ended_count), (0, 2));
    for process in [&mut client, &mut storm] {
        assert_eq!(process.child.wait().unwrap().signal(), Some(9));
    }
}

#[test]
fn a_server_that_is_killed_is_noticed() {
    if !is_possible() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("socket");
    let mut server = Process::start("server_process", &socket, PAGE_BYTES);
    assert_eq!(server.read(), "listening");
    let mut watch = ServerWatch::connect(&socket).unwrap();
    let mut client = Process::client(&socket);
    assert_eq!(client.ask("touch 0 8"), sum(0..8));
    let pid = client.pid();
    let ahead_pages = 0;
    assert_eq!(
        watch.next().unwrap(),
        Some(Notice::Started { pid, ahead_pages })
    );
    // In a state that no page comes from any more, the client asks for one.
    server.child.kill().unwrap();
    assert_eq!(watch.next().unwrap(), None);
    client.tell("touch 100 108");
    client.child.kill().unwrap();
    client.child.wait().unwrap();
    // Another one takes the place of the dead one's socket.
    assert!(ServerWatch::connect(&socket).is_err());
    let mut server = Process::start("server_process", &socket, PAGE_BYTES);
    assert_eq!(server.read(), "listening");
    let busy = Server::bind(&socket, source(1), ServerOptions::default());
    assert!(matches!(busy, Err(ServerError::Busy(_))));
    let mut client = Process::client(&socket);
    assert_eq!(client.ask("touch 100 108"), sum(100..108));
}

#[test]
fn a_server_can_end_with_its_last_clone() {
    if !is_possible() {
        return;
    }
    let server = Running::start(ServerOptions {
        idle_limit: Some(Duration::from_secs(3600)),
        name: "a snapshot".to_owned(),
        ..ServerOptions::default()
    });
    // A question is no clone.
    let expected = Summary {
        name: "a snapshot".to_owned(),
        ..Summary::default()
    };
    assert_eq!(Summary::ask(&server.socket()).unwrap(), expected);
    let first = Process::client(&server.socket());
    let mut second = Process::client(&server.socket());
    first.end();
    server.ended();
    assert_eq!(second.ask("touch 0 8"), sum(0..8));
    second.end();
    let socket = server.socket();
    assert_eq!(server.thread.join().unwrap().unwrap().ended_count, 2);
    assert!(!socket.exists());
}

#[test]
fn nonsense_is_refused_and_the_server_goes_on() {
    if !is_possible() {
        return;
    }
    let server = Running::start(ServerOptions::default());
    let socket = server.socket();
    let file = tempfile::tempfile().unwrap();
    let refused = |message: &[u8], descriptors: usize| {
        let connection = UnixStream::connect(&socket).unwrap();
        if message.is_empty() {
            drop(connection);
        } else {
            let descriptors = vec![file.as_fd(); descriptors];
            handshake::send_message(&connection, message, &descriptors).unwrap();
        }
        match server.next() {
            Happened::Refused(reason) => reason,
            other => panic!("{other:?}"),
        }
    };
    assert!(refused(b"", 0).contains("closed before"));
    assert!(refused(b"hello", 0).contains("carries 0 descriptors"));
    assert!(refused(b"{}", 2).contains("carries 2 descriptors"));
    assert!(refused(b"{}", 16).contains("more than 4, or"));
    assert!(refused(&vec![b'['; handshake::MESSAGE_BYTES_MAX + 1], 0).contains("longer"));
    // Who asks what is not understood hears the end of the connection.
    let mut connection = UnixStream::connect(&socket).unwrap();
    connection.write_all(b"{\"question\":\"why\"}").unwrap();
    assert_eq!(BufReader::new(connection).lines().count(), 0);

    let mut client = Process::client(&socket);
    assert_eq!(client.ask("touch 0 8"), sum(0..8));
    client.end();
    server.stop();
}

#[test]
fn a_process_that_sends_a_descriptor_and_cannot_be_served_is_killed() {
    if !is_possible() {
        return;
    }
    // Its regions are not the memory of this snapshot: it would wait for its first page for ever.
    let server = Running::with_source(source(PAGES / 2), ServerOptions::default());
    let mut client = Process::start("client_process", &server.socket(), PAGE_BYTES);
    let (pid, reason, is_failure, _) = server.ended();
    assert_eq!((pid, is_failure), (client.pid(), true));
    assert!(reason.contains("ends behind the memory"), "{reason}");
    assert!(!client.child.wait().unwrap().success());
    server.stop();
}

#[test]
#[ignore = "a hypervisor of another test, which sends nonsense: a process of its own"]
fn nonsense_process() {
    let Some(socket) = std::env::var_os("FCVM_TEST_SOCKET") else {
        return;
    };
    let variable = |name| std::env::var(name).unwrap().parse::<usize>().unwrap();
    let message = vec![b'['; variable("FCVM_TEST_MESSAGE_BYTES")];
    let file = tempfile::tempfile().unwrap();
    let descriptors = vec![file.as_fd(); variable("FCVM_TEST_DESCRIPTORS")];
    let connection = UnixStream::connect(socket).unwrap();
    handshake::send_message(&connection, &message, &descriptors).unwrap();
    let _ = std::io::stdin().read_line(&mut String::new());
}

#[test]
fn whoever_sends_descriptors_and_nonsense_is_killed() {
    let server = Running::start(ServerOptions::default());
    for (bytes, descriptors, told) in [
        (2, 1, "no list of regions"),
        (2, 2, "carries 2 descriptors"),
        (2, 16, "more than 4, or"),
        (handshake::MESSAGE_BYTES_MAX + 1, 1, "longer"),
    ] {
        let variables = [
            ("FCVM_TEST_MESSAGE_BYTES", bytes.to_string()),
            ("FCVM_TEST_DESCRIPTORS", descriptors.to_string()),
        ];
        let mut process = Process::with("nonsense_process", &server.socket(), variables);
        let (pid, reason, is_failure, _) = server.ended();
        assert_eq!((pid, is_failure), (process.pid(), true));
        assert!(reason.contains(told), "{reason}");
        assert_eq!(process.child.wait().unwrap().signal(), Some(9));
    }
    server.stop();
}

/// A server in a process of its own with room for few, one who watches all, and a client.
fn small_server(socket: &Path, descriptors: u32) -> Option<(Process, ServerWatch, Process)> {
    is_possible().then(|| {
        let variable = [("FCVM_TEST_DESCRIPTORS", descriptors.to_string())];
        let mut server = Process::with("server_process", socket, variable);
        assert_eq!(server.read(), "listening");
        let watch = ServerWatch::connect(socket).unwrap();
        let mut client = Process::client(socket);
        assert_eq!(client.ask("touch 0 8"), sum(0..8));
        (server, watch, client)
    })
}

/// Has more connect than there is room for: who finds none is told, and the client goes on. Returns when all have
/// left.
fn crowd(socket: &Path, count: usize, mut watch: ServerWatch, mut client: Process) {
    let crowd: Vec<UnixStream> = (0..count)
        .map(|_| UnixStream::connect(socket).unwrap())
        .collect();
    // Which of them that are is the server's: what it has begun to hear ends early too where nothing is left for it.
    let mut silent: Vec<&UnixStream> = crowd.iter().collect();
    let mut is_told = false;
    while !is_told {
        let mut polled: Vec<PollFd> = silent
            .iter()
            .map(|stream| PollFd::new(*stream, PollFlags::IN))
            .collect();
        rustix::event::poll(&mut polled, None).unwrap();
        let is_silent: Vec<bool> = polled.iter().map(|one| one.revents().is_empty()).collect();
        let mut is_silent = is_silent.into_iter();
        silent.retain(|stream| {
            let is_silent = is_silent.next().unwrap();
            if !is_silent {
                let mut told = String::new();
                BufReader::new(*stream).read_line(&mut told).unwrap();
                assert!(told.contains("refused"), "{told}");
                is_told |= told.contains("has no room");
            }
            is_silent
        });
        assert!(is_told || !silent.is_empty(), "nobody was told");
    }
    assert_eq!(client.ask("touch 100 200"), sum(100..200));
    drop(crowd);
    let mut refused = 0;
    while refused < count {
        let notice = watch.next().unwrap();
        refused += usize::from(matches!(notice, Some(Notice::Refused { .. })));
    }
}

fn has_room(socket: &Path) {
    let mut client = Process::client(socket);
    assert_eq!(client.ask("touch 0 8"), sum(0..8));
}

#[test]
fn a_server_without_descriptors_refuses_who_comes_and_serves_on() {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("socket");
    if let Some((_server, watch, client)) = small_server(&socket, 64) {
        crowd(&socket, 64, watch, client);
        has_room(&socket);
    }
}

#[test]
fn a_server_without_threads_refuses_who_comes_and_serves_on() {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("socket");
    let Some((server, watch, client)) = small_server(&socket, 512) else {
        return;
    };
    // No stack fits any more, but for those of threads that have ended.
    let status = std::fs::read_to_string(format!("/proc/{}/status", server.pid())).unwrap();
    let size = status
        .lines()
        .find_map(|line| line.strip_prefix("VmSize:")?.strip_suffix("kB"));
    let current = Some((size.unwrap().trim().parse::<u64>().unwrap() << 10) + (1 << 20));
    let limit_to = |current| {
        let maximum = None;
        let pid = Pid::from_raw(server.pid());
        prlimit(pid, Resource::As, Rlimit { current, maximum }).unwrap();
    };
    limit_to(current);
    crowd(&socket, 32, watch, client);
    limit_to(None);
    has_room(&socket);
}

#[test]
fn who_watches_one_process_is_told_of_that_alone() {
    if !is_possible() {
        return;
    }
    let server = Running::start(ServerOptions::default());
    let mut all = ServerWatch::connect(&server.socket()).unwrap();
    // A client that waits until it is watched.
    let elsewhere = tempfile::tempdir().unwrap();
    let listener = UnixListener::bind(elsewhere.path().join("socket")).unwrap();
    let mut client = Process::client(&elsewhere.path().join("socket"));
    let (connection, _) = listener.accept().unwrap();
    let pid = client.pid();
    let mut one = ServerWatch::connect_for(&server.socket(), pid).unwrap();
    // More notices than who does not read has room for.
    for _ in 0..1000 {
        drop(UnixStream::connect(server.socket()).unwrap());
        while !matches!(server.next(), Happened::Refused(_)) {}
    }
    hand_over(&server.socket(), connection.as_fd()).unwrap();
    assert_eq!(client.ask("touch 0 8"), sum(0..8));
    let ahead_pages = 0;
    assert_eq!(
        one.next().unwrap(),
        Some(Notice::Started { pid, ahead_pages })
    );
    client.end();
    let told = one.next().unwrap();
    assert!(matches!(told, Some(Notice::Ended { .. })), "{told:?}");
    assert_eq!(one.next().unwrap(), None, "nothing can follow");
    while let Some(notice) = all.next().unwrap() {
        assert!(matches!(notice, Notice::Refused { .. }), "{notice:?}");
    }
    server.stop();
}

#[test]
fn a_server_that_may_end_waits_for_who_watches() {
    if !is_possible() {
        return;
    }
    let start = |limit| {
        Running::start(ServerOptions {
            idle_limit: Some(limit),
            ..ServerOptions::default()
        })
    };
    let server = start(Duration::from_secs(3600));
    let this = std::process::id().cast_signed();
    let watch = ServerWatch::connect_for(&server.socket(), this).unwrap();
    for count in 1..3 {
        Process::client(&server.socket()).end();
        server.ended();
        let summary = Summary::ask(&server.socket()).unwrap();
        assert_eq!(summary.ended_count, count);
    }
    drop(watch);
    assert_eq!(server.thread.join().unwrap().unwrap().ended_count, 2);
    // One whose command ended before a clone was there, and one to which nobody comes.
    let server = start(Duration::from_secs(3600));
    drop(ServerWatch::connect_for(&server.socket(), this).unwrap());
    server.thread.join().unwrap().unwrap();
    let server = start(Duration::ZERO);
    server.thread.join().unwrap().unwrap();
}

#[test]
fn who_asks_and_does_not_read_holds_up_nobody() {
    let server = Running::start(ServerOptions {
        // More than a socket holds.
        name: "x".repeat(4 << 20),
        ..ServerOptions::default()
    });
    let mut silent = UnixStream::connect(server.socket()).unwrap();
    silent
        .write_all(b"{\"question\":\"statistics\"}\n")
        .unwrap();
    let summary = Summary::ask(&server.socket()).unwrap();
    assert_eq!(summary.name.len(), 4 << 20);
    server.stop();
}

#[test]
fn memory_that_can_change_is_not_served() {
    let file = anonymous_file("fcvm-test", MEMORY_BYTES).unwrap();
    assert!(
        MemorySource::new(&file)
            .unwrap_err()
            .to_string()
            .contains("sealed")
    );
    let odd = anonymous_file("fcvm-test", 5000).unwrap();
    seal(&odd).unwrap();
    assert!(
        MemorySource::new(&odd)
            .unwrap_err()
            .to_string()
            .contains("5000 bytes")
    );
}
