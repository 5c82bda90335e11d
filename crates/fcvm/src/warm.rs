//! Start-up caches: snapshots of the started state of images, found by what that state depends on.
//!
//! They are snapshots like others under tags of their own, docs/format/snapshot.md.

use std::os::unix::fs::MetadataExt;
use std::path::Path;

use anyhow::Context as _;
use fcvm_hypervisor::HypervisorKind;
use fcvm_image::Digest;
use fcvm_snapshot::{Listed, Snapshot, SnapshotError};
use fcvm_types::SnapshotTag;
use fcvm_types::guest::ProcessPlan;
use serde::Serialize;

use crate::args::run::NetworkMode;
use crate::commands::snapshot::create::host_cpu;
use crate::context::Context;
use crate::owner::spec::{HealthProbe, VmSpec};
use crate::owner::{accelerator, firecracker, qemu};

/// Version of what is in a key.
const KEY_VERSION: u32 = 3;
/// Beginning of the tags.
const TAG_PREFIX: &str = "warm-";
/// Hexadecimal characters of the key in a tag.
const TAG_KEY_LENGTH: usize = 16;

/// What a started state depends on.
#[derive(Serialize)]
struct Key<'a> {
    version: u32,
    image_digest: &'a str,
    root_image: FileKey,
    process: ProcessPlan,
    read_only: bool,
    privileged: bool,
    cpu_count: u32,
    memory_bytes: u64,
    disk_bytes: u64,
    network: NetworkMode,
    passt: bool,
    kernel: FileKey,
    /// Its name has the digest of the agent and the modules in it.
    initramfs: &'a Path,
    hypervisor: &'static str,
    pci: bool,
    program: FileKey,
    accelerator: &'static str,
    host_cpu: String,
    /// What the state's health check asks; how often does not matter.
    health: Option<&'a HealthProbe>,
}

/// A file, told apart from another one that takes its place.
#[derive(Serialize)]
struct FileKey {
    path: String,
    size_bytes: u64,
    modified: (i64, i64),
}

impl FileKey {
    fn of(path: &Path) -> anyhow::Result<Self> {
        let metadata = std::fs::metadata(path)
            .with_context(|| format!("cannot look at {}", path.display()))?;
        Ok(Self {
            path: path.display().to_string(),
            size_bytes: metadata.len(),
            modified: (metadata.mtime(), metadata.mtime_nsec()),
        })
    }
}

/// The key of the started state of a VM: 64 hexadecimal characters.
pub(crate) fn key(context: &Context, spec: &VmSpec) -> anyhow::Result<String> {
    let accelerator = accelerator(context, spec)?;
    let program = match spec.hypervisor {
        HypervisorKind::Qemu => qemu(context)?.program().to_owned(),
        HypervisorKind::Firecracker => firecracker(context, Path::new(""))?.program().to_owned(),
    };
    // The host name is each VM's own, and is not known to fit any other.
    let own = format!("HOSTNAME={}", spec.hostname);
    let mut process = spec.process.clone();
    process.env.retain(|entry| *entry != own);
    let key = Key {
        version: KEY_VERSION,
        image_digest: &spec.image_digest,
        root_image: FileKey::of(&spec.root_image)?,
        process,
        read_only: spec.read_only,
        privileged: spec.privileged,
        cpu_count: spec.cpu_count,
        memory_bytes: spec.memory_bytes,
        disk_bytes: spec.disk_bytes,
        network: spec.network,
        passt: context.find_program("passt").is_some() && fcvm_network::is_passt_allowed(),
        kernel: FileKey::of(&spec.kernel)?,
        initramfs: &spec.initramfs,
        hypervisor: spec.hypervisor.name(),
        pci: spec.pci,
        program: FileKey::of(&program)?,
        accelerator: accelerator.name(),
        host_cpu: host_cpu(accelerator),
        health: spec.health.as_ref().map(|check| &check.probe),
    };
    Ok(Digest::of(&serde_json::to_vec(&key)?).hex())
}

/// The tag of the cache with this key.
pub(crate) fn tag(key: &str) -> anyhow::Result<SnapshotTag> {
    let beginning = key.get(..TAG_KEY_LENGTH).unwrap_or(key);
    Ok(format!("{TAG_PREFIX}{beginning}").parse()?)
}

/// Whether a tag is that of a cache.
pub(crate) fn is_cache(tag: &SnapshotTag) -> bool {
    tag.as_str().strip_prefix(TAG_PREFIX).is_some_and(|rest| {
        rest.len() == TAG_KEY_LENGTH
            && rest
                .bytes()
                .all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
    })
}

/// What was pruned.
#[derive(Default)]
pub(crate) struct Pruned {
    pub(crate) tags: Vec<SnapshotTag>,
    pub(crate) freed_bytes: u64,
}

/// Removes caches that no run can use any more, or all.
pub(crate) fn prune(context: &Context, all: bool) -> anyhow::Result<Pruned> {
    let store = context.snapshots();
    let mut pruned = Pruned::default();
    for Listed { tag, snapshot } in store.list()? {
        if !is_cache(&tag) || !(all || snapshot.as_ref().map_or(true, is_stale)) {
            continue;
        }
        match store.remove(&tag, false) {
            Ok(removed) => {
                pruned.tags.extend(removed.tags);
                pruned.freed_bytes += removed.freed_bytes;
            }
            // A snapshot of a clone of it is a difference to it; or another command was quicker.
            Err(SnapshotError::Needed { .. } | SnapshotError::NotFound(_)) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(pruned)
}

/// Space of all caches.
pub(crate) fn disk_bytes(context: &Context) -> anyhow::Result<u64> {
    let mut bytes = 0;
    for listed in context.snapshots().list()? {
        if let (true, Ok(snapshot)) = (is_cache(&listed.tag), &listed.snapshot) {
            bytes += snapshot.disk_space()?.own_bytes;
        }
    }
    Ok(bytes)
}

/// What its key has been made of is gone, so that no run will ask for it.
fn is_stale(snapshot: &Snapshot) -> bool {
    let Ok(spec) = serde_json::from_value::<VmSpec>(snapshot.manifest().fields.spec.clone()) else {
        return true;
    };
    [&spec.root_image, &spec.kernel, &spec.initramfs]
        .iter()
        .any(|path| !path.exists())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tags_of_caches_are_told_from_others() {
        let tag = tag(&"0123456789abcdef".repeat(4)).unwrap();
        assert_eq!(tag.as_str(), "warm-0123456789abcdef");
        assert!(is_cache(&tag));
        for other in [
            "warm",
            "warm-1",
            "warm-0123456789abcdeF",
            "warm-0123456789abcdef0",
            "xwarm-0123456789abcdef",
        ] {
            assert!(!is_cache(&other.parse().unwrap()), "{other}");
        }
    }
}
