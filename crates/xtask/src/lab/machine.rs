//! The lab's machine: a script that runs in it, and its output and status.

use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::Duration;

use anyhow::{Context as _, bail};

use super::kernel::LabKernel;

const BEGIN: &str = include_str!("../../lab/begin");
/// A processor with AMD's virtualisation, without what the emulation has not.
const PROCESSOR: &str = "EPYC,+svm,+npt,-nrip-save,-rdseed,-sha-ni,-fxsr-opt,-misalignsse,\
                         -3dnowprefetch,-osvw,-topoext,-xsavec";
/// Memory of the lab, MiB: what is written in it, and the guests.
const MEMORY_MIB: u32 = 6000;
/// How long it says nothing at the most: longer than any test takes here.
const SILENCE: Duration = Duration::from_secs(15 * 60);
/// Most bytes of the console that are shown where the lab gives no status.
const CONSOLE_BYTES: usize = 4000;

/// How a run in the lab has ended.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Ended {
    /// With the script's exit status.
    Status(i32),
    /// It has said nothing for too long, and was ended.
    StoodStill,
}

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

    /// Boots the lab and runs the script to its end; each of its lines is printed, and shown to `line`.
    pub(crate) fn run(
        &self,
        kernel: &LabKernel,
        mut line: impl FnMut(&str),
    ) -> anyhow::Result<Ended> {
        let mut machine = self
            .command(kernel)
            .spawn()
            .context("cannot start the lab")?;
        let lines = lines_of(&mut machine)?;
        loop {
            match lines.recv_timeout(SILENCE) {
                Ok(text) => {
                    println!("{text}");
                    line(&text);
                }
                Err(RecvTimeoutError::Disconnected) => break,
                Err(RecvTimeoutError::Timeout) => {
                    machine.kill()?;
                    machine.wait()?;
                    return Ok(Ended::StoodStill);
                }
            }
        }
        let ended = machine.wait()?;
        let status = fs::read_to_string(self.directory.join("status")).unwrap_or_default();
        match status.trim().parse() {
            Ok(status) => Ok(Ended::Status(status)),
            Err(_) => bail!(
                "the lab ended ({ended}) without a status; its console's last words:\n{}",
                tail(&self.directory.join("console"))
            ),
        }
    }

    fn command(&self, kernel: &LabKernel) -> Command {
        let console = self.directory.join("console");
        let share = |path: &Path, tag: &str, options: &str| {
            format!(
                "local,path={},mount_tag={tag},security_model=none{options}",
                path.display()
            )
        };
        let mut command = Command::new("qemu-system-x86_64");
        command
            .args(["-nodefaults", "-no-reboot", "-display", "none"])
            .args(["-machine", "q35", "-accel", "tcg"])
            // With two of them the emulated SVM loses an interrupt between them once in an hour or so, for which the
            // lab's kernel waits for ever, and guests reset themselves. With one it stood still once in several hours.
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
            .stdin(Stdio::null())
            .stdout(Stdio::piped());
        command
    }
}

/// The lines that a process writes.
fn lines_of(machine: &mut Child) -> anyhow::Result<Receiver<String>> {
    let output = machine.stdout.take().context("the lab has no output")?;
    let (sender, lines) = channel();
    std::thread::spawn(move || {
        let mut output = BufReader::new(output);
        let mut bytes = Vec::new();
        while output
            .read_until(b'\n', &mut bytes)
            .is_ok_and(|count| count > 0)
        {
            let text = String::from_utf8_lossy(&bytes).trim_end().to_owned();
            bytes.clear();
            if sender.send(text).is_err() {
                break;
            }
        }
    });
    Ok(lines)
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
