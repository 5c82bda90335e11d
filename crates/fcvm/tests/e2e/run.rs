//! `fcvm run`: exit codes, streams, signals, what the flags give the container.

use std::fs;

use rustix::process::Signal;

use crate::base::{ENTRY_IMAGE, IMAGE};
use crate::lab::{Lab, one_error};
use crate::process::run_with_input;

#[test]
fn the_exit_code_is_the_containers() {
    let Some(lab) = Lab::new() else { return };
    let run = |arguments: &[&str]| {
        lab.fcvm(&[&["run", "--rm", "--network", "none", IMAGE], arguments].concat())
    };
    let output = run(&["sh", "-c", "exit 7"]);
    assert_eq!((output.code, output.stderr.as_str()), (7, ""));
    lab.finish();
}

#[test]
fn a_command_that_cannot_start_is_127_or_126() {
    let Some(lab) = Lab::new() else { return };
    let run = ["run", "--rm", "--network", "none", IMAGE];
    let line = lab.fails(127, &[&run[..], &["no-such-program"]].concat());
    assert!(line.contains("no-such-program"), "{line}");
    let line = lab.fails(126, &[&run[..], &["/data/text"]].concat());
    assert!(line.contains("/data/text"), "{line}");
    // Detached it is the same, told by the owner.
    let line = lab.fails(
        127,
        &["run", "-d", "--name", "gone", IMAGE, "/no/such/program"],
    );
    assert!(line.contains("/no/such/program"), "{line}");
    lab.finish();
}

#[test]
fn standard_streams_are_kept_apart() {
    let Some(lab) = Lab::new() else { return };
    let script = "cat; echo to stderr >&2; printf 'no newline'; exit 3";
    let arguments = [
        "run",
        "-i",
        "--rm",
        "--network",
        "none",
        IMAGE,
        "sh",
        "-c",
        script,
    ];
    let input: Vec<u8> = (0..100_000_u32).flat_map(u32::to_le_bytes).collect();
    let output = run_with_input(lab.command(&arguments), &input);
    assert_eq!((output.code, output.stderr.as_str()), (3, "to stderr\n"));
    assert!(
        output.stdout.strip_suffix(b"no newline") == Some(&input),
        "{} bytes came back",
        output.stdout.len()
    );
    // Without -i the container's input is empty, whatever the command's is.
    let output = run_with_input(
        lab.command(&["run", "--rm", "--network", "none", IMAGE, "cat"]),
        b"not for it",
    );
    assert_eq!((output.code, output.text().as_str()), (0, ""));
    lab.finish();
}

/// What the container of one VM sees of nearly all flags.
#[test]
fn flags_reach_the_container() {
    let Some(lab) = Lab::new() else { return };
    let env_file = lab.write("env", "# comment\nFROM_FILE=1\nBOTH=file\n");
    let cidfile = lab.file("cid").to_str().unwrap().to_owned();
    let script = "echo $FROM_IMAGE $FROM_FILE $BOTH \"$SPACES\" $FROM_HOST; hostname; cat /proc/sys/kernel/hostname; \
        pwd; id -u; id -g; id -G; ulimit -Sn; ulimit -Hn; ulimit -c; grep Cap /proc/self/status; \
        grep NoNewPrivs /proc/self/status; grep peer /etc/hosts; nproc; echo $container; cat /etc/machine-id; \
        grep MemTotal /proc/meminfo; df -k / | tail -1; echo $$; hostname > /tmp/written; cat /tmp/written";
    let mut command = lab.command(&[
        "run",
        "--name",
        "flags",
        "-e",
        "BOTH=flag",
        "-e",
        "SPACES=a b  c",
        "-e",
        "FROM_HOST",
        "-e",
        "NOT_SET_ON_HOST",
        "--env-file",
        &env_file,
        "--workdir",
        "/data",
        "--user",
        "app",
        "--hostname",
        "lab-1",
        "--ulimit",
        "nofile=100:200",
        "--ulimit",
        "core=0",
        "--cap-drop",
        "ALL",
        "--cap-add",
        "NET_RAW",
        "--security-opt",
        "no-new-privileges",
        "--add-host",
        "peer:192.0.2.7",
        "--label",
        "tier=test",
        "--label",
        "bare",
        "--cidfile",
        &cidfile,
        "--cpus",
        "2",
        "--memory",
        "300m",
        "--disk-size",
        "64m",
        "--network",
        "none",
        IMAGE,
        "sh",
        "-c",
        script,
    ]);
    command
        .env("FROM_HOST", "host")
        .env_remove("NOT_SET_ON_HOST");
    let output = crate::process::run(command);
    assert_eq!((output.code, output.stderr.as_str()), (0, ""), "{output:?}");
    let id = fs::read_to_string(&cidfile).unwrap();
    let text = output.text();
    let lines: Vec<&str> = text.lines().collect();
    let expected = [
        "yes 1 flag a b  c host",
        "lab-1",
        "lab-1",
        "/data",
        "1000",
        "1000",
        "1000 29",
        "100",
        "200",
        "0",
    ];
    assert_eq!(lines[..10], expected, "{text}");
    // CAP_NET_RAW is number 13: kept in the bounding set, and an ordinary user has it from the
    // ambient set or not at all.
    assert!(text.contains("CapBnd:\t0000000000002000\n"), "{text}");
    assert!(text.contains("NoNewPrivs:\t1\n"), "{text}");
    assert!(
        text.contains("192.0.2.7\tpeer") || text.contains("192.0.2.7 peer"),
        "{text}"
    );
    let rest = &lines[lines.iter().position(|line| line.contains("peer")).unwrap() + 1..];
    assert_eq!(rest[..3], ["2", "fcvm", id.as_str()], "{text}");
    let memory_kib: u64 = rest[3].split_whitespace().nth(1).unwrap().parse().unwrap();
    assert!((200 << 10..300 << 10).contains(&memory_kib), "{text}");
    let disk_kib: u64 = rest[4].split_whitespace().nth(1).unwrap().parse().unwrap();
    assert!((40 << 10..64 << 10).contains(&disk_kib), "{text}");
    assert_eq!(rest[5..], ["1", "lab-1"], "{text}");

    // The VM has ended and is still there, with its labels.
    let listed = lab.json(&[
        "ls",
        "-a",
        "--filter",
        "label=tier=test",
        "--format",
        "json",
    ]);
    assert_eq!(listed[0]["id"], id.as_str());
    assert_eq!(
        listed[0]["labels"],
        serde_json::json!({"tier": "test", "bare": ""})
    );
    assert_eq!(
        lab.json(&[
            "ls",
            "-a",
            "--filter",
            "label=tier=other",
            "--format",
            "json"
        ]),
        serde_json::json!([])
    );
    // An existing file is not overwritten, and nothing is started.
    let line = lab.fails(125, &["run", "--rm", "--cidfile", &cidfile, IMAGE, "true"]);
    assert!(line.contains(&cidfile), "{line}");
    assert_eq!(fs::read_to_string(&cidfile).unwrap(), id);
    lab.ok(&["rm", "flags"]);
    lab.finish();
}

#[test]
fn entrypoint_command_and_user_come_from_the_image() {
    let Some(lab) = Lab::new() else { return };
    let run = |options: &[&str], command: &[&str]| {
        lab.ok(&[
            &["run", "--rm", "--network", "none"],
            options,
            &[ENTRY_IMAGE],
            command,
        ]
        .concat())
    };
    assert_eq!(run(&[], &["given", "words"]), "entry given words\n");
    let script = "echo $GREETING; id -un; pwd; cat /data/second";
    assert_eq!(
        run(&["--entrypoint", "/bin/sh"], &["-c", script]),
        "hello\napp\n/home/app\nsecond layer\n"
    );
    assert_eq!(
        run(
            &["--entrypoint", r#"["/bin/echo", "a  b"]"#, "--user", "0"],
            &["c"]
        ),
        "a  b c\n"
    );
    lab.finish();
}

#[test]
fn a_read_only_container_writes_to_its_temporary_directories_only() {
    let Some(lab) = Lab::new() else { return };
    let script = "touch /data/x 2>&1; touch /x 2>&1; echo 1 > /tmp/x && cat /tmp/x; touch /run/x /dev/shm/x && echo both";
    let text = lab.ok(&[
        "run",
        "--rm",
        "--read-only",
        "--network",
        "none",
        IMAGE,
        "sh",
        "-c",
        script,
    ]);
    assert_eq!(text.matches("Read-only file system").count(), 2, "{text}");
    assert!(text.ends_with("1\nboth\n"), "{text}");
    lab.finish();
}

#[test]
fn the_container_is_confined_and_a_privileged_one_is_not() {
    let Some(lab) = Lab::new() else { return };
    let script = "(mkdir -p /mnt; mount -t tmpfs none /mnt && echo mounted; mknod /tmp/vda b 254 0 && head -c 4 /tmp/vda; \
        echo 1 > /proc/sys/kernel/sysrq && echo written; ip link set lo down && echo down) 2>/dev/null; ps -o comm | grep -c fc-agent; true";
    let run = |options: &[&str]| {
        lab.ok(&[
            &["run", "--rm", "--network", "none"],
            options,
            &[IMAGE, "sh", "-c", script],
        ]
        .concat())
    };
    assert_eq!(run(&[]), "0\n");
    assert_eq!(run(&["--privileged"]), "mounted\nwritten\ndown\n0\n");
    lab.finish();
}

#[test]
fn signals_reach_a_container_in_the_foreground() {
    let Some(lab) = Lab::new() else { return };
    let script = "trap 'echo usr1' USR1; trap 'echo int; exit 42' INT; echo ready; while :; do sleep 1000 & wait; done";
    let running = lab.start(&["run", "--name", "front", IMAGE, "sh", "-c", script]);
    running.stdout.wait_for("ready\n");
    running.signal(Signal::USR1);
    running.stdout.wait_for("usr1\n");
    running.signal(Signal::INT);
    let output = running.wait();
    assert_eq!(
        (output.code, output.text().as_str()),
        (42, "ready\nusr1\nint\n")
    );

    // A process 1 without a handler is not ended by SIGTERM in its namespace: the grace period does.
    let running = lab.start(&[
        "run",
        "--rm",
        "--stop-timeout",
        "1",
        IMAGE,
        "sh",
        "-c",
        "echo ready; exec sleep 1000",
    ]);
    running.stdout.wait_for("ready\n");
    running.signal(Signal::TERM);
    assert_eq!(running.wait().code, 137);
    assert_eq!(
        lab.json(&["ls", "-a", "--format", "json"])[0]["exit_code"],
        42
    );
    lab.ok(&["rm", "front"]);
    lab.finish();
}

#[test]
fn an_interrupted_start_leaves_nothing() {
    let Some(mut lab) = Lab::new() else { return };
    lab.agent = crate::base::base().unwrap().silent_agent.clone();
    let running = lab.start(&["run", "--name", "early", IMAGE, "true"]);
    lab.wait_for_state("early", "booting");
    running.signal(Signal::INT);
    let line = one_error(running.wait(), 130, "an interrupted run");
    assert!(line.contains("early"), "{line}");
    lab.finish();
}

#[test]
fn two_runs_with_one_name_give_one_vm() {
    let Some(lab) = Lab::new() else { return };
    let arguments = ["run", "-d", "--name", "twin", IMAGE, "sleep", "1000"];
    let both = [lab.start(&arguments), lab.start(&arguments)].map(|running| running.wait());
    let (won, lost): (Vec<_>, Vec<_>) = both.into_iter().partition(|output| output.code == 0);
    assert_eq!((won.len(), lost.len()), (1, 1), "{won:?} {lost:?}");
    let line = one_error(lost.into_iter().next().unwrap(), 125, "the second run");
    assert!(line.contains("the name 'twin' is in use"), "{line}");
    let listed = lab.json(&["ls", "--format", "json"]);
    assert_eq!(listed.as_array().unwrap().len(), 1);
    assert_eq!(listed[0]["id"], won[0].text().trim());
    // The name is taken for a later one as well, and free again when the VM is gone.
    let line = lab.fails(125, &arguments);
    assert!(line.contains("fcvm rm twin"), "{line}");
    lab.ok(&["rm", "-f", "twin"]);
    assert_eq!(
        lab.ok(&[
            "run",
            "--rm",
            "--name",
            "twin",
            "--network",
            "none",
            IMAGE,
            "echo",
            "again"
        ]),
        "again\n"
    );
    lab.finish();
}

#[test]
fn podman_run_is_run() {
    let Some(lab) = Lab::new() else { return };
    assert_eq!(
        lab.ok(&[
            "podman",
            "run",
            "--rm",
            "--network=none",
            "-m",
            "256m",
            IMAGE,
            "echo",
            "same"
        ]),
        "same\n"
    );
    lab.finish();
}

#[test]
fn the_clock_of_the_guest_is_right() {
    let Some(lab) = Lab::new() else { return };
    let seconds = || {
        std::time::SystemTime::UNIX_EPOCH
            .elapsed()
            .unwrap()
            .as_secs()
    };
    let before = seconds();
    let text = lab.ok(&["run", "--rm", "--network", "none", IMAGE, "date", "+%s"]);
    let guest: u64 = text.trim().parse().unwrap();
    assert!(
        (before..=seconds()).contains(&guest),
        "the guest has {guest}, the host {before} to {}",
        seconds()
    );
    lab.finish();
}

#[test]
fn a_reader_that_leaves_ends_the_run() {
    let Some(lab) = Lab::new() else { return };
    let pipeline = format!(
        "'{}' run --rm --network none {IMAGE} yes | head -1",
        lab.program()
    );
    let output = crate::process::run(lab.tool("sh", &["-c", &pipeline]));
    assert_eq!((output.code, output.text().as_str()), (0, "y\n"));
    lab.wait_for_no_process();
    lab.finish();
}
