//! VMs whose disks are in a mounted pool: `--disk-store pool`.

use std::fs::{self, OpenOptions};
use std::path::PathBuf;

use rustix::process::{Pid, Signal, kill_process};
use serde_json::json;

use crate::base::IMAGE;
use crate::lab::Lab;
use crate::process;

/// A lab whose VMs are on a pool.
fn pool_lab() -> Option<Lab> {
    let device = OpenOptions::new().read(true).write(true).open("/dev/fuse");
    let helper = std::process::Command::new("fusermount3").arg("-V").output();
    if device.is_err() || helper.is_err() {
        println!("skipped: pools cannot be mounted here (/dev/fuse, fusermount3)");
        return None;
    }
    let mut lab = Lab::new()?;
    lab.disk_store = Some("pool".to_owned());
    Some(lab)
}

/// Kills the processes of the lab's mount that have one of these roles.
fn kill_mount(lab: &Lab, roles: &[&str]) {
    let own = lab.data.to_str().unwrap();
    let mut killed = Vec::new();
    for role in roles {
        for entry in fs::read_dir("/proc").unwrap().flatten() {
            let line = fs::read(entry.path().join("cmdline")).unwrap_or_default();
            let line = String::from_utf8_lossy(&line).into_owned();
            let process = entry
                .file_name()
                .to_str()
                .and_then(|name| name.parse().ok());
            if let Some(process) = process.and_then(Pid::from_raw)
                && line.contains(role)
                && line.contains(own)
            {
                kill_process(process, Signal::KILL).unwrap();
                killed.push(process);
            }
        }
    }
    assert_eq!(killed.len(), roles.len());
    for process in killed {
        process::wait_gone(process);
    }
}

fn mounted(lab: &Lab) -> PathBuf {
    lab.data.join("pool/mnt")
}

/// Reads a file from the disk and not from the guest's memory.
fn sum(lab: &Lab, vm: &str, file: &str) -> String {
    let script = format!("dd if={file} bs=64k iflag=direct 2>/dev/null | md5sum");
    lab.sh(vm, &script)
}

#[test]
fn disks_are_cloned_in_the_pool_and_survive_its_server() {
    let Some(lab) = pool_lab() else { return };
    lab.idle_vm("source", &["--network", "none", "--memory", "128m"]);
    lab.sh(
        "source",
        "dd if=/dev/urandom of=/root/data bs=1M count=8 2>/dev/null; sync",
    );
    let written = lab.sh("source", "md5sum < /root/data");
    lab.ok(&["fork", "source", "-n", "2"]);
    for vm in ["source", "source-1"] {
        let store = &lab.json(&["inspect", vm])[0]["disk_store"];
        assert_eq!(store, &json!({ "method": "pool", "reason": null }));
    }
    for vm in ["source", "source-1", "source-2"] {
        lab.sh(vm, &format!("echo {vm} > /root/name; sync"));
    }
    // What is written and not flushed while nobody serves is not lost either.
    kill_mount(&lab, &["serve-mount"]);
    for vm in ["source", "source-1", "source-2"] {
        lab.sh(vm, "cp /root/data /root/copy; sync");
        assert_eq!(lab.sh(vm, "cat /root/name").trim(), vm);
        assert_eq!(sum(&lab, vm, "/root/data"), written);
        assert_eq!(sum(&lab, vm, "/root/copy"), written);
    }
    // Nobody ends it under them.
    let refused = lab.fcvm(&["pool", "unmount", mounted(&lab).to_str().unwrap()]);
    assert_ne!(refused.code, 0, "{refused:?}");
    let listed = lab.json(&["ls", "--size", "--format", "json"]);
    assert!(listed.to_string().contains("disk"), "{listed}");
    let shown = lab.ok(&["system", "df"]);
    assert!(shown.contains("Disk pool"), "{shown}");
    lab.ok(&["rm", "-f", "-a"]);
    lab.finish();
}

#[test]
fn a_snapshot_of_a_vm_on_a_pool_is_started_from() {
    let Some(lab) = pool_lab() else { return };
    lab.idle_vm("source", &["--network", "none", "--memory", "128m"]);
    lab.sh(
        "source",
        "dd if=/dev/urandom of=/root/data bs=1M count=4 2>/dev/null; sync",
    );
    let written = lab.sh("source", "md5sum < /root/data");
    lab.ok(&["snapshot", "create", "source", "--tag", "kept"]);
    lab.ok(&["snapshot", "create", "source", "--tag", "other"]);
    // Their disks are in the pool and share what they have.
    let files = || fs::read_dir(mounted(&lab).join("snapshots")).unwrap();
    assert_eq!(files().count(), 2);
    for tag in ["kept", "other"] {
        let folder = lab.data.join("snapshots").join(tag);
        assert!(!folder.join("disk-0.raw").exists() && folder.join("disk.pool").exists());
        let told = &lab.json(&["snapshot", "inspect", tag])[0];
        let shared_bytes = told["shared_bytes"].as_u64().unwrap();
        assert!(shared_bytes >= 4 << 20, "{told}");
    }
    lab.ok(&["rm", "-f", "source"]);
    lab.ok(&["snapshot", "run", "--snapshot", "kept", "--name", "again"]);
    lab.sh("again", "echo more > /root/more; sync");
    assert_eq!(sum(&lab, "again", "/root/data"), written);
    lab.ok(&["snapshot", "rm", "kept"]);
    assert_eq!(files().count(), 1);
    // Who runs goes on with what was removed.
    assert_eq!(sum(&lab, "again", "/root/data"), written);
    lab.ok(&["rm", "-f", "-a"]);
    // Where nobody has the pool mounted, whoever needs the snapshot does.
    lab.ok(&["pool", "unmount", mounted(&lab).to_str().unwrap()]);
    lab.ok(&["snapshot", "inspect", "other", "--verify"]);
    lab.ok(&["snapshot", "rm", "other"]);
    assert_eq!(files().count(), 0);
    lab.finish();
}

#[test]
fn when_all_of_the_mount_is_killed_the_next_vm_runs() {
    let Some(lab) = pool_lab() else { return };
    lab.idle_vm("victim", &["--network", "none", "--memory", "128m"]);
    lab.sh(
        "victim",
        "dd if=/dev/urandom of=/root/data bs=1M count=4 2>/dev/null",
    );
    lab.sh("victim", "sync");
    kill_mount(&lab, &["keep-mount", "serve-mount"]);
    // What the host has in memory can still be read: that the guest gets errors for the rest is not for a test to provoke.
    let said = lab.fcvm(&["run", "--rm", "--network", "none", IMAGE, "echo", "runs"]);
    assert_eq!(said.code, 0, "{said:?}");
    assert_eq!(said.stdout, b"runs\n");
    lab.ok(&["rm", "-f", "-a"]);
    lab.finish();
}
