//! Firecracker.
//!
//! The bodies of the requests, with the reasons for them, are in `configuration.rs`; starting and
//! watching the process in `launch.rs`; snapshots in `snapshot.rs`; the control channel (HTTP over a
//! Unix socket) in `api.rs`; finding the program in `probe.rs`; released programs in `release.rs`; what
//! it finds in its directory in `place.rs`, the jailer in `jail.rs`, its counters in `metrics.rs`, and memory in pages of 2 MiB in
//! `hugepages.rs`.
//!
//! What a VM is made of reaches Firecracker as descriptors all the same: the paths that it is told
//! are links in the VM's own directory that lead to its inherited descriptors, so that disks need
//! no name. Its two sockets have to have one, in that directory, which no other user can enter.
//!
//! MMDS, Firecracker's service for the guest's metadata, is not used: it needs a network card, is
//! reachable for every process of the container and is empty in a clone. The plan travels over the
//! agent channel, as it does under QEMU.

mod api;
mod configuration;
mod hugepages;
mod jail;
mod launch;
mod metrics;
mod place;
mod probe;
pub mod release;
mod snapshot;

pub use configuration::DeviceLine;
pub use jail::{Jail, is_cgroup, remove_cgroup};
pub use launch::{CPU_COUNT_MAX, FirecrackerVm};
pub use metrics::Counters;
pub use probe::{Firecracker, MINIMUM_VERSION};
pub use snapshot::{FirecrackerStandby, SavedMemory};

/// The hypervisor's name in messages.
const NAME: &str = "Firecracker";
