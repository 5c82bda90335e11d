//! A guest that wakes up as a clone: a new connection in the middle of the old one, and what becomes
//! of the processes.

use fcvm_types::guest::{ClonePlan, ExitStatus};
use fcvm_wire::{Frame, FrameKind, Mark, Outcome, Request};

use crate::client::{Vm, identity, plan, shell};
use crate::lab;

fn clone_plan(hostname: &str) -> ClonePlan {
    ClonePlan {
        identity: identity(hostname),
        realtime_ns: 1_900_000_000_000_000_000,
        entropy: "5a".repeat(64),
    }
}

/// Answers `ping` with `pong` and its host name, takes all else, and ends with its input.
const ECHO: &str = "while read line; do case $line in ping*) echo pong-${line#ping}-$(hostname);; esac; done; exit 3";

#[test]
fn a_clone_begins_anew_and_its_processes_go_on() {
    let Some(tools) = lab::tools() else { return };
    let mut process = shell(ECHO);
    process.stdin = true;
    let (first, second, third) = (1, 2, 3);
    let mark = |number: u8| {
        Mark::from_random([
            0x11, number, 0x11, 7, 0, 0, 0x11, number, 1, 2, 3, 4, 5, 6, 7, 8,
        ])
    };
    let mut vm = Vm::boot(tools);
    vm.greet_with(mark(first));
    let plan = Box::new(plan(process));
    let mut old = vm.open(&Request::Run { plan });
    assert_eq!(old.opened().pid, 1);
    old.write(b"ping1\n");
    old.expect("pong-1-lab\n");
    // An exec session that talks without end, a copy into the guest, a line in the container's input,
    // and half a frame: all of it is under way.
    let mut endless = vm.exec(&shell("while :; do echo endless; sleep 0.01; done"));
    endless.opened();
    let _copy = vm.open(&Request::ArchiveWrite {
        directory: "/tmp".into(),
        keep_owners: false,
    });
    old.write(b"ping2\n");
    let mut half = Vec::new();
    Frame::new(FrameKind::Open, 77, vec![b'{'; 5000]).encode(&mut half);
    vm.send_bytes(&half[..3000]);

    let mut stream = vm.adopt(mark(first), mark(second), clone_plan("clone"));
    assert_eq!(stream.opened().pid, 1);
    stream.write(b"ping3\n");
    stream.expect("pong-3-clone\n");
    assert_eq!(
        vm.shell("hostname; cat /etc/hostname").ok(),
        "clone\nclone\n"
    );
    assert!(vm.shell("date -u +%Y").ok().starts_with("2030"));
    // A shell that is about to run 'sleep' is there twice for an instant: the least of some looks counts.
    let count = "for look in 1 2 3 4 5 6 7 8; do ps -o args | grep -c 'echo [e]ndless'; done | sort -n | head -n 1";
    assert_eq!(vm.shell(count).ok(), "1\n");
    // More input than a window: credit is given for what this host has sent.
    stream.write(&[&[b'x'; 999][..], b"\n"].concat().repeat(400));
    stream.write(b"ping4\n");
    stream.expect("pong-4-clone\n");

    // A clone of the clone.
    let mut stream = vm.adopt(mark(second), mark(third), clone_plan("grandchild"));
    stream.opened();
    stream.write(b"ping5\n");
    stream.expect("pong-5-grandchild\n");
    assert_eq!(vm.shell(count).ok(), "1\n");
    stream.end_input();
    assert_eq!(
        stream.collect().outcome,
        Outcome::Exited(ExitStatus::Code(3))
    );
    vm.power_off();
}

#[test]
fn what_is_no_plan_for_a_clone_is_refused_and_the_guest_stays_up() {
    let Some(tools) = lab::tools() else { return };
    let mut vm = Vm::boot(tools);
    let mark = Mark::from_random([9; 16]);
    vm.greet_with(mark);
    let ask = |vm: &mut Vm, plan: ClonePlan| match vm.ask(&Request::Adopt {
        plan: Box::new(plan),
    }) {
        Outcome::Failed(failure) => failure.message,
        outcome => panic!("{outcome:?}"),
    };
    assert_eq!(
        ask(&mut vm, clone_plan("a")),
        "the container has not been started"
    );
    let plan = Box::new(plan(shell("sleep 1000")));
    vm.open(&Request::Run { plan }).opened();
    let bad = ClonePlan {
        entropy: "00".into(),
        ..clone_plan("b")
    };
    assert_eq!(ask(&mut vm, bad), "the entropy is not 64 bytes");
    // No mark came before: nothing waits to be adopted.
    assert_eq!(
        ask(&mut vm, clone_plan("c")),
        "there is no container to adopt"
    );
    vm.power_off();
}
