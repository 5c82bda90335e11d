//! How long the source of a fork stands still: as its owner tells, and by the guest's own clocks.

use std::path::Path;

use super::guest::{Gap, Guest};
use super::{Scale, Series, fork_once, source};
use crate::lab::Lab;
use crate::report::{Measure, Report, Samples, Target};

const SIZES: [(&str, &str); 3] = [("256m", "256 MiB"), ("1536m", "1.5 GiB"), ("4g", "4 GiB")];

/// What a busy guest writes, and where: megabytes a second, in a ring of mebibytes.
const RATE: &str = "100";
const RING_MIB: &str = "64";

/// What was measured of guests of one size that do the same.
#[derive(Default)]
struct Taken {
    forks: Series,
    /// During a fork.
    forked: Vec<Gap>,
    /// During a command that tells of the VM and does not stop it.
    undisturbed: Vec<Gap>,
    /// How much the guest's realtime clock lost against the host's, in milliseconds.
    lost_ms: Vec<f64>,
}

pub(super) fn measure(
    lab: &Lab,
    scale: Scale,
    program: &Path,
    report: &mut Report,
) -> anyhow::Result<()> {
    let mut kinds: Vec<_> = SIZES
        .iter()
        .flat_map(|size| [false, true].map(|is_busy| (size, is_busy, Taken::default())))
        .collect();
    for round in 1..=scale.sources {
        for ((memory, size), is_busy, taken) in &mut kinds {
            eprintln!("pause: {size}, source {round} of {}", scale.sources);
            let vm = source(lab, memory, report)?;
            let arguments = match is_busy {
                true => ["clock", RING_MIB, RATE],
                false => ["clock", "0", "0"],
            };
            let mut guest = Guest::start(lab, &vm.name, program, &arguments)?;
            for index in 0..scale.forks {
                guest.gap()?;
                lab.run(&["fork", &vm.name, "--dry-run"])?;
                let before = guest.gap()?;
                taken.forks.push(index, fork_once(lab, &vm.name)?);
                let after = guest.gap()?;
                taken.lost_ms.push(after.behind_ms - before.behind_ms);
                taken.undisturbed.push(before);
                taken.forked.push(after);
            }
        }
    }
    for ((_, size), is_busy, taken) in &kinds {
        let doing = match is_busy {
            true => format!("writing {RATE} MB/s"),
            false => "idle".to_owned(),
        };
        tell(&format!("{size} guest, {doing}"), *is_busy, taken, report);
    }
    Ok(())
}

fn tell(name: &str, is_busy: bool, taken: &Taken, report: &mut Report) {
    let target = Target::Quantiles {
        median: 12.0,
        p99: 30.0,
    };
    let pause = format!("pause of the source, {name}");
    taken
        .forks
        .report(report, "pause", &pause, target, |fork| fork.pause_ms);
    taken
        .forks
        .report_stages(report, "pause", "stage", |fork| &fork.source_stages);
    let copied = taken.forks.values(None, |fork| fork.copied_mb);
    let copied = Samples::new("  own pages copied", copied);
    report.add(Measure::new("pause", "MB", copied));
    let steps = |gaps: &[Gap]| gaps.iter().map(|gap| gap.monotonic_ms).collect();
    let forked = Samples::new(
        "  largest step of the guest's monotonic clock",
        steps(&taken.forked),
    );
    let undisturbed = Samples::new("without a fork", steps(&taken.undisturbed));
    report.add(Measure::new("pause", "ms", forked).against(undisturbed));
    let lost = Samples::new(
        "  lost by the guest's realtime clock",
        taken.lost_ms.clone(),
    );
    report.add(Measure::new("pause", "ms", lost));
    if is_busy {
        let rates = |gaps: &[Gap]| gaps.iter().map(|gap| gap.rate).collect();
        let forked = Samples::new("  written while forked", rates(&taken.forked));
        let undisturbed = Samples::new("without a fork", rates(&taken.undisturbed));
        report.add(Measure::new("pause", "MB/s", forked).against(undisturbed));
    }
}
