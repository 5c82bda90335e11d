//! `fcvm kernel tune`, `zpool` and `install` through the program. Nothing outside a temporary directory
//! is changed.

#![allow(missing_docs, reason = "a test program has no users")]

use std::fs;
use std::io::Write as _;
use std::process::{Command, Stdio};

use serde_json::{Value, json};
use sha2::Digest as _;

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
        (
            "etc/systemd/system/fcvm-kernel-threads.service",
            "taskset --cpu-list --pid 0-1 $$pid",
        ),
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

/// Files that stand for empty disks.
fn disks(directory: &std::path::Path, count: usize) -> Vec<String> {
    (0..count)
        .map(|index| {
            let path = directory.join(format!("disk{index}"));
            let file = fs::File::create(&path).unwrap();
            file.set_len(64 << 20).unwrap();
            fs::canonicalize(path).unwrap().to_str().unwrap().to_owned()
        })
        .collect()
}

/// Programs `zpool` and `zfs` that write down how they were called.
fn fake_zfs(directory: &std::path::Path) -> std::path::PathBuf {
    let programs = directory.join("bin");
    fs::create_dir(&programs).unwrap();
    for name in ["zpool", "zfs"] {
        let path = programs.join(name);
        let log = directory.join("calls");
        let text = format!("#!/bin/sh\necho {name} \"$@\" >> {}\n", log.display());
        fcvm_testing::write_program(&path, &text);
    }
    programs
}

fn zpool_plan(programs: &std::path::Path, arguments: &[&str]) -> Said {
    let path = format!("{}:{}", programs.display(), std::env::var("PATH").unwrap());
    let output = Command::new(env!("CARGO_BIN_EXE_fcvm"))
        .args(["kernel", "zpool", "plan"])
        .args(arguments)
        .env("PATH", path)
        .output()
        .unwrap();
    Said {
        code: output.status.code().unwrap(),
        stdout: String::from_utf8(output.stdout).unwrap(),
        stderr: String::from_utf8(output.stderr).unwrap(),
    }
}

#[test]
fn a_pool_is_made_only_of_empty_devices_or_those_named_twice() {
    let directory = tempfile::tempdir().unwrap();
    let programs = fake_zfs(directory.path());
    let disks = disks(directory.path(), 2);
    let devices: Vec<&str> = disks.iter().map(String::as_str).collect();
    let calls = || fs::read_to_string(directory.path().join("calls")).unwrap_or_default();

    let shown = zpool_plan(&programs, &devices);
    assert_eq!(shown.code, 0, "{}", shown.stderr);
    assert!(shown.stdout.contains("recordsize=16K"), "{}", shown.stdout);
    assert_eq!(calls(), "", "nothing is run without --yes");

    let content = fs::OpenOptions::new().write(true).open(&disks[0]).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&content, b"data", 4096).unwrap();
    let refused = zpool_plan(&programs, &[&["--yes"], &devices[..]].concat());
    assert_eq!(refused.code, 125);
    assert!(
        refused.stderr.contains("--destroy-data"),
        "{}",
        refused.stderr
    );
    let other = zpool_plan(
        &programs,
        &[&["--yes", "--destroy-data", devices[1]], &devices[..]].concat(),
    );
    assert_eq!(other.code, 125, "another device was named twice");
    assert_eq!(calls(), "");

    let done = zpool_plan(
        &programs,
        &[&["--yes", "--destroy-data", devices[0]], &devices[..]].concat(),
    );
    assert_eq!(done.code, 0, "{}", done.stderr);
    let calls = calls();
    assert!(calls.starts_with("zpool create -f -o ashift=12"), "{calls}");
    assert!(
        calls.contains(&format!("tank mirror {} {}\n", devices[0], devices[1])),
        "{calls}"
    );
    assert!(
        calls.ends_with("zfs create -o recordsize=16K tank/vms\n"),
        "{calls}"
    );
    assert!(!calls.contains("volblocksize"), "examples are not run");
}

/// Detaches on drop.
struct LoopDevice(String);

impl LoopDevice {
    fn attach(file: &str) -> Option<Self> {
        let output = Command::new("losetup")
            .args(["--find", "--show", file])
            .output()
            .ok()?;
        let device = String::from_utf8(output.stdout).ok()?.trim().to_owned();
        (output.status.success() && !device.is_empty()).then_some(Self(device))
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        let _ = Command::new("losetup").args(["--detach", &self.0]).status();
    }
}

#[test]
fn block_devices_in_use_are_never_overwritten() {
    let directory = tempfile::tempdir().unwrap();
    let programs = fake_zfs(directory.path());
    let disks = disks(directory.path(), 2);
    let Some(device) = LoopDevice::attach(&disks[0]) else {
        eprintln!("skipped: this user cannot make loop devices");
        return;
    };
    let both = [device.0.as_str(), disks[1].as_str()];
    let json = |arguments: &[&str]| -> Value {
        let said = zpool_plan(&programs, &[&["--format", "json"], arguments].concat());
        assert_eq!(said.code, 0, "{}", said.stderr);
        serde_json::from_str(&said.stdout).unwrap()
    };
    assert_eq!(
        json(&both)["obstacles"],
        serde_json::json!([]),
        "an empty loop device is free"
    );

    let made = Command::new("mkfs.ext4").args(["-q", &device.0]).status();
    if !made.is_ok_and(|status| status.success()) {
        eprintln!("skipped: mkfs.ext4 is missing");
        return;
    }
    let obstacle = json(&both)["obstacles"][0].as_str().unwrap().to_owned();
    assert!(obstacle.contains("holds data (ext4)"), "{obstacle}");

    // The file below a loop device is in use whatever it holds.
    let twice = ["--yes", "--destroy-data", &disks[0], &disks[0], &disks[1]];
    let refused = zpool_plan(&programs, &twice);
    assert_eq!(refused.code, 125);
    assert!(
        refused.stderr.contains("never overwritten"),
        "{}",
        refused.stderr
    );

    // Held exclusively, as by a mount.
    let holder = Command::new("mount")
        .args(["-o", "ro", &device.0])
        .arg(directory.path().join("bin"))
        .status();
    if !holder.is_ok_and(|status| status.success()) {
        eprintln!("skipped: this user cannot mount");
        return;
    }
    let mounted = zpool_plan(
        std::path::Path::new("/nonexistent"),
        &["--yes", "--destroy-data", &device.0, &device.0, &disks[1]],
    );
    let _ = Command::new("umount")
        .arg(directory.path().join("bin"))
        .status();
    assert_eq!(mounted.code, 125);
    assert!(mounted.stderr.contains("mounted at"), "{}", mounted.stderr);
    assert!(!directory.path().join("calls").exists(), "nothing was run");
}

/// The header of a kernel, and no more: installing reads nothing else of it.
fn kernel_in(directory: &std::path::Path) -> String {
    let mut image = vec![0_u8; 0x400];
    image[..2].copy_from_slice(b"MZ");
    image[0x202..0x206].copy_from_slice(b"HdrS");
    image[0x20e..0x210].copy_from_slice(&0x100_u16.to_le_bytes());
    image[0x300..0x30c].copy_from_slice(b"6.12.1-test ");
    let kernel = directory.join("built");
    fs::create_dir(&kernel).unwrap();
    fs::write(kernel.join("bzImage"), image).unwrap();
    kernel.to_str().unwrap().to_owned()
}

#[test]
fn a_kernel_is_installed_below_a_root_after_its_changes_were_listed() {
    let directory = tempfile::tempdir().unwrap();
    let kernel = kernel_in(directory.path());
    let root = directory.path().join("root");
    fs::create_dir(&root).unwrap();
    let root = root.to_str().unwrap();
    must(&[
        "kernel",
        "tune",
        "--memory",
        "8g",
        "--cpus",
        "4",
        "--apply-to",
        root,
    ]);
    let install = [
        "kernel",
        "install",
        "--root",
        root,
        "--command-line",
        "root=/dev/vda1 ro",
        "--tuned",
        &kernel,
    ];
    let listed = must(&[&install[..], &["--dry-run"]].concat());
    assert!(
        listed.contains("create") && listed.contains("boot/vmlinuz-6.12.1-test"),
        "{listed}"
    );
    assert!(!std::path::Path::new(root).join("boot").exists());
    must(&install);
    let entries =
        fs::read_to_string(std::path::Path::new(root).join("boot/grub/custom.cfg")).unwrap();
    assert!(
        entries.contains("root=/dev/vda1 ro transparent_hugepage=madvise"),
        "{entries}"
    );
    let listed = must(&["kernel", "entries", "--root", root, "--format", "json"]);
    assert!(listed.contains("\"6.12.1-test\""), "{listed}");
    assert!(must(&install).contains("keep"));
}

#[test]
fn the_running_system_is_changed_only_when_that_is_said() {
    let directory = tempfile::tempdir().unwrap();
    let kernel = kernel_in(directory.path());
    let line = ["--command-line", "root=/dev/vda1"];
    let unsaid = fcvm(&[&["kernel", "install", &kernel], &line[..]].concat());
    assert_ne!(unsaid.code, 0, "without --root");
    let refused = fcvm(&[&["kernel", "install", "--root", "/", &kernel], &line[..]].concat());
    assert_eq!(refused.code, 125);
    assert!(refused.stderr.contains("--yes"), "{}", refused.stderr);
    assert!(!std::path::Path::new("/boot/vmlinuz-6.12.1-test").exists());
    let elsewhere = directory.path().to_str().unwrap();
    for (path, text) in [
        ("proc/sys/kernel/kexec_load_disabled", "0\n"),
        ("usr/sbin/kexec", ""),
    ] {
        let path = directory.path().join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }
    let kexec = ["kernel", "kexec", "--root", elsewhere, &kernel];
    let shown = must(&[&kexec[..], &line[..]].concat());
    assert!(shown.contains("--command-line=root=/dev/vda1"), "{shown}");
    for unasked in ["--load", "--yes"] {
        let refused = fcvm(&[&kexec[..], &line[..], &[unasked]].concat());
        assert_eq!(refused.code, 125);
        assert!(
            refused.stderr.contains("not the running system"),
            "{}",
            refused.stderr
        );
    }
    assert_eq!(
        fcvm(&["kernel", "install", "--root", elsewhere, "nothing"]).code,
        125
    );
}

/// A kernel in the store of a data directory, as a build would leave it.
fn built_in(data: &std::path::Path, used_for: &str, name: &str) {
    let image = fs::read(std::path::Path::new(&kernel_in(data)).join("bzImage")).unwrap();
    fs::remove_dir_all(data.join("built")).unwrap();
    let directory = data.join("kernels/built").join(name);
    fs::create_dir_all(&directory).unwrap();
    let file = |name: &str, bytes: &[u8]| {
        fs::write(directory.join(name), bytes).unwrap();
        let sum = sha2::Sha256::digest(bytes);
        let sha256: String = sum.iter().map(|byte| format!("{byte:02x}")).collect();
        json!({"path": name, "size_bytes": bytes.len(), "modified_ns": 0, "sha256": sha256})
    };
    let manifest = json!({
        "version": 1, "name": name, "key": "0123456789abcdef", "profile": "any", "use": used_for,
        "source": "debian:6.12", "source_id": "x", "release": "6.12.1-test", "compiler": "gcc",
        "march": null, "object_count": 1, "built_at_seconds": 1, "symbols": [],
        "vmlinux": file("vmlinux", b"any"), "image": file("bzImage", &image),
        "config": file("config", b"CONFIG_EFI_STUB=y\n"),
    });
    fs::write(directory.join("manifest.json"), manifest.to_string()).unwrap();
}

#[test]
fn a_built_kernel_is_installed_by_its_name() {
    let directory = tempfile::tempdir().unwrap();
    let data = directory.path().to_str().unwrap();
    built_in(directory.path(), "host", "host-full-6.12.1-0123456789");
    built_in(directory.path(), "guest", "guest-6.12.1-0123456789");
    let root = directory.path().join("root");
    fs::create_dir(&root).unwrap();
    let install = |name: &'static str| {
        [
            "--data-dir",
            data,
            "kernel",
            "install",
            "--root",
            root.to_str().unwrap(),
            "--command-line",
            "root=/dev/vda1 ro",
            name,
        ]
        .map(str::to_owned)
    };
    let run = |words: &[String]| fcvm(&words.iter().map(String::as_str).collect::<Vec<_>>());
    let said = run(&install("host-full-6.12"));
    assert_eq!(said.code, 0, "{}", said.stderr);
    assert!(root.join("boot/vmlinuz-6.12.1-test").is_file());
    assert!(root.join("boot/config-6.12.1-test").is_file());
    for (name, reason) in [("guest", "boots no host"), ("other", "no built kernel")] {
        let said = run(&install(name));
        assert_eq!(said.code, 125);
        assert!(said.stderr.contains(reason), "{}", said.stderr);
    }
}

/// `fcvm kernel config` in a directory of its own, with answers on its standard input. The source is none: what
/// becomes of a profile is tested where real sources are.
fn answered(directory: &std::path::Path, arguments: &[&str], input: &str) -> Said {
    let mut child = Command::new(env!("CARGO_BIN_EXE_fcvm"))
        .args(["kernel", "config", "--source", "tree:/nonexistent"])
        .args(arguments)
        .current_dir(directory)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // It may have ended before it was answered.
    let _ = child.stdin.take().unwrap().write_all(input.as_bytes());
    let output = child.wait_with_output().unwrap();
    Said {
        code: output.status.code().unwrap(),
        stdout: String::from_utf8(output.stdout).unwrap(),
        stderr: String::from_utf8(output.stderr).unwrap(),
    }
}

#[test]
fn answers_make_a_profile() {
    let directory = tempfile::tempdir().unwrap();
    let at = directory.path();
    // Asked: a word that is no answer, an answer, and the defaults.
    let said = answered(at, &["--interactive"], "neither\nhost\nlatency\n\n\n\n");
    assert!(
        said.stderr.contains("'neither' is none of them"),
        "{}",
        said.stderr
    );
    let asked = fs::read_to_string(at.join("kernel.toml")).unwrap();
    assert!(asked.contains("include = [\"host-latency\"]"), "{asked}");
    // What the file says makes the same again, and nothing is asked.
    let line = asked.lines().next().unwrap();
    let (_, options) = line.split_once("fcvm kernel config ").unwrap();
    fs::remove_file(at.join("kernel.toml")).unwrap();
    answered(at, &options.split(' ').collect::<Vec<_>>(), "");
    assert_eq!(fs::read_to_string(at.join("kernel.toml")).unwrap(), asked);

    let said = answered(at, &["--interactive"], "");
    assert!(said.stderr.contains("is there already"), "{}", said.stderr);
    for (arguments, reason) in [
        (
            &["--interactive", "--save-profile", "a.toml"][..],
            "add --use",
        ),
        (&["--save-profile", "a.conf"], "end with .toml"),
        (&["--save-profile", "a b.toml"], "letters, digits"),
        (
            &["--save-profile", "a.toml", "--prefer", "latency"],
            "add --use host",
        ),
        (&["--prefer", "latency"], "--save-profile"),
    ] {
        let said = answered(at, arguments, "");
        assert_ne!(said.code, 0, "{arguments:?}");
        assert!(
            said.stderr.contains(reason),
            "{arguments:?}: {}",
            said.stderr
        );
        assert!(!at.join("a.toml").exists(), "{arguments:?}");
    }
}
