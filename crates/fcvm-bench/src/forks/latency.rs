//! `fcvm fork` to the end of the clone's first command, beside a cold `fcvm run` of the same image and
//! stock QEMU's restore of the same machine.

use std::path::Path;
use std::time::Instant;

use super::guest::Guest;
use super::restore::Saved;
use super::{Scale, Series, fork_once, qemu_of, scratch, source};
use crate::lab::Lab;
use crate::process;
use crate::report::{Measure, Report, Samples, Target};

/// A guest, and how much of its memory is in use beside its system.
struct Kind {
    memory: &'static str,
    held_mib: u32,
    name: &'static str,
}

const KINDS: [Kind; 2] = [
    Kind {
        memory: "256m",
        held_mib: 0,
        name: "256 MiB guest",
    },
    Kind {
        memory: "4g",
        held_mib: 1024,
        name: "4 GiB guest, 1 GiB in use",
    },
];

/// What was measured of one kind of guest.
#[derive(Default)]
struct Taken {
    forks: Series,
    cold_ms: Vec<f64>,
    restored_ms: Vec<f64>,
    answered_ms: Vec<f64>,
    saved_mb: Vec<f64>,
}

pub(super) fn measure(
    lab: &Lab,
    scale: Scale,
    program: &Path,
    report: &mut Report,
) -> anyhow::Result<()> {
    let mut taken = KINDS.map(|_| Taken::default());
    for round in 1..=scale.sources {
        for (kind, taken) in KINDS.iter().zip(&mut taken) {
            eprintln!("fork: {}, source {round} of {}", kind.name, scale.sources);
            take(lab, scale, kind, program, taken, report)?;
        }
    }
    let [small, large] = &taken;
    let all = |taken: &Taken| taken.forks.values(None, |fork| fork.wall_ms);
    for (kind, taken) in KINDS.iter().zip(&taken) {
        tell(kind, taken, report);
    }
    let row = Measure::new("fork", "ms wall", Samples::new("  4 GiB guest", all(large)));
    report.add(
        row.against(Samples::new("256 MiB guest", all(small)))
            .target(Target::Ratio(1.1)),
    );
    Ok(())
}

/// One fresh source: all its forks, and after the first and the last what they are compared with.
fn take(
    lab: &Lab,
    scale: Scale,
    kind: &Kind,
    program: &Path,
    taken: &mut Taken,
    report: &mut Report,
) -> anyhow::Result<()> {
    let vm = source(lab, kind.memory, report)?;
    let line = process::command_line(qemu_of(lab, &vm.name)?)?;
    let directory = scratch(lab)?;
    let saved = Saved::new(&line, program, kind.held_mib, directory.path())?;
    taken.saved_mb.push(saved.bytes as f64 / 1e6);
    let held = kind.held_mib.to_string();
    let _holding = match kind.held_mib {
        0 => None,
        _ => Some(Guest::start(lab, &vm.name, program, &["hold", &held])?),
    };
    for index in 0..scale.forks {
        taken.forks.push(index, fork_once(lab, &vm.name)?);
        // A cold start takes seconds: it is not taken as often as a fork.
        if index != 0 && index + 1 != scale.forks {
            continue;
        }
        taken.cold_ms.push(cold(lab, kind)?);
        let restored = saved.restore()?;
        taken.restored_ms.push(restored.running_ms);
        taken.answered_ms.push(restored.answered_ms);
    }
    Ok(())
}

fn cold(lab: &Lab, kind: &Kind) -> anyhow::Result<f64> {
    let started = Instant::now();
    let memory = ["--memory", kind.memory];
    let run = ["run", "--rm", "--pull", "never"];
    lab.run(&[&run[..], &memory, &[&lab.image, "true"]].concat())?;
    Ok(started.elapsed().as_secs_f64() * 1000.0)
}

fn tell(kind: &Kind, taken: &Taken, report: &mut Report) {
    let name = format!("fork to first exec answered, {}", kind.name);
    let target = Target::Quantiles {
        median: 120.0,
        p99: 150.0,
    };
    taken
        .forks
        .report(report, "fork", &name, target, |fork| fork.wall_ms);
    let forks = || Samples::new("  fork", taken.forks.values(None, |fork| fork.wall_ms));
    let cold = Samples::new("cold run --rm IMAGE true", taken.cold_ms.clone());
    let row = Measure::new("fork", "ms wall", forks()).against(cold);
    report.add(row.target(Target::Ratio(1.0 / 30.0)));
    for (what, samples) in [
        ("QEMU restore, cont answered", &taken.restored_ms),
        ("QEMU restore, guest answered", &taken.answered_ms),
    ] {
        let restore = Samples::new(what, samples.clone());
        report.add(Measure::new("fork", "ms wall", forks()).against(restore));
    }
    let size = Samples::new("  size of QEMU's saved state", taken.saved_mb.clone());
    report.add(Measure::new("fork", "MB", size));
    taken
        .forks
        .report_stages(report, "fork", "clone's stage", |fork| &fork.clone_stages);
    taken
        .forks
        .report_stages(report, "fork", "source's stage", |fork| &fork.source_stages);
}
