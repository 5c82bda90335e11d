//! Forks of running VMs: how long they take, what clones weigh, how long the source stands still.
//!
//! What all three parts have in common lives here: sources, single forks, and the tables of stages.

mod clones;
mod guest;
mod latency;
mod pause;
mod ready;
mod restore;

use std::path::Path;
use std::time::Instant;

use anyhow::Context as _;
use serde_json::Value;

use crate::boot;
use crate::lab::{BenchVm, Lab};
use crate::report::{Measure, Report, Samples, Target};

/// How much is measured.
#[derive(Clone, Copy)]
pub(crate) struct Scale {
    /// Fresh sources of each kind.
    sources: usize,
    /// Forks of each of them, one after the other.
    forks: usize,
    /// Clones that live at once.
    clones: usize,
}

impl Scale {
    /// A round is dear here: a fresh source, ten forks of it and what they are compared with.
    pub(crate) fn new(rounds: usize, quick: bool) -> Self {
        match quick {
            true => Self {
                sources: 1,
                forks: 3,
                clones: 6,
            },
            false => Self {
                sources: rounds.div_ceil(3),
                forks: 10,
                clones: 50,
            },
        }
    }
}

/// Measures the wanted ones of `fork`, `clones` and `pause`.
pub(crate) fn measure(
    lab: &Lab,
    wants: impl Fn(&str) -> bool,
    scale: Scale,
    report: &mut Report,
) -> anyhow::Result<()> {
    if wants("clones") {
        clones::measure(lab, scale, report).context("clones")?;
    }
    if !wants("fork") && !wants("pause") {
        return Ok(());
    }
    let directory = tempfile::tempdir()?;
    let program = match guest::build(directory.path()) {
        Ok(program) => program,
        Err(error) => {
            report.skip(format!(
                "fork, pause: the guest's program cannot be built: {error:#}"
            ));
            return Ok(());
        }
    };
    if wants("fork") {
        latency::measure(lab, scale, &program, report).context("fork")?;
        ready::measure(lab, scale, report).context("clones ready ahead")?;
    }
    if wants("pause") {
        pause::measure(lab, scale, &program, report).context("pause")?;
    }
    Ok(())
}

/// A fresh VM to fork; its memory as `fcvm run --memory` takes it.
fn source<'a>(lab: &'a Lab, memory: &str, report: &mut Report) -> anyhow::Result<BenchVm<'a>> {
    let vm = lab.start_vm_with(&["--memory", memory])?;
    let inspected = lab.inspect(&vm.name)?;
    report.conditions.accelerator = inspected["accelerator"].as_str().map(str::to_owned);
    Ok(vm)
}

/// One fork whose clone ran a command.
struct Fork {
    /// From the start of the command to its end.
    wall_ms: f64,
    /// How long the source stood still, as its owner tells.
    pause_ms: f64,
    /// The source's stages: those of the pause and what came after.
    source_stages: Vec<(String, f64)>,
    /// The clone's stages.
    clone_stages: Vec<(String, f64)>,
    /// The source's own pages that had to be copied, in megabytes, by the estimate just before.
    copied_mb: f64,
}

/// Forks a VM once and removes the clone.
fn fork_once(lab: &Lab, source: &str) -> anyhow::Result<Fork> {
    let estimate = lab.json(&["fork", source, "--dry-run", "--format", "json"])?;
    let name = format!("{source}-clone");
    let arguments = [
        "fork", source, "--rm", "--name", &name, "--exec", "true", "--format", "json",
    ];
    let started = Instant::now();
    let forked = lab.json(&arguments)?;
    let wall_ms = started.elapsed().as_secs_f64() * 1000.0;
    let clone = lab.inspect(&name)?;
    lab.run(&["rm", "-f", &name])?;
    let pause = forked["source"]["pause_microseconds"].as_f64();
    Ok(Fork {
        wall_ms,
        pause_ms: pause.context("fcvm fork tells no pause")? / 1000.0,
        source_stages: boot::stages(&forked["source"]["timings"]),
        clone_stages: boot::stages(&clone["start_timings"]),
        copied_mb: estimate["copied_bytes"].as_f64().unwrap_or(0.0) / 1e6,
    })
}

/// Forks of several fresh sources, told apart by how many came before.
#[derive(Default)]
struct Series {
    forks: Vec<(usize, Fork)>,
}

impl Series {
    /// `index` counts the forks of one source, from 0.
    fn push(&mut self, index: usize, fork: Fork) {
        self.forks.push((index, fork));
    }

    fn values(&self, index: Option<usize>, value: impl Fn(&Fork) -> f64) -> Vec<f64> {
        self.forks
            .iter()
            .filter(|(place, _)| index.is_none_or(|index| index == *place))
            .map(|(_, fork)| value(fork))
            .collect()
    }

    /// Three rows: all forks, the first and the last of each source.
    fn report(
        &self,
        report: &mut Report,
        part: &'static str,
        name: &str,
        target: Target,
        value: impl Fn(&Fork) -> f64,
    ) {
        let last = self.forks.iter().map(|(index, _)| *index).max();
        let last = last.unwrap_or(0);
        let all = Samples::new(format!("{name}: all"), self.values(None, &value));
        report.add(Measure::new(part, "ms wall", all).target(target));
        for (which, index) in [
            ("first of a source".to_owned(), 0),
            (format!("fork {} of a source", last + 1), last),
        ] {
            let samples = self.values(Some(index), &value);
            let samples = Samples::new(format!("  {which}"), samples);
            report.add(Measure::new(part, "ms wall", samples));
        }
    }

    /// A row for each stage of the clones, or of the source.
    fn report_stages(
        &self,
        report: &mut Report,
        part: &'static str,
        name: &str,
        stages: impl Fn(&Fork) -> &[(String, f64)],
    ) {
        let all: Vec<_> = self.forks.iter().map(|(_, fork)| stages(fork)).collect();
        for (stage, samples) in by_stage(&all) {
            let samples = Samples::new(format!("  {name}: {stage}"), samples);
            report.add(Measure::new(part, "ms wall", samples));
        }
    }
}

/// The samples of each stage, in the order in which the stages came first.
pub(crate) fn by_stage(all: &[&[(String, f64)]]) -> Vec<(String, Vec<f64>)> {
    let mut stages: Vec<(String, Vec<f64>)> = Vec::new();
    for (stage, milliseconds) in all.iter().copied().flatten() {
        match stages.iter_mut().find(|(known, _)| known == stage) {
            Some((_, samples)) => samples.push(*milliseconds),
            None => stages.push((stage.clone(), vec![*milliseconds])),
        }
    }
    stages
}

/// Process id of a VM's helper.
fn qemu_of(lab: &Lab, vm: &str) -> anyhow::Result<u32> {
    boot::helper_pid(&lab.inspect(vm)?, "qemu")
}

/// Where a program's temporary files of hundreds of megabytes go: beside the images, on a disk.
fn scratch(lab: &Lab) -> anyhow::Result<tempfile::TempDir> {
    let directory: &Path = &lab.data_dir;
    tempfile::tempdir_in(directory).context("cannot make a scratch directory")
}

/// Processes of a VM by what they do: `owner`, `qemu`, and the helpers of its network.
fn processes(vm: &Value) -> Vec<(String, u32)> {
    let pid = |value: &Value| value.as_u64().and_then(|pid| u32::try_from(pid).ok());
    let owner = pid(&vm["owner_pid"]).map(|pid| ("owner".to_owned(), pid));
    let resources = vm["resources"].as_array().cloned().unwrap_or_default();
    let helpers = resources.iter().filter_map(|resource| {
        let role = resource["role"].as_str()?.to_owned();
        Some((role, pid(&resource["identity"]["pid"])?))
    });
    owner.into_iter().chain(helpers).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn first_and_last_forks_are_told_apart() {
        let fork = |wall_ms| Fork {
            wall_ms,
            pause_ms: 1.0,
            source_stages: vec![("stop".to_owned(), 1.0)],
            clone_stages: vec![("load".to_owned(), wall_ms), ("resume".to_owned(), 1.0)],
            copied_mb: 0.0,
        };
        let mut series = Series::default();
        for (index, wall_ms) in [(0, 1.0), (1, 2.0), (2, 3.0), (0, 4.0), (1, 5.0), (2, 6.0)] {
            series.push(index, fork(wall_ms));
        }
        assert_eq!(series.values(Some(0), |fork| fork.wall_ms), [1.0, 4.0]);
        assert_eq!(series.values(Some(2), |fork| fork.wall_ms), [3.0, 6.0]);
        assert_eq!(series.values(None, |fork| fork.wall_ms).len(), 6);
        let all: Vec<_> = series
            .forks
            .iter()
            .map(|(_, fork)| &fork.clone_stages[..])
            .collect();
        let stages = by_stage(&all);
        assert_eq!(stages[0].0, "load");
        assert_eq!(stages[0].1, [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]);
        assert_eq!(stages[1].1.len(), 6);
    }

    #[test]
    fn processes_are_found_by_their_roles() {
        let vm = serde_json::json!({
            "owner_pid": 1,
            "resources": [
                { "kind": "process", "role": "qemu", "identity": { "pid": 2 } },
                { "kind": "directory", "path": "/x" },
            ],
        });
        assert_eq!(
            processes(&vm),
            [("owner".to_owned(), 1), ("qemu".to_owned(), 2)]
        );
    }
}
