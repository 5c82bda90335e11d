//! What can go wrong with a hypervisor.

use std::io;
use std::path::PathBuf;

use crate::version::Version;

/// A failure of a hypervisor, one line each.
#[derive(Debug, thiserror::Error)]
pub enum HypervisorError {
    /// The program is not where it was looked for.
    #[error("{hypervisor} was not found ({program}): {advice}")]
    NotFound {
        /// `QEMU` or `Firecracker`.
        hypervisor: &'static str,
        /// Program looked for: a name, or the path that the caller gave.
        program: String,
        /// How it is had.
        advice: &'static str,
    },
    /// The host is no x86-64 one.
    #[error("VMs on {architecture} are not implemented: {reason}")]
    Architecture {
        /// The host's architecture.
        architecture: &'static str,
        /// What is missing there.
        reason: &'static str,
    },
    /// The program is there and could not be run.
    #[error("cannot run {}: {source}", path.display())]
    Spawn {
        /// The program.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The program did not say what version it is.
    #[error("{} does not answer as {hypervisor} does: {reason}", path.display())]
    Foreign {
        /// `QEMU` or `Firecracker`.
        hypervisor: &'static str,
        /// The program.
        path: PathBuf,
        /// What it did instead.
        reason: String,
    },
    /// The program is of a version that this driver was not made for.
    #[error("{hypervisor} {found} at {} is too {fault}: a version {required} is needed", path.display())]
    Version {
        /// `QEMU` or `Firecracker`.
        hypervisor: &'static str,
        /// The program.
        path: PathBuf,
        /// Its version.
        found: Version,
        /// `old` or `new`.
        fault: &'static str,
        /// The versions that work, in words.
        required: String,
    },
    /// The program lacks a machine type.
    #[error(
        "QEMU at {} has no machine type '{machine}': install one built for this architecture with it",
        path.display()
    )]
    NoMachine {
        /// The program.
        path: PathBuf,
        /// The missing machine type.
        machine: &'static str,
    },
    /// A VM can not be like that.
    #[error("cannot start a VM with {what}: {reason}")]
    InvalidSpec {
        /// The part of the specification.
        what: String,
        /// Why it is refused.
        reason: String,
    },
    /// The host has no more of something that a VM needs.
    #[error("cannot set up {what} of the VM: {source}")]
    Setup {
        /// What was being made.
        what: &'static str,
        /// Why it failed.
        source: io::Error,
    },
    /// The hypervisor ended before the VM ran.
    #[error("the VM did not start: {reason}")]
    ExitedAtStart {
        /// How it ended and its last words.
        reason: String,
    },
    /// The hypervisor did not answer in time.
    #[error(
        "{hypervisor} did not answer '{command}' within {timeout_s} s: it hangs or the host is overloaded"
    )]
    Timeout {
        /// `QEMU` or `Firecracker`.
        hypervisor: &'static str,
        /// The command without an answer.
        command: String,
        /// How long was waited, in seconds.
        timeout_s: u64,
    },
    /// The hypervisor refused a command.
    #[error("{hypervisor} refused '{command}': {reason}")]
    Refused {
        /// `QEMU` or `Firecracker`.
        hypervisor: &'static str,
        /// The command.
        command: String,
        /// Its reason.
        reason: String,
    },
    /// The state of a VM's processors and devices could not be saved or loaded.
    #[error("the device state cannot be {what}: {reason}")]
    State {
        /// `saved` or `loaded`.
        what: &'static str,
        /// What went wrong.
        reason: String,
    },
    /// The control channel has ended, as it does when the hypervisor ends.
    #[error("{hypervisor} has closed its control channel: {reason}")]
    Disconnected {
        /// `QEMU` or `Firecracker`.
        hypervisor: &'static str,
        /// What is known of why.
        reason: String,
    },
}
