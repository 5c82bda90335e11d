//! The byte stream to the host: frames in, frames out, neither of them ever waited for.
//!
//! A virtio-serial port or a vsock connection: whatever carries the protocol need only be a descriptor
//! that can be read, written and polled.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use fcvm_wire::frame::encode_header;
use fcvm_wire::{
    Channel, Decoder, Frame, FrameError, FrameKind, HEADER_BYTES, Mark, MarkScanner, StreamId,
};
use rustix::io::Errno;

/// Most bytes of one write: the virtio-serial driver takes no more into one buffer.
const WRITE_BYTES: usize = 32 * 1024;
/// Payload of a data frame that fills one such buffer together with its header.
pub(crate) const DATA_BYTES: usize = WRITE_BYTES - HEADER_BYTES;
/// With so many bytes waiting for the host, output of processes is left in their pipes.
const CONGESTED_BYTES: usize = 4 * WRITE_BYTES;
/// With so many bytes waiting for the host, requests are left in the port.
const STALLED_BYTES: usize = 1024 * 1024;

/// The connection cannot go on.
#[derive(Debug)]
pub(crate) enum LinkError {
    /// The host closed it.
    Closed,
    /// Reading or writing failed.
    Io(Errno),
    /// The host sent what is no frame.
    Frame(FrameError),
}

impl std::fmt::Display for LinkError {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Closed => write!(formatter, "the host closed the channel"),
            Self::Io(errno) => {
                write!(
                    formatter,
                    "the channel failed: {}",
                    crate::failure::reason(*errno)
                )
            }
            Self::Frame(error) => write!(formatter, "{error}"),
        }
    }
}

/// What came from the host.
pub(crate) enum Received {
    /// A frame.
    Frame(Frame),
    /// The mark: this guest is a clone, and what follows is a new connection.
    Renewed,
    /// Nothing more for now.
    Nothing,
}

/// The connection to the host.
pub(crate) struct Link {
    port: OwnedFd,
    decoder: Decoder,
    /// Looks for the mark that the owner of a clone sends.
    mark: Option<(Mark, MarkScanner)>,
    out: Vec<u8>,
    sent: usize,
    readable: bool,
    writable: bool,
}

impl Link {
    /// Takes over a non-blocking descriptor.
    pub(crate) fn new(port: OwnedFd) -> Self {
        Self {
            port,
            decoder: Decoder::from_host(),
            mark: None,
            out: Vec::new(),
            sent: 0,
            readable: true,
            writable: true,
        }
    }

    /// For registration with epoll, edge-triggered.
    pub(crate) fn as_fd(&self) -> BorrowedFd<'_> {
        self.port.as_fd()
    }

    /// The descriptor may have become readable or writable.
    pub(crate) fn woken(&mut self) {
        self.readable = true;
        self.writable = true;
    }

    fn waiting_bytes(&self) -> usize {
        self.out.len() - self.sent
    }

    /// Something is queued that the host has not taken.
    pub(crate) fn is_waiting(&self) -> bool {
        self.waiting_bytes() > 0
    }

    /// No more output of processes is to be queued.
    pub(crate) fn is_congested(&self) -> bool {
        self.waiting_bytes() >= CONGESTED_BYTES
    }

    /// Reading or writing can make progress without a new event.
    pub(crate) fn has_work(&self) -> bool {
        (self.readable && self.waiting_bytes() < STALLED_BYTES)
            || (self.writable && self.waiting_bytes() > 0)
    }

    /// Something that waits can be written without a new event.
    pub(crate) fn can_write(&self) -> bool {
        self.writable && self.is_waiting()
    }

    /// Queues a frame.
    pub(crate) fn send(&mut self, frame: &Frame) {
        frame.encode(&mut self.out);
    }

    /// Queues a data frame whose payload of at most `limit` bytes `read` puts in place; nothing
    /// where it gives none. The result is that of `read`.
    pub(crate) fn send_data(
        &mut self,
        stream: StreamId,
        channel: Channel,
        limit: usize,
        read: impl FnOnce(&mut [u8]) -> Result<usize, Errno>,
    ) -> Result<usize, Errno> {
        self.compact();
        let start = self.out.len();
        let payload = start + HEADER_BYTES;
        self.out.resize(payload + limit.min(DATA_BYTES), 0);
        let result = read(&mut self.out[payload..]);
        let length = result.unwrap_or(0);
        if length == 0 {
            self.out.truncate(start);
            return result;
        }
        self.out.truncate(payload + length);
        let mut header = Vec::with_capacity(HEADER_BYTES);
        encode_header(&mut header, FrameKind::Data, channel, stream, length);
        self.out[start..payload].copy_from_slice(&header);
        result
    }

    /// Moves what still waits to the buffer's start, once that costs little.
    fn compact(&mut self) {
        if self.sent == self.out.len() {
            self.out.clear();
            self.sent = 0;
        } else if self.sent >= CONGESTED_BYTES {
            self.out.drain(..self.sent);
            self.sent = 0;
        }
    }

    /// Writes what the host takes now.
    pub(crate) fn flush(&mut self) -> Result<(), LinkError> {
        while self.writable && self.sent < self.out.len() {
            let end = self.out.len().min(self.sent + WRITE_BYTES);
            match rustix::io::write(&self.port, &self.out[self.sent..end]) {
                Ok(written) => self.sent += written,
                Err(Errno::AGAIN) => self.writable = false,
                Err(Errno::INTR) => {}
                Err(errno) => return Err(LinkError::Io(errno)),
            }
        }
        self.compact();
        Ok(())
    }

    /// The first bytes of a connection that the agent has made: nothing that was under way is left.
    pub(crate) fn begin_with(&mut self, mark: Mark) {
        self.mark = None;
        self.decoder = Decoder::from_host();
        self.out.clear();
        self.sent = 0;
        self.out.extend_from_slice(mark.as_bytes());
        self.woken();
    }

    /// From now on this mark begins a new connection.
    pub(crate) fn expect_mark(&mut self, mark: Mark) {
        self.mark = Some((mark, MarkScanner::new(mark)));
    }

    /// Begins anew: nothing of what was under way belongs to this guest. `rest` came after the mark.
    fn renew(&mut self, mark: Mark, rest: &[u8]) {
        self.mark = None;
        self.decoder = Decoder::from_host();
        self.decoder.push(rest);
        self.out.clear();
        self.sent = 0;
        self.out.extend_from_slice(mark.answer().as_bytes());
    }

    /// What the host sent next, if there is something now.
    pub(crate) fn receive(&mut self) -> Result<Received, LinkError> {
        loop {
            if let Some(frame) = self.decoder.next_frame().map_err(LinkError::Frame)? {
                return Ok(Received::Frame(frame));
            }
            if !self.readable || self.waiting_bytes() >= STALLED_BYTES {
                return Ok(Received::Nothing);
            }
            let mut buffer = [0_u8; 4096];
            match rustix::io::read(&self.port, &mut buffer) {
                Ok(0) => {
                    // A port whose other side is not connected reads as ended.
                    self.readable = false;
                    return Err(LinkError::Closed);
                }
                Ok(length) => {
                    let bytes = &buffer[..length];
                    if let Some((mark, scanner)) = &mut self.mark
                        && let Some(end) = scanner.scan(bytes)
                    {
                        let mark = *mark;
                        self.renew(mark, &bytes[end..]);
                        return Ok(Received::Renewed);
                    }
                    self.decoder.push(bytes);
                }
                Err(Errno::AGAIN) => self.readable = false,
                Err(Errno::INTR) => {}
                Err(errno) => return Err(LinkError::Io(errno)),
            }
        }
    }
}
