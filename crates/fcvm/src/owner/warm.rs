//! A VM with a start-up cache: restored from it, or booted and its started state kept in it.
//!
//! The cache makes no VM fail: one that cannot be used is replaced by a boot, and one that cannot be written is
//! told and left out.

use std::cell::RefCell;
use std::path::PathBuf;
use std::rc::Rc;

use anyhow::{Context as _, bail};
use fcvm_snapshot::{SnapshotError, SnapshotStore};
use fcvm_types::SnapshotTag;
use fcvm_types::record::{Health, StartCache, StartCacheState};
use tokio::sync::watch;
use tracing::Instrument;

use super::clone::{self, Source};
use super::spec::VmSpec;
use super::vm::RunningVm;
use super::{Built, Entry, Stopwatch, boot};
use crate::commands::snapshot::create;
use crate::context::Context;

/// The start-up cache of a VM.
pub(crate) struct Cache {
    pub(crate) store: SnapshotStore,
    pub(crate) tag: SnapshotTag,
    pub(crate) found: Found,
    /// The VM is only there for the cache, and ends with its writing; why that failed is told here.
    pub(crate) only_purpose: Option<Failure>,
}

/// Why something failed, once it has.
pub(crate) type Failure = Rc<RefCell<Option<String>>>;

/// What there is.
pub(crate) enum Found {
    /// Nothing yet.
    Nothing,
    /// A started state.
    State(Source),
    /// What cannot be used, and why.
    Unusable(String),
}

/// Makes the VM; gives the cache where it is to be written.
pub(super) async fn build(
    context: &Context,
    spec: &VmSpec,
    mut cache: Box<Cache>,
    entry: &mut Entry,
    watch: &mut Stopwatch,
) -> anyhow::Result<(Built, Option<Box<Cache>>)> {
    let state = |state| StartCache {
        tag: cache.tag.to_string(),
        state,
    };
    let (restored, booted) = (
        state(StartCacheState::Restored),
        state(StartCacheState::Booted),
    );
    let found = std::mem::replace(&mut cache.found, Found::Nothing);
    if let Found::State(source) = found {
        entry.update(|record| {
            record.lineage = Some(source.lineage.clone());
            record.start_cache = Some(restored);
        })?;
        match clone::build(context, spec, source, entry, watch).await {
            Ok(built) => return Ok((built, None)),
            Err(error) => {
                entry.begin_again()?;
                watch.lap("restore given up");
                cache.found = Found::Unusable(crate::errors::one_line(&error));
            }
        }
    } else {
        cache.found = found;
    }
    if let Found::Unusable(reason) = &cache.found {
        tracing::warn!(target: "vm", "the start-up cache cannot be used, and the VM is booted: {reason}");
    }
    entry.update(|record| record.start_cache = Some(booted))?;
    let built = boot::build(context, spec, entry, watch).await?;
    Ok((built, Some(cache)))
}

/// The task that writes the cache.
pub(super) struct Keeping {
    ended: watch::Sender<bool>,
    task: tokio::task::JoinHandle<()>,
}

impl Keeping {
    pub(super) fn start(
        cache: Box<Cache>,
        vm: Rc<RunningVm>,
        mut spec: VmSpec,
        fork_socket: PathBuf,
    ) -> Self {
        let (ended, told) = watch::channel(false);
        let task = async move {
            let only_purpose = cache.only_purpose.clone();
            // That the VM is not to stay is no part of its state.
            spec.remove_on_exit &= only_purpose.is_none();
            let state = match keep(*cache, &vm, spec, fork_socket, told).await {
                Ok(true) => StartCacheState::Kept,
                Ok(false) => StartCacheState::NotKept,
                Err(error) => {
                    match &only_purpose {
                        Some(failure) => *failure.borrow_mut() = Some(format!("{error:#}")),
                        None => {
                            tracing::warn!(target: "vm", "the start-up cache was not written: {error:#}");
                        }
                    }
                    StartCacheState::NotKept
                }
            };
            vm.update(|record| {
                if let Some(cache) = &mut record.start_cache {
                    cache.state = state;
                }
            });
            if only_purpose.is_some() {
                vm.stop(Some(0));
            }
        };
        Self {
            ended,
            task: tokio::task::spawn_local(task.in_current_span()),
        }
    }

    /// The VM has ended: what is not kept yet is not kept, and nothing half is left.
    pub(super) async fn end(self) {
        // It may have ended by itself.
        let _ = self.ended.send(true);
        let _ = self.task.await;
    }
}

/// Waits for the started state and keeps it; tells whether it is kept.
async fn keep(
    cache: Cache,
    vm: &RunningVm,
    spec: VmSpec,
    fork_socket: PathBuf,
    mut ended: watch::Receiver<bool>,
) -> anyhow::Result<bool> {
    let frozen = async {
        if spec.health.is_some() {
            healthy(vm, cache.only_purpose.is_some()).await?;
        }
        if matches!(cache.found, Found::Unusable(_)) {
            remove(&cache)?;
        }
        let draft = match cache.store.begin(&cache.tag) {
            // Another VM of the same kind was quicker.
            Err(SnapshotError::Exists(_) | SnapshotError::Busy(_)) => return Ok(None),
            draft => draft?,
        };
        let record = vm.record.borrow().clone();
        let kept = create::keep(&fork_socket, &record).await?;
        Ok::<_, anyhow::Error>(Some((draft, record, kept)))
    };
    let frozen = tokio::select! {
        biased;
        _ = ended.wait_for(|ended| *ended) => return Ok(false),
        frozen = frozen => frozen?,
    };
    let Some((mut draft, record, kept)) = frozen else {
        return Ok(false);
    };
    // Reading and writing files in a thread: it starts no process, and the VM is not held up.
    let written = tokio::task::spawn_blocking(move || {
        let fields = create::write(&mut draft, &record, &spec, &kept, None)?;
        Ok::<_, anyhow::Error>((draft, fields))
    });
    let (draft, fields) = written.await??;
    if *ended.borrow() {
        // A state that ends so soon is none to start from.
        return Ok(false);
    }
    tokio::task::spawn_blocking(move || draft.finish(fields)).await??;
    Ok(true)
}

fn remove(cache: &Cache) -> anyhow::Result<()> {
    match cache.store.remove(&cache.tag, false) {
        Ok(_) | Err(SnapshotError::NotFound(_)) => Ok(()),
        Err(error) => Err(error).context("the old one cannot be removed"),
    }
}

/// Waits for the health check's first success.
async fn healthy(vm: &RunningVm, only: bool) -> anyhow::Result<()> {
    loop {
        let changed = vm.changed.notified();
        tokio::pin!(changed);
        changed.as_mut().enable();
        let health = vm.record.borrow().health;
        match health {
            Some(Health::Healthy) => return Ok(()),
            Some(Health::Unhealthy) if only => {
                bail!("the health check has failed too often")
            }
            _ => changed.await,
        }
    }
}
