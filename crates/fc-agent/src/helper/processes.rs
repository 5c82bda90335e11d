//! The container's processes, from its own /proc. Runs with the container's root as "/".

use std::fs;

use fcvm_types::guest::GuestProcess;
use fcvm_wire::frame::MAX_GUEST_MESSAGE_BYTES;
use fcvm_wire::{Failure, Outcome};

use super::numbers::{PAGE_BYTES, TICK_NS};
use crate::failure::Context;
use crate::{spawn, users};

/// Longest command line that is told, in bytes.
const MAX_COMMAND_BYTES: usize = 512;
/// What a process takes in the message at most, besides its command line's escaped characters.
const FIXED_BYTES: usize = 300;

/// Lists the processes, as many as a message holds.
pub(super) fn list() -> Result<Outcome, Failure> {
    let passwd = spawn::read_users("/etc/passwd").unwrap_or_default();
    let mut pids: Vec<u32> = fs::read_dir("/proc")
        .context("reading the container's /proc")?
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .collect();
    pids.sort_unstable();
    let mut left_bytes = MAX_GUEST_MESSAGE_BYTES;
    let mut processes = Vec::new();
    for pid in pids {
        // A process may end while it is looked at.
        let Some(process) = read(pid, &passwd) else {
            continue;
        };
        let cost = FIXED_BYTES + 6 * (process.command.len() + process.user.len());
        if cost > left_bytes {
            break;
        }
        left_bytes -= cost;
        processes.push(process);
    }
    Ok(Outcome::Processes(processes))
}

fn read(pid: u32, passwd: &str) -> Option<GuestProcess> {
    let stat = fs::read(format!("/proc/{pid}/stat")).ok()?;
    let stat = String::from_utf8_lossy(&stat);
    let status = fs::read(format!("/proc/{pid}/status")).ok()?;
    let status = String::from_utf8_lossy(&status);
    let uid: u32 = status
        .lines()
        .find_map(|line| line.strip_prefix("Uid:"))?
        .split_whitespace()
        .next()?
        .parse()
        .ok()?;
    let user = users::passwd_entries(passwd)
        .find(|entry| entry.uid == uid)
        .map_or_else(
            || uid.to_string(),
            |entry| entry.name.chars().take(64).collect(),
        );
    let command = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    parse(pid, &stat, user, &command)
}

/// `proc(5)`: the name is in parentheses and may hold anything, so fields count from the last one.
fn parse(pid: u32, stat: &str, user: String, command: &[u8]) -> Option<GuestProcess> {
    let (start, rest) = stat.rsplit_once(')')?;
    let name = start.split_once('(')?.1;
    let fields: Vec<&str> = rest.split_whitespace().collect();
    let number = |index: usize| fields.get(index)?.parse::<u64>().ok();
    let terminal = number(4)?;
    // Device numbers 136:0 and up are pseudo-terminals, 256 for each of eight majors.
    let (major, minor) = (
        terminal >> 8 & 0xfff,
        terminal & 0xff | (terminal >> 12 & 0xfff00),
    );
    let command = if command.is_empty() {
        format!("[{name}]")
    } else {
        let command = &command[..command.len().min(MAX_COMMAND_BYTES)];
        let text = String::from_utf8_lossy(command).replace('\0', " ");
        text.trim_end().to_owned()
    };
    Some(GuestProcess {
        pid,
        parent_pid: u32::try_from(number(1)?).ok()?,
        user,
        state: fields.first()?.chars().next()?,
        started_ns: number(19)?.saturating_mul(TICK_NS),
        cpu_ns: (number(11)?.saturating_add(number(12)?)).saturating_mul(TICK_NS),
        rss_bytes: number(21)?.saturating_mul(PAGE_BYTES),
        tty: match major {
            136..=143 => format!("pts/{}", (major - 136) * 256 + minor),
            _ => "?".into(),
        },
        command,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const STAT: &str = "42 (a) b (c) S 1 42 42 34817 42 4194304 100 0 0 0 5 7 0 0 20 0 1 0 250 \
                        1000000 300 18446744073709551615 0 0 0 0 0 0 0 0 0 0 0 0 17 0 0 0 0 0 0";

    #[test]
    fn fields_are_read_behind_the_name() {
        let process = parse(42, STAT, "app".into(), b"prog\0--flag\0").unwrap();
        assert_eq!((process.parent_pid, process.state), (1, 'S'));
        assert_eq!(process.cpu_ns, 120_000_000);
        assert_eq!(process.started_ns, 2_500_000_000);
        assert_eq!(process.rss_bytes, 300 * 4096);
        assert_eq!(process.tty, "pts/1");
        assert_eq!(process.command, "prog --flag");
    }

    #[test]
    fn without_a_command_line_the_name_stands_in() {
        let process = parse(42, STAT, "app".into(), b"").unwrap();
        assert_eq!(process.command, "[a) b (c]");
        assert!(parse(42, "42 (x) S 1", "app".into(), b"").is_none());
    }
}
