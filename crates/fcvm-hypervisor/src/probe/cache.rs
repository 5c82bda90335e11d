//! Keeping a probe's result until the host boots again.

use std::fs;
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::{HostProbe, KVM_DEVICE};

/// Changes with the probe, so that a newer program asks again.
const PROBE_VERSION: u32 = 1;
/// Most bytes read of a cache file.
const FILE_BYTES_MAX: u64 = 16 << 10;

#[derive(Serialize, Deserialize)]
struct CachedProbe {
    key: ProbeKey,
    probe: HostProbe,
}

/// What a result depends on.
#[derive(PartialEq, Eq, Serialize, Deserialize)]
struct ProbeKey {
    version: u32,
    /// Changes at every boot.
    boot_id: String,
    /// The kernel that runs: a resumed or live-migrated host may have the same boot id.
    kernel: String,
    /// The device's inode and times: it is a new one when KVM's module was loaded again.
    device: Option<(u64, i64, i64)>,
}

impl ProbeKey {
    fn current() -> Option<Self> {
        let device = fs::metadata(KVM_DEVICE).ok();
        Some(Self {
            version: PROBE_VERSION,
            boot_id: fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()?,
            kernel: fs::read_to_string("/proc/sys/kernel/version").ok()?,
            device: device.map(|data| (data.ino(), data.ctime(), data.ctime_nsec())),
        })
    }
}

/// The result in the file, where it is whole and holds for this host as it is now.
pub(super) fn load(path: &Path) -> Option<HostProbe> {
    let mut text = String::new();
    let file = fs::File::open(path).ok()?;
    file.take(FILE_BYTES_MAX).read_to_string(&mut text).ok()?;
    let cached: CachedProbe = serde_json::from_str(&text).ok()?;
    (cached.key == ProbeKey::current()?).then_some(cached.probe)
}

/// Writes the file as a whole or not at all.
pub(super) fn store(path: &Path, probe: &HostProbe) {
    let Some(key) = ProbeKey::current() else {
        return;
    };
    let cached = CachedProbe {
        key,
        probe: probe.clone(),
    };
    if let Err(error) = write(path, &cached) {
        tracing::debug!(
            "cannot keep the probe's result in {}: {error}",
            path.display()
        );
    }
}

fn write(path: &Path, cached: &CachedProbe) -> io::Result<()> {
    let text = serde_json::to_vec(cached)?;
    if let Some(directory) = path.parent() {
        fs::create_dir_all(directory)?;
    }
    let mut partial = path.as_os_str().to_owned();
    partial.push(format!(".{}", std::process::id()));
    let written = fs::write(&partial, text).and_then(|()| fs::rename(&partial, path));
    if written.is_err() {
        let _ = fs::remove_file(&partial);
    }
    written
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::probe::KvmUsability;

    #[test]
    fn result_is_kept_until_something_it_depends_on_changes() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("cache/probe.json");
        let probe = HostProbe {
            kvm: KvmUsability::Emulating {
                reason: "slow".to_owned(),
            },
            tsc_khz: Some(2_250_000),
        };
        assert_eq!(load(&path), None);
        store(&path, &probe);
        assert_eq!(load(&path), Some(probe.clone()));
        assert_eq!(path.parent().unwrap().read_dir().unwrap().count(), 1);
        let text = fs::read_to_string(&path).unwrap();
        let boot_id = ProbeKey::current().unwrap().boot_id;
        fs::write(&path, text.replace(boot_id.trim(), "another boot")).unwrap();
        assert_eq!(load(&path), None);
        fs::write(&path, &text[..text.len() / 2]).unwrap();
        assert_eq!(load(&path), None);
        store(&path, &probe);
        assert_eq!(load(&path), Some(probe));
    }
}
