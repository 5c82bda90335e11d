//! Frames: their header, encoding and incremental decoding.

use serde::Serialize;
use serde::de::DeserializeOwned;

/// First four bytes of every frame.
pub const MAGIC: [u8; 4] = *b"FCW1";
/// Length of a frame's header in bytes.
pub const HEADER_BYTES: usize = 16;
/// Longest payload of a data frame, in bytes.
pub const MAX_DATA_BYTES: usize = 32 * 1024;
/// Longest payload of a message that the host sends: a plan with a large environment.
pub const MAX_HOST_MESSAGE_BYTES: usize = 1024 * 1024;
/// Longest payload of a message that the guest sends: a process listing.
pub const MAX_GUEST_MESSAGE_BYTES: usize = 256 * 1024;

/// Number of a stream. The host chooses it when it opens the stream; 0 is the connection itself.
pub type StreamId = u32;

/// What a frame carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum FrameKind {
    /// [`crate::Hello`], stream 0, first frame of each side.
    Hello = 1,
    /// [`crate::Request`]: the host opens a stream.
    Open = 2,
    /// [`crate::Opened`]: the process of the stream has started.
    Opened = 3,
    /// Bytes of one channel of the stream.
    Data = 4,
    /// No more bytes follow on that channel.
    Eof = 5,
    /// Four bytes: so many more bytes of data may be sent on that channel.
    Credit = 6,
    /// [`crate::Control`]: a signal or a new terminal size.
    Control = 7,
    /// [`crate::Outcome`]: how the stream ended; its last frame, from the side that served it.
    Closed = 8,
    /// The side that opened the stream has lost interest; the other ends what runs in it and
    /// answers with `Closed`.
    Reset = 9,
    /// Stream 0. The host's last frame before the guest is saved: the guest stops what the container does,
    /// says the same as its own last frame, and connects anew when the connection has ended.
    Park = 10,
}

impl FrameKind {
    fn from_byte(byte: u8) -> Option<Self> {
        Some(match byte {
            1 => Self::Hello,
            2 => Self::Open,
            3 => Self::Opened,
            4 => Self::Data,
            5 => Self::Eof,
            6 => Self::Credit,
            7 => Self::Control,
            8 => Self::Closed,
            9 => Self::Reset,
            10 => Self::Park,
            _ => return None,
        })
    }
}

/// A channel of a stream: the file descriptor it stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(u8)]
pub enum Channel {
    /// Standard input, or the archive sent to the guest. Host to guest.
    Stdin = 0,
    /// Standard output, the terminal's output, or the archive read from the guest. Guest to host.
    Stdout = 1,
    /// Standard error. Guest to host.
    Stderr = 2,
}

impl Channel {
    fn from_byte(byte: u8) -> Option<Self> {
        Some(match byte {
            0 => Self::Stdin,
            1 => Self::Stdout,
            2 => Self::Stderr,
            _ => return None,
        })
    }
}

/// One frame.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Frame {
    /// What it carries.
    pub kind: FrameKind,
    /// Which channel; [`Channel::Stdin`] where the kind has none.
    pub channel: Channel,
    /// Which stream.
    pub stream: StreamId,
    /// Its payload.
    pub payload: Vec<u8>,
}

/// Bytes that are no frame of this protocol. After one the connection cannot go on.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// The first four bytes are wrong.
    #[error("bytes that are no frame were received (magic {0:02x?})")]
    Magic([u8; 4]),
    /// A kind this version does not know.
    #[error("a frame of unknown kind {0} was received")]
    Kind(u8),
    /// A channel that does not exist.
    #[error("a frame for unknown channel {0} was received")]
    Channel(u8),
    /// Reserved bytes are not zero.
    #[error("a frame with reserved bits set was received")]
    Reserved,
    /// The payload is longer than its kind allows.
    #[error("a frame of {length} bytes was announced, and {limit} is the limit of its kind")]
    TooLong {
        /// Announced length.
        length: usize,
        /// Limit of the kind.
        limit: usize,
    },
    /// The payload is not the message its kind says.
    #[error("a {kind:?} frame does not hold its message: {reason}")]
    Message {
        /// Kind of the frame.
        kind: FrameKind,
        /// What the decoder says.
        reason: String,
    },
}

impl Frame {
    /// A frame with bytes as payload.
    pub fn new(kind: FrameKind, stream: StreamId, payload: Vec<u8>) -> Self {
        Self {
            kind,
            channel: Channel::Stdin,
            stream,
            payload,
        }
    }

    /// A frame that carries a message.
    pub fn message<M: Serialize>(kind: FrameKind, stream: StreamId, message: &M) -> Self {
        // The message types hold strings, numbers and lists only: serialising them cannot fail.
        Self::new(
            kind,
            stream,
            serde_json::to_vec(message).unwrap_or_default(),
        )
    }

    /// A frame of data. The payload is at most [`MAX_DATA_BYTES`] long.
    pub fn data(stream: StreamId, channel: Channel, payload: Vec<u8>) -> Self {
        debug_assert!(payload.len() <= MAX_DATA_BYTES);
        Self {
            kind: FrameKind::Data,
            channel,
            stream,
            payload,
        }
    }

    /// The end of a channel.
    pub fn eof(stream: StreamId, channel: Channel) -> Self {
        Self {
            kind: FrameKind::Eof,
            channel,
            stream,
            payload: Vec::new(),
        }
    }

    /// Credit for so many more bytes on a channel.
    pub fn credit(stream: StreamId, channel: Channel, bytes: u32) -> Self {
        Self {
            kind: FrameKind::Credit,
            channel,
            stream,
            payload: bytes.to_le_bytes().to_vec(),
        }
    }

    /// Reads the payload as a message.
    pub fn parse<M: DeserializeOwned>(&self) -> Result<M, FrameError> {
        serde_json::from_slice(&self.payload).map_err(|error| FrameError::Message {
            kind: self.kind,
            reason: error.to_string(),
        })
    }

    /// Reads the payload of a credit frame, in bytes.
    pub fn parse_credit(&self) -> Result<u32, FrameError> {
        let bytes =
            <[u8; 4]>::try_from(self.payload.as_slice()).map_err(|_| FrameError::Message {
                kind: self.kind,
                reason: format!("{} bytes in place of 4", self.payload.len()),
            })?;
        Ok(u32::from_le_bytes(bytes))
    }

    /// Appends the frame's bytes to a buffer.
    pub fn encode(&self, out: &mut Vec<u8>) {
        encode_header(
            out,
            self.kind,
            self.channel,
            self.stream,
            self.payload.len(),
        );
        out.extend_from_slice(&self.payload);
    }
}

/// Appends the header of a data frame whose payload of `length` bytes the caller appends itself.
pub fn encode_header(
    out: &mut Vec<u8>,
    kind: FrameKind,
    channel: Channel,
    stream: StreamId,
    length: usize,
) {
    out.extend_from_slice(&MAGIC);
    out.extend_from_slice(&[kind as u8, channel as u8, 0, 0]);
    out.extend_from_slice(&stream.to_le_bytes());
    out.extend_from_slice(&u32::try_from(length).unwrap_or(u32::MAX).to_le_bytes());
}

/// Takes received bytes and gives frames; holds at most one incomplete frame and one read.
#[derive(Debug)]
pub struct Decoder {
    buffer: Vec<u8>,
    consumed: usize,
    max_message_bytes: usize,
}

impl Decoder {
    /// Decodes what the guest sends.
    pub fn from_guest() -> Self {
        Self::with_limit(MAX_GUEST_MESSAGE_BYTES)
    }

    /// Decodes what the host sends.
    pub fn from_host() -> Self {
        Self::with_limit(MAX_HOST_MESSAGE_BYTES)
    }

    fn with_limit(max_message_bytes: usize) -> Self {
        Self {
            buffer: Vec::new(),
            consumed: 0,
            max_message_bytes,
        }
    }

    /// Adds received bytes.
    pub fn push(&mut self, bytes: &[u8]) {
        if self.consumed > 0 {
            self.buffer.drain(..self.consumed);
            self.consumed = 0;
        }
        self.buffer.extend_from_slice(bytes);
    }

    /// Bytes received that are not part of a frame given out yet.
    pub fn pending_bytes(&self) -> usize {
        self.buffer.len() - self.consumed
    }

    /// The next whole frame; `None` until more bytes are pushed.
    pub fn next_frame(&mut self) -> Result<Option<Frame>, FrameError> {
        let bytes = &self.buffer[self.consumed..];
        let Some((header, rest)) = bytes.split_first_chunk::<HEADER_BYTES>() else {
            return Ok(None);
        };
        let (kind, channel, stream, length) = self.decode_header(header)?;
        let Some(payload) = rest.get(..length) else {
            return Ok(None);
        };
        let frame = Frame {
            kind,
            channel,
            stream,
            payload: payload.to_vec(),
        };
        self.consumed += HEADER_BYTES + length;
        Ok(Some(frame))
    }

    fn decode_header(
        &self,
        header: &[u8; HEADER_BYTES],
    ) -> Result<(FrameKind, Channel, StreamId, usize), FrameError> {
        let [
            m0,
            m1,
            m2,
            m3,
            kind,
            channel,
            r0,
            r1,
            s0,
            s1,
            s2,
            s3,
            l0,
            l1,
            l2,
            l3,
        ] = *header;
        if [m0, m1, m2, m3] != MAGIC {
            return Err(FrameError::Magic([m0, m1, m2, m3]));
        }
        let kind = FrameKind::from_byte(kind).ok_or(FrameError::Kind(kind))?;
        let channel = Channel::from_byte(channel).ok_or(FrameError::Channel(channel))?;
        if [r0, r1] != [0, 0] {
            return Err(FrameError::Reserved);
        }
        let length = u32::from_le_bytes([l0, l1, l2, l3]) as usize;
        let limit = match kind {
            FrameKind::Data => MAX_DATA_BYTES,
            FrameKind::Eof | FrameKind::Reset | FrameKind::Park => 0,
            FrameKind::Credit => 4,
            FrameKind::Hello | FrameKind::Opened | FrameKind::Control => 4096,
            FrameKind::Open | FrameKind::Closed => self.max_message_bytes,
        };
        if length > limit {
            return Err(FrameError::TooLong { length, limit });
        }
        Ok((kind, channel, u32::from_le_bytes([s0, s1, s2, s3]), length))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn header_bytes_are_as_documented() {
        let mut bytes = Vec::new();
        Frame::data(0x0102_0304, Channel::Stderr, b"hi".to_vec()).encode(&mut bytes);
        assert_eq!(
            bytes,
            b"FCW1\x04\x02\x00\x00\x04\x03\x02\x01\x02\x00\x00\x00hi"
        );
    }

    #[test]
    fn lengths_beyond_the_limit_are_refused_before_the_payload_arrives() {
        for (kind, length) in [
            (4_u8, MAX_DATA_BYTES + 1),
            (5, 1),
            (10, 1),
            (6, 5),
            (1, 4097),
            (8, MAX_GUEST_MESSAGE_BYTES + 1),
        ] {
            let mut decoder = Decoder::from_guest();
            let mut bytes = b"FCW1".to_vec();
            bytes.extend_from_slice(&[kind, 0, 0, 0, 1, 0, 0, 0]);
            bytes.extend_from_slice(&(length as u32).to_le_bytes());
            decoder.push(&bytes);
            assert!(
                matches!(decoder.next_frame(), Err(FrameError::TooLong { .. })),
                "kind {kind}"
            );
        }
    }

    #[test]
    fn foreign_bytes_are_refused() {
        let mut decoder = Decoder::from_guest();
        decoder.push(b"Kernel panic - not syncing");
        assert_eq!(decoder.next_frame(), Err(FrameError::Magic(*b"Kern")));
    }

    proptest! {
        #[test]
        fn frames_survive_any_fragmentation(
            frames in prop::collection::vec((0_u8..3, any::<u32>(), prop::collection::vec(any::<u8>(), 0..300)), 1..20),
            piece in 1_usize..64,
        ) {
            let frames: Vec<Frame> = frames.into_iter().map(|(channel, stream, payload)| {
                Frame::data(stream, Channel::from_byte(channel).unwrap(), payload)
            }).collect();
            let mut bytes = Vec::new();
            frames.iter().for_each(|frame| frame.encode(&mut bytes));
            let mut decoder = Decoder::from_guest();
            let mut received = Vec::new();
            for piece in bytes.chunks(piece) {
                decoder.push(piece);
                while let Some(frame) = decoder.next_frame().unwrap() {
                    received.push(frame);
                }
            }
            prop_assert_eq!(received, frames);
            prop_assert_eq!(decoder.pending_bytes(), 0);
        }

        #[test]
        fn any_bytes_decode_without_panic(bytes in prop::collection::vec(any::<u8>(), 0..2000)) {
            let mut decoder = Decoder::from_guest();
            decoder.push(&bytes);
            while let Ok(Some(_)) = decoder.next_frame() {}
        }
    }
}
