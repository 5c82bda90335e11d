//! Start-up caches: `run --warm` restores what an earlier run or `prepare` has kept, and boots otherwise.

use std::collections::HashSet;
use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use rustix::process::Signal;
use serde_json::Value;

use crate::base::IMAGE;
use crate::lab::Lab;
use crate::network::free_port;
use crate::process::limit;

/// Starts at once, is of use a little later, and ends when it is told to.
const SERVICE: &str = "trap 'exit 0' TERM; echo starting; sleep 0.3; echo up > /dev/shm/up; \
                       echo up > /root/up; while :; do sleep 1000 & wait; done";
/// What the service is asked by a health check.
const CHECK: &str = "--health-check=test -e /root/up";

/// Starts the service in the background.
fn run_warm(lab: &Lab, name: &str, options: &[&str]) -> Value {
    let begin = ["run", "--warm", "-d", "--name", name, "--network", "none"];
    lab.ok(&[&begin, options, &[IMAGE, "sh", "-c", SERVICE]].concat());
    lab.json(&["inspect", name])[0].clone()
}

fn prepare(lab: &Lab, options: &[&str]) -> Value {
    let begin = ["prepare", "--format", "json", "--network", "none"];
    lab.json(&[&begin, options, &[IMAGE, "sh", "-c", SERVICE]].concat())
}

fn wait_for_cache(lab: &Lab, name: &str, state: &str) -> Value {
    lab.wait_for_record(&format!("of '{name}' with a cache {state}"), |record| {
        record["name"] == name && record["start_cache"]["state"] == state
    })
}

fn caches(lab: &Lab) -> Vec<String> {
    let tags = lab.ok(&["snapshot", "ls", "-q"]);
    tags.lines().map(str::to_owned).collect()
}

#[test]
fn the_second_run_continues_from_the_started_state_of_the_first() {
    let Some(lab) = Lab::new() else { return };
    // The kernel makes the boot's id when it is first read.
    let serve = "trap 'exit 0' TERM; cat /proc/sys/kernel/random/boot_id > /dev/shm/state; echo hello > /tmp/data; \
                 while :; do nc -l -p 80 -e cat /tmp/data & wait; done";
    let run = |name: &str, port: u16, detach: bool| {
        let publish = format!("127.0.0.1:{port}:80");
        let mut command = vec!["run", "--warm", "--name", name, "-p", &publish];
        command.extend(["--health-check", "test -s /tmp/data"]);
        command.extend(detach.then_some("-d"));
        command.extend([IMAGE, "sh", "-c", serve]);
        lab.start(&command)
    };
    assert_eq!(run("first", free_port(), true).wait().code, 0);
    let first = wait_for_cache(&lab, "first", "kept");
    let tag = first["start_cache"]["tag"].as_str().unwrap();
    assert_eq!(caches(&lab), [tag]);
    // The first goes on as if nothing had been.
    let boot_id = lab.sh("first", "cat /proc/sys/kernel/random/boot_id");
    let random = "head -c 16 /dev/urandom | od -An -tx1; cat /dev/shm/state; ls /root";
    lab.sh("first", "echo first > /root/own");

    let ports = [free_port(), free_port()];
    assert_eq!(run("second", ports[0], true).wait().code, 0);
    let third = run("third", ports[1], false);
    lab.wait_for_state("third", "running");
    let mut seen = HashSet::new();
    for (name, port) in [("second", ports[0]), ("third", ports[1])] {
        let record = &lab.json(&["inspect", name])[0];
        assert_eq!(record["start_cache"]["state"], "restored", "{record}");
        assert_eq!(record["lineage"]["snapshot"], tag, "{record}");
        assert_eq!(record["lineage"]["parent_name"], "first", "{record}");
        let timings = record["start_timings"].as_array().unwrap();
        for stage in ["image", "start-up cache", "load", "resume", "agent"] {
            assert!(
                timings.iter().any(|timing| timing["stage"] == stage),
                "{record}"
            );
        }
        assert!(
            timings.iter().all(|timing| timing["stage"] != "boot"),
            "{record}"
        );
        assert_eq!(lab.sh(name, "cat /proc/sys/kernel/random/boot_id"), boot_id);
        let id = record["id"].as_str().unwrap();
        assert_eq!(lab.sh(name, "hostname"), format!("{}\n", &id[..12]));
        let said = lab.sh(name, random);
        assert!(!said.contains("own"), "{said}");
        assert!(
            seen.insert(said.lines().next().unwrap().to_owned()),
            "{said}"
        );
        assert_eq!(ask(port), "hello\n");
        lab.wait_for_record("healthy", |record| {
            record["name"] == name && record["health"] == "healthy"
        });
    }
    lab.ok(&["stop", "-a"]);
    assert_eq!(third.wait().code, 0);
    // It needs none of them, and nothing needs it.
    lab.ok(&["rm", "-a"]);
    assert_eq!(run("fourth", free_port(), true).wait().code, 0);
    wait_for_cache(&lab, "fourth", "restored");
    lab.ok(&["snapshot", "create", "fourth", "--tag", "own"]);
    let pruned = lab.ok(&["system", "prune", "--force", "--warm"]);
    assert!(pruned.contains(tag), "{pruned}");
    assert_eq!(caches(&lab), ["own"]);
    lab.ok(&["rm", "-f", "fourth"]);
    lab.ok(&["snapshot", "rm", "own"]);
    lab.finish();
}

/// What the service says. It may not listen yet: its state was kept when its data was there.
fn ask(port: u16) -> String {
    let deadline = std::time::Instant::now() + limit();
    let mut answer = String::new();
    while answer.is_empty() && std::time::Instant::now() < deadline {
        let mut stream = TcpStream::connect(("127.0.0.1", port)).unwrap();
        stream.set_read_timeout(Some(limit())).unwrap();
        // A guest that does not listen ends the connection, in whichever step.
        let _ = stream
            .write_all(b"\n")
            .and_then(|()| stream.read_to_string(&mut answer));
    }
    answer
}

#[test]
fn another_environment_or_machine_is_another_started_state() {
    let Some(lab) = Lab::new() else { return };
    let made = prepare(&lab, &["--memory", "128m", "-e", "A=1"]);
    assert_eq!(made["was_there"], false, "{made}");
    let same = run_warm(
        &lab,
        "same",
        &["--memory", "128m", "-e", "A=1", "-l", "x=y"],
    );
    assert_eq!(same["start_cache"]["tag"], made["tag"]);
    assert_eq!(same["start_cache"]["state"], "restored");
    let mut tags = HashSet::from([made["tag"].to_string()]);
    for (name, options) in [
        ("env", ["--memory", "128m", "-e", "A=2"]),
        ("memory", ["--memory", "129m", "-e", "A=1"]),
    ] {
        let other = run_warm(&lab, name, &options);
        assert_ne!(other["start_cache"]["state"], "restored", "{other}");
        assert!(
            tags.insert(other["start_cache"]["tag"].to_string()),
            "{other}"
        );
        wait_for_cache(&lab, name, "kept");
    }
    assert_eq!(caches(&lab).len(), 3);
    lab.ok(&["rm", "-f", "-a"]);
    lab.ok(&["system", "prune", "--force", "--warm"]);
    lab.finish();
}

/// Whatever is wrong with the cache, the VM runs, one line says so, and the cache is made anew.
#[test]
fn a_cache_that_cannot_be_used_is_replaced() {
    let Some(lab) = Lab::new() else { return };
    let tag = prepare(&lab, &[])["tag"].as_str().unwrap().to_owned();
    let folder = lab.data.join("snapshots").join(&tag);
    let id = || lab.json(&["snapshot", "inspect", "--verify", &tag])[0]["id"].to_string();
    let other = format!("made by {} 1.2.3", lab.hypervisor.title());
    for (what, expected) in [
        ("memory.pages", "damaged"),
        ("state.bin", "checksum"),
        ("hypervisor", other.as_str()),
        ("container", "another container"),
    ] {
        let before = id();
        match what {
            "hypervisor" => crate::snapshot::change_manifest(&folder, |snapshot| {
                let member = format!("{}_version", lab.hypervisor.name());
                let version = &mut snapshot["fields"]["device_line"][member];
                *version = serde_json::json!({"major": 1, "minor": 2, "micro": 3});
            }),
            "container" => crate::snapshot::change_manifest(&folder, |snapshot| {
                snapshot["fields"]["spec"]["warm"] = "0".repeat(64).into();
            }),
            file => flip(&folder.join(file), 5000),
        }
        let running = lab.start(&[
            "run",
            "--warm",
            "--name",
            "vm",
            "--network",
            "none",
            IMAGE,
            "sh",
            "-c",
            SERVICE,
        ]);
        wait_for_cache(&lab, "vm", "kept");
        assert_ne!(id(), before, "{what}");
        lab.ok(&["stop", "vm"]);
        let output = running.wait();
        let [line] = output.stderr.lines().collect::<Vec<_>>()[..] else {
            panic!("{what}: {output:?}")
        };
        assert!(
            line.contains("the start-up cache cannot be used") && line.contains(expected),
            "{what}: {line}"
        );
        assert_eq!((output.code, output.text().as_str()), (0, "starting\n"));
        lab.ok(&["rm", "vm"]);
    }
    assert_eq!(
        run_warm(&lab, "last", &[])["start_cache"]["state"],
        "restored"
    );
    lab.ok(&["rm", "-f", "last"]);
    lab.ok(&["snapshot", "rm", &tag]);
    lab.finish();
}

fn flip(path: &PathBuf, offset: u64) {
    let file = fs::File::options()
        .read(true)
        .write(true)
        .open(path)
        .unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, offset).unwrap();
    file.write_all_at(&[byte[0] ^ 1], offset).unwrap();
}

#[test]
fn prepare_leaves_a_cache_and_no_vm() {
    let Some(lab) = Lab::new() else { return };
    // Two at once: one of them makes it, and both tell of the same.
    let command = [
        "prepare",
        "--format",
        "json",
        "--network",
        "none",
        CHECK,
        IMAGE,
        "sh",
        "-c",
        SERVICE,
    ];
    let both = [lab.start(&command), lab.start(&command)].map(|running| {
        let output = running.wait();
        assert_eq!((output.code, output.stderr.as_str()), (0, ""), "{output:?}");
        serde_json::from_slice::<Value>(&output.stdout).unwrap()
    });
    assert_eq!(both[0]["id"], both[1]["id"]);
    assert_eq!(lab.ok(&["ls", "-a", "-q"]), "");
    lab.wait_for_no_process();
    assert_eq!(prepare(&lab, &[CHECK])["was_there"], true);
    let again = lab.ok(&[&command[..1], &command[3..]].concat());
    assert!(again.contains("is there already"), "{again}");
    // Kept at the first success.
    let record = run_warm(&lab, "vm", &[CHECK]);
    assert_eq!(record["start_cache"]["state"], "restored");
    assert_eq!(lab.sh("vm", "cat /root/up /dev/shm/up"), "up\nup\n");
    lab.ok(&["rm", "-f", "vm"]);
    lab.ok(&["system", "prune", "--force"]);
    let tag = both[0]["tag"].as_str().unwrap();
    assert_eq!(caches(&lab), [tag], "a cache that is of use stays");
    let listed = lab.json(&["system", "df", "--format", "json"]);
    let of_snapshots = &listed
        .as_array()
        .unwrap()
        .iter()
        .find(|row| row["kind"] == "Snapshots");
    assert!(
        of_snapshots.unwrap()["reclaimable_bytes"].as_u64().unwrap() > 1 << 20,
        "{listed}"
    );
    let pruned = lab.ok(&["system", "prune", "--force", "--warm"]);
    assert!(
        pruned.contains(&format!("Removed start-up cache {tag}")),
        "{pruned}"
    );
    assert_eq!(caches(&lab), [] as [String; 0]);

    // What cannot be prepared. The health check holds the moment back that is kept until the container has ended.
    let ends = [
        "prepare",
        "--network",
        "none",
        CHECK,
        IMAGE,
        "sh",
        "-c",
        "exit 3",
    ];
    let line = lab.fails(125, &ends);
    assert!(line.contains("code 3"), "{line}");
    let check = "--health-check=false";
    let line = lab.fails(
        125,
        &[
            "prepare",
            "--network",
            "none",
            check,
            "--health-retries=1",
            IMAGE,
            "sh",
            "-c",
            SERVICE,
        ],
    );
    assert!(line.contains("the health check has failed"), "{line}");
    let killed = lab.start(&["prepare", "--network", "none", IMAGE, "sh", "-c", SERVICE]);
    lab.wait_for_record("of the VM", |record| record["state"] == "running");
    killed.signal(Signal::KILL);
    killed.wait();
    for option in ["-i", "-t"] {
        let line = lab.fails(125, &["run", "--warm", option, IMAGE, "true"]);
        assert!(line.contains("--warm"), "{line}");
    }
    let reserved = "warm-0123456789abcdef";
    let line = lab.fails(125, &["snapshot", "create", "nobody", "--tag", reserved]);
    assert!(line.contains("start-up caches"), "{line}");
    lab.ok(&["system", "prune", "--force", "--warm"]);
    lab.finish();
}
