//! Checking published ports before a backend binds them.
//!
//! The backends report a port that is taken late, vaguely or (when only one of two address families
//! is taken) not at all, so each port is bound here once and freed again. A port taken in the moment
//! between is still the backend's error.

use std::collections::HashSet;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use fcvm_types::{PortMapping, Protocol};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType, sockopt};

use crate::error::NetworkError;

/// Refuses ports that can not be published.
pub(crate) fn check(ports: &[PortMapping], ipv6: bool) -> Result<(), NetworkError> {
    let mut seen = HashSet::new();
    for port in ports {
        if !seen.insert((port.protocol, port.host_port)) {
            return Err(NetworkError::PortTwice {
                port: port.host_port,
                protocol: port.protocol,
            });
        }
    }
    for port in ports {
        for address in addresses(port, ipv6)? {
            bind(port.protocol, SocketAddr::new(address, port.host_port))
                .map_err(|errno| refusal(port, address, errno))?;
        }
    }
    Ok(())
}

fn addresses(port: &PortMapping, ipv6: bool) -> Result<Vec<IpAddr>, NetworkError> {
    match port.host_address {
        Some(IpAddr::V6(_)) if !ipv6 => Err(NetworkError::NoIpv6 {
            port: port.clone(),
            reason: "the host has no IPv6 route",
        }),
        Some(address) => Ok(vec![address]),
        None if ipv6 => Ok(vec![
            Ipv4Addr::UNSPECIFIED.into(),
            Ipv6Addr::UNSPECIFIED.into(),
        ]),
        None => Ok(vec![Ipv4Addr::UNSPECIFIED.into()]),
    }
}

/// Binds as a server would, and frees the port again.
fn bind(protocol: Protocol, address: SocketAddr) -> Result<(), Errno> {
    let family = match address {
        SocketAddr::V4(_) => AddressFamily::INET,
        SocketAddr::V6(_) => AddressFamily::INET6,
    };
    let kind = match protocol {
        Protocol::Tcp => SocketType::STREAM,
        Protocol::Udp => SocketType::DGRAM,
    };
    let socket = rustix::net::socket_with(family, kind, SocketFlags::CLOEXEC, None)?;
    if address.is_ipv6() {
        sockopt::set_ipv6_v6only(&socket, true)?;
    }
    if protocol == Protocol::Tcp {
        // Connections of an earlier server that linger do not take the port. For UDP the option
        // would mean something else: sharing the port with whoever has it.
        sockopt::set_socket_reuseaddr(&socket, true)?;
    }
    rustix::net::bind(&socket, &address)?;
    if protocol == Protocol::Tcp {
        rustix::net::listen(&socket, 1)?;
    }
    Ok(())
}

fn refusal(port: &PortMapping, address: IpAddr, errno: Errno) -> NetworkError {
    let port = port.clone();
    match errno {
        Errno::ADDRINUSE => NetworkError::PortTaken { port },
        Errno::ACCESS | Errno::PERM => NetworkError::PortPrivileged {
            port,
            first_free: first_unprivileged_port(),
        },
        Errno::ADDRNOTAVAIL => NetworkError::AddressNotLocal { port, address },
        errno => NetworkError::Listen {
            port,
            source: io::Error::from(errno),
        },
    }
}

/// ip_unprivileged_port_start of Documentation/networking/ip-sysctl.rst in Linux.
fn first_unprivileged_port() -> u16 {
    std::fs::read_to_string("/proc/sys/net/ipv4/ip_unprivileged_port_start")
        .ok()
        .and_then(|text| text.trim().parse().ok())
        .unwrap_or(1024)
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, UdpSocket};

    use super::*;

    fn mapping(text: String) -> PortMapping {
        text.parse().unwrap()
    }

    #[test]
    fn taken_ports_are_found_and_free_ones_stay_free() {
        let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
        let udp = UdpSocket::bind("127.0.0.1:0").unwrap();
        let tcp_port = tcp.local_addr().unwrap().port();
        let udp_port = udp.local_addr().unwrap().port();
        for text in [
            format!("127.0.0.1:{tcp_port}:80"),
            format!("{tcp_port}:80"),
            format!("127.0.0.1:{udp_port}:53/udp"),
        ] {
            let error = check(&[mapping(text)], false).unwrap_err();
            assert!(matches!(error, NetworkError::PortTaken { .. }), "{error}");
        }
        drop((tcp, udp));
        let ports = [
            mapping(format!("127.0.0.1:{tcp_port}:80")),
            mapping(format!("127.0.0.1:{udp_port}:53/udp")),
        ];
        check(&ports, false).unwrap();
        check(&ports, false).unwrap();
    }

    #[test]
    fn mappings_that_can_not_be() {
        let twice = ["8080:80", "127.0.0.1:8080:81"].map(|text| text.parse().unwrap());
        let error = check(&twice, false).unwrap_err().to_string();
        assert!(error.contains("8080/tcp of the host twice"), "{error}");
        let error = check(&[mapping("192.0.2.77:8080:80".into())], false).unwrap_err();
        assert!(
            matches!(error, NetworkError::AddressNotLocal { .. }),
            "{error}"
        );
        let error = check(&[mapping("[::1]:8080:80".into())], false).unwrap_err();
        assert!(matches!(error, NetworkError::NoIpv6 { .. }), "{error}");
    }

    #[test]
    fn ordinary_user_is_told_of_the_lowest_free_port() {
        if rustix::process::geteuid().is_root() || first_unprivileged_port() <= 1023 {
            println!("skipped: this user may listen on every port");
            return;
        }
        let error = check(&[mapping("127.0.0.1:1023:80".into())], false).unwrap_err();
        assert!(error.to_string().contains("from 1024 up"), "{error}");
    }
}
