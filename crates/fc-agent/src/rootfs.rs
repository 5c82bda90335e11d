//! The container's own mount namespace, from inside: its root, the kernel's file systems, devices,
//! the VM's files, and what of /proc and /sys is hidden or read-only.
//!
//! Runs in the first process of the container, in its new namespaces, before the workload. Every path
//! is resolved after the container's root has become "/", so no link of the image leads out of it.

use std::ffi::CStr;
use std::os::fd::OwnedFd;

use fcvm_wire::Failure;
use rustix::fs::{AtFlags, CWD, Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::{
    MountFlags, MoveMountFlags, OpenTreeFlags, UnmountFlags, mount, mount_bind, mount_remount,
    move_mount, open_tree, unmount,
};

use crate::disks::CONTAINER;
use crate::failure::{Context, guest};
use crate::files;

/// How the container's root is to be.
pub(crate) struct RootOptions {
    /// The root cannot be written to; some directories are a tmpfs.
    pub(crate) read_only: bool,
    /// Nothing is hidden or read-only, and device nodes may be made.
    pub(crate) privileged: bool,
    /// The container's instance of devpts, not mounted anywhere yet.
    pub(crate) terminals: OwnedFd,
    /// Name in it of the first process's terminal: `0`, ...
    pub(crate) console: Option<String>,
}

const DEVICES: [&str; 6] = ["null", "zero", "full", "random", "urandom", "tty"];
const DEVICE_LINKS: [(&str, &CStr); 6] = [
    ("/proc/self/fd", c"/dev/fd"),
    ("/proc/self/fd/0", c"/dev/stdin"),
    ("/proc/self/fd/1", c"/dev/stdout"),
    ("/proc/self/fd/2", c"/dev/stderr"),
    ("/proc/kcore", c"/dev/core"),
    ("pts/ptmx", c"/dev/ptmx"),
];
/// Podman's defaults (containers/common, pkg/config and runtime-tools).
const MASKED: [&str; 12] = [
    "/proc/acpi",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/sys/firmware",
    "/sys/fs/selinux",
    "/sys/dev/block",
    "/sys/devices/virtual/powercap",
];
const READ_ONLY: [&str; 6] = [
    "/proc/asound",
    "/proc/bus",
    "/proc/fs",
    "/proc/irq",
    "/proc/sys",
    "/proc/sysrq-trigger",
];
/// Writable directories of a read-only container.
const VOLATILE: [(&str, &CStr); 3] = [
    ("/run", c"mode=755"),
    ("/tmp", c"mode=1777"),
    ("/var/tmp", c"mode=1777"),
];

fn closed() -> MountFlags {
    MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC
}

/// Makes the container's root this process's "/" and fills it.
pub(crate) fn enter(options: &RootOptions) -> Result<(), Failure> {
    let devices = DEVICES
        .iter()
        .map(|name| clone_mount(&format!("/dev/{name}")))
        .collect::<Result<Vec<_>, _>>()
        .context("taking the devices")?;
    let files: Vec<_> = files::FILES
        .iter()
        .filter_map(|(name, target)| {
            let tree = clone_mount(&format!("{}/{name}", files::DIRECTORY)).ok()?;
            Some((tree, *target))
        })
        .collect();
    pivot()?;
    mount_kernel_file_systems(options)?;
    mount_devices(options, devices)?;
    for (tree, target) in &files {
        attach_file(tree, target)?;
    }
    if !options.privileged {
        hide_paths()?;
    }
    if options.read_only {
        for (target, data) in VOLATILE {
            mount_on("tmpfs", target, "tmpfs", volatile_flags(), Some(data))?;
        }
        let flags = MountFlags::BIND | MountFlags::RDONLY | MountFlags::NODEV | MountFlags::NOATIME;
        mount_remount("/", flags, c"").context("making the root read-only")?;
    }
    Ok(())
}

fn volatile_flags() -> MountFlags {
    MountFlags::NOSUID | MountFlags::NODEV
}

/// A mount of its own of one file, not attached yet.
fn clone_mount(path: &str) -> Result<OwnedFd, Errno> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    open_tree(CWD, path, flags)
}

fn attach(tree: &OwnedFd, target: &str) -> Result<(), Errno> {
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_SYMLINKS;
    move_mount(tree, "", CWD, target, flags)
}

/// Enters the container's root and drops everything of the agent's from this namespace.
fn pivot() -> Result<(), Failure> {
    rustix::process::chdir(CONTAINER).context("entering the container's root")?;
    // The old root is put on top of the new one and then taken away (pivot_root(2), Notes).
    rustix::process::pivot_root(".", ".").context("entering the container's root")?;
    unmount(".", UnmountFlags::DETACH).context("leaving the agent's root")?;
    rustix::process::chdir("/").context("entering the container's root")
}

/// Mounts on a directory, which is made where it does not exist.
fn mount_on(
    source: &str,
    target: &str,
    kind: &str,
    flags: MountFlags,
    data: Option<&CStr>,
) -> Result<(), Failure> {
    let mounted = match mount(source, target, kind, flags, data) {
        Err(Errno::NOENT) => {
            make_directories(target).context(&format!("making the directory {target}"))?;
            mount(source, target, kind, flags, data)
        }
        result => result,
    };
    mounted.context(&format!("mounting {target}"))
}

/// Makes a directory and those above it.
pub(crate) fn make_directories(path: &str) -> Result<(), Errno> {
    std::fs::create_dir_all(path).map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::IO))
}

fn mount_kernel_file_systems(options: &RootOptions) -> Result<(), Failure> {
    let read_only = if options.privileged {
        MountFlags::empty()
    } else {
        MountFlags::RDONLY
    };
    mount_on("proc", "/proc", "proc", closed(), None)?;
    mount_on("sysfs", "/sys", "sysfs", closed() | read_only, None)?;
    let target = "/sys/fs/cgroup";
    mount_on("cgroup2", target, "cgroup2", closed() | read_only, None)
}

fn mount_devices(options: &RootOptions, devices: Vec<OwnedFd>) -> Result<(), Failure> {
    let mut flags = MountFlags::NOSUID | MountFlags::STRICTATIME;
    if !options.privileged {
        // The nodes below work because each is a mount of its own.
        flags |= MountFlags::NODEV;
    }
    mount_on(
        "tmpfs",
        "/dev",
        "tmpfs",
        flags,
        Some(c"mode=755,size=65536k"),
    )?;
    for (name, tree) in DEVICES.iter().zip(&devices) {
        let target = format!("/dev/{name}");
        make_file(&target).context("filling /dev")?;
        attach(tree, &target).context("filling /dev")?;
    }
    for (target, link) in DEVICE_LINKS {
        rustix::fs::symlink(target, link).context("filling /dev")?;
    }
    for directory in ["/dev/pts", "/dev/shm", "/dev/mqueue"] {
        rustix::fs::mkdir(directory, Mode::from_raw_mode(0o755)).context("filling /dev")?;
    }
    attach(&options.terminals, "/dev/pts").context("mounting /dev/pts")?;
    let data = Some(c"mode=1777,size=65536k");
    mount_on("shm", "/dev/shm", "tmpfs", closed(), data)?;
    mount_on("mqueue", "/dev/mqueue", "mqueue", closed(), None)?;
    if let Some(console) = &options.console {
        make_file("/dev/console").context("filling /dev")?;
        mount_bind(format!("/dev/pts/{console}"), "/dev/console")
            .context("mounting /dev/console")?;
    }
    Ok(())
}

fn make_file(path: &str) -> Result<(), Errno> {
    let flags = OFlags::CREATE | OFlags::WRONLY | OFlags::CLOEXEC | OFlags::NOCTTY;
    let mode = Mode::from_raw_mode(0o644);
    rustix::fs::open(path, flags | OFlags::NONBLOCK, mode).map(drop)
}

/// Puts one of the VM's files in its place. A link in the image that leads nowhere is replaced.
fn attach_file(tree: &OwnedFd, target: &str) -> Result<(), Failure> {
    let mut attached = attach(tree, target);
    if attached == Err(Errno::NOENT) {
        attached = make_directories("/etc").and_then(|()| {
            if make_file(target).is_err() {
                rustix::fs::unlink(target)?;
                make_file(target)?;
            }
            attach(tree, target)
        });
    }
    attached.context(&format!("mounting {target}"))
}

fn hide_paths() -> Result<(), Failure> {
    // One empty read-only directory serves for all that are hidden.
    let mut empty = None;
    for path in MASKED {
        let Ok(stat) = rustix::fs::statat(CWD, path, AtFlags::SYMLINK_NOFOLLOW) else {
            continue;
        };
        let what = format!("hiding {path}");
        if rustix::fs::FileType::from_raw_mode(stat.st_mode) != rustix::fs::FileType::Directory {
            mount_bind("/dev/null", path).context(&what)?;
        } else if let Some(first) = empty {
            mount_bind(first, path).context(&what)?;
        } else {
            let flags = closed() | MountFlags::RDONLY;
            mount("tmpfs", path, "tmpfs", flags, c"size=4k,nr_inodes=2").context(&what)?;
            empty = Some(path);
        }
    }
    for path in READ_ONLY {
        match mount_bind(path, path) {
            Ok(()) => {}
            Err(Errno::NOENT) => continue,
            Err(errno) => return Err(errno).context(&format!("protecting {path}")),
        }
        let flags = MountFlags::BIND | MountFlags::RDONLY | closed();
        mount_remount(path, flags, c"").context(&format!("protecting {path}"))?;
    }
    Ok(())
}

/// Makes the working directory where it is missing, and enters it.
pub(crate) fn enter_working_directory(path: &str) -> Result<(), Failure> {
    let path = if path.is_empty() { "/" } else { path };
    if !path.starts_with('/') {
        return Err(crate::failure::bad_request(format!(
            "the working directory '{path}' is not an absolute path"
        )));
    }
    let entered = match rustix::process::chdir(path) {
        Err(Errno::NOENT) => make_directories(path).and_then(|()| rustix::process::chdir(path)),
        result => result,
    };
    entered.map_err(|errno| {
        guest(format!(
            "the working directory '{path}' cannot be entered: {}",
            crate::failure::reason(errno)
        ))
    })
}
