//! An image from an OCI layout to a root file system: fcvm's import and conversion against `skopeo copy`
//! and `umoci unpack`.

use std::path::Path;
use std::process::Command;
use std::time::Instant;

use anyhow::{Context as _, ensure};
use fcvm_image::{ImageStore, ImportOptions, Platform, Reference, Silent, Source, import};

use crate::images;
use crate::lab::{Lab, find_program, finished};
use crate::process;
use crate::report::{Measure, Report, Samples, Target};

/// First argument of this program when it is the measured process.
pub(crate) const CHILD: &str = "convert";

pub(crate) fn measure(lab: &Lab, rounds: usize, report: &mut Report) -> anyhow::Result<()> {
    for program in ["skopeo", "umoci", "mmdebstrap"] {
        if find_program(program).is_none() {
            report.skip(format!("conversion: {program} is not installed"));
            return Ok(());
        }
    }
    let layout = images::debian_layout(lab)?;
    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    let (mut our_cpu, mut their_cpu) = (Vec::new(), Vec::new());
    // Round 0 fills the page cache and is not counted.
    for round in 0..=rounds {
        eprintln!("conversion: round {round} of {rounds}");
        let (wall, cpu) = timed(|| fcvm(lab, &layout))?;
        let (other_wall, other_cpu) = timed(|| skopeo_and_umoci(lab, &layout))?;
        if round > 0 {
            ours.push(wall);
            our_cpu.push(cpu);
            theirs.push(other_wall);
            their_cpu.push(other_cpu);
        }
    }
    let name = "Debian image from an OCI layout to a root image";
    let other = "skopeo copy + umoci unpack";
    report.add(
        Measure::new("conversion", "ms wall", Samples::new(name, ours))
            .against(Samples::new(other, theirs))
            .target(Target::Ratio(0.6)),
    );
    report.add(
        Measure::new("conversion", "ms CPU", Samples::new(name, our_cpu))
            .against(Samples::new(other, their_cpu)),
    );
    Ok(())
}

/// Wall time and processor time of work that ends all of its processes, in milliseconds. What the
/// work gives is dropped, and so removed, after the clock has stopped.
fn timed<T>(work: impl FnOnce() -> anyhow::Result<T>) -> anyhow::Result<(f64, f64)> {
    let cpu_before = process::reaped_cpu_seconds();
    let started = Instant::now();
    let kept = work()?;
    let wall_ms = started.elapsed().as_secs_f64() * 1000.0;
    let cpu_ms = (process::reaped_cpu_seconds() - cpu_before) * 1000.0;
    drop(kept);
    Ok((wall_ms, cpu_ms))
}

/// A process of its own, so that its start counts as theirs does.
fn fcvm(lab: &Lab, layout: &Path) -> anyhow::Result<tempfile::TempDir> {
    let directory = tempfile::tempdir_in(&lab.data_dir)?;
    let mut command = Command::new(std::env::current_exe()?);
    command
        .arg(CHILD)
        .arg(directory.path())
        .arg(format!("oci:{}:latest", layout.display()));
    finished(command, "the conversion")?;
    Ok(directory)
}

fn skopeo_and_umoci(lab: &Lab, layout: &Path) -> anyhow::Result<tempfile::TempDir> {
    let directory = tempfile::tempdir_in(&lab.data_dir)?;
    let copy = directory.path().join("layout");
    let mut command = Command::new("skopeo");
    command.args(["copy", "--quiet", "--insecure-policy"]);
    command
        .arg(format!("oci:{}:latest", layout.display()))
        .arg(format!("oci:{}:latest", copy.display()));
    finished(command, "skopeo copy")?;
    let mut command = Command::new("umoci");
    command.arg("unpack");
    if !std::fs::metadata("/proc/self")
        .is_ok_and(|metadata| std::os::unix::fs::MetadataExt::uid(&metadata) == 0)
    {
        command.arg("--rootless");
    }
    command
        .arg("--image")
        .arg(format!("{}:latest", copy.display()))
        .arg(directory.path().join("bundle"));
    finished(command, "umoci unpack")?;
    Ok(directory)
}

/// What the measured process does: the library calls of `fcvm image import` and of the first
/// `fcvm run`.
pub(crate) fn convert(store: &Path, source: &str) -> anyhow::Result<()> {
    let store = ImageStore::open(store)?;
    let name: Reference = "localhost/bench/converted:1".parse()?;
    let options = ImportOptions {
        name: Some(name),
        platform: Platform::host(),
    };
    let source: Source = source.parse()?;
    let images = import(&store, &source, &options, &Silent)?;
    let image = images.first().context("nothing was imported")?;
    let root = store.root_image(image, &Silent)?;
    ensure!(root.is_file(), "there is no root image");
    Ok(())
}
