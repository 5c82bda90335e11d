//! The same boot with kernels that were built here, against Debian's packaged one: alternately, to the container's
//! first output.

use anyhow::Context as _;
use serde_json::Value;

use crate::boot;
use crate::lab::Lab;
use crate::report::{Measure, Report, Samples, Target};

/// Profile that is to be the fastest.
const PROFILE: &str = "guest-min";
/// Share of the packaged kernel's processor time that it may take: 2.5 times less.
const CPU_RATIO: f64 = 0.4;
const PACKAGED: &str = "packaged";

/// One figure of each run.
type Figure = fn(&Taken) -> Vec<f64>;

/// What is measured with one kernel.
struct Taken {
    name: String,
    wall: Vec<f64>,
    cpu: Vec<f64>,
    qemu_cpu: Vec<f64>,
    vmlinux_bytes: u64,
}

pub(crate) fn measure(
    lab: &Lab,
    peer: Option<&str>,
    rounds: usize,
    report: &mut Report,
) -> anyhow::Result<()> {
    let built = lab.json(&["kernel", "ls", "--format", "json"])?;
    let Some(kernel) = newest(&built) else {
        report.skip(format!(
            "kernels: {PROFILE} is not built ('fcvm kernel build' with FCVM_DATA_DIR={})",
            lab.data_dir.join("fcvm").display()
        ));
        return Ok(());
    };
    // What a kernel is compared with has no name of its own among those that '--kernel' takes: it is selected.
    lab.run(&["setup", "kernel", "--profile", PACKAGED])?;
    let packaged = lab.data_dir.join("fcvm/kernels/current/vmlinux");
    let mut taken = vec![
        Taken::new(PROFILE, kernel["vmlinux_bytes"].as_u64().unwrap_or(0)),
        Taken::new(PACKAGED, size_bytes(packaged.to_str())?),
    ];
    if let Some(peer) = peer {
        taken.push(Taken::new(peer, size_bytes(Some(peer))?));
    }
    let name = kernel["name"].as_str().context("a kernel has no name")?;
    for round in 0..=rounds {
        eprintln!("kernels: round {round} of {rounds}");
        for one in &mut taken {
            let option = match one.name.as_str() {
                PROFILE => Some(name),
                PACKAGED => None,
                peer => Some(peer),
            };
            let boot = boot::fcvm_boot(lab, option)?;
            // The first fills the page cache and packs the initramfs.
            if round > 0 {
                one.wall.push(boot.seen.wall_ms);
                one.cpu.push(boot.seen.cpu_ms);
                one.qemu_cpu.push(boot.qemu_cpu_ms);
            }
        }
    }
    show(&taken, report);
    Ok(())
}

impl Taken {
    fn new(name: &str, vmlinux_bytes: u64) -> Self {
        Self {
            name: name.to_owned(),
            wall: Vec::new(),
            cpu: Vec::new(),
            qemu_cpu: Vec::new(),
            vmlinux_bytes,
        }
    }
}

fn show(taken: &[Taken], report: &mut Report) {
    let Some((first, others)) = taken.split_first() else {
        return;
    };
    let figures: [(&str, &str, Figure); 4] = [
        ("first container output", "ms wall", |of| of.wall.clone()),
        ("first container output", "ms CPU", |of| of.cpu.clone()),
        ("  of which QEMU", "ms CPU", |of| of.qemu_cpu.clone()),
        ("vmlinux", "MB", |of| vec![of.vmlinux_bytes as f64 / 1e6]),
    ];
    for other in others {
        for (what, unit, samples) in figures {
            let name = format!("{}: {what}", first.name);
            let measure = Measure::new("kernels", unit, Samples::new(name, samples(first)))
                .against(Samples::new(other.name.clone(), samples(other)));
            let has_target = other.name == PACKAGED && unit == "ms CPU" && !what.starts_with(' ');
            report.add(match has_target {
                true => measure.target(Target::Ratio(CPU_RATIO)),
                false => measure,
            });
        }
    }
}

/// The newest built kernel of the profile: the list begins with the newest.
fn newest(built: &Value) -> Option<&Value> {
    let kernels = built.as_array()?;
    kernels.iter().find(|kernel| kernel["profile"] == PROFILE)
}

fn size_bytes(path: Option<&str>) -> anyhow::Result<u64> {
    let path = path.context("a kernel's path is not UTF-8")?;
    let metadata = std::fs::metadata(path).with_context(|| format!("cannot look at {path}"))?;
    Ok(metadata.len())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_kernel_of_the_profile_is_taken() {
        let built = serde_json::json!([
            {"name": "guest-zfs-1", "profile": "guest-zfs"},
            {"name": "guest-min-2", "profile": "guest-min"},
            {"name": "guest-min-1", "profile": "guest-min"},
        ]);
        assert_eq!(newest(&built).unwrap()["name"], "guest-min-2");
        assert!(newest(&serde_json::json!([])).is_none());
    }
}
