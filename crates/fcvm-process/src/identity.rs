//! Telling a process from a later one with the same number.

use std::io;
use std::os::fd::OwnedFd;

use fcvm_types::record::ProcessIdentity;
use rustix::process::{Pid, PidfdFlags, Signal};

use crate::watch::watch_readable;

/// Identity of the running process `pid`: its number and its start time.
///
/// # Errors
///
/// [`io::ErrorKind::NotFound`] where there is no such process; any other error of reading
/// `/proc/PID/stat`.
pub fn process_identity(pid: i32) -> io::Result<ProcessIdentity> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let start_ticks = start_ticks(&stat).ok_or_else(|| {
        io::Error::new(
            io::ErrorKind::InvalidData,
            format!("/proc/{pid}/stat has no start time"),
        )
    })?;
    Ok(ProcessIdentity { pid, start_ticks })
}

/// Whether this very process still runs. One that ended and was not reaped yet does not.
pub fn is_running(identity: ProcessIdentity) -> bool {
    let Ok(stat) = std::fs::read_to_string(format!("/proc/{}/stat", identity.pid)) else {
        return false;
    };
    start_ticks(&stat) == Some(identity.start_ticks) && !has_ended(&stat)
}

/// Waits for the end of a process that need not be a child.
///
/// # Errors
///
/// The runtime cannot wait for it.
pub async fn wait_gone(identity: ProcessIdentity) -> io::Result<()> {
    let Some(pidfd) = open(identity) else {
        return Ok(());
    };
    let pidfd = watch_readable(pidfd)?;
    pidfd.readable().await?.retain_ready();
    Ok(())
}

/// Kills this very process with `SIGKILL`; nothing happens where it has ended.
pub fn kill(identity: ProcessIdentity) {
    if let Some(pidfd) = open(identity) {
        // An error means that it has ended meanwhile.
        let _ = rustix::process::pidfd_send_signal(&pidfd, Signal::KILL);
    }
}

/// Asks this very process to end, with `SIGTERM`; nothing happens where it has ended.
pub fn terminate(identity: ProcessIdentity) {
    if let Some(pidfd) = open(identity) {
        // An error means that it has ended meanwhile.
        let _ = rustix::process::pidfd_send_signal(&pidfd, Signal::TERM);
    }
}

/// A descriptor of the process, where it still runs.
fn open(identity: ProcessIdentity) -> Option<OwnedFd> {
    let pid = Pid::from_raw(identity.pid)?;
    let pidfd = rustix::process::pidfd_open(pid, PidfdFlags::empty()).ok()?;
    // Opened first, compared after: another process with its number cannot slip in between.
    is_running(identity).then_some(pidfd)
}

/// Field 3 of `/proc/PID/stat` says zombie or dead.
fn has_ended(stat: &str) -> bool {
    stat.rsplit_once(") ")
        .is_none_or(|(_, after_name)| after_name.starts_with(['Z', 'X']))
}

/// Field 22 of `/proc/PID/stat`, proc_pid_stat(5). The command's name, field 2, may itself hold
/// spaces and parentheses, so fields are counted from its last parenthesis.
fn start_ticks(stat: &str) -> Option<u64> {
    let (_, after_name) = stat.rsplit_once(") ")?;
    after_name.split(' ').nth(22 - 3)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn start_time_is_found_behind_an_odd_name() {
        let stat = "7 (a ) b (c) S 1 7 7 0 -1 4194560 1 0 0 0 0 0 0 0 20 0 1 0 4321 1 2";
        assert_eq!(start_ticks(stat), Some(4321));
        assert_eq!(start_ticks("7 (a) S 1"), None);
    }

    #[test]
    fn a_process_that_was_not_reaped_has_ended() {
        use rustix::process::{WaitId, WaitIdOptions, waitid};
        let mut child = std::process::Command::new("true").spawn().unwrap();
        let pid = Pid::from_child(&child);
        let identity = process_identity(pid.as_raw_nonzero().get()).unwrap();
        waitid(
            WaitId::Pid(pid),
            WaitIdOptions::EXITED | WaitIdOptions::NOWAIT,
        )
        .unwrap();
        assert!(!is_running(identity));
        child.wait().unwrap();
    }

    #[test]
    fn own_process_runs_and_its_number_with_another_start_does_not() {
        let pid = i32::try_from(std::process::id()).unwrap();
        let own = process_identity(pid).unwrap();
        assert!(is_running(own));
        assert!(!is_running(ProcessIdentity {
            pid,
            start_ticks: own.start_ticks + 1
        }));
    }
}
