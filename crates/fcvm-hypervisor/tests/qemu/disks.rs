//! Disks and the agent channel with a real Linux guest under TCG.

use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::process::Command;

use crate::linux::{Linux, Shell};
use crate::support::{self, qemu};
use fcvm_hypervisor::probe::measure_tsc_khz;
use fcvm_hypervisor::qemu::{Qemu, QemuVm};
use fcvm_hypervisor::{Accelerator, DiskSpec, Launch, Pause};
use fcvm_hypervisor::{ExitCause, VmEvent};
use fcvm_types::ByteSize;

/// Starts a guest with a shared root disk and a scratch disk of its own.
async fn start(qemu: &Qemu, linux: &Linux, root: &Path, scratch: &File) -> (QemuVm, Shell) {
    let (mut spec, console) = support::spec(linux.kernel.clone());
    // Nobody looks at the console; the guest must not care.
    drop(console);
    spec.hardware.memory = fcvm_hypervisor::GuestMemory::new(ByteSize::from_mib(128)).unwrap();
    spec.boot.initramfs = Some(linux.initramfs.clone());
    spec.hardware.accelerator = Accelerator::Tcg {
        tsc_khz: measure_tsc_khz(),
    };
    spec.hardware.disks = vec![
        DiskSpec::raw(File::open(root).unwrap(), "fcvm-root", true),
        DiskSpec::raw(scratch.try_clone().unwrap(), "fcvm-scratch", false),
    ];
    let mut vm = qemu.launch(spec).await.unwrap();
    let shell = Shell::connect(vm.take_agent().unwrap()).await;
    (vm, shell)
}

#[tokio::test]
async fn disks_are_found_shared_written_and_discarded() {
    let Some(qemu) = qemu() else { return };
    let directory = tempfile::tempdir().unwrap();
    let Some(linux) = Linux::prepare(directory.path()) else {
        return;
    };
    let root = directory.path().join("root");
    let content = "the shared root".as_bytes();
    std::fs::write(&root, [content, &vec![0; 8192 - content.len()]].concat()).unwrap();
    let scratches = [(); 2].map(|()| {
        let scratch = tempfile::tempfile().unwrap();
        scratch.set_len(64 << 20).unwrap();
        scratch
    });
    // Two guests at once share the root.
    let (vm, mut shell) = start(&qemu, &linux, &root, &scratches[0]).await;
    let (other_vm, mut other_shell) = start(&qemu, &linux, &root, &scratches[1]).await;
    for shell in [&mut shell, &mut other_shell] {
        let read = "dd if=$(disk fcvm-root) bs=15 count=1 2>/dev/null; echo";
        assert_eq!(shell.run(read).await, "the shared root");
    }
    shell.send("echo x > $(disk fcvm-root)").await;
    assert_ne!(shell.answer().await.0, "0");
    let text = shell.run("for i in 1 2 3; do echo line $i; done").await;
    assert_eq!(text, "line 1\nline 2\nline 3");

    let fill = "dd if=/dev/zero bs=1M count=32 2>/dev/null | tr '\\0' x | \
                dd of=$(disk fcvm-scratch) bs=1M iflag=fullblock oflag=direct 2>/dev/null; echo";
    shell.run(fill).await;
    let mut byte = [0];
    scratches[0]
        .read_exact_at(&mut byte, (32 << 20) - 1)
        .unwrap();
    assert_eq!(byte, *b"x");
    let allocated = || scratches[0].metadata().unwrap().blocks() * 512;
    assert!(allocated() >= 32 << 20);
    assert_eq!(scratches[1].metadata().unwrap().blocks(), 0);
    shell.run("blkdiscard $(disk fcvm-scratch)").await;
    assert!(allocated() < 1 << 20, "{}", allocated());

    shell.send("poweroff -f").await;
    assert_eq!(vm.wait_exit().await.cause, ExitCause::PoweredOff);
    other_shell.send("echo c > /proc/sysrq-trigger").await;
    assert_eq!(other_vm.wait_exit().await.cause, ExitCause::Reset);
}

/// A small tmpfs, mounted in a user and mount namespace of a child: no root is needed.
#[test]
fn full_host_stops_the_vm_and_nothing_is_lost() {
    const CHILD: &str = "FCVM_TEST_MOUNT";
    if let Ok(mount) = std::env::var(CHILD) {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        runtime.block_on(write_to_a_full_host(Path::new(&mount)));
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let own = std::env::current_exe().unwrap();
    let script = "mount -t tmpfs -o size=20m fcvm-test \"$1\" || exit 77; \
                  exec \"$2\" --exact disks::full_host_stops_the_vm_and_nothing_is_lost --nocapture";
    let output = Command::new("unshare")
        .args([
            "--user",
            "--map-root-user",
            "--mount",
            "sh",
            "-c",
            script,
            "sh",
        ])
        .args([directory.path(), &own])
        .env(CHILD, directory.path())
        .output();
    match output {
        Ok(output) if output.status.code() != Some(77) && output.status.code() != Some(1) => {
            let text = String::from_utf8_lossy(&output.stdout);
            let errors = String::from_utf8_lossy(&output.stderr);
            assert!(output.status.success(), "{text}{errors}");
            if let Some(line) = text.lines().find(|line| line.contains("skipped: ")) {
                println!("{line}");
            }
        }
        _ => println!("skipped: no user namespace to mount a file system in"),
    }
}

async fn write_to_a_full_host(mount: &Path) {
    let Some(qemu) = qemu() else { return };
    let directory = tempfile::tempdir().unwrap();
    let Some(linux) = Linux::prepare(directory.path()) else {
        return;
    };
    let root = directory.path().join("root");
    std::fs::write(&root, [0; 4096]).unwrap();
    let scratch = File::options()
        .read(true)
        .write(true)
        .create_new(true)
        .open(mount.join("scratch"))
        .unwrap();
    scratch.set_len(16 << 20).unwrap();
    let filler = mount.join("filler");
    std::fs::write(&filler, vec![1; 18 << 20]).unwrap();
    let (vm, mut shell) = start(&qemu, &linux, &root, &scratch).await;
    shell
        .run("dd if=/dev/urandom of=/tmp/data bs=1M count=6 2>/dev/null")
        .await;
    let sum = shell.run("md5sum < /tmp/data").await;
    shell
        .send("dd if=/tmp/data of=$(disk fcvm-scratch) bs=1M oflag=direct 2>/dev/null")
        .await;
    let mut events = Vec::new();
    while !events.contains(&VmEvent::Stopped) {
        events.push(vm.next_event().await.unwrap());
    }
    let is_full = |event: &VmEvent| {
        matches!(event, VmEvent::DiskError { disk, write: true, no_space: true, .. }
            if disk == "fcvm-scratch")
    };
    while !events.iter().any(is_full) {
        events.push(vm.next_event().await.unwrap());
    }
    assert!(!vm.is_running().await.unwrap());
    std::fs::remove_file(filler).unwrap();
    vm.resume().await.unwrap();
    let (status, text) = shell.answer().await;
    assert_eq!(status, "0", "{text}");
    let read = "dd if=$(disk fcvm-scratch) bs=1M count=6 iflag=direct 2>/dev/null | md5sum";
    assert_eq!(shell.run(read).await, sum);
}
