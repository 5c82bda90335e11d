//! The shortest way in which each wrong scheme fails, and that the right ones do not.

use proptest::prelude::*;
use reference_schemes::Scheme;
use reference_schemes::brt::Brt;
use reference_schemes::checker::{CounterExample, Limits, Problem, World, search};
use reference_schemes::dedup::Dedup;
use reference_schemes::in_pointer::{InPointer, Told};
use reference_schemes::store::{InPlace, Step};

const SMALL: Limits = Limits {
    file_count: 3,
    block_count: 1,
    value_count: 2,
    step_count: 6,
};

fn world<S: Scheme>(scheme: S, in_place: InPlace, is_exact: bool) -> World<S> {
    World::new(scheme, in_place, SMALL, is_exact)
}

fn failure<S: Scheme>(world: World<S>) -> CounterExample {
    let found = search(&world).expect_err("this scheme is wrong");
    println!("{}\n", found.explain(world));
    found
}

fn in_pointer(told: Told) -> CounterExample {
    failure(world(InPointer { told }, InPlace::SinceClone, false))
}

const WRITE: Step = Step::Write {
    file: 0,
    block: 0,
    value: 1,
};
const CLONE: Step = Step::Clone {
    source: 0,
    target: 1,
};

#[test]
fn a_count_in_the_new_pointer_alone_frees_what_the_other_has() {
    let found = in_pointer(Told::Copy);
    assert_eq!(found.steps, [WRITE, CLONE, Step::Free { file: 0 }]);
    let (file, address) = (1, 0);
    assert_eq!(found.problem, Problem::FreedInUse { file, address });
}

#[test]
fn a_count_in_both_pointers_frees_nothing() {
    let found = in_pointer(Told::Both);
    let steps = [WRITE, CLONE, Step::Free { file: 0 }, Step::Free { file: 1 }];
    assert_eq!(found.steps, steps);
    assert_eq!(found.problem, Problem::Leaked { address: 0 });
}

#[test]
fn telling_relatives_does_not_reach_the_third_copy() {
    let found = in_pointer(Told::Relatives);
    assert_eq!(found.steps[..2], [WRITE, CLONE]);
    assert_eq!(found.steps.len(), 5, "{found:?}");
}

#[test]
fn writing_in_place_by_the_count_changes_what_a_crash_brings_back() {
    let found = failure(world(Brt::default(), InPlace::ByCount, false));
    assert_eq!(found.steps.last(), Some(&Step::Crash));
    assert!(
        matches!(found.problem, Problem::Changed { .. }),
        "{found:?}"
    );
}

#[test]
fn tables_are_right_whatever_is_done() {
    let in_place = InPlace::SinceClone;
    for tried in [
        search(&world(Brt::default(), in_place, true)),
        search(&world(Dedup::default(), in_place, true)),
    ] {
        let tried = tried.unwrap();
        println!("{tried:?}");
        // A search that ends early would prove nothing.
        assert!(tried.state_count > 10_000, "{tried:?}");
    }
}

/// Many steps, chosen among those that can be done.
fn long_way<S: Scheme>(scheme: S, choices: &[usize]) -> Result<(), TestCaseError> {
    let limits = Limits {
        file_count: 5,
        block_count: 3,
        value_count: 3,
        step_count: 0,
    };
    let mut world = World::new(scheme, InPlace::SinceClone, limits, true);
    let mut done = Vec::new();
    for choice in choices {
        let steps = world.steps();
        let step = steps[choice % steps.len()];
        done.push(step.to_string());
        if let Err(problem) = world.step(step) {
            return Err(TestCaseError::fail(format!(
                "{}: {problem}",
                done.join(", ")
            )));
        }
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn tables_are_right_for_long(choices in proptest::collection::vec(any::<usize>(), 0..120)) {
        long_way(Brt::default(), &choices)?;
        long_way(Dedup::default(), &choices)?;
    }
}
