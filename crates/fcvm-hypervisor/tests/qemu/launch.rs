//! Launching, watching and ending VMs, and what is said when that can not be.

use std::io::Read;
use std::net::{TcpListener, TcpStream};
use std::os::unix::net::UnixStream;

use crate::support::{Ending, qemu, read_console_bytes, read_console_until, spec, write_kernel};
use fcvm_hypervisor::qemu::Qemu;
use fcvm_hypervisor::{DiskSpec, HypervisorError, Launch, NetworkBackend, NetworkSpec, Pause};
use fcvm_hypervisor::{ExitCause, VmEvent};

#[tokio::test]
async fn guest_runs_pauses_resumes_and_is_killed() {
    let Some(qemu) = qemu() else { return };
    let directory = tempfile::tempdir().unwrap();
    let kernel = write_kernel(directory.path(), "here I am\n", Ending::Halt);
    let (spec, console) = spec(kernel);
    let memory = spec.hardware.memory.try_clone().unwrap();
    let vm = qemu.launch(spec).await.unwrap();
    let (text, _console) = read_console_until(console, "here I am").await;
    assert!(text.contains("here I am"), "{text}");
    assert!(memory.resident_bytes().unwrap() > 0);
    assert!(vm.is_running().await.unwrap());
    vm.pause().await.unwrap();
    assert_eq!(vm.next_event().await, Some(VmEvent::Stopped));
    assert!(!vm.is_running().await.unwrap());
    vm.pause().await.unwrap();
    vm.resume().await.unwrap();
    assert_eq!(vm.next_event().await, Some(VmEvent::Resumed));
    assert!(vm.is_running().await.unwrap());
    assert!(fcvm_process::is_running(vm.identity()));
    vm.kill();
    let exit = vm.wait_exit().await;
    assert_eq!(exit.cause, ExitCause::Killed(9));
    assert_eq!(vm.next_event().await, None);
    assert!(matches!(
        vm.pause().await,
        Err(HypervisorError::Disconnected { .. })
    ));
    let identity = vm.identity();
    assert!(!fcvm_process::is_running(identity));
}

#[tokio::test]
async fn dropping_a_vm_ends_it() {
    let Some(qemu) = qemu() else { return };
    let directory = tempfile::tempdir().unwrap();
    let (spec, _console) = spec(write_kernel(directory.path(), "", Ending::Halt));
    let vm = qemu.launch(spec).await.unwrap();
    let identity = vm.identity();
    assert!(fcvm_process::is_running(identity));
    drop(vm);
    assert!(!fcvm_process::is_running(identity));
}

#[tokio::test]
async fn guest_ends_itself() {
    let Some(qemu) = qemu() else { return };
    for (ending, cause) in [
        (Ending::PowerOff, ExitCause::PoweredOff),
        (Ending::TripleFault, ExitCause::Reset),
    ] {
        let directory = tempfile::tempdir().unwrap();
        let (spec, _console) = spec(write_kernel(directory.path(), "", ending));
        let vm = qemu.launch(spec).await.unwrap();
        let exit = vm.wait_exit().await;
        assert_eq!(exit.cause, cause, "{exit}");
        assert!(exit.process.status.success(), "{exit}");
    }
}

#[tokio::test]
async fn full_console_stops_neither_qemu_nor_its_control_channel() {
    let Some(qemu) = qemu() else { return };
    let directory = tempfile::tempdir().unwrap();
    let (spec, console) = spec(write_kernel(directory.path(), "", Ending::WriteForever));
    let vm = qemu.launch(spec).await.unwrap();
    // More than the pipe holds: the guest has met the full pipe and went on when it was read.
    let (length, console) = read_console_bytes(console, 200_000).await;
    assert_eq!(length, 200_000);
    assert!(vm.is_running().await.unwrap());
    drop(console);
    assert!(vm.is_running().await.unwrap());
}

#[tokio::test]
async fn hardware_is_recorded_with_the_version() {
    let Some(qemu) = qemu() else { return };
    let directory = tempfile::tempdir().unwrap();
    let kernel = write_kernel(directory.path(), "", Ending::Halt);
    let disk_path = directory.path().join("disk");
    std::fs::write(&disk_path, vec![0; 4096]).unwrap();
    let mut lines = Vec::new();
    for _ in 0..2 {
        let (mut spec, _console) = spec(kernel.clone());
        spec.hardware.disks.push(DiskSpec::raw(
            std::fs::File::open(&disk_path).unwrap(),
            "fcvm-root",
            true,
        ));
        let vm = qemu.launch(spec).await.unwrap();
        assert_eq!(vm.version(), qemu.check_version().unwrap());
        lines.push(vm.device_line().clone());
    }
    assert_eq!(lines[0], lines[1]);
}

#[tokio::test]
async fn bad_specifications_are_refused_before_qemu_runs() {
    let Some(qemu) = qemu() else { return };
    let directory = tempfile::tempdir().unwrap();
    let kernel = write_kernel(directory.path(), "", Ending::Halt);
    let (mut no_cpu, _console) = spec(kernel.clone());
    no_cpu.hardware.cpu_count = 0;
    let (no_kernel, _console) = spec(directory.path().join("missing"));
    let (mut bad_serial, _console) = spec(kernel);
    bad_serial.hardware.disks.push(DiskSpec::raw(
        tempfile::tempfile().unwrap(),
        "a,read-only=off",
        true,
    ));
    for (spec, expected) in [
        (no_cpu, "0 processors"),
        (no_kernel, "missing: No such file"),
        (bad_serial, "disk serial 'a,read-only=off'"),
    ] {
        let error = qemu.launch(spec).await.unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    }
}

#[tokio::test]
async fn qemu_that_gives_up_says_why() {
    let Some(qemu) = qemu() else { return };
    let directory = tempfile::tempdir().unwrap();
    let kernel = directory.path().join("kernel");
    std::fs::write(&kernel, "no kernel at all").unwrap();
    let (spec, _console) = spec(kernel);
    let error = qemu.launch(spec).await.unwrap_err().to_string();
    assert!(
        error.starts_with("the VM did not start: qemu exited with status 1: "),
        "{error}"
    );
    assert!(!error.contains('\n'), "{error}");
}

#[tokio::test]
async fn qemu_that_is_missing_or_too_old() {
    let error = Qemu::locate(None, "/nonexistent").unwrap_err();
    assert!(error.to_string().contains("install"), "{error}");
    let directory = tempfile::tempdir().unwrap();
    let script = directory.path().join("qemu-system-x86_64");
    let text = "#!/bin/sh\ncase $1 in --version) echo 'QEMU emulator version 5.2.0 (old)';;\n\
                *) echo 'unknown option' >&2; exit 1;; esac\n";
    fcvm_testing::write_program(&script, text);
    let old = Qemu::locate(Some(&script), "").unwrap();
    let kernel = write_kernel(directory.path(), "", Ending::Halt);
    let (spec, _console) = spec(kernel);
    let error = old.launch(spec).await.unwrap_err();
    assert!(matches!(error, HypervisorError::Version { .. }), "{error}");
    assert!(
        error.to_string().contains("5.2.0") && error.to_string().contains("from 7.2.0 on"),
        "{error}"
    );
}

#[tokio::test]
async fn user_network_publishes_ports_and_stream_network_is_connected() {
    let Some(qemu) = qemu() else { return };
    let directory = tempfile::tempdir().unwrap();
    let kernel = write_kernel(directory.path(), "", Ending::Halt);
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let network = |port: u16| NetworkSpec {
        backend: NetworkBackend::User {
            forwards: vec![format!("127.0.0.1:{port}:80").parse().unwrap()],
            ipv6: true,
        },
        mac: [0x52, 0x54, 0, 0xfc, 0, 0x0f],
        announce: false,
    };
    let (mut taken, _console) = spec(kernel.clone());
    taken.hardware.network = Some(network(port));
    let error = qemu.launch(taken).await.unwrap_err().to_string();
    assert!(error.contains(&port.to_string()), "{error}");
    drop(listener);
    let (mut free, _console) = spec(kernel.clone());
    free.hardware.network = Some(network(port));
    let _vm = qemu.launch(free).await.unwrap();
    TcpStream::connect(("127.0.0.1", port)).unwrap();

    let (backend, other) = UnixStream::pair().unwrap();
    let (mut stream, _console) = spec(kernel);
    stream.hardware.network = Some(NetworkSpec {
        backend: NetworkBackend::Stream(other.into()),
        ..network(port)
    });
    let vm = qemu.launch(stream).await.unwrap();
    backend.set_nonblocking(true).unwrap();
    // QEMU holds the other end: nothing to read, and no end.
    let error = (&backend).read(&mut [0]).unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::WouldBlock);
    drop(vm);
    assert_eq!((&backend).read(&mut [0]).unwrap(), 0);
}
