//! What is kept of one kernel: `manifest.json`, and the kernel as callers see it.
//!
//! The manifest is written last, into a directory that gets its name by a rename, so a directory
//! with a name is whole. Sizes and modification times find damage cheaply at every start; checksums
//! find all of it when setup runs.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;

use serde::{Deserialize, Serialize};

use crate::files;
use crate::vmlinux::Architecture;
use crate::{KernelError, Result};

/// Version of the manifest that this program writes and the latest that it reads.
pub(crate) const MANIFEST_VERSION: u32 = 1;
/// Name of the manifest in a kernel's directory.
pub(crate) const MANIFEST_NAME: &str = "manifest.json";
const MANIFEST_MAX_BYTES: usize = 1 << 20;
/// Upper bound of a stored file when its checksum is computed.
const FILE_MAX_BYTES: usize = crate::vmlinux::IMAGE_SIZE_MAX_BYTES;

/// A kernel that guests can boot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GuestKernel {
    /// Release, as `uname -r` prints it; "unknown" for a kernel that does not tell.
    pub version: String,
    /// The Debian package and its version; absent for a user's own kernel.
    pub package: Option<String>,
    /// The version of OpenZFS that is known to be built in.
    pub zfs: Option<String>,
    /// What it runs on.
    pub architecture: Architecture,
    /// The uncompressed kernel: an ELF vmlinux with a PVH entry point, or an AArch64 Image.
    pub vmlinux: PathBuf,
    /// Modules for the initramfs, in the order of loading.
    pub modules: Vec<GuestModule>,
}

/// A module of a [`GuestKernel`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GuestModule {
    /// Name with underscores.
    pub name: String,
    /// The uncompressed object file.
    pub path: PathBuf,
    /// Its size.
    pub size_bytes: u64,
    /// SHA-256 of the file, hexadecimal.
    pub sha256: String,
}

/// A stored file and how it looked when it was stored.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct StoredFile {
    /// Path below the kernel's directory.
    pub(crate) path: String,
    pub(crate) size_bytes: u64,
    /// Modification time, nanoseconds since 1970.
    pub(crate) modified_ns: u64,
    pub(crate) sha256: String,
}

/// A stored module.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct StoredModule {
    pub(crate) name: String,
    #[serde(flatten)]
    pub(crate) file: StoredFile,
}

/// The content of `manifest.json`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Manifest {
    pub(crate) version: u32,
    pub(crate) release: String,
    pub(crate) package: Option<String>,
    pub(crate) architecture: Architecture,
    /// The modules that were asked for, without what they depend on.
    pub(crate) module_roots: Vec<String>,
    pub(crate) vmlinux: StoredFile,
    /// In the order of loading.
    pub(crate) modules: Vec<StoredModule>,
}

/// How thoroughly a stored file is compared with its record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Check {
    /// Size and modification time; the checksum only where the time differs.
    Quick,
    /// The checksum too.
    Full,
}

impl StoredFile {
    /// Writes `bytes` to `directory`/`path` and records it.
    pub(crate) fn create(directory: &Path, path: String, bytes: &[u8]) -> Result<Self> {
        let file = directory.join(&path);
        files::write_synced(&file, bytes)?;
        let (size_bytes, modified_ns) = size_and_time(&file)?;
        Ok(Self {
            path,
            size_bytes,
            modified_ns,
            sha256: files::sha256_hex(bytes),
        })
    }

    pub(crate) fn check(&self, directory: &Path, check: Check) -> Result<()> {
        let path = directory.join(&self.path);
        let damaged = |reason: &str| KernelError::Damaged {
            path: path.clone(),
            reason: reason.to_owned(),
        };
        if !path.is_file() {
            return Err(damaged("is missing"));
        }
        let (size_bytes, modified_ns) = size_and_time(&path)?;
        if size_bytes != self.size_bytes {
            return Err(damaged(&format!(
                "has {size_bytes} bytes in place of {}",
                self.size_bytes
            )));
        }
        // A copied data directory has new times and the same content.
        if check == Check::Quick && modified_ns == self.modified_ns {
            return Ok(());
        }
        let bytes = files::read_bounded(&path, FILE_MAX_BYTES)?;
        if files::sha256_hex(&bytes) == self.sha256 {
            Ok(())
        } else {
            Err(damaged("has another content"))
        }
    }
}

impl Manifest {
    /// Reads the manifest of a kernel's directory.
    pub(crate) fn read(directory: &Path) -> Result<Self> {
        #[derive(Deserialize)]
        struct VersionOnly {
            version: u32,
        }
        let path = directory.join(MANIFEST_NAME);
        let bytes = files::read_bounded(&path, MANIFEST_MAX_BYTES)?;
        let damaged = |error: serde_json::Error| KernelError::Damaged {
            path: path.clone(),
            reason: format!("is not a manifest ({error})"),
        };
        // A later version may have any other fields, so its number is looked at alone.
        let VersionOnly { version } = serde_json::from_slice(&bytes).map_err(damaged)?;
        if version > MANIFEST_VERSION {
            return Err(KernelError::FutureVersion {
                path,
                found: version,
                supported: MANIFEST_VERSION,
            });
        }
        let manifest: Self = serde_json::from_slice(&bytes).map_err(damaged)?;
        let outside = manifest
            .files()
            .map(|file| &file.path)
            .find(|path| !is_plain(path))
            .cloned();
        match outside {
            None => Ok(manifest),
            Some(name) => Err(KernelError::Damaged {
                path,
                reason: format!("names the file '{name}' outside of its directory"),
            }),
        }
    }

    /// Writes it into a kernel's directory, the last file of all.
    pub(crate) fn write(&self, directory: &Path) -> Result<()> {
        let path = directory.join(MANIFEST_NAME);
        let mut bytes = serde_json::to_vec_pretty(self)
            .map_err(|error| KernelError::file("write", &path)(error.into()))?;
        bytes.push(b'\n');
        files::write_synced(&path, &bytes)?;
        files::sync_dir(directory)
    }

    /// Compares the stored files with their records.
    pub(crate) fn check(&self, directory: &Path, check: Check) -> Result<()> {
        self.files()
            .try_for_each(|file| file.check(directory, check))
    }

    fn files(&self) -> impl Iterator<Item = &StoredFile> {
        std::iter::once(&self.vmlinux).chain(self.modules.iter().map(|module| &module.file))
    }

    /// The kernel as callers see it.
    pub(crate) fn into_kernel(self, directory: &Path) -> GuestKernel {
        GuestKernel {
            zfs: None,
            version: self.release,
            package: self.package,
            architecture: self.architecture,
            vmlinux: directory.join(&self.vmlinux.path),
            modules: self
                .modules
                .into_iter()
                .map(|module| GuestModule {
                    name: module.name,
                    path: directory.join(&module.file.path),
                    size_bytes: module.file.size_bytes,
                    sha256: module.file.sha256,
                })
                .collect(),
        }
    }
}

/// Relative, and never upwards.
fn is_plain(path: &str) -> bool {
    use std::path::Component;
    !path.is_empty()
        && Path::new(path)
            .components()
            .all(|component| matches!(component, Component::Normal(_)))
}

fn size_and_time(path: &Path) -> Result<(u64, u64)> {
    let metadata = fs::metadata(path).map_err(KernelError::file("look at", path))?;
    let modified_ns = metadata
        .modified()
        .ok()
        .and_then(|time| time.duration_since(UNIX_EPOCH).ok())
        .map_or(0, |since| since.as_nanos() as u64);
    Ok((metadata.len(), modified_ns))
}
