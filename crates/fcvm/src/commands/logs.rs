//! `fcvm logs`: reads what the owner wrote (owner/log.rs); the owner itself is not asked.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};
use fcvm_types::record::{VmRecord, VmState};
use rustix::fs::inotify;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use crate::args::LogsArguments;
use crate::context::Context;
use crate::owner::log::rotated_name;

/// Longest entry of a log; more is not ours.
const MAX_ENTRY_BYTES: usize = 1 << 20;

pub(crate) async fn run(context: &Context, arguments: &LogsArguments) -> anyhow::Result<u8> {
    let store = context.state()?;
    let record = store.find(&arguments.vm)?;
    let paths = store.paths(&record.id);
    if arguments.console {
        return console(&paths.console_log());
    }
    let mut printer = Printer::new(arguments)?;
    let mut log = Tail::open(paths.container_log());
    let result = async {
        log.read(&mut |entry| printer.take(entry))?;
        printer.end_of_past()?;
        if arguments.follow && record.state != VmState::Exited {
            follow(&mut log, &mut printer, &record, &paths.directory).await?;
        }
        printer.flush()
    };
    match result.await {
        // A reader that left (`| head`) is no failure.
        Err(error) if is_broken_pipe(&error) => Ok(crate::EXIT_SUCCESS),
        result => result.map(|()| crate::EXIT_SUCCESS),
    }
}

fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error
        .downcast_ref::<std::io::Error>()
        .is_some_and(|error| error.kind() == std::io::ErrorKind::BrokenPipe)
}

fn console(path: &Path) -> anyhow::Result<u8> {
    let mut stdout = std::io::stdout().lock();
    for path in [rotated_name(path), path.to_owned()] {
        if let Ok(mut file) = File::open(path)
            && std::io::copy(&mut file, &mut stdout).is_err()
        {
            break;
        }
    }
    Ok(crate::EXIT_SUCCESS)
}

/// Prints what is added, until the owner is gone.
async fn follow(
    log: &mut Tail,
    printer: &mut Printer,
    record: &VmRecord,
    directory: &Path,
) -> anyhow::Result<()> {
    let watch = inotify::init(inotify::CreateFlags::CLOEXEC | inotify::CreateFlags::NONBLOCK)
        .context("cannot watch the log")?;
    let changes =
        inotify::WatchFlags::MODIFY | inotify::WatchFlags::CREATE | inotify::WatchFlags::MOVED_FROM;
    inotify::add_watch(&watch, directory, changes)
        .with_context(|| format!("cannot watch {}", directory.display()))?;
    let watch = fcvm_process::watch_readable(watch)?;
    let end = fcvm_process::wait_gone(record.owner);
    tokio::pin!(end);
    loop {
        // Looked at after the watch is set: what came in between is not missed.
        log.read(&mut |entry| printer.take(entry))?;
        printer.flush()?;
        tokio::select! {
            ended = &mut end => {
                ended?;
                log.read(&mut |entry| printer.take(entry))?;
                return Ok(());
            }
            ready = watch.readable() => {
                let mut ready = ready?;
                let mut events = [0_u8; 4096];
                // What changed does not matter, only that something did.
                while rustix::io::read(ready.get_inner(), &mut events).is_ok_and(|length| length > 0) {}
                ready.clear_ready();
            }
        }
    }
}

/// The container's log, with the part that was rotated away before it.
struct Tail {
    path: PathBuf,
    reader: Option<BufReader<File>>,
    line: Vec<u8>,
}

impl Tail {
    fn open(path: PathBuf) -> Self {
        let reader = File::open(rotated_name(&path))
            .or_else(|_| File::open(&path))
            .ok()
            .map(BufReader::new);
        Self {
            path,
            reader,
            line: Vec::new(),
        }
    }

    /// Gives every entry up to the end of what is there now.
    fn read(&mut self, take: &mut impl FnMut(&[u8]) -> anyhow::Result<()>) -> anyhow::Result<()> {
        loop {
            let Some(reader) = &mut self.reader else {
                match File::open(&self.path) {
                    Ok(file) => self.reader = Some(BufReader::new(file)),
                    Err(_) => return Ok(()),
                }
                continue;
            };
            let length = reader.read_until(b'\n', &mut self.line)?;
            if length == 0 {
                let inode = reader.get_ref().metadata()?.ino();
                match std::fs::metadata(&self.path) {
                    // This part is read to its end, and another one follows it.
                    Ok(metadata) if metadata.ino() != inode => self.reader = None,
                    _ => return Ok(()),
                }
            } else if self.line.ends_with(b"\n") || self.line.len() > MAX_ENTRY_BYTES {
                take(self.line.strip_suffix(b"\n").unwrap_or(&self.line))?;
                self.line.clear();
            }
            // Otherwise the entry is being written: its rest comes with the next read.
        }
    }
}

/// An entry of the log: `TIME stdout|stderr P|F TEXT`.
#[derive(Clone)]
struct Entry {
    time: String,
    stderr: bool,
    whole: bool,
    text: Vec<u8>,
}

impl Entry {
    fn parse(line: &[u8]) -> Option<Self> {
        let mut fields = line.splitn(4, |byte| *byte == b' ');
        let time = std::str::from_utf8(fields.next()?).ok()?.to_owned();
        let stderr = match fields.next()? {
            b"stdout" => false,
            b"stderr" => true,
            _ => return None,
        };
        let whole = match fields.next()? {
            b"F" => true,
            b"P" => false,
            _ => return None,
        };
        Some(Self {
            time,
            stderr,
            whole,
            text: fields.next()?.to_vec(),
        })
    }
}

/// Chooses and prints entries.
struct Printer {
    timestamps: bool,
    since: Option<OffsetDateTime>,
    until: Option<OffsetDateTime>,
    /// The last lines of the past, while it is read; `None` once entries are printed as they come.
    last: Option<(usize, VecDeque<Entry>)>,
    /// The stream is in the middle of a line: stdout, stderr.
    in_line: [bool; 2],
    stdout: std::io::BufWriter<std::io::Stdout>,
}

impl Printer {
    fn new(arguments: &LogsArguments) -> anyhow::Result<Self> {
        let last = match arguments.tail.as_str() {
            "all" | "-1" => None,
            text => {
                let lines = text.parse().map_err(|_| {
                    anyhow::anyhow!(
                        "'{text}' is no number of lines (--tail): write a number or 'all'"
                    )
                })?;
                Some((lines, VecDeque::new()))
            }
        };
        Ok(Self {
            timestamps: arguments.timestamps,
            since: arguments.since.as_deref().map(parse_time).transpose()?,
            until: arguments.until.as_deref().map(parse_time).transpose()?,
            last,
            in_line: [false; 2],
            stdout: std::io::BufWriter::new(std::io::stdout()),
        })
    }

    fn take(&mut self, line: &[u8]) -> anyhow::Result<()> {
        let Some(entry) = Entry::parse(line) else {
            return Ok(());
        };
        if self.since.is_some() || self.until.is_some() {
            let Ok(time) = OffsetDateTime::parse(&entry.time, &Rfc3339) else {
                return Ok(());
            };
            if self.since.is_some_and(|since| time < since)
                || self.until.is_some_and(|until| time > until)
            {
                return Ok(());
            }
        }
        let Some((lines, entries)) = &mut self.last else {
            return self.print(&entry);
        };
        entries.push_back(entry);
        let whole_lines = entries
            .iter()
            .rev()
            .skip(1)
            .filter(|entry| entry.whole)
            .count()
            + 1;
        if whole_lines > *lines {
            while entries.pop_front().is_some_and(|entry| !entry.whole) {}
        }
        Ok(())
    }

    /// The past is read: prints the last lines of it.
    fn end_of_past(&mut self) -> anyhow::Result<()> {
        for entry in self
            .last
            .take()
            .map(|(_, entries)| entries)
            .unwrap_or_default()
        {
            self.print(&entry)?;
        }
        self.flush()
    }

    fn print(&mut self, entry: &Entry) -> anyhow::Result<()> {
        let mut bytes = Vec::with_capacity(entry.text.len() + 40);
        let in_line = &mut self.in_line[usize::from(entry.stderr)];
        if self.timestamps && !*in_line {
            bytes.extend_from_slice(entry.time.as_bytes());
            bytes.push(b' ');
        }
        bytes.extend_from_slice(&entry.text);
        if entry.whole {
            bytes.push(b'\n');
        }
        *in_line = !entry.whole;
        if entry.stderr {
            self.stdout.flush()?;
            std::io::stderr().write_all(&bytes)?;
        } else {
            self.stdout.write_all(&bytes)?;
        }
        Ok(())
    }

    fn flush(&mut self) -> anyhow::Result<()> {
        Ok(self.stdout.flush()?)
    }
}

/// A time in RFC 3339, or an age.
fn parse_time(text: &str) -> anyhow::Result<OffsetDateTime> {
    if let Ok(time) = OffsetDateTime::parse(text, &Rfc3339) {
        return Ok(time);
    }
    match crate::args::run::parse_duration(text) {
        Ok(age) => Ok(OffsetDateTime::now_utc() - age),
        Err(_) => {
            bail!("'{text}' is neither a time (2026-01-31T12:00:00Z) nor an age (90s, 10m, 3h, 2d)")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_are_parsed_and_foreign_lines_are_not() {
        let entry = Entry::parse(b"2026-01-31T12:00:00Z stderr P two words").unwrap();
        assert!(entry.stderr && !entry.whole);
        assert_eq!(entry.text, b"two words");
        for bad in [
            &b""[..],
            b"x",
            b"t stdin F x",
            b"t stdout X x",
            b"t stdout F",
        ] {
            assert!(Entry::parse(bad).is_none());
        }
    }

    #[test]
    fn reading_goes_over_a_rotation_and_waits_for_whole_entries() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        std::fs::write(&path, "t stdout F one\nt stdout F tw").unwrap();
        let mut tail = Tail::open(path.clone());
        let mut seen = Vec::new();
        let mut read = |tail: &mut Tail| {
            tail.read(&mut |line| {
                seen.push(String::from_utf8_lossy(&Entry::parse(line).unwrap().text).into_owned());
                Ok(())
            })
            .unwrap();
            seen.len()
        };
        assert_eq!(read(&mut tail), 1);
        let mut file = File::options().append(true).open(&path).unwrap();
        file.write_all(b"o\n").unwrap();
        std::fs::rename(&path, rotated_name(&path)).unwrap();
        std::fs::write(&path, "t stdout F three\n").unwrap();
        assert_eq!(read(&mut tail), 3);
        assert_eq!(seen, ["one", "two", "three"]);
    }

    #[test]
    fn times_and_ages() {
        assert!(parse_time("2026-01-31T12:00:00Z").is_ok());
        let ten_minutes = parse_time("10m").unwrap();
        assert!((OffsetDateTime::now_utc() - ten_minutes).whole_minutes() >= 10);
        assert!(parse_time("yesterday").is_err());
    }
}
