//! `fcvm exec` in a running VM: from the start of the command to its end.

use std::time::Instant;

use crate::lab::{BenchVm, Lab};
use crate::report::{Measure, Report, Samples, Target};

/// Commands measured; a quantile of 0.9 needs that many to mean something.
const COMMANDS: usize = 50;

pub(crate) fn measure(lab: &Lab, vm: &BenchVm<'_>, report: &mut Report) -> anyhow::Result<()> {
    eprintln!("session: {COMMANDS} times fcvm exec");
    let time = |arguments: &[&str]| -> anyhow::Result<f64> {
        let started = Instant::now();
        lab.run(arguments)?;
        Ok(started.elapsed().as_secs_f64() * 1000.0)
    };
    for _ in 0..5 {
        time(&["exec", &vm.name, "true"])?;
    }
    let (mut exec, mut nothing) = (Vec::new(), Vec::new());
    for _ in 0..COMMANDS {
        exec.push(time(&["exec", &vm.name, "true"])?);
        // What of it is the start and end of a process on this host.
        nothing.push(time(&["--version"])?);
    }
    report.add(
        Measure::new(
            "session",
            "ms wall",
            Samples::new("fcvm exec VM true", exec),
        )
        .against(Samples::new("fcvm --version", nothing))
        .target(Target::Median(40.0)),
    );
    Ok(())
}
