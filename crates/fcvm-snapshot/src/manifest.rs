//! What is written down of a snapshot: `manifest.json`.

use std::fmt;
use std::path::PathBuf;

use fcvm_storage::DiskManifest;
use fcvm_types::{SnapshotTag, VmId, VmName};
use serde::{Deserialize, Serialize};
use serde_json::value::{RawValue, Value};
use time::OffsetDateTime;

use crate::error::SnapshotError;

/// Version that is written and read.
pub const VERSION: u32 = 1;
/// Longest manifest that is read.
pub const MANIFEST_BYTES_MAX: usize = 1 << 20;

/// Identifier of a snapshot: 32 lower-case hexadecimal characters, random. A later snapshot of the same
/// tag has another.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct SnapshotId(VmId);

impl SnapshotId {
    pub(crate) fn new(bits: VmId) -> Self {
        Self(bits)
    }

    /// All 32 characters.
    pub fn as_str(&self) -> &str {
        self.0.as_str()
    }
}

impl TryFrom<String> for SnapshotId {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let id: Result<VmId, _> = text.parse();
        id.map(Self)
            .map_err(|_| format!("'{}' is not a snapshot's id", text.escape_debug()))
    }
}

impl From<SnapshotId> for String {
    fn from(id: SnapshotId) -> Self {
        id.0.into()
    }
}

impl fmt::Display for SnapshotId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// The secret by which the agent of a clone knows its owner. It is not shown by `Debug`.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Mark(String);

impl Mark {
    /// Keeps a secret.
    pub fn new(secret: String) -> Self {
        Self(secret)
    }

    /// The secret.
    pub fn secret(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Mark {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Mark(..)")
    }
}

/// The read-only image that the VM's root file system is on. It is not part of the snapshot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RootImage {
    /// Where it is.
    pub path: PathBuf,
    /// Its digest, by which the image store knows it.
    pub digest: String,
}

/// What the creator of a snapshot tells of it: all that a clone must fit, which this crate keeps and does
/// not look into.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ManifestFields {
    /// The VM that it was made of.
    pub source_id: VmId,
    /// Its name at that time.
    pub source_name: VmName,
    /// The image, as the user named it.
    pub image: String,
    /// Digest of the image's manifest.
    pub image_digest: String,
    /// What the guest's root file system is on.
    pub root_image: RootImage,
    /// How the VM was started.
    pub spec: Value,
    /// Hypervisor and its version.
    pub hypervisor: String,
    /// The devices that the state is of.
    pub device_line: Value,
    /// What ran the guest's instructions.
    pub accelerator: Value,
    /// What the guest may use of the host's processor.
    pub host_cpu: String,
    /// The agent's secret.
    pub mark: Mark,
    /// How long each stage took, in microseconds, in order.
    pub timings_us: Vec<(String, u64)>,
}

/// What a memory file holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MemoryKind {
    /// All pages that are not zero.
    Whole,
    /// Those that differ from the parent's memory.
    Difference,
}

/// The memory file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MemoryManifest {
    /// Size of the guest's memory.
    pub memory_bytes: u64,
    /// What it holds.
    pub kind: MemoryKind,
    /// Length of the file.
    pub file_bytes: u64,
    /// Pages that it names.
    pub page_count: u64,
    /// Its checksum, which covers those of all pages: [`fcvm_memory::PageFile::checksum`].
    pub crc32c: u32,
}

/// The file with the state of the devices.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DeviceStateManifest {
    /// Length of the file.
    pub file_bytes: u64,
    /// CRC-32C of its bytes.
    pub crc32c: u32,
}

/// The snapshot that a difference is to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ParentRef {
    /// Its tag.
    pub tag: SnapshotTag,
    /// Its identifier, so that a later one of that tag is not taken for it.
    pub id: SnapshotId,
}

/// What is written down of a snapshot.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// Its tag: the name of its folder.
    pub tag: SnapshotTag,
    /// Its identifier.
    pub id: SnapshotId,
    /// When it was finished.
    #[serde(with = "time::serde::rfc3339")]
    pub created_at: OffsetDateTime,
    /// The memory file.
    pub memory: MemoryManifest,
    /// What a difference is to; a whole snapshot has none.
    pub parent: Option<ParentRef>,
    /// The device state's file.
    pub device_state: DeviceStateManifest,
    /// The disk, where the VM has one.
    pub disk: Option<DiskManifest>,
    /// What the creator tells.
    pub fields: ManifestFields,
}

/// The file: a manifest and the checksum of its bytes.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Envelope<'a> {
    version: u32,
    crc32c: String,
    #[serde(borrow)]
    snapshot: &'a RawValue,
}

/// What every version has.
#[derive(Deserialize)]
struct Versioned {
    version: u32,
}

/// What is looked for in a manifest that cannot be used: whether it still needs another snapshot.
#[derive(Deserialize)]
struct LooseEnvelope {
    snapshot: LooseManifest,
}

#[derive(Deserialize)]
struct LooseManifest {
    parent: Option<ParentRef>,
}

impl Manifest {
    /// Reads the bytes of `manifest.json` of the snapshot `tag`.
    ///
    /// # Errors
    ///
    /// They are no manifest, of a later version, not those that were written, or of another tag.
    pub fn parse(tag: &SnapshotTag, bytes: &[u8]) -> Result<Self, SnapshotError> {
        let damaged =
            |reason: String| SnapshotError::damaged(tag, format!("its manifest {reason}"));
        if bytes.len() > MANIFEST_BYTES_MAX {
            return Err(damaged(format!(
                "is longer than {MANIFEST_BYTES_MAX} bytes"
            )));
        }
        if bytes.last() != Some(&b'\n') {
            return Err(damaged("is cut off".to_owned()));
        }
        let unreadable = |error: serde_json::Error| damaged(format!("cannot be read: {error}"));
        let Versioned { version } = serde_json::from_slice(bytes).map_err(unreadable)?;
        if version > VERSION {
            return Err(SnapshotError::Version {
                tag: tag.clone(),
                found: version,
                known: VERSION,
            });
        }
        let envelope: Envelope<'_> = serde_json::from_slice(bytes).map_err(unreadable)?;
        if version != VERSION || envelope.crc32c != checksum(envelope.snapshot.get()) {
            return Err(damaged(
                "is not what was written: its checksum is wrong".to_owned(),
            ));
        }
        let manifest: Self = serde_json::from_str(envelope.snapshot.get()).map_err(unreadable)?;
        if manifest.tag != *tag {
            return Err(damaged(format!("is of the snapshot '{}'", manifest.tag)));
        }
        let is_difference = manifest.memory.kind == MemoryKind::Difference;
        if is_difference != manifest.parent.is_some() {
            return Err(damaged(
                "tells of a difference to nothing, or of a whole with a parent".to_owned(),
            ));
        }
        Ok(manifest)
    }

    /// The bytes of `manifest.json`.
    ///
    /// # Errors
    ///
    /// It is longer than [`MANIFEST_BYTES_MAX`].
    pub fn encode(&self) -> Result<Vec<u8>, SnapshotError> {
        let refused = |reason: String| SnapshotError::Refused {
            tag: self.tag.clone(),
            reason,
        };
        let encode = || -> serde_json::Result<Vec<u8>> {
            let snapshot = RawValue::from_string(serde_json::to_string(self)?)?;
            let envelope = Envelope {
                version: VERSION,
                crc32c: checksum(snapshot.get()),
                snapshot: &snapshot,
            };
            let mut bytes = serde_json::to_vec(&envelope)?;
            bytes.push(b'\n');
            Ok(bytes)
        };
        let bytes = encode().map_err(|error| refused(format!("its manifest: {error}")))?;
        if bytes.len() > MANIFEST_BYTES_MAX {
            return Err(refused(format!(
                "its manifest has {} bytes, and {MANIFEST_BYTES_MAX} is the most",
                bytes.len()
            )));
        }
        Ok(bytes)
    }
}

/// The parent that a manifest names which is damaged or of a later version, as far as that can be told.
pub(crate) fn loose_parent(bytes: &[u8]) -> Option<ParentRef> {
    let envelope: LooseEnvelope = serde_json::from_slice(bytes).ok()?;
    envelope.snapshot.parent
}

fn checksum(text: &str) -> String {
    format!("{:08x}", crc32c::crc32c(text.as_bytes()))
}
