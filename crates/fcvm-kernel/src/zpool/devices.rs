//! What devices say of themselves, and how far that is believed.

use serde::Serialize;

use super::{Reason, Request, ZpoolError};

/// A device, as the running machine describes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Device {
    /// Its path, without symbolic links.
    pub path: String,
    /// The path that the commands use: one that stays the same after a reboot, where there is one.
    pub stable_path: String,
    /// Its size.
    pub size_bytes: u64,
    /// `queue/physical_block_size`.
    pub physical_block_bytes: u64,
    /// `queue/rotational`.
    pub rotational: bool,
    /// `device/model`; empty where unknown.
    pub model: String,
    /// What stands on it.
    pub uses: Vec<Use>,
}

/// Something that stands on a device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Use {
    /// The device's path.
    pub path: String,
    /// What it is: `ext4`, `mounted at /srv`, `partition table gpt`, ...
    pub what: String,
    /// Mounted, swap, part of another device, open elsewhere: in use at this moment.
    pub active: bool,
}

/// The exponent of the sector size, and what to know of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ashift {
    /// 12 for 4096 bytes.
    pub value: u32,
    /// Why.
    pub reason: String,
    /// Devices that are not believed.
    pub warnings: Vec<String>,
}

/// 4 KiB: below it, no device that is sold is better off, and a pool keeps its ashift for ever.
const ASHIFT_MIN: u32 = 12;
/// `ASHIFT_MIN` and `ASHIFT_MAX` of OpenZFS.
const ASHIFT_RANGE: std::ops::RangeInclusive<u32> = 9..=16;

/// Beginnings of models that say 512 bytes and have more, with what they have. From the tables that FreeBSD
/// (`ADA_Q_4K` in ata_da.c) and OpenZFS (zpool_vdev_os.c) keep for the same purpose.
const LIARS: [(&str, u64); 13] = [
    ("WDC WD10EARS", 4096),
    ("WDC WD15EARS", 4096),
    ("WDC WD20EARS", 4096),
    ("WDC WD30EZRS", 4096),
    ("SAMSUNG HD204UI", 4096),
    ("SAMSUNG SSD 830", 8192),
    ("SAMSUNG SSD 840", 8192),
    ("SAMSUNG SSD 850", 8192),
    ("OCZ-VERTEX2", 4096),
    ("OCZ-VERTEX3", 8192),
    ("OCZ-VERTEX4", 4096),
    ("CORSAIR FORCE", 4096),
    ("INTEL SSDSA2", 4096),
];

/// What a model has for sure, whatever it says.
fn known_block_bytes(model: &str) -> Option<u64> {
    let model = model.trim().to_ascii_uppercase();
    let model = model.trim_start_matches("ATA").trim_start();
    LIARS
        .iter()
        .find(|(beginning, _)| model.starts_with(beginning))
        .map(|(_, bytes)| *bytes)
}

pub(super) fn ashift(request: &Request) -> Result<Ashift, ZpoolError> {
    let mut warnings = Vec::new();
    let mut largest = 0;
    for (device, _) in &request.devices {
        let said = device.physical_block_bytes;
        let has = known_block_bytes(&device.model).map_or(said, |known| known.max(said));
        if has > said {
            warnings.push(format!(
                "{} ({}) says {said}-byte blocks and is known to have {has}: believed is the larger",
                device.path,
                device.model.trim()
            ));
        } else if !device.rotational && said < 4096 {
            warnings.push(format!(
                "{} says {said}-byte blocks: flash has none so small; 4096 is assumed",
                device.path
            ));
        }
        largest = largest.max(has);
    }
    let own = (u64::BITS - largest.max(1).next_power_of_two().leading_zeros() - 1)
        .clamp(ASHIFT_MIN, *ASHIFT_RANGE.end());
    let (value, reason) = match request.ashift {
        Some(value) if !ASHIFT_RANGE.contains(&value) => {
            return Err(ZpoolError::Value {
                what: "ashift",
                value: value.into(),
                rule: "ZFS takes 9 to 16",
            });
        }
        Some(value) => {
            if 1_u64 << value < largest {
                warnings.push(format!(
                    "ashift {value} is smaller than the devices' blocks of {largest} bytes: each small write rewrites a \
                     block, for the life of the pool"
                ));
            }
            (value, "as asked".to_owned())
        }
        None => (
            own,
            format!(
                "sectors of {} bytes: the devices' largest physical block is {largest} bytes, and less than 4096 could \
                 never take a newer disk as replacement; it cannot be changed later",
                1_u64 << own
            ),
        ),
    };
    Ok(Ashift {
        value,
        reason,
        warnings,
    })
}

pub(super) fn reasons(request: &Request, ashift: &Ashift) -> Vec<Reason> {
    let mut reasons = vec![Reason {
        option: format!("ashift={}", ashift.value),
        reason: ashift.reason.clone(),
    }];
    if request.devices.iter().any(|(device, _)| !device.rotational) {
        reasons.push(Reason {
            option: "autotrim=on".to_owned(),
            reason: "flash is told of freed blocks; costs little since frees are gathered"
                .to_owned(),
        });
    }
    reasons
}
