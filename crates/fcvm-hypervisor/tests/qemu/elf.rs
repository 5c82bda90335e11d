//! Kernels of a few instructions.

/// Where the code is loaded.
pub(crate) const LOAD_ADDRESS: u32 = 0x10_0000;
const HEADER_BYTES: u32 = 64 + 2 * 56;

/// An ELF file with a PVH entry (Xen's PHYS32_ENTRY note), which is what QEMU boots a `vmlinux` by. The
/// code is entered at its first byte, in 32-bit protected mode with flat segments.
pub(crate) fn kernel(code: &[u8]) -> Vec<u8> {
    let note = [
        &4_u32.to_le_bytes()[..],
        &8_u32.to_le_bytes(),
        &18_u32.to_le_bytes(), // XEN_ELFNOTE_PHYS32_ENTRY
        b"Xen\0",
        &u64::from(LOAD_ADDRESS).to_le_bytes(),
    ]
    .concat();
    let code_at = u64::from(HEADER_BYTES) + note.len() as u64;
    let mut file = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
    file.extend([2, 0, 62, 0, 1, 0, 0, 0]); // ET_EXEC, EM_X86_64, EV_CURRENT
    file.extend(u64::from(LOAD_ADDRESS).to_le_bytes()); // entry
    file.extend(64_u64.to_le_bytes()); // program headers
    file.extend(0_u64.to_le_bytes()); // section headers
    file.extend(0_u32.to_le_bytes());
    for half in [64_u16, 56, 2, 64, 0, 0] {
        file.extend(half.to_le_bytes());
    }
    program_header(&mut file, 1, 7, code_at, LOAD_ADDRESS, code.len() as u64);
    program_header(&mut file, 4, 4, HEADER_BYTES.into(), 0, note.len() as u64);
    file.extend(note);
    file.extend(code);
    file
}

fn program_header(file: &mut Vec<u8>, kind: u32, flags: u32, offset: u64, to: u32, size: u64) {
    file.extend(kind.to_le_bytes());
    file.extend(flags.to_le_bytes());
    for word in [offset, to.into(), to.into(), size, size, 4] {
        file.extend(word.to_le_bytes());
    }
}
