//! What is refused before a hypervisor is started, each with a line that names the caller's mistake.

use std::fs::File;
use std::io;
use std::path::Path;

use crate::error::HypervisorError;
use crate::spec::{DISK_COUNT_MAX, DiskFormat, DiskLayer, DiskSpec, HardwareSpec, MEMORY_MIN};

/// Refuses what a hypervisor would refuse with a line that does not name the caller's mistake.
pub(crate) fn check_hardware(
    spec: &HardwareSpec,
    cpu_count_max: u32,
) -> Result<(), HypervisorError> {
    let refuse = |what: String, reason: String| Err(HypervisorError::InvalidSpec { what, reason });
    if spec.cpu_count == 0 || spec.cpu_count > cpu_count_max {
        return refuse(
            format!("{} processors", spec.cpu_count),
            format!("a VM has 1 to {cpu_count_max}"),
        );
    }
    let size = spec.memory.size();
    if size < MEMORY_MIN || !size.bytes().is_multiple_of(4096) {
        return refuse(
            format!("{size} of memory"),
            format!("it needs at least {MEMORY_MIN}, in whole pages of 4 KiB"),
        );
    }
    if spec.disks.len() > DISK_COUNT_MAX {
        return refuse(
            format!("{} disks", spec.disks.len()),
            format!("a VM has at most {DISK_COUNT_MAX}"),
        );
    }
    for (index, disk) in spec.disks.iter().enumerate() {
        if !is_serial(&disk.serial) {
            return refuse(
                format!("the disk serial '{}'", disk.serial.escape_debug()),
                "it is a letter and up to 19 letters, digits, '-', '_' and '.'".to_owned(),
            );
        }
        let same = |other: &DiskSpec| other.serial == disk.serial;
        if spec.disks[..index].iter().any(same) {
            return refuse(
                format!("the disk serial '{}' twice", disk.serial),
                "the guest could not tell the disks apart".to_owned(),
            );
        }
        let is_raw = |layer: &DiskLayer| layer.format == DiskFormat::Raw;
        if disk.layers.first().is_none_or(|lowest| !is_raw(lowest))
            || disk.layers.iter().skip(1).any(is_raw)
        {
            return refuse(
                format!("the disk '{}'", disk.serial),
                "its layers are a raw file and qcow2 files over it".to_owned(),
            );
        }
    }
    Ok(())
}

/// A serial is also a name in QEMU's block layer.
fn is_serial(text: &str) -> bool {
    text.len() <= 20
        && text.starts_with(|c: char| c.is_ascii_alphabetic())
        && text
            .chars()
            .all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c))
}

pub(crate) fn check_file(path: &Path, what: &str) -> Result<(), HypervisorError> {
    match File::open(path) {
        Ok(_) => Ok(()),
        Err(error) => Err(HypervisorError::InvalidSpec {
            what: format!("{what} {}", path.display()),
            reason: error.to_string(),
        }),
    }
}

/// A path as text for a hypervisor: absolute, since it runs in another directory.
pub(crate) fn text_path(path: &Path, what: &str) -> Result<String, HypervisorError> {
    let refuse = |reason: String| HypervisorError::InvalidSpec {
        what: format!("{what} {}", path.display()),
        reason,
    };
    let absolute = std::path::absolute(path).map_err(|error| refuse(error.to_string()))?;
    absolute
        .into_os_string()
        .into_string()
        .map_err(|_| refuse("its path is not UTF-8".to_owned()))
}

/// What failed in setting up a part of a VM.
pub(crate) fn setup_failed(what: &'static str) -> impl Fn(io::Error) -> HypervisorError {
    move |source| HypervisorError::Setup { what, source }
}
