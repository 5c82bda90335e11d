//! A relay of Ethernet frames, so that a VM's network outlives its hypervisor process.
//!
//! passt and a hypervisor speak over a stream: frames, each behind its length. Were the stream one
//! that processes inherit from each other, what one of them had read of a frame would be missing to
//! the next for ever. So the owner keeps passt's end, and each hypervisor process has a socket of
//! its own, of which one is the *current* one:
//!
//! - Frames for the guest go to the current connection alone, from the first byte of a frame on.
//!   While there is none, or the relay is told to hold, they wait, up to the size of a buffer; then
//!   passt is made to wait.
//! - Frames from the guest are taken from the current connection, after those that its predecessors
//!   left in their sockets, and only whole ones are given on.
//! - What is lost at a change is what the kernel holds for a hypervisor that does not read any more:
//!   none, where the relay was told to hold a moment before the hypervisor stopped.
//!
//! Memory is bounded by one buffer of 256 KiB in each direction, which goes back after a second of
//! silence.
//!
//! Not here: passt itself (`passt.rs`) and what the frames hold.

mod buffer;
mod state;
mod thread;

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::thread::JoinHandle;

use rustix::net::{AddressFamily, SocketFlags, SocketType};
use tokio::sync::watch;

pub(crate) use buffer::{FRAME_BYTES_MAX, FrameBuffer, LENGTH_BYTES};
use thread::Shared;

/// Stack of the relay's thread: its deepest call holds the headers of one batch of frames.
const STACK_BYTES: usize = 256 << 10;

/// A relay between passt and the VM's hypervisor processes, one after the other.
///
/// It ends when passt closes its socket, when the last hypervisor has closed its own (see
/// [`set_lingering`](Self::set_lingering)), or when it is dropped. Then every socket of it is closed,
/// which ends passt.
#[derive(Debug)]
pub struct FrameRelay {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
    tell_end: watch::Sender<Option<RelayEnd>>,
}

/// A hypervisor's connection to a [`FrameRelay`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct ConnectionId(u64);

/// Why a relay ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RelayEnd {
    /// passt closed its socket.
    Uplink,
    /// passt sent what is no frame.
    Malformed,
    /// The last hypervisor closed its socket.
    Hypervisor,
    /// The owner dropped the relay.
    Dropped,
}

/// What a relay has carried so far.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct RelayCounters {
    /// Frames handed to hypervisors.
    pub frames_to_guest: u64,
    /// Their bytes, with four for the length of each.
    pub bytes_to_guest: u64,
    /// Frames handed to passt.
    pub frames_from_guest: u64,
    /// Their bytes, with four for the length of each.
    pub bytes_from_guest: u64,
    /// Frames that went nowhere: cut off by the end or the stop of a hypervisor, put together of two by that, of a
    /// length that passt does not take, or left over when the relay ended. What the kernel held for a hypervisor that ended is
    /// not known and not in it.
    pub frames_dropped: u64,
}

impl FrameRelay {
    /// A relay without passt and without hypervisors: what hypervisors send waits until
    /// [`start`](Self::start).
    ///
    /// # Errors
    ///
    /// The process has too many descriptors open.
    pub fn new() -> io::Result<Self> {
        Ok(Self {
            shared: Shared::new()?,
            thread: None,
            tell_end: watch::Sender::new(None),
        })
    }

    /// Connects passt's socket and starts the relay's thread. To be called once; the stream must be
    /// between two frames.
    ///
    /// # Errors
    ///
    /// No thread can be started. passt's socket is closed then.
    pub fn start(&mut self, uplink: OwnedFd) -> io::Result<()> {
        self.shared.change(|state| state.start(uplink));
        let (shared, tell_end) = (Arc::clone(&self.shared), self.tell_end.clone());
        let started = std::thread::Builder::new()
            .name("frame-relay".to_owned())
            .stack_size(STACK_BYTES)
            .spawn(move || thread::run(&shared, &tell_end));
        match started {
            Ok(thread) => {
                self.thread = Some(thread);
                Ok(())
            }
            Err(error) => {
                self.shared.change(|state| state.finish(RelayEnd::Dropped));
                Err(error)
            }
        }
    }

    /// Makes a connection and gives the hypervisor's end of it: a stream socket. No frame goes to it
    /// before [`activate`](Self::activate).
    ///
    /// # Errors
    ///
    /// The process has too many descriptors open.
    pub fn connect(&self) -> io::Result<(ConnectionId, OwnedFd)> {
        let (own, hypervisor) = rustix::net::socketpair(
            AddressFamily::UNIX,
            SocketType::STREAM,
            SocketFlags::CLOEXEC,
            None,
        )?;
        let id = self.shared.change(|state| state.connect(own));
        Ok((id, hypervisor))
    }

    /// Makes a connection the current one, at once: when this returns, no byte goes to another any
    /// more. What the one before has sent already is still taken from it, before anything of the
    /// new one; its process must be stopped. Ends [`hold`](Self::hold).
    ///
    /// The one before stays connected until its process closes it or [`disconnect`](Self::disconnect)
    /// does, and can be made the current one again: it then gets the rest of the frame that it has in
    /// part.
    ///
    /// Gives false where the connection is closed already; nothing has changed then.
    #[must_use]
    pub fn activate(&self, connection: ConnectionId) -> bool {
        self.shared.change(|state| state.activate(connection))
    }

    /// Ends [`hold`](Self::hold) and [`stand_still`](Self::stand_still) of the current connection, whose process was
    /// stopped, is so still, and goes on after this.
    ///
    /// A QEMU that is stopped forgets a frame that its socket had taken in part only, but not how much of it that was
    /// (`send_index` in its net/stream.c), so that the next frame, at once or when it goes on, lacks as many bytes at its
    /// beginning. Put together the two have the right length most often, and passt does not look at checksums. So
    /// the frames that come between [`hold`](Self::hold) and this, and some after it, are left out where their checksums are wrong,
    /// and a frame that is there in part now is left out too; the next one is found by its sender.
    ///
    /// Gives false where the connection is closed already; nothing has changed then.
    #[must_use]
    pub fn go_on(&self, connection: ConnectionId) -> bool {
        self.shared.change(|state| state.go_on(connection))
    }

    /// Lets frames for the guest wait from now on, until [`activate`](Self::activate). A moment
    /// before a hypervisor is stopped for good, it lets the process empty its socket, so that nothing
    /// is lost with it.
    pub fn hold(&self) {
        self.shared.change(state::State::hold);
    }

    /// As [`hold`](Self::hold), and nothing is taken from the guest either: for a hypervisor that is stopped and goes
    /// on. One whose socket has room again finishes what it was sending, and writes that into its guest's
    /// memory, stopped or not.
    pub fn stand_still(&self) {
        self.shared.change(state::State::stand_still);
    }

    /// Closes a connection. Its whole frames that the relay has read still go to passt.
    pub fn disconnect(&self, connection: ConnectionId) {
        self.shared.change(|state| state.disconnect(connection));
    }

    /// Whether the relay goes on after its last connection was closed. It does not, unless told so.
    pub fn set_lingering(&self, lingering: bool) {
        self.shared.change(|state| state.lingering = lingering);
    }

    /// What it has carried so far.
    pub fn counters(&self) -> RelayCounters {
        self.shared.lock().counters
    }

    /// Waits until the relay has ended.
    pub async fn ended(&self) -> RelayEnd {
        let mut end = self.tell_end.subscribe();
        match end.wait_for(Option::is_some).await.map(|end| *end) {
            Ok(Some(end)) => end,
            // `self` holds the sender.
            Ok(None) | Err(_) => RelayEnd::Dropped,
        }
    }
}

impl Drop for FrameRelay {
    fn drop(&mut self) {
        self.shared.change(|state| state.finish(RelayEnd::Dropped));
        if let Some(thread) = self.thread.take() {
            // It waits for nothing but a change of the state. A panic of it was told already.
            let _ = thread.join();
        }
    }
}
