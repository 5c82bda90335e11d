//! Firecracker under a jailer: what that is asked for, and what it finds.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use fcvm_hypervisor::firecracker::{Firecracker, Jail, SavedMemory};
use fcvm_hypervisor::{
    DiskSpec, HypervisorError, Launch, MemoryBackend, NetworkBackend, NetworkSpec, Pause,
    RestoreState,
};

use crate::fake::{self, Behaviour};
use crate::{Place, begins_with, clone_hardware, first_words, memory_file};

const USER: u32 = 0x7000_0123;
const GROUP: u32 = 0x7000_0000;

/// A Firecracker in a jail; says that the test is skipped where there can be none.
fn jailed(place: &Place, jailer: &str) -> Option<Firecracker> {
    if !rustix::process::geteuid().is_root() {
        println!("skipped: only root can jail");
        return None;
    }
    fcvm_testing::write_program(&place.path("jailer"), jailer);
    let jail = Jail {
        jailer: Jail::find_jailer(&place.program, "").unwrap(),
        id: "0123abcd".to_owned(),
        user: USER,
        group: GROUP,
        disks: place.path("disks"),
        // The jailer itself is the first process.
        init: (PathBuf::from("/usr/bin/env"), Vec::<OsString>::new()),
    };
    let firecracker = Firecracker::locate(Some(&place.program), "", place.path("jails"));
    Some(firecracker.unwrap().jailed(jail))
}

fn root(place: &Place) -> PathBuf {
    place.path("jails/firecracker/0123abcd/root")
}

#[tokio::test]
async fn a_jailed_vm_has_its_files_its_user_and_its_processes() {
    let place = Place::new(Behaviour::default());
    let Some(firecracker) = jailed(&place, fake::JAILER) else {
        return;
    };
    let leftovers = firecracker.leftovers().unwrap();
    assert_eq!(leftovers[1], root(&place).parent().unwrap());
    assert_eq!(leftovers[0], Path::new("/sys/fs/cgroup/fcvm/0123abcd"));
    assert_eq!(leftovers[2], place.path("disks/jail-0123abcd"));
    let secret = place.path("kernel");
    fs::set_permissions(&secret, fs::Permissions::from_mode(0o600)).unwrap();
    let (spec, mut console) = place.spec();
    let mut vm = firecracker.launch(spec).await.unwrap();
    let channel = vm.take_agent().unwrap();
    assert_eq!(first_words(channel).await, fake::AGENT_TEXT);

    let arguments = fs::read_to_string(root(&place).join("jailer-arguments")).unwrap();
    let expected = format!("--uid {USER} --gid {GROUP} --chroot-base-dir");
    assert!(arguments.contains(&expected), "{arguments}");
    let data = |name: &str| fs::metadata(root(&place).join(name)).unwrap();
    // What others have too is the same file, and can be read by jails.
    assert_eq!(data("kernel").ino(), fs::metadata(&secret).unwrap().ino());
    assert_eq!(
        (data("kernel").gid(), data("kernel").mode() & 0o777),
        (GROUP, 0o640)
    );
    assert_eq!(data("disk1").uid(), USER);
    assert_eq!(data("vsock_5252").uid(), USER);
    // It is the process that answers, in a namespace of its own.
    let status = fs::read_to_string(format!("/proc/{}/status", vm.identity().pid)).unwrap();
    let numbers = status.lines().find(|line| line.starts_with("NSpid:"));
    assert_eq!(
        numbers.unwrap().split_whitespace().count(),
        3,
        "{numbers:?}"
    );

    let memory = memory_file();
    vm.save(&memory, SavedMemory::Full).await.unwrap_err();
    assert!(!root(&place).join("memory.out").exists());
    // It stood not still, and can be saved when it does.
    vm.pause().await.unwrap();
    let state = vm.save(&memory, SavedMemory::Full).await.unwrap();
    begins_with(&memory, fake::FULL_MEMORY);
    // A difference is written over what is there.
    vm.save(&memory, SavedMemory::Difference).await.unwrap();
    let rest = &fake::FULL_MEMORY[fake::DIRTY_MEMORY.len()..];
    begins_with(&memory, &[fake::DIRTY_MEMORY, rest].concat());
    vm.kill();
    vm.wait_exit().await;
    drop(vm);
    let mut text = String::new();
    console.read_to_string(&mut text).unwrap();
    assert!(text.contains(fake::CONSOLE_TEXT), "{text}");
    assert!(!root(&place).parent().unwrap().exists());

    let later = memory_file();
    let (hardware, _console) = clone_hardware(&place, &later);
    let standby = firecracker.prepare(hardware).await.unwrap();
    // What waits for a fork gets the memory as it is then.
    later.write_all_at(fake::FULL_MEMORY, 0).unwrap();
    let clone = standby.load(&state, &MemoryBackend::File).await.unwrap();
    assert!(!clone.is_running().await.unwrap());
    let laid_in = File::open(root(&place).join("memory")).unwrap();
    begins_with(&laid_in, fake::FULL_MEMORY);
    drop(clone);
    assert!(!root(&place).parent().unwrap().exists());

    // A memory server is out of its reach: it connects to whoever loads the state.
    let (hardware, _console) = clone_hardware(&place, &memory);
    let standby = firecracker.prepare(hardware).await.unwrap();
    let listener = standby.memory_listener().unwrap().unwrap();
    assert_eq!(data("memory.sock").uid(), USER);
    let server = MemoryBackend::Uffd("/nowhere".into());
    let (clone, connected) = tokio::join!(standby.load(&state, &server), listener.accept());
    let connected = connected.unwrap().0.peer_cred().unwrap();
    assert_eq!(connected.pid(), Some(clone.unwrap().identity().pid));
}

/// A file without a name in a file system of its own, which ends with the last that uses it.
fn other_file_system(place: &Place) -> File {
    let directory = place.path("disks");
    fs::create_dir(&directory).unwrap();
    let mount = std::process::Command::new("mount")
        .args(["-t", "tmpfs", "-o", "mode=700", "memory"])
        .arg(&directory)
        .status();
    assert!(mount.unwrap().success());
    tempfile::tempfile_in(directory).unwrap()
}

fn unmount(place: &Place) -> bool {
    let mut command = std::process::Command::new("umount");
    command.arg(place.path("disks"));
    command.status().unwrap().success()
}

#[tokio::test]
async fn a_disk_of_another_file_system_is_mounted_in_the_jail_alone() {
    let place = Place::new(Behaviour::default());
    let Some(firecracker) = jailed(&place, fake::JAILER) else {
        return;
    };
    let disk = other_file_system(&place);
    disk.write_all_at(b"the disk", 0).unwrap();
    let (mut spec, _console) = place.spec();
    spec.hardware.disks[1] = DiskSpec::raw(disk.try_clone().unwrap(), "fcvm-scratch", false);
    let vm = firecracker.launch(spec).await.unwrap();
    let pid = vm.identity().pid;
    let seen = File::open(format!("/proc/{pid}/cwd/disk1")).unwrap();
    let (seen, own) = (seen.metadata().unwrap(), disk.metadata().unwrap());
    assert_eq!((seen.dev(), seen.ino()), (own.dev(), own.ino()));
    assert_eq!((own.uid(), own.nlink()), (USER, 0));
    // Nobody else sees it, and no name is left.
    assert_eq!(fs::metadata(root(&place).join("disk1")).unwrap().len(), 0);
    assert_eq!(fs::read_dir(place.path("disks")).unwrap().count(), 0);
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
    let target = root(&place).join("disk1");
    assert!(!mounts.contains(target.to_str().unwrap()), "{mounts}");
    // The owner's descriptor is what keeps it mounted; the VM's end leaves nothing.
    assert!(!unmount(&place));
    drop(vm);
    assert!(!root(&place).exists());
    drop(disk);
    assert!(unmount(&place));
}

#[tokio::test]
async fn a_disk_that_cannot_come_into_the_jail_is_told() {
    let place = Place::new(Behaviour::default());
    // One that has no mounts of its own: the disk would be everybody's.
    let jailer = fake::JAILER.replace("unshare --mount --propagation slave", "");
    let Some(firecracker) = jailed(&place, &jailer) else {
        return;
    };
    let disk = other_file_system(&place);
    let (mut spec, _console) = place.spec();
    spec.hardware.disks[1] = DiskSpec::raw(disk, "fcvm-scratch", false);
    let error = firecracker.launch(spec).await.unwrap_err().to_string();
    assert!(error.contains("no mounts of its own"), "{error}");
    assert!(!root(&place).exists());
    assert_eq!(fs::read_dir(place.path("disks")).unwrap().count(), 0);
    assert!(unmount(&place));
}

#[tokio::test]
async fn the_jailer_is_told_the_networks_namespace() {
    let place = Place::new(Behaviour::default());
    let Some(firecracker) = jailed(&place, fake::JAILER) else {
        return;
    };
    let (mut spec, _console) = place.spec();
    let namespace = File::open("/proc/self/ns/net").unwrap();
    spec.hardware.network = Some(NetworkSpec {
        backend: NetworkBackend::Tap {
            name: "fcvm-gone0".to_owned(),
            namespaces: vec![namespace.into()],
        },
        mac: [2, 0, 0, 0, 0, 1],
        announce: false,
    });
    // The stand-in enters none; it looks whether there is one where it is told, and for the device.
    let error = firecracker.launch(spec).await.unwrap_err().to_string();
    assert!(error.contains("fcvm-gone0"), "{error}");
    assert!(!root(&place).exists());
}

#[tokio::test]
async fn a_jailer_that_fails_is_told() {
    let place = Place::new(Behaviour::default());
    let script = "#!/bin/sh\necho 'Error: Failed to create the jail root directory' >&2\nexit 1\n";
    let Some(firecracker) = jailed(&place, script) else {
        return;
    };
    let (spec, _console) = place.spec();
    let error = firecracker.launch(spec).await.unwrap_err();
    assert!(
        matches!(error, HypervisorError::ExitedAtStart { .. }),
        "{error}"
    );
    assert_eq!(
        error.to_string(),
        "the VM did not start: firecracker exited with status 1: Error: Failed to create the jail root directory"
    );
    assert!(!root(&place).parent().unwrap().exists());
}

#[tokio::test]
async fn what_another_jail_left_is_not_taken_over() {
    let place = Place::new(Behaviour::default());
    let Some(firecracker) = jailed(&place, fake::JAILER) else {
        return;
    };
    let left = root(&place).parent().unwrap().to_owned();
    fs::create_dir_all(left.join("root")).unwrap();
    fs::write(left.join("root/vsock"), "").unwrap();
    let (spec, _console) = place.spec();
    let error = firecracker.launch(spec).await.unwrap_err();
    assert!(matches!(error, HypervisorError::Setup { .. }), "{error}");
    assert!(left.join("root/vsock").exists());
}

#[test]
fn a_program_that_needs_libraries_cannot_be_jailed() {
    let place = Place::new(Behaviour::default());
    let error = place.firecracker().check_static().unwrap_err().to_string();
    assert!(error.contains("linked statically"), "{error}");
    assert!(Jail::find_jailer(&place.program, "/nowhere").is_none());
}
