//! Finding Firecracker: the program and its version.

use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use super::NAME;
use super::jail::Jail;
use crate::error::HypervisorError;
use crate::program::{self, Sought};
use crate::version::Version;

/// The oldest version that works: the requests are those of its API.
pub const MINIMUM_VERSION: Version = Version {
    major: 1,
    minor: 13,
    micro: 0,
};
/// The first version whose API may be another one: Firecracker's versions are semantic ones.
const FOREIGN_VERSION: Version = Version {
    major: 2,
    minor: 0,
    micro: 0,
};

const SOUGHT: Sought = Sought {
    hypervisor: NAME,
    name: "firecracker",
    advice: "'fcvm setup firecracker' fetches it, and FCVM_FIRECRACKER_BIN names one that is there",
    architecture: "their processors need another configuration of Firecracker",
};

/// A Firecracker that was found, for one VM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Firecracker {
    program: PathBuf,
    directory: PathBuf,
    jail: Option<Jail>,
    pci: bool,
    hugepages: bool,
}

impl Firecracker {
    /// Looks for Firecracker: at `explicit` where given, else in the directories of `search_path` (a
    /// list as in the PATH variable). The program is not run: a launch learns its version by the way.
    ///
    /// `directory` is made by a launch, for the sockets, and removed with the VM. Its path is best
    /// below 80 bytes: a socket's is limited to 107.
    ///
    /// # Errors
    ///
    /// It is not there, or the host is no x86-64 one.
    pub fn locate(
        explicit: Option<&Path>,
        search_path: &str,
        directory: PathBuf,
    ) -> Result<Self, HypervisorError> {
        let program = program::locate(&SOUGHT, explicit, search_path)?;
        Ok(Self {
            program,
            directory,
            jail: None,
            pci: false,
            hugepages: false,
        })
    }

    /// The same one, with another directory.
    pub fn in_directory(self, directory: PathBuf) -> Self {
        Self { directory, ..self }
    }

    /// Refuses a program that needs libraries, which a jail has not. Released ones need none.
    ///
    /// # Errors
    ///
    /// It does, or cannot be read.
    pub fn check_static(&self) -> Result<(), HypervisorError> {
        let refused = |reason: String| HypervisorError::Foreign {
            hypervisor: NAME,
            path: self.program.clone(),
            reason,
        };
        match has_interpreter(&self.program) {
            Ok(false) => Ok(()),
            Ok(true) => Err(refused(
                "a jail needs one that is linked statically, as the released ones are".to_owned(),
            )),
            Err(error) => Err(refused(error.to_string())),
        }
    }

    /// The same one, run under its jailer. The directory is then that of all jails, in a file system
    /// that has device files; the VM has one of its own below it.
    pub fn jailed(self, jail: Jail) -> Self {
        Self {
            jail: Some(jail),
            ..self
        }
    }

    /// The same one, whose VMs have their devices on a PCI bus, and not where the kernel is told that they are
    /// memory-mapped. A VM that starts from saved state has the bus that it had.
    pub fn with_pci(self, pci: bool) -> Self {
        Self { pci, ..self }
    }

    /// The same one, whose VMs have their memory in the host's pages of 2 MiB. A VM that starts from saved state
    /// has the pages that it had, and gets them by [`MemoryBackend::Uffd`](crate::MemoryBackend::Uffd) only.
    pub fn with_hugepages(self, hugepages: bool) -> Self {
        Self { hugepages, ..self }
    }

    /// Whether memory is in pages of 2 MiB.
    pub(super) fn hugepages(&self) -> bool {
        self.hugepages
    }

    /// Whether devices are on a PCI bus.
    pub(super) fn pci(&self) -> bool {
        self.pci
    }

    /// How it is jailed, if it is.
    pub(super) fn jail(&self) -> Option<&Jail> {
        self.jail.as_ref()
    }

    /// The directory of a jailed VM, where the jailer expects it.
    pub(super) fn jail_directory(&self) -> io::Result<PathBuf> {
        let real = std::fs::canonicalize(&self.program)?;
        let name = real.file_name().unwrap_or(OsStr::new(SOUGHT.name));
        let id = self.jail.as_ref().map_or("", |jail| jail.id.as_str());
        Ok(self.directory.join(name).join(id))
    }

    /// What a launch makes in a jail that outlives a crash of the owner: files, directories, and the VM's
    /// control group, for [`remove_cgroup`](super::remove_cgroup). Empty without a jail.
    ///
    /// # Errors
    ///
    /// The program is not there any more.
    pub fn leftovers(&self) -> io::Result<Vec<PathBuf>> {
        match &self.jail {
            None => Ok(Vec::new()),
            Some(jail) => Ok(vec![jail.cgroup(), self.jail_directory()?, jail.passage()]),
        }
    }

    /// The program.
    pub fn program(&self) -> &Path {
        &self.program
    }

    /// The VM's directory.
    pub(super) fn directory(&self) -> &Path {
        &self.directory
    }

    /// Asks the program for its version.
    ///
    /// # Errors
    ///
    /// It can not be run, is no Firecracker, or its version is not supported.
    pub fn check_version(&self) -> Result<Version, HypervisorError> {
        let version = program::version(NAME, &self.program, "Firecracker v")?;
        self.require(version)?;
        Ok(version)
    }

    /// Refuses a version outside of the supported range.
    pub(super) fn require(&self, version: Version) -> Result<(), HypervisorError> {
        let fault = if version < MINIMUM_VERSION {
            "old"
        } else if version >= FOREIGN_VERSION {
            "new"
        } else {
            return Ok(());
        };
        Err(HypervisorError::Version {
            hypervisor: NAME,
            path: self.program.clone(),
            found: version,
            fault,
            required: format!("from {MINIMUM_VERSION} on and before {FOREIGN_VERSION}"),
        })
    }
}

/// Whether an ELF program names an interpreter, which is how libraries are found: elf(5), 64 bit.
fn has_interpreter(path: &Path) -> io::Result<bool> {
    const PT_INTERP: u32 = 3;
    let file = File::open(path)?;
    let mut header = [0; 64];
    if file.read_at(&mut header, 0)? < header.len() || !header.starts_with(b"\x7fELF\x02\x01") {
        // A script's interpreter is not there either.
        return Ok(true);
    }
    let half = |at: usize| u16::from_le_bytes([header[at], header[at + 1]]);
    let mut offset = [0; 8];
    offset.copy_from_slice(&header[32..40]);
    let (size, count) = (u64::from(half(54)), u64::from(half(56)));
    for index in 0..count {
        let mut kind = [0; 4];
        let at = u64::from_le_bytes(offset).saturating_add(index * size);
        file.read_exact_at(&mut kind, at)?;
        if u32::from_le_bytes(kind) == PT_INTERP {
            return Ok(true);
        }
    }
    Ok(false)
}
