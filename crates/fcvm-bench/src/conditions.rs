//! Under which conditions was measured: figures without them say nothing.

use std::fmt;
use std::fs;
use std::process::Command;

use serde::Serialize;

use crate::lab::{Lab, finished};

/// The host and the versions.
#[derive(Debug, Serialize)]
pub(crate) struct Conditions {
    fcvm: String,
    qemu: String,
    processor: String,
    processor_count: usize,
    memory_mib: u64,
    host_kernel: String,
    /// `kvm` or `tcg`; unknown until a VM has run.
    pub(crate) accelerator: Option<String>,
    /// Release of the guest's kernel, and the package it came in.
    guest_kernel: Option<String>,
    image: String,
    rounds: usize,
    load_before: String,
    /// Load when all was measured.
    pub(crate) load_after: String,
}

/// Looks at the host. Without a lab no VM is started.
pub(crate) fn read(lab: Option<&Lab>, rounds: usize) -> Conditions {
    let first_line = |program: &str| {
        let mut command = Command::new(program);
        command.arg("--version");
        let output = finished(command, program).unwrap_or_default();
        String::from_utf8_lossy(&output)
            .lines()
            .next()
            .unwrap_or("unknown")
            .to_owned()
    };
    let processor = field("/proc/cpuinfo", "model name");
    let memory_kib = field("/proc/meminfo", "MemTotal")
        .and_then(|text| text.split(' ').next()?.parse::<u64>().ok());
    Conditions {
        fcvm: lab.map_or_else(
            || "no fcvm".to_owned(),
            |lab| first_line(&lab.fcvm.to_string_lossy()),
        ),
        qemu: first_line("qemu-system-x86_64"),
        processor: processor.unwrap_or_else(|| std::env::consts::ARCH.to_owned()),
        processor_count: std::thread::available_parallelism().map_or(1, usize::from),
        memory_mib: memory_kib.unwrap_or(0) / 1024,
        host_kernel: read_trimmed("/proc/sys/kernel/osrelease"),
        accelerator: None,
        guest_kernel: lab.and_then(|lab| lab.guest_kernel.clone()),
        image: lab.map_or_else(|| "none".to_owned(), |lab| lab.image.clone()),
        rounds,
        load_before: load(),
        load_after: String::new(),
    }
}

/// Processes that wanted to run: averages over 1, 5 and 15 minutes.
pub(crate) fn load() -> String {
    read_trimmed("/proc/loadavg")
        .split(' ')
        .take(3)
        .collect::<Vec<_>>()
        .join(" ")
}

fn read_trimmed(path: &str) -> String {
    fs::read_to_string(path)
        .unwrap_or_default()
        .trim()
        .to_owned()
}

fn field(path: &str, name: &str) -> Option<String> {
    let text = fs::read_to_string(path).ok()?;
    let line = text.lines().find(|line| line.starts_with(name))?;
    Some(line.split_once(':')?.1.trim().to_owned())
}

impl fmt::Display for Conditions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let unknown = "unknown".to_owned();
        writeln!(f, "{}, {}", self.fcvm, self.qemu)?;
        writeln!(
            f,
            "{} x {}, {} MiB, Linux {}, accelerator {}, guest kernel {}",
            self.processor_count,
            self.processor,
            self.memory_mib,
            self.host_kernel,
            self.accelerator.as_ref().unwrap_or(&unknown),
            self.guest_kernel.as_ref().unwrap_or(&unknown),
        )?;
        write!(
            f,
            "image {}, {} rounds, load before {}, after {}",
            self.image, self.rounds, self.load_before, self.load_after
        )
    }
}
