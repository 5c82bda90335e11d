//! Finding Firecracker: the program and its version.

use std::path::{Path, PathBuf};

use super::NAME;
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
        Ok(Self { program, directory })
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
