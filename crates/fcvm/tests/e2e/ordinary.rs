//! The same as an ordinary user: no privilege, no other user's files.

use std::fs;
use std::os::unix::fs::MetadataExt;

use rustix::process::{Pid, Signal, kill_process};

use crate::base::IMAGE;
use crate::lab::Lab;

#[test]
fn an_ordinary_user_runs_execs_copies_and_stops() {
    let Some(lab) = Lab::ordinary() else { return };
    assert_eq!(
        lab.ok(&[
            "run",
            "--rm",
            IMAGE,
            "sh",
            "-c",
            "id -u; stat -c %u:%g /data/far"
        ]),
        "0\n100000:100000\n"
    );
    assert_eq!(
        lab.fcvm(&[
            "run",
            "--rm",
            "--network",
            "none",
            IMAGE,
            "sh",
            "-c",
            "exit 5"
        ])
        .code,
        5
    );
    lab.fails(
        127,
        &[
            "run",
            "--rm",
            "--network",
            "none",
            IMAGE,
            "/no/such/program",
        ],
    );
    lab.idle_vm("box", &[]);
    assert_eq!(lab.sh("box", "echo inside; id -u"), "inside\n0\n");
    lab.ok(&["pause", "box"]);
    lab.ok(&["unpause", "box"]);
    let archive = lab.fcvm(&["cp", "box:/data", "-"]);
    assert!(
        archive.code == 0 && archive.stdout.len() > 1024,
        "{archive:?}"
    );
    let output =
        crate::process::run_with_input(lab.command(&["cp", "-", "box:/home"]), &archive.stdout);
    assert_eq!(output.code, 0, "{output:?}");
    assert_eq!(lab.sh("box", "cat /home/data/hello"), "hello\n");
    lab.ok(&["stats", "--no-stream"]);
    lab.ok(&["top", "box"]);
    assert_eq!(lab.ok(&["stop", "box"]), "box\n");
    assert!(lab.ok(&["logs", "box"]).contains("started"));
    lab.ok(&["rm", "box"]);
    lab.finish();
}

#[test]
fn nothing_of_an_ordinary_users_vm_is_open_to_others() {
    let Some(lab) = Lab::ordinary() else { return };
    lab.idle_vm("box", &["--network", "none"]);
    let id = lab.json(&["ls", "--format", "json"])[0]["id"]
        .as_str()
        .unwrap()
        .to_owned();
    for path in [
        lab.data.join("vms").join(&id),
        lab.runtime.join(&id[..12]),
        lab.runtime.join(&id[..12]).join("control.sock"),
    ] {
        let mode = fs::metadata(&path).unwrap().mode();
        assert_eq!(mode & 0o077, 0, "{} has mode {mode:o}", path.display());
    }
    // No process of the VM has more privilege than the user.
    for (pid, command) in lab.processes() {
        let status = fs::read_to_string(format!("/proc/{}/status", pid.as_raw_nonzero()))
            .unwrap_or_default();
        let effective = status
            .lines()
            .find(|line| line.starts_with("CapEff:"))
            .unwrap_or("CapEff:\t0000000000000000");
        assert!(
            effective.ends_with("\t0000000000000000")
                || crate::lab::is_root() && command.contains("passt"),
            "{command}: {effective}"
        );
    }
    lab.ok(&["rm", "-f", "box"]);
    lab.finish();
}

#[test]
fn an_ordinary_users_vm_dies_with_its_owner() {
    let Some(lab) = Lab::ordinary() else { return };
    lab.idle_vm("box", &[]);
    let record = lab.wait_for_state("box", "running");
    let owner =
        Pid::from_raw(record["owner"]["pid"].as_i64().unwrap().try_into().unwrap()).unwrap();
    kill_process(owner, Signal::KILL).unwrap();
    lab.wait_for_no_process();
    assert_eq!(lab.ok(&["ls", "-q"]), "");
    assert_eq!(fs::read_dir(&lab.runtime).unwrap().count(), 0);
    lab.ok(&["rm", "box"]);
    lab.finish();
}

#[test]
fn an_ordinary_user_imports_and_runs_an_image() {
    let Some(lab) = Lab::ordinary() else { return };
    // The layout is made by the lab's user's superuser; reading it is all that is needed.
    let directory = lab.file("layout");
    crate::image::Image::of(vec![crate::base::base().unwrap().layer.clone()])
        .write(&directory, "latest");
    lab.import(&format!("oci:{}", directory.display()), "mine:1");
    let text = lab.ok(&[
        "run",
        "--rm",
        "--network",
        "none",
        "mine:1",
        "stat",
        "-c",
        "%u:%g",
        "/data/far",
    ]);
    assert_eq!(text, "100000:100000\n", "owners are kept without root");
    lab.ok(&["image", "rm", "mine:1"]);
    lab.finish();
}

#[test]
fn another_users_data_directory_is_refused() {
    let Some(mut lab) = Lab::ordinary() else {
        return;
    };
    if !crate::lab::is_root() {
        println!("skipped: a directory of another user needs root to make");
        return;
    }
    let own = lab.data.clone();
    lab.data = lab.file("of-root/data");
    fs::create_dir_all(lab.data.join("vms")).unwrap();
    for part in ["kernels", "images"] {
        std::os::unix::fs::symlink(own.join(part), lab.data.join(part)).unwrap();
    }
    let line = lab.fails(125, &["run", "--rm", "--network", "none", IMAGE, "true"]);
    assert!(
        line.contains("belongs to another user") || line.contains("cannot"),
        "{line}"
    );
    lab.data = own;
    lab.finish();
}

#[test]
fn an_ordinary_users_clones_have_networks_of_their_own() {
    let Some(lab) = Lab::ordinary() else { return };
    let Some(service) = crate::network::HostService::start() else {
        return;
    };
    let ask = ["wget", "-q", "-O", "-", &service.url];
    lab.idle_vm("source", &[]);
    lab.ok(&["fork", "source", "--name", "clone"]);
    for vm in ["clone", "source"] {
        let said = lab.ok(&[&["exec", vm], &ask[..]].concat());
        assert_eq!(said, "from the host\n");
    }
    lab.ok(&["rm", "-f", "-a"]);
    lab.finish();
}
