//! What is needed before the host can be spoken to: kernel file systems, modules, the agent's own
//! root directory.

use std::ffi::CStr;
use std::fs::File;

use fcvm_wire::Failure;
use rustix::fs::Mode;
use rustix::io::Errno;
use rustix::mount::{MountFlags, mount, mount_move};
use rustix::process::{DumpableBehavior, Resource, Rlimit, set_dumpable_behavior, setrlimit};

use crate::console;
use crate::failure::{Context, reason};

/// Where the agent's own root is assembled before it becomes "/".
const BASE: &str = "/base";
/// Descriptors that the agent may have open.
const MAX_DESCRIPTORS: u64 = 4096;
/// Directories of the agent's own root.
const DIRECTORIES: [&str; 8] = [
    "proc",
    "sys",
    "dev",
    "cgroup",
    "files",
    "image",
    "scratch",
    "container",
];
/// Restricts what the containers' own files (hosts, resolv.conf, ...) and a read-only container's mount
/// points can take of the guest's memory.
const BASE_OPTIONS: &CStr = c"mode=755,size=4m";

/// Makes the agent safe from being looked into and from being chosen when memory runs out.
pub(crate) fn harden() {
    // A process that the agent starts shares its memory until it executes the workload's program;
    // processes of the container must not be able to attach to it in that time.
    let _ = set_dumpable_behavior(DumpableBehavior::NotDumpable);
    let _ = std::fs::write("/proc/self/oom_score_adj", "-1000");
    // Each of the streams takes up to four descriptors.
    let limit = Rlimit {
        current: Some(MAX_DESCRIPTORS),
        maximum: Some(MAX_DESCRIPTORS),
    };
    let _ = setrlimit(Resource::Nofile, limit);
}

/// Mounts the kernel's file systems in a root of the agent's own and makes that "/".
///
/// The initramfs itself cannot be left by pivot_root(2), but a tmpfs on top of it can; so the
/// container's namespace will hold nothing of the agent's.
pub(crate) fn make_root() -> Result<(), Failure> {
    make_directory(BASE)?;
    mount(
        "tmpfs",
        BASE,
        "tmpfs",
        MountFlags::NOSUID | MountFlags::NODEV,
        BASE_OPTIONS,
    )
    .context("mounting a tmpfs")?;
    rustix::process::chdir(BASE).context("entering the agent's root")?;
    for directory in DIRECTORIES {
        make_directory(directory)?;
    }
    let closed = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    mount("proc", "proc", "proc", closed, None).context("mounting /proc")?;
    mount("sysfs", "sys", "sysfs", closed, None).context("mounting /sys")?;
    let devices = MountFlags::NOSUID | MountFlags::NOEXEC;
    mount("devtmpfs", "dev", "devtmpfs", devices, None).context("mounting /dev")?;
    Ok(())
}

/// Enters the root that [`make_root`] assembled; the initramfs is out of sight from then on.
pub(crate) fn enter_root() -> Result<(), Failure> {
    mount_move(BASE, "/").context("moving the agent's root")?;
    rustix::process::chroot(".").context("entering the agent's root")
}

fn make_directory(path: &str) -> Result<(), Failure> {
    match rustix::fs::mkdir(path, Mode::from_raw_mode(0o755)) {
        Ok(()) | Err(Errno::EXIST) => Ok(()),
        Err(errno) => Err(errno).context(&format!("making the directory {path}")),
    }
}

/// Loads the modules named in /modules/list, in its order, and frees their memory in the
/// initramfs. A module that does not load is told on the console; what needs it fails later.
pub(crate) fn load_modules() {
    let Ok(list) = std::fs::read_to_string("/modules/list") else {
        return;
    };
    for name in list.lines().map(str::trim).filter(|name| !name.is_empty()) {
        let path = format!("/modules/{name}");
        let loaded = File::open(&path)
            .map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::IO))
            .and_then(|file| rustix::system::finit_module(&file, c"", 0));
        match loaded {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(errno) => console::line(&format!(
                "the kernel module {name} cannot be loaded: {}",
                reason(errno)
            )),
        }
        let _ = std::fs::remove_file(&path);
    }
}
