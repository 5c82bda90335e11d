//! File systems without room and without permission, on the host and in the guest.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use crate::base::{IMAGE, base};
use crate::lab::{Lab, is_root, tree};
use crate::process::must;

/// A small file system, mounted as long as this lives.
struct SmallDisk(PathBuf);

impl SmallDisk {
    /// A tmpfs; only root can mount one.
    fn mount(lab: &Lab, name: &str, size: &str) -> Option<Self> {
        if !is_root() {
            println!("skipped: mounting a small file system needs root");
            return None;
        }
        let path = lab.file(name);
        fs::create_dir(&path).unwrap();
        must(
            "mount",
            &[
                "-t",
                "tmpfs",
                "-o",
                &format!("size={size},mode=755"),
                "none",
                path.to_str().unwrap(),
            ],
        );
        Some(Self(path))
    }

    /// Fills it to the last block, less so many bytes.
    fn fill(&self, spare_bytes: u64) {
        let space = rustix::fs::statvfs(&self.0).unwrap();
        let mut bytes = (space.f_bavail * space.f_frsize).saturating_sub(spare_bytes);
        let file = fs::File::create(self.0.join("filler")).unwrap();
        let flags = rustix::fs::FallocateFlags::empty();
        // The file system needs some blocks for itself.
        while rustix::fs::fallocate(&file, flags, 0, bytes).is_err() {
            bytes = bytes.checked_sub(4096).expect("the disk can be filled");
        }
    }

    fn unfill(&self) {
        fs::remove_file(self.0.join("filler")).unwrap();
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = std::process::Command::new("umount")
            .arg("-l")
            .arg(&self.0)
            .status();
    }
}

/// The lab with its data directory on a small disk.
fn move_data(lab: &mut Lab, disk: &SmallDisk, parts: &[&str]) {
    lab.data = disk.0.join("data");
    fs::create_dir_all(lab.data.join("vms")).unwrap();
    for part in parts {
        symlink(base().unwrap().data.join(part), lab.data.join(part)).unwrap();
    }
}

#[test]
fn an_image_that_does_not_fit_is_refused_and_leaves_nothing() {
    let Some(mut lab) = Lab::new() else { return };
    let Some(disk) = SmallDisk::mount(&lab, "small", "3m") else {
        return;
    };
    move_data(&mut lab, &disk, &["kernels"]);
    let layout = format!("oci:{}", base().unwrap().layout.display());
    // The image's 2 MB and more of layers fit into no 1 MB.
    disk.fill(1 << 20);
    let line = lab.fails(125, &["image", "import", &layout, IMAGE]);
    assert!(
        line.contains("No space left") || line.contains("full"),
        "{line}"
    );
    assert_eq!(lab.ok(&["image", "ls", "-q"]), "");
    disk.unfill();
    // What is left is small: no part of a layer stayed.
    let left: u64 = tree(&lab.data)
        .iter()
        .filter(|(path, _)| !path.starts_with(lab.data.join("kernels")))
        .map(|(_, size)| size)
        .sum();
    assert!(left < 64 << 10, "{:?}", tree(&lab.data));
    lab.finish();
}

#[test]
fn a_root_image_that_does_not_fit_is_refused_and_works_later() {
    let Some(mut lab) = Lab::new() else { return };
    let size = base().unwrap().layer.len() as u64;
    let Some(disk) = SmallDisk::mount(&lab, "small", &format!("{}k", size * 3 / 1024 + 4096))
    else {
        return;
    };
    move_data(&mut lab, &disk, &["kernels"]);
    let layout = format!("oci:{}", base().unwrap().layout.display());
    lab.import(&layout, IMAGE);
    disk.fill(256 << 10);
    // A jail has a copy of the kernel, for which the disk has no room at any time.
    let options = ["--jail=false", "--network", "none"];
    let run = [&["run", "--rm"], &options[..], &[IMAGE, "echo", "it runs"]].concat();
    let line = lab.fails(125, &run);
    assert!(
        line.contains("No space left") || line.contains("full") || line.contains("room"),
        "{line}"
    );
    assert_eq!(lab.ok(&["ls", "-a", "-q"]), "");
    disk.unfill();
    assert_eq!(lab.first_run(&run), "it runs\n");
    lab.finish();
}

#[test]
fn a_vm_that_has_no_room_for_its_record_does_not_start() {
    let Some(mut lab) = Lab::new() else { return };
    let Some(disk) = SmallDisk::mount(&lab, "small", "1m") else {
        return;
    };
    move_data(&mut lab, &disk, &["kernels", "images"]);
    disk.fill(0);
    let line = lab.fails(125, &["run", "--name", "full", IMAGE, "true"]);
    assert!(
        line.contains("No space left") || line.contains("full"),
        "{line}"
    );
    disk.unfill();
    lab.finish();
}

/// The host's disk fills while the VM runs: the VM waits, says why, and goes on without a loss.
#[test]
fn a_vm_waits_while_the_host_has_no_space_for_its_disk() {
    let Some(lab) = Lab::of_qemu("stops a VM whose disk the host has no space for") else {
        return;
    };
    let Some(disk) = SmallDisk::mount(&lab, "small", "96m") else {
        return;
    };
    symlink(&disk.0, lab.data.join(lab.disks())).unwrap();
    lab.idle_vm(
        "box",
        &["--privileged", "--network", "none", "--disk-size", "200m"],
    );
    disk.fill(0);
    let script = "head -c 50000000 /dev/urandom > /data/big && sha256sum < /data/big; sync; \
        echo 3 > /proc/sys/vm/drop_caches; sha256sum < /data/big";
    let writing = lab.start(&["exec", "box", "sh", "-c", script]);
    lab.wait_for_state("box", "paused");
    let line = lab.fails(125, &["exec", "box", "true"]);
    assert!(
        line.contains("full") && line.contains("fcvm unpause box"),
        "{line}"
    );
    disk.unfill();
    assert_eq!(lab.ok(&["unpause", "box"]), "box\n");
    let output = writing.wait();
    assert_eq!((output.code, output.stderr.as_str()), (0, ""));
    let text = output.text();
    let sums: Vec<&str> = text.lines().collect();
    assert!(sums.len() == 2 && sums[0] == sums[1], "{text}");

    // One that nobody frees space for can be removed.
    disk.fill(0);
    let writing = lab.start(&[
        "exec",
        "box",
        "sh",
        "-c",
        "head -c 50000000 /dev/zero > /data/more; sync",
    ]);
    lab.wait_for_state("box", "paused");
    assert_eq!(lab.ok(&["rm", "-f", "box"]), "box\n");
    assert_ne!(writing.wait().code, 0);
    lab.finish();
}

#[test]
fn a_full_disk_of_the_guest_is_the_guests_own_error() {
    let Some(lab) = Lab::new() else { return };
    let script = "dd if=/dev/zero of=/data/big bs=1M count=100; echo code $?; rm /data/big; echo after > /data/small; cat /data/small";
    let output = lab.fcvm(&[
        "run",
        "--rm",
        "--disk-size",
        "32m",
        "--network",
        "none",
        IMAGE,
        "sh",
        "-c",
        script,
    ]);
    assert_eq!(
        (output.code, output.text().as_str()),
        (0, "code 1\nafter\n"),
        "{output:?}"
    );
    assert!(
        output.stderr.contains("No space left on device"),
        "{output:?}"
    );
    lab.finish();
}

#[test]
fn a_read_only_data_directory_is_told_and_can_be_listed() {
    let Some(mut lab) = Lab::new() else { return };
    lab.ok(&["run", "--name", "ended", "--network", "none", IMAGE, "true"]);
    let writable = lab.data.clone();
    if is_root() {
        // Permissions do not stop root; a read-only file system does.
        let path = lab.file("read-only");
        fs::create_dir(&path).unwrap();
        let path = path.to_str().unwrap().to_owned();
        must("mount", &["--bind", writable.to_str().unwrap(), &path]);
        must("mount", &["-o", "remount,ro,bind", &path]);
        lab.data = path.into();
        let disk = SmallDisk(lab.data.clone());
        check_read_only(&lab);
        drop(disk);
        lab.data = writable;
    } else {
        let modes = |mode: &str| {
            must(
                "chmod",
                &["-R", mode, writable.join("vms").to_str().unwrap()],
            )
        };
        modes("a-w");
        check_read_only(&lab);
        modes("u+w");
    }
    lab.ok(&["rm", "ended"]);
    lab.finish();
}

fn check_read_only(lab: &Lab) {
    assert!(lab.ok(&["ls", "-a"]).contains("ended"));
    lab.ok(&["inspect", "ended"]);
    lab.ok(&["logs", "ended"]);
    let line = lab.fails(125, &["run", "--rm", "--network", "none", IMAGE, "true"]);
    assert!(
        line.contains("cannot") && line.contains(lab.data.to_str().unwrap()),
        "{line}"
    );
    let line = lab.fails(125, &["rm", "ended"]);
    assert!(line.contains("cannot"), "{line}");
}

#[test]
fn a_data_directory_of_another_kind_is_told() {
    let Some(mut lab) = Lab::new() else { return };
    let kept = lab.data.clone();
    lab.data = lab.write("a-file", "no directory").into();
    let line = lab.fails(125, &["run", "--rm", IMAGE, "true"]);
    assert!(line.contains("a-file"), "{line}");
    lab.data = kept;
    // A runtime directory too deep for a socket's name.
    let deep = lab.file(&"d".repeat(120));
    let line = lab.fails(
        125,
        &[
            "--runtime-dir",
            deep.to_str().unwrap(),
            "run",
            "--rm",
            "--network",
            "none",
            IMAGE,
            "true",
        ],
    );
    assert!(line.contains("--runtime-dir"), "{line}");
    assert!(!Path::new(&deep).exists() || fs::read_dir(&deep).unwrap().count() == 0);
    lab.finish();
}
