//! Streams: amounts, flow control, terminals, signals, many at once.

use std::time::{Duration, Instant};

use fcvm_types::guest::{ExitStatus, TerminalSize};
use fcvm_wire::{Control, FrameKind, Outcome, Request};

use crate::client::{Vm, plan, process, shell};
use crate::{lab, sleeping};

const SIZE: TerminalSize = TerminalSize {
    rows: 24,
    columns: 80,
};

#[test]
fn much_output_and_input_arrive_whole() {
    let Some(tools) = lab::tools() else { return };
    let mut vm = sleeping(tools);
    // 200 MB of numbered lines.
    const LINES: u64 = 100_000;
    const ROUNDS: u64 = 340;
    let script = format!(
        "seq 1 {LINES} > /block; i=0; while [ $i -lt {ROUNDS} ]; do cat /block; i=$((i+1)); done"
    );
    let mut stream = vm.exec(&shell(&script));
    let (mut received, mut rest) = (0_u64, Vec::new());
    loop {
        let frame = stream.next();
        match frame.kind {
            FrameKind::Data => {
                rest.extend(frame.payload);
                let end = rest
                    .iter()
                    .rposition(|byte| *byte == b'\n')
                    .map_or(0, |end| end + 1);
                let lines: Vec<u8> = rest.drain(..end).collect();
                for line in lines.split_inclusive(|byte| *byte == b'\n') {
                    let expected = format!("{}\n", received % LINES + 1);
                    assert!(line == expected.as_bytes(), "{received}: {line:?}");
                    received += 1;
                }
            }
            FrameKind::Closed => break,
            _ => {}
        }
    }
    assert_eq!((received, rest.len()), (LINES * ROUNDS, 0));
    // Input of 20 MB, through a pipe that is slower than the sender.
    let mut plan = shell("md5sum");
    plan.stdin = true;
    let mut stream = vm.exec(&plan);
    let input: Vec<u8> = (0_u32..5_000_000).flat_map(u32::to_le_bytes).collect();
    stream.write(&input);
    stream.end_input();
    assert_eq!(
        stream.collect().ok(),
        "31fc699a0ae47b226ee0752336f1215c  -\n"
    );
    vm.power_off();
}

#[test]
fn a_reader_that_does_not_read_stops_only_its_own_stream() {
    let Some(tools) = lab::tools() else { return };
    let mut vm = sleeping(tools);
    let mut stuck = vm.exec(&shell("cat /dev/zero"));
    stuck.opened();
    let mut input = process(&["sleep", "100000"]);
    input.stdin = true;
    // A process that never reads its input takes no more than the window.
    let deaf = vm.exec(&input);
    drop(deaf);
    for round in 0..20 {
        assert_eq!(
            vm.shell(&format!("echo {round}")).ok(),
            format!("{round}\n")
        );
    }
    assert_eq!(
        vm.shell("head -c 10000000 /dev/zero | wc -c").ok(),
        "10000000\n"
    );
    // Its frames were kept to its window; it ends when it is abandoned.
    stuck.reset();
    assert_eq!(
        stuck.collect().outcome,
        Outcome::Exited(ExitStatus::Signal(9))
    );
    vm.power_off();
}

#[test]
fn fifty_sessions_at_once_keep_their_bytes_apart() {
    let Some(tools) = lab::tools() else { return };
    let mut vm = sleeping(tools);
    let mut streams: Vec<_> = (0..50)
        .map(|number| {
            let mut plan = shell(&format!("cat; echo {number} >&2; exit {number}"));
            plan.stdin = true;
            vm.exec(&plan)
        })
        .collect();
    for (number, stream) in streams.iter_mut().enumerate() {
        stream.write(format!("input {number}").repeat(1000).as_bytes());
        stream.end_input();
    }
    for (number, stream) in streams.iter_mut().enumerate() {
        let output = stream.collect();
        assert_eq!(output.text(), format!("input {number}").repeat(1000));
        assert_eq!(output.stderr, format!("{number}\n").into_bytes());
        let code = u8::try_from(number).unwrap();
        assert_eq!(output.outcome, Outcome::Exited(ExitStatus::Code(code)));
    }
    // Nothing of them is left.
    let Outcome::Processes(processes) = vm.ask(&Request::Processes) else {
        panic!("no list of processes");
    };
    assert_eq!(processes.len(), 1, "{processes:?}");
    vm.power_off();
}

#[test]
fn too_many_sessions_are_refused_clearly_and_room_comes_back() {
    let Some(tools) = lab::tools() else { return };
    let mut vm = sleeping(tools);
    // The container's own stream is one of the 512.
    let mut streams: Vec<_> = (0..512)
        .map(|_| vm.exec(&process(&["sleep", "100000"])))
        .collect();
    let last = streams.pop().unwrap().collect();
    assert_eq!(
        last.failure().message,
        "512 streams are open in the guest; end some first"
    );
    // Each program runs, so that it is what is killed.
    for stream in &mut streams {
        stream.opened();
        stream.reset();
    }
    for stream in &mut streams {
        assert_eq!(
            stream.collect().outcome,
            Outcome::Exited(ExitStatus::Signal(9))
        );
    }
    assert_eq!(vm.shell("echo again").ok(), "again\n");
    vm.power_off();
}

#[test]
fn a_terminal_is_one_for_the_first_process_and_for_sessions() {
    let Some(tools) = lab::tools() else { return };
    let mut first = shell(
        "stty size; tty; echo $TERM; test -c /dev/console && echo console; read line; echo got $line",
    );
    first.terminal = Some(SIZE);
    first.stdin = true;
    first.user = "app".into();
    let (mut vm, mut container) = Vm::run(tools, &plan(first));
    assert_eq!(
        container.expect("console\r\n"),
        "24 80\r\n/dev/pts/0\r\nxterm\r\nconsole\r\n"
    );

    let mut session = shell(
        "trap 'stty size' WINCH; trap 'echo int' INT; echo ready; while read line; do echo $line; done; echo end",
    );
    session.terminal = Some(SIZE);
    session.stdin = true;
    let mut stream = vm.exec(&session);
    stream.expect("ready\r\n");
    stream.control(Control::Resize {
        size: TerminalSize {
            rows: 50,
            columns: 132,
        },
    });
    stream.write(b"x\n");
    stream.expect("50 132\r\n");
    // The interrupt character reaches the foreground.
    stream.write(b"\x03y\n");
    stream.expect("int\r\n");
    stream.end_input();
    let output = stream.collect();
    assert!(output.text().ends_with("end\r\n"), "{output:?}");
    assert_eq!(output.outcome, Outcome::Exited(ExitStatus::Code(0)));

    container.write(b"hello\n");
    let output = container.collect();
    assert_eq!(output.text(), "hello\r\ngot hello\r\n");
    vm.power_off();
}

#[test]
fn signals_reach_the_process_and_its_end_is_exact() {
    let Some(tools) = lab::tools() else { return };
    let script = "trap 'echo term; exit 3' TERM; echo ready; while :; do sleep 0.1; done";
    let (mut vm, mut container) = Vm::run(tools, &plan(shell(script)));
    container.expect("ready\n");
    for signal in [1, 9, 15, 34] {
        let mut stream = vm.exec(&process(&["sleep", "100000"]));
        stream.opened();
        stream.control(Control::Signal { signal });
        let outcome = stream.collect().outcome;
        assert_eq!(
            outcome,
            Outcome::Exited(ExitStatus::Signal(u8::try_from(signal).unwrap()))
        );
    }
    // A session is ended by a signal to all; the first process sees it as well.
    let mut stream = vm.exec(&process(&["sleep", "100000"]));
    stream.opened();
    assert_eq!(
        vm.ask(&Request::Signal {
            signal: 15,
            all: true
        }),
        Outcome::Done
    );
    assert_eq!(
        stream.collect().outcome,
        Outcome::Exited(ExitStatus::Signal(15))
    );
    let output = container.collect();
    assert_eq!(output.text(), "term\n");
    assert_eq!(output.outcome, Outcome::Exited(ExitStatus::Code(3)));
    // After its end the container takes no more sessions, but its files can still be read.
    assert_eq!(
        vm.exec(&shell("true")).collect().failure().message,
        "the container has ended"
    );
    assert!(matches!(
        vm.ask(&Request::Stat {
            path: "/etc/passwd".into()
        }),
        Outcome::Stat(_)
    ));
    vm.power_off();
}

#[test]
fn the_end_of_the_first_process_ends_all_and_a_background_process_holds_nothing_up() {
    let Some(tools) = lab::tools() else { return };
    let (mut vm, mut container) = Vm::run(tools, &plan(shell("echo ready; sleep 100000")));
    container.expect("ready\n");
    // The background process keeps the session's output open.
    let started = Instant::now();
    let output = vm.shell("(sleep 100000; echo late) & echo early");
    assert_eq!(output.ok(), "early\n");
    assert!(started.elapsed() < Duration::from_secs(100));
    let mut terminal = shell("trap '' HUP; (sleep 100000; echo late) & echo early");
    terminal.terminal = Some(SIZE);
    assert_eq!(vm.exec(&terminal).collect().ok(), "early\r\n");
    let mut session = vm.exec(&process(&["sleep", "100000"]));
    session.opened();
    assert_eq!(
        vm.ask(&Request::Signal {
            signal: 9,
            all: false
        }),
        Outcome::Done
    );
    assert_eq!(
        container.collect().outcome,
        Outcome::Exited(ExitStatus::Signal(9))
    );
    assert_eq!(
        session.collect().outcome,
        Outcome::Exited(ExitStatus::Signal(9))
    );
    vm.power_off();
}
