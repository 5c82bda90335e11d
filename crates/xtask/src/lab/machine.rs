//! The lab's machine: a script that runs in it, and its output and status.

use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, bail};

use super::kernel::LabKernel;

const BEGIN: &str = include_str!("../../lab/begin");
/// A processor with AMD's virtualisation, without what the emulation has not.
const PROCESSOR: &str = "EPYC,+svm,+npt,-nrip-save,-rdseed,-sha-ni,-fxsr-opt,-misalignsse,\
                         -3dnowprefetch,-osvw,-topoext,-xsavec";
/// Memory of the lab, MiB: what is written in it, and the guests.
const MEMORY_MIB: u32 = 6000;
/// Longest run, for timeout(1).
const LIMIT: &str = "2h";
/// Most bytes of the console that are shown where the lab gives no status.
const CONSOLE_BYTES: usize = 4000;

/// What runs in the lab: a directory that the host and the lab share.
pub(crate) struct Job {
    directory: PathBuf,
}

impl Job {
    /// Lays the script in, which sees `environment`.
    pub(crate) fn new(
        lab: &Path,
        kernel: &LabKernel,
        script: &str,
        environment: &[(String, String)],
    ) -> anyhow::Result<Self> {
        let directory = lab.join("job");
        let _ = fs::remove_dir_all(&directory);
        fs::create_dir_all(&directory)?;
        let mut lines = format!("LAB_MODULES={}\n", quoted(&absolute(&kernel.modules)?));
        for (name, value) in environment {
            lines.push_str(&format!("export {name}={}\n", quoted(value)));
        }
        fs::write(directory.join("environment"), lines)?;
        fs::write(directory.join("begin"), BEGIN)?;
        fs::write(directory.join("script"), script)?;
        Ok(Self { directory })
    }

    /// Boots the lab and runs the script to its end; gives its exit status.
    pub(crate) fn run(&self, kernel: &LabKernel) -> anyhow::Result<i32> {
        let console = self.directory.join("console");
        let share = |path: &Path, tag: &str, options: &str| {
            format!(
                "local,path={},mount_tag={tag},security_model=none{options}",
                path.display()
            )
        };
        let mut command = Command::new("timeout");
        command
            .args(["-k", "5", LIMIT, "qemu-system-x86_64"])
            .args(["-nodefaults", "-no-reboot", "-display", "none"])
            .args(["-machine", "q35", "-accel", "tcg"])
            // With two of them the emulated SVM loses an interrupt between them now and then, in which the lab's
            // kernel waits for ever, and guests lose theirs or reset themselves.
            .args(["-cpu", PROCESSOR, "-smp", "1"])
            .args(["-m", &MEMORY_MIB.to_string()])
            .arg("-kernel")
            .arg(&kernel.vmlinuz)
            .arg("-initrd")
            .arg(&kernel.initramfs)
            .args([
                "-append",
                "console=ttyS0 panic=-1 loglevel=5 mitigations=off",
            ])
            .arg("-serial")
            .arg(format!("file:{}", console.display()))
            // Not stdio, which is closed both ways where there is no input.
            .args(["-chardev", "file,id=output,path=/dev/stdout,append=on"])
            .args(["-device", "virtio-serial-pci"])
            .args(["-device", "virtserialport,chardev=output,name=output"])
            .args(["-device", "virtio-rng-pci"])
            .arg("-virtfs")
            .arg(share(
                Path::new("/"),
                "host",
                ",readonly=on,multidevs=remap",
            ))
            .arg("-virtfs")
            .arg(share(&self.directory, "job", ""))
            .stdin(Stdio::null());
        let ended = command.status().context("cannot start the lab")?;
        let status = fs::read_to_string(self.directory.join("status")).unwrap_or_default();
        match status.trim().parse() {
            Ok(status) => Ok(status),
            Err(_) => bail!(
                "the lab ended ({ended}) without a status; its console's last words:\n{}",
                tail(&console)
            ),
        }
    }
}

fn tail(path: &Path) -> String {
    let mut bytes = Vec::new();
    if let Ok(mut file) = fs::File::open(path) {
        let _ = file.read_to_end(&mut bytes);
    }
    let start = bytes.len().saturating_sub(CONSOLE_BYTES);
    String::from_utf8_lossy(&bytes[start..]).into_owned()
}

/// A path from the root on.
pub(super) fn absolute(path: &Path) -> anyhow::Result<String> {
    let path = std::path::absolute(path)?;
    let text = path.to_str().map(str::to_owned);
    text.with_context(|| format!("{} is not UTF-8", path.display()))
}

/// A text as a word of the shell.
fn quoted(text: &str) -> String {
    format!("'{}'", text.replace('\'', "'\\''"))
}
