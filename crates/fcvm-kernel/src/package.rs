//! A Debian kernel package taken apart, without installing it and without root.
//!
//! `dpkg-deb` opens the package, the tar crate reads what comes out of it, and only the kernel, its
//! configuration and its modules are kept. File names of the package never become paths here.

use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};

use crate::modules::is_module_file;
use crate::vmlinux::IMAGE_SIZE_MAX_BYTES;
use crate::{KernelError, Result};

/// Bytes that a package may hold in files that are kept: ten times Debian's full kernel.
const UNPACKED_MAX_BYTES: u64 = 8 << 30;
/// Files of a package: ten times Debian's full kernel.
const MEMBER_COUNT_MAX: usize = 100_000;

/// The parts of a kernel package, in a directory of the caller's.
#[derive(Debug)]
pub(crate) struct UnpackedPackage {
    /// The compressed kernel.
    pub(crate) vmlinuz: Vec<u8>,
    /// Its configuration; empty where the package has none.
    pub(crate) config: Vec<u8>,
    /// Text of `modules.builtin`.
    pub(crate) builtin: String,
    /// Directory with all module files, flat.
    pub(crate) modules: PathBuf,
}

/// Unpacks the package into `directory`, which is empty.
pub(crate) fn unpack(package: &Path, directory: &Path) -> Result<UnpackedPackage> {
    let stderr_path = directory.join("dpkg-deb.stderr");
    let stderr = File::create(&stderr_path).map_err(KernelError::file("create", &stderr_path))?;
    let mut child = Command::new("dpkg-deb")
        .arg("--fsys-tarfile")
        .arg(package)
        .env("LC_ALL", "C")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(stderr)
        .spawn()
        .map_err(|source| KernelError::Program {
            program: "dpkg-deb",
            source,
        })?;
    let unpacked = child
        .stdout
        .take()
        .ok_or_else(|| refuse(package, "dpkg-deb has no output".to_owned()))
        .and_then(|stdout| read_members(package, stdout, directory));
    finish(child, package, &stderr_path, unpacked)
}

/// A failure of dpkg-deb explains a failure to read its output, so it comes first.
fn finish(
    mut child: Child,
    package: &Path,
    stderr_path: &Path,
    unpacked: Result<UnpackedPackage>,
) -> Result<UnpackedPackage> {
    if unpacked.is_err() {
        // It may wait for a reader.
        let _ = child.kill();
    }
    let status = child.wait().map_err(KernelError::file("unpack", package))?;
    let said = fs::read_to_string(stderr_path).unwrap_or_default();
    match said.lines().rfind(|line| !line.is_empty()) {
        Some(line) if !status.success() => Err(refuse(package, line.to_owned())),
        _ => unpacked,
    }
}

fn refuse(package: &Path, reason: String) -> KernelError {
    KernelError::Package {
        path: package.to_owned(),
        reason,
    }
}

fn read_members(package: &Path, stdout: ChildStdout, directory: &Path) -> Result<UnpackedPackage> {
    let modules = directory.join("modules");
    crate::files::create_dir(&modules)?;
    let mut archive = tar::Archive::new(stdout);
    let (mut vmlinuz, mut config, mut builtin) = (None, Vec::new(), Vec::new());
    let mut kept_bytes = 0_u64;
    let unreadable = |error: io::Error| refuse(package, error.to_string());
    for (count, member) in archive.entries().map_err(unreadable)?.enumerate() {
        let mut member = member.map_err(unreadable)?;
        if count >= MEMBER_COUNT_MAX {
            return Err(refuse(package, "it has too many files".to_owned()));
        }
        let path = String::from_utf8_lossy(&member.path_bytes()).into_owned();
        let Some(part) = part_of(&path).filter(|_| member.header().entry_type().is_file()) else {
            continue;
        };
        kept_bytes = kept_bytes.saturating_add(member.size());
        if member.size() > IMAGE_SIZE_MAX_BYTES as u64 || kept_bytes > UNPACKED_MAX_BYTES {
            return Err(refuse(package, format!("{path} is too large")));
        }
        match part {
            Part::Kernel => vmlinuz = Some(read_all(&mut member).map_err(unreadable)?),
            Part::Config => config = read_all(&mut member).map_err(unreadable)?,
            Part::Builtin => builtin = read_all(&mut member).map_err(unreadable)?,
            Part::Module(file_name) => write_member(&mut member, &modules.join(file_name))?,
        }
    }
    Ok(UnpackedPackage {
        vmlinuz: vmlinuz.ok_or_else(|| refuse(package, "it has no /boot/vmlinuz-*".to_owned()))?,
        config,
        builtin: String::from_utf8_lossy(&builtin).into_owned(),
        modules,
    })
}

/// A member that is kept.
enum Part<'a> {
    Kernel,
    Config,
    Builtin,
    Module(&'a str),
}

/// Debian 13 keeps modules below /usr/lib, earlier ones below /lib.
fn part_of(path: &str) -> Option<Part<'_>> {
    let path = path.trim_start_matches("./").trim_start_matches('/');
    if let Some(name) = path.strip_prefix("boot/") {
        return match name {
            _ if name.contains('/') => None,
            _ if name.starts_with("vmlinuz-") || name.starts_with("vmlinux-") => Some(Part::Kernel),
            _ if name.starts_with("config-") => Some(Part::Config),
            _ => None,
        };
    }
    let below = path
        .strip_prefix("usr/")
        .unwrap_or(path)
        .strip_prefix("lib/modules/")?;
    let file_name = below.rsplit('/').next()?;
    match file_name {
        "modules.builtin" => Some(Part::Builtin),
        _ if is_module_file(file_name) => Some(Part::Module(file_name)),
        _ => None,
    }
}

/// The size was checked against [`IMAGE_SIZE_MAX_BYTES`].
fn read_all(member: &mut impl Read) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    member.read_to_end(&mut bytes)?;
    Ok(bytes)
}

fn write_member(member: &mut impl Read, path: &Path) -> Result<()> {
    File::create(path)
        .and_then(|mut file| io::copy(member, &mut file))
        .map(|_| ())
        .map_err(KernelError::file("write", path))
}
