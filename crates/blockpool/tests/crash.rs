//! After a crash at any point: what was flushed is there, nothing is lost, nothing is free and in use.

mod support;

use blockpool::CrashChoice;
use support::Numbers;
use support::machine::Machine;

fn machine(seed: u64, steps: usize) -> Machine {
    let mut numbers = Numbers(seed);
    let mut machine = Machine::new(12 << 20);
    for _ in 0..steps {
        machine.step(numbers.step());
    }
    machine.verify();
    machine
}

fn choice(numbers: &mut Numbers) -> CrashChoice {
    match numbers.below(8) {
        0..=2 => CrashChoice::Keep,
        3..=5 => CrashChoice::Lose,
        6 => CrashChoice::Tear(numbers.below(20) as usize),
        _ => CrashChoice::TearFront(numbers.below(20) as usize),
    }
}

#[test]
fn every_prefix_of_the_writes_is_a_whole_pool() {
    let machine = machine(1, 150);
    for events in 0..=machine.event_count() {
        machine.verify_crash(events, |_| CrashChoice::Keep);
        machine.verify_crash(events, |_| CrashChoice::Lose);
    }
}

#[test]
fn so_is_every_choice_of_what_was_not_flushed() {
    for seed in 2..8 {
        let machine = machine(seed, 120);
        let mut numbers = Numbers(seed);
        for _ in 0..60 {
            let events = numbers.below(machine.event_count() as u64 + 1) as usize;
            let mut choices = numbers.clone();
            let (disk, pool) = machine.verify_crash(events, |_| choice(&mut choices));
            numbers.next();
            if numbers.below(8) == 0 {
                // The pool that is left works, and survives the next crash.
                let mut next = Machine::from_disk(disk, pool);
                for _ in 0..20 {
                    next.step(numbers.step());
                }
                next.verify();
                let events = numbers.below(next.event_count() as u64 + 1) as usize;
                let mut choices = numbers.clone();
                next.verify_crash(events, |_| choice(&mut choices));
            }
        }
    }
}
