//! `fcvm run --warm`: the started state of an earlier run, loaded by the process that will own the VM.

use fcvm_snapshot::SnapshotError;
use fcvm_types::SnapshotTag;

use crate::commands::snapshot::load;
use crate::context::Context;
use crate::handover::Handover;
use crate::owner::clone::Source;
use crate::owner::spec::VmSpec;
use crate::owner::warm::{Cache, Found};
use crate::owner::{Origin, Stopwatch};

/// What the VM begins with.
pub(super) async fn origin(context: &Context, spec: &mut VmSpec) -> anyhow::Result<Origin> {
    let Some(key) = spec.warm.clone() else {
        return Ok(Origin::Boot);
    };
    let mut watch = Stopwatch::new(std::mem::take(&mut spec.timings_us));
    let cache = Cache {
        store: context.snapshots(),
        tag: crate::warm::tag(&key)?,
        found: find(context, &key).await,
        only_purpose: None,
    };
    watch.lap("start-up cache");
    spec.timings_us = watch.laps;
    Ok(Origin::Warm(Box::new(cache)))
}

/// The cached state of this key, in the hands of a task of this process.
async fn find(context: &Context, key: &str) -> Found {
    match load_cached(context, key).await {
        Ok(source) => source.map_or(Found::Nothing, Found::State),
        Err(error) => Found::Unusable(match error.downcast_ref() {
            // What to do about it is done.
            Some(SnapshotError::Damaged { reason, .. }) => reason.clone(),
            _ => crate::errors::one_line(&error),
        }),
    }
}

async fn load_cached(context: &Context, key: &str) -> anyhow::Result<Option<Source>> {
    let (store, tag) = (context.snapshots(), crate::warm::tag(key)?);
    let loading = tokio::task::spawn_blocking(move || load(&store, &tag));
    let loaded = match loading.await? {
        Err(error) if is_missing(&error) => return Ok(None),
        loaded => loaded?,
    };
    if loaded.spec.warm.as_deref() != Some(key) {
        anyhow::bail!("it is that of another container");
    }
    let (channel, theirs) = Handover::pair()?;
    let theirs = Handover::from_fd(theirs)?;
    let mut lineage = loaded.served(None).lineage;
    // A snapshot of this VM shall not need a cache, which anybody may remove.
    lineage.base = None;
    tokio::task::spawn_local(async move { loaded.give(vec![theirs]).await });
    Ok(Some(Source { channel, lineage }))
}

fn is_missing(error: &anyhow::Error) -> bool {
    matches!(error.downcast_ref(), Some(SnapshotError::NotFound(_)))
}

/// A cache with this tag that a run can use, as far as that takes no reading of all of it.
pub(crate) fn is_there(context: &Context, key: &str, tag: &SnapshotTag) -> anyhow::Result<bool> {
    match context.snapshots().open(tag) {
        Ok(snapshot) => Ok(snapshot.manifest().fields.spec["warm"] == key),
        Err(SnapshotError::NotFound(_) | SnapshotError::Damaged { .. }) => Ok(false),
        Err(error) => Err(error.into()),
    }
}
