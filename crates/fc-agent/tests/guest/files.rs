//! Requests about files, processes and counters.

use std::io::Read;

use fcvm_types::guest::ExitStatus;
use fcvm_wire::{FailureKind, Outcome, Request};

use crate::client::{Output, Vm, process, shell};
use crate::{lab, sleeping};

fn archive_of(vm: &mut Vm, path: &str, follow: bool) -> Output {
    let path = path.to_owned();
    vm.open(&Request::ArchiveRead { path, follow }).collect()
}

fn names(archive: &[u8]) -> Vec<String> {
    tar::Archive::new(archive)
        .entries()
        .unwrap()
        .map(|entry| entry.unwrap().path().unwrap().display().to_string())
        .collect()
}

fn unpack(vm: &mut Vm, directory: &str, keep_owners: bool, archive: &[u8]) -> Output {
    let mut stream = vm.open(&Request::ArchiveWrite {
        directory: directory.into(),
        keep_owners,
    });
    stream.opened();
    stream.write(archive);
    stream.end_input();
    stream.collect()
}

fn archive(members: &[(&str, &[u8], u32, u64)]) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    for (name, content, mode, uid) in members {
        let mut header = tar::Header::new_gnu();
        header.set_size(content.len() as u64);
        header.set_mode(*mode);
        header.set_uid(*uid);
        header.set_gid(*uid);
        header.set_mtime(1_000_000_000);
        builder.append_data(&mut header, name, *content).unwrap();
    }
    builder.into_inner().unwrap()
}

#[test]
fn files_are_copied_both_ways() {
    let Some(tools) = lab::tools() else { return };
    let mut vm = sleeping(tools);
    let output = archive_of(&mut vm, "/data", false);
    assert_eq!(output.outcome, Outcome::Done);
    assert_eq!(
        names(&output.stdout),
        ["data", "data/text", "data/link", "data/hello", "data/empty"]
    );
    assert_eq!(
        names(&archive_of(&mut vm, "/data/.", false).stdout),
        ["empty", "hello", "link", "text"]
    );
    // A link at the end is sent as such, or as what it leads to.
    let kind = |bytes: &[u8]| {
        assert!(!bytes.is_empty());
        let mut archive = tar::Archive::new(bytes);
        let mut entry = archive.entries().unwrap().next().unwrap().unwrap();
        let mut content = String::new();
        entry.read_to_string(&mut content).unwrap();
        (entry.header().entry_type(), content)
    };
    let link = archive_of(&mut vm, "/data/link", false);
    assert_eq!(link.outcome, Outcome::Done);
    assert_eq!(kind(&link.stdout), (tar::EntryType::Symlink, String::new()));
    let file = archive_of(&mut vm, "/data/link", true);
    assert_eq!(
        kind(&file.stdout),
        (tar::EntryType::Regular, "hello\n".into())
    );
    let missing = archive_of(&mut vm, "/data/none", false);
    assert_eq!(missing.failure().kind, FailureKind::PathNotFound);

    // 20 MB there, and the sum of what arrived.
    let content: Vec<u8> = (0_u32..5_000_000).flat_map(u32::to_le_bytes).collect();
    let bytes = archive(&[
        ("big", &content, 0o640, 1000),
        ("bin/tool", b"#!/bin/sh\n", 0o4755, 1000),
    ]);
    assert_eq!(
        unpack(&mut vm, "/data", true, &bytes).outcome,
        Outcome::Done
    );
    assert_eq!(
        vm.shell("md5sum < /data/big").ok(),
        "31fc699a0ae47b226ee0752336f1215c  -\n"
    );
    assert_eq!(
        vm.shell("stat -c '%U %a %Y' /data/big /data/bin/tool").ok(),
        "app 640 1000000000\napp 4755 1000000000\n"
    );
    assert_eq!(
        unpack(&mut vm, "/data/empty", false, &bytes).outcome,
        Outcome::Done
    );
    assert_eq!(vm.shell("stat -c '%U' /data/empty/big").ok(), "root\n");
    // And back again.
    let back = archive_of(&mut vm, "/data/big", false);
    let mut archive = tar::Archive::new(back.stdout.as_slice());
    let mut entry = archive.entries().unwrap().next().unwrap().unwrap();
    let mut received = Vec::new();
    entry.read_to_end(&mut received).unwrap();
    assert!(received == content);
    let refused = unpack(&mut vm, "/data/hello", false, &bytes);
    assert_eq!(refused.failure().kind, FailureKind::PathNotFound);
    vm.power_off();
}

#[test]
fn links_of_the_container_lead_nowhere_else() {
    let Some(tools) = lab::tools() else { return };
    let mut vm = sleeping(tools);
    vm.shell(
        "ln -s / /data/root; ln -s /proc/1/root/../../.. /data/up; ln -s ../../../../.. /data/far",
    )
    .ok();
    for link in ["/data/root", "/data/up", "/data/far"] {
        let listed = archive_of(&mut vm, &format!("{link}/modules/list"), true);
        assert_eq!(listed.failure().kind, FailureKind::PathNotFound, "{link}");
        let found = archive_of(&mut vm, &format!("{link}/data/hello"), true);
        assert_eq!(names(&found.stdout), ["hello"], "{link}");
    }
    // A file that is a pipe does not hold the agent up; the request can be abandoned.
    vm.shell("mkfifo /data/pipe").ok();
    assert_eq!(
        names(&archive_of(&mut vm, "/data/pipe", false).stdout),
        ["pipe"]
    );
    // A file that grows while it is read makes no broken archive.
    let mut growing = vm.exec(&shell("while :; do echo growing >> /data/log; done"));
    growing.opened();
    for _ in 0..5 {
        let output = archive_of(&mut vm, "/data/log", false);
        if output.outcome == Outcome::Done {
            assert_eq!(names(&output.stdout), ["log"]);
        }
    }
    growing.reset();
    growing.collect();
    // A broken archive is refused, and what it says is told.
    let refused = unpack(&mut vm, "/data", false, b"no archive");
    assert_eq!(refused.failure().kind, FailureKind::BadRequest);
    vm.power_off();
}

#[test]
fn paths_processes_and_counters_are_told() {
    let Some(tools) = lab::tools() else { return };
    let mut vm = sleeping(tools);
    let mut stat = |path: &str| match vm.ask(&Request::Stat { path: path.into() }) {
        Outcome::Stat(stat) => Some(stat),
        _ => None,
    };
    let hello = stat("/data/hello").unwrap();
    assert_eq!(
        (hello.is_directory, hello.size_bytes, hello.mode),
        (false, 6, 0o100_644)
    );
    assert_eq!(stat("/data/link").unwrap(), hello);
    assert!(stat("/data").unwrap().is_directory);
    assert!(stat("/none").is_none());

    let mut busy = process(&["sleep", "4242"]);
    busy.user = "app".into();
    let mut session = vm.exec(&busy);
    let pid = session.opened().pid;
    let Outcome::Processes(processes) = vm.ask(&Request::Processes) else {
        panic!()
    };
    let found: Vec<_> = processes
        .iter()
        .map(|process| (process.pid, process.user.as_str(), process.command.as_str()))
        .collect();
    assert_eq!(
        found,
        [(1, "root", "sleep 100000"), (pid, "app", "sleep 4242")]
    );
    let Outcome::Stats(stats) = vm.ask(&Request::Stats) else {
        panic!()
    };
    assert_eq!(stats.process_count, 2);
    assert!(stats.cpu_ns > 0 && stats.uptime_ns > stats.cpu_ns / 2);
    assert!(stats.memory_total_bytes > 128 << 20);
    assert!(stats.disk_read_bytes > 0);
    assert!(tools.agent_bytes() < 2 << 20);
    assert!(
        stats.agent_rss_bytes < 2 << 20,
        "{} bytes",
        stats.agent_rss_bytes
    );

    probe_and_set_clock(&mut vm);
    session.reset();
    assert_eq!(
        session.collect().outcome,
        Outcome::Exited(ExitStatus::Signal(9))
    );
    vm.power_off();
}

fn probe_and_set_clock(vm: &mut Vm) {
    vm.shell(
        "(while :; do printf 'HTTP/1.0 418 x\\r\\n\\r\\n' | nc -l -p 8080; done) >/dev/null 2>&1 &",
    )
    .ok();
    let probe = |url: &str| Request::HttpProbe {
        url: url.into(),
        timeout_ms: 20_000,
    };
    // The server listens after a while, and anew after each answer.
    let answer = (0..1000).find_map(|_| match vm.ask(&probe("http://127.0.0.1:8080/x")) {
        Outcome::Http(code) => Some(code),
        _ => None,
    });
    assert_eq!(answer, Some(418));
    assert!(matches!(
        vm.ask(&probe("http://localhost:1/")),
        Outcome::Failed(_)
    ));
    assert_eq!(
        vm.ask(&Request::SetClock {
            realtime_ns: 2_000_000_000_000_000_000
        }),
        Outcome::Done
    );
    assert!(vm.shell("date -u +%Y").ok().starts_with("2033"));
}
