//! The container's root directory as the agent's namespace has it: root image, writable layer, and
//! the overlay of both.

use std::ffi::CString;

use fcvm_types::guest::{ROOT_DISK_SERIAL, SCRATCH_DISK_SERIAL};
use fcvm_wire::Failure;
use rustix::fs::Mode;
use rustix::io::Errno;
use rustix::mount::{MountFlags, UnmountFlags, mount, mount_remount, unmount};

use crate::devices::find_disk;
use crate::failure::{Context, guest};

/// Where the overlay is mounted.
pub(crate) const CONTAINER: &str = "/container";
const IMAGE: &str = "/image";
const SCRATCH: &str = "/scratch";
/// Upper directory of a read-only container: it receives mount points only.
const MOUNT_POINTS: &str = "/files/root";

/// Mounts the disks and the overlay.
///
/// No device node works on any of them, neither the image's own nor one that a container with
/// CAP_MKNOD makes: the agent's port and the disks stay out of reach.
pub(crate) fn mount_container(read_only: bool) -> Result<(), Failure> {
    let image = find_disk(ROOT_DISK_SERIAL)?;
    let flags = MountFlags::RDONLY | MountFlags::NODEV;
    mount(&image, IMAGE, "erofs", flags, None).context("mounting the root image")?;
    let layer = if read_only {
        MOUNT_POINTS
    } else {
        let scratch = find_disk(SCRATCH_DISK_SERIAL)?;
        let flags = MountFlags::NODEV | MountFlags::NOATIME;
        mount(&scratch, SCRATCH, "ext4", flags, None).context("mounting the writable layer")?;
        SCRATCH
    };
    let (upper, work) = (format!("{layer}/upper"), format!("{layer}/work"));
    make_directory(layer)?;
    make_directory(&work)?;
    make_upper(&upper)?;
    // Directories of the image can be renamed, as on an ordinary file system.
    let options =
        format!("lowerdir={IMAGE},upperdir={upper},workdir={work},redirect_dir=on,index=off");
    let options = CString::new(options).map_err(|_| guest("the overlay's options hold a zero"))?;
    let flags = MountFlags::NODEV | MountFlags::NOATIME;
    mount("overlay", CONTAINER, "overlay", flags, options.as_c_str())
        .context("mounting the container's root")
}

/// The container's "/" has the owner and the mode of this directory, so they are the image's.
fn make_upper(path: &str) -> Result<(), Failure> {
    let image = rustix::fs::stat(IMAGE).context("reading the root image")?;
    match rustix::fs::mkdir(path, Mode::from_raw_mode(0o755)) {
        Ok(()) => {}
        Err(Errno::EXIST) => return Ok(()),
        Err(errno) => return Err(errno).context("making the writable layer"),
    }
    if (image.st_uid, image.st_gid) != (0, 0) {
        let owner = rustix::fs::Uid::from_raw(image.st_uid);
        let group = rustix::fs::Gid::from_raw(image.st_gid);
        rustix::fs::chown(path, Some(owner), Some(group)).context("making the writable layer")?;
    }
    if image.st_mode & 0o7777 != 0o755 {
        let mode = Mode::from_raw_mode(image.st_mode & 0o7777);
        rustix::fs::chmod(path, mode).context("making the writable layer")?;
    }
    Ok(())
}

fn make_directory(path: &str) -> Result<(), Failure> {
    match rustix::fs::mkdir(path, Mode::from_raw_mode(0o755)) {
        Ok(()) | Err(Errno::EXIST) => Ok(()),
        Err(errno) => Err(errno).context("making the writable layer"),
    }
}

/// Writes everything back and leaves the writable layer unmounted, or read-only where something
/// still uses it. Gives what could not be done.
pub(crate) fn release() -> Result<(), Failure> {
    rustix::fs::sync();
    for path in [CONTAINER, SCRATCH] {
        match unmount(path, UnmountFlags::empty()) {
            // EINVAL: nothing is mounted there.
            Ok(()) | Err(Errno::INVAL) => {}
            Err(_) if path == CONTAINER => {
                let _ = unmount(path, UnmountFlags::DETACH);
            }
            Err(_) => mount_remount(path, MountFlags::RDONLY, c"")
                .context("unmounting the writable layer")?,
        }
    }
    Ok(())
}
