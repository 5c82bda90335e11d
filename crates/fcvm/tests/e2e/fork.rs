//! Forks of running VMs: what continues, what is each clone's own, and what the source keeps.

use std::collections::HashSet;
use std::io::{Read, Write};
use std::net::TcpStream;

use rustix::process::Signal;
use serde_json::Value;

use crate::base::IMAGE;
use crate::lab::Lab;
use crate::network::free_port;
use crate::process::limit;

/// A VM whose container counts, ten times a second, in a file that is in memory only.
fn counting_vm(lab: &Lab, options: &[&str]) {
    let count = "trap 'exit 0' TERM; echo ready > /dev/shm/state; n=0; \
                 while :; do n=$((n+1)); echo $n > /dev/shm/count; sleep 0.1; done";
    let run = [
        &["run", "-d", "--name", "source"],
        options,
        &[IMAGE, "sh", "-c", count],
    ]
    .concat();
    lab.ok(&run);
    lab.sh("source", "until [ -s /dev/shm/count ]; do sleep 0.1; done");
}

fn count(lab: &Lab, vm: &str) -> u64 {
    // The file is empty for an instant each time it is written.
    lab.sh(
        vm,
        "until n=$(cat /dev/shm/count) && [ \"$n\" ]; do :; done; echo $n",
    )
    .trim()
    .parse()
    .unwrap()
}

#[test]
fn clones_continue_and_are_independent() {
    let Some(lab) = Lab::new() else { return };
    let hook = "echo $FCVM_CLONE of $FCVM_PARENT > /root/told";
    counting_vm(&lab, &["--network", "none", "--on-fork", hook]);
    lab.sh("source", "echo before > /root/file; dd if=/dev/urandom of=/root/data bs=1M count=4 2>/dev/null; sync");
    let sum = lab.sh("source", "md5sum < /root/data");
    let before = count(&lab, "source");
    let ids = lab.ok(&["fork", "source", "-n", "2"]);
    assert_eq!(ids.lines().count(), 2);
    for clone in ["source-1", "source-2"] {
        assert!(count(&lab, clone) >= before);
        assert_eq!(
            lab.sh(clone, "cat /root/file /dev/shm/state"),
            "before\nready\n"
        );
        assert_eq!(lab.sh(clone, "md5sum < /root/data"), sum);
        lab.sh(
            clone,
            &format!("echo {clone} > /root/file; echo {clone} > /dev/shm/state; sync"),
        );
    }
    // The source has moved to another process and is the same VM.
    lab.sh(
        "source",
        "echo source > /root/file; echo source > /dev/shm/state; sync",
    );
    let names: Vec<String> = ["source", "source-1", "source-2"]
        .iter()
        .map(|vm| {
            assert_eq!(
                lab.sh(vm, "cat /root/file /dev/shm/state"),
                format!("{vm}\n{vm}\n")
            );
            let [hostname, file, machine] =
                ["hostname", "cat /etc/hostname", "cat /etc/machine-id"]
                    .map(|script| lab.sh(vm, script).trim().to_owned());
            assert_eq!(hostname, file);
            assert!(machine.starts_with(&hostname), "{machine} {hostname}");
            machine
        })
        .collect();
    assert_eq!(names.iter().collect::<HashSet<_>>().len(), 3, "{names:?}");
    // A second fork has what the first one has not: the source is a clone itself by now.
    lab.ok(&["fork", "source", "--name", "second"]);
    assert_eq!(
        lab.sh("second", "cat /root/file /dev/shm/state"),
        "source\nsource\n"
    );
    assert_eq!(lab.sh("second", "md5sum < /root/data"), sum);
    // And so has a clone of a clone of a clone, after its parents have gone.
    lab.ok(&["fork", "source-1", "--name", "grandchild"]);
    lab.ok(&["rm", "-f", "source-1"]);
    lab.sh("grandchild", "echo grandchild > /root/file; sync");
    lab.ok(&["fork", "grandchild", "--name", "last"]);
    lab.ok(&["rm", "-f", "source", "grandchild"]);
    assert_eq!(
        lab.sh("last", "cat /root/file /dev/shm/state"),
        "grandchild\nsource-1\n"
    );
    assert_eq!(lab.sh("last", "md5sum < /root/data"), sum);
    let counted = count(&lab, "last");
    lab.sh(
        "last",
        &format!("until [ \"$(cat /dev/shm/count)\" -gt {counted} ]; do sleep 0.1; done"),
    );
    let record = &lab.json(&["inspect", "last"])[0];
    assert_eq!(record["lineage"]["parent_name"], "grandchild", "{record}");
    for stage in ["hypervisor", "state", "load", "resume", "agent"] {
        assert!(
            record["start_timings"]
                .as_array()
                .unwrap()
                .iter()
                .any(|timing| timing["stage"] == stage),
            "{record}"
        );
    }
    lab.ok(&["rm", "-f", "-a"]);
    lab.finish();
}

#[test]
fn clones_that_wait_ahead_are_used_and_leave_nothing() {
    let Some(lab) = Lab::new() else { return };
    counting_vm(&lab, &["--network", "none", "--standby", "2"]);
    let standby = |record: &Value| record["state"] == "standby";
    let mut before = 0;
    // The first fork is by succession, the second one copies what was written since.
    for prefix in ["first", "second"] {
        lab.wait_for_record("a clone that waits", standby);
        before = count(&lab, "source").max(before);
        lab.sh("source", &format!("echo {prefix} > /root/file; sync"));
        lab.ok(&["fork", "source", "-n", "3", "--name", prefix]);
        let mut ahead = 0;
        for number in 1..=3 {
            let clone = format!("{prefix}-{number}");
            assert!(count(&lab, &clone) >= before);
            assert_eq!(lab.sh(&clone, "cat /root/file"), format!("{prefix}\n"));
            let record = &lab.json(&["inspect", &clone])[0];
            let timings = record["start_timings"].as_array().unwrap();
            ahead += usize::from(
                timings
                    .iter()
                    .any(|timing| timing["stage"] == "hypervisor (ahead)"),
            );
        }
        assert_eq!(ahead, 2);
    }
    // A snapshot is of the VM as it is now, whatever waits.
    lab.wait_for_record("a clone that waits", standby);
    lab.sh("source", "echo third > /root/file; sync");
    lab.ok(&["snapshot", "create", "source", "--tag", "third", "--verify"]);
    lab.ok(&["fork", "source", "--name", "last"]);
    assert_eq!(lab.sh("last", "cat /root/file"), "third\n");
    lab.ok(&["snapshot", "rm", "third"]);
    // Those that wait end with the VM, also when nobody can tell them.
    lab.wait_for_record("a clone that waits", standby);
    lab.ok(&["rm", "-f", "-a"]);
    lab.wait_for_no_process();
    counting_vm(&lab, &["--network", "none", "--standby", "1"]);
    lab.wait_for_record("a clone that waits", standby);
    let record = lab.wait_for_state("source", "running");
    let pid = i32::try_from(record["owner"]["pid"].as_i64().unwrap()).unwrap();
    rustix::process::kill_process(rustix::process::Pid::from_raw(pid).unwrap(), Signal::KILL)
        .unwrap();
    lab.wait_for_no_process();
    lab.ok(&["rm", "-f", "-a"]);
    lab.finish();
}

#[test]
fn no_two_clones_return_the_same_random_bytes() {
    let Some(lab) = Lab::new() else { return };
    lab.idle_vm("source", &["--network", "none", "--memory", "128m"]);
    // The first thing that each of them does: both ways to the kernel's random numbers.
    let ask = "head -c 16 /dev/urandom | od -An -tx1 | tr -d ' \\n'; echo; cat /proc/sys/kernel/random/uuid";
    let answers = lab.json(&[
        "fork", "source", "-n", "20", "--exec", ask, "--format", "json",
    ]);
    assert!(
        answers["source"]["pause_microseconds"].as_u64().unwrap() > 0,
        "{answers}"
    );
    let answers = answers["clones"].as_array().unwrap();
    assert_eq!(answers.len(), 20);
    let mut seen = HashSet::new();
    for answer in answers {
        assert_eq!(answer["exit_code"], 0, "{answer}");
        let text = answer["stdout"].as_str().unwrap();
        assert_eq!(text.lines().count(), 2, "{answer}");
        for line in text.lines() {
            assert!(line.len() >= 32, "{answer}");
            assert!(seen.insert(line.to_owned()), "{line} came twice");
        }
    }
    assert_eq!(seen.len(), 40);
    lab.ok(&["rm", "-f", "-a"]);
    lab.finish();
}

/// A download through a published port, an exec session and the container's own output go on while their
/// VM is forked again and again.
#[test]
fn what_runs_through_the_source_survives_its_forks() {
    let Some(lab) = Lab::new() else { return };
    let port = free_port();
    let publish = format!("127.0.0.1:{port}:80");
    let serve = "trap 'exit 0' TERM; dd if=/dev/urandom of=/tmp/data bs=1M count=24 2>/dev/null; \
                 printf 'read line; cat /tmp/data' > /tmp/serve; \
                 while :; do nc -l -p 80 -e sh /tmp/serve; done & \
                 touch /tmp/ready; while :; do echo tick; sleep 0.05; done";
    lab.ok(&[
        "run", "-d", "--name", "source", "-p", &publish, IMAGE, "sh", "-c", serve,
    ]);
    lab.sh("source", "until [ -e /tmp/ready ]; do sleep 0.1; done");
    let expected = lab.sh("source", "md5sum < /tmp/data");
    let mut session = lab.start(&[
        "exec",
        "-i",
        "source",
        "sh",
        "-c",
        "while read line; do echo got-$line; done; exit 7",
    ]);
    session.write(b"0\n");
    session.stdout.wait_for("got-0\n");

    let mut stream = TcpStream::connect(("127.0.0.1", port)).unwrap();
    stream.set_read_timeout(Some(limit())).unwrap();
    // Some of the passts that are about hear of a connection only when the client speaks.
    stream.write_all(b"\n").unwrap();
    let mut received = vec![0; 64 << 10];
    stream.read_exact(&mut received).unwrap();
    let download = std::thread::spawn(move || {
        stream.read_to_end(&mut received).unwrap();
        received
    });
    for number in 1..=10 {
        lab.ok(&["fork", "source", "--rm", "--name", "copy"]);
        session.write(format!("{number}\n").as_bytes());
        session.stdout.wait_for(&format!("got-{number}\n"));
        // The clone has the same service, and a network of its own.
        if number == 1 {
            assert_eq!(lab.sh("copy", "md5sum < /tmp/data"), expected);
            assert!(lab.sh("copy", "cat /proc/net/route").contains("eth0"));
        }
        lab.ok(&["rm", "-f", "copy"]);
    }
    let received = download.join().unwrap();
    assert_eq!(received.len(), 24 << 20);
    lab.write("received", &received);
    let sum = crate::process::must("md5sum", &[lab.file("received").to_str().unwrap()]);
    assert_eq!(sum.text().split(' ').next(), expected.split(' ').next());
    assert_eq!(session.finish().code, 7);
    // Ten pauses did not make its clock late.
    let seconds = |text: String| text.trim().parse::<i64>().unwrap();
    let host = seconds(crate::process::must("date", &["+%s"]).text());
    let guest = seconds(lab.sh("source", "date +%s"));
    assert!((0..=2).contains(&(guest - host)), "{guest} {host}");
    // No line of the container's output is missing, doubled or torn.
    let log = lab.ok(&["logs", "source"]);
    assert!(log.lines().all(|line| line == "tick"), "{log}");
    lab.ok(&["stop", "source"]);
    assert_eq!(lab.ok(&["rm", "source"]), "source\n");
    lab.finish();
}

/// QEMU's own network lives in the process that a fork would leave: the memory is copied.
#[test]
fn a_vm_without_passt_is_forked_by_a_copy() {
    let Some(mut lab) = Lab::of_qemu("has a network of its own, without passt") else {
        return;
    };
    lab.without_program("passt");
    lab.first_run(&[
        "run",
        "-d",
        "--name",
        "source",
        IMAGE,
        "sh",
        "-c",
        "trap 'exit 0' TERM; while :; do sleep 0.1; done",
    ]);
    lab.sh("source", "echo kept > /dev/shm/state");
    for clone in ["one", "two"] {
        lab.ok(&["fork", "source", "--name", clone]);
        assert_eq!(lab.sh(clone, "cat /dev/shm/state"), "kept\n");
    }
    lab.ok(&["rm", "-f", "-a"]);
    lab.finish();
}

#[test]
fn forks_that_cannot_be_are_refused_and_leave_nothing() {
    let Some(lab) = Lab::new() else { return };
    let refused = |arguments: &[&str], expected: &str| {
        let line = lab.fails(125, &[&["fork"], arguments].concat());
        assert!(line.contains(expected), "{line}");
    };
    refused(&["nobody"], "no VM is called 'nobody'");
    lab.idle_vm("source", &["--network", "none"]);
    refused(
        &["source", "--name", "source"],
        "the name 'source' is in use",
    );
    refused(
        &["source", "-n", "2", "-p", "1:1"],
        "-p gives one clone a port",
    );
    refused(&["source", "-p", "8080:80"], "the VM has no network");
    lab.ok(&["pause", "source"]);
    refused(&["source"], "is paused: 'fcvm unpause source'");
    lab.ok(&["unpause", "source"]);
    lab.ok(&["fork", "source", "-n", "1", "--name", "taken"]);
    refused(
        &["source", "-n", "3", "--name", "taken"],
        "the name 'taken-1' is in use",
    );
    lab.ok(&["stop", "source"]);
    refused(&["source"], "'source' is not running");
    lab.ok(&["rm", "-f", "-a"]);
    lab.finish();
}

/// Whoever dies during a fork, the source goes on, and nothing is left of clones that are not there.
#[test]
fn a_fork_whose_command_or_clones_are_killed_leaves_the_source_running() {
    let Some(lab) = Lab::new() else { return };
    lab.idle_vm("source", &["--network", "none"]);
    lab.sh("source", "echo kept > /dev/shm/state");
    // The command alone: the clones are on their own from the moment in which they were asked for.
    for round in 0..3 {
        let command = lab.start(&["fork", "source", "-n", "3", "--name", "clone"]);
        let stage = ["created", "booting", "running"][round];
        lab.wait_for_record(stage, |record| {
            record["name"].as_str().unwrap().starts_with("clone") && record["state"] == stage
        });
        command.signal(Signal::KILL);
        command.wait();
        assert_eq!(lab.sh("source", "cat /dev/shm/state"), "kept\n");
        settle(&lab);
        lab.ok(&["fork", "source", "--name", "after"]);
        assert_eq!(lab.sh("after", "cat /dev/shm/state"), "kept\n");
        lab.ok(&["rm", "-f", "after"]);
        let clones: Vec<String> = clones(&lab);
        for clone in &clones {
            lab.ok(&["rm", "-f", clone]);
        }
    }
    // A clone's owner, as soon as it is known.
    let command = lab.start(&["fork", "source", "-n", "2", "--name", "clone"]);
    let record = lab.wait_for_record("a clone", |record| {
        record["name"].as_str().unwrap().starts_with("clone")
    });
    let owner = i32::try_from(record["owner"]["pid"].as_i64().unwrap()).unwrap();
    let owner = rustix::process::Pid::from_raw(owner).unwrap();
    rustix::process::kill_process(owner, Signal::KILL).unwrap();
    command.wait();
    assert_eq!(lab.sh("source", "cat /dev/shm/state"), "kept\n");
    lab.ok(&["rm", "-f", "-a"]);
    lab.finish();
}

/// Waits until every clone is either running or gone.
fn settle(lab: &Lab) {
    let is_settled = |record: &Value| record["state"] == "running" || record["state"] == "exited";
    lab.wait_for_record("the source", |_| lab.records().iter().all(is_settled));
}

fn clones(lab: &Lab) -> Vec<String> {
    let records = lab.json(&["ls", "-a", "--format", "json"]);
    let names = records
        .as_array()
        .unwrap()
        .iter()
        .map(|record| record["name"].as_str().unwrap().to_owned());
    names.filter(|name| name.starts_with("clone")).collect()
}

/// The source's owner and all its processes: the clones are VMs of their own.
#[test]
fn clones_outlive_their_source() {
    let Some(lab) = Lab::new() else { return };
    lab.idle_vm("source", &["--network", "none"]);
    lab.ok(&["fork", "source", "--name", "clone"]);
    let record = lab.wait_for_state("source", "running");
    let owner = i32::try_from(record["owner"]["pid"].as_i64().unwrap()).unwrap();
    let owner = rustix::process::Pid::from_raw(owner).unwrap();
    rustix::process::kill_process(owner, Signal::KILL).unwrap();
    assert!(crate::process::wait_gone(owner));
    assert_eq!(lab.sh("clone", "echo here"), "here\n");
    lab.ok(&["fork", "clone", "--name", "second"]);
    assert_eq!(lab.sh("second", "echo here"), "here\n");
    lab.ok(&["rm", "-f", "-a"]);
    lab.finish();
}
