//! Memory of what runs beside the guest, and sizes of the programs.

use anyhow::Context as _;
use serde_json::Value;

use crate::lab::{BenchVm, Lab};
use crate::process;
use crate::report::{Measure, Report, Samples, Target};

const MEGABYTE: f64 = 1e6;

pub(crate) fn measure(lab: &Lab, vm: &BenchVm<'_>, report: &mut Report) -> anyhow::Result<()> {
    eprintln!("memory: owner, agent, programs");
    let inspected = lab.inspect(&vm.name)?;
    let owner = inspected["owner_pid"]
        .as_u64()
        .and_then(|pid| u32::try_from(pid).ok());
    let owner = owner.context("the VM has no owner")?;
    report.conditions.accelerator = inspected["accelerator"].as_str().map(str::to_owned);
    let mut add = |name: &str, unit, value, target: Option<f64>| {
        let measure = Measure::new("memory", unit, Samples::new(name, vec![value]));
        report.add(match target {
            Some(limit) => measure.target(Target::Median(limit)),
            None => measure,
        });
    };
    let rss = process::memory_bytes(owner, "Rss")? / MEGABYTE;
    add("RSS of the owner of a detached VM", "MB", rss, Some(15.0));
    add(
        "PSS of the owner of a detached VM",
        "MB",
        process::memory_bytes(owner, "Pss")? / MEGABYTE,
        None,
    );
    let stats = lab.run(&["stats", "--no-stream", "--format", "json", &vm.name])?;
    let stats: Value = serde_json::from_slice(&stats).context("fcvm stats gives no JSON")?;
    let agent = stats[0]["guest"]["agent_rss_bytes"]
        .as_f64()
        .context("fcvm stats has no agent_rss_bytes")?;
    add("agent's RSS in the guest", "MB", agent / MEGABYTE, None);
    let used = |guest: &Value| {
        Some(guest["memory_total_bytes"].as_f64()? - guest["memory_available_bytes"].as_f64()?)
    };
    if let Some(bytes) = used(&stats[0]["guest"]) {
        add(
            "memory used in the guest, kernel included",
            "MB",
            bytes / MEGABYTE,
            None,
        );
    }
    if let Some(bytes) = stats[0]["host_pss_bytes"].as_f64() {
        add(
            "PSS of owner, QEMU and passt, guest memory included",
            "MB",
            bytes / MEGABYTE,
            None,
        );
    }
    for (name, path) in [
        ("size of fcvm", &lab.fcvm),
        ("size of fc-agent", &lab.agent),
    ] {
        let metadata = std::fs::metadata(path)
            .with_context(|| format!("cannot look at {}", path.display()))?;
        add(name, "MB", metadata.len() as f64 / MEGABYTE, None);
    }
    Ok(())
}
