//! A guest whose connection is given up and made anew, as around a snapshot over vsock. Here a port carries it,
//! whose host side leaves and comes back.

use fcvm_types::guest::{ClonePlan, ExitStatus};
use fcvm_wire::{Mark, Outcome, Request};

use crate::client::{Stream, Vm, identity, plan, shell};
use crate::lab;

const FIRST: Mark = Mark::from_random([3; 16]);
const SECOND: Mark = Mark::from_random([5; 16]);

/// Numbers without a gap, and `pong` to each line of input.
const COUNT: &str = "(i=0; while :; do i=$((i+1)); echo $i; done) & \
                     while read line; do echo pong-$line-$(hostname); done; kill $!; exit 4";

fn clone_plan(hostname: &str) -> ClonePlan {
    ClonePlan {
        identity: identity(hostname),
        realtime_ns: 1_900_000_000_000_000_000,
        entropy: "a5".repeat(64),
    }
}

/// What is said goes on where it was, and nothing of it is lost.
fn is_without_gap(text: &str) {
    let numbers: Vec<u64> = text.lines().filter_map(|line| line.parse().ok()).collect();
    // The first and the last line may be parts of one.
    let whole = &numbers[1..numbers.len() - 1];
    assert!(whole.len() > 100, "{text}");
    assert!(
        whole.windows(2).all(|pair| pair[1] == pair[0] + 1),
        "{text}"
    );
}

/// Reads so many numbers more than `said` has.
fn hear_on(said: &mut String, stream: &mut Stream, count: u64) {
    let whole = &said[..said.rfind('\n').unwrap()];
    let mut numbers = whole.lines().rev();
    let last = numbers.find_map(|line| line.parse::<u64>().ok());
    let last = last.unwrap_or(0);
    said.push_str(&stream.expect(&format!("\n{}\n", last + count)));
}

#[test]
fn a_parked_guest_goes_on_with_its_host_or_becomes_a_clone() {
    let Some(tools) = lab::tools() else { return };
    let mut process = shell(COUNT);
    process.stdin = true;
    let mut vm = Vm::boot(tools);
    vm.greet_with(FIRST);
    let plan = Box::new(plan(process));
    let mut stream = vm.open(&Request::Run { plan });
    stream.opened();
    let mut echo = shell("while read line; do echo got-$line; done");
    echo.stdin = true;
    let mut session = vm.exec(&echo);
    session.opened();
    stream.write(b"1\n");
    let mut said = stream.expect("pong-1-lab\n");

    // The same host: streams go on, twice.
    for round in 2..4 {
        stream.write(format!("{round}\n").as_bytes());
        vm.park(FIRST);
        vm.greet_with(FIRST);
        said += &stream.expect(&format!("pong-{round}-lab\n"));
        hear_on(&mut said, &mut stream, 60);
        session.write(b"here\n");
        session.expect("got-here\n");
    }
    is_without_gap(&said);
    assert_eq!(vm.shell("hostname").ok(), "lab\n");

    // Another host: the container's stream becomes that of its adoption, the others are nobody's.
    vm.park(FIRST);
    let mut stream = vm.adopt_parked(SECOND, clone_plan("clone"));
    assert_eq!(stream.opened().pid, 1);
    stream.write(b"4\n");
    stream.expect("pong-4-clone\n");
    assert_eq!(vm.shell("hostname").ok(), "clone\n");
    stream.end_input();
    assert_eq!(
        stream.collect().outcome,
        Outcome::Exited(ExitStatus::Code(4))
    );
    vm.power_off();
}
