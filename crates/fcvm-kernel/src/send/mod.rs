//! Sending a ZFS snapshot so that an interruption costs only what was in flight.
//!
//! Stock OpenZFS does the work: `zfs receive -s` keeps the state of an interrupted stream, and `zfs send -t`
//! goes on from its token. What is added here is the loop around them: back-off, holds on the snapshots, stale
//! tokens thrown away (`zfs receive -A`), and a last look at the destination, which alone says that the snapshot
//! is there.

mod names;
mod run;
#[cfg(test)]
mod tests;

use std::time::Duration;

pub use names::{Dataset, Snapshot};

use run::{Transfer, ZfsProgram};

/// What is sent where.
#[derive(Debug, Clone)]
pub struct Request {
    /// The snapshot.
    pub source: Snapshot,
    /// The dataset that receives it.
    pub destination: Dataset,
    /// The host of the destination, reached with `ssh`; this one otherwise.
    pub ssh_host: Option<String>,
    /// Send encrypted data as it is (`-w`).
    pub raw: bool,
    /// Attempts without any progress before it gives up.
    pub attempts_max: u32,
    /// The pause after the first failure; it doubles up to 64 times that.
    pub pause: Duration,
    /// Where `zfs` and `ssh` are looked for.
    pub search_path: String,
}

/// What happens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// A stream begins; its size, where ZFS can tell it.
    Start {
        /// It goes on where an earlier one stopped.
        resumed: bool,
        /// The expected size.
        size_bytes: Option<u64>,
    },
    /// So many bytes more of this stream were passed on.
    Passed(u64),
    /// The stream stopped; the next attempt comes after the pause.
    Retry {
        /// Why it stopped.
        reason: String,
        /// The pause.
        pause: Duration,
    },
    /// The state at the destination belongs to a snapshot that is gone: it is thrown away.
    Stale(String),
}

/// What was done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Summary {
    /// Streams that were begun.
    pub stream_count: u32,
    /// Bytes of all streams.
    pub passed_bytes: u64,
    /// States that were thrown away.
    pub stale_count: u32,
}

/// Why a snapshot is not at the destination.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SendError {
    /// A name that ZFS does not know or that a remote shell would misread.
    #[error("'{0}' is no {1}")]
    Name(String, &'static str),
    /// A program could not be started.
    #[error("cannot start '{program}': is it installed?")]
    Program {
        /// Its name.
        program: String,
        /// Why.
        source: std::io::Error,
    },
    /// ZFS refused, and would again.
    #[error("{action} failed: {output}")]
    Refused {
        /// What was tried.
        action: String,
        /// What ZFS said.
        output: String,
    },
    /// The destination has something else.
    #[error("{0}")]
    Destination(String),
    /// No attempt made progress.
    #[error(
        "given up after {attempts} attempts without progress: {reason}; the snapshot stays held and the next run goes on from here"
    )]
    GivenUp {
        /// How many.
        attempts: u32,
        /// Why the last one stopped.
        reason: String,
    },
}

/// Result of this module.
pub type Result<T> = std::result::Result<T, SendError>;

/// More than this many states that cannot be used are no accident.
const STALE_MAX: u32 = 5;
const PAUSE_DOUBLINGS_MAX: u32 = 6;

/// Sends the snapshot; ends when the destination has it.
pub fn send(request: &Request, progress: &mut dyn FnMut(Event)) -> Result<Summary> {
    let sender = Sender {
        here: ZfsProgram::local(request),
        there: ZfsProgram::destination(request)?,
        tag: names::hold_tag(request),
        request,
    };
    let tag = &sender.tag;
    sender.here.hold(tag, &request.source)?;
    let summary = sender.until_there(progress)?;
    // Only now: a failed run leaves its holds, so that its token stays good.
    sender.here.release_all(tag, request.source.dataset())?;
    Ok(summary)
}

struct Sender<'a> {
    here: ZfsProgram,
    there: ZfsProgram,
    tag: String,
    request: &'a Request,
}

/// How the next stream begins.
enum Begin {
    Token(String),
    Since(Option<Snapshot>),
}

impl Sender<'_> {
    fn until_there(&self, progress: &mut dyn FnMut(Event)) -> Result<Summary> {
        let mut summary = Summary {
            stream_count: 0,
            passed_bytes: 0,
            stale_count: 0,
        };
        let mut failures = 0;
        let mut last_token = None;
        while let Some(begin) = self.begin()? {
            let token = match &begin {
                Begin::Token(token) => Some(token.clone()),
                Begin::Since(_) => None,
            };
            // Another token than last time: something has arrived.
            if token != last_token {
                failures = 0;
            }
            last_token.clone_from(&token);
            let words = self.words(&begin);
            progress(Event::Start {
                resumed: token.is_some(),
                size_bytes: self.here.stream_size(&words),
            });
            let transfer =
                run::transfer(&self.here, &words, &self.there, &self.receive(), progress)?;
            summary.stream_count += 1;
            summary.passed_bytes += transfer.passed_bytes;
            let Some(reason) = transfer.failure() else {
                continue;
            };
            if token.is_some() && transfer.is_stale() && summary.stale_count < STALE_MAX {
                summary.stale_count += 1;
                progress(Event::Stale(reason));
                self.there.abort_receive(&self.request.destination)?;
                last_token = None;
                continue;
            }
            failures += 1;
            self.refuse_or_pause(&transfer, reason, failures, progress)?;
        }
        Ok(summary)
    }

    fn refuse_or_pause(
        &self,
        transfer: &Transfer,
        reason: String,
        failures: u32,
        progress: &mut dyn FnMut(Event),
    ) -> Result<()> {
        if transfer.is_final() {
            return Err(SendError::Refused {
                action: format!("sending {}", self.request.source),
                output: reason,
            });
        }
        if failures >= self.request.attempts_max {
            return Err(SendError::GivenUp {
                attempts: failures,
                reason,
            });
        }
        let pause = self.request.pause * 2_u32.pow((failures - 1).min(PAUSE_DOUBLINGS_MAX));
        progress(Event::Retry { reason, pause });
        std::thread::sleep(pause);
        Ok(())
    }

    /// `None` when the destination has the snapshot.
    fn begin(&self) -> Result<Option<Begin>> {
        let destination = &self.request.destination;
        if let Some(token) = self.there.resume_token(destination)? {
            return Ok(Some(Begin::Token(token)));
        }
        let there = self.there.snapshots(destination)?;
        let here = self
            .here
            .snapshots(self.request.source.dataset())?
            .unwrap_or_default();
        let source = self.request.source.name();
        let Some(own) = here.iter().find(|one| one.name == source) else {
            return Err(SendError::Destination(format!(
                "there is no snapshot {}",
                self.request.source
            )));
        };
        let Some(there) = there else {
            return Ok(Some(Begin::Since(None)));
        };
        match there.iter().find(|one| one.name == source) {
            Some(same) if same.guid == own.guid => return Ok(None),
            Some(_) => {
                return Err(SendError::Destination(format!(
                    "{destination} has another snapshot with the name '{source}'"
                )));
            }
            None => {}
        }
        // Snapshots are listed from the oldest on; only one before the source can be the beginning.
        let common = here
            .iter()
            .take_while(|one| one.guid != own.guid)
            .filter(|one| there.iter().any(|other| other.guid == one.guid))
            .last();
        match common {
            Some(common) => {
                let base = self.request.source.dataset().snapshot(&common.name);
                // Without its base, a token of this stream would be stale.
                self.here.hold(&self.tag, &base)?;
                Ok(Some(Begin::Since(Some(base))))
            }
            None => Err(SendError::Destination(format!(
                "{destination} exists and has no snapshot in common with {}: nothing is overwritten",
                self.request.source.dataset()
            ))),
        }
    }

    fn words(&self, begin: &Begin) -> Vec<String> {
        let mut words = vec!["send".to_owned()];
        match begin {
            Begin::Token(token) => words.extend(["-t".to_owned(), token.clone()]),
            Begin::Since(since) => {
                if self.request.raw {
                    words.push("-w".to_owned());
                }
                if let Some(since) = since {
                    words.extend(["-i".to_owned(), since.to_string()]);
                }
                words.push(self.request.source.to_string());
            }
        }
        words
    }

    /// `-s` keeps the state of an interrupted stream, `-u` mounts nothing.
    fn receive(&self) -> Vec<String> {
        ["receive", "-s", "-u", &self.request.destination.to_string()]
            .map(str::to_owned)
            .to_vec()
    }
}
