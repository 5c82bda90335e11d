//! Whether a file can be the guest's first process: nothing but the kernel is there to load it.

use elf::ElfBytes;
use elf::abi::{ET_DYN, ET_EXEC, PT_INTERP};
use elf::endian::LittleEndian;

use crate::vmlinux::Architecture;

/// The reason why `program` cannot be process 1 of a guest without any library, with a remedy.
pub(crate) fn check(program: &[u8], architecture: Architecture) -> Result<(), String> {
    let file = ElfBytes::<LittleEndian>::minimal_parse(program)
        .map_err(|error| format!("it is not a 64-bit ELF program ({error})"))?;
    if !matches!(file.ehdr.e_type, ET_EXEC | ET_DYN) {
        return Err("it is an ELF file, but no program".to_owned());
    }
    if file.ehdr.e_machine != architecture.elf_machine() {
        return Err(format!(
            "it is built for another machine than the guest's kernel ({architecture})"
        ));
    }
    let dynamic = file
        .segments()
        .is_some_and(|segments| segments.iter().any(|header| header.p_type == PT_INTERP));
    if dynamic {
        return Err(
            "it is linked dynamically, and the guest has no libraries: build it with 'make agent'"
                .to_owned(),
        );
    }
    Ok(())
}
