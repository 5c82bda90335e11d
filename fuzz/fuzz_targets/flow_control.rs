//! Credit: a sender that keeps to its window is never refused by the receiver, no peer can raise a
//! window, and a receiver never takes more than it gave credit for.

#![no_main]

use fcvm_wire::{INITIAL_WINDOW_BYTES, ReceiveWindow, SendWindow};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: &[u8]| {
    let mut sender = SendWindow::default();
    let mut receiver = ReceiveWindow::default();
    // Bytes received and not taken out by the reader yet.
    let mut buffered = 0_usize;
    // Credit under way to the sender.
    let mut credit = 0_u32;
    let mut steps = input.chunks_exact(5);
    for step in &mut steps {
        let [action, amount @ ..] = step else { unreachable!() };
        let amount = u32::from_le_bytes(amount.try_into().unwrap());
        match action % 4 {
            0 => {
                let bytes = (amount as usize).min(sender.available());
                sender.sent(bytes);
                receiver.received(bytes).expect("the sender kept to its window");
                buffered += bytes;
                assert!(buffered <= INITIAL_WINDOW_BYTES as usize);
            }
            1 => {
                let bytes = (amount as usize).min(buffered);
                buffered -= bytes;
                credit += receiver.taken(bytes).unwrap_or(0);
            }
            2 => {
                sender.credited(credit);
                credit = 0;
            }
            // A hostile peer, against windows of its own.
            _ => {
                let mut window = SendWindow::default();
                window.credited(amount);
                assert!(window.available() <= INITIAL_WINDOW_BYTES as usize);
                let taken = ReceiveWindow::default().received(amount as usize);
                assert_eq!(taken.is_ok(), amount <= INITIAL_WINDOW_BYTES);
            }
        }
        assert!(sender.available() <= INITIAL_WINDOW_BYTES as usize);
    }
});
