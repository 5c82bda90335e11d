//! The logs of a VM: the container's output and the guest's console, both limited in size.
//!
//! The container's log has the form of Kubernetes' container runtime interface, which Podman calls
//! `k8s-file`: `TIME stdout|stderr P|F TEXT`, where P says that the line goes on in the next entry.
//! Reading is in `commands/logs.rs`.

use std::fs::File;
use std::io::Write;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use fcvm_wire::Channel;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use tokio::io::AsyncReadExt;

/// Size at which the container's log starts anew; the one before is kept beside it.
const CONTAINER_LOG_BYTES: u64 = 32 << 20;
/// Size at which the console's log starts anew.
const CONSOLE_LOG_BYTES: u64 = 1 << 20;

/// A file that is renamed to `NAME.1` when it has reached its limit.
struct RotatedFile {
    path: PathBuf,
    file: File,
    length_bytes: u64,
    limit_bytes: u64,
}

impl RotatedFile {
    fn create(path: &Path, limit_bytes: u64) -> anyhow::Result<Self> {
        let file = File::create(path)
            .with_context(|| format!("cannot write the log {}", path.display()))?;
        Ok(Self {
            path: path.to_owned(),
            file,
            length_bytes: 0,
            limit_bytes,
        })
    }

    fn write(&mut self, bytes: &[u8]) -> std::io::Result<()> {
        if self.length_bytes > 0 && self.length_bytes + bytes.len() as u64 > self.limit_bytes {
            std::fs::rename(&self.path, rotated_name(&self.path))?;
            self.file = File::create(&self.path)?;
            self.length_bytes = 0;
        }
        self.file.write_all(bytes)?;
        self.length_bytes += bytes.len() as u64;
        Ok(())
    }
}

/// Name of the part of a log that came before the one at `path`.
pub(crate) fn rotated_name(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".1");
    name.into()
}

/// Writes the container's output.
pub(crate) struct ContainerLog {
    file: RotatedFile,
    failed: bool,
}

impl ContainerLog {
    /// Starts an empty log.
    pub(crate) fn create(path: &Path) -> anyhow::Result<Self> {
        Ok(Self {
            file: RotatedFile::create(path, CONTAINER_LOG_BYTES)?,
            failed: false,
        })
    }

    /// Appends output. A log that cannot be written (a full disk) does not stop the container.
    pub(crate) fn write(&mut self, channel: Channel, bytes: &[u8]) {
        let time = OffsetDateTime::now_utc()
            .format(&Rfc3339)
            .unwrap_or_default();
        let stream = if channel == Channel::Stderr {
            "stderr"
        } else {
            "stdout"
        };
        let mut entry = Vec::with_capacity(bytes.len() + 64);
        for line in bytes.split_inclusive(|byte| *byte == b'\n') {
            let (tag, text) = match line.strip_suffix(b"\n") {
                Some(text) => ('F', text),
                None => ('P', line),
            };
            // Writing to a Vec cannot fail.
            let _ = write!(entry, "{time} {stream} {tag} ");
            entry.extend_from_slice(text);
            entry.push(b'\n');
        }
        match self.file.write(&entry) {
            Err(error) if !self.failed => {
                self.failed = true;
                tracing::warn!(target: "vm", "output is missing from the log: {error}");
            }
            result => self.failed = result.is_err(),
        }
    }
}

/// Copies the console into its log until the hypervisor ends.
pub(crate) fn spawn_console(
    read_end: OwnedFd,
    path: &Path,
) -> anyhow::Result<tokio::task::JoinHandle<()>> {
    let mut log = RotatedFile::create(path, CONSOLE_LOG_BYTES)?;
    let mut pipe = tokio::net::unix::pipe::Receiver::from_owned_fd(read_end)
        .context("cannot read the console")?;
    Ok(tokio::task::spawn_local(async move {
        let mut buffer = vec![0; 4096];
        while let Ok(length @ 1..) = pipe.read(&mut buffer).await {
            // A full disk costs the console's log, not the VM.
            let _ = log.write(&buffer[..length]);
        }
    }))
}

/// The last lines of the console, for an error message.
pub(crate) fn console_tail(path: &Path, lines: usize) -> Vec<String> {
    let bytes = std::fs::read(path).unwrap_or_default();
    let text = String::from_utf8_lossy(&bytes);
    let mut tail: Vec<String> = text
        .lines()
        .rev()
        .filter(|line| !line.trim().is_empty())
        .take(lines)
        .map(crate::errors::printable)
        .collect();
    tail.reverse();
    tail
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_are_whole_lines_or_marked_parts() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        let mut log = ContainerLog::create(&path).unwrap();
        log.write(Channel::Stdout, b"one\ntwo\npart");
        log.write(Channel::Stderr, b"\n");
        let text = std::fs::read_to_string(&path).unwrap();
        let rest: Vec<&str> = text
            .lines()
            .map(|line| line.split_once(' ').unwrap().1)
            .collect();
        assert_eq!(
            rest,
            ["stdout F one", "stdout F two", "stdout P part", "stderr F "]
        );
    }

    #[test]
    fn a_log_stays_within_two_files_of_its_limit() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        let mut file = RotatedFile::create(&path, 1000).unwrap();
        for number in 0..100 {
            file.write(format!("{number:>99}\n").as_bytes()).unwrap();
        }
        assert_eq!(std::fs::metadata(&path).unwrap().len(), 1000);
        assert_eq!(std::fs::metadata(rotated_name(&path)).unwrap().len(), 1000);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 2);
    }
}
