//! The kernel to install: its files, and what its image says of itself.

use std::path::{Path, PathBuf};

use crate::{KernelError, Result, files};

/// The files of a built kernel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostKernel {
    /// The compressed image (`bzImage`).
    pub vmlinuz: PathBuf,
    /// Its configuration.
    pub config: Option<PathBuf>,
    /// Its initramfs.
    pub initrd: Option<PathBuf>,
}

/// What an image says of itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KernelFacts {
    /// As `uname -r` will say.
    pub version: String,
    /// The firmware can start it.
    pub efi_stub: bool,
}

const IMAGE_BYTES_MAX: usize = 512 << 20;
const CONFIG_BYTES_MAX: usize = 4 << 20;
const VERSION_BYTES_MAX: usize = 128;

impl HostKernel {
    /// The kernel in a directory: `vmlinuz` or `bzImage`, and where they are there `config`, `initrd.img`.
    pub fn in_directory(directory: &Path) -> Result<Self> {
        let there = |name: &str| Some(directory.join(name)).filter(|path| path.is_file());
        let vmlinuz = there("vmlinuz")
            .or_else(|| there("bzImage"))
            .ok_or_else(|| KernelError::Install {
                path: directory.to_owned(),
                reason: "it holds neither vmlinuz nor bzImage".to_owned(),
            })?;
        Ok(Self {
            vmlinuz,
            config: there("config"),
            initrd: there("initrd.img"),
        })
    }

    /// What the image says of itself.
    pub fn facts(&self) -> Result<KernelFacts> {
        let bytes = files::read_bounded(&self.vmlinuz, IMAGE_BYTES_MAX)?;
        facts(&bytes).ok_or_else(|| KernelError::Install {
            path: self.vmlinuz.clone(),
            reason: "it is no bzImage for x86 with a version in it".to_owned(),
        })
    }

    pub(super) fn config_text(&self) -> Result<String> {
        let Some(path) = &self.config else {
            return Err(KernelError::Install {
                path: self.vmlinuz.clone(),
                reason: "its configuration is not beside it".to_owned(),
            });
        };
        let bytes = files::read_bounded(path, CONFIG_BYTES_MAX)?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }
}

/// Reads the setup header (Documentation/arch/x86/boot.rst): `HdrS` at 0x202, at 0x20e the offset, less 0x200,
/// of the version's text. An image with an EFI stub begins like a program of Windows.
pub(super) fn facts(bytes: &[u8]) -> Option<KernelFacts> {
    if bytes.get(0x202..0x206)? != b"HdrS" {
        return None;
    }
    let offset = usize::from(u16::from_le_bytes([*bytes.get(0x20e)?, *bytes.get(0x20f)?]));
    if offset == 0 {
        return None;
    }
    let text = bytes.get(offset + 0x200..)?;
    let text = text.get(..VERSION_BYTES_MAX.min(text.len()))?;
    let end = text.iter().position(|byte| *byte == 0 || *byte == b' ')?;
    let version = std::str::from_utf8(&text[..end]).ok()?;
    // It becomes a file's name and a word of configuration files.
    let good = version.starts_with(|c: char| c.is_ascii_digit())
        && version
            .chars()
            .all(|c| c.is_ascii_alphanumeric() || ".-_+~".contains(c));
    good.then(|| KernelFacts {
        version: version.to_owned(),
        efi_stub: bytes.starts_with(b"MZ"),
    })
}
