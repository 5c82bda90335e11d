//! The agent's side of the protocol, and the owner's side towards other commands: requests and
//! what is sent on an open stream.

#![no_main]

use fcvm_wire::{Control, Decoder, Frame, FrameKind, Hello, Request};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: &[u8]| {
    let mut decoder = Decoder::from_host();
    decoder.push(input);
    while let Ok(Some(frame)) = decoder.next_frame() {
        match frame.kind {
            FrameKind::Hello => drop(frame.parse::<Hello>()),
            FrameKind::Open => {
                if let Ok(request) = frame.parse::<Request>() {
                    let again = Frame::message(FrameKind::Open, frame.stream, &request);
                    assert_eq!(again.parse::<Request>().as_ref(), Ok(&request));
                }
            }
            FrameKind::Control => drop(frame.parse::<Control>()),
            FrameKind::Credit => drop(frame.parse_credit()),
            _ => {}
        }
    }
});
