//! Mounting a file for another process alone.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::path::Path;

use fcvm_types::record::ProcessIdentity;
use rustix::fs::{CWD, Mode, OFlags};
use rustix::mount::{MoveMountFlags, OpenTreeFlags};
use rustix::thread::{LinkNameSpaceType, UnshareFlags};

/// Mounts `file` over the file `place`, a path in the working directory of a process, in the mount namespace of that
/// process. The mount ends with the namespace, and the file may lose its name as soon as it is mounted. Needs root, and a
/// process that has a namespace of its own: in this one's everybody would see the mount.
///
/// # Errors
///
/// One of the files is not there, the process has ended or is in this one's namespace, or the kernel refuses.
pub fn mount_for(process: ProcessIdentity, file: &Path, place: &Path) -> io::Result<()> {
    let tree = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    let tree = rustix::mount::open_tree(CWD, file, tree)?;
    let of_process = |name: &str| format!("/proc/{}/{name}", process.pid);
    let place = rustix::fs::open(
        Path::new(&of_process("cwd")).join(place),
        OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC,
        Mode::empty(),
    )?;
    let namespace = File::open(of_process("ns/mnt"))?;
    if is_one(&namespace, &File::open("/proc/self/ns/mnt")?)? {
        return Err(io::Error::other("it has no mounts of its own"));
    }
    let mount = || {
        // SAFETY: this flag gives the thread its own root and working directory, which entering a namespace
        // needs, and changes nothing of descriptors.
        unsafe { rustix::thread::unshare_unsafe(UnshareFlags::FS) }?;
        let kind = Some(LinkNameSpaceType::Mount);
        rustix::thread::move_into_link_name_space(namespace.as_fd(), kind)?;
        let empty =
            MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
        Ok(rustix::mount::move_mount(&tree, "", &place, "", empty)?)
    };
    // A thread of its own: the namespace that it enters ends with it.
    let ended = std::thread::scope(|scope| scope.spawn(mount).join());
    ended.unwrap_or_else(|_| Err(io::Error::other("the thread that mounts panicked")))
}

fn is_one(one: &File, other: &File) -> io::Result<bool> {
    use std::os::unix::fs::MetadataExt as _;
    let (one, other) = (one.metadata()?, other.metadata()?);
    Ok((one.dev(), one.ino()) == (other.dev(), other.ino()))
}
