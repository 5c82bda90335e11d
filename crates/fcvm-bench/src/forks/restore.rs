//! What forks are compared with: stock QEMU's own way, a VM's whole state with its memory written to a
//! file and read again. The machine is that of the measured VM without disks and network; process 1 is
//! the bench's own program, which holds the same memory and answers on the console.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{ChildStdin, ChildStdout, Command, Stdio};
use std::time::Instant;

use anyhow::{Context as _, bail};
use serde_json::{Value, json};

use crate::boot::{self, Running};

/// A VM saved to a file.
pub(super) struct Saved {
    line: Vec<String>,
    directory: PathBuf,
    /// Size of the file.
    pub(super) bytes: u64,
}

/// How long a restore took since the start of QEMU, in milliseconds.
pub(super) struct Restored {
    /// Until `cont` was answered.
    pub(super) running_ms: f64,
    /// Until the guest had answered a line on its console.
    pub(super) answered_ms: f64,
}

impl Saved {
    /// Boots the machine of a QEMU command line with `held_mib` of memory in use and saves it.
    pub(super) fn new(
        full: &[String],
        program: &Path,
        held_mib: u32,
        directory: &Path,
    ) -> anyhow::Result<Self> {
        let initramfs = directory.join("initramfs");
        fs::write(&initramfs, archive(&fs::read(program)?))?;
        let mut saved = Self {
            line: stock(&boot::bare(full)?, &initramfs, held_mib)?,
            directory: directory.to_owned(),
            bytes: 0,
        };
        let mut machine = saved.start(&[])?;
        machine.answer("ready")?;
        machine.command("stop", &json!({}))?;
        // The default limit is for networks.
        machine.command(
            "migrate-set-parameters",
            &json!({ "max-bandwidth": 1_u64 << 40 }),
        )?;
        let uri = format!("exec:cat >'{}'", saved.file().display());
        machine.command("migrate", &json!({ "uri": uri }))?;
        machine.migrated()?;
        drop(machine);
        saved.bytes = fs::metadata(saved.file())?.len();
        Ok(saved)
    }

    fn file(&self) -> PathBuf {
        self.directory.join("state")
    }

    fn start(&self, more: &[&str]) -> anyhow::Result<Machine> {
        Machine::start(&self.line, more, &self.directory.join("console"))
    }

    /// Restores it once.
    pub(super) fn restore(&self) -> anyhow::Result<Restored> {
        let started = Instant::now();
        let elapsed_ms = || started.elapsed().as_secs_f64() * 1000.0;
        let mut machine = self.start(&["-S", "-incoming", "defer"])?;
        let uri = format!("exec:cat '{}'", self.file().display());
        machine.command("migrate-incoming", &json!({ "uri": uri }))?;
        machine.migrated()?;
        machine.command("cont", &json!({}))?;
        let running_ms = elapsed_ms();
        machine.console.get_mut().write_all(b"\n")?;
        machine.answer("here")?;
        Ok(Restored {
            running_ms,
            answered_ms: elapsed_ms(),
        })
    }
}

impl Drop for Saved {
    fn drop(&mut self) {
        // The directory goes with the bench; its space is needed before.
        let _ = fs::remove_file(self.file());
    }
}

/// A running QEMU, its QMP on standard input and output; it ends with this value.
struct Machine {
    _process: Running,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
    console: BufReader<UnixStream>,
}

impl Machine {
    fn start(line: &[String], more: &[&str], console: &Path) -> anyhow::Result<Self> {
        let _ = fs::remove_file(console);
        let listener = UnixListener::bind(console)
            .with_context(|| format!("cannot listen on {}", console.display()))?;
        let (program, arguments) = line.split_first().context("QEMU has no command line")?;
        let mut process = Command::new(program)
            .args(arguments)
            .args(more)
            .args(["-chardev", "stdio,id=bench,signal=off"])
            .args(["-mon", "chardev=bench,mode=control"])
            .arg("-chardev")
            .arg(format!("socket,id=console,path={}", console.display()))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| format!("cannot start {program}"))?;
        let input = process.stdin.take().context("QEMU has no input")?;
        let output = process.stdout.take().context("QEMU has no output")?;
        let process = Running(process);
        let mut output = BufReader::new(output);
        let mut greeting = String::new();
        output.read_line(&mut greeting)?;
        if greeting.is_empty() {
            bail!("QEMU ended at once: {}", line.join(" "));
        }
        // It connects before it greets: this never waits.
        let (console, _) = listener.accept()?;
        let mut machine = Self {
            _process: process,
            input,
            output,
            console: BufReader::new(console),
        };
        machine.command("qmp_capabilities", &json!({}))?;
        let events = json!({ "capabilities": [{ "capability": "events", "state": true }] });
        machine.command("migrate-set-capabilities", &events)?;
        Ok(machine)
    }

    fn message(&mut self) -> anyhow::Result<Value> {
        let mut line = String::new();
        self.output.read_line(&mut line)?;
        if line.is_empty() {
            bail!("QEMU has ended");
        }
        serde_json::from_str(&line).context("QEMU sends no JSON")
    }

    /// One command to its answer. No event that matters comes before it: `migrate` answers first.
    fn command(&mut self, name: &str, arguments: &Value) -> anyhow::Result<()> {
        let command = json!({ "execute": name, "arguments": arguments });
        writeln!(self.input, "{command}")?;
        loop {
            let message = self.message()?;
            if let Some(error) = message.get("error") {
                bail!("QEMU refuses '{name}': {error}");
            }
            if message.get("return").is_some() {
                return Ok(());
            }
        }
    }

    /// Waits until the state is written or read.
    fn migrated(&mut self) -> anyhow::Result<()> {
        loop {
            let message = self.message()?;
            if message["event"] != "MIGRATION" {
                continue;
            }
            match message["data"]["status"].as_str() {
                Some("completed") => return Ok(()),
                Some("failed") => bail!("QEMU cannot move the VM's state"),
                _ => {}
            }
        }
    }

    /// Waits for a line of the guest's program.
    fn answer(&mut self, expected: &str) -> anyhow::Result<()> {
        loop {
            let mut line = Vec::new();
            if self.console.read_until(b'\n', &mut line)? == 0 {
                bail!("QEMU ended before its guest said '{expected}'");
            }
            if String::from_utf8_lossy(&line).trim() == expected {
                return Ok(());
            }
        }
    }
}

/// The command line with the bench's process 1, private memory and a console that is added later.
fn stock(bare: &[String], initramfs: &Path, held_mib: u32) -> anyhow::Result<Vec<String>> {
    let mut line = Vec::new();
    let mut rest = bare.iter();
    while let Some(argument) = rest.next() {
        let mut value = || rest.next().cloned().unwrap_or_default();
        match argument.as_str() {
            // It forbids the program that reads and writes the file.
            "-sandbox" => {
                value();
            }
            "-initrd" => {
                value();
                line.extend([argument.clone(), initramfs.display().to_string()]);
            }
            "-append" => {
                let kernel = value();
                let append = format!("{kernel} rdinit=/bench-guest -- hold {held_mib}");
                line.extend([argument.clone(), append]);
            }
            "-object" => {
                let object = value().replace("share=on", "share=off");
                line.extend([argument.clone(), object]);
            }
            "-chardev" => {
                let chardev = value();
                if !chardev.contains("id=console") {
                    line.extend([argument.clone(), chardev]);
                }
            }
            _ => line.push(argument.clone()),
        }
    }
    if !line.iter().any(|argument| argument == "-append") {
        bail!("QEMU's command line has no kernel: {}", bare.join(" "));
    }
    Ok(line)
}

/// A cpio archive ("newc", Documentation/driver-api/early-userspace/buffer-format.rst of the kernel) of
/// one program, `/bench-guest`.
fn archive(program: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for (name, mode, rdev, content) in [
        ("dev", 0o040_755, (0, 0), &[][..]),
        ("dev/console", 0o020_600, (5, 1), &[]),
        ("bench-guest", 0o100_755, (0, 0), program),
        ("TRAILER!!!", 0, (0, 0), &[]),
    ] {
        let inode = bytes.len();
        let size = content.len();
        let name_bytes = name.len() + 1;
        let (major, minor) = rdev;
        bytes.extend(b"070701");
        for field in [
            inode, mode, 0, 0, 1, 0, size, 0, 0, major, minor, name_bytes, 0,
        ] {
            bytes.extend(format!("{field:08x}").bytes());
        }
        bytes.extend(name.bytes());
        bytes.push(0);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes.extend(content);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_stock_machine_has_private_memory_and_the_benchs_process() {
        let bare = "qemu -object memory-backend-memfd,id=memory,share=on -sandbox on \
            -chardev stdio,id=console,signal=off -chardev null,id=agent -no-reboot -kernel k -initrd i -append a";
        let bare: Vec<String> = bare.split_whitespace().map(str::to_owned).collect();
        let line = stock(&bare, Path::new("/x"), 7).unwrap();
        assert_eq!(
            line.join(" "),
            "qemu -object memory-backend-memfd,id=memory,share=off -chardev null,id=agent -no-reboot \
             -kernel k -initrd /x -append a rdinit=/bench-guest -- hold 7"
        );
        assert!(stock(&bare[..4], Path::new("/x"), 7).is_err());
    }

    #[test]
    fn the_archive_is_one_that_cpio_reads() {
        let bytes = archive(b"program");
        assert_eq!(bytes.len() % 4, 0);
        let mut command = Command::new("cpio");
        command.args(["-t", "--quiet"]).stdin(Stdio::piped());
        let Ok(mut child) = command.stdout(Stdio::piped()).spawn() else {
            println!("skipped: cpio is missing");
            return;
        };
        child.stdin.take().unwrap().write_all(&bytes).unwrap();
        let output = child.wait_with_output().unwrap();
        assert_eq!(
            String::from_utf8_lossy(&output.stdout),
            "dev\ndev/console\nbench-guest\n"
        );
    }
}
