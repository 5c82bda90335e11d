//! Faults while VMs are forked and kept: a full disk, foreign and damaged snapshots, deaths of whoever takes
//! part. A source is lost only with its own processes, and nothing half or orphaned stays.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Instant;

use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

use crate::base::IMAGE;
use crate::lab::{Lab, is_root, one_error};
use crate::process::{self, Output, Running, limit};
use crate::snapshot::change_manifest;

/// Little memory and disk, so that many fit.
const SMALL: [&str; 6] = ["--network", "none", "--memory", "96m", "--disk-size", "64m"];

fn source(lab: &Lab) {
    lab.idle_vm("source", &SMALL);
    lab.sh("source", "echo kept > /dev/shm/state");
}

fn is_alive(lab: &Lab, vm: &str) {
    assert_eq!(lab.sh(vm, "cat /dev/shm/state"), "kept\n");
}

fn pid(record: &Value) -> Pid {
    Pid::from_raw(i32::try_from(record["owner"]["pid"].as_i64().unwrap()).unwrap()).unwrap()
}

/// A command that was killed has said nothing of its own; one that was not has succeeded, or failed in one line.
fn settled(output: Output, what: &str) {
    if ![0, 128 + 9].contains(&output.code) {
        one_error(output, 125, what);
    }
}

/// Removes what lives; whatever else a death has left must go by `prune` alone.
fn clear(lab: &Lab) {
    lab.ok(&["rm", "-f", "-a"]);
    lab.wait_for_no_process();
    lab.ok(&["system", "prune", "--force"]);
    let left = names(&lab.data.join("snapshots"));
    let hidden: Vec<_> = left
        .iter()
        .filter(|name| name.starts_with(".new"))
        .collect();
    assert_eq!(hidden, [] as [&String; 0]);
    assert_eq!(fs::read_dir(&lab.runtime).unwrap().count(), 0);
}

fn names(directory: &Path) -> Vec<String> {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    entries
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect()
}

/// Waits until a file is there, which comes and goes.
pub(crate) fn wait_for(what: &str, is_there: impl Fn() -> bool) {
    let deadline = Instant::now() + limit();
    while !is_there() {
        assert!(Instant::now() < deadline, "waited in vain for {what}");
        std::thread::yield_now();
    }
}

/// A small file system, unmounted with this value.
struct Mounted(PathBuf);

impl Mounted {
    fn small(path: PathBuf) -> Self {
        fs::create_dir_all(&path).unwrap();
        let target = path.to_str().unwrap();
        process::must(
            "mount",
            &["-t", "tmpfs", "-o", "size=24m,mode=700", "fcvm-e2e", target],
        );
        Self(path)
    }

    fn free_bytes(&self) -> u64 {
        rustix::fs::statvfs(&self.0).unwrap().f_bfree
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let path = self.0.to_str().unwrap();
        process::must("umount", &["-l", path]);
    }
}

#[test]
fn a_full_disk_stops_a_snapshot_and_neither_its_source_nor_a_warm_run() {
    let Some(lab) = Lab::new() else { return };
    if !is_root() {
        println!("skipped: only root can mount a small file system");
        return;
    }
    let full = Mounted::small(lab.data.join("snapshots"));
    source(&lab);
    let free = full.free_bytes();
    for _ in 0..2 {
        let line = lab.fails(125, &["snapshot", "create", "source", "--tag", "never"]);
        assert!(line.contains("file system is full"), "{line}");
        is_alive(&lab, "source");
        assert_eq!(lab.ok(&["snapshot", "ls", "-q"]), "");
        assert_eq!(names(&full.0), [".lock"]);
        assert_eq!(full.free_bytes(), free, "space is lost");
    }
    // A clone of it is not written either, and runs on.
    lab.ok(&["fork", "source", "--name", "clone"]);
    lab.fails(125, &["snapshot", "create", "clone", "--tag", "never"]);
    is_alive(&lab, "clone");
    lab.ok(&["rm", "-f", "-a"]);

    let script =
        "echo kept > /dev/shm/state; trap 'exit 0' TERM; while :; do sleep 1000 & wait; done";
    let begin = ["run", "--warm", "-d", "--name", "warm"];
    lab.ok(&[&begin[..], &SMALL, &[IMAGE, "sh", "-c", script]].concat());
    let record = lab.wait_for_record("that is not kept", |record| {
        record["start_cache"]["state"] == "not_kept"
    });
    is_alive(&lab, "warm");
    let id = record["id"].as_str().unwrap();
    let told = fs::read_to_string(lab.data.join("vms").join(id).join("owner.log")).unwrap();
    assert!(
        told.contains("not written") && told.contains("is full"),
        "{told}"
    );
    assert_eq!(names(&full.0), [".lock"]);
    let line = lab.fails(
        125,
        &[&["prepare"], &SMALL[..], &[IMAGE, "sh", "-c", script]].concat(),
    );
    assert!(line.contains("is full"), "{line}");
    lab.ok(&["rm", "-f", "-a"]);
    drop(full);
    lab.finish();
}

/// A change of a manifest.
type Change<'a> = &'a dyn Fn(&mut Value);

#[test]
fn snapshots_of_another_host_or_a_later_fcvm_are_refused() {
    let Some(lab) = Lab::new() else { return };
    source(&lab);
    lab.ok(&["snapshot", "create", "source", "--tag", "kept"]);
    let folder = lab.data.join("snapshots/kept");
    let original = fs::read(folder.join("manifest.json")).unwrap();
    let other = |snapshot: &mut Value| {
        let member = format!("{}_version", lab.hypervisor.name());
        let version = &mut snapshot["fields"]["device_line"][member];
        assert!(!version.is_null());
        *version = json!({"major": 6, "minor": 0, "micro": 1});
    };
    let title = lab.hypervisor.title();
    let other_told = format!("made by {title} 6.0.1 and this is {title}");
    let device = |snapshot: &mut Value| {
        let line = &mut snapshot["fields"]["device_line"];
        match lab.hypervisor.is_qemu() {
            true => line["arguments"][0] = "another-device".into(),
            false => line["disks"][0][0] = "another-disk".into(),
        }
    };
    let device_told = match lab.hypervisor.is_qemu() {
        true => "has 'another-device' where this VM has",
        false => "made with other disks than this VM has",
    };
    let processor = |snapshot: &mut Value| snapshot["fields"]["host_cpu"] = "another one".into();
    let newer = |snapshot: &mut Value| snapshot["fields"]["accelerator"]["kind"] = "later".into();
    let size = |snapshot: &mut Value| {
        snapshot["fields"]["spec"]["memory_bytes"] = (128_u64 << 20).into();
    };
    let root = |snapshot: &mut Value| snapshot["fields"]["spec"]["root_image"] = "/gone".into();
    let changes: [(Change<'_>, &str); 6] = [
        (&other, &other_told),
        (&device, device_told),
        (&processor, "was made on another processor (another one)"),
        (&newer, "that this fcvm does not know"),
        (&root, "the root image of snapshot 'kept' is gone"),
        // What counts is the memory itself, not what is told of it.
        (&size, ""),
    ];
    for (change, expected) in changes {
        change_manifest(&folder, change);
        let run = ["snapshot", "run", "--snapshot", "kept", "--name", "clone"];
        if expected.is_empty() {
            lab.ok(&run);
            is_alive(&lab, "clone");
            lab.ok(&["rm", "-f", "clone"]);
        } else {
            let line = lab.fails(125, &run);
            assert!(line.contains(expected), "{line}");
        }
        fs::write(folder.join("manifest.json"), &original).unwrap();
    }
    let text = String::from_utf8(original.clone()).unwrap();
    let later = text.replacen("\"version\":1", "\"version\":2", 1);
    fs::write(folder.join("manifest.json"), later).unwrap();
    for command in [
        &["snapshot", "run", "--snapshot", "kept"][..],
        &["snapshot", "serve", "kept"],
        &["snapshot", "inspect", "kept"],
    ] {
        let line = lab.fails(125, command);
        assert!(
            line.contains("format version 2") && line.contains("newer fcvm"),
            "{line}"
        );
    }
    fs::write(folder.join("manifest.json"), &original).unwrap();
    // Files that are cut off, or gone.
    let method = lab.json(&["inspect", "source"])[0]["disk_store"]["method"].clone();
    let names = match method.as_str().unwrap() {
        // It has the disk.
        "pool" => &["memory.pages", "state.bin"][..],
        _ => &["memory.pages", "state.bin", "disk-0.raw"],
    };
    for name in names {
        let path = folder.join(name);
        let away = lab.file("away");
        fs::rename(&path, &away).unwrap();
        let line = lab.fails(125, &["snapshot", "run", "--snapshot", "kept"]);
        assert!(line.contains("kept"), "{line}");
        fs::copy(&away, &path).unwrap();
        let length = fs::metadata(&path).unwrap().len();
        fs::File::options()
            .write(true)
            .open(&path)
            .unwrap()
            .set_len(length / 2)
            .unwrap();
        let line = lab.fails(125, &["snapshot", "run", "--snapshot", "kept"]);
        assert!(line.contains("kept"), "{line}");
        fs::rename(&away, &path).unwrap();
    }
    is_alive(&lab, "source");
    lab.ok(&["snapshot", "run", "--snapshot", "kept", "--name", "clone"]);
    is_alive(&lab, "clone");
    lab.ok(&["snapshot", "rm", "kept"]);
    clear(&lab);
    lab.finish();
}

/// The source's owner and its hypervisor, while a fork and a snapshot of it are under way.
#[test]
fn a_source_that_dies_meanwhile_leaves_no_orphan_and_no_half_snapshot() {
    let Some(lab) = Lab::new() else { return };
    for (victim, stage) in [
        ("owner", "clone"),
        ("hypervisor", "clone"),
        ("owner", "draft"),
        ("hypervisor", "draft"),
    ] {
        source(&lab);
        let owner = pid(&lab.wait_for_state("source", "running"));
        let hypervisor = lab.the_hypervisor();
        let command = match stage {
            "clone" => {
                let command = lab.start(&["fork", "source", "-n", "3", "--name", "clone"]);
                lab.wait_for_record("of a clone", |record| {
                    record["name"] != "source" && record["state"] != "created"
                });
                command
            }
            _ => {
                let command = lab.start(&["snapshot", "create", "source", "--tag", "half"]);
                let draft = lab.data.join("snapshots/.new-half");
                wait_for("the draft", || {
                    draft.exists() || lab.data.join("snapshots/half").exists()
                });
                command
            }
        };
        let victims = if victim == "owner" { owner } else { hypervisor };
        kill_process(victims, Signal::KILL).unwrap();
        settled(
            command.wait(),
            &format!("{stage} whose {victim} was killed"),
        );
        // A clone that has its state is a VM of its own; a snapshot is whole or not there.
        if victim == "owner" {
            let listed = lab.json(&["ls", "-a", "--format", "json"]);
            let source = &listed
                .as_array()
                .unwrap()
                .iter()
                .find(|vm| vm["name"] == "source");
            assert_eq!(source.unwrap()["state"], "exited", "{listed}");
        }
        for tag in lab.ok(&["snapshot", "ls", "-q"]).lines() {
            lab.ok(&["snapshot", "inspect", "--verify", tag]);
            lab.ok(&["snapshot", "rm", tag]);
        }
        clear(&lab);
    }
    lab.finish();
}

/// Kills a command that starts clones of a snapshot at every stage of theirs.
#[test]
fn commands_that_start_clones_of_snapshots_may_die_at_every_stage() {
    let Some(lab) = Lab::new() else { return };
    source(&lab);
    lab.ok(&["snapshot", "create", "source", "--tag", "kept"]);
    lab.ok(&["rm", "-f", "source"]);
    for stage in ["started", "created", "booting", "running"] {
        let command = lab.start(&["snapshot", "run", "--snapshot", "kept", "-n", "2"]);
        kill_at(&lab, command, stage);
        // Each clone either has its state, or ends with the command that had it.
        settle(&lab);
        for vm in lab.ok(&["ls", "-q"]).lines() {
            is_alive(&lab, vm);
        }
        clear(&lab);

        // The serving process: all end with it.
        let server = lab.start(&["snapshot", "serve", "kept"]);
        let pid = match stage {
            "started" => "0".to_owned(),
            _ => server.stdout.wait_for("\n").trim().to_owned(),
        };
        let command =
            (stage != "started").then(|| lab.start(&["snapshot", "run", "--pid", &pid, "-n", "2"]));
        kill_at(&lab, server, stage);
        if let Some(command) = command {
            settled(
                command.wait(),
                &format!("the server killed when a clone was {stage}"),
            );
        }
        lab.wait_for_no_process();
        assert_eq!(lab.ok(&["ls", "-q"]), "");
        lab.ok(&["system", "prune", "--force"]);
        clear(&lab);
    }
    assert_eq!(lab.ok(&["snapshot", "rm", "kept"]), "kept\n");
    lab.finish();
}

fn kill_at(lab: &Lab, command: Running, stage: &str) {
    if stage != "started" {
        lab.wait_for_record(stage, |record| {
            record["state"] == stage || record["state"] == "running"
        });
    }
    command.signal(Signal::KILL);
    command.wait();
}

/// Waits until every VM runs or is gone.
fn settle(lab: &Lab) {
    let is_settled = |record: &Value| record["state"] == "running" || record["state"] == "exited";
    wait_for("all VMs to run or end", || {
        let records = lab.json(&["ls", "-a", "--format", "json"]);
        // An owner that has not entered its record yet is a process that has no VM.
        let processes = lab.processes();
        let is_owner = |command: &str| command.split(' ').any(|word| word == "owner");
        let owners = processes.iter().filter(|(_, command)| is_owner(command));
        let records = records.as_array().unwrap();
        let alive = records.iter().filter(|record| record["state"] == "running");
        records.iter().all(is_settled) && alive.count() == owners.count()
    });
}

/// Commands that do not know of each other.
fn fork_at_once(lab: &Lab, count: usize) {
    source(lab);
    let commands: Vec<Running> = (0..count)
        .map(|number| {
            let name = format!("clone{number}");
            let exec = "cat /dev/shm/state /proc/sys/kernel/random/uuid";
            lab.start(&["fork", "source", "--name", &name, "--exec", exec])
        })
        .collect();
    let mut seen = std::collections::HashSet::new();
    for command in commands {
        let output = command.wait();
        assert!(output.code == 0 && output.stderr.is_empty(), "{output:?}");
        let text = output.text();
        let (name, said) = text.split_once(": ").unwrap();
        assert!(said.starts_with("kept\n"), "{name}: {said}");
        let uuid = said.rsplit(": ").next().unwrap();
        assert!(seen.insert(uuid.to_owned()), "{uuid} came twice");
    }
    assert_eq!(lab.ok(&["ls", "-q"]).lines().count(), count + 1);
    is_alive(lab, "source");
    clear(lab);
}

#[test]
fn twenty_forks_at_once() {
    let Some(lab) = Lab::new() else { return };
    fork_at_once(&lab, 20);
    lab.finish();
}

#[test]
#[ignore = "takes minutes: cargo test -p fcvm --test e2e -- --ignored hundred"]
fn a_hundred_forks_at_once() {
    let Some(lab) = Lab::new() else { return };
    fork_at_once(&lab, 100);
    lab.finish();
}
