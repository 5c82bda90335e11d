//! One round of the proof: steps from a seed, perhaps a disk that fails, then crashes, then going on.

use std::sync::atomic::Ordering;

use blockpool::{CrashChoice, Fault};

use super::Numbers;
use super::machine::{Machine, Step, TRANSFERS};

/// What was tried.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Tried {
    pub(crate) rounds: u64,
    pub(crate) steps: u64,
    pub(crate) crashes: u64,
    pub(crate) faults: u64,
    pub(crate) transfers: u64,
}

pub(crate) fn choice(numbers: &mut Numbers) -> CrashChoice {
    match numbers.below(8) {
        0..=2 => CrashChoice::Keep,
        3..=5 => CrashChoice::Lose,
        6 => CrashChoice::Tear(numbers.below(20) as usize),
        _ => CrashChoice::TearFront(numbers.below(20) as usize),
    }
}

fn fault(numbers: &mut Numbers) -> Fault {
    let after = numbers.below(40) as usize;
    match numbers.below(5) {
        0 => Fault::Read(after),
        1 => Fault::Write(after),
        2 => Fault::ShortWrite(after),
        3 => Fault::Full(after),
        _ => Fault::Flush(after % 8),
    }
}

fn run(machine: &mut Machine, numbers: &mut Numbers, steps: u64, tried: &mut Tried) {
    for _ in 0..steps {
        machine.step(numbers.step());
    }
    tried.steps += steps;
}

/// Does one round; panics where the pool is wrong.
pub(crate) fn round(seed: u64, tried: &mut Tried) {
    let mut numbers = Numbers(seed);
    let size_bytes = (4 + numbers.below(20)) << 20;
    let mut machine = Machine::new(size_bytes);
    // A half of the rounds begin with options.
    let options = numbers.step();
    if numbers.below(2) == 0 {
        machine.step(Step {
            kind: 29,
            ..options
        });
    }
    let steps = 20 + numbers.below(300);
    run(&mut machine, &mut numbers, steps, tried);
    machine.verify();
    for _ in 0..2 {
        if numbers.below(2) == 0 {
            tried.faults += 1;
            machine.set_fault(Some(fault(&mut numbers)));
            run(&mut machine, &mut numbers, 30, tried);
            machine.set_fault(None);
            if machine.is_stopped() {
                // All that is left is what a crash leaves.
                let all = machine.event_count();
                tried.crashes += 1;
                let (disk, pool) = machine.verify_crash(all, |_| choice(&mut numbers));
                machine = Machine::from_disk(disk, pool);
            } else {
                machine.verify();
            }
        }
        for _ in 0..numbers.below(12) {
            let events = numbers.below(machine.event_count() as u64 + 1) as usize;
            tried.crashes += 1;
            machine.verify_crash(events, |_| choice(&mut numbers));
        }
        let events = numbers.below(machine.event_count() as u64 + 1) as usize;
        tried.crashes += 1;
        let (disk, pool) = machine.verify_crash(events, |_| choice(&mut numbers));
        machine = Machine::from_disk(disk, pool);
        let steps = numbers.below(60);
        run(&mut machine, &mut numbers, steps, tried);
        machine.verify();
    }
    tried.transfers = TRANSFERS.load(Ordering::SeqCst);
    tried.rounds += 1;
}
