//! How devices are grouped: the choice of a layout, its space and what it survives.

use std::fmt;
use std::str::FromStr;

use serde::Serialize;

use super::{Device, Reason, Request, Role, Workload, ZpoolError};

/// A kind of group.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Layout {
    /// Each device alone: nothing is survived.
    Stripe,
    /// Pairs of the same content (three devices: one group of three).
    Mirror,
    /// One to three devices' worth of parity.
    Raidz(u32),
    /// The same over many devices, with spares spread over all.
    Draid(u32),
}

impl FromStr for Layout {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "stripe" => Ok(Self::Stripe),
            "mirror" => Ok(Self::Mirror),
            "raidz" | "raidz1" => Ok(Self::Raidz(1)),
            "raidz2" => Ok(Self::Raidz(2)),
            "raidz3" => Ok(Self::Raidz(3)),
            "draid" | "draid1" => Ok(Self::Draid(1)),
            "draid2" => Ok(Self::Draid(2)),
            "draid3" => Ok(Self::Draid(3)),
            _ => Err("layouts are stripe, mirror, raidz1-3, draid1-3".to_owned()),
        }
    }
}

impl fmt::Display for Layout {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Stripe => f.write_str("stripe"),
            Self::Mirror => f.write_str("mirror"),
            Self::Raidz(parity) => write!(f, "raidz{parity}"),
            Self::Draid(parity) => write!(f, "draid{parity}"),
        }
    }
}

/// A group of devices as `zpool create` takes it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Vdev {
    /// `data`, `special`, `log`, `cache`, `spare`.
    pub class: &'static str,
    /// The word before the devices; empty for devices alone.
    pub kind: String,
    /// Devices' worth of redundancy.
    pub parity: u32,
    /// Devices of a stripe of dRAID; 0 otherwise.
    pub draid_data_count: u32,
    /// Spares within dRAID.
    pub draid_spare_count: u32,
    /// The devices.
    pub devices: Vec<String>,
}

impl Vdev {
    fn of(class: &'static str, kind: &str, parity: u32, devices: &[&Device]) -> Self {
        Self {
            class,
            kind: kind.to_owned(),
            parity,
            draid_data_count: 0,
            draid_spare_count: 0,
            devices: devices
                .iter()
                .map(|device| device.stable_path.clone())
                .collect(),
        }
    }
}

pub(super) struct Arranged {
    pub(super) vdevs: Vec<Vdev>,
    pub(super) reasons: Vec<Reason>,
    pub(super) warnings: Vec<String>,
}

/// dRAID pays off from here on: its spares are rebuilt by all devices at once.
const DRAID_DEVICES_MIN: usize = 24;
/// Wider groups of raidz are slow to rebuild.
const RAIDZ_WIDTH_MAX: usize = 10;
/// Above it a rebuild takes so long that a second failure must be survived.
const ONE_PARITY_BYTES_MAX: u64 = 2 << 40;
const DRAID_DATA_COUNT: u32 = 8;

struct Groups<'a> {
    data: Vec<&'a Device>,
    special: Vec<&'a Device>,
    log: Vec<&'a Device>,
    cache: Vec<&'a Device>,
    spare: Vec<&'a Device>,
}

pub(super) fn arrange(request: &Request) -> Result<Arranged, ZpoolError> {
    let mut reasons = Vec::new();
    let mut groups = sort_by_role(request);
    place_flash(request, &mut groups, &mut reasons);
    let layout = request
        .layout
        .unwrap_or_else(|| choose(request.workload, &groups.data));
    reasons.push(Reason {
        option: layout.to_string(),
        reason: match request.layout {
            Some(_) => "as asked".to_owned(),
            None => why(layout, request.workload, groups.data.len()),
        },
    });
    let mut vdevs = group(layout, &mut groups, &mut reasons)?;
    let mut warnings = warnings(layout, &groups, &vdevs);
    for (class, devices, redundant) in [
        ("special", &groups.special, true),
        ("log", &groups.log, true),
        ("cache", &groups.cache, false),
        ("spare", &groups.spare, false),
    ] {
        match devices.len() {
            0 => {}
            1 | 2.. if !redundant => vdevs.push(Vdev::of(class, "", 0, devices)),
            1 => {
                if class == "special" {
                    warnings.push(
                        "the special device stands alone: when it fails, the pool is lost"
                            .to_owned(),
                    );
                }
                vdevs.push(Vdev::of(class, "", 0, devices));
            }
            count => {
                // Pairs; three devices, or the three that remain, are one group.
                let mut rest = devices.as_slice();
                while !rest.is_empty() {
                    let width = if rest.len() == 3 { 3 } else { 2 };
                    let (pair, others) = rest.split_at(width.min(count));
                    vdevs.push(Vdev::of(class, "mirror", pair.len() as u32 - 1, pair));
                    rest = others;
                }
            }
        }
    }
    Ok(Arranged {
        vdevs,
        reasons,
        warnings,
    })
}

fn sort_by_role(request: &Request) -> Groups<'_> {
    let of = |role| {
        let devices = request.devices.iter();
        devices
            .filter(|(_, own)| *own == role)
            .map(|(device, _)| device)
            .collect()
    };
    Groups {
        data: of(Role::Data),
        special: of(Role::Special),
        log: of(Role::Log),
        cache: of(Role::Cache),
        spare: of(Role::Spare),
    }
}

/// Flash beside disks that turn is too good, and too small, for data.
fn place_flash(request: &Request, groups: &mut Groups<'_>, reasons: &mut Vec<Reason>) {
    let (flash, turning): (Vec<&Device>, Vec<&Device>) =
        groups.data.iter().partition(|device| !device.rotational);
    if flash.is_empty() || turning.is_empty() || request.layout == Some(Layout::Stripe) {
        return;
    }
    groups.data = turning;
    let (role, reason) = match (flash.len(), request.workload) {
        (1, Workload::Vm | Workload::Database) => (
            "log",
            "one flash device beside disks: synchronous writes of guests and databases wait for it, not for the disks; it \
             needs protection against power loss; when it fails, only a crash at the same moment loses data",
        ),
        (1, Workload::Files | Workload::Backup) => (
            "cache",
            "one flash device beside disks: it caches reads; nothing is lost with it; a special device must be mirrored",
        ),
        _ => (
            "special",
            "mirrored flash beside disks holds metadata and small blocks: listings, scrubs and small reads do not wait for \
             the disks; it is a part of the pool and cannot be removed from one with raidz",
        ),
    };
    match role {
        "log" => groups.log.extend(flash),
        "cache" => groups.cache.extend(flash),
        _ => groups.special.extend(flash),
    }
    reasons.push(Reason {
        option: role.to_owned(),
        reason: reason.to_owned(),
    });
}

fn choose(workload: Workload, data: &[&Device]) -> Layout {
    let count = data.len();
    let large = data
        .iter()
        .any(|device| device.size_bytes > ONE_PARITY_BYTES_MAX);
    match (workload, count) {
        (_, 0 | 1) => Layout::Stripe,
        (Workload::Vm | Workload::Database, _) | (_, 2) => Layout::Mirror,
        (_, 3) if large => Layout::Mirror,
        (_, 3) => Layout::Raidz(1),
        (_, 4 | 5) if !large => Layout::Raidz(1),
        (_, DRAID_DEVICES_MIN..) if data.iter().all(|device| device.rotational) => Layout::Draid(2),
        (Workload::Backup, 11..) if large => Layout::Raidz(3),
        _ => Layout::Raidz(2),
    }
}

fn why(layout: Layout, workload: Workload, count: usize) -> String {
    match layout {
        Layout::Stripe => "one device: damage is found and cannot be repaired".to_owned(),
        Layout::Mirror if matches!(workload, Workload::Vm | Workload::Database) => {
            "small random writes: each pair writes on its own, blocks of 16 KiB cost no padding, a rebuild is a copy".to_owned()
        }
        Layout::Mirror => "two devices, or three that are too large for one parity".to_owned(),
        Layout::Raidz(1) => format!("{count} devices of at most 2 TiB: a rebuild is short, one failure is enough"),
        Layout::Raidz(parity) => format!(
            "{count} devices of large files: {parity} failures in each group are survived, also one while another is rebuilt"
        ),
        Layout::Draid(_) => format!(
            "{count} disks: all of them rebuild into the spread spare at once, in hours and not days; costs padding of small blocks"
        ),
    }
}

/// The groups for data. Devices that are left over become spares.
fn group(
    layout: Layout,
    groups: &mut Groups<'_>,
    reasons: &mut Vec<Reason>,
) -> Result<Vec<Vdev>, ZpoolError> {
    let data = std::mem::take(&mut groups.data);
    let count = data.len();
    let refuse = |needed: &str| {
        Err(ZpoolError::Layout {
            layout: layout.to_string(),
            needed: needed.to_owned(),
            found: count,
        })
    };
    let vdevs = match layout {
        Layout::Stripe if count == 0 => return refuse("at least 1 device"),
        Layout::Stripe => vec![Vdev::of("data", "", 0, &data)],
        Layout::Mirror if count < 2 => return refuse("at least 2 devices"),
        Layout::Mirror if count == 3 => vec![Vdev::of("data", "mirror", 2, &data)],
        Layout::Mirror => pairs(&data, groups, reasons),
        Layout::Raidz(parity) if count < parity as usize + 2 => {
            return refuse(&format!("at least {} devices", parity + 2));
        }
        Layout::Raidz(parity) => raidz(parity, &data, groups, reasons),
        Layout::Draid(parity) => {
            let spares = (count / DRAID_DEVICES_MIN).clamp(1, 4) as u32;
            let stripe_max = (count as u32).saturating_sub(spares + parity);
            if stripe_max < 1 || count > 255 {
                return refuse(&format!("{} to 255 devices", parity + 2));
            }
            let data_count = DRAID_DATA_COUNT.min(stripe_max);
            let kind = format!("draid{parity}:{data_count}d:{count}c:{spares}s");
            reasons.push(Reason {
                option: kind.clone(),
                reason: format!(
                    "stripes of {data_count} + {parity} over {count} devices, {spares} of them spread as spare space"
                ),
            });
            vec![Vdev {
                draid_data_count: data_count,
                draid_spare_count: spares,
                ..Vdev::of("data", &kind, parity, &data)
            }]
        }
    };
    groups.data = data;
    Ok(vdevs)
}

fn pairs<'a>(data: &[&'a Device], groups: &mut Groups<'a>, reasons: &mut Vec<Reason>) -> Vec<Vdev> {
    let (paired, rest) = data.split_at(data.len() / 2 * 2);
    if !rest.is_empty() {
        groups.spare.extend(rest);
        reasons.push(Reason {
            option: "spare".to_owned(),
            reason: "an odd device: it takes the place of the first that fails".to_owned(),
        });
    }
    paired
        .chunks(2)
        .map(|pair| Vdev::of("data", "mirror", 1, pair))
        .collect()
}

fn raidz<'a>(
    parity: u32,
    data: &[&'a Device],
    groups: &mut Groups<'a>,
    reasons: &mut Vec<Reason>,
) -> Vec<Vdev> {
    let group_count = data.len().div_ceil(RAIDZ_WIDTH_MAX + parity as usize);
    let width = data.len() / group_count;
    let (used, rest) = data.split_at(width * group_count);
    if group_count > 1 {
        reasons.push(Reason {
            option: format!("raidz{parity} x {group_count}"),
            reason: format!("groups of {width}: wider ones are slow to rebuild, and each group adds its writes per second"),
        });
    }
    if !rest.is_empty() {
        groups.spare.extend(rest);
        reasons.push(Reason {
            option: "spare".to_owned(),
            reason: "what does not fill equal groups takes the place of devices that fail"
                .to_owned(),
        });
    }
    used.chunks(width)
        .map(|chunk| Vdev::of("data", &format!("raidz{parity}"), parity, chunk))
        .collect()
}

fn warnings(layout: Layout, groups: &Groups<'_>, vdevs: &[Vdev]) -> Vec<String> {
    let mut warnings = Vec::new();
    if layout == Layout::Stripe {
        warnings.push(format!(
            "no redundancy: the pool is lost with {} device",
            if vdevs[0].devices.len() == 1 {
                "its only"
            } else {
                "any"
            }
        ));
    }
    let sizes = || groups.data.iter().map(|device| device.size_bytes);
    let (least, most) = (sizes().min().unwrap_or(0), sizes().max().unwrap_or(0));
    if layout != Layout::Stripe && most - least > most / 20 {
        warnings.push(format!(
            "the devices have {} to {}: in a group each counts as its smallest",
            fcvm_types::ByteSize::from_bytes(least),
            fcvm_types::ByteSize::from_bytes(most)
        ));
    }
    warnings
}

/// Sectors that raidz takes for a block of `data_sectors`, parity and padding included: one parity sector per
/// row and parity, and the whole rounded up to a multiple of parity + 1 (`vdev_raidz_asize`).
pub fn raidz_allocated_sectors(data_sectors: u64, width: u64, parity: u64) -> u64 {
    let rows = data_sectors.div_ceil(width - parity);
    (data_sectors + rows * parity).next_multiple_of(parity + 1)
}

fn block_sectors(ashift: u32, record_bytes: u64) -> u64 {
    record_bytes.div_ceil(1 << ashift).max(1)
}

/// What the data groups can store of blocks of this size.
pub(super) fn usable_bytes(
    vdevs: &[Vdev],
    request: &Request,
    ashift: u32,
    record_bytes: u64,
) -> u64 {
    let size = |path: &String| {
        let device = request
            .devices
            .iter()
            .find(|(device, _)| device.stable_path == *path);
        device.map_or(0, |(device, _)| device.size_bytes)
    };
    let sectors = block_sectors(ashift, record_bytes);
    let usable = |vdev: &Vdev| -> u64 {
        let count = vdev.devices.len() as u64;
        let least = vdev.devices.iter().map(size).min().unwrap_or(0);
        let parity = u64::from(vdev.parity);
        let share = |raw: u64, allocated: u64| {
            (u128::from(raw) * u128::from(sectors) / u128::from(allocated)) as u64
        };
        if vdev.kind.is_empty() {
            vdev.devices.iter().map(size).sum()
        } else if vdev.kind == "mirror" {
            least
        } else if vdev.draid_data_count > 0 {
            // dRAID has no partial stripes: each block takes whole ones.
            let data = u64::from(vdev.draid_data_count);
            let raw = least * (count - u64::from(vdev.draid_spare_count));
            share(raw, sectors.div_ceil(data) * (data + parity))
        } else {
            share(
                least * count,
                raidz_allocated_sectors(sectors, count, parity),
            )
        }
    };
    vdevs
        .iter()
        .filter(|vdev| vdev.class == "data")
        .map(usable)
        .sum()
}

/// The worst of the groups that hold data or metadata.
pub(super) fn failures_survived(vdevs: &[Vdev]) -> u32 {
    vdevs
        .iter()
        .filter(|vdev| ["data", "special"].contains(&vdev.class))
        .map(|vdev| vdev.parity)
        .min()
        .unwrap_or(0)
}

/// Small blocks on raidz or dRAID: most of the space that was hoped for is padding.
pub(super) fn padding_warning(vdevs: &[Vdev], ashift: u32, record_bytes: u64) -> Option<String> {
    let vdev = vdevs
        .iter()
        .find(|vdev| vdev.kind.starts_with("raidz") || vdev.draid_data_count > 0)?;
    let sectors = block_sectors(ashift, record_bytes);
    let (width, parity) = (vdev.devices.len() as u64, u64::from(vdev.parity));
    let (allocated, hoped) = match u64::from(vdev.draid_data_count) {
        0 => (
            raidz_allocated_sectors(sectors, width, parity),
            (width - parity) * 100 / width,
        ),
        data => (
            sectors.div_ceil(data) * (data + parity),
            data * 100 / (data + parity),
        ),
    };
    let percent = sectors * 100 / allocated;
    (percent + 5 < hoped).then(|| {
        format!(
            "blocks of {} take {allocated} sectors for {sectors} of data on {}: {percent} % of the space is for data, not {hoped} %; \
             mirrors or larger blocks are better",
            fcvm_types::ByteSize::from_bytes(record_bytes),
            vdev.kind,
        )
    })
}
