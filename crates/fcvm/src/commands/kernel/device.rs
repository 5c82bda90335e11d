//! What the running machine says of a block device or a file: its facts, and whether anything stands on it.
//! What cannot be found out counts as data.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Context as _;
use fcvm_kernel::zpool::{Device, Use};
use rustix::fs::{OFlags, major, minor};

const BY_ID: &str = "/dev/disk/by-id";
/// How much is looked at, at both ends, for content that no program knows by name.
const PEEK_BYTES: u64 = 1 << 20;

/// Describes a device.
pub(crate) fn describe(path: &Path) -> anyhow::Result<Device> {
    let real = fs::canonicalize(path).with_context(|| format!("cannot use {}", path.display()))?;
    let text = real
        .to_str()
        .with_context(|| format!("{} is no UTF-8", real.display()))?
        .to_owned();
    let metadata = fs::metadata(&real).with_context(|| format!("cannot read {text}"))?;
    let mut device = if metadata.is_file() {
        Device {
            stable_path: text.clone(),
            path: text,
            size_bytes: metadata.len(),
            physical_block_bytes: 4096,
            rotational: false,
            model: String::new(),
            uses: backed_loop_devices(&real),
        }
    } else if metadata.file_type().is_block_device() {
        block_device(text, metadata.rdev())?
    } else {
        anyhow::bail!("{text} is neither a block device nor a file");
    };
    device.uses.extend(content(&real, device.size_bytes));
    for found in &mut device.uses {
        found.path.clone_from(&device.path);
    }
    Ok(device)
}

fn found(what: impl Into<String>, active: bool) -> Use {
    Use {
        path: String::new(),
        what: what.into(),
        active,
    }
}

fn block_device(path: String, number: u64) -> anyhow::Result<Device> {
    let link = PathBuf::from(format!(
        "/sys/dev/block/{}:{}",
        major(number),
        minor(number)
    ));
    let own = fs::canonicalize(&link).with_context(|| format!("cannot read {}", link.display()))?;
    let disk = if own.join("partition").exists() {
        own.parent().unwrap_or(&own).to_owned()
    } else {
        own.clone()
    };
    let read = |file: PathBuf| {
        fs::read_to_string(file)
            .unwrap_or_default()
            .trim()
            .to_owned()
    };
    let number_in = |file: PathBuf, default: u64| read(file).parse().unwrap_or(default);
    let mut uses = uses_of(&own, &path);
    for partition in partitions(&own) {
        let name = partition
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        let deeper = uses_of(&partition, &format!("/dev/{name}"));
        uses.push(found(format!("partition {name}"), false));
        uses.extend(deeper);
    }
    if uses.iter().all(|one| !one.active) && is_held(Path::new(&path)) {
        uses.push(found("another program or device has it open", true));
    }
    Ok(Device {
        stable_path: stable_path(Path::new(&path)).unwrap_or_else(|| path.clone()),
        path,
        size_bytes: number_in(own.join("size"), 0).saturating_mul(512),
        physical_block_bytes: number_in(disk.join("queue/physical_block_size"), 4096),
        rotational: read(disk.join("queue/rotational")) == "1",
        model: read(disk.join("device/model")),
        uses,
    })
}

fn entries(directory: &Path) -> Vec<PathBuf> {
    let mut entries: Vec<PathBuf> = fs::read_dir(directory)
        .into_iter()
        .flatten()
        .filter_map(|entry| Some(entry.ok()?.path()))
        .collect();
    entries.sort();
    entries
}

fn partitions(own: &Path) -> Vec<PathBuf> {
    let mut partitions = entries(own);
    partitions.retain(|path| path.join("partition").exists());
    partitions
}

/// Mounts, swap and devices on top of this one.
fn uses_of(sysfs: &Path, path: &str) -> Vec<Use> {
    let number = fs::read_to_string(sysfs.join("dev")).unwrap_or_default();
    let number = number.trim();
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let mut uses: Vec<Use> = mounts
        .lines()
        .filter_map(|line| {
            let fields: Vec<&str> = line.split(' ').collect();
            let source = fields
                .iter()
                .position(|field| *field == "-")
                .map(|at| at + 2);
            let source = source.and_then(|at| fields.get(at)).copied();
            let same = fields.get(2) == Some(&number)
                || source.is_some_and(|source| is_path(source, path));
            same.then(|| {
                found(
                    format!("mounted at {}", fields.get(4).unwrap_or(&"?")),
                    true,
                )
            })
        })
        .collect();
    // One mount tells as much as all of them.
    uses.truncate(1);
    let swaps = fs::read_to_string("/proc/swaps").unwrap_or_default();
    let mut names = swaps
        .lines()
        .skip(1)
        .filter_map(|line| line.split_whitespace().next());
    if names.any(|name| is_path(name, path)) {
        uses.push(found("swap", true));
    }
    uses.extend(entries(&sysfs.join("holders")).iter().map(|holder| {
        let name = holder.file_name().unwrap_or_default().to_string_lossy();
        found(format!("part of {name}"), true)
    }));
    uses
}

fn is_path(one: &str, other: &str) -> bool {
    one.starts_with('/')
        && (one == other
            || fs::canonicalize(one).is_ok_and(|real| real.as_os_str() == OsStr::new(other)))
}

/// The kernel lends a block device exclusively once: file systems, RAID and ZFS hold theirs so.
fn is_held(path: &Path) -> bool {
    let open = File::options()
        .read(true)
        .custom_flags(OFlags::EXCL.bits().cast_signed())
        .open(path);
    open.is_err_and(|error| error.raw_os_error() == Some(rustix::io::Errno::BUSY.raw_os_error()))
}

fn backed_loop_devices(file: &Path) -> Vec<Use> {
    entries(Path::new("/sys/block"))
        .iter()
        .filter(|device| {
            fs::read_to_string(device.join("loop/backing_file"))
                .is_ok_and(|backing| Path::new(backing.trim_end()) == file)
        })
        .map(|device| {
            let name = device.file_name().unwrap_or_default().to_string_lossy();
            found(format!("it is what {name} reads"), true)
        })
        .collect()
}

/// A name that stays the same after a reboot; those made of the model and serial number before the others.
fn stable_path(real: &Path) -> Option<String> {
    let mut names: Vec<String> = entries(Path::new(BY_ID))
        .iter()
        .filter(|link| fs::canonicalize(link).is_ok_and(|target| target == real))
        .filter_map(|link| Some(link.to_str()?.to_owned()))
        .collect();
    let generic = |name: &String| {
        name.starts_with(&format!("{BY_ID}/wwn-")) || name.starts_with(&format!("{BY_ID}/nvme-eui"))
    };
    names.sort_by_key(|name| (generic(name), name.clone()));
    names.into_iter().next()
}

/// What is written on it: signatures that blkid knows, else anything but zeros.
fn content(path: &Path, size_bytes: u64) -> Vec<Use> {
    let uses = signatures(path);
    if !uses.is_empty() {
        return uses;
    }
    match is_blank(path, size_bytes) {
        Ok(true) => Vec::new(),
        Ok(false) => vec![found("content of an unknown kind", false)],
        Err(error) => vec![found(format!("it cannot be read: {error}"), false)],
    }
}

fn signatures(path: &Path) -> Vec<Use> {
    // 2: nothing found; 8: several that contradict each other.
    let output = Command::new("blkid")
        .args(["--probe", "--output", "export"])
        .arg(path)
        .env("PATH", search_path())
        .output();
    let output = match output {
        Ok(output) => output,
        Err(error) => {
            return vec![found(
                format!("unknown, as blkid cannot be started: {error}"),
                false,
            )];
        }
    };
    let text = String::from_utf8_lossy(&output.stdout);
    let mut uses: Vec<Use> = text
        .lines()
        .filter_map(|line| match line.split_once('=')? {
            ("TYPE", kind) => Some(found(kind, false)),
            ("PTTYPE", kind) => Some(found(format!("partition table {kind}"), false)),
            _ => None,
        })
        .collect();
    if uses.is_empty() && output.status.code() != Some(2) {
        uses.push(found("signatures that contradict each other", false));
    }
    uses
}

/// Administrators' programs are not on the path of ordinary users.
pub(crate) fn search_path() -> String {
    let own = std::env::var("PATH").unwrap_or_default();
    format!("{own}:/usr/sbin:/sbin")
}

fn is_blank(path: &Path, size_bytes: u64) -> io::Result<bool> {
    let mut file = File::open(path)?;
    for offset in [0, size_bytes.saturating_sub(PEEK_BYTES)] {
        file.seek(SeekFrom::Start(offset))?;
        let mut bytes = Vec::new();
        (&file).take(PEEK_BYTES).read_to_end(&mut bytes)?;
        if bytes.iter().any(|byte| *byte != 0) {
            return Ok(false);
        }
    }
    Ok(true)
}
