//! The throw-away guest: a page of x86-64 code in long mode, run by KVM itself.
//!
//! The code runs the instructions that emulating hosts are known to stop at, then a loop long enough
//! to tell execution from emulation. Before each step it notes the step's number in memory.

use std::arch::global_asm;

use kvm_bindings::{
    KVM_MAX_CPUID_ENTRIES, kvm_regs, kvm_segment, kvm_userspace_memory_region, kvm_xcrs,
};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd};
use rustix::io::Errno;

use super::KvmUsability;

/// Guest memory: one large page, mapped to itself.
const MEMORY_BYTES: usize = 2 << 20;
const PAGE_BYTES: usize = 4096;
const PML4_ADDRESS: usize = 0x1000;
const PDPT_ADDRESS: usize = 0x2000;
const DIRECTORY_ADDRESS: usize = 0x3000;
const STACK_ADDRESS: usize = 0x7000;
const CODE_ADDRESS: usize = 0x8000;
/// Where the code notes its step. The code below has the number written out.
const STEP_ADDRESS: usize = 0x9000;
/// Port that the code writes its result to.
const RESULT_PORT: u16 = 0x10;
/// The result of code that met nothing wrong.
const RESULT_GOOD: u8 = 0x42;

/// What each step does, by the number that the code notes.
const STEPS: [&str; 5] = [
    "its first instruction",
    "lock cmpxchg16b",
    "xgetbv and xsetbv",
    "xsave and xrstor",
    "a loop",
];

// Registers at the start: rsp set, interrupts off, no interrupt table, so that any fault ends the
// guest. r15 is not 0 where the processor has xsave.
global_asm!(
    ".pushsection .rodata.fcvm_probe, \"a\"",
    ".globl fcvm_probe_code",
    ".globl fcvm_probe_code_end",
    "fcvm_probe_code:",
    // Compare rdx:rax with the 16 bytes at rsi; equal, so store rcx:rbx.
    "mov byte ptr [0x9000], 1",
    "mov esi, 0x9100",
    "mov rax, [rsi]",
    "mov rdx, [rsi + 8]",
    "mov ebx, 0x1234",
    "mov ecx, 0x5678",
    "lock cmpxchg16b [rsi]",
    "jnz 3f",
    "cmp qword ptr [rsi], 0x1234",
    "jne 3f",
    "cmp qword ptr [rsi + 8], 0x5678",
    "jne 3f",
    "test r15, r15",
    "jz 4f",
    // Turn the x87 and SSE states on.
    "mov byte ptr [0x9000], 2",
    "xor ecx, ecx",
    "xgetbv",
    "or eax, 3",
    "xsetbv",
    "mov byte ptr [0x9000], 3",
    "mov eax, 0x5a5a",
    "movd xmm0, eax",
    "mov eax, 3",
    "xor edx, edx",
    "mov esi, 0xa000",
    "xsave64 [rsi]",
    "pxor xmm0, xmm0",
    "xrstor64 [rsi]",
    "movd eax, xmm0",
    "cmp eax, 0x5a5a",
    "jne 3f",
    "4: mov byte ptr [0x9000], 4",
    "mov ecx, 0x1000000",
    "5: dec ecx",
    "jnz 5b",
    "mov al, 0x42",
    "out 0x10, al",
    "hlt",
    "3: mov al, 0",
    "out 0x10, al",
    "hlt",
    "fcvm_probe_code_end:",
    ".popsection",
);

unsafe extern "C" {
    static fcvm_probe_code: u8;
    static fcvm_probe_code_end: u8;
}

/// Runs the guest. Takes for ever where KVM emulates slowly: the caller has a time limit.
pub(super) fn run() -> KvmUsability {
    match try_run() {
        Ok(usability) => usability,
        Err(failure) => KvmUsability::Unusable {
            reason: failure.to_string(),
        },
    }
}

#[derive(Debug, thiserror::Error)]
#[error("{what} failed: {source}")]
struct KvmFailure {
    what: &'static str,
    source: kvm_ioctls::Error,
}

fn failed(what: &'static str) -> impl Fn(kvm_ioctls::Error) -> KvmFailure {
    move |source| KvmFailure { what, source }
}

fn try_run() -> Result<KvmUsability, KvmFailure> {
    let kvm = Kvm::new().map_err(failed("opening /dev/kvm"))?;
    let vm = kvm.create_vm().map_err(failed("creating a VM"))?;
    // Three pages that KVM on some Intel processors wants for itself, away from the guest's memory.
    vm.set_tss_address(0xfffb_d000)
        .map_err(failed("setting the VM up"))?;
    let mut memory = GuestPages::new();
    memory.fill();
    let region = kvm_userspace_memory_region {
        slot: 0,
        flags: 0,
        guest_phys_addr: 0,
        memory_size: MEMORY_BYTES as u64,
        userspace_addr: memory.start() as u64,
    };
    // SAFETY: `memory` is that long, page-aligned, and declared after `vm`'s users end: it is
    // dropped after the last `run` below and nothing else refers to its bytes meanwhile.
    unsafe { vm.set_user_memory_region(region) }.map_err(failed("giving the VM memory"))?;
    let mut vcpu = vm.create_vcpu(0).map_err(failed("creating a processor"))?;
    let cpuid = kvm
        .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
        .map_err(failed("asking for the processor's features"))?;
    // CPUID 1 ECX bit 26.
    let has_xsave = cpuid
        .as_slice()
        .iter()
        .any(|entry| entry.function == 1 && entry.ecx & (1 << 26) != 0);
    vcpu.set_cpuid2(&cpuid)
        .map_err(failed("setting the processor's features"))?;
    if has_xsave {
        turn_states_on(&vcpu)?;
    }
    enter_long_mode(&vcpu, has_xsave)?;
    let exit = describe(&mut vcpu)?;
    let step = memory.step();
    Ok(match exit {
        None => KvmUsability::Usable,
        Some(reason) => KvmUsability::Emulating {
            reason: format!(
                "a guest of a few instructions stopped at {}: {reason}",
                STEPS.get(usize::from(step)).unwrap_or(&STEPS[0])
            ),
        },
    })
}

/// Runs until the guest ends; what was wrong, if anything.
fn describe(vcpu: &mut VcpuFd) -> Result<Option<String>, KvmFailure> {
    const INTERRUPTED: [i32; 2] = [Errno::INTR.raw_os_error(), Errno::AGAIN.raw_os_error()];
    loop {
        match vcpu.run() {
            Ok(exit) => return Ok(wrong_with(&exit)),
            Err(error) if INTERRUPTED.contains(&error.errno()) => {}
            Err(source) => return Err(failed("running the processor")(source)),
        }
    }
}

fn wrong_with(exit: &VcpuExit<'_>) -> Option<String> {
    Some(match exit {
        VcpuExit::IoOut(RESULT_PORT, [RESULT_GOOD]) => return None,
        VcpuExit::IoOut(RESULT_PORT, _) => "it had a wrong result".to_owned(),
        VcpuExit::InternalError => "KVM internal error, emulation failure".to_owned(),
        VcpuExit::Shutdown => "it faulted".to_owned(),
        VcpuExit::FailEntry(reason, _) => format!("the processor refused it ({reason:#x})"),
        other => format!("unexpected exit {other:?}"),
    })
}

/// Turns the x87 and SSE states on, as restoring a guest does. Where SVM itself is emulated (QEMU) the
/// guest's own xsetbv is not seen by KVM and lost at the next exit.
fn turn_states_on(vcpu: &VcpuFd) -> Result<(), KvmFailure> {
    let mut xcrs = kvm_xcrs {
        nr_xcrs: 1,
        ..Default::default()
    };
    xcrs.xcrs[0].value = 3;
    vcpu.set_xcrs(&xcrs)
        .map_err(failed("turning the processor's states on"))
}

/// Sets the registers as an operating system would have them: 64-bit code, paging, SSE and xsave on.
/// Bits by the Intel 64 manual, volume 3, sections 2.5 (CR0, CR4), 2.2.1 (EFER), 3.4.5 (segments).
fn enter_long_mode(vcpu: &VcpuFd, has_xsave: bool) -> Result<(), KvmFailure> {
    const CR0_PROTECTED: u64 = 1 << 0;
    const CR0_MONITOR_COPROCESSOR: u64 = 1 << 1;
    const CR0_EXTENSION_TYPE: u64 = 1 << 4;
    const CR0_NUMERIC_ERROR: u64 = 1 << 5;
    const CR0_PAGING: u64 = 1 << 31;
    const CR4_PAE: u64 = 1 << 5;
    const CR4_OSFXSR: u64 = 1 << 9;
    const CR4_OSXMMEXCPT: u64 = 1 << 10;
    const CR4_OSXSAVE: u64 = 1 << 18;
    const EFER_LONG_MODE_ENABLE: u64 = 1 << 8;
    const EFER_LONG_MODE_ACTIVE: u64 = 1 << 10;
    let mut sregs = vcpu.get_sregs().map_err(failed("reading registers"))?;
    sregs.cr0 = CR0_PROTECTED
        | CR0_MONITOR_COPROCESSOR
        | CR0_EXTENSION_TYPE
        | CR0_NUMERIC_ERROR
        | CR0_PAGING;
    sregs.cr3 = PML4_ADDRESS as u64;
    sregs.cr4 = CR4_PAE | CR4_OSFXSR | CR4_OSXMMEXCPT;
    if has_xsave {
        sregs.cr4 |= CR4_OSXSAVE;
    }
    sregs.efer = EFER_LONG_MODE_ENABLE | EFER_LONG_MODE_ACTIVE;
    let flat = kvm_segment {
        limit: 0xffff_ffff,
        present: 1,
        s: 1,
        g: 1,
        ..Default::default()
    };
    sregs.cs = kvm_segment {
        selector: 8,
        type_: 11, // Execute, read, accessed.
        l: 1,
        ..flat
    };
    let data = kvm_segment {
        selector: 16,
        type_: 3, // Read, write, accessed.
        db: 1,
        ..flat
    };
    (sregs.ds, sregs.es, sregs.fs) = (data, data, data);
    (sregs.gs, sregs.ss) = (data, data);
    vcpu.set_sregs(&sregs)
        .map_err(failed("setting registers"))?;
    let regs = kvm_regs {
        rip: CODE_ADDRESS as u64,
        rsp: STACK_ADDRESS as u64,
        rflags: 2, // Bit 1 is always set.
        r15: u64::from(has_xsave),
        ..Default::default()
    };
    vcpu.set_regs(&regs).map_err(failed("setting registers"))
}

/// The guest's memory: whole pages within a larger allocation.
struct GuestPages {
    bytes: Vec<u8>,
    offset: usize,
}

impl GuestPages {
    fn new() -> Self {
        let bytes = vec![0; MEMORY_BYTES + PAGE_BYTES];
        let offset = bytes.as_ptr().align_offset(PAGE_BYTES);
        Self { bytes, offset }
    }

    fn start(&mut self) -> *mut u8 {
        self.bytes[self.offset..].as_mut_ptr()
    }

    /// Page tables and code.
    fn fill(&mut self) {
        const PRESENT_WRITABLE: u64 = 0b11;
        const LARGE_PAGE: u64 = 1 << 7;
        self.write_u64(PML4_ADDRESS, PDPT_ADDRESS as u64 | PRESENT_WRITABLE);
        self.write_u64(PDPT_ADDRESS, DIRECTORY_ADDRESS as u64 | PRESENT_WRITABLE);
        self.write_u64(DIRECTORY_ADDRESS, LARGE_PAGE | PRESENT_WRITABLE);
        let code = code();
        let at = self.offset + CODE_ADDRESS;
        self.bytes[at..at + code.len()].copy_from_slice(code);
    }

    fn write_u64(&mut self, address: usize, value: u64) {
        let at = self.offset + address;
        self.bytes[at..at + 8].copy_from_slice(&value.to_le_bytes());
    }

    /// The step that the code noted last.
    fn step(&mut self) -> u8 {
        // SAFETY: within the allocation; volatile, since the guest wrote it behind the compiler's
        // back.
        unsafe { self.start().add(STEP_ADDRESS).read_volatile() }
    }
}

fn code() -> &'static [u8] {
    let start = &raw const fcvm_probe_code;
    let end = &raw const fcvm_probe_code_end;
    let length = end as usize - start as usize;
    // SAFETY: the two labels enclose the bytes assembled above, in read-only data.
    unsafe { std::slice::from_raw_parts(start, length) }
}

#[cfg(test)]
#[path = "../../tests/qemu/elf.rs"]
mod elf;

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};

    use super::{elf, *};

    /// Where the instructions work, the code finds nothing wrong: QEMU's own translation runs it, on
    /// the same page tables and registers. (Its result goes to a port that ends QEMU with it.)
    #[test]
    fn code_is_right_where_its_instructions_work() {
        let Ok(version) = Command::new("qemu-system-x86_64").arg("--version").output() else {
            println!("skipped: QEMU is not installed");
            return;
        };
        assert!(version.status.success());
        for (has_xsave, processor) in [(true, "max"), (false, "max,xsave=off")] {
            let directory = tempfile::tempdir().unwrap();
            let kernel = directory.path().join("kernel.elf");
            std::fs::write(&kernel, elf::kernel(&bring_up(has_xsave))).unwrap();
            let mut qemu = Command::new("qemu-system-x86_64");
            qemu.args([
                "-nodefaults",
                "-no-user-config",
                "-display",
                "none",
                "-no-reboot",
            ])
            .args([
                "-machine", "microvm", "-accel", "tcg", "-m", "64M", "-cpu", processor,
            ])
            .args(["-device", "isa-debug-exit,iobase=0x10,iosize=1", "-kernel"])
            .arg(&kernel)
            .stdin(Stdio::null());
            let status = qemu.status().unwrap();
            assert_eq!(status.code(), Some(i32::from(RESULT_GOOD) << 1 | 1));
        }
    }

    /// What [`enter_long_mode`] does by setting registers, as 32-bit code; then the guest's code,
    /// copied to where it expects to be.
    fn bring_up(has_xsave: bool) -> Vec<u8> {
        let mut stub = Vec::new();
        let store = |stub: &mut Vec<u8>, address: usize, value: u32| {
            stub.extend([0xc7, 0x05]); // mov dword ptr [address], value
            stub.extend((address as u32).to_le_bytes());
            stub.extend(value.to_le_bytes());
        };
        store(&mut stub, PML4_ADDRESS, PDPT_ADDRESS as u32 | 3);
        store(&mut stub, PDPT_ADDRESS, DIRECTORY_ADDRESS as u32 | 3);
        store(&mut stub, DIRECTORY_ADDRESS, 0x83);
        // A descriptor table: nothing, 64-bit code, data; and its limit and address for lgdt.
        store(&mut stub, 0x4008, 0x0000_ffff);
        store(&mut stub, 0x400c, 0x00af_9b00);
        store(&mut stub, 0x4010, 0x0000_ffff);
        store(&mut stub, 0x4014, 0x00cf_9300);
        store(&mut stub, 0x4020, 0x4000_0017);
        store(&mut stub, 0x4024, 0x0000_0000);
        stub.extend([0xbe]); // mov esi, code
        let source_at = stub.len();
        stub.extend([0; 4]);
        stub.extend([0xbf]); // mov edi, CODE_ADDRESS
        stub.extend((CODE_ADDRESS as u32).to_le_bytes());
        stub.extend([0xb9]); // mov ecx, length
        stub.extend((code().len() as u32).to_le_bytes());
        stub.extend([0xf3, 0xa4]); // rep movsb
        let control = |stub: &mut Vec<u8>, value: u32, register: u8| {
            stub.push(0xb8); // mov eax, value
            stub.extend(value.to_le_bytes());
            stub.extend([0x0f, 0x22, register]); // mov crN, eax
        };
        control(&mut stub, PML4_ADDRESS as u32, 0xd8);
        let cr4 = 0x620 | u32::from(has_xsave) << 18;
        control(&mut stub, cr4, 0xe0);
        // wrmsr EFER, long mode
        stub.extend([
            0xb9, 0x80, 0, 0, 0xc0, 0xb8, 0, 1, 0, 0, 0x31, 0xd2, 0x0f, 0x30,
        ]);
        control(&mut stub, 0x8000_0033, 0xc0);
        stub.extend([0x0f, 0x01, 0x15, 0x20, 0x40, 0, 0]); // lgdt [0x4020]
        stub.extend([0x66, 0xb8, 16, 0, 0x8e, 0xd8, 0x8e, 0xd0]); // mov ds, ss
        stub.extend([0xbc, 0, 0x70, 0, 0]); // mov esp, STACK_ADDRESS
        stub.push(0xea); // jmp far 8:next
        let next = elf::LOAD_ADDRESS + stub.len() as u32 + 6;
        stub.extend(next.to_le_bytes());
        stub.extend([8, 0]);
        stub.extend([0x41, 0xbf, u8::from(has_xsave), 0, 0, 0]); // mov r15d, has_xsave
        stub.extend([0xb8, 0, 0x80, 0, 0, 0xff, 0xe0]); // mov eax, CODE_ADDRESS; jmp rax
        let source = elf::LOAD_ADDRESS + stub.len() as u32;
        stub[source_at..source_at + 4].copy_from_slice(&source.to_le_bytes());
        stub.extend(code());
        stub
    }
}
