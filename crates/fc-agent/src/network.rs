//! The guest's network from its plan: interfaces, addresses, routes, kernel settings.

use std::net::IpAddr;
use std::os::fd::OwnedFd;

use fcvm_types::guest::GuestNetwork;
use fcvm_wire::Failure;

use crate::console;
use crate::failure::{Context, guest, reason};
use crate::netlink;

const LOOPBACK_INDEX: u32 = 1;

/// Sets loopback up and, where the plan has a network, the one other interface.
pub(crate) fn configure(plan: Option<&GuestNetwork>) -> Result<(), Failure> {
    // As Docker and Podman: ordinary users may ping and serve low ports.
    write_setting("ipv4/ping_group_range", "0 2147483647");
    write_setting("ipv4/ip_unprivileged_port_start", "0");
    let socket = netlink::open_route().context("opening a netlink socket")?;
    netlink::exchange(&socket, &netlink::link_up(LOOPBACK_INDEX, None))
        .context("setting the loopback interface up")?;
    match plan {
        Some(plan) => configure_interface(&socket, plan),
        None => Ok(()),
    }
}

fn configure_interface(socket: &OwnedFd, plan: &GuestNetwork) -> Result<(), Failure> {
    let name = interface_name()?;
    let index = rustix::net::netdevice::name_to_index(socket, &name)
        .context("looking for the network interface")?;
    // The addresses are the plan's alone: none is learned from router advertisements, and on a link
    // of two there is nobody to have the same one.
    write_setting(&format!("ipv6/conf/{name}/accept_ra"), "0");
    write_setting(&format!("ipv6/conf/{name}/accept_dad"), "0");
    let exchange = |request: Vec<u8>, what: &str| netlink::exchange(socket, &request).context(what);
    exchange(
        netlink::link_up(index, Some(u32::from(plan.mtu))),
        "setting the network interface up",
    )?;
    let address = IpAddr::V4(plan.address);
    exchange(
        netlink::add_address(index, address, plan.prefix_length),
        "setting the IPv4 address",
    )?;
    exchange(
        netlink::add_default_route(index, IpAddr::V4(plan.gateway)),
        "setting the IPv4 route",
    )?;
    let Some(ipv6) = &plan.ipv6 else {
        return Ok(());
    };
    let address = IpAddr::V6(ipv6.address);
    let added = exchange(
        netlink::add_address(index, address, ipv6.prefix_length),
        "setting the IPv6 address",
    )
    .and_then(|()| {
        exchange(
            netlink::add_default_route(index, IpAddr::V6(ipv6.gateway)),
            "setting the IPv6 route",
        )
    });
    // A kernel without IPv6 runs the container all the same.
    if let Err(failure) = added {
        console::line(&failure.message);
    }
    Ok(())
}

fn interface_name() -> Result<String, Failure> {
    let entries = std::fs::read_dir("/sys/class/net").context("reading /sys/class/net")?;
    entries
        .flatten()
        .filter_map(|entry| entry.file_name().into_string().ok())
        .find(|name| name != "lo")
        .ok_or_else(|| guest("the guest has no network interface, and its plan asks for one"))
}

fn write_setting(name: &str, value: &str) {
    if let Err(error) = std::fs::write(format!("/proc/sys/net/{name}"), value) {
        let errno = rustix::io::Errno::from_io_error(&error).unwrap_or(rustix::io::Errno::IO);
        console::line(&format!("net/{name} cannot be set: {}", reason(errno)));
    }
}
