//! What every hypervisor's VM tells of itself, and how it is reached.

use std::fmt;
use std::io;

use fcvm_process::HelperExit;
use tokio::net::{UnixListener, UnixStream};

/// Something that happened to a VM without being asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum VmEvent {
    /// The virtual processors stopped: [`pause`](crate::Pause::pause) or a full disk.
    Stopped,
    /// They run again.
    Resumed,
    /// A read or write of a disk failed on the host.
    DiskError {
        /// Serial number of the disk.
        disk: String,
        /// A write; otherwise a read.
        write: bool,
        /// The host's file system is full. The VM was stopped and its writes wait: it goes on
        /// where it was once there is space and [`resume`](crate::Pause::resume) was called.
        no_space: bool,
        /// The host's error.
        reason: String,
    },
}

/// How a VM ended.
#[derive(Debug, Clone)]
pub struct VmExit {
    /// What ended it.
    pub cause: ExitCause,
    /// The hypervisor's exit status and its last words.
    pub process: HelperExit,
}

/// What ended a VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ExitCause {
    /// The guest powered itself off.
    PoweredOff,
    /// The guest reset itself, which is what a kernel does after a panic.
    Reset,
    /// The hypervisor was asked to end, or ended by SIGTERM, SIGINT or SIGHUP.
    Terminated,
    /// The hypervisor was killed by this signal, or crashed with it.
    Killed(i32),
    /// The hypervisor gave up.
    Failed,
}

impl fmt::Display for VmExit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.cause {
            ExitCause::PoweredOff => f.write_str("the guest powered itself off"),
            ExitCause::Reset => f.write_str("the guest reset itself, as after a kernel panic"),
            ExitCause::Terminated => write!(f, "{} was told to end", self.process.role),
            ExitCause::Killed(_) | ExitCause::Failed => self.process.fmt(f),
        }
    }
}

/// The owner's end of the agent channel.
#[derive(Debug)]
pub enum AgentChannel {
    /// Connected from the start: what the guest writes before it is read waits in it.
    Connected(UnixStream),
    /// The guest connects when its agent has come up.
    Awaited(UnixListener),
}

impl AgentChannel {
    /// The connection, once there is one. Nobody else in the guest can connect afterwards.
    ///
    /// # Errors
    ///
    /// The socket is broken.
    pub async fn connected(self) -> io::Result<UnixStream> {
        match self {
            Self::Connected(stream) => Ok(stream),
            Self::Awaited(listener) => Ok(listener.accept().await?.0),
        }
    }
}
