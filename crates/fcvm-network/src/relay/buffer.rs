//! Frames in one direction: read in any pieces, given on from frame to frame. No I/O.
//!
//! A frame is four bytes of length, most significant first, and so many bytes of Ethernet frame: the
//! framing of QEMU's `-netdev stream` (net/stream.c there) and of passt.

use crate::checksum::is_intact;

/// Bytes of the length before each frame.
pub(crate) const LENGTH_BYTES: usize = 4;
/// The longest frame that is taken: QEMU's and passt's largest packet with room for headers.
pub(crate) const FRAME_BYTES_MAX: usize = 65_535 + 64;
/// Size of a buffer. What is left of it behind a piece that was given on is used again once it is a
/// quarter, which holds the cost of moving bytes to the front below that of reading them.
const CAPACITY: usize = 256 << 10;
const QUARTER: usize = CAPACITY / 4;

/// Where a frame's sender is, counted from its length.
const SENDER: std::ops::Range<usize> = LENGTH_BYTES + 6..LENGTH_BYTES + 12;

/// What no peer sends: its stream can not be followed any further.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct FrameTooLong {
    pub(crate) length_bytes: usize,
}

/// Invariant: `start + sent <= whole <= end <= bytes.len()`, and frames begin at `start` and end at
/// `whole`.
#[derive(Debug, Default)]
pub(crate) struct FrameBuffer {
    /// Empty, or [`CAPACITY`] long.
    bytes: Vec<u8>,
    /// The first frame that is not all gone.
    start: usize,
    /// Bytes of it, length included, that are.
    sent: usize,
    /// End of the last frame that is all here.
    whole: usize,
    /// End of what was read.
    end: usize,
    /// Whose the last frame was.
    sender: Option<[u8; 6]>,
    /// Where the next frame begins is not known.
    lost: bool,
    /// So many frames more are left out where they are not intact.
    suspects: usize,
    /// Frames that were left out so.
    torn: u64,
}

impl FrameBuffer {
    /// Something can be read into it.
    pub(crate) fn has_space(&self) -> bool {
        // A full buffer holds a whole frame: something is given on before the quarter is missed.
        self.end < CAPACITY || self.start >= QUARTER
    }

    /// Where to read to; empty where nothing can be.
    pub(crate) fn space(&mut self) -> &mut [u8] {
        if self.bytes.is_empty() {
            self.bytes = vec![0; CAPACITY];
        }
        if self.start == self.end {
            (self.start, self.whole, self.end) = (0, 0, 0);
        } else if CAPACITY - self.end < QUARTER && self.start >= QUARTER {
            self.bytes.copy_within(self.start..self.end, 0);
            self.whole -= self.start;
            self.end -= self.start;
            self.start = 0;
        }
        &mut self.bytes[self.end..]
    }

    /// So many bytes were read to [`space`](Self::space).
    pub(crate) fn filled(&mut self, count: usize) -> Result<(), FrameTooLong> {
        self.end += count;
        if self.lost && !self.find() {
            return Ok(());
        }
        while self.end - self.whole >= LENGTH_BYTES {
            let length_bytes = self.frame_bytes(self.whole);
            let is_suspect = self.suspects > 0 && self.sender.is_some();
            if length_bytes > FRAME_BYTES_MAX {
                if !is_suspect {
                    return Err(FrameTooLong { length_bytes });
                }
                self.suspects -= 1;
                if self.search() {
                    continue;
                }
                return Ok(());
            }
            let next = self.whole + LENGTH_BYTES + length_bytes;
            if self.end < next {
                break;
            }
            if is_suspect {
                // Also of one that is torn: a guest shall not have this done for ever.
                self.suspects -= 1;
                if !is_intact(&self.bytes[self.whole + LENGTH_BYTES..next]) {
                    self.torn += 1;
                    if self.search() {
                        continue;
                    }
                    return Ok(());
                }
            }
            if LENGTH_BYTES + length_bytes >= SENDER.end {
                self.sender = self.sender_at(self.whole);
            }
            self.whole += LENGTH_BYTES + length_bytes;
        }
        Ok(())
    }

    /// Leaves out a frame that is here in part. The rest of it may come, or what is left of another one: the next
    /// frame is the one that has the same sender. Says whether there was one.
    pub(crate) fn lose_partial(&mut self) -> bool {
        if self.end - self.whole >= SENDER.end {
            self.sender = self.sender_at(self.whole);
        }
        self.lost = self.has_partial() && self.sender.is_some();
        if self.lost {
            self.end = self.whole;
        }
        self.lost
    }

    /// Whether the next so many frames are looked at, and left out where they are not intact: two of them may have been
    /// put together.
    pub(crate) fn suspect(&mut self, count: usize) {
        self.suspects = count;
    }

    /// How many frames were left out since this was asked last.
    pub(crate) fn take_torn(&mut self) -> u64 {
        std::mem::take(&mut self.torn)
    }

    /// Finds the next frame after one that is none, which may have eaten it.
    fn search(&mut self) -> bool {
        self.bytes.copy_within(self.whole + 1..self.end, self.whole);
        self.end -= 1;
        self.find()
    }

    /// Finds the next frame in what was read, and leaves out what is before it.
    fn find(&mut self) -> bool {
        let read = &self.bytes[self.whole..self.end];
        let found = read.windows(SENDER.end).position(|window| {
            let length = u32::from_be_bytes([window[0], window[1], window[2], window[3]]) as usize;
            let is_length = (SENDER.end - LENGTH_BYTES..=FRAME_BYTES_MAX).contains(&length);
            is_length && self.sender.is_some_and(|sender| window[SENDER] == sender)
        });
        let before = found.unwrap_or(read.len().saturating_sub(SENDER.end - 1));
        let from = self.whole + before;
        self.bytes.copy_within(from..self.end, self.whole);
        self.end -= before;
        self.lost = found.is_none();
        !self.lost
    }

    fn sender_at(&self, offset: usize) -> Option<[u8; 6]> {
        self.bytes[offset..][SENDER].try_into().ok()
    }

    /// Whole frames wait, or the rest of one.
    pub(crate) fn has_frames(&self) -> bool {
        self.start < self.whole
    }

    /// The rest of the frame that was given on in part, and all whole ones after it.
    pub(crate) fn pending(&self) -> &[u8] {
        &self.bytes[self.start + self.sent..self.whole]
    }

    /// [`pending`](Self::pending), a slice for each frame.
    pub(crate) fn pending_frames(&self) -> impl Iterator<Item = &[u8]> {
        let (mut at, mut skipped) = (self.start, self.sent);
        std::iter::from_fn(move || {
            if at == self.whole {
                return None;
            }
            let next = at + LENGTH_BYTES + self.frame_bytes(at);
            let frame = &self.bytes[at + skipped..next];
            (at, skipped) = (next, 0);
            Some(frame)
        })
    }

    /// So many of the pending bytes were given on. Tells how many frames are all gone by that.
    pub(crate) fn given_on(&mut self, count: usize) -> u64 {
        self.sent += count;
        let mut frames = 0;
        while self.start < self.whole {
            let frame = LENGTH_BYTES + self.frame_bytes(self.start);
            if self.sent < frame {
                break;
            }
            self.sent -= frame;
            self.start += frame;
            frames += 1;
        }
        frames
    }

    /// The next pending frame as a whole, where nothing of it was given on yet.
    pub(crate) fn first_untouched(&self) -> Option<&[u8]> {
        if self.sent > 0 {
            return None;
        }
        self.pending_frames().next()
    }

    /// Takes back a frame that was given on in part: it is pending as a whole again. Gives the rest
    /// that its receiver still waits for.
    pub(crate) fn take_back(&mut self) -> Vec<u8> {
        if self.sent == 0 {
            return Vec::new();
        }
        let end = self.start + LENGTH_BYTES + self.frame_bytes(self.start);
        let rest = self.bytes[self.start + self.sent..end].to_vec();
        self.sent = 0;
        rest
    }

    /// Whole frames that wait.
    pub(crate) fn frame_count(&self) -> u64 {
        self.pending_frames().count() as u64
    }

    /// A frame is here in part.
    pub(crate) fn has_partial(&self) -> bool {
        self.whole < self.end
    }

    /// It takes memory.
    pub(crate) fn is_allocated(&self) -> bool {
        !self.bytes.is_empty()
    }

    /// Gives the memory of an empty buffer back.
    pub(crate) fn release(&mut self) {
        if self.start == self.end {
            self.bytes = Vec::new();
            (self.start, self.whole, self.end) = (0, 0, 0);
        }
    }

    /// Length, without its own four bytes, of the frame at `offset`.
    fn frame_bytes(&self, offset: usize) -> usize {
        let length = &self.bytes[offset..offset + LENGTH_BYTES];
        u32::from_be_bytes([length[0], length[1], length[2], length[3]]) as usize
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::checksum::udp_frame;

    /// What happens to a buffer. Sizes are cut to what is there.
    #[derive(Debug, Clone)]
    enum Step {
        Read(usize),
        GiveOn(usize),
        TakeBack,
        Release,
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            6 => prop_oneof![1..20_usize, 1..300_000_usize].prop_map(Step::Read),
            6 => prop_oneof![1..20_usize, 1..300_000_usize].prop_map(Step::GiveOn),
            1 => Just(Step::TakeBack),
            1 => Just(Step::Release),
        ]
    }

    fn length() -> impl Strategy<Value = usize> {
        prop_oneof![0..100_usize, 1000..1600_usize, Just(FRAME_BYTES_MAX)]
    }

    fn stream_of(lengths: &[usize]) -> Vec<u8> {
        let mut stream = Vec::new();
        for (index, &length) in lengths.iter().enumerate() {
            stream.extend((length as u32).to_be_bytes());
            stream.extend((0..length).map(|at| (at * 7 + index) as u8));
        }
        stream
    }

    proptest! {
        /// Bytes come out as they went in, in whatever pieces; what is taken back comes again from
        /// the beginning of its frame.
        #[test]
        fn model_of_bytes(lengths in prop::collection::vec(length(), 1..40),
                          steps in prop::collection::vec(step(), 1..200)) {
            let stream = stream_of(&lengths);
            let ends: Vec<usize> = lengths.iter().scan(0, |end, length| {
                *end += LENGTH_BYTES + length;
                Some(*end)
            }).collect();
            let (mut read, mut given_on, mut frames) = (0, 0, 0);
            let mut buffer = FrameBuffer::default();
            for step in steps {
                match step {
                    Step::Read(count) if buffer.has_space() => {
                        let space = buffer.space();
                        prop_assert!(!space.is_empty());
                        let count = count.min(space.len()).min(stream.len() - read);
                        space[..count].copy_from_slice(&stream[read..read + count]);
                        buffer.filled(count).unwrap();
                        read += count;
                    }
                    Step::Read(_) => prop_assert!(buffer.has_frames()),
                    Step::GiveOn(count) => {
                        let count = count.min(buffer.pending().len());
                        prop_assert_eq!(&buffer.pending()[..count], &stream[given_on..given_on + count]);
                        let together: Vec<u8> = buffer.pending_frames().flatten().copied().collect();
                        prop_assert_eq!(&together[..], buffer.pending());
                        frames += buffer.given_on(count);
                        given_on += count;
                        prop_assert_eq!(frames as usize, ends.iter().filter(|end| **end <= given_on).count());
                    }
                    Step::TakeBack => {
                        let begin = ends.iter().rev().find(|end| **end <= given_on).copied().unwrap_or(0);
                        let end = ends.iter().find(|end| **end > given_on).copied().unwrap_or(begin);
                        let rest = buffer.take_back();
                        let expected = if given_on > begin { &stream[given_on..end] } else { &[] };
                        prop_assert_eq!(&rest[..], expected);
                        given_on = begin;
                    }
                    Step::Release => buffer.release(),
                }
                let whole = ends.iter().rev().find(|end| **end <= read).copied().unwrap_or(0);
                prop_assert_eq!(buffer.pending(), &stream[given_on..whole]);
                prop_assert_eq!(buffer.has_partial(), whole < read);
            }
        }
    }

    /// What a QEMU sends that is stopped in the middle of the first frame and has room for the second at once.
    #[test]
    fn a_frame_that_ends_as_another_one_is_left_out_and_the_next_is_found() {
        let sender = [0x52, 0x54, 0, 0xfc, 0, 0x0f];
        let frame = |fill: u8, bytes: usize| {
            let frame = udp_frame(sender, &vec![fill; bytes]);
            [&(frame.len() as u32).to_be_bytes()[..], &frame].concat()
        };
        for (first, second) in [(1000, 1000), (1000, 5000), (5000, 1000), (60_000, 60_000)] {
            for cut in [60, 900] {
                let mut buffer = FrameBuffer::default();
                let mut give = |bytes: &[u8]| {
                    for piece in bytes.chunks(700) {
                        buffer.space()[..piece.len()].copy_from_slice(piece);
                        buffer.filled(piece.len()).unwrap();
                    }
                    let frames: Vec<u8> = buffer.pending().to_vec();
                    buffer.given_on(frames.len());
                    buffer.suspect(16);
                    frames
                };
                assert_eq!(give(&frame(1, 100)), frame(1, 100));
                let after = [frame(4, 300), frame(5, 300), frame(6, 6000)].concat();
                let sent = [&frame(2, first)[..cut], &frame(3, second)[cut..], &after].concat();
                assert_eq!(give(&sent), after, "{first} {second} {cut}");
                assert!(buffer.take_torn() > 0);
            }
        }
    }

    #[test]
    fn length_that_nobody_sends_is_refused_before_its_bytes_come() {
        for length in [FRAME_BYTES_MAX + 1, usize::MAX >> 32] {
            let mut buffer = FrameBuffer::default();
            buffer.space()[..4].copy_from_slice(&(length as u32).to_be_bytes());
            let refused = buffer.filled(4).unwrap_err();
            assert_eq!(refused.length_bytes, length);
        }
    }
}
