//! Who is connected, and what goes where: everything that the relay's thread and its owner share.
//! Here the bytes move; waiting for them is `thread.rs`.

use std::collections::VecDeque;
use std::io::IoSlice;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use rustix::event::PollFlags;
use rustix::io::Errno;
use rustix::net::{MMsgHdr, RecvFlags, SendAncillaryBuffer, SendFlags};

use super::buffer::{FrameBuffer, FrameTooLong, LENGTH_BYTES};
use super::{ConnectionId, RelayCounters, RelayEnd};

/// Frames handed to the uplink with one system call.
const BATCH_FRAMES: usize = 64;
/// What passt takes for a frame; at another length it drops the connection or loses its place in it
/// (tap_handler_passt() there).
const UPLINK_FRAME_BYTES: std::ops::RangeInclusive<usize> = 14..=65_535;
/// Bytes taken from a hypervisor that is no longer the current one. A stopped one has left what its
/// socket holds and no more; one that runs on shall not keep its successor waiting.
const LEFT_BEHIND_BYTES_MAX: usize = 1 << 20;
/// Frames of a hypervisor that has gone on which may still be put together of two.
const SUSPECTS: usize = 16;

/// A socket, and what is known of it without asking.
#[derive(Debug)]
struct Socket {
    fd: Arc<OwnedFd>,
    readable: bool,
    writable: bool,
}

impl Socket {
    fn new(fd: OwnedFd) -> Self {
        Self {
            fd: Arc::new(fd),
            readable: false,
            writable: true,
        }
    }

    /// Reads what fits, and no more than `limit`; `None` at the end of the stream.
    fn read_into(
        &mut self,
        buffer: &mut FrameBuffer,
        limit: Option<usize>,
    ) -> Result<Option<usize>, FrameTooLong> {
        let space = buffer.space();
        let wanted = limit.map_or(space.len(), |limit| limit.min(space.len()));
        let space = &mut space[..wanted];
        match rustix::net::recv(&*self.fd, space, RecvFlags::DONTWAIT) {
            Ok((count, _)) if count > 0 => {
                // What came short left nothing behind, or poll(2) tells of it.
                self.readable = count == wanted;
                buffer.filled(count)?;
                Ok(Some(count))
            }
            Err(Errno::AGAIN | Errno::INTR) => {
                self.readable = false;
                Ok(Some(0))
            }
            Ok(_) | Err(_) => Ok(None),
        }
    }

    /// Sends what the socket takes.
    fn send(&mut self, bytes: &[u8]) -> Result<usize, Errno> {
        match rustix::net::send(&*self.fd, bytes, SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
            Ok(count) => {
                self.writable = count == bytes.len();
                Ok(count)
            }
            Err(Errno::AGAIN | Errno::INTR) => {
                self.writable = false;
                Ok(0)
            }
            Err(errno) => Err(errno),
        }
    }
}

/// A hypervisor's connection.
#[derive(Debug)]
struct Connection {
    id: ConnectionId,
    socket: Socket,
    /// From the guest.
    inbound: FrameBuffer,
    /// The end of a frame of which it has the beginning, from when another became the current one.
    owed: Vec<u8>,
    /// So many bytes from here on it was stopped.
    stopped_after: Option<usize>,
    /// Nothing can be sent to it any more. What it has sent may still be there to read.
    deaf: bool,
    /// Nothing more can be read from it.
    ended: bool,
}

impl Connection {
    /// So many more bytes were read. Says whether a frame was lost: the one that was on its way when the hypervisor
    /// was stopped.
    fn pass(&mut self, count: usize) -> bool {
        let Some(left) = &mut self.stopped_after else {
            return false;
        };
        *left -= count;
        if *left > 0 {
            return false;
        }
        self.stopped_after = None;
        self.inbound.suspect(SUSPECTS);
        self.inbound.lose_partial()
    }
}

/// A place in the line of those whose frames go to the uplink.
#[derive(Debug)]
struct Source {
    id: ConnectionId,
    /// What may still be read once another has come after it.
    left_bytes: usize,
}

#[derive(Debug, Default)]
pub(super) struct State {
    uplink: Option<Socket>,
    /// From the uplink to the current connection.
    outbound: FrameBuffer,
    connections: Vec<Connection>,
    /// The one that the guest's frames go to.
    current: Option<ConnectionId>,
    /// Whose frames go to the uplink: the current one's, after what earlier ones left behind.
    sources: VecDeque<Source>,
    next_id: u64,
    /// No frames go to the guest.
    held: bool,
    /// None are taken from it either.
    still: bool,
    pub(super) lingering: bool,
    pub(super) counters: RelayCounters,
    pub(super) end: Option<RelayEnd>,
}

impl State {
    pub(super) fn start(&mut self, uplink: OwnedFd) {
        self.uplink = Some(Socket::new(uplink));
    }

    pub(super) fn connect(&mut self, socket: OwnedFd) -> ConnectionId {
        let id = ConnectionId(self.next_id);
        self.next_id += 1;
        if self.end.is_some() {
            // Its other end sees at once that there is nobody.
            return id;
        }
        self.connections.push(Connection {
            id,
            socket: Socket::new(socket),
            inbound: FrameBuffer::default(),
            owed: Vec::new(),
            stopped_after: None,
            deaf: false,
            ended: false,
        });
        id
    }

    /// False where there is no such connection any more.
    pub(super) fn activate(&mut self, id: ConnectionId) -> bool {
        let is_open = |known: &Connection| known.id == id && !known.ended;
        if !self.connections.iter().any(is_open) {
            return false;
        }
        self.held = false;
        self.still = false;
        if self.current == Some(id) {
            self.suspect(0);
            return true;
        }
        self.take_back();
        self.current = Some(id);
        self.sources.push_back(Source {
            id,
            left_bytes: LEFT_BEHIND_BYTES_MAX,
        });
        true
    }

    /// As [`activate`](Self::activate), of one that is stopped still.
    pub(super) fn go_on(&mut self, id: ConnectionId) -> bool {
        let is_there = self.activate(id);
        if is_there && let Some(index) = self.index(id) {
            let connection = &mut self.connections[index];
            connection.inbound.suspect(usize::MAX);
            let unread = rustix::io::ioctl_fionread(&*connection.socket.fd).unwrap_or(0);
            connection.stopped_after = Some(usize::try_from(unread).unwrap_or(usize::MAX));
            self.counters.frames_dropped += u64::from(connection.pass(0));
        }
        is_there
    }

    pub(super) fn hold(&mut self) {
        self.held = true;
        self.suspect(usize::MAX);
    }

    pub(super) fn stand_still(&mut self) {
        self.hold();
        self.still = true;
    }

    /// Has the next frames of the current connection looked at.
    fn suspect(&mut self, count: usize) {
        if let Some(index) = self.current.and_then(|id| self.index(id)) {
            self.connections[index].inbound.suspect(count);
        }
    }

    pub(super) fn disconnect(&mut self, id: ConnectionId) {
        if let Some(index) = self.index(id) {
            self.connections[index].ended = true;
        }
    }

    /// The end: everyone who is connected sees it.
    pub(super) fn finish(&mut self, end: RelayEnd) {
        if self.end.is_none() {
            self.end = Some(end);
        }
        let inbound = self.connections.iter().map(|c| c.inbound.frame_count());
        self.counters.frames_dropped += self.outbound.frame_count() + inbound.sum::<u64>();
        self.uplink = None;
        self.current = None;
        self.connections.clear();
        self.sources.clear();
        self.outbound = FrameBuffer::default();
    }

    fn index(&self, id: ConnectionId) -> Option<usize> {
        self.connections
            .iter()
            .position(|connection| connection.id == id)
    }

    /// A frame that the current connection has in part will be the next one's first, as a whole. No
    /// guest gets it twice: the one that has it in part can not use it, unless it becomes the
    /// current one again and gets the rest.
    fn take_back(&mut self) {
        let rest = self.outbound.take_back();
        if let Some(index) = self.current.and_then(|id| self.index(id))
            && !rest.is_empty()
        {
            self.connections[index].owed = rest;
        }
    }

    /// Moves what can be moved without waiting. True where more could be moved at once.
    pub(super) fn turn(&mut self) -> bool {
        let result = self.turn_outbound().and_then(|()| self.turn_inbound());
        if let Err(end) = result {
            self.finish(end);
            return false;
        }
        self.remove_ended();
        self.has_work()
    }

    /// From the uplink to the guest.
    fn turn_outbound(&mut self) -> Result<(), RelayEnd> {
        let Some(uplink) = &mut self.uplink else {
            return Ok(());
        };
        let mut open = true;
        if uplink.readable && self.outbound.has_space() {
            match uplink.read_into(&mut self.outbound, None) {
                Ok(count) => open = count.is_some(),
                Err(FrameTooLong { length_bytes }) => {
                    tracing::error!(
                        "the VM's network is closed: passt sent a frame of {length_bytes} bytes"
                    );
                    return Err(RelayEnd::Malformed);
                }
            }
        }
        self.deliver();
        if open { Ok(()) } else { Err(RelayEnd::Uplink) }
    }

    /// Gives the current connection what waits for it.
    fn deliver(&mut self) {
        let Some(index) = self.receiver() else {
            return;
        };
        let connection = &mut self.connections[index];
        if !connection.socket.writable {
            return;
        }
        let sent = if connection.owed.is_empty() {
            connection
                .socket
                .send(self.outbound.pending())
                .map(|count| {
                    self.counters.frames_to_guest += self.outbound.given_on(count);
                    self.counters.bytes_to_guest += count as u64;
                })
        } else {
            let owed = &mut connection.owed;
            connection.socket.send(owed).map(|count| {
                owed.drain(..count);
            })
        };
        if sent.is_err() {
            connection.deaf = true;
            self.outbound.take_back();
        }
    }

    /// The current connection, where something waits for it.
    fn receiver(&self) -> Option<usize> {
        if self.held {
            return None;
        }
        let index = self.index(self.current?)?;
        let connection = &self.connections[index];
        let waits = !connection.owed.is_empty() || self.outbound.has_frames();
        (waits && !connection.deaf && !connection.ended).then_some(index)
    }

    /// From the guest to the uplink.
    fn turn_inbound(&mut self) -> Result<(), RelayEnd> {
        if self.still {
            return Ok(());
        }
        while let Some(source) = self.sources.front() {
            let (id, left_bytes) = (source.id, source.left_bytes);
            let is_left_behind = self.sources.len() > 1 || self.current != Some(id);
            let Some(index) = self.index(id) else {
                self.sources.pop_front();
                continue;
            };
            let read = self.read(index, is_left_behind && left_bytes > 0);
            self.send_up(index)?;
            let connection = &self.connections[index];
            if !is_left_behind || connection.inbound.has_frames() {
                return Ok(());
            }
            let left_bytes = left_bytes.saturating_sub(read.unwrap_or(0));
            if connection.ended || read == Some(0) || left_bytes == 0 {
                self.sources.pop_front();
            } else if let Some(source) = self.sources.front_mut() {
                source.left_bytes = left_bytes;
            }
        }
        Ok(())
    }

    /// Reads from a connection, also unasked where `eager`. Gives the bytes that came, `None` where
    /// it was not tried.
    fn read(&mut self, index: usize, eager: bool) -> Option<usize> {
        let connection = &mut self.connections[index];
        let wanted = connection.socket.readable || eager;
        if connection.ended || !wanted || !connection.inbound.has_space() {
            return None;
        }
        let read = connection
            .socket
            .read_into(&mut connection.inbound, connection.stopped_after);
        if let Err(FrameTooLong { length_bytes }) = read {
            tracing::error!(
                "the VM's network is closed: its hypervisor sent a frame of {length_bytes} bytes"
            );
        }
        let count = read.ok().flatten();
        connection.ended = count.is_none();
        self.counters.frames_dropped += u64::from(connection.pass(count.unwrap_or(0)));
        self.counters.frames_dropped += connection.inbound.take_torn();
        count
    }

    /// Sends a connection's frames to the uplink, each as a message of its own: passt of before
    /// August 2024 loses its place where what it reads ends within the length of a frame, so the
    /// kernel shall not put two frames together and cut them elsewhere.
    fn send_up(&mut self, index: usize) -> Result<(), RelayEnd> {
        let Some(uplink) = &mut self.uplink else {
            return Ok(());
        };
        let inbound = &mut self.connections[index].inbound;
        while uplink.writable && inbound.has_frames() {
            if let Some(frame) = inbound.first_untouched()
                && !UPLINK_FRAME_BYTES.contains(&(frame.len() - LENGTH_BYTES))
            {
                let length = frame.len();
                inbound.given_on(length);
                self.counters.frames_dropped += 1;
                continue;
            }
            match send_batch(uplink, inbound) {
                Ok((frames, bytes)) => {
                    self.counters.frames_from_guest += frames;
                    self.counters.bytes_from_guest += bytes;
                }
                Err(Errno::AGAIN | Errno::INTR) => uplink.writable = false,
                Err(_) => return Err(RelayEnd::Uplink),
            }
        }
        Ok(())
    }

    /// Takes connections away of which nothing more comes.
    fn remove_ended(&mut self) {
        while let Some(index) = self.connections.iter().position(|connection| {
            let is_source = self.is_source(connection.id);
            connection.ended && !(is_source && connection.inbound.has_frames())
        }) {
            let connection = self.connections.remove(index);
            self.counters.frames_dropped += u64::from(connection.inbound.has_partial());
            self.sources.retain(|source| source.id != connection.id);
            if self.current == Some(connection.id) {
                self.current = None;
                self.outbound.take_back();
            }
        }
        // Before the first one it waits for that.
        if self.next_id > 0 && self.connections.is_empty() && !self.lingering {
            self.finish(RelayEnd::Hypervisor);
        }
    }

    fn has_work(&self) -> bool {
        let outbound =
            self.uplink.as_ref().is_some_and(|uplink| uplink.readable) && self.outbound.has_space();
        let inbound = self
            .source()
            .is_some_and(|from| from.socket.readable && from.inbound.has_space() && !from.ended);
        outbound
            || inbound
            || self
                .receiver()
                .is_some_and(|to| self.connections[to].socket.writable)
    }

    fn is_source(&self, id: ConnectionId) -> bool {
        self.sources.iter().any(|source| source.id == id)
    }

    /// The connection whose frames are next to go to the uplink.
    fn source(&self) -> Option<&Connection> {
        if self.still {
            return None;
        }
        let index = self.index(self.sources.front()?.id)?;
        Some(&self.connections[index])
    }

    /// What has to happen before there is work again. No descriptor is asked for what would not be
    /// used: its answer would come at once, and again and again.
    pub(super) fn interests(&self) -> Vec<Interest> {
        let mut interests = Vec::new();
        let mut add = |who, socket: &Socket, events: PollFlags| {
            let fd = Arc::clone(&socket.fd);
            interests.push(Interest { who, fd, events });
        };
        let source = self.source();
        if let Some(uplink) = &self.uplink {
            let mut events = PollFlags::empty();
            events.set(PollFlags::IN, self.outbound.has_space());
            events.set(
                PollFlags::OUT,
                !uplink.writable && source.is_some_and(|from| from.inbound.has_frames()),
            );
            if !events.is_empty() {
                add(Who::Uplink, uplink, events);
            }
        }
        let receiver = self.receiver().map(|index| self.connections[index].id);
        for connection in self.connections.iter().filter(|c| !c.ended) {
            let id = connection.id;
            let mut events = PollFlags::empty();
            events.set(PollFlags::OUT, receiver == Some(id));
            let is_source = source.is_some_and(|from| from.id == id);
            events.set(PollFlags::IN, is_source && connection.inbound.has_space());
            // The end of one that nothing is read from is told all the same.
            if !events.is_empty() || !self.is_source(id) {
                add(Who::Connection(id), &connection.socket, events);
            }
        }
        interests
    }

    /// Takes note of what happened to a descriptor.
    pub(super) fn happened(&mut self, who: Who, events: PollFlags) {
        let gone = events.intersects(PollFlags::HUP | PollFlags::ERR | PollFlags::NVAL);
        let (socket, ended) = match who {
            Who::Uplink => (self.uplink.as_mut(), None),
            Who::Connection(id) => {
                // As it is now, not as it was when the waiting began.
                let is_source = self.is_source(id);
                let Some(index) = self.index(id) else { return };
                let connection = &mut self.connections[index];
                let ended = (!is_source).then_some(&mut connection.ended);
                (Some(&mut connection.socket), ended)
            }
        };
        if let Some(socket) = socket {
            // Reading and writing tell what it is that is gone.
            socket.readable |= gone || events.intersects(PollFlags::IN);
            socket.writable |= gone || events.intersects(PollFlags::OUT);
        }
        if let Some(ended) = ended {
            *ended |= gone;
        }
    }

    /// Memory is held for frames that may not come for long.
    pub(super) fn can_release(&self) -> bool {
        self.outbound.is_allocated() || self.connections.iter().any(|c| c.inbound.is_allocated())
    }

    /// Gives memory back that holds no frames.
    pub(super) fn release(&mut self) {
        self.outbound.release();
        for connection in &mut self.connections {
            connection.inbound.release();
        }
    }
}

/// A descriptor and what is awaited of it.
pub(super) struct Interest {
    pub(super) who: Who,
    pub(super) fd: Arc<OwnedFd>,
    pub(super) events: PollFlags,
}

/// Whose descriptor it is.
#[derive(Debug, Clone, Copy)]
pub(super) enum Who {
    Uplink,
    Connection(ConnectionId),
}

/// Sends what waits, a frame a message. Gives how many frames are all gone by that, and bytes.
fn send_batch(uplink: &mut Socket, inbound: &mut FrameBuffer) -> Result<(u64, u64), Errno> {
    let mut slices = [IoSlice::new(&[]); BATCH_FRAMES];
    let mut count = 0;
    for (slice, frame) in slices.iter_mut().zip(inbound.pending_frames()) {
        let first = count == 0;
        if !first && !UPLINK_FRAME_BYTES.contains(&(frame.len() - LENGTH_BYTES)) {
            break;
        }
        *slice = IoSlice::new(frame);
        count += 1;
    }
    let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
    let mut controls: [SendAncillaryBuffer<'_, '_, '_>; BATCH_FRAMES] =
        std::array::from_fn(|_| SendAncillaryBuffer::default());
    let mut messages: Vec<MMsgHdr<'_>> = slices[..count]
        .iter()
        .zip(&mut controls)
        .map(|(slice, control)| MMsgHdr::new(std::slice::from_ref(slice), control))
        .collect();
    let wanted: usize = slices[..count].iter().map(|slice| slice.len()).sum();
    let sent = rustix::net::sendmmsg(&*uplink.fd, &mut messages, flags)?;
    let bytes: usize = messages[..sent].iter().map(MMsgHdr::bytes_sent).sum();
    uplink.writable = bytes == wanted;
    Ok((inbound.given_on(bytes), bytes as u64))
}
