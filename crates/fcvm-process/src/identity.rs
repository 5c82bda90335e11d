//! Telling a process from a later one with the same number.

use std::io;

use fcvm_types::record::ProcessIdentity;

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

/// Whether this very process still exists. A process that ended and was not reaped yet counts.
pub fn is_running(identity: ProcessIdentity) -> bool {
    process_identity(identity.pid).is_ok_and(|found| found == identity)
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
