//! Parts of the tests with real QEMU: a guest of a few instructions, and what every launch needs.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use fcvm_hypervisor::qemu::Qemu;
use fcvm_hypervisor::spec::TRANSLATION_CACHE_BOOT;
use fcvm_hypervisor::{Accelerator, BootSpec, GuestMemory, HardwareSpec, LaunchSpec};
use fcvm_types::ByteSize;

use crate::elf;

/// QEMU of this machine; says that the test is skipped where there is none.
pub(crate) fn qemu() -> Option<Qemu> {
    match Qemu::locate(None, &std::env::var("PATH").unwrap_or_default()) {
        Ok(qemu) => Some(qemu),
        Err(error) => {
            println!("skipped: {error}");
            None
        }
    }
}

/// Machine code for a 32-bit flat environment, position independent but for the text's address.
#[derive(Clone, Copy)]
pub(crate) enum Ending {
    /// Stay there, with the processor halted.
    Halt,
    /// Power off through the ACPI registers of QEMU's microvm.
    PowerOff,
    /// Reset by a triple fault.
    TripleFault,
    /// Write text to the console without end.
    WriteForever,
}

/// Writes a kernel that prints `text` on the serial console and ends as told: an ELF file with a
/// PVH entry (Xen's PHYS32_ENTRY note), which is what QEMU boots a `vmlinux` by.
pub(crate) fn write_kernel(directory: &Path, text: &str, ending: Ending) -> PathBuf {
    let mut code: Vec<u8> = vec![0xfa, 0xba, 0xf8, 0x03, 0, 0, 0xbe]; // cli; mov edx,0x3f8; mov esi,
    let text_at = code.len();
    code.extend([0; 4]); // the text's address
    code.extend([0xac, 0x84, 0xc0, 0x74, 0x03, 0xee, 0xeb, 0xf8]); // lodsb; test; jz; out; jmp
    match ending {
        Ending::Halt => {}
        // mov byte [0xfea00200], SLP_EN | 5 << 2
        Ending::PowerOff => code.extend([0xc6, 0x05, 0x00, 0x02, 0xa0, 0xfe, 0x34]),
        // push 0; push 0; lidt [esp]; int3
        Ending::TripleFault => code.extend([
            0xbc, 0x00, 0x00, 0x20, 0x00, 0x6a, 0, 0x6a, 0, 0x0f, 0x01, 0x1c, 0x24, 0xcc,
        ]),
        // mov al,'x'; out dx,al; jmp
        Ending::WriteForever => code.extend([0xb0, b'x', 0xee, 0xeb, 0xfd]),
    }
    code.extend([0xf4, 0xeb, 0xfd]); // hlt; jmp
    let text_address = elf::LOAD_ADDRESS + code.len() as u32;
    code[text_at..text_at + 4].copy_from_slice(&text_address.to_le_bytes());
    code.extend(text.as_bytes());
    code.push(0);
    let path = directory.join("kernel.elf");
    std::fs::write(&path, elf::kernel(&code)).unwrap();
    path
}

/// A specification without disks and network, and the reading end of its console.
pub(crate) fn spec(kernel: PathBuf) -> (LaunchSpec, File) {
    let (reader, writer) = std::io::pipe().unwrap();
    let spec = LaunchSpec {
        hardware: HardwareSpec {
            cpu_count: 1,
            memory: GuestMemory::new(ByteSize::from_mib(64)).unwrap(),
            disks: Vec::new(),
            network: None,
            accelerator: Accelerator::Tcg { tsc_khz: None },
            translation_cache: TRANSLATION_CACHE_BOOT,
            console: writer.into(),
        },
        boot: BootSpec {
            kernel,
            initramfs: None,
            extra_kernel_args: Vec::new(),
        },
    };
    (spec, File::from(std::os::fd::OwnedFd::from(reader)))
}

/// Reads from a console until `text` was seen, or the console has ended.
pub(crate) async fn read_console_until(console: File, text: &'static str) -> (String, File) {
    tokio::task::spawn_blocking(move || {
        let mut console = console;
        let mut seen = Vec::new();
        let mut byte = [0; 1];
        while !String::from_utf8_lossy(&seen).contains(text) {
            match console.read(&mut byte) {
                Ok(1) => seen.push(byte[0]),
                _ => break,
            }
        }
        (String::from_utf8_lossy(&seen).into_owned(), console)
    })
    .await
    .unwrap()
}

/// Reads so many bytes from a console and returns how many there were.
pub(crate) async fn read_console_bytes(console: File, length: u64) -> (u64, File) {
    tokio::task::spawn_blocking(move || {
        let mut part = console.take(length);
        let read = std::io::copy(&mut part, &mut std::io::sink()).unwrap();
        (read, part.into_inner())
    })
    .await
    .unwrap()
}
