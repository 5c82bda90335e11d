//! Device state saved, loaded into other processes, and what the guest makes of it.

use std::fs::File;
use std::os::fd::AsFd;

use fcvm_hypervisor::probe::measure_tsc_khz;
use fcvm_hypervisor::qemu::QemuStandby;
use fcvm_hypervisor::spec::TRANSLATION_CACHE_CLONE;
use fcvm_hypervisor::{
    Accelerator, DeviceState, DiskSpec, GuestMemory, HardwareSpec, HypervisorError, Launch, Pause,
    RestoreState, SaveState,
};
use fcvm_types::ByteSize;

use crate::linux::{Linux, Shell};
use crate::support::{self, qemu};

const MEMORY: ByteSize = ByteSize::from_mib(128);

fn hardware(memory: GuestMemory, disk: &File) -> HardwareSpec {
    HardwareSpec {
        cpu_count: 1,
        memory,
        disks: vec![DiskSpec::raw(disk.try_clone().unwrap(), "data", false)],
        network: None,
        accelerator: Accelerator::Tcg {
            tsc_khz: measure_tsc_khz(),
        },
        translation_cache: TRANSLATION_CACHE_CLONE,
        // Nobody looks at the console; the guest must not care.
        console: std::io::pipe().unwrap().1.into(),
    }
}

/// The memory of a clone of `memory`.
fn view(memory: &GuestMemory) -> GuestMemory {
    GuestMemory::copy_on_write(memory.as_fd().try_clone_to_owned().unwrap()).unwrap()
}

fn disk() -> File {
    let disk = tempfile::tempfile().unwrap();
    disk.set_len(16 << 20).unwrap();
    disk
}

/// A VM is forked by succession: its memory file becomes the template, and the VM itself goes on as a
/// clone of it, on the same agent channel.
#[tokio::test]
async fn vm_goes_on_in_a_successor_and_its_clones_are_independent() {
    let Some(qemu) = qemu() else { return };
    let directory = tempfile::tempdir().unwrap();
    let Some(linux) = Linux::prepare(directory.path()) else {
        return;
    };
    let memory = GuestMemory::new(MEMORY).unwrap();
    let source_disk = disk();
    let (mut spec, _console) = support::spec(linux.kernel.clone());
    spec.hardware = hardware(memory.try_clone().unwrap(), &source_disk);
    spec.boot.initramfs = Some(linux.initramfs.clone());
    let mut source = qemu.launch(spec).await.unwrap();
    let mut shell = Shell::connect(source.take_agent().unwrap()).await;
    let fill =
        "dd if=/dev/urandom of=/tmp/data bs=1M count=8 2>/dev/null; sync; cat /tmp/data | md5sum";
    let sum = shell.run(fill).await;
    shell
        .run("dd if=/tmp/data of=$(disk data) bs=1M count=1 oflag=direct 2>/dev/null")
        .await;

    let clone_disk = disk();
    let successor = qemu
        .prepare_successor(&source, hardware(view(&memory), &source_disk))
        .await
        .unwrap();
    let clone = qemu
        .prepare(hardware(view(&memory), &clone_disk))
        .await
        .unwrap();
    assert_eq!(
        source.device_line().difference(clone.vm().device_line()),
        None
    );
    // A line is under way while the VM is moved.
    shell.send("sleep 0.3; echo moved").await;
    source.pause().await.unwrap();
    let state = source.save_state().await.unwrap();
    assert!(state.as_bytes().len() > 10_000);
    let again = source.save_state().await.unwrap();
    assert_eq!(again.as_bytes().len(), state.as_bytes().len());
    copy(&source_disk, &clone_disk);
    source.kill();
    source.wait_exit().await;
    let successor = successor.load(&state).await.unwrap();
    assert!(!successor.is_running().await.unwrap());
    successor.resume().await.unwrap();
    // No page of the template can change any more.
    rustix::fs::fcntl_add_seals(&memory, rustix::fs::SealFlags::WRITE).unwrap();
    let mut clone = clone.load(&state).await.unwrap();
    clone.resume().await.unwrap();

    assert_eq!(shell.answer().await, ("0".to_owned(), "moved\n".to_owned()));
    let mut clone_shell = Shell::of_clone(clone.take_agent().unwrap());
    // The clone's own answer to the line that was under way.
    assert_eq!(clone_shell.answer().await.1, "moved\n");
    shell.run("echo source > /tmp/who; echo source | dd of=$(disk data) conv=notrunc 2>/dev/null; sync").await;
    clone_shell
        .run(
            "echo clone > /tmp/who; echo clone | dd of=$(disk data) conv=notrunc 2>/dev/null; sync",
        )
        .await;
    for (shell, name) in [(&mut shell, "source"), (&mut clone_shell, "clone")] {
        assert_eq!(shell.run("md5sum < /tmp/data").await, sum);
        assert_eq!(shell.run("cat /tmp/who").await, name);
        let read = "dd if=$(disk data) bs=4096 count=1 iflag=direct 2>/dev/null | head -n 1";
        assert_eq!(shell.run(read).await, name);
    }
    // The successor is a VM like any other: its state, too, can be saved.
    successor.pause().await.unwrap();
    successor.save_state().await.unwrap();
    successor.resume().await.unwrap();
    assert_eq!(shell.run("md5sum < /tmp/data").await, sum);
}

fn copy(from: &File, to: &File) {
    use std::os::unix::fs::FileExt;
    let mut bytes = vec![0; 16 << 20];
    from.read_exact_at(&mut bytes, 0).unwrap();
    to.write_all_at(&bytes, 0).unwrap();
}

#[tokio::test]
async fn state_that_is_none_or_of_other_hardware_is_refused() {
    let Some(qemu) = qemu() else { return };
    let memory = GuestMemory::new(MEMORY).unwrap();
    let prepare = async || -> QemuStandby {
        qemu.prepare(hardware(view(&memory), &disk()))
            .await
            .unwrap()
    };
    assert!(DeviceState::from_bytes(Vec::new()).is_err());
    for state in [
        &b"no state at all"[..],
        &[0x51, 0x45, 0x56, 0x4d, 0, 0, 0, 3, 9, 9, 9],
    ] {
        let state = DeviceState::from_bytes(state.to_vec()).unwrap();
        let standby = prepare().await;
        let identity = standby.vm().identity();
        let error = standby.load(&state).await.unwrap_err();
        assert!(
            matches!(error, HypervisorError::State { what: "loaded", .. }),
            "{error}"
        );
        assert!(!fcvm_process::is_running(identity));
    }
    let shared = GuestMemory::new(MEMORY).unwrap();
    let error = qemu.prepare(hardware(shared, &disk())).await.unwrap_err();
    assert!(error.to_string().contains("private view"), "{error}");
}
