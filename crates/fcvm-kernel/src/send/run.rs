//! `zfs` here and there: its commands, and a stream from one to the other.

use std::io::{self, Read, Write};
use std::process::{Child, Command, Output, Stdio};
use std::thread;

use super::names::check_host;
use super::{Dataset, Event, Request, Result, SendError, Snapshot};

/// `zfs` on this host, or on another one.
pub(super) struct ZfsProgram {
    before: Vec<String>,
    search_path: String,
}

/// A snapshot as a side lists it.
pub(super) struct Listed {
    pub(super) name: String,
    pub(super) guid: String,
}

/// How a stream ended.
pub(super) struct Transfer {
    pub(super) passed_bytes: u64,
    /// What the sender said, where it failed.
    send: Option<String>,
    /// What the receiver said, where it failed.
    receive: Option<String>,
}

const ERROR_BYTES_MAX: u64 = 16 << 10;
const HOLDS_AT_ONCE: usize = 500;
const BUFFER_BYTES: usize = 128 << 10;
const DATASET_MISSING: &str = "dataset does not exist";

impl ZfsProgram {
    pub(super) fn local(request: &Request) -> Self {
        Self {
            before: Vec::new(),
            search_path: request.search_path.clone(),
        }
    }

    pub(super) fn destination(request: &Request) -> Result<Self> {
        let mut program = Self::local(request);
        if let Some(host) = &request.ssh_host {
            check_host(host)?;
            // A host that is gone is noticed after a minute; nobody is there to be asked for a password.
            let words = [
                "ssh",
                "-o",
                "BatchMode=yes",
                "-o",
                "ServerAliveInterval=15",
                "-o",
                "ServerAliveCountMax=4",
                "--",
                host,
            ];
            program.before = words.map(str::to_owned).to_vec();
        }
        Ok(program)
    }

    fn command(&self, words: &[String]) -> (Command, String) {
        let mut all = self
            .before
            .iter()
            .cloned()
            .chain(["zfs".to_owned()])
            .chain(words.iter().cloned());
        let program = all.next().unwrap_or_default();
        let mut command = Command::new(&program);
        command
            .args(all)
            .env("PATH", &self.search_path)
            .env("LC_ALL", "C");
        (command, program)
    }

    fn output(&self, words: &[&str]) -> Result<Output> {
        let words: Vec<String> = words.iter().map(|word| (*word).to_owned()).collect();
        let (mut command, program) = self.command(&words);
        command
            .stdin(Stdio::null())
            .output()
            .map_err(|source| SendError::Program { program, source })
    }

    fn must(&self, words: &[&str]) -> Result<String> {
        let output = self.output(words)?;
        if output.status.success() {
            return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
        }
        Err(SendError::Refused {
            action: format!("zfs {}", words[0]),
            output: one_line(&output.stderr),
        })
    }

    pub(super) fn hold(&self, tag: &str, snapshot: &Snapshot) -> Result<()> {
        match self.must(&["hold", tag, &snapshot.to_string()]) {
            // Left by a run that failed.
            Err(SendError::Refused { output, .. }) if output.contains("tag already exists") => {
                Ok(())
            }
            other => other.map(|_| ()),
        }
    }

    /// Releases this tag on all snapshots of a dataset, those of earlier runs too.
    pub(super) fn release_all(&self, tag: &str, dataset: &Dataset) -> Result<()> {
        let names: Vec<String> = self
            .snapshots(dataset)?
            .unwrap_or_default()
            .iter()
            .map(|one| dataset.snapshot(&one.name).to_string())
            .collect();
        // A command line has its limits.
        for names in names.chunks(HOLDS_AT_ONCE) {
            let mut words = vec!["holds", "-H"];
            words.extend(names.iter().map(String::as_str));
            for line in self.must(&words)?.lines() {
                let mut fields = line.split('\t');
                if let (Some(name), Some(found)) = (fields.next(), fields.next())
                    && found == tag
                {
                    self.must(&["release", tag, name])?;
                }
            }
        }
        Ok(())
    }

    pub(super) fn abort_receive(&self, dataset: &Dataset) -> Result<()> {
        self.must(&["receive", "-A", &dataset.to_string()])
            .map(|_| ())
    }

    /// The token of an interrupted stream; `None` where there is none, or no dataset.
    pub(super) fn resume_token(&self, dataset: &Dataset) -> Result<Option<String>> {
        let words = [
            "get",
            "-H",
            "-o",
            "value",
            "receive_resume_token",
            &dataset.to_string(),
        ];
        let said = match self.must(&words) {
            Err(SendError::Refused { output, .. }) if output.contains(DATASET_MISSING) => {
                return Ok(None);
            }
            other => other?,
        };
        let token = said.trim();
        // The other host's word becomes a word of a command here.
        let good = token.chars().all(|c| c.is_ascii_alphanumeric() || c == '-');
        Ok((!token.is_empty() && token != "-" && good).then(|| token.to_owned()))
    }

    /// The snapshots of a dataset from the oldest on; `None` where the dataset is missing.
    pub(super) fn snapshots(&self, dataset: &Dataset) -> Result<Option<Vec<Listed>>> {
        let words = [
            "list",
            "-H",
            "-p",
            "-t",
            "snapshot",
            "-o",
            "name,guid",
            "-s",
            "createtxg",
            "-d",
            "1",
            &dataset.to_string(),
        ];
        let said = match self.must(&words) {
            Err(SendError::Refused { output, .. }) if output.contains(DATASET_MISSING) => {
                return Ok(None);
            }
            other => other?,
        };
        let listed = said.lines().filter_map(|line| {
            let (name, guid) = line.split_once('\t')?;
            Some(Listed {
                name: name.split_once('@')?.1.to_owned(),
                guid: guid.to_owned(),
            })
        });
        Ok(Some(listed.collect()))
    }

    /// What a stream will have, about; `None` where ZFS does not say.
    pub(super) fn stream_size(&self, send: &[String]) -> Option<u64> {
        let mut words: Vec<&str> = send.iter().map(String::as_str).collect();
        words.insert(1, "-nP");
        let said = self.must(&words).ok()?;
        let line = said.lines().find_map(|line| line.strip_prefix("size"))?;
        line.trim().parse().ok()
    }
}

fn one_line(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(bytes);
    let lines: Vec<&str> = text
        .lines()
        .map(str::trim)
        .filter(|line| !line.is_empty())
        .collect();
    let shown = |c: char| if c.is_control() { ' ' } else { c };
    lines.join(" | ").chars().map(shown).collect()
}

/// Passes a stream on. Both programs have ended when this returns.
pub(super) fn transfer(
    here: &ZfsProgram,
    send: &[String],
    there: &ZfsProgram,
    receive: &[String],
    progress: &mut dyn FnMut(Event),
) -> Result<Transfer> {
    let start = |program: &ZfsProgram, words, input: Stdio, output: Stdio| {
        let (mut command, name) = program.command(words);
        command
            .stdin(input)
            .stdout(output)
            .stderr(Stdio::piped())
            .spawn()
            .map_err(|source| SendError::Program {
                program: name,
                source,
            })
    };
    let mut receiver = start(there, receive, Stdio::piped(), Stdio::null())?;
    let mut sender = match start(here, send, Stdio::null(), Stdio::piped()) {
        Ok(sender) => sender,
        Err(error) => {
            let _ = receiver.kill();
            let _ = receiver.wait();
            return Err(error);
        }
    };
    let send_errors = read_errors(&mut sender);
    let receive_errors = read_errors(&mut receiver);
    let mut passed_bytes = 0;
    let from = sender.stdout.take();
    let to = receiver.stdin.take();
    if let (Some(from), Some(to)) = (from, to) {
        // Either end may close first; how the programs end says which one failed. Both pipes are closed
        // here, and so both programs end.
        let _ = pump(from, to, &mut passed_bytes, progress);
    }
    let ended = |mut child: Child, errors: thread::JoinHandle<Vec<u8>>| {
        let status = child.wait();
        let said = one_line(&errors.join().unwrap_or_default());
        match status {
            Ok(status) if status.success() => None,
            Ok(status) if said.is_empty() => Some(status.to_string()),
            Ok(_) => Some(said),
            Err(error) => Some(error.to_string()),
        }
    };
    Ok(Transfer {
        send: ended(sender, send_errors),
        receive: ended(receiver, receive_errors),
        passed_bytes,
    })
}

fn pump(
    mut from: impl Read,
    mut to: impl Write,
    passed_bytes: &mut u64,
    progress: &mut dyn FnMut(Event),
) -> io::Result<()> {
    let mut buffer = vec![0; BUFFER_BYTES];
    loop {
        match from.read(&mut buffer) {
            Ok(0) => return to.flush(),
            Ok(count) => {
                to.write_all(&buffer[..count])?;
                *passed_bytes += count as u64;
                progress(Event::Passed(count as u64));
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

/// Keeps the beginning of what a program says, and reads the rest so that it does not wait.
fn read_errors(child: &mut Child) -> thread::JoinHandle<Vec<u8>> {
    let pipe = child.stderr.take();
    thread::spawn(move || {
        let mut said = Vec::new();
        if let Some(mut pipe) = pipe {
            let _ = pipe.by_ref().take(ERROR_BYTES_MAX).read_to_end(&mut said);
            let _ = io::copy(&mut pipe, &mut io::sink());
        }
        said
    })
}

impl Transfer {
    /// What failed, the receiver's word first: the sender often only noticed that it was left.
    pub(super) fn failure(&self) -> Option<String> {
        match (&self.receive, &self.send) {
            (Some(receive), Some(send)) => Some(format!("{receive} | {send}")),
            (one, other) => one.clone().or_else(|| other.clone()),
        }
    }

    /// The token's snapshot is gone, or the token is none that this ZFS reads.
    pub(super) fn is_stale(&self) -> bool {
        let said = self.send.as_deref().unwrap_or_default();
        [
            "no longer exists",
            "no longer the same snapshot",
            "resume token is corrupt",
            "cannot resume send",
        ]
        .iter()
        .any(|text| said.contains(text))
    }

    /// Trying again would end the same.
    pub(super) fn is_final(&self) -> bool {
        let said = self.failure().unwrap_or_default();
        [
            "permission denied",
            "has been modified",
            "must specify -F",
            "out of space",
            "quota exceeded",
            "invalid option",
            "unsupported",
            "destination is a",
        ]
        .iter()
        .any(|text| said.contains(text))
    }
}
