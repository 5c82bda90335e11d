//! A pool that somebody made on purpose: every checksum is right, values are not. It is refused or used, never followed into a panic.

mod support;

use support::Numbers;
use support::hostile::{patch, targets, use_pool};
use support::machine::Machine;

#[test]
fn wrong_values_under_right_checksums_make_no_panic() {
    let mut numbers = Numbers(3);
    let mut machine = Machine::new(6 << 20);
    for _ in 0..120 {
        machine.step(numbers.step());
    }
    machine.pool().flush().unwrap();
    let disk = machine.disk.copy();
    let targets = targets(&disk);
    assert!(targets.len() > 10);
    let mut opened = 0;
    for _ in 0..600 {
        let damaged = disk.copy();
        for _ in 0..1 + numbers.below(3) {
            let target = targets[numbers.below(targets.len() as u64) as usize];
            // Numbers lie at multiples of their size; most bytes of a page are zeros behind its first part.
            let end = if numbers.below(2) == 0 { 120 } else { 4000 };
            let at = 8 + numbers.below(end) as usize;
            let value = match numbers.below(4) {
                0 => vec![0xff; 8],
                1 => vec![numbers.next() as u8],
                2 => numbers.below(3000).to_le_bytes().to_vec(),
                _ => numbers.next().to_le_bytes()[..5].to_vec(),
            };
            patch(&damaged, target, at, &value);
        }
        opened += u32::from(use_pool(&damaged));
    }
    assert!(opened > 50, "{opened}");
}
