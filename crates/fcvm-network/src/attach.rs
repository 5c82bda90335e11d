//! Choosing a backend and setting it up.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::Command;

use fcvm_process::HelperProcess;
use fcvm_types::PortMapping;
use fcvm_types::guest::{GuestIpv6, GuestNetwork};

use crate::error::NetworkError;
use crate::host::{HostResolver, HostRoutes};
use crate::passt::{HostLoopback, Shortcomings};
use crate::relay::{ConnectionId, FrameRelay};
use crate::tap::{self, Tap, TapPump};
use crate::{passt, ports};

pub(crate) const GUEST_ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 15);
pub(crate) const GUEST_GATEWAY: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 2);
pub(crate) const GUEST_NAME_SERVER: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 3);
pub(crate) const GUEST_PREFIX: u8 = 24;
/// Address of every guest's interface: each is alone on its link, so it can be the same, and a
/// clone need not change it.
pub(crate) const GUEST_MAC: [u8; 6] = [0x52, 0x54, 0x00, 0xfc, 0x00, 0x0f];

/// libslirp's IPv6 network.
const USER_IPV6_ADDRESS: Ipv6Addr = Ipv6Addr::new(0xfec0, 0, 0, 0, 0, 0, 0, 0x0f);
const USER_IPV6_GATEWAY: Ipv6Addr = Ipv6Addr::new(0xfec0, 0, 0, 0, 0, 0, 0, 0x02);
const USER_MTU: u16 = 1500;

/// What a VM is connected to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NetworkMode {
    /// The host's network, through sockets of an ordinary user.
    Rootless,
    /// Nothing.
    None,
}

/// What the hypervisor's network card can be connected to.
#[derive(Debug)]
pub enum Card {
    /// A stream socket, or the hypervisor's own user-mode network.
    Stream,
    /// A tap device.
    Tap {
        /// A command that calls [`make_tap`](crate::make_tap) with its standard input and ends, such as
        /// the caller's own program with a hidden argument.
        maker: Command,
    },
}

/// What a network is set up from.
#[derive(Debug, Clone, Default)]
pub struct NetworkOptions {
    /// Published ports.
    pub ports: Vec<PortMapping>,
    /// The passt program; the hypervisor's user-mode network is used where it is absent or cannot run.
    pub passt: Option<PathBuf>,
    /// The host's name servers and search domains.
    pub resolver: HostResolver,
    /// The host's routes.
    pub routes: HostRoutes,
}

/// A guest's network: connected from the first, of use after [`ready`](Self::ready). Dropping it
/// takes it down.
#[derive(Debug)]
pub struct Attachment {
    /// What the hypervisor connects the network card to.
    pub backend: Backend,
    /// Address of the guest's interface.
    pub mac: [u8; 6],
    /// How the guest configures its interface; absent where it has none.
    pub guest: Option<GuestNetwork>,
    /// The process that carries the traffic, where there is one. When it ends, so does the network.
    pub helper: Option<HelperProcess>,
    /// What stands between the helper and the hypervisor, so that another hypervisor process can
    /// take the network over.
    pub relay: Option<FrameRelay>,
    /// What stands between the relay and the tap device of a hypervisor that has one. After the relay, so
    /// that it is dropped after it.
    _pump: Option<TapPump>,
    /// The relay's connection that `backend` is the other end of: the current one.
    pub connection: Option<ConnectionId>,
    /// Something that the user should know.
    pub note: Option<String>,
    /// The helper's socket, until it has answered.
    starting: Option<OwnedFd>,
}

impl Attachment {
    fn without_helper(backend: Backend, guest: Option<GuestNetwork>, note: Option<String>) -> Self {
        Self {
            backend,
            mac: GUEST_MAC,
            guest,
            helper: None,
            relay: None,
            _pump: None,
            connection: None,
            note,
            starting: None,
        }
    }

    /// Waits until frames are carried and published ports are open. A hypervisor may be started
    /// meanwhile: what its guest sends waits. Nothing is carried before this was called; a second
    /// call does nothing.
    ///
    /// # Errors
    ///
    /// The helper does not start; it has ended or is ended with the attachment.
    pub async fn ready(&mut self) -> Result<(), NetworkError> {
        let (Some(socket), Some(helper), Some(relay)) =
            (self.starting.take(), &self.helper, &mut self.relay)
        else {
            return Ok(());
        };
        let socket = passt::wait_until_started(helper, socket).await?;
        relay.start(socket).map_err(NetworkError::Setup)
    }
}

/// What the hypervisor connects the network card to.
#[derive(Debug)]
pub enum Backend {
    /// No network card.
    None,
    /// A connected stream socket, by way of the attachment's relay to passt. Both end when the last
    /// copy of it is closed and no other hypervisor is connected to the relay.
    Passt(OwnedFd),
    /// A tap device, by way of the attachment's relay to passt.
    Tap(Tap),
    /// The hypervisor's own user-mode network.
    User {
        /// Ports that it publishes.
        forwards: Vec<PortMapping>,
        /// It has IPv6.
        ipv6: bool,
    },
}

impl Backend {
    /// `none`, `passt`, `tap` or `user`.
    pub fn name(&self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Passt(_) => "passt",
            Self::Tap(_) => "tap",
            Self::User { .. } => "user",
        }
    }
}

/// Sets a network up, without waiting for what carries it: see [`Attachment::ready`]. Must be called within a
/// tokio runtime, on a thread that outlives the network (see [`fcvm_process::HelperCommand`]).
///
/// # Errors
///
/// A port can not be published, passt can not be run, or there can be no tap device. Nothing is left of
/// the network then.
pub async fn attach(
    mode: NetworkMode,
    options: &NetworkOptions,
    card: Card,
) -> Result<Attachment, NetworkError> {
    match (mode, &options.passt, card) {
        (NetworkMode::None, ..) => no_network(options),
        (NetworkMode::Rootless, Some(program), Card::Stream) if tap::is_passt_allowed() => {
            let (attachment, socket) = passt_network(program, options)?;
            Ok(Attachment {
                backend: Backend::Passt(socket),
                ..attachment
            })
        }
        (NetworkMode::Rootless, Some(program), Card::Tap { maker }) => {
            tap::check_tap(Some(program))?;
            // Ports that cannot be published are known before anything is made.
            let (attachment, socket) = passt_network(program, options)?;
            let (tap, own_end) = tap::create(maker).await?;
            Ok(Attachment {
                backend: Backend::Tap(tap),
                _pump: Some(TapPump::start(own_end, socket).map_err(NetworkError::Setup)?),
                ..attachment
            })
        }
        (NetworkMode::Rootless, _, Card::Stream) => user_network(options),
        (NetworkMode::Rootless, None, Card::Tap { .. }) => Err(NetworkError::NoPasst),
    }
}

fn no_network(options: &NetworkOptions) -> Result<Attachment, NetworkError> {
    if let Some(port) = options.ports.first() {
        return Err(NetworkError::PortsWithoutNetwork { port: port.clone() });
    }
    Ok(Attachment::without_helper(Backend::None, None, None))
}

/// passt behind a relay, and the hypervisor's end of that.
fn passt_network(
    program: &Path,
    options: &NetworkOptions,
) -> Result<(Attachment, OwnedFd), NetworkError> {
    ports::check(&options.ports, options.routes.has_ipv6())?;
    let (loopback, note) = if options.ports.is_empty() {
        (HostLoopback::Hidden, None)
    } else {
        let shortcomings = Shortcomings::of(program);
        let ports = &options.ports;
        (shortcomings.host_loopback(ports), shortcomings.note(ports))
    };
    let guest = passt::guest(&options.resolver, &options.routes);
    let relay = FrameRelay::new().map_err(NetworkError::Setup)?;
    let (connection, hypervisor) = relay.connect().map_err(NetworkError::Setup)?;
    // It was made a moment ago, so it is there.
    let _ = relay.activate(connection);
    let (helper, socket) =
        passt::start(program, &options.ports, &options.routes, &guest, loopback)?;
    let attachment = Attachment {
        helper: Some(helper),
        relay: Some(relay),
        connection: Some(connection),
        starting: Some(socket),
        ..Attachment::without_helper(Backend::None, Some(guest), note)
    };
    Ok((attachment, hypervisor))
}

fn user_network(options: &NetworkOptions) -> Result<Attachment, NetworkError> {
    let (no_passt, advice, only_ipv4) = match options.passt {
        None => (
            "passt is not installed",
            "install the package passt",
            "QEMU's user-mode network listens on IPv4 addresses only; install passt",
        ),
        Some(_) => (
            "passt needs a user namespace and this host forbids them",
            "allow them (user.max_user_namespaces, kernel.unprivileged_userns_clone)",
            "QEMU's user-mode network listens on IPv4 addresses only; allow user namespaces, which passt needs",
        ),
    };
    let is_ipv6 = |port: &&PortMapping| matches!(port.host_address, Some(IpAddr::V6(_)));
    if let Some(port) = options.ports.iter().find(is_ipv6) {
        return Err(NetworkError::NoIpv6 {
            port: port.clone(),
            reason: only_ipv4,
        });
    }
    ports::check(&options.ports, false)?;
    let ipv6 = options.routes.has_ipv6();
    let guest = GuestNetwork {
        address: GUEST_ADDRESS,
        prefix_length: GUEST_PREFIX,
        gateway: GUEST_GATEWAY,
        ipv6: ipv6.then_some(GuestIpv6 {
            address: USER_IPV6_ADDRESS,
            prefix_length: 64,
            gateway: USER_IPV6_GATEWAY,
        }),
        dns_servers: vec![GUEST_NAME_SERVER.into()],
        dns_search: options.resolver.search.clone(),
        mtu: USER_MTU,
    };
    let backend = Backend::User {
        forwards: options.ports.clone(),
        ipv6,
    };
    let note = format!(
        "{no_passt}, so the VM has QEMU's user-mode network: slower, without published ports on IPv6, and the guest \
         reaches the services of the host's loopback at 10.0.2.2; {advice}"
    );
    Ok(Attachment::without_helper(backend, Some(guest), Some(note)))
}
