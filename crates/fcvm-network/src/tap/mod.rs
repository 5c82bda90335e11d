//! A tap device in a network namespace of the VM's own, for a hypervisor that takes nothing else.
//!
//! Firecracker opens a tap device by its name, in the network namespace that it runs in. A namespace
//! of the VM's own needs no privilege where users may make user namespaces, and takes everything in it
//! along when its last process and descriptor are gone: no crash can leave a device behind.
//!
//! ```text
//! guest ── Firecracker ── [fcvm0 ── bridge ── fcvm1] ── TapPump ── FrameRelay ── passt
//!                         the VM's network namespace     the owner's threads
//! ```
//!
//! What a process writes to a tap device arrives at the kernel, not at another process: so there is a
//! second one, and a bridge without addresses between the two. From the owner's end of the second one
//! on, frames go the way that QEMU's go, so that published ports, name servers and the rest are the same.
//! What the bridge says of itself (Linux's joins a multicast group) ends at the pump: passt takes the sender
//! of the last frame for the guest, and a guest that is silent, as a clone may be for ever, does not correct it.
//!
//! A child process (`namespace.rs`) makes the namespaces, which a process of several threads cannot;
//! its system calls are in `raw.rs`. `pump.rs` moves the frames.

mod namespace;
mod pump;
mod raw;
#[cfg(test)]
mod tests;

use std::os::fd::OwnedFd;
use std::process::{Command, Stdio};
use std::time::Duration;

use rustix::net::{AddressFamily, SocketFlags, SocketType};

use crate::error::NetworkError;

use namespace::Report;
pub use namespace::{check_tap, is_passt_allowed, make_tap};
pub(crate) use pump::TapPump;

/// The device that the hypervisor opens. It is alone in its namespace, so that all VMs have the same
/// name: a clone finds what its source had.
const HYPERVISOR_TAP: &str = "fcvm0";
/// The owner's.
const OWN_TAP: &str = "fcvm1";
const BRIDGE: &str = "fcvmbr";
/// Address of the bridge and of the owner's device, by which frames of their own are known.
const BRIDGE_MAC: [u8; 6] = [0x52, 0x54, 0x00, 0xfc, 0x00, 0x01];
/// Largest packet: a frame's 65,535 bytes without its header, in words of 32 bits, as passt has it.
const MTU: u16 = 65_520;
/// How long the child may take. It takes 20 ms on an idle host.
const TIMEOUT: Duration = Duration::from_secs(20);

/// A tap device for a hypervisor.
#[derive(Debug)]
pub struct Tap {
    /// Its name, in its namespace.
    pub name: &'static str,
    /// What a process enters, one after the other, to find it there: a user namespace where this user
    /// needed one, and the network namespace.
    pub namespaces: Vec<OwnedFd>,
}

/// Lets `child`, a command that calls [`make_tap`] and ends, make a tap device; gives it and the owner's
/// end.
pub(crate) async fn create(mut child: Command) -> Result<(Tap, OwnedFd), NetworkError> {
    let (own, other) = rustix::net::socketpair(
        AddressFamily::UNIX,
        SocketType::SEQPACKET,
        SocketFlags::CLOEXEC,
        None,
    )
    .map_err(|errno| NetworkError::Setup(errno.into()))?;
    rustix::io::ioctl_fionbio(&own, true).map_err(|errno| NetworkError::Setup(errno.into()))?;
    let own = fcvm_process::watch_readable(own).map_err(NetworkError::Setup)?;
    let mut process = child
        .env_clear()
        .current_dir("/")
        .stdin(other)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .map_err(|source| NetworkError::Spawn {
            path: child.get_program().into(),
            source,
        })?;
    // The child's end is the child's alone: its death is seen.
    drop(child);
    let report = tokio::time::timeout(TIMEOUT, Report::receive(&own)).await;
    if report.is_err() {
        let _ = process.kill();
    }
    // It has said what it has to say, and ends.
    let _ = process.wait();
    match report {
        Ok(Ok(Report::Made { namespaces, tap })) => Ok((
            Tap {
                name: HYPERVISOR_TAP,
                namespaces,
            },
            tap,
        )),
        Ok(Ok(Report::Failed { stage, errno })) => Err(stage.error(errno)),
        Ok(Err(error)) => Err(NetworkError::Setup(error)),
        Err(_) => Err(NetworkError::TapSilent {
            timeout_s: TIMEOUT.as_secs(),
        }),
    }
}
