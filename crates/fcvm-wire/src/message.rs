//! The messages that frames carry, as JSON.

use std::collections::BTreeMap;

use fcvm_types::guest::{
    ClonePlan, ExitStatus, GuestPlan, GuestProcess, GuestStats, ProcessPlan, TerminalSize,
};
use serde::{Deserialize, Serialize};

use crate::mark::Mark;

/// Version of the protocol. Both sides must speak the same one: the agent is built with the host.
pub const PROTOCOL_VERSION: u32 = 3;

/// Who says hello.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// The guest's agent.
    Agent,
    /// The owner process of the VM.
    Owner,
    /// A command that talks to the owner.
    Command,
}

/// First frame of each side.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// [`PROTOCOL_VERSION`] of the sender.
    pub protocol: u32,
    /// Who it is.
    pub role: Role,
    /// Version of the program, for messages.
    pub program: String,
    /// Identifies one start of the sender; the two sides tell a resumed peer from a new one by it.
    pub session: u64,
    /// The owner tells the agent by which mark the owner of a clone will announce itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mark: Option<Mark>,
}

/// What a stream is opened for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "request", rename_all = "snake_case")]
pub enum Request {
    /// Sets the guest up and runs the container's first process. Once per boot.
    Run {
        /// What to set up and to run.
        plan: Box<GuestPlan>,
    },
    /// Makes a clone a guest of its own, and its container's stream the one that this opens. The
    /// first request after a [`Mark`].
    Adopt {
        /// Who it is now.
        plan: Box<ClonePlan>,
    },
    /// Runs another process in the container.
    Exec {
        /// What to run.
        process: ProcessPlan,
    },
    /// Sends a signal to the container's first process, or to all of its processes.
    Signal {
        /// Signal number.
        signal: i32,
        /// To every process of the container.
        all: bool,
    },
    /// Sends a path of the container as a tar archive on stdout (`docker cp` semantics: the members
    /// are named from the path's last component on; a trailing "/." sends the directory's content).
    ArchiveRead {
        /// Path in the container.
        path: String,
        /// A symbolic link at the end of the path is followed.
        follow: bool,
    },
    /// Unpacks the tar archive that arrives on stdin.
    ArchiveWrite {
        /// Existing directory of the container that receives the members.
        directory: String,
        /// Owners of the archive are kept; otherwise all is root's.
        keep_owners: bool,
    },
    /// What a path of the container is; for the rules of `cp`.
    Stat {
        /// Path in the container.
        path: String,
    },
    /// The container's processes.
    Processes,
    /// The guest's counters.
    Stats,
    /// An HTTP GET from inside the guest, for a health check.
    HttpProbe {
        /// `http://host[:port]/path`.
        url: String,
        /// Time limit in milliseconds.
        timeout_ms: u64,
    },
    /// Sets the realtime clock.
    SetClock {
        /// Nanoseconds since 1970.
        realtime_ns: u64,
    },
    /// Ends every process, syncs and unmounts the file systems and powers the guest off.
    PowerOff,
}

/// Answer of the serving side when the stream's process has started.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Opened {
    /// Process id in the container's PID namespace; 0 where the request starts no process.
    pub pid: u32,
}

/// Sent on an open stream by the side that opened it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "control", rename_all = "snake_case")]
pub enum Control {
    /// Sends a signal to the stream's process.
    Signal {
        /// Signal number.
        signal: i32,
    },
    /// The terminal has a new size.
    Resize {
        /// The new size.
        size: TerminalSize,
    },
}

/// How a stream ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "outcome", content = "value", rename_all = "snake_case")]
pub enum Outcome {
    /// The process ended.
    Exited(ExitStatus),
    /// The request was carried out and has no other answer.
    Done,
    /// The container's processes.
    Processes(Vec<GuestProcess>),
    /// The guest's counters.
    Stats(GuestStats),
    /// What the hypervisor has counted, by its own names; empty where it counts nothing. An owner's answer.
    Counters(BTreeMap<String, u64>),
    /// The status code of an HTTP probe.
    Http(u16),
    /// What a path is.
    Stat(PathStat),
    /// The request could not be carried out.
    Failed(Failure),
}

/// What a path of the container is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PathStat {
    /// It is a directory (a symbolic link is followed).
    pub is_directory: bool,
    /// Size in bytes.
    pub size_bytes: u64,
    /// Permission bits and type, as in `st_mode`.
    pub mode: u32,
}

/// Class of a failure; it decides the exit code.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FailureKind {
    /// The command does not exist: exit code 127.
    CommandNotFound,
    /// The command cannot be executed: exit code 126.
    CommandNotExecutable,
    /// A path does not exist.
    PathNotFound,
    /// The request is wrong: unknown user, bad rlimit, no such capability.
    BadRequest,
    /// The guest could not do it: a disk that does not mount, no space left, ...
    Guest,
    /// This agent does not know the request.
    Unsupported,
}

/// Why a request could not be carried out.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// Its class.
    pub kind: FailureKind,
    /// An English sentence without its full stop.
    pub message: String,
}
