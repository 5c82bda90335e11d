//! What the host's processor can do for a VM, found out by trying.
//!
//! /dev/kvm may be there and still not run ordinary guests: on some nested hosts the guest's kernel
//! is emulated instruction by instruction, takes minutes to come up and then stops at an instruction
//! that the emulator does not know. So a throw-away guest (`guest.rs`) runs a few instructions, in a
//! child process (`child.rs`) that is killed when it takes too long. The result holds until the host
//! boots again and is kept in a file (`cache.rs`). `tsc.rs` measures the time stamp counter.

mod cache;
mod child;
#[cfg(target_arch = "x86_64")]
mod guest;
mod tsc;

use std::fmt;
use std::fs::OpenOptions;
use std::io;
use std::path::Path;
use std::process::Command;

use serde::{Deserialize, Serialize};

pub use child::run_probe_guest;
pub use tsc::measure_tsc_khz;

/// The device that KVM is reached through.
const KVM_DEVICE: &str = "/dev/kvm";

/// Whether KVM runs guests.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "kind")]
pub enum KvmUsability {
    /// It does.
    Usable,
    /// There is no /dev/kvm.
    Absent,
    /// This user may not open it.
    NoPermission,
    /// It is there and emulates, or stops at, instructions that guests need.
    Emulating {
        /// What the throw-away guest met.
        reason: String,
    },
    /// It is there and can not be used, or can not be probed.
    Unusable {
        /// Why.
        reason: String,
    },
}

impl KvmUsability {
    /// It runs guests.
    pub fn is_usable(&self) -> bool {
        *self == Self::Usable
    }
}

impl fmt::Display for KvmUsability {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Usable => f.write_str("usable"),
            Self::Absent => f.write_str("absent: there is no /dev/kvm"),
            Self::NoPermission => f.write_str("no permission: this user may not open /dev/kvm"),
            Self::Emulating { reason } => write!(f, "present but emulating: {reason}"),
            Self::Unusable { reason } => write!(f, "not usable: {reason}"),
        }
    }
}

/// What was found out about the host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostProbe {
    /// Whether KVM runs guests.
    pub kvm: KvmUsability,
    /// Frequency of the time stamp counter in kHz, where it counts evenly; for
    /// [`Accelerator::Tcg`](crate::Accelerator::Tcg).
    pub tsc_khz: Option<u32>,
}

/// Finds out what the host can do, or takes it from the file `cache` where that was written since
/// the host booted. Takes 0.1 s on most hosts and 5 s at worst, and no time with a cache. Blocks.
///
/// `child` is run where KVM has to be tried: a command that calls [`run_probe_guest`] and ends, such
/// as the caller's own program with a hidden argument.
///
/// A cache that can not be read or written is no error: the host is probed again next time.
pub fn probe_host(cache: Option<&Path>, child: Command) -> HostProbe {
    if let Some(known) = cache.and_then(cache::load) {
        // Permissions change without a boot, and looking costs nothing.
        return HostProbe {
            kvm: open_device().err().unwrap_or(known.kvm),
            tsc_khz: known.tsc_khz,
        };
    }
    let opened = open_device();
    let is_openable = opened.is_ok();
    let probe = HostProbe {
        kvm: match opened {
            Ok(()) => child::probe_kvm(child),
            Err(usability) => usability,
        },
        tsc_khz: measure_tsc_khz(),
    };
    // What another user, or this one in another group, would find must not be answered from here.
    if let Some(path) = cache
        && is_openable
    {
        cache::store(path, &probe);
    }
    probe
}

/// Opens the device as a hypervisor does.
fn open_device() -> Result<(), KvmUsability> {
    match OpenOptions::new().read(true).write(true).open(KVM_DEVICE) {
        Ok(_) => Ok(()),
        Err(error) => Err(match error.kind() {
            io::ErrorKind::NotFound => KvmUsability::Absent,
            io::ErrorKind::PermissionDenied => KvmUsability::NoPermission,
            _ => match error.raw_os_error() {
                // A device node without a driver behind it.
                Some(ENXIO | ENODEV) => KvmUsability::Absent,
                _ => KvmUsability::Unusable {
                    reason: format!("{KVM_DEVICE} can not be opened: {error}"),
                },
            },
        }),
    }
}

const ENXIO: i32 = rustix::io::Errno::NXIO.raw_os_error();
const ENODEV: i32 = rustix::io::Errno::NODEV.raw_os_error();
