//! What the VMs of the suite run under: `FCVM_TEST_HYPERVISOR`.

use std::path::PathBuf;

use crate::base::find;

/// What VMs run under where a test does not say it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Hypervisor {
    /// QEMU, with KVM where that runs guests.
    Qemu,
    /// QEMU with KVM.
    QemuKvm,
    /// Firecracker.
    Firecracker,
}

impl Hypervisor {
    /// The suite's.
    pub(crate) fn of_suite() -> Self {
        match std::env::var("FCVM_TEST_HYPERVISOR").as_deref() {
            Err(_) | Ok("qemu") => Self::Qemu,
            Ok("qemu-kvm") => Self::QemuKvm,
            Ok("firecracker") => Self::Firecracker,
            Ok(other) => panic!(
                "FCVM_TEST_HYPERVISOR is '{other}', which is none of qemu, qemu-kvm, firecracker"
            ),
        }
    }

    pub(crate) fn is_qemu(self) -> bool {
        self != Self::Firecracker
    }

    pub(crate) fn needs_kvm(self) -> bool {
        self != Self::Qemu
    }

    /// As `--hypervisor` has it, and records.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Qemu | Self::QemuKvm => "qemu",
            Self::Firecracker => "firecracker",
        }
    }

    /// As messages have it.
    pub(crate) fn title(self) -> &'static str {
        match self {
            Self::Qemu | Self::QemuKvm => "QEMU",
            Self::Firecracker => "Firecracker",
        }
    }

    /// As `--accel` has it.
    pub(crate) fn accelerator(self) -> &'static str {
        match self {
            Self::Qemu | Self::Firecracker => "auto",
            Self::QemuKvm => "kvm",
        }
    }

    /// How the name of its program begins.
    pub(crate) fn process(self) -> &'static str {
        match self {
            Self::Qemu | Self::QemuKvm => "qemu-system",
            Self::Firecracker => "firecracker",
        }
    }

    /// Firecracker's program, where the suite has one.
    pub(crate) fn program(self) -> Option<PathBuf> {
        let named = std::env::var_os("FCVM_FIRECRACKER_BIN").map(PathBuf::from);
        (self == Self::Firecracker)
            .then(|| named.or_else(|| find("firecracker")))
            .flatten()
    }
}
