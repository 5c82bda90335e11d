//! The system calls that make namespaces and tap devices, with safe signatures: tun(4) in
//! Documentation/networking/tuntap.rst, netdevice(7), and the bridge's of include/uapi/linux/sockios.h.

#![allow(unsafe_code)]

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};

use rustix::io::Errno;
use rustix::ioctl::{IntegerSetter, Opcode, Updater};
use rustix::net::{AddressFamily, SocketFlags, SocketType};
use rustix::thread::UnshareFlags;

const SIOCBRADDBR: Opcode = 0x89a0;
const SIOCBRADDIF: Opcode = 0x89a2;

/// The frames that may go unsegmented and without checksum to whoever reads a tap device.
const OFFLOADS: usize =
    (libc::TUN_F_CSUM | libc::TUN_F_TSO4 | libc::TUN_F_TSO6 | libc::TUN_F_TSO_ECN) as usize;

/// Puts this process, which must have one thread, into new namespaces.
pub(super) fn unshare(flags: UnshareFlags) -> Result<(), Errno> {
    debug_assert!(!flags.contains(UnshareFlags::FILES));
    // SAFETY: without CLONE_FILES the table of descriptors stays shared with all who know it.
    unsafe { rustix::thread::unshare_unsafe(flags) }
}

fn request(name: &str) -> Result<libc::ifreq, Errno> {
    // SAFETY: all zeros is a value of each field of this plain structure.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    // The last byte stays the name's end.
    if name.len() >= request.ifr_name.len() {
        return Err(Errno::NAMETOOLONG);
    }
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    Ok(request)
}

/// An ioctl that takes `struct ifreq`.
fn change<const CODE: Opcode>(fd: impl AsFd, request: &mut libc::ifreq) -> Result<(), Errno> {
    // SAFETY: the codes of this file take a `struct ifreq`, or its first field alone.
    unsafe { rustix::ioctl::ioctl(fd, Updater::<CODE, libc::ifreq>::new(request)) }
}

/// An ioctl that takes a number.
fn set<const CODE: Opcode>(fd: impl AsFd, value: usize) -> Result<(), Errno> {
    // SAFETY: the codes of this file that are used so take a number.
    unsafe { rustix::ioctl::ioctl(fd, IntegerSetter::<CODE>::new_usize(value)) }
}

/// Makes a tap device, which this descriptor of /dev/net/tun is the process's end of. Each frame there
/// has a header of 10 bytes before it, `struct virtio_net_hdr`.
pub(super) fn make_tap(tun: &File, name: &str) -> Result<(), Errno> {
    let mut request = request(name)?;
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    request.ifr_ifru.ifru_flags = flags as libc::c_short;
    change::<{ libc::TUNSETIFF as Opcode }>(tun, &mut request)
}

/// The device stays when the descriptor is closed.
pub(super) fn make_persistent(tun: &File) -> Result<(), Errno> {
    set::<{ libc::TUNSETPERSIST as Opcode }>(tun, 1)
}

/// Whoever reads the descriptor cuts frames and sums them up.
pub(super) fn take_offloads(tun: &File) -> Result<(), Errno> {
    set::<{ libc::TUNSETOFFLOAD as Opcode }>(tun, OFFLOADS)
}

/// A socket through which the network's devices are reached.
pub(super) fn device_socket() -> Result<OwnedFd, Errno> {
    let flags = SocketFlags::CLOEXEC;
    rustix::net::socket_with(AddressFamily::UNIX, SocketType::DGRAM, flags, None)
}

pub(super) fn make_bridge(socket: &OwnedFd, name: &str) -> Result<(), Errno> {
    change::<SIOCBRADDBR>(socket, &mut request(name)?)
}

pub(super) fn add_to_bridge(socket: &OwnedFd, bridge: &str, port: &str) -> Result<(), Errno> {
    let index = rustix::net::netdevice::name_to_index(socket, port)?;
    let mut request = request(bridge)?;
    request.ifr_ifru.ifru_ifindex = index as libc::c_int;
    change::<SIOCBRADDIF>(socket, &mut request)
}

pub(super) fn set_address(socket: &OwnedFd, name: &str, address: [u8; 6]) -> Result<(), Errno> {
    let mut bytes = [0; 14];
    for (to, from) in bytes.iter_mut().zip(address) {
        *to = from as libc::c_char;
    }
    let mut request = request(name)?;
    request.ifr_ifru.ifru_hwaddr = libc::sockaddr {
        sa_family: libc::ARPHRD_ETHER,
        sa_data: bytes,
    };
    change::<{ libc::SIOCSIFHWADDR as Opcode }>(socket, &mut request)
}

pub(super) fn set_mtu(socket: &OwnedFd, name: &str, mtu: u16) -> Result<(), Errno> {
    let mut request = request(name)?;
    request.ifr_ifru.ifru_mtu = mtu.into();
    change::<{ libc::SIOCSIFMTU as Opcode }>(socket, &mut request)
}

/// Brings a device up, without a multicast of its own.
pub(super) fn bring_up(socket: &OwnedFd, name: &str) -> Result<(), Errno> {
    let mut request = request(name)?;
    request.ifr_ifru.ifru_flags = libc::IFF_UP as libc::c_short;
    change::<{ libc::SIOCSIFFLAGS as Opcode }>(socket, &mut request)
}
