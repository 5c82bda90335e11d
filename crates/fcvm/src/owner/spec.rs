//! What an owner process is told to run. A detached owner reads it as JSON on its standard input.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context as _;
use fcvm_hypervisor::HypervisorKind;
use fcvm_types::guest::{GuestIdentity, GuestNetwork, ProcessPlan};
use fcvm_types::{PortMapping, VmId, VmName};
use serde::{Deserialize, Serialize};

use crate::args::run::{AcceleratorChoice, NetworkMode};
use crate::state::VmPaths;

/// A VM to run.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct VmSpec {
    pub(crate) id: VmId,
    pub(crate) name: VmName,
    pub(crate) hostname: String,
    /// Reference of the image, normalised.
    pub(crate) image: String,
    pub(crate) image_digest: String,
    /// Converted root image.
    pub(crate) root_image: PathBuf,
    pub(crate) kernel: PathBuf,
    pub(crate) initramfs: PathBuf,
    pub(crate) process: ProcessPlan,
    pub(crate) read_only: bool,
    pub(crate) privileged: bool,
    pub(crate) extra_hosts: Vec<(IpAddr, String)>,
    pub(crate) cpu_count: u32,
    pub(crate) memory_bytes: u64,
    pub(crate) disk_bytes: u64,
    #[serde(default)]
    pub(crate) hypervisor: HypervisorKind,
    /// Why it is this one, where nobody asked for it.
    #[serde(default)]
    pub(crate) hypervisor_reason: Option<String>,
    /// It runs under its jailer.
    #[serde(default)]
    pub(crate) jail: bool,
    /// Its devices are on a PCI bus.
    #[serde(default)]
    pub(crate) pci: bool,
    /// Its memory is in pages of 2 MiB.
    #[serde(default)]
    pub(crate) hugepages: bool,
    pub(crate) accelerator: AcceleratorChoice,
    pub(crate) network: NetworkMode,
    pub(crate) ports: Vec<PortMapping>,
    pub(crate) dns_servers: Vec<IpAddr>,
    pub(crate) labels: BTreeMap<String, String>,
    pub(crate) remove_on_exit: bool,
    pub(crate) stop_signal: i32,
    pub(crate) stop_timeout: Duration,
    pub(crate) boot_timeout: Duration,
    pub(crate) health: Option<HealthCheck>,
    /// Shell command that a clone runs before it answers anything.
    #[serde(default)]
    pub(crate) on_fork: Option<String>,
    /// Clones that are to be ready before they are asked for.
    #[serde(default)]
    pub(crate) standby: u16,
    /// Key of the start-up cache, where one is wanted: 64 hexadecimal characters.
    #[serde(default)]
    pub(crate) warm: Option<String>,
    /// Stages before the owner began, microseconds.
    pub(crate) timings_us: Vec<(String, u64)>,
}

impl VmSpec {
    /// The specification of a VM that is known to the state store.
    pub(crate) fn of(paths: &VmPaths) -> anyhow::Result<Self> {
        let path = paths.spec();
        let bytes =
            std::fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
        serde_json::from_slice(&bytes).with_context(|| format!("{} is damaged", path.display()))
    }

    /// A shell command in the container, as its user.
    pub(crate) fn shell(&self, command: &str) -> ProcessPlan {
        ProcessPlan {
            args: ["/bin/sh", "-c", command].map(str::to_owned).to_vec(),
            terminal: None,
            stdin: false,
            ..self.process.clone()
        }
    }

    /// What the guest is told of who it is.
    pub(crate) fn identity(&self, network: Option<GuestNetwork>) -> GuestIdentity {
        GuestIdentity {
            hostname: self.hostname.clone(),
            machine_id: self.id.to_string(),
            network,
            extra_hosts: self.extra_hosts.clone(),
        }
    }
}

/// How to see that a service answers.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct HealthCheck {
    pub(crate) probe: HealthProbe,
    pub(crate) interval: Duration,
    pub(crate) timeout: Duration,
    /// After the start; a failure in it does not count.
    pub(crate) start_period: Duration,
    pub(crate) retries: u32,
}

/// What is asked.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) enum HealthProbe {
    /// An `http://` URL, from inside the guest.
    Http(String),
    /// A program in the container and its arguments.
    Command(Vec<String>),
}

/// What a detached owner tells the command that started it, one JSON line.
#[derive(Debug, Serialize, Deserialize)]
#[serde(tag = "report", rename_all = "snake_case")]
pub(crate) enum Readiness {
    /// The container's process has started.
    Started,
    /// It could not be started.
    Failed {
        /// Exit code for the command.
        code: u8,
        /// One line.
        message: String,
    },
}
