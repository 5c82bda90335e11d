//! Settling what a dead owner left: its helper processes, files and its record.

use std::path::Path;

use anyhow::Context as _;
use fcvm_hypervisor::firecracker::{is_cgroup, remove_cgroup};
use fcvm_types::VmId;
use fcvm_types::record::{Resource, VmRecord, VmState};

use super::{StateStore, is_ghost, read_record, remove_tree};

impl StateStore {
    /// Releases what a dead owner held and ends its record; `None` when the record is gone (--rm).
    pub(super) fn settle(&self, id: &VmId, locked: bool) -> anyhow::Result<Option<VmRecord>> {
        // The data directory of an installation that cannot be written is still listed.
        let _lock = if locked { None } else { Some(self.lock()?) };
        let paths = self.paths(id);
        // Another command may have settled it while this one waited.
        let Ok(Some(mut record)) = read_record(&paths.record()) else {
            return Ok(None);
        };
        if !is_ghost(&record) {
            return Ok(Some(record));
        }
        for resource in &record.resources {
            release(resource)?;
        }
        remove_tree(&paths.runtime)?;
        tracing::debug!(
            "{}: settled: its owner {} is gone",
            record.name,
            record.owner.pid
        );
        if record.remove_on_exit {
            remove_tree(&paths.directory)?;
            return Ok(None);
        }
        record.state = VmState::Exited;
        record.resources.clear();
        record.finished_at = last_modified(&paths.container_log())
            .or(record.started_at)
            .or(Some(record.created_at));
        record.error = Some(format!("the owner process {} died", record.owner.pid));
        self.write(&record)?;
        Ok(Some(record))
    }
}

/// Removes what a record says its owner held.
fn release(resource: &Resource) -> anyhow::Result<()> {
    match resource {
        Resource::Process { identity, .. } => {
            fcvm_process::kill(*identity);
            Ok(())
        }
        Resource::Path { path } => {
            let path = Path::new(path);
            let removed = if is_cgroup(path) {
                remove_cgroup(path)
            } else if path.is_dir() {
                std::fs::remove_dir_all(path)
            } else {
                std::fs::remove_file(path)
            };
            match removed {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error)
                    .with_context(|| format!("cannot remove the leftover {}", path.display())),
                _ => Ok(()),
            }
        }
    }
}

fn last_modified(path: &Path) -> Option<time::OffsetDateTime> {
    Some(std::fs::metadata(path).ok()?.modified().ok()?.into())
}
