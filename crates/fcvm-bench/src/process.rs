//! Processor time and memory of other processes, from proc(5).

use std::fs;

use anyhow::Context as _;

/// Clock ticks per second in `/proc/PID/stat`: USER_HZ, 100 on every Linux that fcvm runs on.
const TICKS_PER_SECOND: f64 = 100.0;

/// Fields of `/proc/PID/stat` from field 3 on.
fn stat_fields(pid: u32) -> Option<Vec<String>> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name may hold anything, also ") ".
    let fields = text.rsplit_once(") ")?.1;
    Some(fields.split_whitespace().map(str::to_owned).collect())
}

/// utime + stime, and with `reaped` those of the children it has waited for; seconds.
fn cpu_seconds_of(pid: u32, reaped: bool) -> f64 {
    let fields = stat_fields(pid).unwrap_or_default();
    let count = if reaped { 4 } else { 2 };
    let ticks: u64 = fields
        .iter()
        .skip(11)
        .take(count)
        .filter_map(|field| field.parse::<u64>().ok())
        .sum();
    ticks as f64 / TICKS_PER_SECOND
}

/// Processor time of a process alone, in seconds.
pub(crate) fn cpu_seconds(pid: u32) -> f64 {
    cpu_seconds_of(pid, false)
}

/// Processor time of a process, of its living descendants and of those already waited for, in seconds.
pub(crate) fn tree_cpu_seconds(pid: u32) -> f64 {
    let mut waiting = vec![pid];
    let mut seconds = 0.0;
    while let Some(pid) = waiting.pop() {
        seconds += cpu_seconds_of(pid, true);
        waiting.extend(children(pid));
    }
    seconds
}

/// Processor time of all children that this process has waited for, in seconds.
pub(crate) fn reaped_cpu_seconds() -> f64 {
    let own = std::process::id();
    cpu_seconds_of(own, true) - cpu_seconds_of(own, false)
}

fn children(pid: u32) -> Vec<u32> {
    let Ok(threads) = fs::read_dir(format!("/proc/{pid}/task")) else {
        return Vec::new();
    };
    threads
        .flatten()
        .filter_map(|thread| fs::read_to_string(thread.path().join("children")).ok())
        .flat_map(|text| {
            text.split_whitespace()
                .filter_map(|child| child.parse().ok())
                .collect::<Vec<u32>>()
        })
        .collect()
}

/// The arguments a process was started with.
pub(crate) fn command_line(pid: u32) -> anyhow::Result<Vec<String>> {
    let bytes = fs::read(format!("/proc/{pid}/cmdline"))
        .with_context(|| format!("process {pid} is gone"))?;
    let bytes = bytes.strip_suffix(b"\0").unwrap_or(&bytes);
    Ok(bytes
        .split(|byte| *byte == 0)
        .map(|argument| String::from_utf8_lossy(argument).into_owned())
        .collect())
}

/// A field of `/proc/PID/smaps_rollup` (`Rss`, `Pss`, `Private_Dirty`), in bytes.
pub(crate) fn memory_bytes(pid: u32, field: &str) -> anyhow::Result<f64> {
    let path = format!("/proc/{pid}/smaps_rollup");
    let text = fs::read_to_string(&path).with_context(|| format!("cannot read {path}"))?;
    let kilobytes = text
        .lines()
        .find_map(|line| line.strip_prefix(field)?.strip_prefix(':'))
        .and_then(|rest| rest.trim().trim_end_matches(" kB").parse::<f64>().ok())
        .with_context(|| format!("{path} has no field {field}"))?;
    Ok(kilobytes * 1024.0)
}

/// What a part of a process's memory comes to, in bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(crate) struct Share {
    pub(crate) pss: f64,
    pub(crate) private_dirty: f64,
}

/// The mappings of a process whose file's name begins with `name`, and all others.
pub(crate) fn shares(pid: u32, name: &str) -> anyhow::Result<(Share, Share)> {
    let path = format!("/proc/{pid}/smaps");
    let text = fs::read_to_string(&path).with_context(|| format!("cannot read {path}"))?;
    Ok(split_shares(&text, name))
}

fn split_shares(smaps: &str, name: &str) -> (Share, Share) {
    let (mut named, mut others) = (Share::default(), Share::default());
    let mut is_named = false;
    for line in smaps.lines() {
        let mut words = line.split_whitespace();
        let first = words.next().unwrap_or_default();
        if !first.ends_with(':') {
            // "start-end perms offset device inode name"
            is_named = words.nth(4).is_some_and(|file| file.starts_with(name));
            continue;
        }
        let bytes = words.next().and_then(|word| word.parse::<f64>().ok());
        let bytes = bytes.unwrap_or(0.0) * 1024.0;
        let share = if is_named { &mut named } else { &mut others };
        match first {
            "Pss:" => share.pss += bytes,
            "Private_Dirty:" => share.private_dirty += bytes,
            _ => {}
        }
    }
    (named, others)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mappings_are_told_apart_by_their_files() {
        let smaps = "\
7f00-7f10 rw-p 00000000 00:01 12 /memfd:guest (deleted)
Pss:                  40 kB
Private_Dirty:         8 kB
7f20-7f30 rw-p 00000000 00:00 0 
Pss:                   3 kB
Private_Dirty:         2 kB
VmFlags: rd wr
";
        let kib = |pss: f64, private_dirty: f64| Share {
            pss: pss * 1024.0,
            private_dirty: private_dirty * 1024.0,
        };
        assert_eq!(
            split_shares(smaps, "/memfd:guest"),
            (kib(40.0, 8.0), kib(3.0, 2.0))
        );
    }

    #[test]
    fn a_busy_child_is_counted_while_it_lives_and_once_it_is_reaped() {
        let before = reaped_cpu_seconds();
        let mut child = std::process::Command::new("sh")
            .args([
                "-c",
                "i=0; while [ $i -lt 200000 ]; do i=$((i+1)); done; echo; read line",
            ])
            .stdin(std::process::Stdio::piped())
            .stdout(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let mut byte = [0];
        std::io::Read::read_exact(child.stdout.as_mut().unwrap(), &mut byte).unwrap();
        let alive = tree_cpu_seconds(child.id());
        assert!(alive > 0.0);
        assert!(children(std::process::id()).contains(&child.id()));
        assert!(memory_bytes(child.id(), "Rss").unwrap() > 0.0);
        assert_eq!(command_line(child.id()).unwrap()[..2], ["sh", "-c"]);
        drop(child.stdin.take());
        child.wait().unwrap();
        assert!(reaped_cpu_seconds() - before >= alive);
    }
}
