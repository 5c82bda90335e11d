//! The child that makes namespaces and devices, and what it tells the owner of them.

use std::fs::{self, File};
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags,
};
use rustix::process::{getegid, geteuid};
use rustix::thread::UnshareFlags;
use tokio::io::unix::AsyncFd;

use super::{BRIDGE, BRIDGE_MAC, HYPERVISOR_TAP, MTU, OWN_TAP, raw};
use crate::error::NetworkError;

/// Where tap devices come from.
const TUN_DEVICE: &str = "/dev/net/tun";
/// The tap device's descriptor and at most two of namespaces.
const DESCRIPTORS_MAX: usize = 3;

/// What was being made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Stage {
    Namespace,
    Users,
    TunDevice,
    Tap,
    Bridge,
}

impl Stage {
    const ALL: [Self; 5] = [
        Self::Namespace,
        Self::Users,
        Self::TunDevice,
        Self::Tap,
        Self::Bridge,
    ];

    /// Why there is no tap device, in words.
    pub(crate) fn error(self, errno: Errno) -> NetworkError {
        let source = io::Error::from(errno);
        match (self, errno) {
            // The limit user.max_user_namespaces, which may be 0.
            (Self::Namespace, Errno::NOSPC | Errno::USERS | Errno::INVAL | Errno::NOSYS) => {
                NetworkError::NamespaceForbidden { source }
            }
            (Self::TunDevice, Errno::NOENT | Errno::NODEV | Errno::NXIO) => {
                NetworkError::NoTunDevice
            }
            (Self::TunDevice, Errno::ACCESS | Errno::PERM) => NetworkError::TunForbidden,
            // Some hosts let users make a namespace and give them nothing in it.
            (_, Errno::ACCESS | Errno::PERM) => NetworkError::NamespaceForbidden { source },
            (stage, _) => NetworkError::Tap {
                what: match stage {
                    Self::Namespace => "its namespace",
                    Self::Users => "the users of its namespace",
                    Self::TunDevice => TUN_DEVICE,
                    Self::Tap => "the device",
                    Self::Bridge => "its bridge (the kernel's module is 'bridge')",
                },
                source,
            },
        }
    }
}

/// Says early, without making anything, whether a VM could have a tap device with this passt behind it.
/// What only trying shows is not found.
///
/// # Errors
///
/// What [`attach`](crate::attach) would fail with.
pub fn check_tap(passt: Option<&Path>) -> Result<(), NetworkError> {
    if passt.is_none() {
        return Err(NetworkError::NoPasst);
    }
    open_tun()
        .at(Stage::TunDevice)
        .map_err(|(stage, errno)| stage.error(errno))?;
    if !is_passt_allowed() || !geteuid().is_root() && forbids(UBUNTUS) {
        return Err(Stage::Namespace.error(Errno::PERM));
    }
    Ok(())
}

/// Whether the host lets passt shut itself in a user namespace, without which it does not start. Root's passt does
/// so as nobody. Ubuntu's switch does not forbid it to programs that have a profile, as passt has.
pub fn is_passt_allowed() -> bool {
    !forbids(LIMIT) && !forbids(DEBIANS)
}

/// What forbids to make user namespaces, and its value then: the kernel's limit, which counts for root too.
const LIMIT: (&str, &str) = ("/proc/sys/user/max_user_namespaces", "0");
/// Debian's switch.
const DEBIANS: (&str, &str) = ("/proc/sys/kernel/unprivileged_userns_clone", "0");
/// Ubuntu's, which leaves the making and forbids all that they would be made for.
const UBUNTUS: (&str, &str) = (
    "/proc/sys/kernel/apparmor_restrict_unprivileged_userns",
    "1",
);

fn forbids((switch, value): (&str, &str)) -> bool {
    fs::read_to_string(switch).is_ok_and(|found| found.trim() == value)
}

fn open_tun() -> io::Result<File> {
    File::options().read(true).write(true).open(TUN_DEVICE)
}

/// Marks what failed with the stage that it belongs to.
trait At<T> {
    fn at(self, stage: Stage) -> Result<T, (Stage, Errno)>;
}

impl<T> At<T> for Result<T, Errno> {
    fn at(self, stage: Stage) -> Result<T, (Stage, Errno)> {
        self.map_err(|errno| (stage, errno))
    }
}

impl<T> At<T> for io::Result<T> {
    fn at(self, stage: Stage) -> Result<T, (Stage, Errno)> {
        self.map_err(|error| (stage, Errno::from_io_error(&error).unwrap_or(Errno::IO)))
    }
}

/// The child's whole work: makes a tap device in new namespaces and tells of it on `channel`. The process
/// must have one thread and is of no other use afterwards.
///
/// # Errors
///
/// Nobody listens on the channel any more.
pub fn make_tap(channel: impl AsFd) -> io::Result<()> {
    let report = match build() {
        Ok((namespaces, tap)) => Report::Made { namespaces, tap },
        Err((stage, errno)) => Report::Failed { stage, errno },
    };
    report.send(channel.as_fd())
}

fn build() -> Result<(Vec<OwnedFd>, OwnedFd), (Stage, Errno)> {
    // What is not there is told before what is forbidden.
    open_tun().at(Stage::TunDevice)?;
    let has_users = enter_namespaces()?;
    // No address of its own for any device, and no question to the guest.
    let _ = fs::write("/proc/sys/net/ipv6/conf/default/disable_ipv6", "1");
    let tap = open_tun().at(Stage::TunDevice)?;
    raw::make_tap(&tap, OWN_TAP).at(Stage::Tap)?;
    raw::take_offloads(&tap).at(Stage::Tap)?;
    rustix::io::ioctl_fionbio(&tap, true).at(Stage::Tap)?;
    let other = open_tun().at(Stage::TunDevice)?;
    raw::make_tap(&other, HYPERVISOR_TAP).at(Stage::Tap)?;
    raw::make_persistent(&other).at(Stage::Tap)?;
    let socket = raw::device_socket().at(Stage::Bridge)?;
    raw::make_bridge(&socket, BRIDGE).at(Stage::Bridge)?;
    for own in [BRIDGE, OWN_TAP] {
        raw::set_address(&socket, own, BRIDGE_MAC).at(Stage::Bridge)?;
    }
    for port in [OWN_TAP, HYPERVISOR_TAP] {
        raw::set_mtu(&socket, port, MTU).at(Stage::Tap)?;
        raw::add_to_bridge(&socket, BRIDGE, port).at(Stage::Bridge)?;
        raw::bring_up(&socket, port).at(Stage::Tap)?;
    }
    raw::bring_up(&socket, BRIDGE).at(Stage::Bridge)?;
    let kinds = if has_users {
        &["user", "net"][..]
    } else {
        &["net"]
    };
    let namespaces = kinds
        .iter()
        .map(|kind| File::open(format!("/proc/thread-self/ns/{kind}")).map(OwnedFd::from))
        .collect::<io::Result<_>>()
        .at(Stage::Namespace)?;
    Ok((namespaces, tap.into()))
}

/// Enters a network namespace, and a user namespace for that where this user may not without. Tells
/// whether it was one.
fn enter_namespaces() -> Result<bool, (Stage, Errno)> {
    match raw::unshare(UnshareFlags::NEWNET) {
        Ok(()) => return Ok(false),
        Err(Errno::PERM) => {}
        Err(errno) => return Err((Stage::Namespace, errno)),
    }
    // Each stays who they are, so that files and devices open as before.
    let (user, group) = (geteuid().as_raw(), getegid().as_raw());
    raw::unshare(UnshareFlags::NEWUSER | UnshareFlags::NEWNET).at(Stage::Namespace)?;
    // Groups can be mapped once nobody can leave one, user_namespaces(7).
    fs::write("/proc/self/setgroups", "deny").at(Stage::Users)?;
    fs::write("/proc/self/uid_map", format!("{user} {user} 1")).at(Stage::Users)?;
    fs::write("/proc/self/gid_map", format!("{group} {group} 1")).at(Stage::Users)?;
    Ok(true)
}

/// What the child tells: a stage and an errno, five bytes, or one byte and descriptors.
pub(crate) enum Report {
    /// The device is there.
    Made {
        /// A user namespace where one was needed, and the network namespace.
        namespaces: Vec<OwnedFd>,
        /// The owner's device.
        tap: OwnedFd,
    },
    /// It is not.
    Failed {
        /// What was being made.
        stage: Stage,
        /// Why not.
        errno: Errno,
    },
}

const MADE: u8 = 0xff;

impl Report {
    fn send(&self, channel: BorrowedFd<'_>) -> io::Result<()> {
        let mut bytes = vec![MADE];
        let mut descriptors = Vec::new();
        match self {
            Self::Made { namespaces, tap } => {
                descriptors.push(tap.as_fd());
                descriptors.extend(namespaces.iter().map(AsFd::as_fd));
            }
            Self::Failed { stage, errno } => {
                let stage = Stage::ALL.iter().position(|known| known == stage);
                bytes[0] = stage.and_then(|at| u8::try_from(at).ok()).unwrap_or(0);
                bytes.extend(errno.raw_os_error().to_ne_bytes());
            }
        }
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS_MAX))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !descriptors.is_empty() {
            control.push(SendAncillaryMessage::ScmRights(&descriptors));
        }
        let bytes = [IoSlice::new(&bytes)];
        rustix::net::sendmsg(channel, &bytes, &mut control, SendFlags::NOSIGNAL)?;
        Ok(())
    }

    /// Waits for the child's report.
    pub(crate) async fn receive(channel: &AsyncFd<OwnedFd>) -> io::Result<Self> {
        loop {
            let mut ready = channel.readable().await?;
            if let Ok(received) = ready.try_io(|channel| Self::take(channel.get_ref())) {
                return received;
            }
        }
    }

    fn take(channel: &OwnedFd) -> io::Result<Self> {
        let mut bytes = [0; 5];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS_MAX))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut buffers = [IoSliceMut::new(&mut bytes)];
        let flags = RecvFlags::CMSG_CLOEXEC;
        let count = rustix::net::recvmsg(channel, &mut buffers, &mut control, flags)?.bytes;
        let mut descriptors = control.drain().flat_map(|message| match message {
            RecvAncillaryMessage::ScmRights(rights) => rights.collect(),
            _ => Vec::new(),
        });
        let nonsense = || io::Error::other("the process that makes the tap device has failed");
        match bytes[..count] {
            [MADE] => Ok(Self::Made {
                tap: descriptors.next().ok_or_else(nonsense)?,
                namespaces: descriptors.collect(),
            }),
            [stage, a, b, c, d] => Ok(Self::Failed {
                stage: *Stage::ALL.get(usize::from(stage)).ok_or_else(nonsense)?,
                errno: Errno::from_raw_os_error(i32::from_ne_bytes([a, b, c, d])),
            }),
            _ => Err(nonsense()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reasons_are_told_in_one_line() {
        for (stage, errno, words) in [
            (Stage::TunDevice, Errno::NOENT, "modprobe tun"),
            (Stage::TunDevice, Errno::ACCESS, "chmod 666 /dev/net/tun"),
            (Stage::Namespace, Errno::NOSPC, "user.max_user_namespaces"),
            (Stage::Namespace, Errno::PERM, "user namespaces"),
            (Stage::Tap, Errno::PERM, "user namespaces"),
            (Stage::Bridge, Errno::NOPKG, "module is 'bridge'"),
            (Stage::Tap, Errno::BUSY, "the device: "),
        ] {
            let line = stage.error(errno).to_string();
            assert!(line.contains(words) && !line.contains('\n'), "{line}");
        }
    }
}
