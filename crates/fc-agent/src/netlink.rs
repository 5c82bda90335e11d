//! The few rtnetlink messages (rtnetlink(7)) that give an interface its addresses, and the
//! exchange with the kernel. Which addresses is network.rs's business.

use std::net::IpAddr;
use std::os::fd::OwnedFd;

use rustix::io::Errno;
use rustix::net::netlink::SocketAddrNetlink;
use rustix::net::{AddressFamily, Protocol, RecvFlags, SendFlags, SocketFlags, SocketType};

const RTM_NEWLINK: u16 = 16;
const RTM_NEWADDR: u16 = 20;
const RTM_NEWROUTE: u16 = 24;
const NLMSG_ERROR: u16 = 2;
const NLM_F_REQUEST: u16 = 1;
const NLM_F_ACK: u16 = 4;
const NLM_F_REPLACE: u16 = 0x100;
const NLM_F_CREATE: u16 = 0x400;
const IFF_UP: u32 = 1;
const IFLA_MTU: u16 = 4;
const IFA_ADDRESS: u16 = 1;
const IFA_LOCAL: u16 = 2;
const IFA_F_NODAD: u8 = 2;
const RTA_OIF: u16 = 4;
const RTA_GATEWAY: u16 = 5;
const RT_TABLE_MAIN: u8 = 254;
const RTPROT_STATIC: u8 = 4;
const RTN_UNICAST: u8 = 1;
const RTNH_F_ONLINK: u32 = 4;
const HEADER_BYTES: usize = 16;

fn family(address: IpAddr) -> u8 {
    match address {
        IpAddr::V4(_) => 2,
        IpAddr::V6(_) => 10,
    }
}

fn address_bytes(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    }
}

/// A request under construction: header, fixed part, attributes.
struct Message(Vec<u8>);

impl Message {
    fn new(kind: u16, flags: u16) -> Self {
        let mut bytes = vec![0; HEADER_BYTES];
        bytes[4..6].copy_from_slice(&kind.to_ne_bytes());
        bytes[6..8].copy_from_slice(&(NLM_F_REQUEST | NLM_F_ACK | flags).to_ne_bytes());
        Self(bytes)
    }

    fn fixed(mut self, bytes: &[u8]) -> Self {
        self.0.extend_from_slice(bytes);
        self
    }

    fn attribute(mut self, kind: u16, value: &[u8]) -> Self {
        let length = u16::try_from(4 + value.len()).unwrap_or(u16::MAX);
        self.0.extend_from_slice(&length.to_ne_bytes());
        self.0.extend_from_slice(&kind.to_ne_bytes());
        self.0.extend_from_slice(value);
        self.0.resize(self.0.len().next_multiple_of(4), 0);
        self
    }

    fn finish(mut self) -> Vec<u8> {
        let length = u32::try_from(self.0.len()).unwrap_or(u32::MAX);
        self.0[0..4].copy_from_slice(&length.to_ne_bytes());
        self.0
    }
}

/// Sets an interface up, with a largest packet size where given.
pub(crate) fn link_up(index: u32, mtu: Option<u32>) -> Vec<u8> {
    let mut fixed = vec![0; 4];
    fixed.extend_from_slice(&index.to_ne_bytes());
    fixed.extend_from_slice(&IFF_UP.to_ne_bytes());
    fixed.extend_from_slice(&IFF_UP.to_ne_bytes());
    let message = Message::new(RTM_NEWLINK, 0).fixed(&fixed);
    match mtu {
        Some(mtu) => message.attribute(IFLA_MTU, &mtu.to_ne_bytes()),
        None => message,
    }
    .finish()
}

/// Gives an interface an address.
pub(crate) fn add_address(index: u32, address: IpAddr, prefix_length: u8) -> Vec<u8> {
    // The address is ours alone on a link of two: duplicate detection would only delay it.
    let flags = if address.is_ipv6() { IFA_F_NODAD } else { 0 };
    let bytes = address_bytes(address);
    let message = Message::new(RTM_NEWADDR, NLM_F_CREATE | NLM_F_REPLACE)
        .fixed(&[family(address), prefix_length, flags, 0])
        .fixed(&index.to_ne_bytes())
        .attribute(IFA_LOCAL, &bytes);
    message.attribute(IFA_ADDRESS, &bytes).finish()
}

/// Adds the default route.
pub(crate) fn add_default_route(index: u32, gateway: IpAddr) -> Vec<u8> {
    Message::new(RTM_NEWROUTE, NLM_F_CREATE | NLM_F_REPLACE)
        .fixed(&[family(gateway), 0, 0, 0])
        .fixed(&[RT_TABLE_MAIN, RTPROT_STATIC, 0, RTN_UNICAST])
        .fixed(&RTNH_F_ONLINK.to_ne_bytes())
        .attribute(RTA_OIF, &index.to_ne_bytes())
        .attribute(RTA_GATEWAY, &address_bytes(gateway))
        .finish()
}

/// Opens a netlink socket; no protocol means NETLINK_ROUTE, which is number 0.
pub(crate) fn open(
    protocol: Option<Protocol>,
    groups: u32,
    flags: SocketFlags,
) -> Result<OwnedFd, Errno> {
    let socket = rustix::net::socket_with(
        AddressFamily::NETLINK,
        SocketType::RAW,
        SocketFlags::CLOEXEC | flags,
        protocol,
    )?;
    rustix::net::bind(&socket, &SocketAddrNetlink::new(0, groups))?;
    Ok(socket)
}

/// Sends one request and waits for the kernel's answer to it, which it gives before `sendto` returns.
pub(crate) fn exchange(socket: &OwnedFd, request: &[u8]) -> Result<(), Errno> {
    rustix::net::send(socket, request, SendFlags::empty())?;
    let mut answer = [0_u8; 1024];
    let (length, _) = rustix::net::recv(socket, &mut answer[..], RecvFlags::empty())?;
    parse_answer(&answer[..length])
}

fn parse_answer(answer: &[u8]) -> Result<(), Errno> {
    let code = match (answer.get(4..6), answer.get(HEADER_BYTES..HEADER_BYTES + 4)) {
        (Some(kind), Some(code)) if kind == NLMSG_ERROR.to_ne_bytes() => {
            i32::from_ne_bytes([code[0], code[1], code[2], code[3]])
        }
        _ => return Err(Errno::PROTO),
    };
    match code {
        0 => Ok(()),
        code => Err(Errno::from_raw_os_error(code.saturating_neg())),
    }
}

/// The socket for [`exchange`].
pub(crate) fn open_route() -> Result<OwnedFd, Errno> {
    // NETLINK_ROUTE is protocol 0.
    open(None, 0, SocketFlags::empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_have_the_documented_bytes() {
        let bytes = add_address(2, "10.0.2.15".parse().unwrap(), 24);
        assert_eq!(bytes.len(), 16 + 8 + 8 + 8);
        assert_eq!(bytes[0..4], 40_u32.to_ne_bytes());
        assert_eq!(bytes[4..6], 20_u16.to_ne_bytes());
        assert_eq!(bytes[16..20], [2, 24, 0, 0]);
        assert_eq!(bytes[28..32], [10, 0, 2, 15]);
        let bytes = link_up(1, Some(1500));
        assert_eq!(bytes.len(), 16 + 16 + 8);
    }

    #[test]
    fn the_kernels_error_is_read() {
        let mut answer = vec![0_u8; 36];
        answer[4..6].copy_from_slice(&2_u16.to_ne_bytes());
        assert_eq!(parse_answer(&answer), Ok(()));
        answer[16..20].copy_from_slice(&(-101_i32).to_ne_bytes());
        assert_eq!(parse_answer(&answer), Err(Errno::NETUNREACH));
        assert_eq!(parse_answer(&answer[..10]), Err(Errno::PROTO));
    }
}
