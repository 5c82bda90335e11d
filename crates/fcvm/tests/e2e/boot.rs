//! Guests that do not come up: kernels, agents, memory, and a QEMU that is not there.

use std::fs;

use crate::base::{IMAGE, base};
use crate::lab::Lab;

/// An x86-64 kernel as QEMU's microvm and Firecracker boot it (an ELF file with a PVH entry point, Xen's
/// docs/misc/pvh.pandoc) that says one line on the serial port and then hangs.
fn hanging_kernel() -> Vec<u8> {
    const LOAD_ADDRESS: u32 = 0x10_0000;
    const MESSAGE: &[u8] = b"this kernel hangs\n";
    // mov dx, 0x3f8; mov esi, MESSAGE; mov ecx, LENGTH; lodsb; out dx, al; loop to the lodsb; cli; hlt;
    // jmp to the hlt. Firecracker takes one byte at a time.
    let mut code = vec![0x66, 0xba, 0xf8, 0x03, 0xbe];
    let message_at = LOAD_ADDRESS + 22;
    code.extend(message_at.to_le_bytes());
    code.push(0xb9);
    code.extend(u32::try_from(MESSAGE.len()).unwrap().to_le_bytes());
    code.extend([0xac, 0xee, 0xe2, 0xfc, 0xfa, 0xf4, 0xeb, 0xfd]);
    assert_eq!(code.len(), 22);
    code.extend(MESSAGE);
    code.resize(64, 0);
    // Type 18, XEN_ELFNOTE_PHYS32_ENTRY.
    let mut note = Vec::new();
    for word in [4_u32, 8, 18] {
        note.extend(word.to_le_bytes());
    }
    note.extend(b"Xen\0");
    note.extend(u64::from(LOAD_ADDRESS).to_le_bytes());
    let headers_bytes = 64 + 2 * 56;
    let (code_at, note_at) = (0x1000_u64, headers_bytes as u64);
    let mut file = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
    for half in [2_u16, 62] {
        file.extend(half.to_le_bytes());
    }
    file.extend(1_u32.to_le_bytes());
    for long in [u64::from(LOAD_ADDRESS), 64, 0] {
        file.extend(long.to_le_bytes());
    }
    file.extend(0_u32.to_le_bytes());
    for half in [64_u16, 56, 2, 64, 0, 0] {
        file.extend(half.to_le_bytes());
    }
    let mut segment = |kind: u32, at: u64, address: u64, size: usize, align: u64| {
        file.extend(kind.to_le_bytes());
        file.extend(7_u32.to_le_bytes());
        for long in [at, address, address, size as u64, size as u64, align] {
            file.extend(long.to_le_bytes());
        }
    };
    segment(1, code_at, LOAD_ADDRESS.into(), code.len(), 0x1000);
    segment(4, note_at, 0, note.len(), 4);
    file.extend(note);
    file.resize(usize::try_from(code_at).unwrap(), 0);
    file.extend(code);
    file
}

#[test]
fn a_kernel_that_hangs_is_given_up_with_its_last_words() {
    let Some(lab) = Lab::new() else { return };
    if !cfg!(target_arch = "x86_64") {
        println!("skipped: the kernel of this test is for x86-64");
        return;
    }
    let kernel = lab.write("vmlinux", hanging_kernel());
    for mode in ["--rm", "-d"] {
        let line = lab.fails(
            125,
            &[
                "run",
                mode,
                "--boot-timeout",
                "3s",
                "--kernel",
                &kernel,
                "--network",
                "none",
                IMAGE,
                "true",
            ],
        );
        assert!(
            line.contains("--boot-timeout") && line.contains("this kernel hangs"),
            "{line}"
        );
    }
    lab.finish();
}

#[test]
fn what_is_no_kernel_is_refused_before_a_start() {
    let Some(lab) = Lab::new() else { return };
    let garbage = lab.write("garbage", vec![0x5a; 100_000]);
    let program = lab.program().to_owned();
    let mut truncated = hanging_kernel();
    truncated.truncate(100);
    let truncated = lab.write("truncated", truncated);
    let missing = lab.file("missing").to_str().unwrap().to_owned();
    for kernel in [&garbage, &program, &truncated, &missing] {
        let line = lab.fails(125, &["run", "--rm", "--kernel", kernel, IMAGE, "true"]);
        assert!(line.contains(kernel.as_str()), "{line}");
    }
    lab.finish();
}

#[test]
fn an_agent_that_is_silent_or_ends_is_told() {
    let Some(mut lab) = Lab::new() else { return };
    lab.agent = base().unwrap().silent_agent.clone();
    let line = lab.fails(
        125,
        &[
            "run",
            "--rm",
            "--boot-timeout",
            "15s",
            "--network",
            "none",
            IMAGE,
            "true",
        ],
    );
    assert!(line.contains("--boot-timeout"), "{line}");
    lab.agent = base().unwrap().ending_agent.clone();
    let line = lab.fails(125, &["run", "--rm", "--network", "none", IMAGE, "true"]);
    assert!(
        line.contains("did not boot") && line.contains("panic"),
        "{line}"
    );
    // An agent that is no static program, and none at all.
    lab.agent = lab.write("agent", "#!/bin/sh\n").into();
    let line = lab.fails(125, &["run", "--rm", "--network", "none", IMAGE, "true"]);
    assert!(line.contains("agent"), "{line}");
    fs::remove_file(&lab.agent).unwrap();
    let line = lab.fails(125, &["run", "--rm", "--network", "none", IMAGE, "true"]);
    assert!(line.contains("FCVM_AGENT_BIN"), "{line}");
    lab.finish();
}

#[test]
fn too_little_memory_is_refused_or_told() {
    let Some(lab) = Lab::new() else { return };
    let line = lab.fails(125, &["run", "--rm", "--memory", "16m", IMAGE, "true"]);
    assert!(line.contains("memory") && line.contains("64 MiB"), "{line}");
    // The least that is allowed either boots or is told with the guest's words, in a bounded time.
    let output = lab.fcvm(&[
        "run",
        "--rm",
        "--memory",
        "64m",
        "--boot-timeout",
        "60s",
        "--network",
        "none",
        IMAGE,
        "echo",
        "it boots",
    ]);
    if output.code == 0 {
        assert_eq!(output.text(), "it boots\n");
    } else {
        crate::lab::one_error(output, 125, "a run in 64 MiB");
    }
    lab.finish();
}

/// A container that takes more memory than there is loses its own process, not the VM.
#[test]
fn memory_that_runs_out_kills_the_process_that_took_it() {
    let Some(lab) = Lab::new() else { return };
    lab.idle_vm("box", &["--memory", "128m", "--network", "none"]);
    let output = lab.fcvm(&[
        "exec",
        "box",
        "sh",
        "-c",
        "head -c 500000000 /dev/zero | tail -c 400000000 | wc -c; echo survived",
    ]);
    assert!(output.text().contains("survived"), "{output:?}");
    assert_eq!(
        lab.sh("box", "echo the agent answers"),
        "the agent answers\n"
    );
    lab.ok(&["rm", "-f", "box"]);
    lab.finish();
}

#[test]
fn a_missing_or_broken_qemu_is_told() {
    let Some(mut lab) = Lab::of_qemu("is what this test takes away") else {
        return;
    };
    let empty = lab.file("no-programs");
    fs::create_dir(&empty).unwrap();
    lab.without_program(qemu());
    let line = lab.fails(125, &["run", "--rm", "--network", "none", IMAGE, "true"]);
    assert!(line.contains("QEMU") && line.contains("install"), "{line}");
    lab.path = None;
    let real = crate::base::find(qemu()).unwrap();
    let script = format!(
        "[ \"$1\" = --version ] && exec {} --version; echo 'no such machine' >&2; exit 1",
        real.display()
    );
    lab.shadow(qemu(), &script);
    let line = lab.fails(125, &["run", "--rm", "--network", "none", IMAGE, "true"]);
    assert!(line.contains("no such machine"), "{line}");
    lab.finish();
}

fn qemu() -> &'static str {
    if cfg!(target_arch = "aarch64") {
        "qemu-system-aarch64"
    } else {
        "qemu-system-x86_64"
    }
}

#[test]
fn a_wish_for_kvm_where_it_does_not_work_is_told() {
    let Some(lab) = Lab::of_qemu("runs without KVM") else {
        return;
    };
    let probed = lab.fcvm(&["setup", "preflight", "--format", "json"]);
    if !probed.text().contains("\"tcg\"") && !probed.text().to_lowercase().contains("emulat") {
        println!("skipped: KVM works here");
        return;
    }
    let output = lab.fcvm(&[
        "run",
        "--rm",
        "--accel",
        "kvm",
        "--network",
        "none",
        IMAGE,
        "true",
    ]);
    if output.code == 0 {
        println!("skipped: KVM works here");
    } else {
        let line = crate::lab::one_error(output, 125, "run --accel kvm");
        assert!(line.to_lowercase().contains("kvm"), "{line}");
    }
    assert_eq!(
        lab.ok(&[
            "run",
            "--rm",
            "--accel",
            "tcg",
            "--network",
            "none",
            IMAGE,
            "echo",
            "emulated"
        ]),
        "emulated\n"
    );
    lab.finish();
}
