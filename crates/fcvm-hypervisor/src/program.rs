//! The program of a hypervisor: where it is, and what it prints of itself.

use std::io::Read;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::error::HypervisorError;
use crate::version::Version;

/// Most bytes read of what the program prints.
const OUTPUT_BYTES_MAX: u64 = 64 << 10;

/// What is looked for.
pub(crate) struct Sought {
    /// `QEMU` or `Firecracker`.
    pub(crate) hypervisor: &'static str,
    /// The file's name.
    pub(crate) name: &'static str,
    /// How it is had where it is missing.
    pub(crate) advice: &'static str,
    /// Why it is for x86-64 hosts.
    pub(crate) architecture: &'static str,
}

/// Looks for a program: at `explicit` where given, else in the directories of `search_path` (a list
/// as in the PATH variable).
pub(crate) fn locate(
    sought: &Sought,
    explicit: Option<&Path>,
    search_path: &str,
) -> Result<PathBuf, HypervisorError> {
    if cfg!(not(target_arch = "x86_64")) {
        return Err(HypervisorError::Architecture {
            architecture: std::env::consts::ARCH,
            reason: sought.architecture,
        });
    }
    let not_found = |program: String| HypervisorError::NotFound {
        hypervisor: sought.hypervisor,
        program,
        advice: sought.advice,
    };
    match explicit {
        Some(path) if is_program(path) => Ok(path.to_owned()),
        Some(path) => Err(not_found(path.display().to_string())),
        None => std::env::split_paths(search_path)
            .filter(|directory| directory.is_absolute())
            .map(|directory| directory.join(sought.name))
            .find(|path| is_program(path))
            .ok_or_else(|| not_found(sought.name.to_owned())),
    }
}

pub(crate) fn is_program(path: &Path) -> bool {
    path.metadata()
        .is_ok_and(|data| data.is_file() && data.permissions().mode() & 0o111 != 0)
}

/// The version that a program prints behind `prefix` in the first line of its answer to `--version`.
pub(crate) fn version(
    hypervisor: &'static str,
    program: &Path,
    prefix: &str,
) -> Result<Version, HypervisorError> {
    let output = run(program, &["--version"])?;
    parse_version(&output, prefix).ok_or_else(|| HypervisorError::Foreign {
        hypervisor,
        path: program.to_owned(),
        reason: match output.lines().next() {
            Some(line) => format!("it printed '{}'", line.escape_debug()),
            None => "it printed nothing".to_owned(),
        },
    })
}

fn parse_version(output: &str, prefix: &str) -> Option<Version> {
    Version::parse_start(output.lines().next()?.strip_prefix(prefix)?)
}

/// What the program prints to standard output, bounded.
pub(crate) fn run(program: &Path, arguments: &[&str]) -> Result<String, HypervisorError> {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_of_releases_distributions_and_development_are_understood() {
        const QEMU: &str = "QEMU emulator version ";
        const FIRECRACKER: &str = "Firecracker v";
        for (prefix, line, shown) in [
            (
                QEMU,
                "QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7+deb12u18)",
                "7.2.22",
            ),
            (
                QEMU,
                "QEMU emulator version 9.1.2 (qemu-9.1.2-2.fc41)\nCopyright",
                "9.1.2",
            ),
            (
                QEMU,
                "QEMU emulator version 10.0.50 (v10.0.0-1-gabc)",
                "10.0.50",
            ),
            (QEMU, "QEMU emulator version 8.2", "8.2.0"),
            (FIRECRACKER, "Firecracker v1.17.0-dev\n\n", "1.17.0"),
            (FIRECRACKER, "Firecracker v1.13.1\n\n", "1.13.1"),
        ] {
            assert_eq!(parse_version(line, prefix).unwrap().to_string(), shown);
        }
        for bad in [
            "",
            "qemu-img version 7.2",
            "QEMU emulator version x.y",
            "QEMU emulator version 7",
        ] {
            assert_eq!(parse_version(bad, QEMU), None, "{bad}");
        }
    }
}
