//! `fcvm prepare`: the started state of an image is kept for `fcvm run --warm`, and no VM is left.

use std::rc::Rc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use fcvm_snapshot::{Snapshot, SnapshotError, SnapshotStore};
use fcvm_types::{ByteSize, SnapshotTag};
use serde_json::json;

use super::run::{make_spec, refuse_what_is_not_there, warm};
use crate::args::Format;
use crate::args::run::{PrepareArguments, RunArguments};
use crate::context::Context;
use crate::output::{age, timestamp};
use crate::owner::warm::{Cache, Failure, Found};
use crate::owner::{self, Front, Origin};

/// Between two looks at what another command writes.
const BUSY_INTERVAL: Duration = Duration::from_millis(50);

pub(crate) async fn run(context: &Context, arguments: PrepareArguments) -> anyhow::Result<u8> {
    let began = Instant::now();
    let format = arguments.format;
    let arguments = as_run(arguments);
    refuse_what_is_not_there(&arguments)?;
    let mut spec = make_spec(context, &context.state()?, &arguments).await?;
    let key = crate::warm::key(context, &spec)?;
    let tag = crate::warm::tag(&key)?;
    let image = spec.image.clone();
    let store = context.snapshots();
    if warm::is_there(context, &key, &tag)? {
        return tell(&store.open(&tag)?, None, format);
    }
    spec.warm = Some(key.clone());
    let unusable = store.directory().join(tag.as_str()).exists();
    let failure = Failure::default();
    let cache = Cache {
        store: store.clone(),
        tag: tag.clone(),
        found: match unusable {
            true => Found::Unusable("it is damaged, or of another container".to_owned()),
            false => Found::Nothing,
        },
        only_purpose: Some(Rc::clone(&failure)),
    };
    let origin = Origin::Warm(Box::new(cache));
    let code = owner::run(context, spec, origin, Front::Nobody).await?;
    settled(&store, &tag).await;
    if !warm::is_there(context, &key, &tag)? {
        let reason = failure.take().unwrap_or_else(|| {
            format!("the container ended (code {code}) before its state was kept")
        });
        bail!("the started state of {image} was not kept: {reason}; 'fcvm run' shows what it says");
    }
    tell(&store.open(&tag)?, Some(began), format)
}

/// Waits until no other command is writing the same.
async fn settled(store: &SnapshotStore, tag: &SnapshotTag) {
    while let Err(SnapshotError::Busy(_)) = store.begin(tag) {
        tokio::time::sleep(BUSY_INTERVAL).await;
    }
}

/// The run that makes it: a VM that is removed when it has ended.
fn as_run(arguments: PrepareArguments) -> RunArguments {
    RunArguments {
        name: None,
        detach: false,
        warm: true,
        rm: true,
        interactive: false,
        tty: false,
        hostname: None,
        add_host: Vec::new(),
        stop_signal: None,
        stop_timeout: 10,
        label: Vec::new(),
        on_fork: None,
        standby: 0,
        publish: Vec::new(),
        jail: None,
        hugepages: false,
        dns: Vec::new(),
        volume: Vec::new(),
        cidfile: None,
        start: arguments.start,
    }
}

/// Tells of the cache, which was made since `began` or was there.
fn tell(snapshot: &Snapshot, began: Option<Instant>, format: Format) -> anyhow::Result<u8> {
    let manifest = snapshot.manifest();
    let space = snapshot.disk_space()?;
    if format == Format::Json {
        let microseconds = began
            .map(|began| u64::try_from(began.elapsed().as_micros()))
            .transpose()
            .context("it took too long to tell")?;
        let value = json!({
            "tag": manifest.tag,
            "id": manifest.id,
            "created_at": timestamp(manifest.created_at),
            "was_there": began.is_none(),
            "duration_microseconds": microseconds,
            "image": manifest.fields.image,
            "image_digest": manifest.fields.image_digest,
            "memory_bytes": manifest.memory.memory_bytes,
            "memory_stored_bytes": manifest.memory.file_bytes,
            "own_bytes": space.own_bytes,
        });
        println!("{}", serde_json::to_string_pretty(&value)?);
        return Ok(crate::EXIT_SUCCESS);
    }
    let tag = &manifest.tag;
    let size = ByteSize::from_bytes(space.own_bytes);
    match began {
        Some(began) => println!(
            "{tag} made in {:.1} s ({size}): 'fcvm run --warm' with the same options starts from it",
            began.elapsed().as_secs_f64()
        ),
        None => println!(
            "{tag} is there already, made {} ago ({size})",
            age(manifest.created_at)
        ),
    }
    Ok(crate::EXIT_SUCCESS)
}
