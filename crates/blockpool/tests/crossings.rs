//! What clones of others went wrong with, each with each: what is cloned, what happens to one of the two afterwards, how many checkpoints
//! lie between, and a crash at any event from the clone on.

mod support;

use blockpool::CrashChoice;
use support::machine::{Machine, Step};

const RECORD: u32 = 65_536;
/// Three records and a tail that is no whole block.
const SIZE: u32 = 3 * RECORD + 5000;
/// Objects as steps number them: by name, snapshots behind them.
const SOURCE: u32 = 0;
const TARGET: u32 = 1;
const SNAPSHOT: u32 = 2;

/// What is cloned.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Source {
    /// A record that nobody wrote.
    Hole,
    /// All up to an end within a block.
    PartialTail,
    /// What was not flushed.
    Dirty,
    /// Another place of the same object.
    Itself,
    /// A snapshot, whose object was written since.
    Snapshot,
}

/// What is done to one of the two then.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Action {
    Truncate,
    Punch,
    Remove,
    Write,
    CloneAgain,
}

/// What lies between.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Between {
    Nothing,
    Flush,
    Checkpoint,
    Checkpoints,
}

fn step(kind: u8, a: u32, b: u32, c: u32) -> Step {
    Step { kind, a, b, c }
}

fn create(number: u32) -> Step {
    step(0, number, (SIZE << 8) | 3, 0)
}

fn write(object: u32, offset: u32, length: u32) -> Step {
    step(2, object, offset, (length << 8) | 1)
}

fn punch(object: u32, offset: u32, length: u32) -> Step {
    step(14, object, offset, (length << 8) | 1)
}

fn clone_range(from: u32, to: u32, records: (u32, u32), count: u32) -> Step {
    // Both numbers of records are what is left of parts of this one when they are divided by the 3 records that there are.
    let numbers = (0..1 << 16).map(|low| low | (count - 1) << 16);
    let number = numbers
        .into_iter()
        .find(|c| (c % 3, (c >> 8) % 3) == records);
    step(19, from, to, number.expect("each pair is there"))
}

fn copy_whole(from: u32, to: u32) -> Step {
    step(31, from, to, 1)
}

const SNAP: Step = Step {
    kind: 22,
    a: SOURCE,
    b: 0,
    c: 1,
};
const CHECKPOINT: Step = Step {
    kind: 27,
    a: 0,
    b: 0,
    c: 0,
};
const FLUSH: Step = Step {
    kind: 36,
    a: 0,
    b: 0,
    c: 0,
};

fn clone_of(source: Source) -> Step {
    match source {
        Source::Hole => clone_range(SOURCE, TARGET, (1, 0), 2),
        Source::PartialTail => copy_whole(SOURCE, TARGET),
        Source::Dirty => clone_range(SOURCE, TARGET, (0, 0), 3),
        Source::Itself => clone_range(SOURCE, SOURCE, (0, 2), 1),
        Source::Snapshot => copy_whole(SNAPSHOT, TARGET),
    }
}

fn actions(source: Source, action: Action, object: u32) -> Vec<Step> {
    match action {
        Action::Truncate => vec![step(16, object, (70_000 << 8) | 3, 0)],
        Action::Punch => vec![punch(object, 3000, 2 * RECORD)],
        Action::Remove => vec![step(24, object, 1, 0)],
        // Over the border of two records, and once more in the same place.
        Action::Write => vec![write(object, RECORD - 2500, 5000), step(11, 0, 0, 0)],
        Action::CloneAgain => vec![clone_of(source), clone_range(TARGET, SOURCE, (0, 1), 1)],
    }
}

fn prepare(machine: &mut Machine, source: Source) {
    for number in [SOURCE, TARGET] {
        machine.step(create(number));
        machine.step(write(number, 0, SIZE));
    }
    match source {
        Source::Hole => machine.step(punch(SOURCE, RECORD, RECORD)),
        Source::Snapshot => machine.step(SNAP),
        _ => {}
    }
    if source != Source::Dirty {
        machine.step(CHECKPOINT);
    }
    machine.step(write(SOURCE, 10_000, 20_000));
    machine.step(write(SOURCE, 2 * RECORD, RECORD / 2));
}

fn cross(source: Source, action: Action, object: u32, between: Between) {
    let mut machine = Machine::new(4 << 20);
    prepare(&mut machine, source);
    let first = machine.event_count();
    machine.step(clone_of(source));
    let steps: &[Step] = match between {
        Between::Nothing => &[],
        Between::Flush => &[FLUSH],
        Between::Checkpoint => &[CHECKPOINT],
        Between::Checkpoints => &[CHECKPOINT, CHECKPOINT],
    };
    for step in steps {
        machine.step(*step);
    }
    for step in actions(source, action, object) {
        machine.step(step);
    }
    machine.verify();
    machine.step(FLUSH);
    // What was freed is given out again.
    machine.step(CHECKPOINT);
    machine.step(create(5));
    machine.step(write(machine.model.objects.len() as u32 - 1, 0, SIZE));
    machine.step(FLUSH);
    machine.verify();
    // What was not flushed is lost after every other event, and kept after those between; the other way round after the other object's step.
    for events in first..=machine.event_count() {
        let is_lost = (events as u32 + object).is_multiple_of(2);
        let choice = if is_lost {
            CrashChoice::Lose
        } else {
            CrashChoice::Keep
        };
        machine.verify_crash(events, |_| choice);
    }
}

#[test]
fn each_clone_survives_each_action_after_each_checkpoint_and_each_crash() {
    let actions = [
        Action::Truncate,
        Action::Punch,
        Action::Remove,
        Action::Write,
        Action::CloneAgain,
    ];
    let betweens = [
        Between::Nothing,
        Between::Flush,
        Between::Checkpoint,
        Between::Checkpoints,
    ];
    for source in [
        Source::Hole,
        Source::PartialTail,
        Source::Dirty,
        Source::Itself,
        Source::Snapshot,
    ] {
        for action in actions {
            for object in [SOURCE, TARGET] {
                for between in betweens {
                    println!("{source:?}, {action:?} of {object}, {between:?}");
                    cross(source, action, object, between);
                }
            }
        }
    }
}
