//! Firecracker under its jailer: a user of the VM's own, in a file system of a few files, with its own
//! mounts and processes, and limits of what it may use of the host.
//!
//! The jailer needs root, and drops it before Firecracker begins. It closes all descriptors, so that a
//! jailed Firecracker has its files by name (`place.rs`). A change of user takes the death signal of a
//! process back, so the VM's processes get a PID namespace whose first one is the owner's: with that,
//! the kernel ends them all (see [`Jail::init`]).

use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use fcvm_process::HelperCommand;
use rustix::event::{PollFd, PollFlags, Timespec};

use super::launch::{API_NAME, ROLE};
use crate::spec::HardwareSpec;

/// Where control groups are, cgroups(7).
const CGROUPS: &str = "/sys/fs/cgroup";
/// The group that holds those of VMs.
const PARENT: &str = "fcvm";
/// What Firecracker itself needs of memory, and the host's cache of what it reads and writes.
const OWN_MEMORY_BYTES: u64 = 128 << 20;
/// Threads beside the processors'.
const OWN_THREADS: u32 = 16;
/// Period of a limit of processor time, microseconds.
const PERIOD_US: u32 = 100_000;
/// How long a group may take to become empty once its processes were killed.
const EMPTY_LIMIT: Timespec = Timespec {
    tv_sec: 5,
    tv_nsec: 0,
};

/// How a VM is jailed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Jail {
    /// The jailer's program.
    pub jailer: PathBuf,
    /// The VM's name in the host's control groups and below the directory of jails: at most 64 letters,
    /// digits and '-'.
    pub id: String,
    /// The user that Firecracker runs as: no other process's.
    pub user: u32,
    /// The group, which may read the files that VMs share. All VMs have the same.
    pub group: u32,
    /// The directory of the VM's disks: one that cannot be linked into the jail has a name there for a moment.
    pub disks: PathBuf,
    /// A program and its first arguments that runs the command of its further ones and ends when that has
    /// ended, with the same exit status. It is the first process of the VM's PID namespace.
    pub init: (PathBuf, Vec<OsString>),
}

impl Jail {
    /// Looks for the jailer of a Firecracker: beside it, as it is released, else in the directories of
    /// `search_path`.
    pub fn find_jailer(firecracker: &Path, search_path: &str) -> Option<PathBuf> {
        let real = fs::canonicalize(firecracker).ok()?;
        let beside = real.parent().map(Path::to_owned);
        beside
            .into_iter()
            .chain(std::env::split_paths(search_path).filter(|path| path.is_absolute()))
            .map(|directory| directory.join("jailer"))
            .find(|path| crate::program::is_program(path))
    }

    /// The name by which a disk of another file system comes into the jail.
    pub(super) fn passage(&self) -> PathBuf {
        self.disks.join(format!("jail-{}", self.id))
    }

    /// The VM's control group.
    pub(super) fn cgroup(&self) -> PathBuf {
        Path::new(CGROUPS).join(PARENT).join(&self.id)
    }

    /// The command that runs `program` jailed below `base`.
    pub(super) fn command(
        &self,
        program: &Path,
        base: &Path,
        hardware: &HardwareSpec,
        network: Option<&OwnedFd>,
    ) -> HelperCommand {
        let (init, arguments) = &self.init;
        let mut command = HelperCommand::new(ROLE, init);
        command.args(arguments).arg(&self.jailer);
        command.args(["--id", &self.id, "--exec-file"]).arg(program);
        command.args(["--uid", &self.user.to_string()]);
        command.args(["--gid", &self.group.to_string()]);
        command.arg("--chroot-base-dir").arg(base);
        if let Some(network) = network {
            // The jailer closes what it inherits.
            let path = format!("/proc/{}/fd/{}", std::process::id(), network.as_raw_fd());
            command.args(["--netns", &path]);
        }
        let there = fs::read_to_string(Path::new(CGROUPS).join("cgroup.controllers"));
        let limits = limits(hardware, &there.unwrap_or_default());
        if !limits.is_empty() {
            command.args(["--cgroup-version", "2", "--parent-cgroup", PARENT]);
        }
        for limit in limits {
            command.args(["--cgroup", &limit]);
        }
        // What it logs goes where the console goes, and is warned of each port that the guest asks in vain.
        command.args(["--", "--api-sock", API_NAME, "--level", "Error"]);
        command.new_pid_namespace();
        command
    }
}

/// The limits of a VM, as far as the host has the controllers for them.
fn limits(hardware: &HardwareSpec, controllers: &str) -> Vec<String> {
    let memory_bytes = hardware.memory.size().bytes() + OWN_MEMORY_BYTES;
    let time_us = (hardware.cpu_count + 1) * PERIOD_US;
    [
        ("memory", format!("memory.max={memory_bytes}")),
        (
            "pids",
            format!("pids.max={}", hardware.cpu_count + OWN_THREADS),
        ),
        ("cpu", format!("cpu.max={time_us} {PERIOD_US}")),
    ]
    .into_iter()
    .filter(|(controller, _)| controllers.split_whitespace().any(|one| one == *controller))
    .map(|(_, limit)| limit)
    .collect()
}

/// Removes a VM's control group, whose processes have been killed; nothing happens where there is none.
///
/// # Errors
///
/// It still has processes after some seconds.
pub fn remove_cgroup(path: &Path) -> io::Result<()> {
    if let Ok(events) = fs::File::open(path.join("cgroup.events")) {
        // Each change of the file ends a wait; the limit ends all.
        while is_populated(&events) {
            let mut changed = [PollFd::new(&events, PollFlags::PRI)];
            if rustix::event::poll(&mut changed, Some(&EMPTY_LIMIT))? == 0 {
                break;
            }
        }
    }
    match fs::remove_dir(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// Whether a path is that of a control group.
pub fn is_cgroup(path: &Path) -> bool {
    path.starts_with(CGROUPS)
}

fn is_populated(events: &fs::File) -> bool {
    use std::os::unix::fs::FileExt as _;
    let mut text = [0; 256];
    let count = events.read_at(&mut text, 0).unwrap_or(0);
    String::from_utf8_lossy(&text[..count])
        .lines()
        .any(|line| line == "populated 1")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spec::{Accelerator, GuestMemory};
    use fcvm_types::ByteSize;

    #[test]
    fn limits_are_those_that_the_host_can_keep() {
        let hardware = HardwareSpec {
            cpu_count: 2,
            memory: GuestMemory::new(ByteSize::from_mib(512)).unwrap(),
            disks: Vec::new(),
            network: None,
            accelerator: Accelerator::Kvm,
            translation_cache: ByteSize::from_mib(1),
            console: fs::File::open("/dev/null").unwrap().into(),
        };
        assert_eq!(
            limits(&hardware, "cpuset cpu io memory pids\n"),
            [
                "memory.max=671088640",
                "pids.max=18",
                "cpu.max=300000 100000"
            ]
        );
        assert_eq!(limits(&hardware, "cpuset pids"), ["pids.max=18"]);
        assert!(limits(&hardware, "").is_empty());
    }

    #[test]
    fn a_group_that_is_gone_is_no_error() {
        remove_cgroup(Path::new("/sys/fs/cgroup/fcvm/none")).unwrap();
        assert!(is_cgroup(Path::new("/sys/fs/cgroup/fcvm/none")));
        assert!(!is_cgroup(Path::new("/srv")));
    }
}
