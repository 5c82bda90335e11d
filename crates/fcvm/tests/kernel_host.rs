//! `fcvm kernel tune`, `zpool` and `install` through the program. Nothing outside a temporary directory
//! is changed.

#![allow(missing_docs, reason = "a test program has no users")]

use std::fs;
use std::process::Command;

use serde_json::Value;

struct Said {
    code: i32,
    stdout: String,
    stderr: String,
}

fn fcvm(arguments: &[&str]) -> Said {
    let output = Command::new(env!("CARGO_BIN_EXE_fcvm"))
        .args(arguments)
        .output()
        .unwrap();
    Said {
        code: output.status.code().unwrap(),
        stdout: String::from_utf8(output.stdout).unwrap(),
        stderr: String::from_utf8(output.stderr).unwrap(),
    }
}

fn must(arguments: &[&str]) -> String {
    let said = fcvm(arguments);
    assert_eq!(said.code, 0, "{arguments:?}: {}", said.stderr);
    said.stdout
}

#[test]
fn tune_reads_this_machine() {
    let plan: Value = serde_json::from_str(&must(&["kernel", "tune", "--format", "json"])).unwrap();
    assert!(plan["memory"]["total_bytes"].as_u64().unwrap() > 0);
    assert!(plan["cpus"]["cpu_count"].as_u64().unwrap() > 0);
}

#[test]
fn tune_writes_below_a_directory_and_says_which_files() {
    let root = tempfile::tempdir().unwrap();
    let directory = root.path().to_str().unwrap();
    let arguments = [
        "kernel",
        "tune",
        "--memory",
        "64g",
        "--cpus",
        "16",
        "--zfs",
        "2.1",
        "--hugepages",
        "32",
        "--hugepage-size",
        "1g",
        "--apply-to",
        directory,
    ];
    let said = must(&arguments);
    for (file, content) in [
        ("etc/sysctl.d/90-fcvm.conf", "vm.swappiness = 1"),
        (
            "etc/modprobe.d/fcvm-zfs.conf",
            "options zfs zfs_arc_max=17179869184",
        ),
        (
            "etc/tmpfiles.d/fcvm-tuning.conf",
            "w /sys/devices/virtual/workqueue/cpumask - - - - 00000003",
        ),
        ("etc/fcvm/kernel-command-line", "hugepagesz=1G hugepages=32"),
    ] {
        assert!(
            said.contains(&format!("written: {directory}/{file}")),
            "{said}"
        );
        assert!(
            fs::read_to_string(root.path().join(file))
                .unwrap()
                .contains(content)
        );
    }
    assert!(must(&arguments).contains("unchanged: "));
}

#[test]
fn tune_refuses_what_does_not_fit_with_the_sum_and_writes_nothing() {
    let root = tempfile::tempdir().unwrap();
    let directory = root.path().to_str().unwrap();
    let said = fcvm(&[
        "kernel",
        "tune",
        "--memory",
        "64g",
        "--cpus",
        "16",
        "--hugepages",
        "32",
        "--hugepage-size",
        "1g",
        "--arc-max",
        "default",
        "--zfs",
        "2.1",
        "--apply-to",
        directory,
    ]);
    assert_eq!(said.code, 125);
    assert!(
        said.stderr.contains("= 66 GiB, 2 GiB too much"),
        "{}",
        said.stderr
    );
    assert_eq!(fs::read_dir(root.path()).unwrap().count(), 0);
    for bad in [
        &["--memory", "x"][..],
        &["--guests", "3"],
        &["--zfs", "new"],
        &["--hugepages", "many"],
        &["--apply-to", "/nonexistent"],
    ] {
        let mut arguments = vec!["kernel", "tune"];
        arguments.extend_from_slice(bad);
        assert_ne!(fcvm(&arguments).code, 0, "{bad:?}");
    }
}
