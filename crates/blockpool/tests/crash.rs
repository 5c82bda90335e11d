//! After a crash at any point: what was flushed is there, nothing is lost, nothing is free and in use.

mod support;

use blockpool::CrashChoice;
use proptest::prelude::*;
use support::Numbers;
use support::machine::{Machine, Step};
use support::rounds::{Tried, choice, round};

#[test]
fn every_prefix_of_the_writes_is_a_whole_pool() {
    let mut numbers = Numbers(1);
    let mut machine = Machine::new(12 << 20);
    for _ in 0..150 {
        machine.step(numbers.step());
    }
    for events in 0..=machine.event_count() {
        machine.verify_crash(events, |_| CrashChoice::Keep);
        machine.verify_crash(events, |_| CrashChoice::Lose);
    }
}

#[test]
fn random_rounds_of_steps_faults_and_crashes_pass() {
    let mut tried = Tried::default();
    for seed in 1..=60 {
        println!("seed {seed}");
        round(seed, &mut tried);
    }
    println!("{tried:?}");
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = any::<(u8, u32, u32, u32)>().prop_map(|(kind, a, b, c)| Step { kind, a, b, c });
    prop::collection::vec(step, 1..80)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_steps_leave_what_the_model_says(steps in steps(), crash in any::<u64>()) {
        let mut machine = Machine::new(6 << 20);
        for step in steps {
            machine.step(step);
        }
        machine.verify();
        let mut numbers = Numbers(crash);
        let events = numbers.below(machine.event_count() as u64 + 1) as usize;
        machine.verify_crash(events, |_| choice(&mut numbers));
    }
}
