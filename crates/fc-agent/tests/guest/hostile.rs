//! Bytes that no host sends, and containers that mean ill: the agent ends in good order or goes on.

use fcvm_types::guest::ExitStatus;
use fcvm_wire::{Channel, Frame, FrameKind, Outcome, PROTOCOL_VERSION, Request};

use crate::client::{Vm, process, shell};
use crate::{lab, sleeping};

/// The guest ended by itself: powered off, with a reason, without a panic.
fn ended_in_order(vm: Vm, reason: &str) {
    let guest = vm.wait_end();
    let console = guest.console();
    assert!(console.contains(reason), "{console}");
    assert!(console.contains("; powering off"), "{console}");
    assert!(!console.contains("panic"), "{console}");
}

#[test]
fn foreign_bytes_end_the_guest_in_good_order() {
    let Some(tools) = lab::tools() else { return };
    let vm = Vm::boot(tools);
    vm.send_bytes(b"GET / HTTP/1.1\r\n\r\n");
    ended_in_order(vm, "bytes that are no frame were received");
    let vm = sleeping(tools);
    vm.send(&Frame::new(FrameKind::Opened, 1, Vec::new()));
    ended_in_order(vm, "the host sent a Opened frame out of place");
}

#[test]
fn another_protocol_version_is_told_on_the_console() {
    let Some(tools) = lab::tools() else { return };
    let vm = Vm::boot(tools);
    let hello = br#"{"protocol":999,"role":"owner","program":"later","session":1}"#;
    vm.send(&Frame::new(FrameKind::Hello, 0, hello.to_vec()));
    let reason = format!("the host speaks protocol 999 and this agent {PROTOCOL_VERSION}");
    ended_in_order(vm, &reason);
}

#[test]
fn the_end_of_the_channel_ends_the_guest() {
    let Some(tools) = lab::tools() else { return };
    let vm = sleeping(tools);
    vm.disconnect();
    ended_in_order(vm, "the host closed the channel");
}

#[test]
fn frames_that_make_no_sense_are_passed_over_or_answered() {
    let Some(tools) = lab::tools() else { return };
    let mut vm = sleeping(tools);
    for frame in [
        Frame::data(77, Channel::Stdin, vec![0; 1000]),
        Frame::eof(77, Channel::Stdin),
        Frame::credit(77, Channel::Stdout, u32::MAX),
        Frame::credit(1, Channel::Stdout, u32::MAX),
        Frame::new(FrameKind::Reset, 77, Vec::new()),
        Frame::new(
            FrameKind::Control,
            1,
            br#"{"control":"signal","signal":-9}"#.to_vec(),
        ),
        Frame::new(
            FrameKind::Control,
            77,
            br#"{"control":"signal","signal":9}"#.to_vec(),
        ),
    ] {
        vm.send(&frame);
    }
    let unknown = vm.open_raw(br#"{"request":"levitate"}"#).collect();
    assert!(
        unknown
            .failure()
            .message
            .starts_with("the agent does not know this request")
    );
    let twice = plan_again();
    assert_eq!(
        vm.open(&twice).collect().failure().message,
        "the container has been started already"
    );
    assert_eq!(vm.shell("echo alive").ok(), "alive\n");
    vm.power_off();
}

fn plan_again() -> Request {
    Request::Run {
        plan: Box::new(crate::client::plan(shell("true"))),
    }
}

#[test]
fn a_container_cannot_end_or_stop_the_agent() {
    let Some(tools) = lab::tools() else { return };
    let mut vm = sleeping(tools);
    // All that it can see is killed or stopped; sessions that come meanwhile may be hit as well.
    let mut killer = vm.exec(&shell(
        "while :; do kill -STOP -1 2>/dev/null; kill -KILL -1 2>/dev/null; done",
    ));
    killer.opened();
    for _ in 0..20 {
        vm.exec(&shell("true")).collect();
    }
    killer.reset();
    killer.collect();
    assert_eq!(vm.shell("echo alive").ok(), "alive\n");
    // Memory runs out for the container, not for the agent.
    let output = vm.shell("exec tail -c 195000000 /dev/zero");
    assert_eq!(output.outcome, Outcome::Exited(ExitStatus::Signal(9)));
    // Processes without end: the limit of the kernel is the container's.
    let mut bomb = shell("f() { f | f & }; f");
    bomb.rlimits = vec![fcvm_types::guest::Rlimit {
        name: "nproc".into(),
        soft: 200,
        hard: 200,
    }];
    bomb.user = "app".into();
    vm.exec(&bomb).collect();
    assert_eq!(
        vm.ask(&Request::Signal {
            signal: 9,
            all: true
        }),
        Outcome::Done
    );
    let mut after = vm.exec(&process(&["true"]));
    assert!(matches!(after.collect().outcome, Outcome::Failed(_)));
    vm.power_off();
}
