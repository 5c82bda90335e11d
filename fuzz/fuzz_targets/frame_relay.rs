//! Frames from a hypervisor that is not to be trusted: what passt gets is exactly the whole frames
//! that it takes, up to the first length that nobody sends.

#![no_main]

use std::io::Read;
use std::os::unix::net::UnixStream;

use fcvm_network::FrameRelay;
use libfuzzer_sys::fuzz_target;
use rustix::net::SendFlags;

/// What passt shall get.
fn model(mut input: &[u8]) -> Vec<u8> {
    let mut expected = Vec::new();
    while let Some(length) = input.first_chunk::<4>() {
        let end = 4 + u32::from_be_bytes(*length) as usize;
        if end > 4 + 65_535 + 64 || end > input.len() {
            break;
        }
        if (4 + 14..=4 + 65_535).contains(&end) {
            expected.extend(&input[..end]);
        }
        input = &input[end..];
    }
    expected
}

fuzz_target!(|input: &[u8]| {
    let mut relay = FrameRelay::new().unwrap();
    let (mut passt, uplink) = UnixStream::pair().unwrap();
    relay.start(uplink.into()).unwrap();
    let (connection, hypervisor) = relay.connect().unwrap();
    assert!(relay.activate(connection));
    let mut received = Vec::new();
    std::thread::scope(|scope| {
        scope.spawn(move || {
            let mut left = input;
            // It may be refused on the way.
            while let Ok(count @ 1..) = rustix::net::send(&hypervisor, left, SendFlags::NOSIGNAL) {
                left = &left[count..];
            }
        });
        // The relay ends with its last hypervisor.
        passt.read_to_end(&mut received).unwrap();
    });
    assert_eq!(received, model(input));
});
