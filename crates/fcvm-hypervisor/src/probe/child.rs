//! Running the throw-away guest in a child process, under a time limit.

use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::process::{ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};

use super::KvmUsability;

/// How long the guest may take. Where KVM works it takes some 20 ms.
const LIMIT: Duration = Duration::from_secs(5);
/// Most bytes read of what the child prints.
const OUTPUT_BYTES_MAX: usize = 4096;

/// Runs `child` and reads its verdict.
pub(super) fn probe_kvm(mut child: Command) -> KvmUsability {
    let unusable = |reason: String| KvmUsability::Unusable { reason };
    let spawned = child
        .env_clear()
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn();
    let mut running = match spawned {
        Ok(running) => running,
        Err(error) => return unusable(format!("the probe could not be started: {error}")),
    };
    let verdict = match running.stdout.take() {
        Some(stdout) => read_until(stdout, Instant::now() + LIMIT),
        None => Some(Vec::new()),
    };
    // It has answered or is late; it has nothing to clean up.
    let _ = running.kill();
    let status = running.wait();
    let Some(output) = verdict else {
        return KvmUsability::Emulating {
            reason: format!(
                "a guest of a few instructions did not end within {} s",
                LIMIT.as_secs()
            ),
        };
    };
    serde_json::from_slice(&output).unwrap_or_else(|_| {
        unusable(match status {
            Ok(status) => format!("the probe ended without a verdict: {status}"),
            Err(error) => format!("the probe ended without a verdict: {error}"),
        })
    })
}

/// Everything up to the end of the output; `None` where that does not come in time.
fn read_until(mut stdout: ChildStdout, deadline: Instant) -> Option<Vec<u8>> {
    let mut output = Vec::new();
    let mut buffer = [0; 512];
    loop {
        let left = deadline.checked_duration_since(Instant::now())?;
        let timeout = Timespec {
            tv_sec: left.as_secs() as i64,
            tv_nsec: left.subsec_nanos().into(),
        };
        let fd = stdout.as_fd();
        let mut poll = [PollFd::new(&fd, PollFlags::IN)];
        match rustix::event::poll(&mut poll, Some(&timeout)) {
            Ok(0) => return None,
            Ok(_) => {}
            Err(rustix::io::Errno::INTR) => continue,
            Err(_) => return Some(output),
        }
        match stdout.read(&mut buffer) {
            Ok(0) | Err(_) => return Some(output),
            Ok(length) if output.len() + length > OUTPUT_BYTES_MAX => return Some(output),
            Ok(length) => output.extend_from_slice(&buffer[..length]),
        }
    }
}

/// What the child process does: runs the throw-away guest and prints the verdict to standard output,
/// for [`probe_host`](super::probe_host) in the parent. Returns when that is done, if at all.
pub fn run_probe_guest() {
    // Nobody would end this process when the parent is gone.
    let signal = rustix::process::Signal::KILL;
    let _ = rustix::process::set_parent_process_death_signal(Some(signal));
    let verdict = guest_verdict();
    if let Ok(line) = serde_json::to_vec(&verdict) {
        let _ = std::io::stdout().write_all(&line);
    }
}

#[cfg(target_arch = "x86_64")]
fn guest_verdict() -> KvmUsability {
    super::guest::run()
}

#[cfg(not(target_arch = "x86_64"))]
fn guest_verdict() -> KvmUsability {
    KvmUsability::Unusable {
        reason: format!(
            "the probe is not implemented for {}: its guest program is x86-64 code",
            std::env::consts::ARCH
        ),
    }
}
