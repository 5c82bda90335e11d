//! Tests of [`super`]: the archive is read by cpio(1) and by the library's own reader.

use std::fs;
use std::process::{Command, Stdio};

use super::*;
use crate::vmlinux::Architecture;

/// An ELF header and one program header of the given type, for x86-64.
fn program(segment_type: u32) -> Vec<u8> {
    let mut file = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\x02\0\x3e\0\x01\0\0\0".to_vec();
    for wide in [0_u64, 64, 0] {
        file.extend(wide.to_le_bytes());
    }
    file.extend(0_u32.to_le_bytes());
    for half in [64_u16, 56, 1, 0, 0, 0] {
        file.extend(half.to_le_bytes());
    }
    file.extend(segment_type.to_le_bytes());
    file.resize(64 + 56, 0);
    file
}

const PT_LOAD: u32 = 1;
const PT_INTERP: u32 = 3;

fn kernel(directory: &Path) -> GuestKernel {
    let module = |name: &str, bytes: &[u8]| {
        let path = directory.join(format!("{name}.ko"));
        fs::write(&path, bytes).unwrap();
        GuestModule {
            name: name.to_owned(),
            path,
            size_bytes: bytes.len() as u64,
            sha256: files::sha256_hex(bytes),
        }
    };
    GuestKernel {
        zfs: None,
        version: "6.1.0".to_owned(),
        package: None,
        architecture: Architecture::X86_64,
        vmlinux: directory.join("vmlinux"),
        modules: vec![module("virtio_ring", b"one"), module("erofs", b"three")],
    }
}

#[test]
fn members_are_in_order_and_the_same_every_time() {
    let directory = tempfile::tempdir().unwrap();
    let kernel = kernel(directory.path());
    let agent = directory.path().join("agent");
    fs::write(&agent, program(PT_LOAD)).unwrap();
    let first = initramfs(directory.path(), &kernel, &agent, Devices::Qemu).unwrap();
    let bytes = fs::read(&first).unwrap();
    let modules: Vec<&GuestModule> = kernel.modules.iter().collect();
    assert_eq!(
        bytes,
        initramfs_bytes(&kernel, &agent, Devices::Qemu).unwrap()
    );
    assert_eq!(bytes.len() as u64, archive_size_bytes(&modules, 64 + 56));

    let mut members = Vec::new();
    let mut rest = bytes.as_slice();
    loop {
        let mut reader = cpio::NewcReader::new(rest).unwrap();
        if reader.entry().is_trailer() {
            break;
        }
        let mut content = Vec::new();
        io::Read::read_to_end(&mut reader, &mut content).unwrap();
        let entry = reader.entry();
        assert_eq!((entry.uid(), entry.gid(), entry.mtime()), (0, 0, 0));
        members.push((entry.name().to_owned(), entry.mode(), content));
        rest = reader.finish().unwrap();
    }
    let member = |name: &str, mode, content: &[u8]| (name.to_owned(), mode, content.to_vec());
    assert_eq!(
        members,
        [
            member("dev", 0o040755, b""),
            member("dev/console", 0o020600, b""),
            member("proc", 0o040755, b""),
            member("sys", 0o040755, b""),
            member("modules", 0o040755, b""),
            member("modules/list", 0o100644, b"virtio_ring.ko\nerofs.ko\n"),
            member("modules/virtio_ring.ko", 0o100644, b"one"),
            member("modules/erofs.ko", 0o100644, b"three"),
            member("init", 0o100755, &program(PT_LOAD)),
        ]
    );
}

#[test]
fn the_real_cpio_reads_it() {
    let directory = tempfile::tempdir().unwrap();
    let kernel = kernel(directory.path());
    let agent = directory.path().join("agent");
    fs::write(&agent, program(PT_LOAD)).unwrap();
    let archive = initramfs(directory.path(), &kernel, &agent, Devices::Qemu).unwrap();
    let output = Command::new("cpio")
        .args(["--list", "--verbose", "--quiet", "--numeric-uid-gid"])
        .stdin(Stdio::from(fs::File::open(archive).unwrap()))
        .output();
    let Ok(output) = output else {
        println!("skipped: cpio is not installed");
        return;
    };
    let listing = String::from_utf8(output.stdout).unwrap();
    assert!(
        output.status.success() && output.stderr.is_empty(),
        "{listing}"
    );
    let console = listing
        .lines()
        .find(|line| line.ends_with("dev/console"))
        .unwrap();
    assert!(
        console.starts_with("crw-------") && console.contains("5,   1"),
        "{console}"
    );
    assert_eq!(listing.lines().count(), 9);
}

#[test]
fn archives_are_cached_by_content_and_few_are_kept() {
    let directory = tempfile::tempdir().unwrap();
    let kernel = kernel(directory.path());
    let agent = directory.path().join("agent");
    fs::write(&agent, program(PT_LOAD)).unwrap();
    let first = initramfs(directory.path(), &kernel, &agent, Devices::Qemu).unwrap();
    // A cut archive is made anew.
    fs::write(&first, "cut").unwrap();
    assert_eq!(
        initramfs(directory.path(), &kernel, &agent, Devices::Qemu).unwrap(),
        first
    );
    assert!(fs::metadata(&first).unwrap().len() > 100);

    let mut last = first.clone();
    for count in 0..6_u8 {
        let mut bytes = program(PT_LOAD);
        bytes.push(count);
        fs::write(&agent, bytes).unwrap();
        let archive = initramfs(directory.path(), &kernel, &agent, Devices::Qemu).unwrap();
        assert_ne!(archive, last);
        last = archive;
    }
    let archives = files::entries(&directory.path().join("initramfs")).unwrap();
    let count = archives
        .iter()
        .filter(|path| path.extension().is_some())
        .count();
    assert_eq!(count, KEPT_COUNT);
    assert!(last.is_file() && !first.exists());
}

#[test]
fn programs_that_cannot_be_process_1_are_refused() {
    let directory = tempfile::tempdir().unwrap();
    let kernel = kernel(directory.path());
    let agent = directory.path().join("agent");
    let mut foreign = program(PT_LOAD);
    foreign[18] = 0xb7;
    for (bytes, reason) in [
        (program(PT_INTERP), "make agent"),
        (foreign, "another machine"),
        (b"#!/bin/sh\n".to_vec(), "not a 64-bit ELF program"),
    ] {
        fs::write(&agent, bytes).unwrap();
        let error = initramfs(directory.path(), &kernel, &agent, Devices::Qemu)
            .unwrap_err()
            .to_string();
        assert!(error.contains(reason) && !error.contains('\n'), "{error}");
    }
    let missing = directory.path().join("missing");
    let error = initramfs(directory.path(), &kernel, &missing, Devices::Qemu).unwrap_err();
    assert!(
        matches!(error, KernelError::File { action: "read", .. }),
        "{error}"
    );
}

#[test]
fn a_changed_module_is_not_packed() {
    let directory = tempfile::tempdir().unwrap();
    let kernel = kernel(directory.path());
    let agent = directory.path().join("agent");
    fs::write(&agent, program(PT_LOAD)).unwrap();
    fs::write(&kernel.modules[1].path, "other").unwrap();
    let error = initramfs(directory.path(), &kernel, &agent, Devices::Qemu).unwrap_err();
    assert!(matches!(error, KernelError::Damaged { .. }), "{error}");
}

#[test]
fn each_hypervisor_gets_the_modules_of_its_devices() {
    let directory = tempfile::tempdir().unwrap();
    let mut kernel = kernel(directory.path());
    let one = kernel.modules[0].clone();
    let named = |names: &[&str]| -> Vec<GuestModule> {
        names
            .iter()
            .map(|name| GuestModule {
                name: (*name).to_owned(),
                ..one.clone()
            })
            .collect()
    };
    let names = |devices: Devices, kernel: &GuestKernel| -> Vec<String> {
        let modules = devices.modules(kernel).unwrap();
        modules.iter().map(|module| module.name.clone()).collect()
    };
    let pci = [
        "virtio_pci_legacy_dev",
        "virtio_pci_modern_dev",
        "virtio_pci",
    ];
    let all = [
        "virtio",
        "virtio_mmio",
        pci[0],
        pci[1],
        pci[2],
        "virtio_console",
        "vsock",
        "vmw_vsock_virtio_transport_common",
        "vmw_vsock_virtio_transport",
        "virtio_rng",
        "erofs",
    ];
    kernel.modules = named(&all);
    assert_eq!(
        names(Devices::Qemu, &kernel),
        ["virtio", "virtio_mmio", "virtio_console", "erofs"]
    );
    let without = |others: &[&str]| -> Vec<&str> {
        let is_left = |name: &&str| *name != "virtio_console" && !others.contains(name);
        all.into_iter().filter(is_left).collect()
    };
    assert_eq!(names(Devices::Firecracker, &kernel), without(&pci));
    let on_pci = without(&["virtio_mmio"]);
    assert_eq!(names(Devices::FirecrackerPci, &kernel), on_pci);

    // Those that were made ready before there was a second hypervisor, and before it had a second bus.
    let before = |names: &[&str]| {
        all.into_iter()
            .filter(|name| !names.contains(name))
            .collect()
    };
    let old: [(Devices, Vec<&str>); 2] = [
        (
            Devices::Firecracker,
            before(&["vmw_vsock_virtio_transport"]),
        ),
        (Devices::FirecrackerPci, before(&pci)),
    ];
    for (devices, modules) in old {
        kernel.modules = named(&modules);
        let error = devices.modules(&kernel).unwrap_err();
        assert!(error.to_string().contains("fcvm setup kernel"), "{error}");
    }
    // One with everything built in.
    kernel.modules = Vec::new();
    assert!(names(Devices::FirecrackerPci, &kernel).is_empty());
}
