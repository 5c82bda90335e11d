//! What the agent costs: processor time and wall time from its first line to the container's first
//! output, a session's round trip, throughput, memory. Prints a table; compares nothing.
//!
//! Processor time is that of the hypervisor's process, all threads: it tells the same on a loaded
//! machine. With the argument `sessions` no boots are measured. Needs what the tests in tests/guest need.

#[allow(dead_code)]
#[path = "../tests/guest/client.rs"]
mod client;
#[allow(dead_code)]
#[path = "../tests/guest/lab.rs"]
mod lab;

use std::time::{Duration, Instant};

use client::{Vm, plan, process};
use fcvm_types::guest::GuestNetwork;
use fcvm_wire::{FrameKind, Outcome, Request};

const BOOTS: usize = 7;
const SESSIONS: usize = 200;
const STREAMED_BLOCKS: usize = 1600;
const BLOCK_BYTES: usize = 64 * 1024;

/// Processor time of all threads of a process.
fn processor_time(pid: u32) -> Duration {
    let threads = std::fs::read_dir(format!("/proc/{pid}/task")).unwrap();
    let sum: u64 = threads
        .flatten()
        .filter_map(|thread| {
            let text = std::fs::read_to_string(thread.path().join("schedstat")).ok()?;
            text.split(' ').next()?.parse::<u64>().ok()
        })
        .sum();
    Duration::from_nanos(sum)
}

fn median(values: &[Duration]) -> Duration {
    let mut values = values.to_vec();
    values.sort_unstable();
    values[values.len() / 2]
}

fn least(values: &[Duration]) -> Duration {
    values.iter().min().copied().unwrap_or_default()
}

struct Stage {
    name: &'static str,
    wall: Vec<Duration>,
    cpu: Vec<Duration>,
}

fn main() {
    let Some(tools) = lab::tools() else { return };
    let mut stages: Vec<Stage> = ["first line", "hello", "opened", "first output"]
        .into_iter()
        .map(|name| Stage {
            name,
            wall: Vec::new(),
            cpu: Vec::new(),
        })
        .collect();
    if std::env::args().any(|argument| argument == "sessions") {
        return sessions(tools);
    }
    for _ in 0..BOOTS {
        boot(tools, &mut stages);
    }
    println!(
        "{:14} {:>8} {:>8} {:>8} {:>8}",
        "since start", "wall ms", "least", "CPU ms", "least"
    );
    for stage in stages {
        println!(
            "{:14} {:>8} {:>8} {:>8} {:>8}",
            stage.name,
            median(&stage.wall).as_millis(),
            least(&stage.wall).as_millis(),
            median(&stage.cpu).as_millis(),
            least(&stage.cpu).as_millis(),
        );
    }
    sessions(tools);
}

fn network() -> GuestNetwork {
    GuestNetwork {
        address: "10.0.2.15".parse().unwrap(),
        prefix_length: 24,
        gateway: "10.0.2.2".parse().unwrap(),
        ipv6: None,
        dns_servers: vec!["10.0.2.3".parse().unwrap()],
        dns_search: Vec::new(),
        mtu: 1500,
    }
}

fn boot(tools: &lab::Tools, stages: &mut [Stage]) {
    let started = Instant::now();
    let (guest, socket) = lab::Guest::boot(tools);
    let pid = guest.qemu.id();
    let mut mark = |stage: usize| {
        stages[stage].wall.push(started.elapsed());
        stages[stage].cpu.push(processor_time(pid));
    };
    while !guest.console().contains("fc-agent: started") {
        std::thread::sleep(Duration::from_millis(1));
    }
    mark(0);
    let mut vm = Vm::connect(guest, socket);
    mark(1);
    vm.greet();
    let mut plan = plan(process(&["echo", "hello"]));
    plan.identity.network = Some(network());
    let mut stream = vm.open(&Request::Run {
        plan: Box::new(plan),
    });
    stream.opened();
    mark(2);
    assert_eq!(stream.next().kind, FrameKind::Data);
    mark(3);
    vm.power_off();
}

fn sessions(tools: &lab::Tools) {
    let (mut vm, mut container) = Vm::run(tools, &plan(process(&["sleep", "100000"])));
    container.opened();
    let pid = vm.guest.qemu.id();
    vm.shell("true");
    let mut walls = Vec::new();
    let before = processor_time(pid);
    for _ in 0..SESSIONS {
        let started = Instant::now();
        vm.exec(&process(&["/bin/true"])).collect();
        walls.push(started.elapsed());
    }
    let cpu = (processor_time(pid) - before) / u32::try_from(SESSIONS).unwrap();
    println!(
        "session: {:?} wall (median), {cpu:?} CPU (mean)",
        median(&walls)
    );
    let started = Instant::now();
    let before = processor_time(pid);
    let script = format!("dd if=/dev/zero bs={BLOCK_BYTES} count={STREAMED_BLOCKS} 2>/dev/null");
    let output = vm.shell(&script);
    assert_eq!(output.stdout.len(), STREAMED_BLOCKS * BLOCK_BYTES);
    let seconds = started.elapsed().as_secs_f64();
    let cpu = (processor_time(pid) - before).as_secs_f64();
    let megabytes = (STREAMED_BLOCKS * BLOCK_BYTES) as f64 / 1e6;
    println!(
        "output: {:.0} MB/s wall, {:.0} MB per second of CPU",
        megabytes / seconds,
        megabytes / cpu
    );
    if let Outcome::Stats(stats) = vm.ask(&Request::Stats) {
        println!("memory of the agent: {} KiB", stats.agent_rss_bytes / 1024);
    }
    vm.power_off();
    println!("size of the agent: {} KiB", tools.agent_bytes() / 1024);
}
