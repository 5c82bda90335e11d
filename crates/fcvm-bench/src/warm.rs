//! `fcvm run --warm` that restores its cache against a cold `fcvm run`, of the same container alternately.

use std::time::Instant;

use anyhow::bail;
use serde_json::Value;

use crate::lab::Lab;
use crate::report::{Measure, Report, Samples, Target};
use crate::{boot, forks};

/// Starts at once and is up a second later: what a cache can save besides the boot.
const SLOW_SERVICE: &str = "sleep 1; touch /tmp/up; exec sleep 86400";
const HEALTH_CHECK: &str = "--health-check=test -e /tmp/up";

/// One start: from the command's beginning to its end, and by its stages.
struct Start {
    wall_ms: f64,
    stages: Vec<(String, f64)>,
}

pub(crate) fn measure(lab: &Lab, rounds: usize, report: &mut Report) -> anyhow::Result<()> {
    let name = format!("bench-warm-{}", std::process::id());
    let idle = ["sleep", "86400"];
    let slow = ["sh", "-c", SLOW_SERVICE];
    lab.run(&["system", "prune", "--force", "--warm"])?;
    let mut prepared = Vec::new();
    for (options, command) in [(&[][..], &idle[..]), (&[HEALTH_CHECK], &slow)] {
        let told = lab.json(
            &[
                &["prepare", "--format", "json", "--pull", "never"],
                options,
                &[&lab.image],
                command,
            ]
            .concat(),
        )?;
        prepared.push(told["duration_microseconds"].as_f64().unwrap_or(f64::NAN) / 1000.0);
    }
    let [mut cold, mut warm, mut slow_cold, mut slow_warm] = [const { Vec::new() }; 4];
    for round in 1..=rounds {
        eprintln!("warm: round {round} of {rounds}");
        cold.push(start(lab, &name, &[], &idle)?);
        warm.push(start(lab, &name, &["--warm"], &idle)?);
        slow_cold.push(start(lab, &name, &[HEALTH_CHECK], &slow)?);
        slow_warm.push(start(lab, &name, &["--warm", HEALTH_CHECK], &slow)?);
    }
    lab.run(&["system", "prune", "--force", "--warm"])?;
    let row = |samples| Measure::new("warm", "ms wall", samples);
    let walls = |name: &str, starts: &[Start]| {
        Samples::new(name, starts.iter().map(|start| start.wall_ms).collect())
    };
    report.add(
        row(walls("fcvm run --warm -d, restored", &warm))
            .against(walls("cold fcvm run -d", &cold))
            .target(Target::Ratio(0.5)),
    );
    let stages: Vec<_> = warm.iter().map(|start| &start.stages[..]).collect();
    for (stage, samples) in forks::by_stage(&stages) {
        report.add(row(Samples::new(format!("  stage: {stage}"), samples)));
    }
    report.add(
        row(walls(
            "the same until healthy, service that needs 1 s",
            &slow_warm,
        ))
        .against(walls("cold", &slow_cold)),
    );
    report.add(row(Samples::new("fcvm prepare", prepared)));
    Ok(())
}

/// Starts a VM in the background, and waits until it is healthy where that is checked.
fn start(lab: &Lab, name: &str, options: &[&str], command: &[&str]) -> anyhow::Result<Start> {
    let run = ["run", "-d", "--name", name, "--pull", "never"];
    let started = Instant::now();
    lab.run(&[&run[..], options, &[&lab.image], command].concat())?;
    let is_checked = options.contains(&HEALTH_CHECK);
    let mut vm = lab.inspect(name)?;
    while is_checked && vm["health"] != "healthy" {
        vm = lab.inspect(name)?;
    }
    let wall_ms = started.elapsed().as_secs_f64() * 1000.0;
    let stages = boot::stages(&vm["start_timings"]);
    lab.run(&["rm", "-f", name])?;
    let expected = match options.contains(&"--warm") {
        true => Value::from("restored"),
        false => Value::Null,
    };
    if vm["start_cache"]["state"] != expected {
        bail!(
            "the VM has not the start that was to be measured: {}",
            vm["start_cache"]
        );
    }
    Ok(Start { wall_ms, stages })
}
