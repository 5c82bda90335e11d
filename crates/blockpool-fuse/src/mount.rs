//! Mounting and unmounting as an ordinary user, through fusermount3.
//!
//! The kernel lets nobody else than who mounted into a mount, not even root. One of root's is as other file systems:
//! modes and owners say who may do what.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::process::{Command, Stdio};

use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SocketFlags, SocketType,
};

use crate::error::MountError;

/// Mounts on `directory` and returns the kernel's side: what is done below the directory waits until [`crate::serve`] answers there.
/// `helper` is the program fusermount3, `source` what mount tables show.
///
/// # Errors
///
/// The helper is missing or refused.
pub fn mount(helper: &Path, source: &str, directory: &Path) -> Result<OwnedFd, MountError> {
    let failed = |source: rustix::io::Errno| MountError::Device {
        action: "talk to fusermount3",
        source: source.into(),
    };
    let (own, given) = rustix::net::socketpair(
        AddressFamily::UNIX,
        SocketType::STREAM,
        SocketFlags::CLOEXEC,
        None,
    )
    .map_err(failed)?;
    // A comma would begin another option.
    let source = source.replace('\\', "\\\\").replace(',', "\\,");
    let others = if rustix::process::geteuid().is_root() {
        "allow_other,"
    } else {
        ""
    };
    let options =
        format!("rw,nosuid,nodev,default_permissions,{others}subtype=fcvm-pool,fsname={source}");
    let child = Command::new(helper)
        .args(["-o", &options, "--"])
        .arg(directory)
        .env("_FUSE_COMMFD", "0")
        .stdin(Stdio::from(given))
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn();
    let child = child.map_err(|source| MountError::Helper { source })?;
    let received = receive(&own);
    let output = child
        .wait_with_output()
        .map_err(|source| MountError::Helper { source })?;
    match received {
        Ok(Some(device)) if output.status.success() => Ok(device),
        _ => Err(refused("mount on", directory, &output.stderr)),
    }
}

/// Ends the mount, which nobody may use. With `lazily` it is taken from the directory at once, and ends with its last user.
///
/// # Errors
///
/// It is in use, or nothing of this user's is mounted there.
pub fn unmount(helper: &Path, directory: &Path, lazily: bool) -> Result<(), MountError> {
    let mut command = Command::new(helper);
    command.arg("-u");
    if lazily {
        command.arg("-z");
    }
    let output = command
        .arg("--")
        .arg(directory)
        .stdin(Stdio::null())
        .output()
        .map_err(|source| MountError::Helper { source })?;
    if output.status.success() {
        return Ok(());
    }
    Err(refused("unmount", directory, &output.stderr))
}

fn refused(action: &'static str, directory: &Path, said: &[u8]) -> MountError {
    let said = String::from_utf8_lossy(said);
    let reason = said.lines().next().unwrap_or("fusermount3 failed");
    let reason = reason
        .rsplit_once("fusermount3: ")
        .map_or(reason, |(_, rest)| rest);
    MountError::Refused {
        action,
        directory: directory.to_owned(),
        reason: reason.chars().filter(|c| !c.is_control()).collect(),
    }
}

/// The descriptor that the helper sends with one byte.
fn receive(socket: impl AsFd) -> io::Result<Option<OwnedFd>> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let mut byte = [0];
    let mut parts = [io::IoSliceMut::new(&mut byte)];
    rustix::net::recvmsg(socket, &mut parts, &mut ancillary, RecvFlags::CMSG_CLOEXEC)?;
    let device = ancillary.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut descriptors) => descriptors.next(),
        _ => None,
    });
    Ok(device)
}
