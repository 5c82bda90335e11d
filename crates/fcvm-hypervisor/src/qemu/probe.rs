//! Finding QEMU: the program, its version, the machine type.

use std::fmt;
use std::io::Read;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde::{Deserialize, Serialize};

use crate::error::HypervisorError;

/// The oldest version that works: `-netdev stream` came with it.
pub const MINIMUM_VERSION: Version = Version {
    major: 7,
    minor: 2,
    micro: 0,
};

/// Name of the program.
const PROGRAM: &str = "qemu-system-x86_64";
/// Debian's package that has it.
const PACKAGE: &str = "qemu-system-x86";

/// Most bytes read of what the program prints.
const OUTPUT_BYTES_MAX: u64 = 64 << 10;

/// A version of QEMU.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Version {
    /// First number; one a year.
    pub major: u16,
    /// Second number; three a year.
    pub minor: u16,
    /// Third number: corrections.
    pub micro: u16,
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.major, self.minor, self.micro)
    }
}

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
        if cfg!(not(target_arch = "x86_64")) {
            return Err(HypervisorError::Architecture {
                architecture: std::env::consts::ARCH,
            });
        }
        let program = match explicit {
            Some(path) if is_program(path) => path.to_owned(),
            Some(path) => {
                return Err(HypervisorError::NotFound {
                    program: path.display().to_string(),
                    package: PACKAGE,
                });
            }
            None => search(search_path).ok_or_else(|| HypervisorError::NotFound {
                program: PROGRAM.to_owned(),
                package: PACKAGE,
            })?,
        };
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
        let output = run(&self.program, &["--version"])?;
        let version = parse_version(&output).ok_or_else(|| HypervisorError::NotQemu {
            path: self.program.clone(),
            reason: match output.lines().next() {
                Some(line) => format!("it printed '{}'", line.escape_debug()),
                None => "it printed nothing".to_owned(),
            },
        })?;
        self.require(version)?;
        Ok(version)
    }

    /// Refuses a version that is too old.
    pub(super) fn require(&self, version: Version) -> Result<(), HypervisorError> {
        if version < MINIMUM_VERSION {
            return Err(HypervisorError::TooOld {
                path: self.program.clone(),
                found: version,
                required: MINIMUM_VERSION,
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
        let machines = run(&self.program, &["-machine", "help"])?;
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

fn search(search_path: &str) -> Option<PathBuf> {
    std::env::split_paths(search_path)
        .filter(|directory| directory.is_absolute())
        .map(|directory| directory.join(PROGRAM))
        .find(|path| is_program(path))
}

fn is_program(path: &Path) -> bool {
    path.metadata()
        .is_ok_and(|data| data.is_file() && data.permissions().mode() & 0o111 != 0)
}

/// What the program prints to standard output, bounded.
fn run(program: &Path, arguments: &[&str]) -> Result<String, HypervisorError> {
    let failed = |source| HypervisorError::Spawn {
        path: program.to_owned(),
        source,
    };
    let mut child = Command::new(program)
        .args(arguments)
        .env_clear()
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .map_err(failed)?;
    let mut output = Vec::new();
    let read = match child.stdout.take() {
        Some(stdout) => stdout.take(OUTPUT_BYTES_MAX).read_to_end(&mut output),
        None => Ok(0),
    };
    let _ = child.kill();
    child.wait().map_err(failed)?;
    read.map_err(failed)?;
    Ok(String::from_utf8_lossy(&output).into_owned())
}

/// `QEMU emulator version 7.2.22 (Debian ...)`
fn parse_version(output: &str) -> Option<Version> {
    let line = output.lines().next()?;
    let numbers = line.strip_prefix("QEMU emulator version ")?;
    let mut numbers = numbers.split_whitespace().next()?.split('.');
    let mut next = || -> Option<u16> {
        let text = numbers.next()?;
        let end = text
            .find(|c: char| !c.is_ascii_digit())
            .unwrap_or(text.len());
        text[..end].parse().ok()
    };
    Some(Version {
        major: next()?,
        minor: next()?,
        micro: next().unwrap_or(0),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_of_debian_fedora_and_git_are_understood() {
        for (line, shown) in [
            (
                "QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7+deb12u18)",
                "7.2.22",
            ),
            (
                "QEMU emulator version 9.1.2 (qemu-9.1.2-2.fc41)\nCopyright",
                "9.1.2",
            ),
            ("QEMU emulator version 10.0.50 (v10.0.0-1-gabc)", "10.0.50"),
            ("QEMU emulator version 8.2", "8.2.0"),
        ] {
            assert_eq!(parse_version(line).unwrap().to_string(), shown);
        }
        for bad in [
            "",
            "qemu-img version 7.2",
            "QEMU emulator version x.y",
            "QEMU emulator version 7",
        ] {
            assert_eq!(parse_version(bad), None, "{bad}");
        }
    }
}
