//! The pool assistant: which pool to make of some devices, as the exact commands with a reason for each
//! option.
//!
//! Pure functions: [`plan`] looks at nothing and runs nothing. The caller says what the devices are and
//! what they hold ([`Device`]), and must ask [`Plan::obstacles`] before it runs the commands.

mod devices;
mod layout;
mod properties;
#[cfg(test)]
mod tests;

use serde::Serialize;

pub use devices::{Ashift, Device, Use};
pub use layout::{Layout, Vdev, raidz_allocated_sectors};

/// What the pool is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Workload {
    /// Disks of virtual machines: small random writes, block cloning.
    Vm,
    /// Databases with pages of 8 to 16 KiB.
    Database,
    /// Files of people and services.
    Files,
    /// Copies of other machines: large, written once.
    Backup,
}

/// What the devices are for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// Data, and what the plan makes of it.
    Data,
    /// Metadata and small blocks.
    Special,
    /// The intent log.
    Log,
    /// Second level of the read cache.
    Cache,
    /// Takes the place of a device that failed.
    Spare,
}

/// What is known and wanted.
#[derive(Debug, Clone)]
pub struct Request {
    /// Name of the pool.
    pub pool: String,
    /// The devices and what they are for. [`Role::Data`] leaves it to the plan.
    pub devices: Vec<(Device, Role)>,
    /// What the pool is for.
    pub workload: Workload,
    /// The layout; `None` for the plan's choice.
    pub layout: Option<Layout>,
    /// The exponent of the sector size; `None` for the devices'.
    pub ashift: Option<u32>,
    /// Record and volume block size; `None` for the workload's.
    pub record_bytes: Option<u64>,
}

/// An option of a command, or a word of it, with its reason.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Reason {
    /// The option as it is written.
    pub option: String,
    /// Why.
    pub reason: String,
}

/// A command: never given to a shell.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Command {
    /// The program and its arguments.
    pub words: Vec<String>,
    /// Only shown: a pattern for later use.
    pub example: bool,
}

/// A pool and how to make it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Plan {
    /// Groups of devices.
    pub vdevs: Vec<Vdev>,
    /// The exponent of the sector size.
    pub ashift: u32,
    /// Record and volume block size.
    pub record_bytes: u64,
    /// What can be stored, about: without metadata and the 1/32 that ZFS keeps free.
    pub usable_bytes: u64,
    /// Failed data devices that are survived in any combination.
    pub failures_survived: u32,
    /// The commands in their order.
    pub commands: Vec<Command>,
    /// Why each option is there.
    pub reasons: Vec<Reason>,
    /// What to know before it is run.
    pub warnings: Vec<String>,
    /// What stands on the devices.
    pub uses: Vec<Use>,
}

/// Why there is no plan, or why it is not run.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ZpoolError {
    /// The name cannot be a pool's.
    #[error(
        "'{0}' cannot be a pool's name: a letter, then letters, digits, '_', '-', '.'; not 'mirror', 'raidz', 'draid', 'spare', 'log'"
    )]
    Name(String),
    /// The layout needs other devices.
    #[error("{layout} needs {needed}, and {found} are given for data")]
    Layout {
        /// The layout.
        layout: String,
        /// What it needs.
        needed: String,
        /// The number of devices.
        found: usize,
    },
    /// A value that ZFS does not take.
    #[error("{what} cannot be {value}: {rule}")]
    Value {
        /// Which value.
        what: &'static str,
        /// What it was.
        value: u64,
        /// What it may be.
        rule: &'static str,
    },
    /// A device that is given twice, or is too small.
    #[error("{path} {reason}")]
    Device {
        /// Its path.
        path: String,
        /// What is wrong.
        reason: String,
    },
}

/// Makes a plan.
pub fn plan(request: &Request) -> Result<Plan, ZpoolError> {
    check(request)?;
    let arranged = layout::arrange(request)?;
    let ashift = devices::ashift(request)?;
    let record_bytes = properties::record_bytes(request)?;
    let mut reasons = arranged.reasons;
    reasons.extend(devices::reasons(request, &ashift));
    let mut warnings = arranged.warnings;
    warnings.extend(ashift.warnings);
    let (commands, option_reasons) =
        properties::commands(request, &arranged.vdevs, ashift.value, record_bytes);
    reasons.extend(option_reasons);
    let usable_bytes = layout::usable_bytes(&arranged.vdevs, request, ashift.value, record_bytes);
    if let Some(warning) = layout::padding_warning(&arranged.vdevs, ashift.value, record_bytes) {
        warnings.push(warning);
    }
    Ok(Plan {
        failures_survived: layout::failures_survived(&arranged.vdevs),
        uses: request
            .devices
            .iter()
            .flat_map(|(device, _)| device.uses.clone())
            .collect(),
        vdevs: arranged.vdevs,
        ashift: ashift.value,
        record_bytes,
        usable_bytes,
        commands,
        reasons,
        warnings,
    })
}

impl Plan {
    /// Why the commands must not be run: devices in use, always; and devices that hold something, unless their
    /// path is in `destroyed`.
    pub fn obstacles(&self, destroyed: &[String]) -> Vec<String> {
        self.uses
            .iter()
            .filter_map(|found| {
                if found.active {
                    Some(format!(
                        "{} is in use ({}): it is never overwritten",
                        found.path, found.what
                    ))
                } else if destroyed.contains(&found.path) {
                    None
                } else {
                    Some(format!(
                        "{} holds data ({}): name it a second time with --destroy-data {}",
                        found.path, found.what, found.path
                    ))
                }
            })
            .collect()
    }

    /// The commands that make the pool, without examples. `-f` is added where data on devices is given up, for
    /// `zpool` refuses them on its own account.
    pub fn runnable(&self, destroyed: &[String]) -> Vec<Vec<String>> {
        let force = self
            .uses
            .iter()
            .any(|found| destroyed.contains(&found.path));
        self.commands
            .iter()
            .filter(|command| !command.example)
            .map(|command| {
                let mut words = command.words.clone();
                let creates = words.starts_with(&["zpool".to_owned(), "create".to_owned()]);
                if force && creates && words.get(2).is_none_or(|word| word != "-f") {
                    words.insert(2, "-f".to_owned());
                }
                words
            })
            .collect()
    }
}

fn check(request: &Request) -> Result<(), ZpoolError> {
    const RESERVED: [&str; 5] = ["mirror", "raidz", "draid", "spare", "log"];
    let name = &request.pool;
    let good = name.len() <= 200
        && name.starts_with(|c: char| c.is_ascii_alphabetic())
        && name
            .chars()
            .all(|c| c.is_ascii_alphanumeric() || "_-.".contains(c))
        && !RESERVED.iter().any(|word| name.starts_with(word));
    if !good {
        return Err(ZpoolError::Name(name.clone()));
    }
    for (index, (device, _)) in request.devices.iter().enumerate() {
        let refuse = |reason: &str| {
            Err(ZpoolError::Device {
                path: device.path.clone(),
                reason: reason.to_owned(),
            })
        };
        if device.size_bytes < 64 << 20 {
            return refuse("is smaller than 64 MiB, the least that ZFS takes");
        }
        if !device.path.starts_with('/') {
            return refuse("must be a path that begins with '/'");
        }
        if request.devices[..index]
            .iter()
            .any(|(other, _)| other.path == device.path)
        {
            return refuse("is given twice");
        }
    }
    Ok(())
}
