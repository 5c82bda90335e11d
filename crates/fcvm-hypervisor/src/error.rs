//! What can go wrong with a hypervisor.

use std::io;
use std::path::PathBuf;

use crate::qemu::Version;

/// A failure of a hypervisor, one line each.
#[derive(Debug, thiserror::Error)]
pub enum HypervisorError {
    /// The program is not where it was looked for.
    #[error("QEMU was not found ({program}): install the package {package} (its name in Debian)")]
    NotFound {
        /// Program looked for: a name, or the path that the caller gave.
        program: String,
        /// Debian's package that has it.
        package: &'static str,
    },
    /// QEMU's microvm machine is x86-64's.
    #[error("VMs on {architecture} are not implemented: QEMU's microvm machine is for x86-64 only")]
    Architecture {
        /// The host's architecture.
        architecture: &'static str,
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
    #[error("{} does not answer --version as QEMU does: {reason}", path.display())]
    NotQemu {
        /// The program.
        path: PathBuf,
        /// What it did instead.
        reason: String,
    },
    /// The program is older than what this driver was made for.
    #[error("QEMU {found} at {} is too old: version {required} or later is needed", path.display())]
    TooOld {
        /// The program.
        path: PathBuf,
        /// Its version.
        found: Version,
        /// The oldest version that works.
        required: Version,
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
        "QEMU did not answer '{command}' within {timeout_s} s: it hangs or the host is overloaded"
    )]
    Timeout {
        /// The command without an answer.
        command: String,
        /// How long was waited, in seconds.
        timeout_s: u64,
    },
    /// The hypervisor refused a command.
    #[error("QEMU refused '{command}': {reason}")]
    Refused {
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
    #[error("QEMU has closed its control channel: {reason}")]
    Disconnected {
        /// What is known of why.
        reason: String,
    },
}
