//! Bytes between host and guest: standard streams and `fcvm cp`, counted and checksummed.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use sha2::{Digest as _, Sha256};

use crate::lab::{BenchVm, Lab};
use crate::report::{Measure, Report, Samples};

/// Blocks of dd: of busybox's programs the one that does not look at every byte, which would
/// measure the emulated processor.
const BLOCK_BYTES: u64 = 64 << 10;
const BLOCKS: u64 = 1600;
/// Bytes through standard output, and through standard input.
const STREAM_BYTES: u64 = BLOCKS * BLOCK_BYTES;
/// Size of the copied file.
const FILE_BYTES: u64 = 100_000_000;
/// Each is measured so many times.
const REPEATS: usize = 3;

pub(crate) fn measure(lab: &Lab, vm: &BenchVm<'_>, report: &mut Report) -> anyhow::Result<()> {
    eprintln!("streams: {STREAM_BYTES} bytes out and in, cp of {FILE_BYTES} bytes both ways");
    let mut rates =
        |name: &str, measure: &mut dyn FnMut() -> anyhow::Result<f64>| -> anyhow::Result<()> {
            let samples = (0..REPEATS)
                .map(|_| measure())
                .collect::<anyhow::Result<Vec<f64>>>()
                .context(name.to_owned())?;
            report.add(Measure::new("streams", "MB/s", Samples::new(name, samples)));
            Ok(())
        };
    rates("stdout, guest to host", &mut || stdout_rate(lab, vm))?;
    rates("stdin, host to guest", &mut || stdin_rate(lab, vm))?;
    let directory = tempfile::tempdir_in(&lab.data_dir)?;
    let original = directory.path().join("original");
    let digest = write_noise(&original)?;
    let original = original
        .to_str()
        .context("the data directory's name is no text")?
        .to_owned();
    let back = directory
        .path()
        .join("back")
        .to_str()
        .context("the data directory's name is no text")?
        .to_owned();
    let inside = format!("{}:/root/copy", vm.name);
    rates("cp of 100 MB, host to guest", &mut || {
        let taken = timed(|| lab.run(&["cp", &original, &inside]).map(drop))?;
        let sum = lab.run(&["exec", &vm.name, "sha256sum", "/root/copy"])?;
        ensure!(
            sum.starts_with(digest.as_bytes()),
            "the file arrived damaged in the guest"
        );
        Ok(rate(FILE_BYTES, taken))
    })?;
    rates("cp of 100 MB, guest to host", &mut || {
        let taken = timed(|| lab.run(&["cp", &inside, &back]).map(drop))?;
        ensure!(
            file_digest(Path::new(&back))? == digest,
            "the file arrived damaged on the host"
        );
        fs::remove_file(&back)?;
        Ok(rate(FILE_BYTES, taken))
    })?;
    Ok(())
}

fn timed(work: impl FnOnce() -> anyhow::Result<()>) -> anyhow::Result<Duration> {
    let started = Instant::now();
    work()?;
    Ok(started.elapsed())
}

/// Megabytes (10^6 bytes) per second.
fn rate(bytes: u64, taken: Duration) -> f64 {
    bytes as f64 / 1e6 / taken.as_secs_f64()
}

/// From the first piece to the end, so that the start of the command does not count.
fn stdout_rate(lab: &Lab, vm: &BenchVm<'_>) -> anyhow::Result<f64> {
    let (count, block) = (format!("count={BLOCKS}"), format!("bs={BLOCK_BYTES}"));
    let mut child = lab
        .command(&["exec", &vm.name, "dd", "if=/dev/zero", &block, &count])
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .context("cannot start fcvm")?;
    let mut stdout = child.stdout.take().context("fcvm has no output")?;
    let mut buffer = vec![0; 1 << 16];
    let first = stdout.read(&mut buffer)? as u64;
    let started = Instant::now();
    let mut total = first;
    loop {
        let length = stdout.read(&mut buffer)?;
        if length == 0 {
            break;
        }
        total += length as u64;
    }
    let taken = started.elapsed();
    let status = child.wait()?;
    if !status.success() || total != STREAM_BYTES {
        bail!("{total} bytes of {STREAM_BYTES} arrived ({status})");
    }
    Ok(rate(total - first, taken))
}

/// From the first byte to the guest's count of them.
fn stdin_rate(lab: &Lab, vm: &BenchVm<'_>) -> anyhow::Result<f64> {
    let block = format!("bs={BLOCK_BYTES}");
    let mut child = lab
        .command(&[
            "exec",
            "-i",
            &vm.name,
            "dd",
            "iflag=fullblock",
            "of=/dev/null",
            &block,
        ])
        .stdin(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .context("cannot start fcvm")?;
    let mut stdin = child.stdin.take().context("fcvm has no input")?;
    let piece = vec![0; 1 << 16];
    stdin.write_all(&[0])?;
    let started = Instant::now();
    let mut left = STREAM_BYTES - 1;
    while left > 0 {
        let length = piece.len().min(usize::try_from(left).unwrap_or(usize::MAX));
        stdin.write_all(&piece[..length])?;
        left -= length as u64;
    }
    drop(stdin);
    let output = child.wait_with_output()?;
    let taken = started.elapsed();
    let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    ensure!(
        output.status.success() && said.contains(&format!("{BLOCKS}+0 records in")),
        "not all of {STREAM_BYTES} bytes arrived ({}): {said}",
        output.status
    );
    Ok(rate(STREAM_BYTES, taken))
}

/// Writes bytes that no layer in between can make smaller; gives their SHA-256 in hexadecimal.
fn write_noise(path: &Path) -> anyhow::Result<String> {
    let mut file =
        File::create(path).with_context(|| format!("cannot create {}", path.display()))?;
    let mut hash = Sha256::new();
    // xorshift64*, seeded by a constant: the same file every time.
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut buffer = Vec::with_capacity(1 << 20);
    let mut left = FILE_BYTES;
    while left > 0 {
        buffer.clear();
        while buffer.len() < 1 << 20 {
            state ^= state >> 12;
            state ^= state << 25;
            state ^= state >> 27;
            buffer.extend_from_slice(&state.wrapping_mul(0x2545_f491_4f6c_dd1d).to_le_bytes());
        }
        let length = buffer
            .len()
            .min(usize::try_from(left).unwrap_or(usize::MAX));
        hash.update(&buffer[..length]);
        file.write_all(&buffer[..length])?;
        left -= length as u64;
    }
    Ok(hexadecimal(&hash.finalize()))
}

fn file_digest(path: &Path) -> anyhow::Result<String> {
    let mut file = File::open(path).with_context(|| format!("cannot open {}", path.display()))?;
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 1 << 16];
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok(hexadecimal(&hash.finalize())),
            length => hash.update(&buffer[..length]),
        }
    }
}

fn hexadecimal(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
