//! Finding the guest's devices by the names that the host gave them.

use std::fs;
use std::os::fd::OwnedFd;

use fcvm_types::guest::AGENT_PORT_NAME;
use fcvm_wire::Failure;
use rustix::fs::{Mode, OFlags};
use rustix::net::{RecvFlags, SocketFlags, netlink as protocols};

use crate::failure::{Context, guest};
use crate::netlink;

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
            Ok(_) | Err(rustix::io::Errno::NOBUFS | rustix::io::Errno::INTR) => Ok(()),
            Err(errno) => Err(errno).context("waiting for a device"),
        }
    }
}

/// Waits for the agent's virtio-serial port and opens it, non-blocking.
pub(crate) fn open_agent_port(events: &DeviceEvents) -> Result<OwnedFd, Failure> {
    loop {
        if let Some(port) = find_port() {
            let flags = OFlags::RDWR | OFlags::NONBLOCK | OFlags::CLOEXEC | OFlags::NOCTTY;
            return rustix::fs::open(format!("/dev/{port}"), flags, Mode::empty())
                .context("opening the agent's port");
        }
        events.wait()?;
    }
}

fn find_port() -> Option<String> {
    entries("/sys/class/virtio-ports").find(|port| {
        fs::read_to_string(format!("/sys/class/virtio-ports/{port}/name"))
            .is_ok_and(|name| name.trim_end() == AGENT_PORT_NAME)
    })
}

/// The device node of the disk with a serial number.
pub(crate) fn find_disk(serial: &str) -> Result<String, Failure> {
    entries("/sys/block")
        .find(|disk| {
            fs::read_to_string(format!("/sys/block/{disk}/serial"))
                .is_ok_and(|text| text.trim_end() == serial)
        })
        .map(|disk| format!("/dev/{disk}"))
        .ok_or_else(|| guest(format!("the guest has no disk with the serial '{serial}'")))
}

fn entries(directory: &str) -> impl Iterator<Item = String> {
    fs::read_dir(directory)
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| entry.file_name().into_string().ok())
}
