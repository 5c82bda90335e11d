//! Frames between the owner's tap device and a stream socket: the hypervisor's end of a
//! [`FrameRelay`](crate::FrameRelay).
//!
//! A tap device gives and takes one frame with each call, behind a header that says what is left to do
//! for it: the sum of a packet, and cutting it to size. Sums are completed here. Nothing is cut: what is
//! behind the relay takes packets as large as a frame can be. Frames of the bridge's own are left out. A network may lose frames, so what a
//! device does not take is dropped; what the relay does not take waits in the device, up to the length
//! of its queue.

use std::io::{IoSlice, Write};
use std::net::Shutdown;
use std::ops::Range;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::thread::JoinHandle;

use rustix::event::{PollFd, PollFlags};
use rustix::io::Errno;

use super::BRIDGE_MAC;
use crate::checksum::checksum;
use crate::relay::{FRAME_BYTES_MAX, FrameBuffer, LENGTH_BYTES};

/// `struct virtio_net_hdr`: flags, kind and size of segments, `csum_start` at 6 and `csum_offset` at 8.
const HEADER_BYTES: usize = 10;
/// In `flags`: the sum is that of the addresses alone.
const NEEDS_CSUM: u8 = 1;
/// Where a frame says whom it is from.
const SENDER: Range<usize> = 6..12;
/// What is gathered before it is sent.
const BATCH_BYTES: usize = 128 << 10;
const STACK_BYTES: usize = 256 << 10;

/// A thread that moves frames until it is dropped or the socket's other end is closed.
#[derive(Debug)]
pub(crate) struct TapPump {
    socket: UnixStream,
    thread: Option<JoinHandle<()>>,
}

impl TapPump {
    /// Starts it. Both descriptors must not block.
    pub(crate) fn start(tap: OwnedFd, socket: OwnedFd) -> std::io::Result<Self> {
        let socket = UnixStream::from(socket);
        socket.set_nonblocking(true)?;
        let mut work = Work {
            tap,
            socket: socket.try_clone()?,
            packet: Vec::new(),
            up: Vec::new(),
            sent: 0,
            down: FrameBuffer::default(),
        };
        let thread = std::thread::Builder::new()
            .name("tap-pump".to_owned())
            .stack_size(STACK_BYTES)
            .spawn(move || work.run())?;
        Ok(Self {
            socket,
            thread: Some(thread),
        })
    }
}

impl Drop for TapPump {
    fn drop(&mut self) {
        // It wakes the thread, which waits for nothing else than its two descriptors.
        let _ = self.socket.shutdown(Shutdown::Both);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

struct Work {
    tap: OwnedFd,
    socket: UnixStream,
    /// What the device gave last.
    packet: Vec<u8>,
    /// From the guest: whole frames, each behind its length.
    up: Vec<u8>,
    /// Bytes of `up` that are gone.
    sent: usize,
    /// To the guest.
    down: FrameBuffer,
}

/// The socket's other end is closed, or a descriptor fails.
struct End;

impl Work {
    fn run(&mut self) {
        while let Ok((tap, socket)) = self.wait() {
            if self.step(tap, socket).is_err() {
                break;
            }
        }
    }

    /// Waits until something can be done: what the tap device and the socket are ready for.
    fn wait(&mut self) -> Result<(PollFlags, PollFlags), End> {
        let pending = self.sent < self.up.len();
        let mut tap = PollFlags::empty();
        tap.set(PollFlags::IN, !pending);
        let mut socket = PollFlags::IN;
        socket.set(PollFlags::OUT, pending);
        let mut fds = [
            PollFd::new(&self.tap, tap),
            PollFd::new(&self.socket, socket),
        ];
        match rustix::event::poll(&mut fds, None) {
            Ok(_) => Ok((fds[0].revents(), fds[1].revents())),
            Err(Errno::INTR) => Ok((PollFlags::empty(), PollFlags::empty())),
            Err(_) => Err(End),
        }
    }

    fn step(&mut self, tap: PollFlags, socket: PollFlags) -> Result<(), End> {
        if tap.intersects(PollFlags::NVAL | PollFlags::ERR | PollFlags::HUP) {
            return Err(End);
        }
        if tap.contains(PollFlags::IN) {
            self.gather();
        }
        self.send()?;
        if socket.intersects(PollFlags::IN | PollFlags::HUP | PollFlags::ERR) {
            self.deliver()?;
        }
        Ok(())
    }

    /// Takes what the guest has sent.
    fn gather(&mut self) {
        self.packet.resize(HEADER_BYTES + FRAME_BYTES_MAX, 0);
        while self.up.len() < BATCH_BYTES {
            // At an error nothing more waits, or the device is down, which poll(2) tells.
            let count = rustix::io::read(&self.tap, &mut self.packet[..]).unwrap_or(0);
            if count == 0 {
                return;
            }
            let Some(frame) = complete(&mut self.packet[..count]) else {
                continue;
            };
            if frame.get(SENDER) == Some(&BRIDGE_MAC) {
                continue;
            }
            let length = u32::try_from(frame.len()).unwrap_or(u32::MAX);
            self.up.extend(length.to_be_bytes());
            self.up.extend_from_slice(frame);
        }
    }

    /// Sends it on, as far as the socket takes it.
    fn send(&mut self) -> Result<(), End> {
        while self.sent < self.up.len() {
            match (&self.socket).write(&self.up[self.sent..]) {
                Ok(0) => return Err(End),
                Ok(count) => self.sent += count,
                Err(error) => match error.kind() {
                    std::io::ErrorKind::WouldBlock => return Ok(()),
                    std::io::ErrorKind::Interrupted => {}
                    _ => return Err(End),
                },
            }
        }
        // The memory goes back: most VMs are silent most of the time.
        self.up = Vec::new();
        self.sent = 0;
        Ok(())
    }

    /// Gives the guest what has come for it.
    fn deliver(&mut self) -> Result<(), End> {
        loop {
            let space = self.down.space();
            match rustix::io::read(&self.socket, space) {
                Ok(0) => return Err(End),
                Ok(count) => self.down.filled(count).map_err(|_| End)?,
                Err(Errno::AGAIN) => {
                    self.down.release();
                    return Ok(());
                }
                Err(Errno::INTR) => continue,
                Err(_) => return Err(End),
            }
            while let Some(frame) = self.down.first_untouched() {
                let header = [0; HEADER_BYTES];
                let parts = [IoSlice::new(&header), IoSlice::new(&frame[LENGTH_BYTES..])];
                let length = frame.len();
                // One that the device does not take is lost, as on any wire.
                let _ = rustix::io::writev(self.tap.as_fd(), &parts);
                self.down.given_on(length);
            }
        }
    }
}

/// Completes the sum of a packet where that is left to do; gives its frame. Nothing where it is none.
fn complete(packet: &mut [u8]) -> Option<&[u8]> {
    let (header, frame) = packet.split_at_mut_checked(HEADER_BYTES)?;
    if header[0] & NEEDS_CSUM != 0 {
        let field = |at: usize| usize::from(u16::from_ne_bytes([header[at], header[at + 1]]));
        let (start, offset) = (field(6), field(8));
        let covered = frame.get_mut(start..)?;
        // Over the packet, the sum of the addresses in its own field.
        let sum = checksum(&[covered]);
        covered
            .get_mut(offset..offset + 2)?
            .copy_from_slice(&sum.to_be_bytes());
    }
    Some(frame)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An IPv4 UDP packet in a frame, with the sum of its addresses alone, as a guest leaves it.
    fn packet(payload: &[u8]) -> Vec<u8> {
        let udp_bytes = (8 + payload.len()) as u16;
        let mut addresses = vec![10, 0, 2, 15, 192, 0, 2, 1];
        let pseudo = [&addresses[..], &[0, 17], &udp_bytes.to_be_bytes()].concat();
        let mut packet = vec![NEEDS_CSUM, 0, 0, 0, 0, 0];
        packet.extend(34_u16.to_ne_bytes());
        packet.extend(6_u16.to_ne_bytes());
        packet.extend([0; 14]);
        packet.extend([0x45, 0, 0, 0, 0, 0, 0, 0, 64, 17, 0, 0]);
        packet.append(&mut addresses);
        packet.extend([0x1e, 0x61, 0x30, 0x39]);
        packet.extend(udp_bytes.to_be_bytes());
        packet.extend((!checksum(&[&pseudo])).to_be_bytes());
        packet.extend(payload);
        packet
    }

    #[test]
    fn sums_are_completed() {
        for payload in [&b""[..], b"odd", b"even", &[0xff; 3000]] {
            let mut packet = packet(payload);
            let frame = complete(&mut packet).unwrap();
            let udp = &frame[34..];
            let addresses = &frame[26..34];
            let length = (udp.len() as u16).to_be_bytes();
            // A receiver sums everything up, the sum included, and finds all ones.
            let all = [addresses, &[0, 17], &length, udp].concat();
            assert_eq!(checksum(&[&all]), 0xffff);
            assert_ne!(udp[6..8], [0, 0]);
        }
    }

    #[test]
    fn packets_that_are_none_are_dropped() {
        assert_eq!(complete(&mut [0; HEADER_BYTES - 1]), None);
        assert_eq!(complete(&mut [0; HEADER_BYTES]), Some(&[][..]));
        for (start, offset) in [(200_u16, 6_u16), (34, 200), (u16::MAX, u16::MAX)] {
            let mut packet = packet(b"payload");
            packet[6..8].copy_from_slice(&start.to_ne_bytes());
            packet[8..10].copy_from_slice(&offset.to_ne_bytes());
            assert_eq!(complete(&mut packet), None);
        }
    }

    #[test]
    fn a_whole_frame_without_a_sum_to_complete_stays_as_it_is() {
        let mut packet = packet(b"payload");
        packet[0] = 0;
        let before = packet[HEADER_BYTES..].to_vec();
        assert_eq!(complete(&mut packet), Some(&before[..]));
    }
}
