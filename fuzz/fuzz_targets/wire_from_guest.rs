//! The owner's side of the protocol: whatever bytes the guest writes into its port.

#![no_main]

use fcvm_wire::{Decoder, Frame, FrameKind, Hello, Opened, Outcome};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: &[u8]| {
    let Some((&fragment_bytes, bytes)) = input.split_first() else { return };
    let whole = decode(bytes, bytes.len().max(1));
    // Where the reads happen to end must not matter.
    assert_eq!(whole, decode(bytes, usize::from(fragment_bytes).max(1)));
    for frame in &whole {
        assert_encodes_to_itself(frame);
        read_message(frame);
    }
});

/// Every frame up to the first broken one.
fn decode(bytes: &[u8], fragment_bytes: usize) -> Vec<Frame> {
    let mut decoder = Decoder::from_guest();
    let mut frames = Vec::new();
    for fragment in bytes.chunks(fragment_bytes) {
        decoder.push(fragment);
        loop {
            match decoder.next_frame() {
                Ok(Some(frame)) => frames.push(frame),
                Ok(None) => break,
                Err(_) => return frames,
            }
        }
    }
    frames
}

fn assert_encodes_to_itself(frame: &Frame) {
    let mut bytes = Vec::new();
    frame.encode(&mut bytes);
    assert_eq!(decode(&bytes, bytes.len()), [frame.clone()]);
}

fn read_message(frame: &Frame) {
    match frame.kind {
        FrameKind::Hello => drop(frame.parse::<Hello>()),
        FrameKind::Opened => drop(frame.parse::<Opened>()),
        FrameKind::Closed => {
            if let Ok(outcome) = frame.parse::<Outcome>() {
                let again = Frame::message(FrameKind::Closed, frame.stream, &outcome);
                assert_eq!(again.parse::<Outcome>().as_ref(), Ok(&outcome));
            }
        }
        FrameKind::Credit => drop(frame.parse_credit()),
        _ => {}
    }
}
