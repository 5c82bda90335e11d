//! Finding the guest's devices by the names that the host gave them.
//!
//! Where the hypervisor cannot name them, the kernel's command line does.

use std::fs;
use std::os::fd::OwnedFd;

use fcvm_types::guest::{
    AGENT_PORT_NAME, AGENT_VSOCK_PORT, CHANNEL_ARGUMENT, DISKS_ARGUMENT, VSOCK_CHANNEL,
};
use fcvm_wire::Failure;
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SocketFlags, netlink as protocols};

use crate::failure::{Context, guest};
use crate::{netlink, sys};

/// The kernel's announcements of devices; to be opened before the drivers are loaded.
pub(crate) struct DeviceEvents(OwnedFd);

impl DeviceEvents {
    /// Starts listening.
    pub(crate) fn listen() -> Result<Self, Failure> {
        netlink::open(Some(protocols::KOBJECT_UEVENT), 1, SocketFlags::empty())
            .map(Self)
            .context("listening for devices")
    }

    fn wait(&self) -> Result<(), Failure> {
        let mut event = [0_u8; 4096];
        match rustix::net::recv(&self.0, &mut event[..], RecvFlags::empty()) {
            // ENOBUFS: announcements were lost, so look again.
            Ok(_) | Err(Errno::NOBUFS | Errno::INTR) => Ok(()),
            Err(errno) => Err(errno).context("waiting for a device"),
        }
    }
}

/// What carries the agent's channel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Carrier {
    /// A port of virtio-serial: the host connects and disconnects its own side of it.
    Port,
    /// A connection over vsock.
    Vsock,
}

impl Carrier {
    /// A new connection to the host; only vsock has them.
    pub(crate) fn reopen(self) -> Result<OwnedFd, Errno> {
        match self {
            Self::Port => Err(Errno::OPNOTSUPP),
            Self::Vsock => connect_host(),
        }
    }
}

/// Waits for the device that carries the agent's channel and opens it, non-blocking.
pub(crate) fn open_channel(events: &DeviceEvents) -> Result<(Carrier, OwnedFd), Failure> {
    let over_vsock = kernel_argument(CHANNEL_ARGUMENT).as_deref() == Some(VSOCK_CHANNEL);
    let carrier = match over_vsock {
        true => Carrier::Vsock,
        false => Carrier::Port,
    };
    loop {
        let opened = match carrier {
            Carrier::Vsock => connect()?,
            Carrier::Port => open_port()?,
        };
        match opened {
            Some(channel) => return Ok((carrier, channel)),
            None => events.wait()?,
        }
    }
}

fn connect_host() -> Result<OwnedFd, Errno> {
    let socket = sys::connect_host(AGENT_VSOCK_PORT)?;
    rustix::io::ioctl_fionbio(&socket, true)?;
    Ok(socket)
}

/// A connection to the host; none while there is no device for it.
fn connect() -> Result<Option<OwnedFd>, Failure> {
    match connect_host() {
        Err(Errno::NODEV | Errno::ADDRNOTAVAIL) => Ok(None),
        Err(Errno::AFNOSUPPORT) => Err(guest("the guest's kernel has no driver of virtio's vsock")),
        socket => socket
            .context("connecting to the host over vsock")
            .map(Some),
    }
}

fn open_port() -> Result<Option<OwnedFd>, Failure> {
    let Some(port) = find_port() else {
        return Ok(None);
    };
    let flags = OFlags::RDWR | OFlags::NONBLOCK | OFlags::CLOEXEC | OFlags::NOCTTY;
    rustix::fs::open(format!("/dev/{port}"), flags, Mode::empty())
        .context("opening the agent's port")
        .map(Some)
}

fn find_port() -> Option<String> {
    entries("/sys/class/virtio-ports").find(|port| {
        fs::read_to_string(format!("/sys/class/virtio-ports/{port}/name"))
            .is_ok_and(|name| name.trim_end() == AGENT_PORT_NAME)
    })
}

/// The value of an argument of the kernel's command line; the last one counts, as for the kernel.
fn kernel_argument(name: &str) -> Option<String> {
    let line = fs::read_to_string("/proc/cmdline").ok()?;
    argument(&line, name).map(str::to_owned)
}

fn argument<'a>(line: &'a str, name: &str) -> Option<&'a str> {
    line.split_whitespace()
        .filter_map(|argument| argument.strip_prefix(name)?.strip_prefix('='))
        .next_back()
}

/// The device node of the disk with a serial number.
pub(crate) fn find_disk(serial: &str) -> Result<String, Failure> {
    entries("/sys/block")
        .find(|disk| {
            fs::read_to_string(format!("/sys/block/{disk}/serial"))
                .is_ok_and(|text| text.trim_end() == serial)
        })
        .or_else(|| listed_disk(&kernel_argument(DISKS_ARGUMENT)?, serial))
        .map(|disk| format!("/dev/{disk}"))
        .ok_or_else(|| guest(format!("the guest has no disk with the serial '{serial}'")))
}

/// The disk by its place in the list of all.
fn listed_disk(serials: &str, serial: &str) -> Option<String> {
    let index = serials.split(',').position(|listed| listed == serial)?;
    let letter = (b'a'..=b'z').nth(index)?;
    Some(format!("vd{}", char::from(letter)))
}

fn entries(directory: &str) -> impl Iterator<Item = String> {
    fs::read_dir(directory)
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| entry.file_name().into_string().ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arguments_of_the_kernel() {
        let line = "quiet fcvm.disks=root,data fcvm.disksize=3 fcvm.channel=vsock fcvm.channel=\n";
        assert_eq!(argument(line, "fcvm.disks"), Some("root,data"));
        assert_eq!(argument(line, "fcvm.channel"), Some(""));
        assert_eq!(argument(line, "quiet"), None);
    }

    #[test]
    fn disks_by_their_places() {
        let disk = |serial| listed_disk("fcvm-root,fcvm-scratch", serial);
        assert_eq!(disk("fcvm-root").as_deref(), Some("vda"));
        assert_eq!(disk("fcvm-scratch").as_deref(), Some("vdb"));
        assert_eq!(disk("fcvm"), None);
    }
}
