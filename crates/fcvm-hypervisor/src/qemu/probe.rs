//! Finding QEMU: the program, its version, the machine type.

use std::path::{Path, PathBuf};

use super::NAME;
use crate::error::HypervisorError;
use crate::program::{self, Sought};
use crate::version::Version;

/// The oldest version that works: `-netdev stream` came with it.
pub const MINIMUM_VERSION: Version = Version {
    major: 7,
    minor: 2,
    micro: 0,
};

const SOUGHT: Sought = Sought {
    hypervisor: NAME,
    name: "qemu-system-x86_64",
    advice: "install the package qemu-system-x86 (its name in Debian)",
    architecture: "QEMU's microvm machine is for x86-64 only",
};

/// A QEMU that was found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Qemu {
    program: PathBuf,
}

impl Qemu {
    /// Looks for QEMU: at `explicit` where given, else in the directories of `search_path` (a list
    /// as in the PATH variable). The program is not run: a launch learns its version by the way.
    ///
    /// # Errors
    ///
    /// It is not there, or the host is no x86-64 one.
    pub fn locate(explicit: Option<&Path>, search_path: &str) -> Result<Self, HypervisorError> {
        let program = program::locate(&SOUGHT, explicit, search_path)?;
        Ok(Self { program })
    }

    /// The program.
    pub fn program(&self) -> &Path {
        &self.program
    }

    /// Asks the program for its version.
    ///
    /// # Errors
    ///
    /// It can not be run, is no QEMU, or is older than [`MINIMUM_VERSION`].
    pub fn check_version(&self) -> Result<Version, HypervisorError> {
        let version = program::version(NAME, &self.program, "QEMU emulator version ")?;
        self.require(version)?;
        Ok(version)
    }

    /// Refuses a version that is too old.
    pub(super) fn require(&self, version: Version) -> Result<(), HypervisorError> {
        if version < MINIMUM_VERSION {
            return Err(HypervisorError::Version {
                hypervisor: NAME,
                path: self.program.clone(),
                found: version,
                fault: "old",
                required: format!("from {MINIMUM_VERSION} on"),
            });
        }
        Ok(())
    }

    /// Checks that the program has the `microvm` machine type. It takes as long as starting QEMU
    /// does, so it is for a preflight: a launch without the machine type fails with QEMU's own line.
    ///
    /// # Errors
    ///
    /// It has not.
    pub fn check_machine(&self) -> Result<(), HypervisorError> {
        let machines = program::run(&self.program, &["-machine", "help"])?;
        let has = |line: &str| line.split_whitespace().next() == Some("microvm");
        if machines.lines().any(has) {
            Ok(())
        } else {
            Err(HypervisorError::NoMachine {
                path: self.program.clone(),
                machine: "microvm",
            })
        }
    }
}
