//! `fcvm exec`: many sessions in one VM; and `top` and `stats`, which look at the same VM.

use std::fs;
use std::process::Stdio;

use crate::image::digest;
use crate::lab::Lab;
use crate::process::{self, Running, run_with_input};

#[test]
fn exec_runs_in_the_container() {
    let Some(lab) = Lab::new() else { return };
    let id = lab.idle_vm(
        "box",
        &[
            "-e",
            "FROM_RUN=1",
            "--workdir",
            "/data",
            "--network",
            "none",
        ],
    );
    assert_eq!(
        lab.sh("box", "echo $FROM_RUN $FROM_IMAGE; pwd; id -u; cat hello"),
        "1 yes\n/data\n0\nhello\n"
    );
    assert_eq!(lab.sh(&id[..8], "echo by id"), "by id\n");
    let owner = lab.json(&["ls", "--format", "json"])[0]["owner_pid"].to_string();
    assert_eq!(lab.sh(&owner, "echo by owner"), "by owner\n");

    let env_file = lab.write("env", "FROM_FILE=1\nFROM_RUN=file\n");
    let arguments = [
        "exec",
        "--env-file",
        &env_file,
        "-e",
        "FROM_FLAG=1",
        "-w",
        "/home/app",
        "-u",
        "app:audio",
        "box",
    ];
    let script = [
        "sh",
        "-c",
        "echo $FROM_RUN $FROM_FILE $FROM_FLAG; pwd; id -u; id -g",
    ];
    assert_eq!(
        lab.ok(&[&arguments[..], &script].concat()),
        "file 1 1\n/home/app\n1000\n29\n"
    );

    assert_eq!(lab.fcvm(&["exec", "box", "sh", "-c", "exit 9"]).code, 9);
    assert_eq!(
        lab.fcvm(&["exec", "box", "sh", "-c", "kill -15 $$"]).code,
        143
    );
    lab.fails(127, &["exec", "box", "no-such-program"]);
    lab.fails(126, &["exec", "box", "/data/text"]);
    lab.fails(126, &["exec", "box", "/data"]);
    let line = lab.fails(125, &["exec", "-u", "nosuchuser", "box", "true"]);
    assert!(line.contains("nosuchuser"), "{line}");
    let line = lab.fails(125, &["exec", "nosuchvm", "true"]);
    assert!(line.contains("no VM is called 'nosuchvm'"), "{line}");

    let input: Vec<u8> = (0..=255).cycle().take(1 << 20).collect();
    let output = run_with_input(
        lab.command(&[
            "exec",
            "-i",
            "box",
            "sh",
            "-c",
            "tee /tmp/in >&2; sha256sum < /tmp/in",
        ]),
        &input,
    );
    assert_eq!(
        output.text(),
        format!("{}  -\n", &digest(&input)["sha256:".len()..])
    );

    // Only the capabilities of the container, unless asked for.
    assert_eq!(
        lab.fcvm(&[
            "exec", "box", "chroot", "/", "mount", "-t", "tmpfs", "none", "/tmp"
        ])
        .code,
        1
    );
    let privileged = [
        "exec",
        "--privileged",
        "box",
        "grep",
        "CapEff",
        "/proc/self/status",
    ];
    assert!(lab.ok(&privileged).contains("1ffffffffff"));

    // Orphans of a session are the container's to reap; no zombie stays.
    lab.sh("box", "(sleep 0.01 &) ; true");
    let zombies = "while ps -o stat | grep -q Z; do :; done; echo none";
    assert_eq!(lab.sh("box", zombies), "none\n");
    lab.ok(&["rm", "-f", "box"]);
    lab.finish();
}

#[test]
fn fifty_sessions_at_once() {
    let Some(lab) = Lab::new() else { return };
    lab.idle_vm("box", &["--network", "none", "--cpus", "2"]);
    // Each waits for all others: fifty are under way at one time, or none ends.
    let script = "echo in > /tmp/s$1; while [ $(ls /tmp | grep -c '^s') -lt 50 ]; do usleep 100000; done; \
        cat; echo err $1 >&2; exit $1";
    let mut sessions: Vec<Running> = (0..50)
        .map(|number| {
            lab.start(&[
                "exec",
                "-i",
                "box",
                "sh",
                "-c",
                script,
                "sh",
                &number.to_string(),
            ])
        })
        .collect();
    for (number, session) in sessions.iter_mut().enumerate() {
        session.write(format!("input of {number}\n").as_bytes());
    }
    for (number, session) in sessions.into_iter().enumerate() {
        let output = session.finish();
        assert_eq!(output.code, number as i32, "{output:?}");
        assert_eq!(output.text(), format!("input of {number}\n"));
        assert_eq!(output.stderr, format!("err {number}\n"));
    }
    lab.ok(&["rm", "-f", "box"]);
    lab.finish();
}

/// 200 MB out of the guest arrive whole, while a session whose output nobody reads stands still
/// without holding up any other.
#[test]
fn two_hundred_megabytes_pass_beside_a_reader_that_does_not_read() {
    let Some(lab) = Lab::new() else { return };
    lab.idle_vm("box", &["--network", "none"]);
    // The test holds the other end of this pipe and reads nothing until the end.
    let (mut unread, unread_end) = std::io::pipe().unwrap();
    let mut command = lab.command(&[
        "exec",
        "box",
        "sh",
        "-c",
        "echo $$ > /tmp/pid; exec head -c 50000000 /dev/zero",
    ]);
    command
        .stdin(Stdio::null())
        .stdout(unread_end)
        .stderr(Stdio::null());
    let mut stuck = command.spawn().unwrap();
    drop(command);
    let state = "while ! [ -s /tmp/pid ]; do usleep 10000; done; p=$(cat /tmp/pid); \
        until [ \"$(cat /proc/$p/wchan)\" = pipe_write ] || grep -q 'State:.S' /proc/$p/status; do usleep 10000; done; cut -d' ' -f2,3 /proc/$p/stat";
    assert_eq!(lab.sh("box", state), "(head) S\n");

    let script = "head -c 200000000 /dev/urandom > /tmp/big; sha256sum < /tmp/big; cat /tmp/big";
    let output = lab.fcvm(&["exec", "box", "sh", "-c", script]);
    assert_eq!((output.code, output.stderr.as_str()), (0, ""));
    let (sum, data) = output.stdout.split_at(
        output
            .stdout
            .iter()
            .position(|byte| *byte == b'\n')
            .unwrap()
            + 1,
    );
    assert_eq!(data.len(), 200_000_000);
    assert_eq!(
        String::from_utf8_lossy(sum).trim(),
        format!("{}  -", &digest(data)["sha256:".len()..])
    );

    // The one that stood still was not forgotten, and lost nothing.
    assert!(
        stuck.try_wait().unwrap().is_none(),
        "the unread session ended"
    );
    assert_eq!(
        lab.sh("box", "cut -d' ' -f2,3 /proc/$(cat /tmp/pid)/stat"),
        "(head) S\n"
    );
    let copied = std::io::copy(&mut unread, &mut std::io::sink()).unwrap();
    assert_eq!(copied, 50_000_000);
    assert_eq!(
        process::code(process::wait_for_child(&mut stuck, "the unread session")),
        0
    );
    lab.ok(&["rm", "-f", "box"]);
    lab.finish();
}

#[test]
fn a_session_ends_with_its_command_and_with_its_vm() {
    let Some(lab) = Lab::new() else { return };
    lab.idle_vm("box", &["--network", "none"]);
    // The command is killed: its process in the guest gets the end of it.
    let session = lab.start(&[
        "exec",
        "-i",
        "box",
        "sh",
        "-c",
        "echo $$ > /tmp/pid; echo ready; cat; sleep 1000",
    ]);
    session.stdout.wait_for("ready\n");
    session.signal(rustix::process::Signal::KILL);
    session.wait();
    assert_eq!(
        lab.sh(
            "box",
            "while [ -d /proc/$(cat /tmp/pid) ]; do usleep 10000; done; echo gone"
        ),
        "gone\n"
    );
    // A signal to the command goes to its process.
    let session = lab.start(&[
        "exec",
        "box",
        "sh",
        "-c",
        "trap 'exit 5' TERM; echo ready; while :; do sleep 1000 & wait; done",
    ]);
    session.stdout.wait_for("ready\n");
    session.signal(rustix::process::Signal::TERM);
    assert_eq!(session.wait().code, 5);
    // The VM is taken away: the command ends and says so.
    let session = lab.start(&["exec", "box", "sh", "-c", "echo ready; sleep 1000"]);
    session.stdout.wait_for("ready\n");
    lab.ok(&["rm", "-f", "box"]);
    let output = session.wait();
    assert!(output.code != 0, "{output:?}");
    lab.finish();
}

#[test]
fn top_and_stats_tell_what_runs() {
    let Some(lab) = Lab::new() else { return };
    lab.idle_vm("box", &["--network", "none"]);
    let session = lab.start(&[
        "exec",
        "-u",
        "app",
        "box",
        "sh",
        "-c",
        "echo ready; exec sleep 54321",
    ]);
    session.stdout.wait_for("ready\n");
    let table = lab.ok(&["top", "box"]);
    let header: Vec<&str> = table.lines().next().unwrap().split_whitespace().collect();
    assert_eq!(
        header,
        [
            "USER", "PID", "PPID", "STAT", "RSS", "TTY", "TIME", "COMMAND"
        ]
    );
    let row = table
        .lines()
        .find(|line| line.ends_with("sleep 54321"))
        .unwrap_or_else(|| panic!("{table}"));
    assert!(row.starts_with("app "), "{table}");
    let listed = lab.json(&["top", "box", "--format", "json"]);
    let first = &listed
        .as_array()
        .unwrap()
        .iter()
        .find(|process| process["pid"] == 1)
        .unwrap();
    assert_eq!(first["user"], "root");
    assert!(first["rss_bytes"].as_u64().unwrap() > 0);

    lab.sh("box", "head -c 3000000 /dev/urandom > /data/file; sync");
    let stats = lab.json(&["stats", "--no-stream", "--format", "json"]);
    let stats = &stats.as_array().unwrap()[..];
    assert_eq!(stats.len(), 1);
    let number = |name: &str| {
        stats[0]["guest"][name]
            .as_u64()
            .unwrap_or_else(|| panic!("{name} in {stats:?}"))
    };
    assert_eq!(stats[0]["name"], "box");
    assert!(number("disk_written_bytes") >= 3_000_000, "{stats:?}");
    assert!(number("memory_available_bytes") < number("memory_total_bytes"));
    assert!(number("agent_rss_bytes") < 16 << 20, "{stats:?}");
    assert!(
        stats[0]["host_pss_bytes"].as_u64().unwrap() > 0
            && stats[0]["host_cpu_ns"].as_u64().unwrap() > 0
    );
    let table = lab.ok(&["stats", "--no-stream", "box"]);
    assert!(table.starts_with("ID") && table.contains("box"), "{table}");
    lab.ok(&["rm", "-f", "box"]);
    drop(session);
    let line = lab.fails(125, &["stats", "--no-stream", "box"]);
    assert!(line.contains("box"), "{line}");
    lab.finish();
}

/// The owner's own memory while a VM runs and 50 MB pass through it: 15 MB is what it may have.
#[test]
fn the_owner_stays_small() {
    let Some(lab) = Lab::new() else { return };
    lab.idle_vm("box", &["--network", "none"]);
    assert_eq!(
        lab.fcvm(&["exec", "box", "head", "-c", "50000000", "/dev/zero"])
            .stdout
            .len(),
        50_000_000
    );
    let pid = lab.json(&["ls", "--format", "json"])[0]["owner_pid"]
        .as_i64()
        .unwrap();
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = |name: &str| {
        status
            .lines()
            .find(|line| line.starts_with(name))
            .unwrap()
            .to_owned()
    };
    let kib: u64 = line("RssAnon:")
        .split_whitespace()
        .nth(1)
        .unwrap()
        .parse()
        .unwrap();
    assert!(kib < 15 << 10, "{}, {}", line("VmRSS:"), line("RssAnon:"));
    lab.ok(&["rm", "-f", "box"]);
    lab.finish();
}
