//! The state record of a VM: what every fcvm process can know of it without asking its owner.
//!
//! The bytes on disk, who writes them and when, are told in docs/format/state-record.md.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use time::OffsetDateTime;

use crate::guest::ExitStatus;
use crate::id::{VmId, VmName};
use crate::ports::PortMapping;

/// Version of the record that this program writes. A record with a higher one is refused.
pub const RECORD_VERSION: u32 = 1;

/// A process, told apart from a later one with the same number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessIdentity {
    /// Process id.
    pub pid: i32,
    /// Start of the process in clock ticks since the host's boot: field 22 of `/proc/PID/stat`.
    pub start_ticks: u64,
}

/// Where a VM is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum VmState {
    /// A clone that was made ready ahead; nobody has asked for it yet.
    Standby,
    /// The owner is acquiring what the VM needs.
    Created,
    /// The hypervisor runs and the container has not started yet.
    Booting,
    /// The container runs.
    Running,
    /// The virtual processors are stopped.
    Paused,
    /// A stop was asked for.
    Stopping,
    /// The container has ended, or the owner has died.
    Exited,
}

/// Result of the health check.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Health {
    /// No check has succeeded yet.
    Starting,
    /// The latest check succeeded.
    Healthy,
    /// Several checks in a row failed.
    Unhealthy,
}

/// Something the owner holds on the host that would outlive its death.
///
/// It is entered in the record before it exists, so that a later command can remove it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Resource {
    /// A file or directory.
    Path {
        /// Where it is.
        path: String,
    },
    /// A helper process; it has its own death signal, and this is the second line of defence.
    Process {
        /// Which one.
        identity: ProcessIdentity,
        /// What it is for: `qemu`, `passt`.
        role: String,
    },
}

/// Where a clone came from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lineage {
    /// Id of the VM whose state it continues.
    pub parent: VmId,
    /// Its name then.
    pub parent_name: VmName,
    /// The snapshot in between; absent for a fork of a running VM.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub snapshot: Option<String>,
    /// The process that serves the snapshot and with which the clone ends.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub serve: Option<ProcessIdentity>,
    /// The snapshot whose memory the VM's own is a difference to, also after forks in between: a
    /// snapshot of it stores only that difference.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub base: Option<SnapshotReference>,
}

/// A snapshot, told apart from a later one with the same tag.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotReference {
    /// Its tag.
    pub tag: String,
    /// Its id.
    pub id: String,
}

/// What became of the start-up cache of a VM (`fcvm run --warm`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum StartCacheState {
    /// The VM continues from it.
    Restored,
    /// The VM was booted, and its started state is to be kept.
    Booted,
    /// The VM was booted, and its started state is kept.
    Kept,
    /// The VM was booted, and its started state could not be kept, or another VM's is.
    NotKept,
}

/// The start-up cache of a VM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StartCache {
    /// Tag of the snapshot.
    pub tag: String,
    /// What became of it.
    pub state: StartCacheState,
}

/// Where a clone's memory comes from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryOrigin {
    /// `file`: mapped, and shared until it is written; `uffd`: brought page by page by a memory server.
    pub backend: String,
    /// Why that was chosen.
    pub reason: String,
}

/// How a VM's writable disk is kept and branched.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskStoreRecord {
    /// `reflink`, `pool`, `overlay` or `copy`.
    pub method: String,
    /// Why it is this one, where the user left the choice.
    #[serde(default)]
    pub reason: Option<String>,
}

/// The state record.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmRecord {
    /// [`RECORD_VERSION`] of the program that wrote it.
    pub version: u32,
    /// Identifier.
    pub id: VmId,
    /// Name.
    pub name: VmName,
    /// State, as of the last write.
    pub state: VmState,
    /// The owner process.
    pub owner: ProcessIdentity,
    /// Image reference as the user wrote it, normalised.
    pub image: String,
    /// Digest of the image's manifest.
    pub image_digest: String,
    /// The container's command line.
    pub command: Vec<String>,
    /// Virtual processors.
    pub cpu_count: u32,
    /// Guest memory in bytes.
    pub memory_bytes: u64,
    /// `qemu` or `firecracker`.
    pub hypervisor: String,
    /// Why it is this one, where the user left the choice.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hypervisor_reason: Option<String>,
    /// `kvm` or `tcg`.
    pub accelerator: String,
    /// `rootless` or `none`; with the backend: `rootless (passt)`.
    pub network: String,
    /// Published ports.
    pub ports: Vec<PortMapping>,
    /// Labels.
    pub labels: BTreeMap<String, String>,
    /// The record is removed when the container has ended (`--rm`).
    pub remove_on_exit: bool,
    /// Signal that `stop` sends first.
    pub stop_signal: i32,
    /// The container has a terminal.
    pub terminal: bool,
    /// When the VM was created.
    #[serde(with = "time::serde::rfc3339")]
    pub created_at: OffsetDateTime,
    /// When the container started.
    #[serde(with = "time::serde::rfc3339::option")]
    pub started_at: Option<OffsetDateTime>,
    /// When it ended.
    #[serde(with = "time::serde::rfc3339::option")]
    pub finished_at: Option<OffsetDateTime>,
    /// How the container ended; absent when the VM was lost with its owner.
    pub exit: Option<ExitStatus>,
    /// Why the VM ended, where the container itself did not end it.
    pub error: Option<String>,
    /// Health, where a check was asked for.
    pub health: Option<Health>,
    /// Where a clone came from; absent for a VM that was booted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lineage: Option<Lineage>,
    /// The start-up cache, where one was asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub start_cache: Option<StartCache>,
    /// Where a clone's memory comes from; absent for a VM that was booted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory_origin: Option<MemoryOrigin>,
    /// How the writable disk is kept; absent until there is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk_store: Option<DiskStoreRecord>,
    /// Microseconds each stage of the start took, in order.
    pub timings_us: Vec<(String, u64)>,
    /// What the owner holds.
    pub resources: Vec<Resource>,
}
