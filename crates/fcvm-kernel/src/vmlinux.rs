//! The bootable kernel inside the files that distributions ship.
//!
//! QEMU's and Firecracker's microVMs start fastest from the uncompressed kernel: on x86-64 the ELF
//! `vmlinux` through its PVH entry point (Documentation/arch/x86/boot.rst, "PVH" in Xen's
//! docs/misc/pvh.pandoc), on AArch64 the `Image` (Documentation/arch/arm64/booting.rst). It is taken
//! here out of a bzImage, an EFI zboot file or a compressed Image. Only bytes are looked at; files are
//! opened elsewhere. The bytes may be anything a user names: every offset is checked, and output is
//! bounded by [`IMAGE_SIZE_MAX_BYTES`].

use std::borrow::Cow;
use std::fmt;
use std::io;

use elf::ElfBytes;
use elf::abi::{EM_AARCH64, EM_X86_64, PT_INTERP, PT_LOAD, PT_NOTE};
use elf::endian::LittleEndian;
use elf::note::Note;
use serde::{Deserialize, Serialize};

use crate::decompress::Compression;

/// Largest kernel, compressed or not: several times that of a distribution's.
pub const IMAGE_SIZE_MAX_BYTES: usize = 512 << 20;

/// Type of the note that holds the PVH entry point (`XEN_ELFNOTE_PHYS32_ENTRY`, xen/elfnote.h).
const XEN_ELFNOTE_PHYS32_ENTRY: u64 = 18;

/// Instruction set of a guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Architecture {
    /// 64-bit x86.
    #[serde(rename = "x86_64")]
    X86_64,
    /// 64-bit Arm.
    #[serde(rename = "aarch64")]
    Aarch64,
}

impl Architecture {
    /// That of the host, where it is one that guests can have.
    pub const fn host() -> Option<Self> {
        if cfg!(target_arch = "x86_64") {
            Some(Self::X86_64)
        } else if cfg!(target_arch = "aarch64") {
            Some(Self::Aarch64)
        } else {
            None
        }
    }

    /// Debian's name for it.
    pub const fn debian_name(self) -> &'static str {
        match self {
            Self::X86_64 => "amd64",
            Self::Aarch64 => "arm64",
        }
    }

    pub(crate) const fn elf_machine(self) -> u16 {
        match self {
            Self::X86_64 => EM_X86_64,
            Self::Aarch64 => EM_AARCH64,
        }
    }
}

impl fmt::Display for Architecture {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::X86_64 => "x86_64",
            Self::Aarch64 => "aarch64",
        })
    }
}

/// Why bytes are not a kernel that a microVM can boot.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ImageError {
    /// None of the known formats.
    #[error("it is neither a vmlinux nor a bzImage (x86-64) nor an Image (AArch64)")]
    Unknown,
    /// A header points outside of the file.
    #[error("it is truncated: {0} lies outside of the file")]
    Truncated(&'static str),
    /// The boot protocol is older than the fields that are needed.
    #[error(
        "its boot protocol is {}.{:02}, and 2.08 (Linux 2.6.26) or later is needed",
        .0 >> 8,
        .0 & 0xff
    )]
    Protocol(u16),
    /// The payload's compression is not one of the known ones.
    #[error(
        "its compression is not known (first bytes {0:02x?}): gzip, xz, lzma, zstd, lz4 and bzip2 are"
    )]
    Compression([u8; 4]),
    /// The payload does not decompress.
    #[error("its payload does not decompress")]
    Payload(#[source] io::Error),
    /// The payload has another size than the header says.
    #[error("it decompresses to {found_bytes} bytes in place of {expected_bytes}")]
    Size {
        /// Bytes that came out.
        found_bytes: usize,
        /// Bytes that should have.
        expected_bytes: usize,
    },
    /// The ELF file is broken.
    #[error("its ELF structure is broken")]
    Elf(#[source] elf::ParseError),
    /// An ELF file of the wrong kind.
    #[error("it is an ELF file, but no kernel: {0}")]
    NotKernel(&'static str),
    /// No PVH entry point.
    #[error("it has no PVH entry point: build it with CONFIG_PVH=y")]
    NoPvh,
}

/// A kernel that a microVM boots directly.
#[derive(Debug)]
pub struct BootImage<'a> {
    /// The uncompressed kernel: an ELF vmlinux on x86-64, an Image on AArch64. Borrowed where the
    /// input was it already.
    pub bytes: Cow<'a, [u8]>,
    /// What it runs on.
    pub architecture: Architecture,
}

impl BootImage<'_> {
    /// The release (`uname -r`), from the banner inside the kernel; absent where it has none.
    pub fn release(&self) -> Option<String> {
        release(&self.bytes)
    }
}

/// The release (`uname -r`) of an uncompressed kernel, from its banner; absent where it has none.
pub(crate) fn release(kernel: &[u8]) -> Option<String> {
    const BANNER: &[u8] = b"Linux version ";
    const RELEASE_MAX_BYTES: usize = 64;
    let at = memchr::memmem::find(kernel, BANNER)? + BANNER.len();
    let rest = &kernel[at..kernel.len().min(at + RELEASE_MAX_BYTES + 1)];
    let length = rest.iter().position(|byte| *byte == b' ')?;
    let release = &rest[..length];
    let plain = |byte: &u8| byte.is_ascii_alphanumeric() || b"._+-~".contains(byte);
    (release.first().is_some_and(u8::is_ascii_alphanumeric) && release.iter().all(plain))
        .then(|| String::from_utf8_lossy(release).into_owned())
}

/// Finds the bootable kernel in a vmlinux, bzImage, Image, compressed Image or EFI zboot file.
///
/// # Errors
/// An [`ImageError`] that says what the bytes are, or are not.
pub fn extract(file: &[u8]) -> Result<BootImage<'_>, ImageError> {
    if file.len() > IMAGE_SIZE_MAX_BYTES {
        return Err(ImageError::NotKernel("it is larger than any kernel"));
    }
    if is_bzimage(file) {
        let payload = bzimage_payload(file)?;
        let vmlinux = decompress_sized(payload)?;
        return check_elf(Cow::Owned(vmlinux));
    }
    if let Some(payload) = zboot_payload(file)? {
        return check_uncompressed(Cow::Owned(decompress(payload)?));
    }
    match Compression::detect(file) {
        Some(_) => check_uncompressed(Cow::Owned(decompress(file)?)),
        None => check_uncompressed(Cow::Borrowed(file)),
    }
}

fn check_uncompressed(bytes: Cow<'_, [u8]>) -> Result<BootImage<'_>, ImageError> {
    if bytes.starts_with(b"\x7fELF") {
        check_elf(bytes)
    } else if bytes.get(56..60) == Some(b"ARM\x64") {
        Ok(BootImage {
            bytes,
            architecture: Architecture::Aarch64,
        })
    } else {
        Err(ImageError::Unknown)
    }
}

/// The setup header's signature and the boot sector's, at their fixed places.
fn is_bzimage(file: &[u8]) -> bool {
    file.get(0x202..0x206) == Some(b"HdrS") && file.get(0x1fe..0x200) == Some(b"\x55\xaa")
}

/// The compressed kernel: payload_offset and payload_length of the setup header count from the
/// protected-mode code, which follows the boot sector and the setup sectors.
fn bzimage_payload(file: &[u8]) -> Result<&[u8], ImageError> {
    const SECTOR_BYTES: usize = 512;
    let protocol = u16::from_le_bytes(array(file, 0x206, "the setup header")?);
    if protocol < 0x0208 {
        return Err(ImageError::Protocol(protocol));
    }
    let setup_sectors = match file[0x1f1] {
        0 => 4,
        count => usize::from(count),
    };
    let offset = u32::from_le_bytes(array(file, 0x248, "the setup header")?) as usize;
    let length = u32::from_le_bytes(array(file, 0x24c, "the setup header")?) as usize;
    let start = (setup_sectors + 1) * SECTOR_BYTES + offset;
    file.get(start..)
        .and_then(|rest| rest.get(..length))
        .ok_or(ImageError::Truncated("the compressed kernel"))
}

/// The payload of an EFI zboot file (drivers/firmware/efi/libstub/zboot-header.S): "MZ", "zimg" at
/// byte 4, then the payload's offset and size.
fn zboot_payload(file: &[u8]) -> Result<Option<&[u8]>, ImageError> {
    if !file.starts_with(b"MZ") || file.get(4..8) != Some(b"zimg") {
        return Ok(None);
    }
    let offset = u32::from_le_bytes(array(file, 8, "the zboot header")?) as usize;
    let length = u32::from_le_bytes(array(file, 12, "the zboot header")?) as usize;
    file.get(offset..)
        .and_then(|rest| rest.get(..length))
        .map(Some)
        .ok_or(ImageError::Truncated("the compressed kernel"))
}

/// Decompresses a payload that ends with the size of what is in it, as all of x86's do (`size_append`
/// in scripts/Makefile.lib; in gzip it is the format's own trailer).
fn decompress_sized(payload: &[u8]) -> Result<Vec<u8>, ImageError> {
    let body_length = payload
        .len()
        .checked_sub(4)
        .ok_or(ImageError::Truncated("the compressed kernel"))?;
    let expected_bytes =
        u32::from_le_bytes(array(payload, body_length, "the kernel's size")?) as usize;
    let vmlinux = match Compression::detect(payload) {
        // Its end is the end of the input, so the size must not be taken for a block.
        Some(Compression::Lz4) => decompress(&payload[..body_length])?,
        _ => decompress(payload)?,
    };
    if vmlinux.len() == expected_bytes {
        Ok(vmlinux)
    } else {
        Err(ImageError::Size {
            found_bytes: vmlinux.len(),
            expected_bytes,
        })
    }
}

fn decompress(payload: &[u8]) -> Result<Vec<u8>, ImageError> {
    let Some(compression) = Compression::detect(payload) else {
        return Err(ImageError::Compression(array(
            payload,
            0,
            "the compressed kernel",
        )?));
    };
    compression
        .decompress(payload, IMAGE_SIZE_MAX_BYTES)
        .map_err(ImageError::Payload)
}

fn check_elf(bytes: Cow<'_, [u8]>) -> Result<BootImage<'_>, ImageError> {
    let file = ElfBytes::<LittleEndian>::minimal_parse(&bytes).map_err(ImageError::Elf)?;
    match file.ehdr.e_machine {
        EM_X86_64 => {}
        EM_AARCH64 => return Err(ImageError::NotKernel("on AArch64 an Image is needed")),
        _ => return Err(ImageError::NotKernel("it is for another machine")),
    }
    check_segments(&file)?;
    Ok(BootImage {
        bytes,
        architecture: Architecture::X86_64,
    })
}

/// A kernel has something to load, no interpreter, and says where it starts without a boot loader.
fn check_segments(file: &ElfBytes<'_, LittleEndian>) -> Result<(), ImageError> {
    let segments = file
        .segments()
        .ok_or(ImageError::NotKernel("it has no program headers"))?;
    let mut loadable = false;
    let mut pvh = false;
    for header in segments.iter() {
        match header.p_type {
            PT_INTERP => return Err(ImageError::NotKernel("it is a program")),
            PT_LOAD => {
                file.segment_data(&header).map_err(ImageError::Elf)?;
                loadable = true;
            }
            PT_NOTE => {
                let mut notes = file
                    .segment_data_as_notes(&header)
                    .map_err(ImageError::Elf)?;
                pvh |= notes.any(|note| is_pvh_entry(&note));
            }
            _ => {}
        }
    }
    match (loadable, pvh) {
        (false, _) => Err(ImageError::NotKernel("it has nothing to load")),
        (true, false) => Err(ImageError::NoPvh),
        (true, true) => Ok(()),
    }
}

fn is_pvh_entry(note: &Note<'_>) -> bool {
    matches!(note, Note::Unknown(note)
        if note.n_type == XEN_ELFNOTE_PHYS32_ENTRY
            && note.name.strip_suffix(b"\0").unwrap_or(note.name) == b"Xen"
            && matches!(note.desc.len(), 4 | 8))
}

fn array<const N: usize>(
    bytes: &[u8],
    at: usize,
    what: &'static str,
) -> Result<[u8; N], ImageError> {
    bytes
        .get(at..)
        .and_then(|rest| rest.first_chunk::<N>())
        .copied()
        .ok_or(ImageError::Truncated(what))
}

#[cfg(test)]
#[path = "vmlinux_tests.rs"]
mod tests;
