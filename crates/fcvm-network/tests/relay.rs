//! The relay between passt and hypervisors, over real sockets that the tests hold the ends of.

use std::io::{ErrorKind, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::mpsc;
use std::time::Duration;

use fcvm_network::{ConnectionId, FrameRelay, RelayEnd};
use proptest::prelude::*;
use rustix::event::{PollFd, PollFlags, Timespec};

/// After so long a wait a test fails rather than hangs.
const PATIENCE: Duration = Duration::from_secs(60);
/// An Ethernet header and a number, the least that a test frame holds.
const FRAME_BYTES_MIN: usize = 18;
/// Whose test frames are.
const SENDER: [u8; 6] = [0x52, 0x54, 0, 0xfc, 0, 0x0f];

/// A relay and passt's side of it.
fn relay() -> (FrameRelay, UnixStream) {
    let mut relay = FrameRelay::new().unwrap();
    let (own, passt) = UnixStream::pair().unwrap();
    relay.start(own.into()).unwrap();
    (relay, patient(passt.into()))
}

/// A hypervisor's side.
fn connect(relay: &FrameRelay) -> (ConnectionId, UnixStream) {
    let (id, socket) = relay.connect().unwrap();
    (id, patient(socket))
}

fn connect_current(relay: &FrameRelay) -> (ConnectionId, UnixStream) {
    let (id, socket) = connect(relay);
    assert!(relay.activate(id));
    (id, socket)
}

fn patient(socket: OwnedFd) -> UnixStream {
    let socket = UnixStream::from(socket);
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    socket.set_write_timeout(Some(PATIENCE)).unwrap();
    socket
}

/// A frame that tells its number and is otherwise made of it, behind its length.
fn frame(number: u32, length: usize) -> Vec<u8> {
    let length = length.max(FRAME_BYTES_MIN);
    let mut frame = (length as u32).to_be_bytes().to_vec();
    frame.extend([0; 6]);
    frame.extend(SENDER);
    // ARP: a frame without a checksum.
    frame.extend([8, 6]);
    frame.extend(number.to_be_bytes());
    frame.resize(4 + length, number as u8);
    frame
}

/// The number of a frame, which must be whole and as it was made.
fn number(bytes: &[u8]) -> u32 {
    let number = u32::from_be_bytes(bytes[18..22].try_into().unwrap());
    assert!(bytes == frame(number, bytes.len() - 4), "a torn frame");
    number
}

/// Frames as they come, behind whatever was read of the stream before.
struct Frames {
    socket: UnixStream,
    bytes: Vec<u8>,
}

impl Frames {
    fn new(socket: UnixStream) -> Self {
        let bytes = Vec::new();
        Self { socket, bytes }
    }

    /// Reads at most `count` bytes more; false at the end of the stream and where none are there.
    fn read(&mut self, count: usize) -> bool {
        let mut piece = vec![0; count];
        match self.socket.read(&mut piece) {
            Ok(0) => false,
            Ok(count) => {
                self.bytes.extend(&piece[..count]);
                true
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => false,
            Err(error) => panic!("{error}"),
        }
    }

    /// Numbers of the whole frames read so far; a frame read in part stays.
    fn take(&mut self) -> Vec<u32> {
        let mut numbers = Vec::new();
        while let Some(length) = self.bytes.first_chunk() {
            let end = 4 + u32::from_be_bytes(*length) as usize;
            if self.bytes.len() < end {
                break;
            }
            numbers.push(number(&self.bytes[..end]));
            self.bytes.drain(..end);
        }
        numbers
    }

    /// Reads up to the frame `last`.
    fn until(&mut self, last: u32) -> Vec<u32> {
        let mut numbers = self.take();
        while numbers.last() != Some(&last) {
            assert!(
                self.read(100_000),
                "frame {last} does not come: {numbers:?}"
            );
            numbers.extend(self.take());
        }
        numbers
    }
}

fn assert_ended(mut socket: &UnixStream) {
    // Closed with something unread it is reset.
    if let Err(error) = socket.read_to_end(&mut Vec::new()) {
        assert_eq!(error.kind(), ErrorKind::ConnectionReset);
    }
}

fn is_empty(socket: &UnixStream) -> bool {
    let now = Timespec::default();
    let mut fds = [PollFd::new(socket, PollFlags::IN)];
    rustix::event::poll(&mut fds, Some(&now)).unwrap() == 0
}

#[derive(Debug, Clone)]
struct Stage {
    /// Frames of each side while this hypervisor is the current one: their lengths.
    to_guest: Vec<usize>,
    from_guest: Vec<usize>,
    /// Bytes of the stream to the guest that it reads before the next one takes over.
    read_bytes: usize,
    /// The relay holds, and the hypervisor reads what it has, before the next one takes over.
    orderly: bool,
    /// It is gone before the next one takes over.
    dies: bool,
    /// Bytes of a last frame that it does not finish.
    unfinished_bytes: usize,
}

fn lengths() -> impl Strategy<Value = Vec<usize>> {
    let length = prop_oneof![4 => 18..100_usize, 4 => 1500..1515_usize, 1 => 60_000..65_536_usize];
    prop::collection::vec(length, 0..60)
}

prop_compose! {
    fn stage()(to_guest in lengths(), from_guest in lengths(),
               read_bytes in prop_oneof![0..300_usize, 0..500_000_usize],
               orderly in any::<bool>(), dies in any::<bool>(),
               unfinished_bytes in prop_oneof![Just(0), 1..5_usize, 5..5000_usize]) -> Stage {
        Stage { to_guest, from_guest, read_bytes, orderly, dies, unfinished_bytes }
    }
}

/// Numbers and bytes of all stages' frames, in order.
fn numbered(stages: &[Stage], lengths: impl Fn(&Stage) -> &[usize]) -> Vec<Vec<(u32, Vec<u8>)>> {
    let mut next = 0;
    let mut of_stage = |stage| {
        let frames = lengths(stage).iter().map(|&length| {
            next += 1;
            (next - 1, frame(next - 1, length))
        });
        frames.collect()
    };
    stages.iter().map(&mut of_stage).collect()
}

/// Plays the stages with one hypervisor after the other; the last one is patient.
fn play(stages: &[Stage]) {
    let (relay, passt) = relay();
    relay.set_lingering(true);
    let down = numbered(stages, |stage| &stage.to_guest);
    let up = numbered(stages, |stage| &stage.from_guest);
    let last_down = down.iter().flatten().count() as u32;
    let last_up = up.iter().flatten().count() as u32;
    let stream: Vec<u8> = down
        .into_iter()
        .flatten()
        .flat_map(|(_, bytes)| bytes)
        .collect();
    let (mut sender, mut receiver) = (
        passt.try_clone().unwrap(),
        Frames::new(passt.try_clone().unwrap()),
    );
    let (tell_last, last_is_there) = mpsc::channel();
    let (mut received, mut kept) = (Vec::new(), Vec::new());
    let all_up = std::thread::scope(|scope| {
        // Frames for the guest come while nobody is ready for them, and while hypervisors change.
        scope.spawn(move || {
            sender.write_all(&stream).unwrap();
            last_is_there.recv().unwrap();
            sender.write_all(&frame(last_down, 18)).unwrap();
        });
        let reader = scope.spawn(move || receiver.until(last_up));
        for (stage, frames) in stages.iter().zip(up) {
            let (_, mut socket) = connect_current(&relay);
            for (_, bytes) in frames {
                socket.write_all(&bytes).unwrap();
            }
            socket
                .write_all(&frame(0, 5000)[..stage.unfinished_bytes])
                .unwrap();
            socket.set_nonblocking(true).unwrap();
            let mut hypervisor = Frames::new(socket);
            hypervisor.read(stage.read_bytes + 1);
            if stage.orderly {
                relay.hold();
                while hypervisor.read(100_000) {}
            }
            received.push((stage.orderly, hypervisor.take()));
            if !stage.dies {
                kept.push(hypervisor);
            }
        }
        let (_, mut socket) = connect_current(&relay);
        socket.write_all(&frame(last_up, 18)).unwrap();
        tell_last.send(()).unwrap();
        received.push((true, Frames::new(socket).until(last_down)));
        reader.join().unwrap()
    });
    // No frame of the guest is lost, torn or out of order.
    assert_eq!(all_up, (0..=last_up).collect::<Vec<_>>());
    // To the guest, frames are missing only where a hypervisor did not read all that it had.
    let mut next = 0;
    let mut complete = true;
    for (orderly, numbers) in received {
        for number in numbers {
            assert!(
                number == next || (number > next && !complete),
                "{number}, not {next}"
            );
            complete = true;
            next = number + 1;
        }
        complete &= orderly;
    }
    let counters = relay.counters();
    assert_eq!(counters.frames_from_guest, u64::from(last_up) + 1);
    assert!(
        counters.frames_to_guest >= u64::from(next) / 2,
        "{counters:?}"
    );
    drop(relay);
    for hypervisor in kept {
        hypervisor.socket.set_nonblocking(false).unwrap();
        assert_ended(&hypervisor.socket);
    }
}

proptest! {
    #![proptest_config(ProptestConfig {
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    #[test]
    fn hypervisors_one_after_the_other(stages in prop::collection::vec(stage(), 0..6)) {
        play(&stages);
    }
}

#[test]
fn successor_gets_nothing_before_its_time_and_then_all() {
    let (relay, mut passt) = relay();
    let (old, old_socket) = connect_current(&relay);
    let (new, new_socket) = connect(&relay);
    let (mut old_frames, mut new_frames) = (Frames::new(old_socket), Frames::new(new_socket));
    passt.write_all(&frame(1, 100)).unwrap();
    assert_eq!(old_frames.until(1), [1]);
    assert!(is_empty(&new_frames.socket));
    relay.hold();
    passt.write_all(&frame(2, 100)).unwrap();
    assert!(is_empty(&old_frames.socket));
    assert!(relay.activate(new));
    assert_eq!(new_frames.until(2), [2]);
    assert!(is_empty(&old_frames.socket));
    assert!(relay.activate(old));
    passt.write_all(&frame(3, 100)).unwrap();
    assert_eq!(old_frames.until(3), [3]);
    assert!(is_empty(&new_frames.socket));
    drop(new_frames);
    relay.disconnect(new);
    assert!(!relay.activate(new));
    passt.write_all(&frame(4, 100)).unwrap();
    assert_eq!(old_frames.until(4), [4]);
}

#[test]
fn nothing_is_taken_from_a_guest_that_stands_still() {
    let (relay, mut passt) = relay();
    let (own, socket) = connect_current(&relay);
    let mut frames = Frames::new(socket);
    relay.stand_still();
    // More than the relay's own buffer: it would make room for it.
    let sent: Vec<u8> = (0..400).flat_map(|number| frame(number, 3001)).collect();
    frames.socket.set_nonblocking(true).unwrap();
    let mut taken = 0;
    while let Ok(count) = frames.socket.write(&sent[taken..]) {
        taken += count;
    }
    passt.write_all(&frame(1, 100)).unwrap();
    assert!(is_empty(&frames.socket) && is_empty(&passt));
    assert!(
        matches!(frames.socket.write(&sent[taken..]), Err(error) if error.kind() == std::io::ErrorKind::WouldBlock)
    );
    frames.socket.set_nonblocking(false).unwrap();
    assert!(relay.activate(own));
    assert_eq!(frames.until(1), [1]);
    let mut passt_frames = Frames::new(passt);
    std::thread::scope(|scope| {
        scope.spawn(|| (&frames.socket).write_all(&sent[taken..]).unwrap());
        assert_eq!(passt_frames.until(399).len(), 400);
    });
}

/// A QEMU that was stopped while it sent a frame leaves out as much of the next one.
#[test]
fn a_frame_that_was_on_its_way_when_its_sender_was_stopped_is_put_together_with_no_other() {
    let lengths = [60, 1514, 40_000];
    let cuts = [1, 4, 17, 900, 30_000];
    for (length, next, cut) in lengths
        .iter()
        .flat_map(|length| lengths.iter().map(move |next| (*length, *next)))
        .flat_map(|(length, next)| cuts.iter().map(move |cut| (length, next, *cut)))
        .filter(|(length, next, cut)| *cut < 4 + (*length).min(*next))
    {
        let (relay, passt) = relay();
        let (own, mut socket) = connect_current(&relay);
        let mut passt = Frames::new(passt);
        socket.write_all(&frame(0, 100)).unwrap();
        assert_eq!(passt.until(0), [0]);
        let stopped = frame(1, length);
        // Some of it the relay has read already, and some it finds when the sender is to go on.
        socket.write_all(&stopped[..cut / 2]).unwrap();
        relay.stand_still();
        socket.write_all(&stopped[cut / 2..cut]).unwrap();
        assert!(relay.go_on(own));
        socket.write_all(&frame(2, next)[cut..]).unwrap();
        let rest: Vec<u8> = [(1, length), (3, 60), (4, 1514)]
            .iter()
            .flat_map(|(number, length)| frame(*number, *length))
            .collect();
        socket.write_all(&rest).unwrap();
        assert_eq!(passt.until(4), [1, 3, 4], "{length} {next} {cut}");
        assert_eq!(relay.counters().frames_dropped, 1);
    }
    // What was sent as a whole is not left out.
    let (relay, passt) = relay();
    let (own, mut socket) = connect_current(&relay);
    let mut passt = Frames::new(passt);
    relay.stand_still();
    for number in 0..20 {
        socket.write_all(&frame(number, 3001)).unwrap();
    }
    assert!(relay.go_on(own));
    socket.write_all(&frame(20, 3001)).unwrap();
    assert_eq!(passt.until(20).len(), 21);
}

#[test]
fn one_that_comes_back_gets_the_rest_of_its_frame() {
    let (relay, passt) = relay();
    let (old, old_socket) = connect_current(&relay);
    let count = 400;
    let stream: Vec<u8> = (0..=count).flat_map(|number| frame(number, 3001)).collect();
    std::thread::scope(|scope| {
        // More than fits anywhere on the way while nobody reads.
        scope.spawn(|| (&passt).write_all(&stream).unwrap());
        let mut old_frames = Frames::new(old_socket);
        assert!(old_frames.read(100));
        // The kernel took what it could, most likely with a frame cut.
        let (new, new_socket) = connect_current(&relay);
        let mut new_frames = Frames::new(new_socket);
        assert!(new_frames.read(100_000));
        assert!(relay.activate(old));
        // Torn frames would be noticed.
        let old_numbers = old_frames.until(count);
        assert!(old_numbers.is_sorted() && old_numbers[0] == 0);
        assert!(relay.activate(new));
        (&passt).write_all(&frame(count + 1, 18)).unwrap();
        let new_numbers = new_frames.until(count + 1);
        assert!(new_numbers.is_sorted());
        let mut all = [old_numbers, new_numbers].concat();
        all.sort_unstable();
        all.dedup();
        assert_eq!(all, (0..=count + 1).collect::<Vec<_>>());
    });
}

/// Writes a frame again and again until nothing is taken for a while; gives the bytes that were.
fn fill(mut socket: &UnixStream, frame: &[u8]) -> usize {
    let a_while = Timespec {
        tv_sec: 0,
        tv_nsec: 300_000_000,
    };
    socket.set_nonblocking(true).unwrap();
    let mut bytes = 0;
    loop {
        let mut fds = [PollFd::new(socket, PollFlags::OUT)];
        if rustix::event::poll(&mut fds, Some(&a_while)).unwrap() == 0 {
            break;
        }
        match socket.write(&frame[bytes % frame.len()..]) {
            Ok(count) => bytes += count,
            Err(error) => assert_eq!(error.kind(), ErrorKind::WouldBlock),
        }
    }
    socket.set_nonblocking(false).unwrap();
    bytes
}

#[test]
fn one_who_does_not_read_makes_the_other_wait_and_loses_nothing() {
    let (relay, passt) = relay();
    let (_, hypervisor) = connect_current(&relay);
    let piece = frame(7, 1514);
    for (mut from, to) in [(&passt, &hypervisor), (&hypervisor, &passt)] {
        let bytes = fill(from, &piece);
        // One buffer of 256 KiB, and what the kernel holds in two sockets.
        assert!(bytes < 2 << 20, "{bytes} bytes are waiting");
        let count = bytes.div_ceil(piece.len());
        let rest = &piece[bytes - (count - 1) * piece.len()..];
        let mut frames = Frames::new(to.try_clone().unwrap());
        let received = std::thread::scope(|scope| {
            scope.spawn(move || {
                from.write_all(rest).unwrap();
                from.write_all(&frame(8, 18)).unwrap();
            });
            frames.until(8)
        });
        assert_eq!(received.len(), count + 1);
    }
    assert_eq!(relay.counters().frames_dropped, 0);
}

#[tokio::test]
async fn length_that_nobody_sends_ends_the_connection_that_it_came_on() {
    let (relay, mut passt) = relay();
    let (_, mut hostile) = connect_current(&relay);
    let (next, next_socket) = connect(&relay);
    hostile.write_all(&frame(1, 100)).unwrap();
    hostile.write_all(&u32::MAX.to_be_bytes()).unwrap();
    assert_ended(&hostile);
    assert!(relay.activate(next));
    (&next_socket).write_all(&frame(2, 65_535)).unwrap();
    assert_eq!(Frames::new(passt.try_clone().unwrap()).until(2), [1, 2]);
    passt.write_all(&65_600_u32.to_be_bytes()).unwrap();
    assert_eq!(relay.ended().await, RelayEnd::Malformed);
    assert_ended(&next_socket);
    assert_ended(&passt);
}

#[test]
fn frames_that_passt_does_not_take_are_left_out() {
    let (relay, passt) = relay();
    let (_, mut hypervisor) = connect_current(&relay);
    for length in [0, 1, 13, 65_536, 65_599] {
        let mut odd = (length as u32).to_be_bytes().to_vec();
        odd.resize(4 + length, 0);
        hypervisor.write_all(&odd).unwrap();
        hypervisor.write_all(&frame(length as u32, 60)).unwrap();
    }
    let received = Frames::new(passt).until(65_599);
    assert_eq!(received, [0, 1, 13, 65_536, 65_599]);
    assert_eq!(relay.counters().frames_dropped, 5);
}

#[tokio::test]
async fn end_of_each_side_is_seen_by_the_others() {
    let (relay_of_one, passt) = relay();
    let (_, current) = connect_current(&relay_of_one);
    let (_, waiting) = connect(&relay_of_one);
    drop(passt);
    assert_eq!(relay_of_one.ended().await, RelayEnd::Uplink);
    assert_ended(&current);
    assert_ended(&waiting);
    let (id, late) = connect(&relay_of_one);
    assert!(!relay_of_one.activate(id));
    assert_ended(&late);

    let (relay_of_two, passt) = relay();
    let (_, first) = connect_current(&relay_of_two);
    let (second, second_socket) = connect(&relay_of_two);
    (&first).write_all(&frame(1, 100)).unwrap();
    drop(first);
    // The successor keeps it alive, and what was sent last arrives.
    assert!(relay_of_two.activate(second));
    (&second_socket).write_all(&frame(2, 100)).unwrap();
    assert_eq!(Frames::new(passt.try_clone().unwrap()).until(2), [1, 2]);
    drop(second_socket);
    assert_eq!(relay_of_two.ended().await, RelayEnd::Hypervisor);
    assert_ended(&passt);

    let (relay_of_three, passt) = relay();
    relay_of_three.set_lingering(true);
    drop(connect_current(&relay_of_three));
    let (_, successor) = connect_current(&relay_of_three);
    (&successor).write_all(&frame(1, 100)).unwrap();
    assert_eq!(Frames::new(passt.try_clone().unwrap()).until(1), [1]);
    drop(successor);
    relay_of_three.set_lingering(false);
    assert_eq!(relay_of_three.ended().await, RelayEnd::Hypervisor);

    let (relay_of_four, passt) = relay();
    let (_, hypervisor) = connect_current(&relay_of_four);
    drop(relay_of_four);
    assert_ended(&passt);
    assert_ended(&hypervisor);
}
