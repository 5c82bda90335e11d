//! Networks of VMs: rootless user-mode networking and published ports.
//!
//! [`attach`] makes the host's side of a VM's network interface and says how the guest configures
//! its own. Two backends: passt (`passt.rs`), a process of its own behind a [`FrameRelay`] that the
//! owner keeps, so that the guest's connections can outlive a hypervisor process; and the hypervisor's
//! built-in user-mode network, where passt is missing. Neither needs root. A hypervisor that takes tap
//! devices alone gets one in a network namespace of its own, with passt behind it (`tap/`).
//!
//! What the guest can reach: whatever the host can, by the host's own routes and name servers, the
//! host's own addresses included. Services that the host runs on its loopback alone can not be reached
//! through passt (but for one case, told in a note: a UDP port is published and passt is of before
//! August 2024); through the built-in network they can (at 10.0.2.2), which QEMU has no switch against.
//!
//! The unsafe code that making tap devices needs is in `tap/raw.rs`.
//!
//! Not here: the virtual network card (`fcvm-hypervisor`) and the guest's side of the configuration
//! (`fc-agent`).

#![deny(unsafe_code)]

mod attach;
mod checksum;
mod error;
mod host;
mod passt;
mod ports;
mod relay;
mod tap;

pub use attach::{Attachment, Backend, Card, NetworkMode, NetworkOptions, attach};
pub use error::NetworkError;
pub use host::{HostResolver, HostRoutes};
pub use passt::find_passt;
pub use relay::{ConnectionId, FrameRelay, RelayCounters, RelayEnd};
pub use tap::{Tap, check_tap, is_passt_allowed, make_tap};
