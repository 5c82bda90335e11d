//! Which hypervisor runs a VM, and why.
//!
//! Firecracker is the one of choice: smallest and fastest to start. It needs KVM, and is not what has
//! everything. All that speaks against it is in this file.

use std::path::PathBuf;

use anyhow::{anyhow, bail};
use fcvm_hypervisor::HypervisorKind;
use fcvm_hypervisor::firecracker::CPU_COUNT_MAX;
use fcvm_kernel::{Devices, GuestKernel};
use fcvm_storage::StorageError;

use crate::args::DiskStoreChoice;
use crate::args::run::{AcceleratorChoice, HypervisorChoice, NetworkMode, RunArguments};
use crate::context::Context;

/// The hypervisor of a VM.
pub(super) struct Chosen {
    pub(super) kind: HypervisorKind,
    /// Why, where nobody asked for it.
    pub(super) reason: Option<String>,
    /// It runs under its jailer.
    pub(super) jail: bool,
    /// What the guest boots with.
    pub(super) initramfs: PathBuf,
}

/// Chooses the hypervisor, which has the modules that it needs in the guest's initramfs.
pub(super) fn choose(
    context: &Context,
    arguments: &RunArguments,
    kernel: &GuestKernel,
) -> anyhow::Result<Chosen> {
    let initramfs = |kind| {
        let devices = match (kind, arguments.start.pci) {
            (HypervisorKind::Qemu, _) => Devices::Qemu,
            (HypervisorKind::Firecracker, false) => Devices::Firecracker,
            (HypervisorKind::Firecracker, true) => Devices::FirecrackerPci,
        };
        crate::commands::setup::initramfs(context, kernel, devices)
    };
    let (kind, reason) = match arguments.start.hypervisor {
        HypervisorChoice::Qemu => (HypervisorKind::Qemu, None),
        HypervisorChoice::Firecracker => (HypervisorKind::Firecracker, None),
        HypervisorChoice::Auto => {
            let found = is_firecracker_possible(context, arguments).and_then(|found| {
                initramfs(HypervisorKind::Firecracker)?;
                Ok(format!("KVM is usable and {found} is there"))
            });
            match found {
                Ok(reason) => (HypervisorKind::Firecracker, Some(reason)),
                Err(error) => (HypervisorKind::Qemu, Some(format!("{error:#}"))),
            }
        }
    };
    if let Some(reason) = &reason {
        tracing::debug!(target: "vm", "the hypervisor is {kind}: {reason}");
    }
    for (is_wanted, option, what) in [
        (arguments.start.pci, "--pci", "a PCI bus"),
        (arguments.hugepages, "--hugepages", "pages of 2 MiB"),
    ] {
        if is_wanted && kind == HypervisorKind::Qemu {
            bail!(
                "{option} cannot be had: {}",
                not_qemus(what, reason.as_deref())
            );
        }
    }
    let shares = arguments.warm || arguments.standby > 0;
    // A jail has a copy of memory that is there already, which these options are to spare.
    let wanted = arguments.jail.or(shares.then_some(false));
    Ok(Chosen {
        jail: jail(context, wanted, kind, reason.as_deref())?,
        initramfs: initramfs(kind)?,
        kind,
        reason,
    })
}

/// Why a VM of QEMU's has not what Firecracker has.
fn not_qemus(what: &str, reason: Option<&str>) -> String {
    match reason {
        Some(reason) => format!("Firecracker has {what}, and QEMU runs the VM: {reason}"),
        None => format!("Firecracker has {what}: choose --hypervisor firecracker"),
    }
}

/// Whether the VM is jailed. Where nobody said so it is if it can be, and else a note says why not.
fn jail(
    context: &Context,
    wanted: Option<bool>,
    kind: HypervisorKind,
    reason: Option<&str>,
) -> anyhow::Result<bool> {
    let is_root = rustix::process::geteuid().is_root();
    let jailer = match kind {
        HypervisorKind::Qemu => Err(anyhow!(not_qemus("a jailer", reason))),
        HypervisorKind::Firecracker => {
            let firecracker = crate::owner::firecracker(context, &context.runtime_dir)?;
            match is_root {
                true => crate::owner::jailer(context, &firecracker),
                false => Err(anyhow!("the jailer needs root")),
            }
        }
    };
    match (wanted, jailer) {
        (Some(false), _) => Ok(false),
        (_, Ok(_)) => Ok(true),
        (Some(true), Err(obstacle)) => bail!("--jail cannot be had: {obstacle:#}"),
        // Nothing can be written in the data directory, with a jail or without.
        (None, Err(obstacle)) if obstacle.is::<StorageError>() => Err(obstacle),
        (None, Err(obstacle)) => {
            // Without root nobody expects one.
            if kind == HypervisorKind::Firecracker && is_root {
                tracing::warn!(target: "vm", "the VM is not jailed: {obstacle:#}; --jail=false says that this is wanted");
            }
            Ok(false)
        }
    }
}

/// Refuses what was asked for together with `--hypervisor firecracker` and is not there.
pub(super) fn refuse_what_firecracker_has_not(arguments: &RunArguments) -> anyhow::Result<()> {
    if arguments.start.accel == AcceleratorChoice::Tcg {
        bail!(
            "--hypervisor firecracker runs with KVM only: leave out --accel tcg, or choose --hypervisor qemu"
        );
    }
    if let Some((what, instead)) = missing(arguments) {
        bail!(
            "{what} is not in this version yet with --hypervisor firecracker: {instead}, or choose qemu"
        );
    }
    Ok(())
}

/// What is asked for that Firecracker's VMs do not have, and what to do in its place.
fn missing(arguments: &RunArguments) -> Option<(&'static str, &'static str)> {
    if arguments.start.cpus > CPU_COUNT_MAX {
        return Some(("a VM of more than 32 processors", "give it fewer"));
    }
    None
}

/// The Firecracker that can run this VM, or what speaks against it.
fn is_firecracker_possible(context: &Context, arguments: &RunArguments) -> anyhow::Result<String> {
    if let Some((what, _)) = missing(arguments) {
        bail!("{what} is not in this version yet with Firecracker");
    }
    if arguments.start.accel == AcceleratorChoice::Tcg {
        bail!("--accel tcg is QEMU's");
    }
    if context.disk_store == DiskStoreChoice::Overlay {
        bail!("--disk-store overlay is QEMU's");
    }
    let firecracker = crate::owner::firecracker(context, &context.runtime_dir)?;
    if arguments.start.network == NetworkMode::Rootless {
        fcvm_network::check_tap(context.find_program("passt").as_deref())?;
    }
    let kvm = crate::commands::setup::probe(context).kvm;
    if !kvm.is_usable() {
        bail!("KVM is {kvm}");
    }
    let version = firecracker.check_version()?;
    Ok(format!(
        "Firecracker {version} at {}",
        firecracker.program().display()
    ))
}
