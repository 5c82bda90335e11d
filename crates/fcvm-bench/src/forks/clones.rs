//! Many clones at once: how soon all answer, and what each of them weighs, idle and after work.

use std::collections::BTreeMap;
use std::time::Instant;

use anyhow::Context as _;

use super::{Scale, by_stage, processes, source};
use crate::boot;
use crate::lab::Lab;
use crate::process::{self, Share};
use crate::report::{Measure, Report, Samples, Target};

const MEGABYTE: f64 = 1e6;

/// The guest memory's name in `/proc/PID/smaps`; the kernel puts `memfd:` before it.
const GUEST_MEMORY: &str = "/memfd:fcvm-guest-memory";

/// What each clone does once: a loop of a shell, a megabyte of noise compressed and hashed.
const JOB: &str = "i=0; while [ $i -lt 5000 ]; do i=$((i+1)); done; \
    dd if=/dev/urandom bs=64k count=16 2>/dev/null | busybox gzip | sha256sum";

/// Memory of a VM's processes, in bytes.
#[derive(Default)]
struct Weight {
    guest: Share,
    /// QEMU without the guest's memory: the translation buffer, its heap, its program.
    qemu_rest: Share,
    /// PSS of each other process, by what it does.
    others: BTreeMap<String, f64>,
    owner_rss: f64,
}

impl Weight {
    fn of(lab: &Lab, vm: &str) -> anyhow::Result<Self> {
        let mut weight = Self::default();
        for (role, pid) in processes(&lab.inspect(vm)?) {
            if role == "qemu" {
                (weight.guest, weight.qemu_rest) = process::shares(pid, GUEST_MEMORY)?;
                continue;
            }
            if role == "owner" {
                weight.owner_rss = process::memory_bytes(pid, "Rss")?;
            }
            let pss = process::memory_bytes(pid, "Pss")?;
            *weight.others.entry(role).or_default() += pss;
        }
        Ok(weight)
    }

    fn pss(&self) -> f64 {
        self.guest.pss + self.qemu_rest.pss + self.others.values().sum::<f64>()
    }
}

pub(super) fn measure(lab: &Lab, scale: Scale, report: &mut Report) -> anyhow::Result<()> {
    eprintln!("clones: {} at once", scale.clones);
    let vm = source(lab, "256m", report)?;
    let alone = Weight::of(lab, &vm.name)?.pss();
    let prefix = format!("{}-clone", vm.name);
    let count = scale.clones.to_string();
    let names: Vec<String> = (1..=scale.clones)
        .map(|number| format!("{prefix}-{number}"))
        .collect();
    let started = Instant::now();
    let arguments = [
        "fork", &vm.name, "--rm", "-n", &count, "--name", &prefix, "--exec", "true",
    ];
    lab.run(&arguments)?;
    let all_ms = started.elapsed().as_secs_f64() * 1000.0;
    let measured = weigh_twice(lab, &names, alone, report);
    let mut remove = vec!["rm", "-f"];
    remove.extend(names.iter().map(String::as_str));
    lab.run(&remove)?;
    let stages = measured?;
    let name = format!("fork -n {count}: all clones answered a command");
    report.add(Measure::new(
        "clones",
        "ms wall",
        Samples::new(name, vec![all_ms]),
    ));
    let stages: Vec<_> = stages.iter().map(Vec::as_slice).collect();
    for (stage, samples) in by_stage(&stages) {
        let samples = Samples::new(format!("  clone's stage: {stage}"), samples);
        report.add(Measure::new("clones", "ms wall", samples));
    }
    Ok(())
}

/// The clones idle and after their job; gives the stages of their starts.
fn weigh_twice(
    lab: &Lab,
    names: &[String],
    alone: f64,
    report: &mut Report,
) -> anyhow::Result<Vec<Vec<(String, f64)>>> {
    weigh(lab, names, alone, "idle", report)?;
    let stages = names
        .iter()
        .map(|name| Ok(boot::stages(&lab.inspect(name)?["start_timings"])))
        .collect::<anyhow::Result<Vec<_>>>()?;
    eprintln!("clones: a job in each");
    let mut job_ms = Vec::new();
    for name in names {
        let started = Instant::now();
        lab.run(&["exec", name, "sh", "-c", JOB]).context("job")?;
        job_ms.push(started.elapsed().as_secs_f64() * 1000.0);
    }
    let job = Samples::new("the job, one clone after the other", job_ms);
    report.add(Measure::new("clones", "ms wall", job));
    weigh(lab, names, alone, "after a job", report)?;
    Ok(stages)
}

fn weigh(
    lab: &Lab,
    names: &[String],
    alone: f64,
    when: &str,
    report: &mut Report,
) -> anyhow::Result<()> {
    let weights = names
        .iter()
        .map(|name| Weight::of(lab, name))
        .collect::<anyhow::Result<Vec<_>>>()?;
    let mut add = |name: String, value: &dyn Fn(&Weight) -> f64, limit: Option<f64>| {
        let samples = weights.iter().map(|weight| value(weight) / MEGABYTE);
        let samples = Samples::new(format!("{name}, {when}"), samples.collect());
        let row = Measure::new("clones", "MB", samples);
        report.add(match limit {
            Some(limit) => row.target(Target::Median(limit)),
            None => row,
        });
    };
    let limit = (when == "idle").then_some(4.0);
    add(
        "PSS of the guest's memory per clone".to_owned(),
        &|weight| weight.guest.pss,
        limit,
    );
    add(
        "  private and dirty of it".to_owned(),
        &|weight| weight.guest.private_dirty,
        None,
    );
    add(
        "  PSS of QEMU's other memory".to_owned(),
        &|weight| weight.qemu_rest.pss,
        None,
    );
    add(
        "  private and dirty of that".to_owned(),
        &|weight| weight.qemu_rest.private_dirty,
        None,
    );
    let roles: Vec<String> = weights
        .first()
        .map(|weight| weight.others.keys().cloned().collect())
        .unwrap_or_default();
    for role in roles {
        let value = |weight: &Weight| weight.others.get(&role).copied().unwrap_or(0.0);
        add(format!("  PSS of {role}"), &value, None);
    }
    add(
        "  RSS of owner".to_owned(),
        &|weight| weight.owner_rss,
        None,
    );
    add(
        "PSS of a clone, all its processes".to_owned(),
        &Weight::pss,
        None,
    );
    let sum = weights.iter().map(Weight::pss).sum::<f64>() / MEGABYTE;
    let times = format!("{} x the VM before its fork", names.len());
    let family = names.len() as f64 * alone / MEGABYTE;
    let name = format!("sum of the clones' PSS, {when}");
    let row = Measure::new("clones", "MB", Samples::new(name, vec![sum]));
    report.add(row.against(Samples::new(times, vec![family])));
    Ok(())
}
