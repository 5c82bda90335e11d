//! The memory server without any VM: processes that register memory as a hypervisor does and touch every
//! page of it, against a bare loop of UFFDIO_COPY and against a copy-on-write view of the same file.
//!
//! A client is this program again. It measures how long each touch takes; what the server's thread takes
//! of a processor is the kernel's count of it (/proc/PID/task/TID/schedstat).

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use fcvm_memory::PAGE_BYTES;
use fcvm_memory::page_file::{anonymous_file, seal};
use fcvm_memory::uffd::{
    Faults, GuestMemory, HUGE_PAGE_BYTES, MemorySource, Notice, Region, Server, ServerError,
    ServerEvent, ServerOptions, Stopper, Summary, Userfault, WorkingSet, handshake,
};
use fcvm_types::memory::PageServiceStatistics;
use serde::{Deserialize, Serialize};

use crate::report::{Measure, Report, Samples, Target};

/// First argument of this program when it is a client.
pub(crate) const CHILD: &str = "uffd-client";
/// Memory of a client.
const MEMORY_BYTES: u64 = 128 << 20;
const PAGES: u64 = MEMORY_BYTES / PAGE_BYTES;
/// Clients whose memory is weighed.
const CLIENTS: usize = 10;
/// Of the memory of those: what they read, and what they write of that.
const READ_PAGES: u64 = PAGES / 4;
const WRITTEN_PAGES: u64 = PAGES / 16;
/// Faults a second of one processor.
const FAULTS_WANTED: f64 = 200_000.0;
/// A page is touched at an odd place within this many pages of its turn: no reading ahead helps.
const STRIDE: u64 = 4099;

/// What a client is told to do, a line of JSON each.
#[derive(Serialize, Deserialize)]
enum Order {
    /// Touch a part of the pages in an order without neighbours, on so many threads.
    Touch { pages: u64, threads: u64 },
    /// Write to the first pages.
    Write { pages: u64 },
}

/// How its memory comes to be there.
#[derive(Serialize, Deserialize)]
enum Backing {
    /// From the server at this socket.
    Server { socket: PathBuf, page_bytes: u64 },
    /// As a view of this file.
    File { path: PathBuf },
    /// By itself: a loop of UFFDIO_COPY over all pages of such memory.
    Bare { page_bytes: u64 },
}

/// What a client measured.
#[derive(Clone, Copy, Default, Serialize, Deserialize)]
struct Touched {
    seconds: f64,
    p50_us: f64,
    p99_us: f64,
}

pub(crate) fn measure(rounds: usize, report: &mut Report) -> anyhow::Result<()> {
    if let Err(error) = Userfault::create(Faults::All) {
        report.skip(format!("uffd: this user may not use userfaultfd: {error}"));
        return Ok(());
    }
    let memory = memory()?;
    measure_faults(&memory, rounds, report)?;
    measure_huge(&memory, rounds, report)?;
    measure_prefetch(&memory, rounds, report)?;
    measure_weight(&memory, report)
}

/// A memory in which no page is zero and no two are the same.
fn memory() -> anyhow::Result<File> {
    let file = anonymous_file("fcvm-guest-memory", MEMORY_BYTES)?;
    for page in 0..PAGES {
        let bytes = (page + 1).to_ne_bytes().repeat(PAGE_BYTES as usize / 8);
        file.write_all_at(&bytes, page * PAGE_BYTES)?;
    }
    seal(&file)?;
    Ok(file)
}

/// Faults a second and how long they take, 4 KiB pages.
fn measure_faults(memory: &File, rounds: usize, report: &mut Report) -> anyhow::Result<()> {
    let bare = Backing::Bare {
        page_bytes: PAGE_BYTES,
    };
    for threads in [1, 8] {
        let mut samples: [Vec<f64>; 7] = Default::default();
        for round in 0..=rounds {
            eprintln!("uffd: faults of {threads} threads, round {round} of {rounds}");
            let (served, statistics, cpu_seconds) = served(memory, PAGE_BYTES, threads)?;
            let floor = Client::start(&bare)?.first;
            if round == 0 {
                continue;
            }
            let viewed = viewed(memory, threads)?;
            let values = [
                PAGES as f64 / cpu_seconds,
                PAGES as f64 / served.seconds,
                PAGES as f64 / floor.seconds,
                served.p50_us,
                served.p99_us,
                statistics.latency.quantile_ns(0.99) as f64 / 1000.0,
                viewed.p50_us,
            ];
            samples
                .iter_mut()
                .zip(values)
                .for_each(|(all, value)| all.push(value));
        }
        let [of_cpu, of_wall, floor, p50, p99, service, viewed] = samples;
        let name = |what: &str| format!("uffd, {threads} threads wait, {what}");
        let floor = Samples::new("bare UFFDIO_COPY loop, per core", floor);
        let per_core = Measure::new("uffd", "1/s", Samples::new(name("faults per core"), of_cpu));
        report.add(
            per_core
                .against(floor.clone())
                .target(Target::AtLeast(FAULTS_WANTED)),
        );
        let wall = Samples::new(name("faults by the clock"), of_wall);
        report.add(Measure::new("uffd", "1/s", wall));
        let p50 = Measure::new("uffd", "us", Samples::new(name("a touch, p50"), p50));
        report.add(p50.against(Samples::new("view of the file", viewed)));
        report.add(Measure::new(
            "uffd",
            "us",
            Samples::new(name("a touch, p99"), p99),
        ));
        let service = Samples::new(name("the server's part, p99"), service);
        report.add(Measure::new("uffd", "us", service));
    }
    Ok(())
}

/// The same of 2 MiB pages.
fn measure_huge(memory: &File, rounds: usize, report: &mut Report) -> anyhow::Result<()> {
    let free = std::fs::read_to_string("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages");
    let free: u64 = free
        .ok()
        .and_then(|text| text.trim().parse().ok())
        .unwrap_or(0);
    let wanted = MEMORY_BYTES / HUGE_PAGE_BYTES;
    if free < wanted {
        report.skip(format!("uffd, 2 MiB pages: {free} hugepages are free, and {wanted} are needed (sysctl vm.nr_hugepages)"));
        return Ok(());
    }
    let (mut ours, mut floor) = (Vec::new(), Vec::new());
    let bare = Backing::Bare {
        page_bytes: HUGE_PAGE_BYTES,
    };
    for _ in 0..rounds {
        let (_, _, cpu_seconds) = served(memory, HUGE_PAGE_BYTES, 1)?;
        ours.push(MEMORY_BYTES as f64 / 1e6 / cpu_seconds);
        floor.push(MEMORY_BYTES as f64 / 1e6 / Client::start(&bare)?.first.seconds);
    }
    let ours = Samples::new("uffd, 2 MiB pages, per core", ours);
    let floor = Samples::new("bare UFFDIO_COPY loop, per core", floor);
    report.add(Measure::new("uffd", "MB/s", ours).against(floor));
    Ok(())
}

/// A clone that touches half of its memory, with and without its pages brought ahead.
fn measure_prefetch(memory: &File, rounds: usize, report: &mut Report) -> anyhow::Result<()> {
    let order = Order::Touch {
        pages: PAGES / 2,
        threads: 1,
    };
    let (mut with, mut without, mut brought) = (Vec::new(), Vec::new(), Vec::new());
    let (mut faults, mut faults_before) = (Vec::new(), Vec::new());
    for _ in 0..rounds {
        let server = Running::start(memory, None)?;
        let mut client = Client::of(&server)?;
        without.push(client.ask(&order)?.seconds * 1e3);
        client.end()?;
        let (statistics, set) = server.ended()?;
        faults_before.push(statistics.faults as f64);
        server.stop()?;
        let server = Running::start(memory, Some(set.context("nothing was recorded")?))?;
        let mut client = Client::of(&server)?;
        server.wait_prefetched()?;
        with.push(client.ask(&order)?.seconds * 1e3);
        client.end()?;
        let (statistics, _) = server.ended()?;
        faults.push(statistics.faults as f64);
        brought.push(statistics.prefetched_pages as f64 / statistics.prefetch_us as f64 * 1e6);
        server.stop()?;
    }
    let with = Measure::new(
        "uffd",
        "ms",
        Samples::new("uffd, 16,384 pages, brought ahead", with),
    );
    report.add(with.against(Samples::new("asked for one by one", without)));
    let faults = Samples::new("uffd, faults of a clone with its set brought ahead", faults);
    let before = Samples::new("while it was recorded", faults_before);
    let faults = Measure::new("uffd", "", faults).against(before);
    report.add(faults.target(Target::Ratio(0.1)));
    report.add(Measure::new(
        "uffd",
        "1/s",
        Samples::new("uffd, pages brought ahead", brought),
    ));
    Ok(())
}

/// What clients weigh, by what backs their memory.
fn measure_weight(memory: &File, report: &mut Report) -> anyhow::Result<()> {
    let server = Running::start(memory, None)?;
    let weigh = |start: &dyn Fn() -> anyhow::Result<Client>| -> anyhow::Result<Vec<f64>> {
        let mut clients = Vec::new();
        for _ in 0..CLIENTS {
            let mut client = start()?;
            client.ask(&Order::Touch {
                pages: READ_PAGES,
                threads: 1,
            })?;
            client.ask(&Order::Write {
                pages: WRITTEN_PAGES,
            })?;
            clients.push(client);
        }
        let weights = clients.iter().map(|client| {
            let usage = fcvm_memory::usage(client.child.id().cast_signed())?;
            Ok(usage.pss_bytes as f64 / 1e6)
        });
        weights.collect()
    };
    let served = weigh(&|| Client::of(&server))?;
    server.stop()?;
    let path = path_of(memory);
    let viewed = weigh(&|| Client::start(&Backing::File { path: path.clone() }))?;
    let name = format!(
        "uffd, PSS of each of {CLIENTS} clients: {} MiB read, {} MiB written",
        READ_PAGES >> 8,
        WRITTEN_PAGES >> 8
    );
    let served = Measure::new("uffd", "MB", Samples::new(name, served));
    report.add(served.against(Samples::new("views of the file", viewed)));
    Ok(())
}

/// A client of a server that touches all of its memory: what it and the server counted, and what the
/// server's thread took of a processor, in seconds.
fn served(
    memory: &File,
    page_bytes: u64,
    threads: u64,
) -> anyhow::Result<(Touched, PageServiceStatistics, f64)> {
    let server = Running::start(memory, None)?;
    let mut client = Client::start(&Backing::Server {
        socket: server.socket(),
        page_bytes,
    })?;
    let touched = client.ask(&Order::Touch {
        pages: PAGES,
        threads,
    })?;
    let cpu_seconds = cpu_seconds_of(&format!("clone-{}", client.child.id()))?;
    client.end()?;
    let (statistics, _) = server.ended()?;
    server.stop()?;
    Ok((touched, statistics, cpu_seconds))
}

fn viewed(memory: &File, threads: u64) -> anyhow::Result<Touched> {
    let path = path_of(memory);
    let mut client = Client::start(&Backing::File { path })?;
    client.ask(&Order::Touch {
        pages: PAGES,
        threads,
    })
}

fn path_of(file: &File) -> PathBuf {
    format!("/proc/{}/fd/{}", std::process::id(), file.as_raw_fd()).into()
}

/// What a thread of this process has taken of a processor.
fn cpu_seconds_of(name: &str) -> anyhow::Result<f64> {
    for task in std::fs::read_dir("/proc/self/task")? {
        let task = task?.path();
        if std::fs::read_to_string(task.join("comm"))?.trim() == name {
            return cpu_seconds(&task);
        }
    }
    bail!("no thread is called {name}")
}

fn cpu_seconds(task: &Path) -> anyhow::Result<f64> {
    let text = std::fs::read_to_string(task.join("schedstat"))?;
    let nanoseconds = text.split(' ').next().and_then(|text| text.parse().ok());
    let nanoseconds: f64 = nanoseconds.context("the kernel counts no time of threads")?;
    Ok(nanoseconds / 1e9)
}

/// What a server has told.
enum Told {
    Prefetched,
    Recorded(WorkingSet),
    Ended(Box<PageServiceStatistics>),
}

/// A server in a thread of this process.
struct Running {
    directory: tempfile::TempDir,
    stopper: Stopper,
    told: Receiver<Told>,
    thread: JoinHandle<Result<Summary, ServerError>>,
}

impl Running {
    fn start(memory: &File, working_set: Option<WorkingSet>) -> anyhow::Result<Self> {
        let directory = tempfile::tempdir()?;
        let source = Arc::new(MemorySource::new(memory)?);
        let options = ServerOptions {
            working_set,
            record_window: Duration::from_secs(3600),
            ..ServerOptions::default()
        };
        let server = Server::bind(&directory.path().join("socket"), source, options)?;
        let stopper = server.stopper();
        let (sender, told) = channel();
        let thread = std::thread::spawn(move || {
            server.run(|event| {
                let happened = match event {
                    ServerEvent::Notice(Notice::Prefetched { .. }) => Told::Prefetched,
                    ServerEvent::Notice(Notice::Ended { statistics, .. }) => {
                        Told::Ended(statistics.clone())
                    }
                    ServerEvent::Recorded(set) => Told::Recorded(set.clone()),
                    _ => return,
                };
                // The bench has ended in between.
                let _ = sender.send(happened);
            })
        });
        Ok(Self {
            directory,
            stopper,
            told,
            thread,
        })
    }

    fn socket(&self) -> PathBuf {
        self.directory.path().join("socket")
    }

    /// The end of a client, and what was recorded of it.
    fn ended(&self) -> anyhow::Result<(PageServiceStatistics, Option<WorkingSet>)> {
        let mut recorded = None;
        loop {
            match self.told.recv()? {
                Told::Ended(statistics) => return Ok((*statistics, recorded)),
                Told::Recorded(set) => recorded = Some(set),
                Told::Prefetched => {}
            }
        }
    }

    fn wait_prefetched(&self) -> anyhow::Result<()> {
        while !matches!(self.told.recv()?, Told::Prefetched) {}
        Ok(())
    }

    fn stop(self) -> anyhow::Result<()> {
        self.stopper.stop();
        self.thread.join().ok().context("the server failed")??;
        Ok(())
    }
}

/// A client process. Killed when it is dropped.
struct Client {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
    /// What it measured while it started.
    first: Touched,
}

impl Client {
    fn start(backing: &Backing) -> anyhow::Result<Self> {
        let mut child = Command::new(std::env::current_exe()?)
            .args([CHILD, &serde_json::to_string(backing)?])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let input = child.stdin.take().context("no input")?;
        let output = BufReader::new(child.stdout.take().context("no output")?);
        let mut own = Self {
            child,
            input,
            output,
            first: Touched::default(),
        };
        own.first = own.read()?;
        Ok(own)
    }

    fn of(server: &Running) -> anyhow::Result<Self> {
        Self::start(&Backing::Server {
            socket: server.socket(),
            page_bytes: PAGE_BYTES,
        })
    }

    fn read(&mut self) -> anyhow::Result<Touched> {
        let mut line = String::new();
        self.output.read_line(&mut line)?;
        serde_json::from_str(&line).context("a client failed")
    }

    fn ask(&mut self, order: &Order) -> anyhow::Result<Touched> {
        writeln!(self.input, "{}", serde_json::to_string(order)?)?;
        self.read()
    }

    fn end(mut self) -> anyhow::Result<()> {
        self.child.kill()?;
        self.child.wait()?;
        Ok(())
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The client: this process.
pub(crate) fn client(backing: &str) -> anyhow::Result<()> {
    let (memory, first) = match serde_json::from_str(backing)? {
        Backing::Bare { page_bytes } => (None, bare(page_bytes)?),
        Backing::File { path } => {
            let memory = GuestMemory::of_file(&File::open(path)?)?;
            (Some(memory), Touched::default())
        }
        Backing::Server { socket, page_bytes } => {
            (Some(registered(&socket, page_bytes)?), Touched::default())
        }
    };
    println!("{}", serde_json::to_string(&first)?);
    let Some(memory) = memory else {
        return Ok(());
    };
    for line in std::io::stdin().lock().lines() {
        let done = match serde_json::from_str(&line?)? {
            Order::Touch { pages, threads } => touch(&memory, pages, threads)?,
            Order::Write { pages } => {
                for page in 0..pages {
                    memory
                        .word(page * PAGE_BYTES + 8)
                        .store(page, Ordering::Relaxed);
                }
                Touched::default()
            }
        };
        println!("{}", serde_json::to_string(&done)?);
    }
    Ok(())
}

/// Memory of which the server of a socket is told. The server has the userfaultfd.
fn registered(socket: &Path, page_bytes: u64) -> anyhow::Result<GuestMemory> {
    let memory = GuestMemory::anonymous(MEMORY_BYTES, page_bytes != PAGE_BYTES)?;
    let userfault = Userfault::create(Faults::All)?;
    memory.register(&userfault)?;
    let region = Region {
        address: memory.address(),
        bytes: memory.bytes(),
        offset: 0,
        page_bytes,
    };
    handshake::send(&UnixStream::connect(socket)?, &[region], &userfault)?;
    Ok(memory)
}

/// Fills all pages of registered memory for which nobody waits. The seconds are of the processor.
fn bare(page_bytes: u64) -> anyhow::Result<Touched> {
    let memory = GuestMemory::anonymous(MEMORY_BYTES, page_bytes != PAGE_BYTES)?;
    let userfault = Userfault::create(Faults::All)?;
    memory.register(&userfault)?;
    let source = vec![1; MEMORY_BYTES as usize];
    let task = Path::new("/proc/thread-self");
    let before = cpu_seconds(task)?;
    for (index, page) in source.chunks(page_bytes as usize).enumerate() {
        userfault.fill(memory.address() + index as u64 * page_bytes, page)?;
    }
    Ok(Touched {
        seconds: cpu_seconds(task)? - before,
        ..Touched::default()
    })
}

fn touch(memory: &GuestMemory, pages: u64, threads: u64) -> anyhow::Result<Touched> {
    let started = Instant::now();
    let times = std::thread::scope(|scope| -> anyhow::Result<Vec<f64>> {
        let thread = |thread: u64| {
            let mut times = Vec::with_capacity((pages / threads) as usize);
            for turn in (thread..pages).step_by(threads as usize) {
                let page = turn * STRIDE % PAGES;
                let started = Instant::now();
                let found = memory.word(page * PAGE_BYTES).load(Ordering::Relaxed);
                times.push(started.elapsed().as_secs_f64() * 1e6);
                assert_eq!(found, page + 1, "a page is another one's");
            }
            times
        };
        let running: Vec<_> = (0..threads)
            .map(|number| scope.spawn(move || thread(number)))
            .collect();
        let mut times = Vec::new();
        for one in running {
            times.extend(one.join().ok().context("a thread failed")?);
        }
        Ok(times)
    })?;
    let seconds = started.elapsed().as_secs_f64();
    let mut sorted = times;
    sorted.sort_by(f64::total_cmp);
    Ok(Touched {
        seconds,
        p50_us: sorted[sorted.len() / 2],
        p99_us: sorted[sorted.len() * 99 / 100],
    })
}
