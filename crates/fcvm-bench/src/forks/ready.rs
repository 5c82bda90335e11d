//! Clones that were made ready before they were wanted, to the end of their first command: of a running
//! VM (`run --standby`) and of a served snapshot (`snapshot serve`); beside them a plain fork and a start
//! from a snapshot on the disk.

use std::io::{BufRead, BufReader};
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};

use super::{Scale, source};
use crate::boot::{self, Running};
use crate::lab::Lab;
use crate::report::{Measure, Report, Samples, Target};

/// How long a clone may take to be ready.
const READY_LIMIT: Duration = Duration::from_secs(60);
const POLL: Duration = Duration::from_millis(20);

/// What was measured of one way to a clone.
#[derive(Default)]
struct Taken {
    wall_ms: Vec<f64>,
    stages: Vec<Vec<(String, f64)>>,
}

impl Taken {
    /// Runs a command that starts a clone of this name, and removes the clone.
    fn take(&mut self, lab: &Lab, command: &[&str], name: &str) -> anyhow::Result<()> {
        let arguments = [command, &["--rm", "--name", name, "--exec", "true"]].concat();
        let started = Instant::now();
        lab.run(&arguments)?;
        self.wall_ms.push(started.elapsed().as_secs_f64() * 1000.0);
        let clone = lab.inspect(name)?;
        self.stages.push(boot::stages(&clone["start_timings"]));
        lab.run(&["rm", "-f", name])?;
        Ok(())
    }

    fn tell(&self, report: &mut Report, name: &str, target: Option<Target>) {
        let samples = Samples::new(name, self.wall_ms.clone());
        let row = Measure::new("fork", "ms wall", samples);
        report.add(match target {
            Some(target) => row.target(target),
            None => row,
        });
        let stages: Vec<_> = self.stages.iter().map(Vec::as_slice).collect();
        for (stage, samples) in super::by_stage(&stages) {
            // What went ahead is not waited for.
            if !stage.ends_with("(ahead)") {
                let samples = Samples::new(format!("  clone's stage: {stage}"), samples);
                report.add(Measure::new("fork", "ms wall", samples));
            }
        }
    }
}

pub(super) fn measure(lab: &Lab, scale: Scale, report: &mut Report) -> anyhow::Result<()> {
    let [mut plain, mut ahead, mut served, mut stored] = [(); 4].map(|()| Taken::default());
    let (mut stored_mb, mut resident_mb) = (Vec::new(), Vec::new());
    for round in 1..=scale.sources {
        eprintln!(
            "fork: clones ready ahead, source {round} of {}",
            scale.sources
        );
        let vm = source(lab, "256m", report)?;
        let standby = lab.start_vm_with(&["--memory", "256m", "--standby", "1"])?;
        let tag = format!("{}-tag", vm.name);
        let (estimate, snapshot) = snapshot(lab, &vm.name, &tag)?;
        resident_mb.push(estimate);
        stored_mb.push(snapshot);
        let mut measured = || {
            let server = Server::start(lab, &tag)?;
            let name = format!("{}-clone", vm.name);
            for _ in 0..scale.forks {
                plain.take(lab, &["fork", &vm.name], &name)?;
                wait_ready(lab, &standby.name, "network ready")?;
                ahead.take(lab, &["fork", &standby.name], &name)?;
                wait_ready(lab, &vm.name, "rehearsal")?;
                let run = ["snapshot", "run", "--pid", &server.pid];
                served.take(lab, &run, &name)?;
                let run = ["snapshot", "run", "--snapshot", &tag];
                stored.take(lab, &run, &name)?;
            }
            anyhow::Ok(())
        };
        let measured = measured();
        lab.run(&["snapshot", "rm", "-f", &tag])?;
        measured?;
    }
    let target = || {
        Some(Target::Quantiles {
            median: 60.0,
            p99: 150.0,
        })
    };
    plain.tell(report, "plain fork, in the same rounds", None);
    ahead.tell(report, "fork, clone ready ahead (run --standby)", target());
    served.tell(
        report,
        "clone of a served snapshot (snapshot run --pid)",
        target(),
    );
    stored.tell(
        report,
        "clone of a snapshot on the disk (snapshot run --snapshot)",
        None,
    );
    let size = Samples::new("snapshot on the disk, 256 MiB guest", stored_mb);
    let resident = Samples::new("memory in use", resident_mb);
    report.add(Measure::new("fork", "MB", size).against(resident));
    Ok(())
}

/// Makes a snapshot; what of the VM's memory was in use, and what the snapshot takes, in megabytes.
fn snapshot(lab: &Lab, vm: &str, tag: &str) -> anyhow::Result<(f64, f64)> {
    let estimate = lab.json(&["fork", vm, "--dry-run", "--format", "json"])?;
    lab.run(&["snapshot", "create", vm, "--tag", tag])?;
    let snapshot = lab.json(&["snapshot", "inspect", tag])?;
    let megabytes = |value: &serde_json::Value| value.as_f64().map(|bytes| bytes / 1e6);
    let resident = megabytes(&estimate["resident_bytes"]);
    let stored = megabytes(&snapshot[0]["own_bytes"]);
    resident.zip(stored).context("fcvm tells no sizes")
}

/// Waits until a clone of this parent has passed this stage and waits for somebody to want it.
fn wait_ready(lab: &Lab, parent: &str, stage: &str) -> anyhow::Result<()> {
    let limit = Instant::now() + READY_LIMIT;
    loop {
        let all = lab.json(&["ls", "-a", "--format", "json"])?;
        for row in all.as_array().into_iter().flatten() {
            if row["state"] != "standby" || row["lineage"]["parent_name"] != parent {
                continue;
            }
            let id = row["id"].as_str().unwrap_or_default();
            // It may have ended since.
            let stages = lab.inspect(id).map(|vm| boot::stages(&vm["start_timings"]));
            if stages.is_ok_and(|stages| stages.iter().any(|(name, _)| name == stage)) {
                return Ok(());
            }
        }
        if Instant::now() > limit {
            bail!(
                "no clone of {parent} is ready after {} s",
                READY_LIMIT.as_secs()
            );
        }
        std::thread::sleep(POLL);
    }
}

/// A serving process; it ends with this value.
struct Server {
    pid: String,
    _process: Running,
}

impl Server {
    fn start(lab: &Lab, tag: &str) -> anyhow::Result<Self> {
        let mut process = lab
            .command(&["snapshot", "serve", tag, "--standby", "1"])
            .stdout(Stdio::piped())
            .spawn()
            .context("cannot start fcvm snapshot serve")?;
        let stdout = process.stdout.take().context("it has no output")?;
        let process = Running(process);
        let mut pid = String::new();
        BufReader::new(stdout).read_line(&mut pid)?;
        Ok(Self {
            pid: pid.trim().to_owned(),
            _process: process,
        })
    }
}
