//! Snapshots: kept, started from, served, and what is refused of them.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use crate::base::IMAGE;
use crate::lab::Lab;
use crate::process::wait_gone;

fn snapshot_files(lab: &Lab, tag: &str) -> PathBuf {
    lab.data.join("snapshots").join(tag)
}

#[test]
fn snapshots_outlive_their_vms_and_are_started_from() {
    let Some(lab) = Lab::new() else { return };
    lab.idle_vm("source", &["--memory", "128m"]);
    lab.sh(
        "source",
        "echo one > /root/file; echo one > /dev/shm/state; sync",
    );
    let id = lab.ok(&["snapshot", "create", "source", "--tag", "first", "--verify"]);
    // The source goes on, and nothing is left of the trial.
    assert_eq!(lab.sh("source", "cat /dev/shm/state"), "one\n");
    assert_eq!(lab.ok(&["ls", "-a", "-q"]).lines().count(), 1);
    let listed = lab.json(&["snapshot", "ls", "--format", "json"]);
    assert_eq!(listed[0]["tag"], "first", "{listed}");
    assert_eq!(listed[0]["id"], id.trim());
    assert_eq!(listed[0]["memory_kind"], "whole");
    let whole = listed[0]["memory_stored_bytes"].as_u64().unwrap();
    assert!(whole < 128 << 20, "zero pages are stored: {whole}");
    assert!(lab.ok(&["snapshot", "ls"]).contains("first"));
    lab.ok(&["rm", "-f", "source"]);

    lab.ok(&["snapshot", "run", "--snapshot", "first", "--name", "copy"]);
    assert_eq!(
        lab.sh("copy", "cat /root/file /dev/shm/state"),
        "one\none\n"
    );
    lab.sh(
        "copy",
        "echo two > /root/file; echo two > /dev/shm/state; sync",
    );
    // A snapshot of a clone stores what differs, to any depth, also through a fork.
    lab.ok(&["snapshot", "create", "copy", "--tag", "second"]);
    lab.ok(&["fork", "copy", "--name", "fork"]);
    lab.sh(
        "fork",
        "echo three > /root/file; echo three > /dev/shm/state; sync",
    );
    lab.ok(&["snapshot", "create", "fork", "--tag", "third", "--verify"]);
    lab.ok(&["rm", "-f", "copy", "fork"]);
    for (tag, parent) in [("second", "first"), ("third", "first")] {
        let row = &lab.json(&["snapshot", "inspect", "--verify", tag])[0];
        assert_eq!(
            (&row["memory_kind"], &row["parent"]),
            (&"difference".into(), &parent.into()),
            "{row}"
        );
        let stored = row["memory_stored_bytes"].as_u64().unwrap();
        assert!(stored < whole / 2, "{stored} of {whole}");
    }
    let said = lab.json(&[
        "snapshot",
        "run",
        "--snapshot",
        "third",
        "-n",
        "3",
        "--name",
        "many",
        "--rm",
        "--exec",
        "cat /root/file /dev/shm/state; cat /proc/sys/kernel/random/uuid",
        "--format",
        "json",
    ]);
    let clones = said["clones"].as_array().unwrap();
    let texts: std::collections::HashSet<&str> = clones
        .iter()
        .map(|clone| clone["stdout"].as_str().unwrap())
        .collect();
    assert_eq!(texts.len(), 3, "{said}");
    assert!(
        texts.iter().all(|text| text.starts_with("three\nthree\n")),
        "{said}"
    );
    let record = &lab.json(&["inspect", "many-2"])[0];
    assert_eq!(record["lineage"]["snapshot"], "third");
    assert_eq!(record["lineage"]["parent_name"], "fork");
    assert_eq!(
        lab.ok(&[
            "snapshot",
            "run",
            "--snapshot",
            "second",
            "--name",
            "old",
            "--exec",
            "cat /root/file"
        ]),
        "old: two\n"
    );
    lab.ok(&["rm", "-f", "-a"]);

    // What is still needed stays.
    let refused = lab.fails(125, &["snapshot", "rm", "first"]);
    assert!(
        refused.contains("second")
            && refused.contains("third")
            && refused.contains("--prune-children"),
        "{refused}"
    );
    let refused = lab.fails(125, &["image", "rm", IMAGE]);
    assert!(refused.contains("use"), "{refused}");
    assert_eq!(lab.ok(&["snapshot", "rm", "second"]), "second\n");
    let removed = lab.ok(&["snapshot", "rm", "--prune-children", "first"]);
    assert_eq!(removed.lines().count(), 2, "{removed}");
    assert_eq!(lab.ok(&["snapshot", "ls", "-q"]), "");
    lab.finish();
}

#[test]
fn a_serving_process_starts_clones_which_end_with_it() {
    let Some(lab) = Lab::new() else { return };
    lab.idle_vm("source", &["--network", "none"]);
    lab.sh("source", "echo kept > /dev/shm/state");
    lab.ok(&["snapshot", "create", "source", "--tag", "warm"]);
    lab.ok(&["rm", "-f", "source"]);
    for signal in [Signal::TERM, Signal::KILL] {
        let server = lab.start(&["snapshot", "serve", "warm"]);
        let pid = server.stdout.wait_for("\n").trim().to_owned();
        assert_eq!(pid, server.pid().as_raw_nonzero().to_string());
        for name in ["a", "b"] {
            lab.ok(&["snapshot", "run", "--pid", &pid, "--name", name]);
            assert_eq!(lab.sh(name, "cat /dev/shm/state"), "kept\n");
        }
        // A clone's own clone is a VM of its own.
        lab.ok(&["fork", "a", "--name", "free"]);
        assert!(
            lab.ok(&["ls"])
                .contains(&format!("snapshot warm, served by {pid}"))
        );
        let owners: Vec<Pid> = ["a", "b"].map(|name| owner(&lab, name)).to_vec();
        kill_process(server.pid(), signal).unwrap();
        server.wait();
        assert!(owners.into_iter().all(wait_gone));
        assert_eq!(lab.sh("free", "cat /dev/shm/state"), "kept\n");
        lab.ok(&["rm", "-f", "-a"]);
        let refused = lab.fails(125, &["snapshot", "run", "--pid", &pid, "--name", "late"]);
        assert!(refused.contains("serves no snapshot"), "{refused}");
    }
    let pruned = lab.ok(&["system", "prune", "--force"]);
    assert!(pruned.contains("serve-"), "{pruned}");
    lab.ok(&["snapshot", "rm", "warm"]);
    lab.finish();
}

#[test]
fn a_serving_process_keeps_clones_that_have_run_and_are_nobody_yet() {
    let Some(lab) = Lab::new() else { return };
    lab.idle_vm("source", &["--network", "none"]);
    lab.ok(&["snapshot", "create", "source", "--tag", "warm"]);
    lab.ok(&["rm", "-f", "source"]);
    let server = lab.start(&["snapshot", "serve", "warm", "--standby", "2"]);
    let pid = server.stdout.wait_for("\n").trim().to_owned();
    let ready = |record: &Value| {
        record["state"] == "standby" && stages(record).contains(&"rehearsal".to_owned())
    };
    lab.wait_for_record("a clone that is ready", ready);
    // Nobody's clones are not among the VMs, and a name is theirs only until they are wanted.
    assert!(!lab.ok(&["ls"]).contains("standby"));
    assert!(lab.ok(&["ls", "-a"]).contains("Standby"));
    let ask = "hostname; date +%s; head -c 16 /dev/urandom | od -An -tx1 | tr -d ' \\n'; echo";
    let mut random = std::collections::HashSet::new();
    for count in ["1", "3"] {
        let prefix = format!("of-{count}");
        let answers = lab.json(&[
            "snapshot", "run", "--pid", &pid, "-n", count, "--name", &prefix, "--exec", ask,
            "--format", "json",
        ]);
        let answers = answers["clones"].as_array().unwrap();
        assert_eq!(answers.len().to_string(), count);
        for answer in answers {
            let said = answer["stdout"].as_str().unwrap();
            let said: Vec<&str> = said.lines().collect();
            assert!(
                answer["id"].as_str().unwrap().starts_with(said[0]),
                "{said:?}"
            );
            let late =
                time::OffsetDateTime::now_utc().unix_timestamp() - said[1].parse::<i64>().unwrap();
            assert!((0..30).contains(&late), "the clock is {late} s late");
            assert!(random.insert(said[2].to_owned()), "{said:?}");
        }
    }
    let record = &lab.json(&["inspect", "of-1-1"])[0];
    let names: Vec<&str> = record["start_timings"]
        .as_array()
        .unwrap()
        .iter()
        .map(|timing| timing["stage"].as_str().unwrap())
        .collect();
    assert!(names.contains(&"rehearsal (ahead)"), "{names:?}");
    assert!(names.contains(&"resume"), "{names:?}");
    lab.wait_for_record("another clone that is ready", ready);
    kill_process(server.pid(), Signal::KILL).unwrap();
    server.wait();
    lab.wait_for_no_process();
    lab.ok(&["rm", "-f", "-a"]);
    lab.ok(&["system", "prune", "--force"]);
    lab.ok(&["snapshot", "rm", "warm"]);
    lab.finish();
}

/// The stages that a record knows of.
fn stages(record: &Value) -> Vec<String> {
    let timings = record["timings_us"].as_array().unwrap();
    timings
        .iter()
        .map(|timing| timing[0].as_str().unwrap().to_owned())
        .collect()
}

fn owner(lab: &Lab, name: &str) -> Pid {
    let record = lab.wait_for_state(name, "running");
    Pid::from_raw(i32::try_from(record["owner"]["pid"].as_i64().unwrap()).unwrap()).unwrap()
}

#[test]
fn snapshots_that_cannot_be_are_refused_and_damage_is_found() {
    let Some(lab) = Lab::new() else { return };
    let refused = |arguments: &[&str], expected: &str| {
        let line = lab.fails(125, &[&["snapshot"], arguments].concat());
        assert!(line.contains(expected), "{line}");
    };
    refused(
        &["create", "nobody", "--tag", "a"],
        "no VM is called 'nobody'",
    );
    refused(&["run", "--snapshot", "missing"], "missing");
    refused(&["rm", "missing"], "missing");
    lab.ok(&["snapshot", "rm", "-f", "missing"]);
    refused(&["run", "--pid", "1"], "serves no snapshot");
    lab.idle_vm("source", &["--network", "none"]);
    lab.ok(&["snapshot", "create", "source", "--tag", "good"]);
    refused(&["create", "source", "--tag", "good"], "good");
    lab.ok(&["pause", "source"]);
    refused(&["create", "source", "--tag", "paused"], "is paused");
    lab.ok(&["unpause", "source"]);
    assert_eq!(lab.ok(&["snapshot", "ls", "-q"]), "good\n");
    // A byte of the memory, of the state and of the manifest.
    for (name, offset) in [
        ("memory.pages", 70_000),
        ("state.bin", 5_000),
        ("manifest.json", 200),
    ] {
        let path = snapshot_files(&lab, "good").join(name);
        let file = fs::File::options()
            .read(true)
            .write(true)
            .open(&path)
            .unwrap();
        let mut byte = [0];
        file.read_exact_at(&mut byte, offset).unwrap();
        file.write_all_at(&[byte[0] ^ 1], offset).unwrap();
        refused(&["run", "--snapshot", "good", "--name", "clone"], "damaged");
        file.write_all_at(&byte, offset).unwrap();
    }
    assert_eq!(
        lab.ok(&[
            "snapshot",
            "run",
            "--snapshot",
            "good",
            "--name",
            "clone",
            "--exec",
            "echo here"
        ]),
        "clone: here\n"
    );
    lab.ok(&["rm", "-f", "-a"]);
    lab.ok(&["snapshot", "rm", "good"]);
    lab.finish();
}

/// A creator that is killed leaves nothing that can be seen, and the source goes on.
#[test]
fn a_snapshot_whose_command_is_killed_is_not_there() {
    let Some(lab) = Lab::new() else { return };
    lab.idle_vm("source", &["--network", "none"]);
    lab.sh("source", "echo kept > /dev/shm/state");
    let snapshots = lab.data.join("snapshots");
    for round in 0..4 {
        let command = lab.start(&["snapshot", "create", "source", "--tag", "never", "--verify"]);
        // Killed a little later in each round, as soon as there is so much of it.
        let is_there = |file: &str| {
            fs::read_dir(&snapshots)
                .into_iter()
                .flatten()
                .flatten()
                .any(|entry| {
                    entry.file_name().to_string_lossy().starts_with('.')
                        && entry.path().join(file).exists()
                })
        };
        let file = ["", "state.bin", "memory.pages", "disk-0"][round];
        let deadline = std::time::Instant::now() + crate::process::limit();
        while !is_there(file)
            && std::time::Instant::now() < deadline
            && !snapshots.join("never").exists()
        {
            std::thread::yield_now();
        }
        command.signal(Signal::KILL);
        command.wait();
        assert_eq!(lab.sh("source", "cat /dev/shm/state"), "kept\n");
        if lab.ok(&["snapshot", "ls", "-q"]) == "never\n" {
            // It was quicker than this test.
            lab.ok(&["snapshot", "rm", "never"]);
        }
    }
    lab.ok(&["rm", "-f", "-a"]);
    lab.ok(&["system", "prune", "--force"]);
    lab.finish();
}

/// Changes what the manifest of a snapshot tells, its checksum included.
pub(crate) fn change_manifest(
    folder: &std::path::Path,
    change: impl FnOnce(&mut serde_json::Value),
) {
    let path = folder.join("manifest.json");
    let mut manifest: serde_json::Value =
        serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    change(&mut manifest["snapshot"]);
    let snapshot = manifest["snapshot"].to_string();
    let version = &manifest["version"];
    let sum = crc32c::crc32c(snapshot.as_bytes());
    let text =
        format!("{{\"version\":{version},\"crc32c\":\"{sum:08x}\",\"snapshot\":{snapshot}}}\n");
    fs::write(&path, text).unwrap();
}
