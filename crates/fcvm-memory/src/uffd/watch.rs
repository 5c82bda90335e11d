//! What the server tells those who look after VMs: questions and notices, a line of JSON each.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use fcvm_types::memory::PageServiceStatistics;
use serde::{Deserialize, Serialize};

use super::handshake::send_message;

/// How long the server may take to answer.
const ANSWER_LIMIT: Duration = Duration::from_secs(10);
/// Longest line: statistics of as many VMs as are served at once.
const LINE_BYTES_MAX: u64 = 8 << 20;

/// What is asked of a server.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
#[serde(rename_all = "lowercase", tag = "question")]
pub(super) enum Question {
    /// Tell what happens from now on, to one process or to all, until the connection ends.
    Watch {
        #[serde(default, skip_serializing_if = "Option::is_none")]
        pid: Option<i32>,
    },
    /// Tell what has been done.
    Statistics,
    /// Serve the hypervisor whose connection comes with this.
    Serve,
}

/// Something that happened to a VM; processes are named by their numbers as the server sees them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase", tag = "event")]
#[non_exhaustive]
pub enum Notice {
    /// The server listens to this connection: nothing is missed from here on.
    Watching,
    /// A hypervisor's memory is served.
    Started {
        /// Its number.
        pid: i32,
        /// How many pages were recorded and come ahead; where there are some, `Prefetched` follows.
        ahead_pages: u64,
    },
    /// What was recorded is being brought; told about once a second.
    Prefetching {
        /// Its number.
        pid: i32,
        /// How many pages have come.
        pages: u64,
    },
    /// What was recorded has been brought: resume the guest now.
    Prefetched {
        /// Its number.
        pid: i32,
        /// How many pages.
        pages: u64,
    },
    /// A process was not heard. A hypervisor's guest would wait for its memory for ever.
    Refused {
        /// Its number; 0 where it is not known.
        pid: i32,
        /// Why, in words.
        reason: String,
    },
    /// A hypervisor is served no longer. It has ended or was killed.
    Ended {
        /// Its number.
        pid: i32,
        /// Why, in words.
        reason: String,
        /// Whether that is a failure, and not an end that was wanted.
        is_failure: bool,
        /// What was done for it.
        statistics: Box<PageServiceStatistics>,
    },
}

impl Notice {
    /// The process that it is about.
    pub(super) fn pid(&self) -> Option<i32> {
        match self {
            Self::Watching => None,
            Self::Started { pid, .. }
            | Self::Prefetching { pid, .. }
            | Self::Prefetched { pid, .. }
            | Self::Refused { pid, .. }
            | Self::Ended { pid, .. } => Some(*pid),
        }
    }
}

/// What a server has done.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Summary {
    /// What its memory is of, as who started it says.
    pub name: String,
    /// The VMs that are served, by their hypervisors' numbers.
    pub served: Vec<(i32, PageServiceStatistics)>,
    /// How many were served and have ended.
    pub ended_count: u64,
    /// Those together.
    pub ended: PageServiceStatistics,
}

/// Why a server cannot be asked.
#[derive(Debug, thiserror::Error)]
pub enum WatchError {
    /// Nobody listens, or the server is ending.
    #[error("the memory server does not answer: {0}")]
    Gone(io::Error),
    /// It has no room.
    #[error("the memory server does not answer: {0}")]
    Refused(String),
    /// It is no server of this version.
    #[error("the memory server answers what this fcvm does not understand: {0}")]
    Answer(serde_json::Error),
}

/// A connection to a server that tells what happens, and that the server has gone: whoever runs a VM
/// ends it then, as its guest stands still for ever at the next page.
#[derive(Debug)]
pub struct ServerWatch {
    lines: BufReader<UnixStream>,
}

impl ServerWatch {
    /// Watches the server of a socket. Everything from the return on is told.
    ///
    /// # Errors
    ///
    /// It does not answer.
    pub fn connect(socket: &Path) -> Result<Self, WatchError> {
        Self::ask(socket, None)
    }

    /// The same for what happens to one process, until that has ended. Who names itself is told nothing, and
    /// keeps a server that would end as idle.
    ///
    /// # Errors
    ///
    /// It does not answer.
    pub fn connect_for(socket: &Path, pid: i32) -> Result<Self, WatchError> {
        Self::ask(socket, Some(pid))
    }

    fn ask(socket: &Path, pid: Option<i32>) -> Result<Self, WatchError> {
        let mut own = Self {
            lines: ask(socket, Question::Watch { pid })?,
        };
        match own.next()? {
            Some(Notice::Watching) => {}
            Some(Notice::Refused { reason, .. }) => return Err(WatchError::Refused(reason)),
            _ => return Err(WatchError::Gone(io::ErrorKind::UnexpectedEof.into())),
        }
        let endless = own.lines.get_ref().set_read_timeout(None);
        endless.map_err(WatchError::Gone)?;
        Ok(own)
    }

    /// Waits for the next notice; `None` when the server has gone.
    ///
    /// # Errors
    ///
    /// The server says what is none.
    #[expect(clippy::should_implement_trait, reason = "it fails, and waits")]
    pub fn next(&mut self) -> Result<Option<Notice>, WatchError> {
        match line(&mut self.lines) {
            // Also within a line: a server that was killed, or one whose notices were not read in time.
            Ok(line) if !line.ends_with('\n') => Ok(None),
            Ok(line) => Ok(Some(
                serde_json::from_str(&line).map_err(WatchError::Answer)?,
            )),
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => Ok(None),
            Err(error) => Err(WatchError::Gone(error)),
        }
    }

    /// Whether notices have been read from the connection that [`next`](Self::next) has not given yet:
    /// the descriptor does not tell of these.
    pub fn is_pending(&self) -> bool {
        !self.lines.buffer().is_empty()
    }
}

impl AsFd for ServerWatch {
    /// Can be read when a notice has come, or the end; see [`is_pending`](ServerWatch::is_pending).
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.lines.get_ref().as_fd()
    }
}

impl Summary {
    /// Asks the server of a socket.
    ///
    /// # Errors
    ///
    /// It does not answer.
    pub fn ask(socket: &Path) -> Result<Self, WatchError> {
        let line = line(&mut ask(socket, Question::Statistics)?).map_err(WatchError::Gone)?;
        match serde_json::from_str(&line) {
            Ok(Notice::Refused { reason, .. }) => Err(WatchError::Refused(reason)),
            _ => serde_json::from_str(&line).map_err(WatchError::Answer),
        }
    }
}

/// Hands the server of a socket a connection that a hypervisor has made elsewhere: where it could not reach the
/// server's, or would not be heard. It is served as if it had connected to the server.
///
/// # Errors
///
/// The server has gone.
pub fn hand_over(socket: &Path, connection: BorrowedFd<'_>) -> io::Result<()> {
    let server = UnixStream::connect(socket)?;
    send_message(&server, &encoded(&Question::Serve), &[connection])
}

fn ask(socket: &Path, question: Question) -> Result<BufReader<UnixStream>, WatchError> {
    let connect = || {
        let mut socket = UnixStream::connect(socket)?;
        socket.set_read_timeout(Some(ANSWER_LIMIT))?;
        socket.write_all(&encoded(&question))?;
        Ok(BufReader::new(socket))
    };
    connect().map_err(WatchError::Gone)
}

fn line(lines: &mut BufReader<UnixStream>) -> io::Result<String> {
    let mut line = String::new();
    lines.take(LINE_BYTES_MAX).read_line(&mut line)?;
    Ok(line)
}

/// A line.
pub(super) fn encoded(message: &impl Serialize) -> Vec<u8> {
    // Plain data with text for keys: always possible.
    let mut line = serde_json::to_vec(message).unwrap_or_default();
    line.push(b'\n');
    line
}
