//! Starting another kernel without the firmware: what must hold before, and the commands.

use std::fs;
use std::path::Path;

use super::{HostKernel, check_root, running};
use crate::{KernelError, Result};

/// A checked way into another kernel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Kexec {
    /// Loads the kernel; nothing else happens yet.
    pub load: Vec<String>,
    /// Starts what is loaded; where systemd runs, after it has ended the services in order.
    pub start: Vec<String>,
}

/// Checks that the system below `root` can load this kernel with the given command line, or its running one.
pub fn kexec(root: &Path, kernel: &HostKernel, command_line: Option<&str>) -> Result<Kexec> {
    let refuse = |reason: String| KernelError::Install {
        path: kernel.vmlinuz.clone(),
        reason,
    };
    let read = |path: &str| fs::read_to_string(root.join(path)).unwrap_or_default();
    kernel.facts()?;
    match read("proc/sys/kernel/kexec_load_disabled").trim() {
        "0" => {}
        "" => {
            return Err(refuse(
                "the running kernel has no kexec (CONFIG_KEXEC)".to_owned(),
            ));
        }
        _ => {
            return Err(refuse(
                "kexec is off until the next boot (sysctl kernel.kexec_load_disabled)".to_owned(),
            ));
        }
    }
    let lockdown = read("sys/kernel/security/lockdown");
    if lockdown.contains("[integrity]") || lockdown.contains("[confidentiality]") {
        return Err(refuse(
            "the running kernel is locked down (Secure Boot) and loads only signed kernels: boot it from the menu".to_owned(),
        ));
    }
    let program = ["usr/sbin/kexec", "sbin/kexec", "usr/bin/kexec"]
        .into_iter()
        .find(|path| root.join(path).exists());
    let Some(program) = program else {
        return Err(refuse(
            "the program kexec is missing: apt install kexec-tools".to_owned(),
        ));
    };
    let command_line = command_line.map_or_else(|| running(&read("proc/cmdline")), str::to_owned);
    check_root(&command_line, kernel.initrd.is_some())
        .map_err(|error| refuse(error.to_string()))?;
    let program = format!("/{program}");
    let mut load = vec![
        program.clone(),
        "--load".to_owned(),
        // The kernel reads the image itself where it can; older ones are handed its parts.
        "--kexec-syscall-auto".to_owned(),
        kernel.vmlinuz.display().to_string(),
    ];
    if let Some(initrd) = &kernel.initrd {
        load.push(format!("--initrd={}", initrd.display()));
    }
    load.push(format!("--command-line={command_line}"));
    let start = match root.join("run/systemd/system").exists() {
        true => ["systemctl", "kexec"].map(str::to_owned).to_vec(),
        false => vec![program, "--exec".to_owned()],
    };
    Ok(Kexec { load, start })
}
