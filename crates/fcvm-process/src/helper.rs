//! A running helper: waiting for its end, killing it, what it said.

use std::fmt;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, ExitStatus};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use fcvm_types::record::ProcessIdentity;
use rustix::process::{Pid, PidfdFlags, Signal, WaitId, WaitIdOptions};
use tokio::io::AsyncReadExt;
use tokio::io::unix::AsyncFd;
use tokio::net::unix::pipe;
use tokio::sync::watch;
use tracing::Instrument;

use crate::identity::process_identity;
use crate::tail::Tail;
use crate::watch::watch_readable;

/// Lines of a helper's standard error that go to the log; a guest may be able to provoke more.
const LOGGED_LINES_MAX: usize = 50;
/// Longest line that goes to the log, in bytes.
const LOGGED_LINE_BYTES: usize = 1024;
/// Lines of a helper's standard error that its end is told with.
const SHOWN_LINES: usize = 4;
/// How long after its end a helper's last words are waited for. They are in the pipe already,
/// unless something else holds its other end.
const LAST_WORDS_TIMEOUT: Duration = Duration::from_secs(1);

/// A running helper. Dropping it kills and reaps the process.
#[derive(Debug)]
pub struct HelperProcess {
    role: &'static str,
    identity: ProcessIdentity,
    pidfd: AsyncFd<OwnedFd>,
    status: Mutex<Option<ExitStatus>>,
    tail: Arc<Mutex<Tail>>,
    stderr_ended: watch::Receiver<bool>,
}

/// How a helper ended.
#[derive(Debug, Clone)]
pub struct HelperExit {
    /// Its name.
    pub role: &'static str,
    /// Its exit code or the signal that ended it.
    pub status: ExitStatus,
    /// The last 4 KiB of its standard error, free of control characters.
    pub stderr: String,
}

impl HelperExit {
    /// As many of the last lines of its standard error that are not empty.
    fn last_lines(&self, count: usize) -> Vec<&str> {
        let lines = self.stderr.lines().map(str::trim);
        let mut lines: Vec<_> = lines.filter(|line| !line.is_empty()).collect();
        lines.drain(..lines.len().saturating_sub(count));
        lines
    }
}

impl fmt::Display for HelperExit {
    /// `qemu exited with status 1: <last lines of its standard error>`: what comes last may only be what the reason
    /// led to.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.status.code(), self.status.signal()) {
            (Some(code), _) => write!(f, "{} exited with status {code}", self.role)?,
            (None, Some(signal)) => write!(f, "{} was ended by signal {signal}", self.role)?,
            (None, None) => write!(f, "{} ended", self.role)?,
        }
        match self.last_lines(SHOWN_LINES).join("; ") {
            lines if lines.is_empty() => Ok(()),
            lines => write!(f, ": {lines}"),
        }
    }
}

impl HelperProcess {
    /// Takes over a child that was just started, together with the reading end of its stderr.
    pub(crate) fn adopt(role: &'static str, mut child: Child, stderr: OwnedFd) -> io::Result<Self> {
        // The child is not reaped before `pidfd` is there, so its number can not be another's.
        let opened = watch_child(&child).and_then(|(identity, pidfd)| {
            rustix::io::ioctl_fionbio(&stderr, true)?;
            Ok((identity, pidfd, pipe::Receiver::from_owned_fd(stderr)?))
        });
        let (identity, pidfd, stderr) = match opened {
            Ok(opened) => opened,
            Err(error) => {
                // Nothing would watch this child: it must not run.
                let _ = child.kill();
                let _ = child.wait();
                return Err(error);
            }
        };
        let tail = Arc::new(Mutex::new(Tail::default()));
        let (ended, stderr_ended) = watch::channel(false);
        let reader = read_stderr(role, stderr, Arc::clone(&tail), ended);
        tokio::spawn(reader.instrument(tracing::Span::current()));
        Ok(Self {
            role,
            identity,
            pidfd,
            status: Mutex::new(None),
            tail,
            stderr_ended,
        })
    }

    /// Process id and start time.
    pub fn identity(&self) -> ProcessIdentity {
        self.identity
    }

    /// Waits until the helper has ended. May be called again, cancelled and called by many.
    pub async fn wait(&self) -> HelperExit {
        let status = loop {
            match self.try_wait() {
                Ok(Some(status)) => break status,
                Ok(None) => {}
                Err(error) => {
                    tracing::warn!("cannot wait for {}: {error}", self.role);
                    break ExitStatus::from_raw(Signal::KILL.as_raw());
                }
            }
            if let Ok(mut ready) = self.pidfd.readable().await {
                // A pidfd that became readable stays so: the next look finds the status.
                ready.retain_ready();
            }
        };
        let mut ended = self.stderr_ended.clone();
        let _ = tokio::time::timeout(LAST_WORDS_TIMEOUT, ended.wait_for(|ended| *ended)).await;
        HelperExit {
            role: self.role,
            status,
            stderr: lock(&self.tail).text(),
        }
    }

    /// Kills the helper, with `SIGKILL`. Its end is what [`wait`](Self::wait) tells.
    pub fn kill(&self) {
        // An error means that it has ended already.
        let _ = rustix::process::pidfd_send_signal(self.pidfd.get_ref(), Signal::KILL);
    }

    /// Waits for the helper's own end for `grace`, then kills it.
    pub async fn kill_after(&self, grace: Duration) {
        if tokio::time::timeout(grace, self.wait()).await.is_err() {
            self.kill();
        }
    }

    /// The status where the helper has ended.
    fn try_wait(&self) -> io::Result<Option<ExitStatus>> {
        self.reap(WaitIdOptions::EXITED | WaitIdOptions::NOHANG)
    }

    fn reap(&self, options: WaitIdOptions) -> io::Result<Option<ExitStatus>> {
        let mut known = lock(&self.status);
        if known.is_none() {
            let pidfd = self.pidfd.get_ref().as_fd();
            let Some(found) = rustix::process::waitid(WaitId::PidFd(pidfd), options)? else {
                return Ok(None);
            };
            *known = found
                .exit_status()
                .map(|code| ExitStatus::from_raw(code << 8))
                .or_else(|| found.terminating_signal().map(ExitStatus::from_raw));
        }
        Ok(*known)
    }
}

impl Drop for HelperProcess {
    fn drop(&mut self) {
        if matches!(self.try_wait(), Ok(None)) {
            self.kill();
            let _ = self.reap(WaitIdOptions::EXITED);
        }
    }
}

fn watch_child(child: &Child) -> io::Result<(ProcessIdentity, AsyncFd<OwnedFd>)> {
    let pid = Pid::from_child(child);
    let pidfd = rustix::process::pidfd_open(pid, PidfdFlags::empty())?;
    let identity = process_identity(pid.as_raw_nonzero().get())?;
    Ok((identity, watch_readable(pidfd)?))
}

/// Reads a helper's standard error to its end: always, so that a full pipe never stops the helper.
async fn read_stderr(
    role: &'static str,
    mut stderr: pipe::Receiver,
    tail: Arc<Mutex<Tail>>,
    ended: watch::Sender<bool>,
) {
    let mut log = LineLog::new(role);
    let mut buffer = [0; 1024];
    loop {
        match stderr.read(&mut buffer).await {
            Ok(0) | Err(_) => break,
            Ok(length) => {
                lock(&tail).push(&buffer[..length]);
                log.push(&buffer[..length]);
            }
        }
    }
    let _ = ended.send(true);
}

/// Cuts what is pushed into lines and logs the first of them.
struct LineLog {
    role: &'static str,
    line: Vec<u8>,
    logged: usize,
}

impl LineLog {
    fn new(role: &'static str) -> Self {
        Self {
            role,
            line: Vec::new(),
            logged: 0,
        }
    }

    fn push(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            if byte == b'\n' {
                self.flush();
            } else if self.line.len() < LOGGED_LINE_BYTES {
                self.line.push(byte);
            }
        }
    }

    fn flush(&mut self) {
        let line = String::from_utf8_lossy(&self.line).trim().to_owned();
        self.line.clear();
        if line.is_empty() || self.logged > LOGGED_LINES_MAX {
            return;
        }
        self.logged += 1;
        if self.logged > LOGGED_LINES_MAX {
            tracing::debug!("{}: further lines are not logged", self.role);
        } else {
            tracing::debug!("{}: {}", self.role, line.escape_debug());
        }
    }
}

/// Nothing panics while one of these locks is held; a poisoned one is still good.
fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
