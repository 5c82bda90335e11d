//! passt: a process that turns the Ethernet frames of one socket into sockets of the host.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use fcvm_process::{HelperCommand, HelperProcess};
use fcvm_types::guest::{GuestIpv6, GuestNetwork};
use fcvm_types::{PortMapping, Protocol};
use rustix::net::{AddressFamily, SendFlags, SocketFlags, SocketType};
use tokio::io::AsyncReadExt;
use tokio::net::UnixStream;

use crate::attach::{GUEST_ADDRESS, GUEST_GATEWAY, GUEST_MAC, GUEST_NAME_SERVER, GUEST_PREFIX};
use crate::error::NetworkError;
use crate::host::{HostResolver, HostRoutes};

/// Address of passt on the guest's link. Fixed, so that what a guest remembers of it stays true
/// when another passt takes over.
const GATEWAY_MAC: [u8; 6] = [0x52, 0x54, 0x00, 0xfc, 0x00, 0x02];
/// The largest packet of passt: a frame's 65,535 bytes without its header, in words of 32 bits.
const MTU: u16 = 65_520;
/// How long passt may take to answer. It takes 80 ms on an idle host.
const START_TIMEOUT: Duration = Duration::from_secs(20);

/// A unique local prefix, RFC 4193, of our own: the letters "fcvm".
const IPV6_ADDRESS: Ipv6Addr = Ipv6Addr::new(0xfd66, 0x6376, 0x6d00, 0, 0, 0, 0, 0x0f);
const IPV6_GATEWAY: Ipv6Addr = Ipv6Addr::new(0xfd66, 0x6376, 0x6d00, 0, 0, 0, 0, 0x02);
const IPV6_NAME_SERVER: Ipv6Addr = Ipv6Addr::new(0xfd66, 0x6376, 0x6d00, 0, 0, 0, 0, 0x03);
const IPV6_PREFIX: u8 = 64;

/// Looks for passt in the directories of `search_path`, a list as in the PATH variable.
pub fn find_passt(search_path: &str) -> Option<PathBuf> {
    std::env::split_paths(search_path)
        .filter(|directory| directory.is_absolute())
        .map(|directory| directory.join("passt"))
        .find(|path| {
            path.metadata()
                .is_ok_and(|data| data.is_file() && data.permissions().mode() & 0o111 != 0)
        })
}

/// Whether the guest reaches the services that the host runs on its loopback.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum HostLoopback {
    /// No: they are not the guest's business. The gateway's address leads to no host.
    Hidden,
    /// Yes, at the gateway's address.
    AtGateway,
}

/// What an older passt gets wrong with published ports.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Shortcomings {
    /// Before August 2024 a guest's UDP answer to a client on the host's loopback goes by the same
    /// rule that leads the guest to the loopback (udp_tap_handler() there). Later ones remember who
    /// asked.
    forgets_udp_clients: bool,
    /// Before October 2023 the guest learns of a connection only when the client sends something
    /// (tcp_conn_from_sock_finish() there), so a server that speaks first never does.
    waits_for_client: bool,
}

impl Shortcomings {
    /// By what its help prints and where: Debian 12's says of itself "unknown version". The help came
    /// to standard output in June 2023, so the four months after that pass for sound.
    pub(crate) fn of(program: &Path) -> Self {
        let output = Command::new(program)
            .arg("--help")
            .env_clear()
            .stdin(Stdio::null())
            .output();
        let help = output.map_or_else(|_| Vec::new(), |output| output.stdout);
        let help = String::from_utf8_lossy(&help);
        Self {
            forgets_udp_clients: !help.contains("--map-host-loopback"),
            waits_for_client: !help.contains("--tcp-ports"),
        }
    }

    /// The loopback stays hidden unless that would break a published port.
    pub(crate) fn host_loopback(self, ports: &[PortMapping]) -> HostLoopback {
        if self.forgets_udp_clients && publishes(ports, Protocol::Udp) {
            HostLoopback::AtGateway
        } else {
            HostLoopback::Hidden
        }
    }

    /// What the user should know.
    pub(crate) fn note(self, ports: &[PortMapping]) -> Option<String> {
        let mut effects = Vec::new();
        if self.waits_for_client && publishes(ports, Protocol::Tcp) {
            effects.push(
                "servers that speak first (SMTP, MySQL, ...) are not heard on published TCP ports",
            );
        }
        if self.host_loopback(ports) == HostLoopback::AtGateway {
            effects.push(
                "the guest reaches the services of the host's loopback at 10.0.2.2, as published \
                 UDP ports need it",
            );
        }
        (!effects.is_empty()).then(|| {
            format!(
                "this passt is old: {}; a passt of 2024-08-21 or later is free of that",
                effects.join(", and ")
            )
        })
    }
}

fn publishes(ports: &[PortMapping], protocol: Protocol) -> bool {
    ports.iter().any(|port| port.protocol == protocol)
}

/// Starts passt; gives it and the socket on which it will answer.
pub(crate) fn start(
    program: &Path,
    ports: &[PortMapping],
    routes: &HostRoutes,
    guest: &GuestNetwork,
    loopback: HostLoopback,
) -> Result<(HelperProcess, OwnedFd), NetworkError> {
    let (own, other) = rustix::net::socketpair(
        AddressFamily::UNIX,
        SocketType::STREAM,
        SocketFlags::CLOEXEC,
        None,
    )
    .map_err(|errno| NetworkError::Setup(errno.into()))?;
    ask(&own).map_err(NetworkError::Setup)?;
    let mut command = HelperCommand::new("passt", program);
    let number = command.inherit(other).map_err(NetworkError::Setup)?;
    command.args(arguments(
        number,
        ports,
        routes,
        &guest.dns_servers,
        loopback,
    ));
    tracing::trace!("{command:?}");
    let helper = command.spawn().map_err(|source| NetworkError::Spawn {
        path: program.to_owned(),
        source,
    })?;
    Ok((helper, own))
}

/// Waits until passt answers on its socket, and gives that back.
pub(crate) async fn wait_until_started(
    helper: &HelperProcess,
    socket: OwnedFd,
) -> Result<OwnedFd, NetworkError> {
    let answered = tokio::time::timeout(START_TIMEOUT, wait_for_answer(socket)).await;
    match answered {
        Ok(Ok(socket)) => Ok(socket),
        // It closed its end, so it is ending.
        Ok(Err(error)) => {
            tracing::trace!("passt: {error}");
            helper.kill_after(Duration::from_secs(1)).await;
            Err(NetworkError::PasstFailed {
                reason: helper.wait().await.to_string(),
            })
        }
        Err(_) => Err(NetworkError::PasstSilent {
            timeout_s: START_TIMEOUT.as_secs(),
        }),
    }
}

fn arguments(
    socket: i32,
    ports: &[PortMapping],
    routes: &HostRoutes,
    name_servers: &[IpAddr],
    loopback: HostLoopback,
) -> Vec<String> {
    let mut line: Vec<String> = Vec::new();
    let mut option = |name: &str, value: String| line.extend([name.to_owned(), value]);
    option("--fd", socket.to_string());
    option("--address", GUEST_ADDRESS.to_string());
    option("--netmask", GUEST_PREFIX.to_string());
    option("--gateway", GUEST_GATEWAY.to_string());
    option("--mac-addr", colons(GATEWAY_MAC));
    let forwarders = [GUEST_NAME_SERVER.into(), IPV6_NAME_SERVER.into()];
    for server in name_servers {
        if forwarders.contains(server) {
            option("--dns-forward", server.to_string());
        }
    }
    if routes.has_ipv6() {
        option("--address", IPV6_ADDRESS.to_string());
        option("--gateway", IPV6_GATEWAY.to_string());
    }
    // Without an IPv4 default route passt would turn IPv4 off, or not start: an interface that is
    // named needs none.
    if routes.ipv4_interface.is_none() {
        let interface = routes.ipv6_interface.as_deref().unwrap_or("lo");
        option("--interface", interface.to_owned());
    }
    for port in ports {
        let name = match port.protocol {
            Protocol::Tcp => "--tcp-ports",
            Protocol::Udp => "--udp-ports",
        };
        let address = port
            .host_address
            .map_or_else(String::new, |address| format!("{address}/"));
        option(
            name,
            format!("{address}{}:{}", port.host_port, port.guest_port),
        );
    }
    if loopback == HostLoopback::Hidden {
        line.push("--no-map-gw".to_owned());
    }
    // The guest's addresses are static, so nothing hands them out.
    for flag in [
        "--foreground",
        "--quiet",
        "--no-dhcp",
        "--no-dhcpv6",
        "--no-ra",
    ] {
        line.push(flag.to_owned());
    }
    if !routes.has_ipv6() {
        line.push("--ipv4-only".to_owned());
    }
    line
}

/// How the guest configures itself.
pub(crate) fn guest(resolver: &HostResolver, routes: &HostRoutes) -> GuestNetwork {
    GuestNetwork {
        address: GUEST_ADDRESS,
        prefix_length: GUEST_PREFIX,
        gateway: GUEST_GATEWAY,
        ipv6: routes.has_ipv6().then_some(GuestIpv6 {
            address: IPV6_ADDRESS,
            prefix_length: IPV6_PREFIX,
            gateway: IPV6_GATEWAY,
        }),
        dns_servers: name_servers(resolver, routes.has_ipv6()),
        dns_search: resolver.search.clone(),
        mtu: MTU,
    }
}

/// The host's own name servers where the guest can reach them; else passt's forwarder, which leads
/// to the host's first one. The forwarder of passt before 2024 knows UDP only, so it is the second
/// choice: long answers come over TCP.
///
/// The forwarder is on only where it is used: it lets every answer of the host's first name server
/// seem to come from the forwarder's address, also the answer to a question that was asked directly.
fn name_servers(resolver: &HostResolver, ipv6: bool) -> Vec<IpAddr> {
    let reachable: Vec<IpAddr> = resolver
        .servers
        .iter()
        .copied()
        .filter(|server| !server.is_loopback() && !server.is_unspecified())
        .filter(|server| ipv6 || server.is_ipv4())
        .collect();
    if !reachable.is_empty() {
        return reachable;
    }
    match resolver.servers.iter().find(|server| server.is_ipv4()) {
        Some(_) => vec![GUEST_NAME_SERVER.into()],
        None if ipv6 && !resolver.servers.is_empty() => vec![IPV6_NAME_SERVER.into()],
        None => Vec::new(),
    }
}

/// Asks passt for its own Ethernet address, as the guest will. It comes in one piece: passt of before
/// August 2024 loses its place where it finds the length of a frame without the frame.
fn ask(socket: &OwnedFd) -> std::io::Result<()> {
    let request = arp_question();
    let length = u32::try_from(request.len()).unwrap_or(u32::MAX);
    let message = [&length.to_be_bytes()[..], &request].concat();
    // A new socket has room for all of it.
    rustix::net::send(socket, &message, SendFlags::NOSIGNAL)?;
    Ok(())
}

/// Waits for the answer: it comes when the ports are bound, the sandbox is up and frames are being
/// handled.
async fn wait_for_answer(socket: OwnedFd) -> std::io::Result<OwnedFd> {
    let socket = std::os::unix::net::UnixStream::from(socket);
    socket.set_nonblocking(true)?;
    let mut stream = UnixStream::from_std(socket)?;
    loop {
        let mut frame = vec![0; stream.read_u32().await?.min(u32::from(u16::MAX)) as usize];
        stream.read_exact(&mut frame).await?;
        // Anything else is for a guest that does not listen yet.
        if is_arp_reply(&frame, GUEST_GATEWAY) {
            let socket = stream.into_std()?;
            socket.set_nonblocking(false)?;
            return Ok(socket.into());
        }
    }
}

/// The guest's question for passt's address.
pub(crate) fn arp_question() -> Vec<u8> {
    arp_request(GUEST_MAC, GUEST_ADDRESS, GUEST_GATEWAY)
}

const ETHERNET_BYTES: usize = 14;

/// An Ethernet frame with an ARP request, RFC 826.
fn arp_request(from_mac: [u8; 6], from: Ipv4Addr, target: Ipv4Addr) -> Vec<u8> {
    let mut frame = vec![0xff; 6];
    frame.extend(from_mac);
    frame.extend([0x08, 0x06]);
    // Ethernet, IPv4, their address lengths, request.
    frame.extend([0, 1, 0x08, 0, 6, 4, 0, 1]);
    frame.extend(from_mac);
    frame.extend(from.octets());
    frame.extend([0; 6]);
    frame.extend(target.octets());
    frame
}

fn is_arp_reply(frame: &[u8], from: Ipv4Addr) -> bool {
    frame.len() >= ETHERNET_BYTES + 28
        && frame[12..14] == [0x08, 0x06]
        && frame[ETHERNET_BYTES + 6..ETHERNET_BYTES + 8] == [0, 2]
        && frame[ETHERNET_BYTES + 14..ETHERNET_BYTES + 18] == from.octets()
}

fn colons(mac: [u8; 6]) -> String {
    mac.map(|byte| format!("{byte:02x}")).join(":")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guest_asks_the_hosts_name_servers_where_it_can() {
        let servers = |text: &str, ipv6| {
            let servers = name_servers(&HostResolver::parse(text), ipv6);
            servers.iter().map(IpAddr::to_string).collect::<Vec<_>>()
        };
        assert_eq!(
            servers("nameserver 192.0.2.1\nnameserver 127.0.0.53", false),
            ["192.0.2.1"]
        );
        assert_eq!(servers("nameserver 127.0.0.53", true), ["10.0.2.3"]);
        assert_eq!(servers("nameserver ::1", true), ["fd66:6376:6d00::3"]);
        assert_eq!(servers("nameserver 2001:db8::1", true), ["2001:db8::1"]);
        assert!(servers("nameserver 2001:db8::1", false).is_empty());
        assert!(servers("", true).is_empty());
    }

    #[test]
    fn forwarder_is_on_only_where_the_guest_asks_it() {
        let line = |resolv_conf: &str| {
            let servers = name_servers(&HostResolver::parse(resolv_conf), false);
            let routes = HostRoutes::default();
            arguments(3, &[], &routes, &servers, HostLoopback::Hidden).join(" ")
        };
        assert!(line("nameserver 127.0.0.53").contains("--dns-forward 10.0.2.3"));
        assert!(!line("nameserver 192.0.2.1").contains("--dns-forward"));
    }

    #[test]
    fn loopback_is_hidden_unless_a_published_port_needs_it() {
        let ports = |text: &str| vec![text.parse::<PortMapping>().unwrap()];
        let (tcp, udp) = (ports("8080:80"), ports("5300:53/udp"));
        let old = Shortcomings {
            forgets_udp_clients: true,
            waits_for_client: true,
        };
        assert_eq!(old.host_loopback(&tcp), HostLoopback::Hidden);
        assert_eq!(old.host_loopback(&udp), HostLoopback::AtGateway);
        assert!(old.note(&tcp).unwrap().contains("speak first"));
        assert!(old.note(&udp).unwrap().contains("at 10.0.2.2"));
        assert_eq!(old.note(&[]), None);
        let new = Shortcomings {
            forgets_udp_clients: false,
            waits_for_client: false,
        };
        assert_eq!(new.host_loopback(&udp), HostLoopback::Hidden);
        assert_eq!(new.note(&[tcp, udp].concat()), None);
    }

    #[test]
    fn frames_of_others_are_no_answer() {
        let mut frame = arp_request(GATEWAY_MAC, GUEST_GATEWAY, GUEST_ADDRESS);
        assert!(!is_arp_reply(&frame, GUEST_GATEWAY));
        frame[ETHERNET_BYTES + 7] = 2;
        assert!(is_arp_reply(&frame, GUEST_GATEWAY));
        assert!(!is_arp_reply(&frame, GUEST_NAME_SERVER));
        assert!(!is_arp_reply(&frame[..20], GUEST_GATEWAY));
    }
}
