//! The bodies of the requests that set a VM up, and why each is as it is.

use fcvm_types::ByteSize;
use fcvm_types::guest::{CHANNEL_ARGUMENT, DISKS_ARGUMENT, VSOCK_CHANNEL};
use serde::{Deserialize, Serialize};

use super::NAME;
use crate::error::HypervisorError;
use crate::spec::{DiskFormat, DiskSpec, HardwareSpec, NetworkBackend, NetworkSpec};
use crate::version::Version;

/// Address of the guest on its own vsock: any number from 3 on, as no two VMs share one.
const GUEST_CID: u32 = 3;
/// Name of the socket that stands behind the guest's vsock.
pub(super) const VSOCK_NAME: &str = "vsock";

/// The virtual hardware, and the Firecracker that made it. A snapshot can be loaded only by the same,
/// which brings the hardware with it; what stands behind it has to fit.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceLine {
    /// Firecracker's version.
    pub firecracker_version: Version,
    /// Virtual processors.
    pub cpu_count: u32,
    /// Size of the memory.
    pub memory_bytes: u64,
    /// The disks in their order: the serial number of each, and whether it can be written to.
    pub disks: Vec<(String, bool)>,
    /// Whether there is a network card.
    pub has_network: bool,
}

impl DeviceLine {
    pub(super) fn new(hardware: &HardwareSpec, firecracker_version: Version) -> Self {
        let disks = hardware.disks.iter();
        Self {
            firecracker_version,
            cpu_count: hardware.cpu_count,
            memory_bytes: hardware.memory.size().bytes(),
            disks: disks
                .map(|disk| (disk.serial.clone(), !disk.read_only))
                .collect(),
            has_network: hardware.network.is_some(),
        }
    }

    /// What of `saved` this hardware is not, as one clause; nothing where they are the same.
    pub fn difference(&self, saved: &Self) -> Option<String> {
        if self.firecracker_version != saved.firecracker_version {
            return Some(format!(
                "it was made by {NAME} {} and this is {NAME} {}",
                saved.firecracker_version, self.firecracker_version
            ));
        }
        let parts = [
            ("processors", saved.cpu_count == self.cpu_count),
            ("memory", saved.memory_bytes == self.memory_bytes),
            ("disks", saved.disks == self.disks),
            ("network cards", saved.has_network == self.has_network),
        ];
        let (part, _) = parts.into_iter().find(|(_, is_same)| !is_same)?;
        Some(format!("it was made with other {part} than this VM has"))
    }
}

#[derive(Serialize)]
pub(super) struct MachineConfiguration {
    vcpu_count: u32,
    mem_size_mib: u64,
    smt: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    huge_pages: Option<&'static str>,
}

impl MachineConfiguration {
    pub(super) fn new(
        cpu_count: u32,
        memory: ByteSize,
        hugepages: bool,
    ) -> Result<Self, HypervisorError> {
        const MIB: u64 = 1 << 20;
        if !memory.bytes().is_multiple_of(MIB) {
            return Err(HypervisorError::InvalidSpec {
                what: format!("{memory} of memory"),
                reason: format!("{NAME} takes whole MiB"),
            });
        }
        if hugepages {
            super::hugepages::check(memory)?;
        }
        Ok(Self {
            vcpu_count: cpu_count,
            mem_size_mib: memory.bytes() / MIB,
            // Odd numbers of processors are refused with it.
            smt: false,
            huge_pages: hugepages.then_some("2M"),
        })
    }
}

#[derive(Serialize)]
pub(super) struct BootSource {
    pub(super) kernel_image_path: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) initrd_path: Option<String>,
    pub(super) boot_args: String,
}

/// The kernel's command line.
pub(super) fn kernel_arguments(disks: &[DiskSpec], pci: bool, extra: &[String]) -> String {
    let serials: Vec<&str> = disks.iter().map(|disk| disk.serial.as_str()).collect();
    let mut arguments = vec![
        // `quiet` keeps warnings, errors and panics, which is what the console log is for.
        "console=ttyS0 quiet".to_owned(),
        // A reset through the keyboard's controller is what Firecracker ends by. A panic resets at
        // once.
        "reboot=k panic=-1".to_owned(),
        // There is nothing behind that controller: looking for mice and keyboards takes long.
        "i8042.noaux i8042.nomux i8042.dumbkbd".to_owned(),
        // Self tests of the ciphers: the largest part of a boot that can be left out.
        "cryptomgr.notests".to_owned(),
        "random.trust_cpu=on".to_owned(),
        format!("{CHANNEL_ARGUMENT}={VSOCK_CHANNEL}"),
    ];
    if !pci {
        // Devices are memory-mapped: there is no bus to be looked for.
        arguments.push("pci=off".to_owned());
    }
    if !serials.is_empty() {
        // Firecracker makes the disks' serial numbers itself.
        arguments.push(format!("{DISKS_ARGUMENT}={}", serials.join(",")));
    }
    arguments.extend_from_slice(extra);
    arguments.join(" ")
}

#[derive(Serialize)]
pub(super) struct Drive {
    pub(super) drive_id: String,
    path_on_host: String,
    is_root_device: bool,
    is_read_only: bool,
    cache_type: &'static str,
}

impl Drive {
    /// The disk as Firecracker is told of it: its path is a link of the same name.
    pub(super) fn new(index: usize, disk: &DiskSpec) -> Result<Self, HypervisorError> {
        let is_raw = |layers: &[_]| layers.len() == 1;
        if !is_raw(&disk.layers) || disk.layers[0].format != DiskFormat::Raw {
            return Err(HypervisorError::InvalidSpec {
                what: format!("the disk '{}' of {} layers", disk.serial, disk.layers.len()),
                reason: format!("{NAME} takes one raw file"),
            });
        }
        let name = format!("disk{index}");
        Ok(Self {
            path_on_host: name.clone(),
            drive_id: name,
            // The agent finds the root: nothing is to be said of it to the kernel.
            is_root_device: false,
            is_read_only: disk.read_only,
            // The disk ends with its VM and so can not outlive a crash of the host: the guest's
            // flushes need not reach the medium.
            cache_type: "Unsafe",
        })
    }
}

#[derive(Serialize)]
pub(super) struct NetworkInterface {
    pub(super) iface_id: &'static str,
    guest_mac: String,
    pub(super) host_dev_name: String,
}

impl NetworkInterface {
    pub(super) fn new(network: &NetworkSpec) -> Result<Self, HypervisorError> {
        let NetworkBackend::Tap { name, .. } = &network.backend else {
            return Err(HypervisorError::InvalidSpec {
                what: "a user-mode network".to_owned(),
                reason: format!("{NAME} takes tap devices only"),
            });
        };
        Ok(Self {
            iface_id: "net0",
            guest_mac: network.mac.map(|byte| format!("{byte:02x}")).join(":"),
            host_dev_name: name.clone(),
        })
    }
}

#[derive(Serialize)]
pub(super) struct Vsock {
    guest_cid: u32,
    uds_path: &'static str,
}

/// The agent's channel.
pub(super) const VSOCK: Vsock = Vsock {
    guest_cid: GUEST_CID,
    uds_path: VSOCK_NAME,
};

/// A source of random numbers, without a limit to its rate.
#[derive(Serialize)]
pub(super) struct Entropy {}

#[derive(Serialize)]
pub(super) struct Action {
    pub(super) action_type: &'static str,
}

#[derive(Serialize)]
pub(super) struct VmState {
    pub(super) state: &'static str,
}
