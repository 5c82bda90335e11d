//! `fcvm run` against its floor: bare QEMU with the same kernel, initramfs and machine, without disks
//! and network, to the first line of its user space.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::process::{Child, Command, Stdio};
use std::time::Instant;

use anyhow::{Context as _, bail};
use serde_json::Value;

use crate::lab::Lab;
use crate::process;
use crate::report::{Measure, Report, Samples, Target};

/// What the agent writes on the console as soon as it runs.
const FIRST_LINE: &str = "fc-agent: started";

/// Wall time and processor time until something was seen.
pub(crate) struct Seen {
    pub(crate) wall_ms: f64,
    pub(crate) cpu_ms: f64,
}

/// One `fcvm run` up to its container's first output, and what could be asked while it lived.
pub(crate) struct FcvmBoot {
    pub(crate) seen: Seen,
    /// Processor time of QEMU alone at that moment.
    pub(crate) qemu_cpu_ms: f64,
    stages: Vec<(String, f64)>,
    /// Resident memory of the owner, in megabytes.
    owner_rss_mb: f64,
    qemu: Vec<String>,
    accelerator: String,
}

pub(crate) fn measure(lab: &Lab, rounds: usize, report: &mut Report) -> anyhow::Result<()> {
    // The first run converts the image and fills the page cache; it also shows QEMU's command line.
    let warm = fcvm_boot(lab, None)?;
    report.conditions.accelerator = Some(warm.accelerator.clone());
    let floor = bare(&warm.qemu)?;
    floor_boot(&floor)?;
    let mut taken = Rounds::default();
    for round in 1..=rounds {
        eprintln!("boot: round {round} of {rounds}");
        taken.boot(fcvm_boot(lab, None)?);
        let seen = floor_boot(&floor)?;
        taken.floor_wall.push(seen.wall_ms);
        taken.floor_cpu.push(seen.cpu_ms);
        let seen = whole_run(lab)?;
        taken.whole_wall.push(seen.wall_ms);
        taken.whole_cpu.push(seen.cpu_ms);
    }
    taken.report(report);
    Ok(())
}

/// The samples of all rounds.
#[derive(Default)]
struct Rounds {
    wall: Vec<f64>,
    cpu: Vec<f64>,
    qemu_cpu: Vec<f64>,
    owner_rss: Vec<f64>,
    stages: BTreeMap<usize, (String, Vec<f64>)>,
    floor_wall: Vec<f64>,
    floor_cpu: Vec<f64>,
    whole_wall: Vec<f64>,
    whole_cpu: Vec<f64>,
}

impl Rounds {
    fn boot(&mut self, boot: FcvmBoot) {
        self.wall.push(boot.seen.wall_ms);
        self.cpu.push(boot.seen.cpu_ms);
        self.qemu_cpu.push(boot.qemu_cpu_ms);
        self.owner_rss.push(boot.owner_rss_mb);
        for (index, (stage, milliseconds)) in boot.stages.into_iter().enumerate() {
            let entry = self.stages.entry(index);
            let (_, samples) = entry.or_insert_with(|| (stage, Vec::new()));
            samples.push(milliseconds);
        }
    }

    fn report(self, report: &mut Report) {
        let row = |unit, samples| Measure::new("boot", unit, samples);
        let first = "fcvm run: first container output";
        let floor_cpu = Samples::new("bare QEMU", self.floor_cpu);
        report.add(
            row("ms wall", Samples::new(first, self.wall))
                .against(Samples::new("bare QEMU", self.floor_wall))
                .target(Target::Difference(150.0)),
        );
        report.add(
            row("ms CPU", Samples::new(first, self.cpu))
                .against(floor_cpu.clone())
                .target(Target::Ratio(1.15)),
        );
        let qemu = Samples::new("  of which QEMU", self.qemu_cpu);
        report.add(row("ms CPU", qemu).against(floor_cpu));
        for (stage, samples) in self.stages.into_values() {
            let samples = Samples::new(format!("  stage: {stage}"), samples);
            report.add(row("ms wall", samples));
        }
        let rss = Samples::new("fcvm run's own RSS while its VM runs", self.owner_rss);
        report.add(row("MB", rss).target(Target::Median(15.0)));
        let whole = "fcvm run --rm IMAGE true, to its end";
        report.add(row("ms wall", Samples::new(whole, self.whole_wall)));
        report.add(row("ms CPU", Samples::new(whole, self.whole_cpu)));
    }
}

/// Runs a container that writes a line and waits; it is asked for its stages meanwhile. `kernel` is one that `--kernel`
/// takes, in place of the selected one.
pub(crate) fn fcvm_boot(lab: &Lab, kernel: Option<&str>) -> anyhow::Result<FcvmBoot> {
    let name = format!("bench-boot-{}", std::process::id());
    let script = "echo ready; read line";
    let run = ["run", "--rm", "-i", "--pull", "never", "--name", &name];
    let kernel = kernel.map_or(Vec::new(), |kernel| vec!["--kernel", kernel]);
    let container = [lab.image.as_str(), "sh", "-c", script];
    let arguments = [&run[..], &kernel, &container].concat();
    let started = Instant::now();
    let mut child = Running(
        lab.command(&arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .context("cannot start fcvm")?,
    );
    let mut byte = [0];
    let stdout = child.0.stdout.as_mut().context("fcvm has no output")?;
    stdout
        .read_exact(&mut byte)
        .context("fcvm run ended before the container wrote")?;
    let wall_ms = started.elapsed().as_secs_f64() * 1000.0;
    let cpu_ms = process::tree_cpu_seconds(child.0.id()) * 1000.0;
    let vm = lab.inspect(&name)?;
    let qemu_pid = helper_pid(&vm, "qemu")?;
    let boot = FcvmBoot {
        seen: Seen { wall_ms, cpu_ms },
        qemu_cpu_ms: process::cpu_seconds(qemu_pid) * 1000.0,
        stages: stages(&vm["start_timings"]),
        owner_rss_mb: process::memory_bytes(child.0.id(), "Rss")? / 1e6,
        qemu: process::command_line(qemu_pid)?,
        accelerator: vm["accelerator"].as_str().unwrap_or("unknown").to_owned(),
    };
    child
        .0
        .stdin
        .take()
        .context("fcvm has no input")?
        .write_all(b"\n")?;
    let status = child.0.wait()?;
    if !status.success() {
        bail!("fcvm run failed ({status})");
    }
    Ok(boot)
}

/// Process id of a helper in the VM's resources.
pub(crate) fn helper_pid(vm: &Value, role: &str) -> anyhow::Result<u32> {
    let resources = vm["resources"]
        .as_array()
        .context("the VM has no resources")?;
    let helper = resources.iter().find(|resource| resource["role"] == role);
    let pid = helper.and_then(|helper| helper["identity"]["pid"].as_u64());
    u32::try_from(pid.with_context(|| format!("the VM has no process of the role '{role}'"))?)
        .context("a process id")
}

/// Stages as fcvm tells them, in milliseconds.
pub(crate) fn stages(timings: &Value) -> Vec<(String, f64)> {
    let timings = timings.as_array();
    timings
        .into_iter()
        .flatten()
        .filter_map(|timing| {
            Some((
                timing["stage"].as_str()?.to_owned(),
                timing["microseconds"].as_f64()? / 1000.0,
            ))
        })
        .collect()
}

fn whole_run(lab: &Lab) -> anyhow::Result<Seen> {
    let cpu_before = process::reaped_cpu_seconds();
    let started = Instant::now();
    lab.run(&["run", "--rm", "--pull", "never", &lab.image, "true"])?;
    let wall_ms = started.elapsed().as_secs_f64() * 1000.0;
    Ok(Seen {
        wall_ms,
        cpu_ms: (process::reaped_cpu_seconds() - cpu_before) * 1000.0,
    })
}

fn floor_boot(command_line: &[String]) -> anyhow::Result<Seen> {
    let (program, arguments) = command_line
        .split_first()
        .context("QEMU has no command line")?;
    let mut command = Command::new(program);
    command
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let started = Instant::now();
    let mut child = Running(
        command
            .spawn()
            .with_context(|| format!("cannot start {program}"))?,
    );
    let stdout = child.0.stdout.take().context("QEMU has no output")?;
    for line in BufReader::new(stdout).split(b'\n') {
        let line = line?;
        if String::from_utf8_lossy(&line).contains(FIRST_LINE) {
            let wall_ms = started.elapsed().as_secs_f64() * 1000.0;
            return Ok(Seen {
                wall_ms,
                cpu_ms: process::cpu_seconds(child.0.id()) * 1000.0,
            });
        }
    }
    let mut said = String::new();
    child
        .0
        .stderr
        .take()
        .context("QEMU has no stderr")?
        .read_to_string(&mut said)?;
    bail!("bare QEMU ended before '{FIRST_LINE}': {}", said.trim());
}

/// A process that ends with this value.
pub(crate) struct Running(pub(crate) Child);

impl Drop for Running {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// QEMU's command line without disks, network and what is inherited from the owner; the console goes
/// to standard output.
pub(crate) fn bare(full: &[String]) -> anyhow::Result<Vec<String>> {
    let (program, arguments) = full.split_first().context("QEMU has no command line")?;
    let mut line = vec![program.clone()];
    let mut rest = arguments.iter().peekable();
    while let Some(option) = rest.next() {
        // fcvm lets the machine go by a command, which nobody sends here.
        if option == "-S" {
            continue;
        }
        // What begins with '-' is the next option: this one has no value.
        let Some(value) = rest.next_if(|value| !value.starts_with('-')) else {
            line.push(option.clone());
            continue;
        };
        if let Some(value) = bare_value(option, value) {
            line.extend([option.clone(), value]);
        }
    }
    let has = |name: &str| line.iter().any(|argument| argument == name);
    if !has("-kernel") || !has("-machine") {
        bail!(
            "QEMU's command line is not one that this bench understands: {}",
            full.join(" ")
        );
    }
    Ok(line)
}

/// The value of an option on the bare command line; `None` for an option that is not on it.
fn bare_value(option: &str, value: &str) -> Option<String> {
    let kind = value.split(',').next().unwrap_or_default();
    match option {
        "-add-fd" | "-blockdev" | "-netdev" | "-mon" => None,
        "-device" if kind.starts_with("virtio-blk") || kind.starts_with("virtio-net") => None,
        "-chardev" if value.contains("id=console") => {
            Some("stdio,id=console,signal=off".to_owned())
        }
        "-chardev" if value.contains("id=agent") => Some("null,id=agent".to_owned()),
        "-chardev" => None,
        "-object" if kind == "memory-backend-file" => {
            // Anonymous and shared as well: a descriptor of the owner is no part of the floor.
            let kept = value
                .split(',')
                .skip(1)
                .filter(|field| !field.starts_with("mem-path="));
            Some(
                std::iter::once("memory-backend-memfd")
                    .chain(kept)
                    .collect::<Vec<_>>()
                    .join(","),
            )
        }
        _ => Some(value.to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_floor_has_the_machine_and_neither_disks_nor_network() {
        let full = "qemu-system-x86_64 -nodefaults -no-user-config \
            -object memory-backend-file,id=memory,size=268435456,mem-path=/proc/self/fd/3,share=on \
            -machine microvm,memory-backend=memory -m 268435456B -add-fd fd=6,set=0,opaque=console \
            -chardev file,id=console,path=/dev/fdset/0,append=on -serial chardev:console \
            -device virtio-serial-device,id=serial0 -chardev socket,id=agent,fd=5 \
            -device virtserialport,chardev=agent,name=fcvm.agent.0,nr=1 \
            -add-fd fd=7,set=7,opaque=fcvm-root -blockdev driver=raw,node-name=fcvm-root \
            -device virtio-blk-device,drive=fcvm-root,serial=fcvm-root \
            -netdev stream,id=net0,server=off,addr.type=fd,addr.str=8 \
            -device virtio-net-device,netdev=net0,mac=52:54:00:01:02:03 -no-reboot -S -sandbox on \
            -chardev socket,id=control,fd=4 -mon chardev=control,mode=control -kernel vmlinux -append quiet";
        let full: Vec<String> = full.split_whitespace().map(str::to_owned).collect();
        let expected = "qemu-system-x86_64 -nodefaults -no-user-config \
            -object memory-backend-memfd,id=memory,size=268435456,share=on \
            -machine microvm,memory-backend=memory -m 268435456B \
            -chardev stdio,id=console,signal=off -serial chardev:console \
            -device virtio-serial-device,id=serial0 -chardev null,id=agent \
            -device virtserialport,chardev=agent,name=fcvm.agent.0,nr=1 \
            -no-reboot -sandbox on -kernel vmlinux -append quiet";
        let expected: Vec<String> = expected.split_whitespace().map(str::to_owned).collect();
        assert_eq!(bare(&full).unwrap(), expected);
        assert!(bare(&["qemu".to_owned()]).is_err());
    }
}
