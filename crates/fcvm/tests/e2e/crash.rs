//! Deaths: the owner by `kill -9` at every stage, the hypervisor, a command. Nothing is left after any.

use std::fs;
use std::process::Command;

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use crate::base::{IMAGE, base};
use crate::lab::Lab;
use crate::process::{Running, must};

fn owner_of(record: &Value) -> Pid {
    Pid::from_raw(i32::try_from(record["owner"]["pid"].as_i64().unwrap()).unwrap()).unwrap()
}

/// Kills the owner of a VM and checks that its processes end by themselves, and that the next command
/// finds no VM that lives, no socket and no file of it.
fn kill_owner(lab: &Lab, name: &str, record: &Value) {
    let owner = owner_of(record);
    let marked: Vec<Pid> = lab.processes().into_iter().map(|(pid, _)| pid).collect();
    assert!(marked.contains(&owner), "{owner:?} is not among {marked:?}");
    kill_process(owner, Signal::KILL).unwrap();
    // No command has to help: the kernel ends them.
    lab.wait_for_no_process();
    assert_eq!(lab.ok(&["ls", "-q"]), "", "a ghost is listed");
    assert_eq!(
        fs::read_dir(&lab.runtime).unwrap().count(),
        0,
        "a socket is left"
    );
    if record["remove_on_exit"] == true {
        assert_eq!(lab.ok(&["ls", "-a", "-q"]), "");
        return;
    }
    let listed = lab.json(&["ls", "-a", "--format", "json"]);
    assert_eq!(listed.as_array().unwrap().len(), 1);
    assert_eq!(
        (&listed[0]["state"], &listed[0]["exit_code"]),
        (&"exited".into(), &Value::Null)
    );
    assert!(
        listed[0]["error"].as_str().unwrap().contains("owner"),
        "{listed}"
    );
    assert!(lab.ok(&["ls", "-a"]).contains("Lost"));
    // The name is free again once it is removed, and the logs are there until then.
    lab.fcvm(&["logs", name]);
    assert_eq!(lab.ok(&["rm", name]), format!("{name}\n"));
}

/// Stage `created`: the owner has entered the record, made its socket and waits for its network helper.
#[test]
fn owner_killed_while_the_vm_is_being_set_up() {
    let Some(mut lab) = Lab::new() else { return };
    let fifo = lab.file("fifo").to_str().unwrap().to_owned();
    must("mkfifo", &[&fifo]);
    lab.shadow(
        "passt",
        &format!("echo helper started > {fifo}; exec sleep 100000"),
    );
    for options in [
        &["run", "--name", "victim"][..],
        &["run", "--rm", "--name", "victim"],
        &["run", "-d", "--name", "victim"],
    ] {
        let running = lab.start(&[options, &[IMAGE, "true"]].concat());
        let mut reader = Command::new("cat");
        reader.arg(&fifo);
        Running::start(reader).stdout.wait_for("helper started\n");
        let record = lab.wait_for_state("victim", "created");
        assert!(
            !record["resources"].as_array().unwrap().is_empty(),
            "{record}"
        );
        assert_eq!(fs::read_dir(&lab.runtime).unwrap().count(), 1);
        kill_owner(&lab, "victim", &record);
        running.wait();
    }
    lab.finish();
}

/// Stage `booting`: the hypervisor runs, the agent has not spoken.
#[test]
fn owner_killed_while_the_guest_boots() {
    let Some(mut lab) = Lab::new() else { return };
    lab.agent = base().unwrap().silent_agent.clone();
    for options in [
        &["run", "--name", "victim"][..],
        &["run", "-d", "--rm", "--name", "victim"],
    ] {
        let running = lab.start(&[options, &[IMAGE, "true"]].concat());
        let record = lab.wait_for_state("victim", "booting");
        lab.the_hypervisor();
        kill_owner(&lab, "victim", &record);
        let output = running.wait();
        // A detached run whose owner died says so; one in the foreground was the owner.
        assert!(output.code == 137 || output.code == 125, "{output:?}");
    }
    lab.finish();
}

#[test]
fn owner_killed_while_the_container_runs() {
    let Some(lab) = Lab::new() else { return };
    lab.idle_vm("victim", &[]);
    let record = lab.wait_for_state("victim", "running");
    let session = lab.start(&["exec", "victim", "sh", "-c", "echo ready; sleep 1000"]);
    session.stdout.wait_for("ready\n");
    let follow = lab.start(&["logs", "-f", "victim"]);
    follow.stdout.wait_for("started\n");
    // The sessions of other commands end with the VM, as their own processes.
    kill_process(owner_of(&record), Signal::KILL).unwrap();
    assert_eq!(session.wait().code, 125);
    assert_eq!(follow.wait().code, 0);
    lab.wait_for_no_process();
    let line = lab.fails(125, &["exec", "victim", "true"]);
    assert!(line.contains("is not running"), "{line}");
    assert_eq!(lab.ok(&["wait", "victim"]), "-1\n");
    lab.ok(&["rm", "victim"]);

    let running = lab.start(&[
        "run",
        "--rm",
        "--name",
        "victim",
        IMAGE,
        "sh",
        "-c",
        "echo ready; sleep 1000",
    ]);
    running.stdout.wait_for("ready\n");
    let record = lab.wait_for_state("victim", "running");
    kill_owner(&lab, "victim", &record);
    running.wait();
    lab.finish();
}

#[test]
fn owner_killed_while_the_vm_is_paused_or_stopping() {
    let Some(lab) = Lab::new() else { return };
    lab.idle_vm("victim", &["--network", "none"]);
    lab.ok(&["pause", "victim"]);
    kill_owner(&lab, "victim", &lab.wait_for_state("victim", "paused"));

    let script = "trap '' TERM; echo ready; while :; do sleep 1000; done";
    lab.ok(&[
        "run",
        "-d",
        "--name",
        "victim",
        "--network",
        "none",
        IMAGE,
        "sh",
        "-c",
        script,
    ]);
    let follow = lab.start(&["logs", "-f", "victim"]);
    follow.stdout.wait_for("ready\n");
    let stop = lab.start(&["stop", "-t", "3600", "victim"]);
    let record = lab.wait_for_state("victim", "stopping");
    kill_process(owner_of(&record), Signal::KILL).unwrap();
    // Its VM is gone: that is what was asked for.
    stop.wait();
    follow.wait();
    lab.wait_for_no_process();
    assert_eq!(lab.ok(&["ls", "-q"]), "");
    lab.ok(&["rm", "victim"]);
    lab.finish();
}

/// The command that started a detached VM dies before the VM runs: the VM is its own owner's.
#[test]
fn a_detached_vm_outlives_the_command_that_started_it() {
    let Some(lab) = Lab::new() else { return };
    let running = lab.start(&[
        "run",
        "-d",
        "--name",
        "orphan",
        IMAGE,
        "sh",
        "-c",
        "trap 'exit 0' TERM; while :; do sleep 1000 & wait; done",
    ]);
    lab.wait_for_record("of 'orphan' that boots", |record| {
        record["name"] == "orphan" && record["state"] != "created"
    });
    running.signal(Signal::KILL);
    running.wait();
    lab.wait_for_state("orphan", "running");
    assert_eq!(lab.sh("orphan", "echo alive"), "alive\n");
    assert_eq!(lab.ok(&["stop", "orphan"]), "orphan\n");
    lab.ok(&["rm", "orphan"]);
    lab.finish();
}

#[test]
fn hypervisor_killed_while_the_container_runs() {
    let Some(lab) = Lab::new() else { return };
    let running = lab.start(&[
        "run",
        "--name",
        "victim",
        IMAGE,
        "sh",
        "-c",
        "echo ready; sleep 1000",
    ]);
    running.stdout.wait_for("ready\n");
    kill_process(lab.the_hypervisor(), Signal::KILL).unwrap();
    let output = running.wait();
    assert_eq!(output.text(), "ready\n");
    let line = crate::lab::one_error(output, 125, "a run whose hypervisor was killed");
    assert!(line.contains("victim") && line.contains("lost"), "{line}");
    lab.wait_for_no_process();
    let listed = lab.json(&["ls", "-a", "--format", "json"]);
    assert_eq!(listed[0]["state"], "exited");
    assert!(
        listed[0]["error"].as_str().unwrap().contains("signal"),
        "{listed}"
    );
    assert_eq!(lab.ok(&["logs", "victim"]), "ready\n");
    lab.ok(&["rm", "victim"]);
    lab.finish();
}

#[test]
fn hypervisor_killed_while_the_guest_boots() {
    let Some(mut lab) = Lab::new() else { return };
    lab.agent = base().unwrap().silent_agent.clone();
    let running = lab.start(&["run", "-d", "--name", "victim", IMAGE, "true"]);
    lab.wait_for_state("victim", "booting");
    for hypervisor in lab.hypervisors() {
        kill_process(hypervisor, Signal::KILL).unwrap();
    }
    let line = crate::lab::one_error(
        running.wait(),
        125,
        "a run whose hypervisor was killed at boot",
    );
    assert!(line.contains("did not boot"), "{line}");
    lab.finish();
}

/// The guest crashes by itself.
#[test]
fn a_guest_that_panics_is_a_lost_vm() {
    let Some(lab) = Lab::new() else { return };
    let script = "echo ready; echo c > /proc/sysrq-trigger; sleep 1000";
    let output = lab.fcvm(&[
        "run",
        "--name",
        "victim",
        "--privileged",
        "--network",
        "none",
        IMAGE,
        "sh",
        "-c",
        script,
    ]);
    assert_eq!(output.text(), "ready\n");
    crate::lab::one_error(output, 125, "a run whose guest panicked");
    lab.wait_for_no_process();
    assert!(
        lab.ok(&["logs", "--console", "victim"]).contains("panic"),
        "the panic is on the console"
    );
    lab.ok(&["rm", "victim"]);
    lab.finish();
}

#[test]
fn the_last_writes_are_on_the_disk_when_the_vm_has_ended() {
    // The scratch disk goes with the VM, so the proof is the guest's own: a clean unmount is told on
    // the console where it fails.
    let Some(lab) = Lab::new() else { return };
    let script = "head -c 20000000 /dev/urandom > /data/file; exit 0";
    lab.ok(&[
        "run",
        "--name",
        "wrote",
        "--network",
        "none",
        IMAGE,
        "sh",
        "-c",
        script,
    ]);
    let console = lab.ok(&["logs", "--console", "wrote"]);
    assert!(
        !console.contains("cannot") && !console.contains("failed"),
        "{console}"
    );
    lab.ok(&["rm", "wrote"]);
    lab.finish();
}

/// A process number that was used again is not taken for the owner.
#[test]
fn a_recycled_process_number_is_no_owner() {
    let Some(lab) = Lab::new() else { return };
    lab.ok(&["run", "--name", "ended", "--network", "none", IMAGE, "true"]);
    let record = &lab.records()[0];
    let path = lab
        .data
        .join("vms")
        .join(record["id"].as_str().unwrap())
        .join("record.json");
    let mut forged = record.clone();
    forged["state"] = "running".into();
    // This test's own number, with a start that is not its own.
    forged["owner"] = serde_json::json!({"pid": std::process::id(), "start_ticks": 1});
    fs::write(&path, forged.to_string()).unwrap();
    assert_eq!(lab.ok(&["ls", "-q"]), "");
    assert_eq!(lab.ok(&["rm", "ended"]), "ended\n");
    lab.finish();
}
