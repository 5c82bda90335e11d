//! The program that runs inside the guest while it is forked (`examples/bench-guest.rs`): built statically
//! at bench time, copied into a VM, asked over an exec session.

use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, bail};

use crate::boot::Running;
use crate::lab::{Lab, finished};

const SOURCE: &str = include_str!("../../examples/bench-guest.rs");

/// Where it lies in the guest.
const PATH: &str = "/tmp/bench-guest";

/// Builds the program; its file.
pub(super) fn build(directory: &Path) -> anyhow::Result<PathBuf> {
    let source = directory.join("bench-guest.rs");
    std::fs::write(&source, SOURCE)?;
    let program = directory.join("bench-guest");
    let mut command = Command::new("rustc");
    command
        .args([
            "--edition",
            "2024",
            "-O",
            "-C",
            "target-feature=+crt-static",
        ])
        .args(["-C", "relocation-model=static", "-C", "strip=symbols", "-o"])
        .arg(&program)
        .arg(&source);
    finished(command, "rustc")?;
    Ok(program)
}

/// What the guest's clocks tell; the largest step is one between two reads a millisecond apart.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Gap {
    pub(super) monotonic_ms: f64,
    /// What was written meanwhile, in megabytes a second.
    pub(super) rate: f64,
    /// How far the guest's realtime clock is behind the host's, and how long the answer took.
    pub(super) behind_ms: f64,
}

/// The program, running in a VM; it ends with this value.
pub(super) struct Guest {
    /// Ends the process with this value.
    _session: Running,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

impl Guest {
    /// Starts it in a VM and waits until its memory is filled.
    pub(super) fn start(
        lab: &Lab,
        vm: &str,
        program: &Path,
        arguments: &[&str],
    ) -> anyhow::Result<Self> {
        let from = program.to_string_lossy();
        lab.run(&["cp", &from, &format!("{vm}:{PATH}")])?;
        let command = [&["exec", "-i", vm, PATH], arguments].concat();
        let mut child: Child = lab
            .command(&command)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .context("cannot start fcvm exec")?;
        let input = child.stdin.take().context("fcvm exec has no input")?;
        let output = child.stdout.take().context("fcvm exec has no output")?;
        let mut guest = Self {
            _session: Running(child),
            input,
            output: BufReader::new(output),
        };
        let line = guest.line()?;
        if line != "ready" {
            bail!("the program in the guest says '{line}'");
        }
        Ok(guest)
    }

    fn line(&mut self) -> anyhow::Result<String> {
        let mut line = String::new();
        self.output.read_line(&mut line)?;
        if line.is_empty() {
            bail!("the program in the guest has ended");
        }
        Ok(line.trim().to_owned())
    }

    /// What its clocks did since the last question.
    pub(super) fn gap(&mut self) -> anyhow::Result<Gap> {
        self.input.write_all(b"\n")?;
        let line = self.line()?;
        let now = SystemTime::now().duration_since(UNIX_EPOCH)?;
        parse_gap(&line, now.as_secs_f64() * 1000.0)
            .with_context(|| format!("the program in the guest says '{line}'"))
    }
}

fn parse_gap(line: &str, now_ms: f64) -> Option<Gap> {
    let mut numbers = line
        .strip_prefix("gap ")?
        .split(' ')
        .map(|text| text.parse::<f64>().ok());
    let mut next = || numbers.next().flatten();
    Some(Gap {
        monotonic_ms: next()? / 1000.0,
        rate: next()?,
        behind_ms: now_ms - next()? / 1000.0,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gaps_are_read() {
        assert_eq!(
            parse_gap("gap 1500 99.5 7000", 10.0),
            Some(Gap {
                monotonic_ms: 1.5,
                rate: 99.5,
                behind_ms: 3.0
            })
        );
        assert_eq!(parse_gap("gap 1500 99.5", 10.0), None);
        assert_eq!(parse_gap("ready", 10.0), None);
    }
}
