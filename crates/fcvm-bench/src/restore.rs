//! How a VM under Firecracker begins: cold, from a file, from the memory server, from that with what an earlier
//! clone needed brought ahead, and with pages of 2 MiB. By turns in one run, from the command's start to its end,
//! and then a command in the guest, which is where pages that are missing are asked for.

use std::fs;
use std::io::{BufRead, BufReader};
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use serde_json::Value;

use crate::lab::{BenchVm, Lab};
use crate::report::{Measure, Report, Samples, Target};

const PART: &str = "restore";
/// Tag of the snapshot of a VM with usual pages, and of one with those of 2 MiB.
const TAGS: [&str; 2] = ["bench-restore", "bench-restore-huge"];
const MACHINE: [&str; 7] = [
    "--hypervisor",
    "firecracker",
    // A jail has a copy of memory that is in a file.
    "--jail=false",
    "--network",
    "none",
    "--memory",
    "256m",
];
/// Reads files and starts processes.
const WORK: &str = "cat /etc/hosts /proc/meminfo | md5sum >/dev/null; ls -lR /bin >/dev/null";
/// Clones whose memory is weighed, all of one command.
const CLONES: u64 = 10;
/// How long is recorded, seconds: longer than the command takes, also where the processor is emulated.
const RECORD_S: &str = "20";
/// How long to wait for what was recorded beyond that.
const RECORD_WAIT: Duration = Duration::from_secs(40);
/// The pages of two VMs of 256 MiB, one of which has them from a snapshot.
const HUGEPAGES: u64 = 256;

/// What one start took.
struct Start {
    wall_ms: f64,
    work_ms: f64,
    faults: f64,
    ahead_pages: f64,
}

/// Starts of one kind.
#[derive(Default)]
struct Starts(Vec<Start>);

impl Starts {
    fn samples(&self, name: &str, value: impl Fn(&Start) -> f64) -> Samples {
        Samples::new(name, self.0.iter().map(value).collect())
    }
}

pub(crate) fn measure(lab: &Lab, rounds: usize, report: &mut Report) -> anyhow::Result<()> {
    let probe = [&["run", "--rm", "--pull", "never"], &MACHINE[..]].concat();
    if let Err(error) = lab.run(&[&probe[..], &[&lab.image, "true"]].concat()) {
        report.skip(format!("{PART}: no VM runs under Firecracker: {error:#}"));
        return Ok(());
    }
    report.conditions.accelerator = Some("kvm, Firecracker".to_owned());
    let _snapshots = Snapshots(lab);
    snapshot(lab, TAGS[0], &[])?;
    let with_hugepages = has_hugepages();
    match with_hugepages {
        true => snapshot(lab, TAGS[1], &["--hugepages"])?,
        false => report.skip(format!(
            "{PART}: 2 MiB pages: the host has fewer than {HUGEPAGES} free ones (sysctl vm.nr_hugepages)"
        )),
    }
    // What the first clone needs is kept for those that have it ahead.
    let recorded: Vec<Vec<u8>> = TAGS[..1 + usize::from(with_hugepages)]
        .iter()
        .map(|tag| record(lab, tag))
        .collect::<anyhow::Result<_>>()?;
    let [mut cold, mut file] = [const { Starts(Vec::new()) }; 2];
    let mut served: [[Starts; 2]; 2] = Default::default();
    for round in 1..=rounds {
        eprintln!("{PART}: round {round} of {rounds}");
        cold.0.push(boot(lab)?);
        file.0.push(clone(lab, TAGS[0], "file")?);
        for ((tag, set), of_tag) in TAGS.iter().zip(&recorded).zip(&mut served) {
            for (set, starts) in [None, Some(&set[..])].into_iter().zip(of_tag) {
                let _server = Server::start(lab, tag, set)?;
                starts.0.push(clone(lab, tag, "uffd")?);
            }
        }
    }
    let [[plain, ahead], [huge, huge_ahead]] = &served;
    let mut add = |name: &str, starts: &Starts| {
        if starts.0.is_empty() {
            return;
        }
        let wall = Measure::new(PART, "ms wall", starts.samples(name, |start| start.wall_ms));
        report.add(wall.against(cold.samples("cold boot", |start| start.wall_ms)));
        let work = starts.samples(&format!("{name}, a command then"), |start| start.work_ms);
        let work = Measure::new(PART, "ms wall", work);
        report.add(work.against(cold.samples("in the VM that booted", |start| start.work_ms)));
    };
    add("clone, memory from a file", &file);
    add("clone, memory from the server", plain);
    add("clone, memory from the server, ahead", ahead);
    add("clone, 2 MiB pages from the server", huge);
    add("clone, 2 MiB pages from the server, ahead", huge_ahead);
    for (what, plain, ahead) in [("4 KiB", plain, ahead), ("2 MiB", huge, huge_ahead)] {
        if plain.0.is_empty() {
            continue;
        }
        let name = format!("faults of a clone, {what} pages ahead");
        let faults = Measure::new(PART, "", ahead.samples(&name, |start| start.faults))
            .against(plain.samples("nothing ahead", |start| start.faults));
        report.add(match what {
            "4 KiB" => faults.target(Target::Ratio(0.1)),
            _ => faults,
        });
        let name = format!("pages of 4 KiB that came ahead, {what} pages");
        let pages = ahead.samples(&name, |start| start.ahead_pages);
        report.add(Measure::new(PART, "", pages));
    }
    weigh(lab, &recorded[0], report)
}

/// The snapshots, which end with this value.
struct Snapshots<'a>(&'a Lab);

impl Drop for Snapshots<'_> {
    fn drop(&mut self) {
        for tag in TAGS {
            // One of them may never have been made.
            let _ = self.0.run(&["snapshot", "rm", "--force", tag]);
        }
    }
}

fn has_hugepages() -> bool {
    let path = "/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages";
    let free = fs::read_to_string(path).unwrap_or_default();
    free.trim().parse::<u64>().unwrap_or(0) >= HUGEPAGES
}

/// Takes a snapshot of a VM that has run the command, and ends it.
fn snapshot(lab: &Lab, tag: &str, options: &[&str]) -> anyhow::Result<()> {
    lab.run(&["snapshot", "rm", "--force", tag])?;
    let vm = lab.start_vm_with(&[&MACHINE[..], options].concat())?;
    work(lab, &vm.name)?;
    lab.run(&["snapshot", "create", "--tag", tag, &vm.name])?;
    Ok(())
}

/// Runs the command; how long it takes, in milliseconds.
fn work(lab: &Lab, name: &str) -> anyhow::Result<f64> {
    let started = Instant::now();
    lab.run(&["exec", name, "sh", "-c", WORK])?;
    Ok(started.elapsed().as_secs_f64() * 1e3)
}

fn boot(lab: &Lab) -> anyhow::Result<Start> {
    let started = Instant::now();
    let vm = lab.start_vm_with(&MACHINE)?;
    let wall_ms = started.elapsed().as_secs_f64() * 1e3;
    Ok(Start {
        wall_ms,
        work_ms: work(lab, &vm.name)?,
        faults: f64::NAN,
        ahead_pages: f64::NAN,
    })
}

fn clone(lab: &Lab, tag: &str, memory: &str) -> anyhow::Result<Start> {
    let name = format!("bench-restored-{}", std::process::id());
    let run = ["snapshot", "run", "--snapshot", tag, "--name", &name];
    let started = Instant::now();
    lab.run(&[&run[..], &["--memory", memory]].concat())?;
    let wall_ms = started.elapsed().as_secs_f64() * 1e3;
    let vm = BenchVm { lab, name };
    let work_ms = work(lab, &vm.name)?;
    let statistics = statistics(lab, &vm.name)?;
    let count = |field: &str| statistics[field].as_f64().unwrap_or(f64::NAN);
    Ok(Start {
        wall_ms,
        work_ms,
        faults: count("faults"),
        ahead_pages: count("prefetched_pages"),
    })
}

/// What the memory server tells of a clone, where one serves it.
fn statistics(lab: &Lab, name: &str) -> anyhow::Result<Value> {
    let servers = lab.json(&["stats", "--memory", "--no-stream", "--format", "json"])?;
    let served = servers[0]["served"].as_array();
    let mut served = served.into_iter().flatten();
    let clone = served.find(|clone| clone["vm"]["name"] == name);
    Ok(clone.map_or(Value::Null, |clone| clone["statistics"].clone()))
}

/// What a clone needs, as its server keeps it.
fn record(lab: &Lab, tag: &str) -> anyhow::Result<Vec<u8>> {
    let path = Server::set_path(lab, tag);
    let _server = Server::start(lab, tag, None)?;
    let name = format!("bench-recorded-{}", std::process::id());
    let run = ["snapshot", "run", "--snapshot", tag, "--name", &name];
    lab.run(&[&run[..], &["--memory", "uffd"]].concat())?;
    let vm = BenchVm { lab, name };
    work(lab, &vm.name)?;
    // Until its time is over: what a clone that ends before has needed is recorded on by the next.
    let started = Instant::now();
    while !path.exists() {
        if started.elapsed() > RECORD_WAIT {
            bail!("nothing was recorded: {}", path.display());
        }
        std::thread::sleep(Duration::from_millis(100));
    }
    Ok(fs::read(&path)?)
}

/// A memory server, which is the only one.
struct Server {
    process: Child,
}

impl Server {
    fn set_path(lab: &Lab, tag: &str) -> std::path::PathBuf {
        lab.data_dir
            .join("fcvm/snapshots")
            .join(tag)
            .join("working-set.bin")
    }

    /// Starts it with what was recorded, or with nothing.
    fn start(lab: &Lab, tag: &str, set: Option<&[u8]>) -> anyhow::Result<Self> {
        let path = Self::set_path(lab, tag);
        match set {
            Some(set) => fs::write(&path, set).context("cannot write the working set")?,
            None => drop(fs::remove_file(&path)),
        }
        let process = lab
            .command(&["snapshot", "serve-memory", "--record", RECORD_S, tag])
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .context("cannot start the memory server")?;
        let mut server = Self { process };
        let output = server.process.stdout.take().context("it has no output")?;
        let mut line = String::new();
        BufReader::new(output).read_line(&mut line)?;
        if line.is_empty() {
            bail!("the memory server of {tag} does not start");
        }
        Ok(server)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// What each of several clones of one command weighs after the command.
fn weigh(lab: &Lab, set: &[u8], report: &mut Report) -> anyhow::Result<()> {
    let weights = |memory: &str| -> anyhow::Result<Vec<f64>> {
        let (count, name) = (CLONES.to_string(), format!("bench-w{}", std::process::id()));
        let run = ["snapshot", "run", "--snapshot", TAGS[0], "-n", &count];
        let of = ["--name", &name, "--memory", memory, "--exec", WORK];
        lab.run(&[&run[..], &of].concat())?;
        let listed = lab.json(&["ls", "--size", "--format", "json"])?;
        let listed: Vec<&Value> = listed.as_array().into_iter().flatten().collect();
        let own = |vm: &&&Value| {
            vm["name"]
                .as_str()
                .is_some_and(|vm_name| vm_name.starts_with(&name))
        };
        let (mut bytes, mut names) = (Vec::new(), Vec::new());
        for vm in listed.iter().filter(own) {
            bytes.push(vm["usage"]["memory_pss_bytes"].as_f64().unwrap_or(f64::NAN) / 1e6);
            names.push(vm["name"].as_str().unwrap_or_default());
        }
        lab.run(&[&["rm", "-f"], &names[..]].concat())?;
        Ok(bytes)
    };
    let file = weights("file")?;
    let _server = Server::start(lab, TAGS[0], Some(set))?;
    let served = Samples::new(
        "PSS of each of 10 clones, from the server, ahead",
        weights("uffd")?,
    );
    let measure = Measure::new(PART, "MB", served);
    report.add(measure.against(Samples::new("from a file", file)));
    Ok(())
}
