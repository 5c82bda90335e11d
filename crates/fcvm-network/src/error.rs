//! What can go wrong with a network.

use std::io;
use std::net::IpAddr;
use std::path::PathBuf;

use fcvm_types::{PortMapping, Protocol};

/// A failure to set a network up, one line each.
#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    /// Ports without a network.
    #[error("cannot publish {port}: the VM has no network (--network none)")]
    PortsWithoutNetwork {
        /// One of the ports.
        port: PortMapping,
    },
    /// Two mappings of one port.
    #[error(
        "cannot publish port {port}/{protocol} of the host twice: publish it once, on all addresses or on one"
    )]
    PortTwice {
        /// Port of the host.
        port: u16,
        /// Its protocol.
        protocol: Protocol,
    },
    /// Something listens there.
    #[error(
        "cannot publish {port}: port {number} of the host is taken; stop what uses it ('ss -lnp' shows it) or publish another port",
        number = port.host_port
    )]
    PortTaken {
        /// The mapping.
        port: PortMapping,
    },
    /// The user may not listen there.
    #[error(
        "cannot publish {port}: ordinary users can listen on ports from {first_free} up; publish one of those, or lower the sysctl net.ipv4.ip_unprivileged_port_start"
    )]
    PortPrivileged {
        /// The mapping.
        port: PortMapping,
        /// The lowest port that ordinary users may listen on.
        first_free: u16,
    },
    /// The address to listen on is none of the host's.
    #[error("cannot publish {port}: {address} is not an address of this host")]
    AddressNotLocal {
        /// The mapping.
        port: PortMapping,
        /// The address.
        address: IpAddr,
    },
    /// The address is an IPv6 one where there is no IPv6.
    #[error("cannot publish {port}: {reason}")]
    NoIpv6 {
        /// The mapping.
        port: PortMapping,
        /// What has no IPv6.
        reason: &'static str,
    },
    /// The host refused to listen for another reason.
    #[error("cannot publish {port}: {source}")]
    Listen {
        /// The mapping.
        port: PortMapping,
        /// The host's reason.
        source: io::Error,
    },
    /// A socket pair could not be made.
    #[error("cannot set up the network of the VM: {0}")]
    Setup(#[source] io::Error),
    /// passt could not be run.
    #[error("cannot run {}: {source}", path.display())]
    Spawn {
        /// The program.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// passt ended while starting.
    #[error("the VM's network did not start: {reason}; --network none starts the VM without one")]
    PasstFailed {
        /// How it ended and its last words.
        reason: String,
    },
    /// passt does not answer.
    #[error("the VM's network did not start: passt did not answer within {timeout_s} s")]
    PasstSilent {
        /// How long was waited, in seconds.
        timeout_s: u64,
    },
    /// A network by way of a tap device without passt.
    #[error(
        "the VM's network needs passt, which was not found: install the package passt, or choose --hypervisor qemu or --network none"
    )]
    NoPasst,
    /// The kernel has no tap devices.
    #[error(
        "the VM's network needs a tap device and there is no /dev/net/tun: load the kernel's module with 'modprobe tun', or choose --hypervisor qemu or --network none"
    )]
    NoTunDevice,
    /// This user may not make tap devices.
    #[error(
        "the VM's network needs a tap device and this user may not open /dev/net/tun: let root run 'chmod 666 /dev/net/tun', as it is on most systems, or choose --hypervisor qemu or --network none"
    )]
    TunForbidden,
    /// This user may not have a network namespace of their own.
    #[error(
        "the VM's network needs a namespace and this user may not make one ({source}): allow user namespaces (sysctls user.max_user_namespaces, kernel.apparmor_restrict_unprivileged_userns), or choose --hypervisor qemu or --network none"
    )]
    NamespaceForbidden {
        /// Why.
        source: io::Error,
    },
    /// A tap device could not be made.
    #[error("cannot make the VM's tap device: {what}: {source}")]
    Tap {
        /// The part that failed.
        what: &'static str,
        /// Why.
        source: io::Error,
    },
    /// The process that makes the tap device does not answer.
    #[error("cannot make the VM's tap device: nothing was heard of it for {timeout_s} s")]
    TapSilent {
        /// How long was waited, in seconds.
        timeout_s: u64,
    },
}
