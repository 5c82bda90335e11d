//! The driver against a real Firecracker, where `FCVM_FIRECRACKER_BIN` names one and KVM runs guests, as
//! `make lab-test` sees to.

use std::fs::{self, File};
use std::io::Read;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use fcvm_hypervisor::firecracker::{
    Firecracker, FirecrackerVm, MemoryBackend, SavedMemory, SnapshotFiles,
};
use fcvm_hypervisor::{
    Accelerator, BootSpec, ExitCause, GuestMemory, HardwareSpec, HypervisorError, Launch,
    LaunchSpec, Pause,
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
    files: &SnapshotFiles,
) -> Result<(FirecrackerVm, File), HypervisorError> {
    let memory = File::open(&files.memory).unwrap();
    let (hardware, console) = hardware(GuestMemory::copy_on_write(memory.into()).unwrap());
    let standby = firecracker.prepare(hardware).await?;
    let backend = MemoryBackend::File(files.memory.clone());
    Ok((standby.load(&files.state, &backend).await?, console))
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
    let files = SnapshotFiles {
        state: path("state"),
        memory: path("memory"),
    };
    vm.save(&files, SavedMemory::Full).await.unwrap();
    assert_eq!(fs::metadata(&files.memory).unwrap().len(), MEMORY.bytes());
    vm.resume().await.unwrap();
    runs(console).await;

    let Some(first) = firecracker(&path("clone")) else {
        return;
    };
    let (clone_vm, console) = clone(&first, &files).await.unwrap();
    assert!(!clone_vm.is_running().await.unwrap());
    clone_vm.resume().await.unwrap();
    let console = runs(console).await;
    // Only what is in memory is written: with the file in the page cache that can be all.
    clone_vm.pause().await.unwrap();
    let difference = SnapshotFiles {
        state: path("state2"),
        memory: path("memory2"),
    };
    clone_vm
        .save(&difference, SavedMemory::Difference)
        .await
        .unwrap();
    let written = fs::metadata(&difference.memory).unwrap();
    assert_eq!(written.len(), MEMORY.bytes());
    println!("a difference of {} KiB", written.blocks() / 2);
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
    let files = SnapshotFiles {
        state: path("state"),
        memory: path("memory"),
    };
    fs::write(&files.state, "no state").unwrap();
    File::create(&files.memory)
        .unwrap()
        .set_len(MEMORY.bytes())
        .unwrap();
    let error = clone(&firecracker, &files).await.map(drop).unwrap_err();
    println!("{error}");
    assert!(
        matches!(error, HypervisorError::State { what: "loaded", .. }),
        "{error}"
    );
    assert!(!error.to_string().contains('\n'), "{error}");
    assert!(!path("vm").exists());
}
