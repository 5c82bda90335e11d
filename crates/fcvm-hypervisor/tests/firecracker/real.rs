//! The driver against a real Firecracker, where `FCVM_FIRECRACKER_BIN` names one and KVM runs guests, as
//! `make lab-test` sees to.

use std::fs::{self, File};
use std::io::Read;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use fcvm_hypervisor::firecracker::{Firecracker, FirecrackerVm, SavedMemory};
use fcvm_hypervisor::{
    Accelerator, BootSpec, DeviceState, ExitCause, GuestMemory, HardwareSpec, HypervisorError,
    Launch, LaunchSpec, MemoryBackend, Pause, RestoreState,
};
use fcvm_types::ByteSize;

use crate::elf;

/// What the pipe of a console holds.
const PIPE_BYTES: usize = 4096;
const MEMORY: ByteSize = ByteSize::from_mib(128);

/// The real one; says that the test is skipped where there is none.
fn firecracker(directory: &Path) -> Option<Firecracker> {
    let Some(program) = std::env::var_os("FCVM_FIRECRACKER_BIN") else {
        println!("skipped: FCVM_FIRECRACKER_BIN names no Firecracker");
        return None;
    };
    if let Err(error) = File::options().read(true).write(true).open("/dev/kvm") {
        println!("skipped: /dev/kvm: {error}");
        return None;
    }
    Some(Firecracker::locate(Some(Path::new(&program)), "", directory.to_owned()).unwrap())
}

/// A kernel of a few instructions that writes to the console without end.
fn kernel(directory: &Path) -> PathBuf {
    // cli; mov edx,0x3f8; mov al,'x'; out dx,al; jmp to out
    let code = [0xfa, 0xba, 0xf8, 0x03, 0, 0, 0xb0, b'x', 0xee, 0xeb, 0xfd];
    let path = directory.join("kernel");
    fs::write(&path, elf::kernel(&code)).unwrap();
    path
}

fn hardware(memory: GuestMemory) -> (HardwareSpec, File) {
    let (reader, writer) = std::io::pipe().unwrap();
    // An emulated processor takes long for each byte.
    rustix::pipe::fcntl_setpipe_size(&writer, PIPE_BYTES).unwrap();
    let hardware = HardwareSpec {
        cpu_count: 1,
        memory,
        disks: Vec::new(),
        network: None,
        accelerator: Accelerator::Kvm,
        translation_cache: ByteSize::from_mib(1),
        console: writer.into(),
    };
    (hardware, File::from(OwnedFd::from(reader)))
}

/// Waits until the guest has written something that was not in the pipe before.
async fn runs(console: File) -> File {
    tokio::task::spawn_blocking(move || {
        let new = PIPE_BYTES as u64 + 100;
        let mut part = console.take(new);
        let read = std::io::copy(&mut part, &mut std::io::sink()).unwrap();
        assert_eq!(read, new);
        part.into_inner()
    })
    .await
    .unwrap()
}

async fn launch(
    firecracker: &Firecracker,
    kernel: PathBuf,
) -> Result<(FirecrackerVm, File), HypervisorError> {
    let (hardware, console) = hardware(GuestMemory::new(MEMORY).unwrap());
    let boot = BootSpec {
        kernel,
        initramfs: None,
        extra_kernel_args: Vec::new(),
    };
    let vm = firecracker.launch(LaunchSpec { hardware, boot }).await?;
    Ok((vm, console))
}

async fn clone(
    firecracker: &Firecracker,
    state: &DeviceState,
    memory: &File,
) -> Result<(FirecrackerVm, File), HypervisorError> {
    let memory = memory.try_clone().unwrap();
    let (hardware, console) = hardware(GuestMemory::copy_on_write(memory.into()).unwrap());
    let standby = firecracker.prepare(hardware).await?;
    Ok((standby.load(state, &MemoryBackend::File).await?, console))
}

fn memory_file() -> File {
    let flags = rustix::fs::MemfdFlags::CLOEXEC;
    let file = File::from(rustix::fs::memfd_create("fcvm-guest-memory", flags).unwrap());
    file.set_len(MEMORY.bytes()).unwrap();
    file
}

fn is_same(one: &File, other: &File) -> bool {
    let content = |file: &File| {
        let mut bytes = vec![0; usize::try_from(MEMORY.bytes()).unwrap()];
        file.read_exact_at(&mut bytes, 0).unwrap();
        bytes
    };
    content(one) == content(other)
}

#[tokio::test]
async fn a_real_vm_is_saved_and_cloned() {
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name);
    let Some(source) = firecracker(&path("vm")) else {
        return;
    };
    println!("Firecracker {}", source.check_version().unwrap());
    let (vm, console) = launch(&source, kernel(directory.path())).await.unwrap();
    let console = runs(console).await;
    vm.pause().await.unwrap();
    assert!(!vm.is_running().await.unwrap());
    // What it has in memory, over zeros, is all that it has.
    let (memory, all) = (memory_file(), memory_file());
    vm.save(&memory, SavedMemory::Difference).await.unwrap();
    let state = vm.save(&all, SavedMemory::Full).await.unwrap();
    assert!(is_same(&memory, &all));
    println!(
        "a memory of {} KiB",
        memory.metadata().unwrap().blocks() / 2
    );
    vm.resume().await.unwrap();
    runs(console).await;

    let Some(first) = firecracker(&path("clone")) else {
        return;
    };
    let (clone_vm, console) = clone(&first, &state, &memory).await.unwrap();
    assert!(!clone_vm.is_running().await.unwrap());
    clone_vm.resume().await.unwrap();
    let console = runs(console).await;
    // What it has written since, over what it began with, is all that it has.
    clone_vm.pause().await.unwrap();
    let (over, all, written) = (memory_file(), memory_file(), memory_file());
    std::io::copy(&mut &memory, &mut &over).unwrap();
    clone_vm.save(&over, SavedMemory::Difference).await.unwrap();
    clone_vm.save(&all, SavedMemory::Full).await.unwrap();
    assert!(is_same(&over, &all));
    clone_vm
        .save(&written, SavedMemory::Difference)
        .await
        .unwrap();
    println!(
        "a difference of {} KiB",
        written.metadata().unwrap().blocks() / 2
    );
    assert!(written.metadata().unwrap().blocks() < all.metadata().unwrap().blocks());
    clone_vm.resume().await.unwrap();
    drop(runs(console).await);
    clone_vm.kill();
    assert_eq!(clone_vm.wait_exit().await.cause, ExitCause::Killed(9));
}

#[tokio::test]
async fn a_real_one_tells_what_is_wrong_with_a_snapshot_and_a_kernel() {
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name);
    let Some(firecracker) = firecracker(&path("vm")) else {
        return;
    };
    let kernel = path("kernel");
    fs::write(&kernel, "no kernel").unwrap();
    let error = launch(&firecracker, kernel).await.map(drop).unwrap_err();
    println!("{error}");
    assert!(matches!(error, HypervisorError::Refused { .. }), "{error}");
    let state = DeviceState::from_bytes(b"no state".to_vec()).unwrap();
    let memory = memory_file();
    let error = clone(&firecracker, &state, &memory)
        .await
        .map(drop)
        .unwrap_err();
    println!("{error}");
    assert!(
        matches!(error, HypervisorError::State { what: "loaded", .. }),
        "{error}"
    );
    assert!(!error.to_string().contains('\n'), "{error}");
    assert!(!path("vm").exists());
}

#[tokio::test]
async fn a_real_one_does_not_load_memory_that_is_cut_off() {
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name);
    let (Some(source), Some(clones)) = (firecracker(&path("vm")), firecracker(&path("clone")))
    else {
        return;
    };
    let (vm, console) = launch(&source, kernel(directory.path())).await.unwrap();
    let console = runs(console).await;
    vm.pause().await.unwrap();
    let memory = memory_file();
    let state = vm.save(&memory, SavedMemory::Full).await.unwrap();
    for bytes in [MEMORY.bytes() - 4096, MEMORY.bytes() / 2] {
        memory.set_len(bytes).unwrap();
        let error = clone(&clones, &state, &memory).await.map(drop).unwrap_err();
        println!("{error}");
        assert!(
            matches!(error, HypervisorError::State { what: "loaded", .. }),
            "{error}"
        );
        assert!(!error.to_string().contains('\n'), "{error}");
        assert!(!path("clone").exists());
    }
    vm.resume().await.unwrap();
    drop(runs(console).await);
}
