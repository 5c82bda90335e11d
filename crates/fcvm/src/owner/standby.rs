//! A clone that is made ready before anybody wants it, from its own side.
//!
//! It goes as far as it can without being anybody: with the state of a running VM, which is not known
//! before the fork, up to a process that waits; with a snapshot's, up to a guest that has run, answered
//! and been stopped again, so that what the next command needs is translated and mapped. A container
//! that has an `--on-fork` command is not let go before it has its name.

use std::fs::File;
use std::time::Duration;

use anyhow::{Context as _, bail};
use fcvm_hypervisor::Pause;
use fcvm_types::record::VmState;
use fcvm_wire::{Outcome, Request};

use super::clone::{self, Loaded, Source, Waiting};
use super::spec::VmSpec;
use super::{Built, Entry, Front, Origin, Place, Stopwatch};
use crate::client::finished;
use crate::context::Context;
use crate::handover::Handover;
use crate::signals::{Arrived, Forwarded};
use crate::template::Wish;

/// How long a guest may take over the rehearsal and over setting its clock.
const GUEST_LIMIT: Duration = Duration::from_secs(10);

/// A clone that is ready.
pub(crate) struct Ready {
    stage: Stage,
    /// Dropped last: until then the record has what is to be released.
    place: Place,
}

/// How far it has got.
pub(super) enum Stage {
    /// It has no state yet.
    Waiting(Waiting),
    /// It has not run yet.
    Loaded(Loaded),
    /// It has run, and is stopped.
    Paused(Box<Built>),
}

/// Makes a clone ready, waits until it is wanted and runs it to its end; gives the exit code.
pub(crate) async fn run(
    context: &Context,
    mut spec: VmSpec,
    source: Source,
    wishes: &Handover,
) -> anyhow::Result<u8> {
    let mut ready = make_ready(context, &spec, source).await?;
    let wish = tokio::select! {
        wish = wishes.receive::<Wish>() => wish?,
        // Whoever wants it then finds its channel closed.
        reason = ready.stage.ended() => bail!("the clone ended before it was wanted ({reason})"),
        () = terminated(&mut ready.place.signals) => None,
    };
    let Some((wish, descriptors)) = wish else {
        // Nobody will want it any more.
        return Ok(crate::EXIT_SUCCESS);
    };
    let report = descriptors.into_iter().next();
    let report = File::from(report.context("a clone is wanted by nobody")?);
    spec.name = wish.name;
    spec.remove_on_exit = wish.remove_on_exit;
    let front = Front::Detached { report };
    super::run(context, spec, Origin::Ready(Box::new(ready)), front).await
}

async fn make_ready(context: &Context, spec: &VmSpec, source: Source) -> anyhow::Result<Ready> {
    let is_served = source.lineage.serve.is_some();
    let lineage = Some(source.lineage.clone());
    let mut place = Place::new(context, spec, lineage, VmState::Standby)?;
    place.entry.take_stderr()?;
    let Place {
        entry,
        watch,
        signals,
    } = &mut place;
    let prepare = async {
        let waiting = clone::prepare(context, spec, source, entry, watch).await?;
        if !is_served {
            return Ok(Stage::Waiting(waiting));
        }
        let loaded = waiting.load(watch).await?;
        if spec.on_fork.is_some() {
            return Ok(Stage::Loaded(loaded));
        }
        let built = loaded.awake(spec, entry, watch).await?;
        rehearse(&built, spec).await;
        built.machine.pause().await?;
        watch.lap("rehearsal");
        Ok::<_, anyhow::Error>(Stage::Paused(Box::new(built)))
    };
    let stage = tokio::select! {
        stage = prepare => stage?,
        () = terminated(signals) => bail!("the clone is not wanted any more"),
    };
    place.tell_stages()?;
    Ok(Ready { place, stage })
}

async fn terminated(signals: &mut Forwarded) {
    while !matches!(signals.next().await, Arrived::Signal(_)) {}
}

/// Runs a command that does nothing, for the sake of the next one.
async fn rehearse(built: &Built, spec: &VmSpec) {
    let process = spec.shell(":");
    let request = Request::Exec { process };
    let request = built.link.request(&request);
    // An image without a shell has none to rehearse.
    let _ = tokio::time::timeout(GUEST_LIMIT, request).await;
}

impl Ready {
    /// Enters the name that it has got.
    pub(super) fn assigned(self, spec: &VmSpec) -> anyhow::Result<(Place, Stage)> {
        let Self { mut place, stage } = self;
        place.watch.went_ahead();
        place.entry.assign(spec)?;
        Ok((place, stage))
    }
}

impl Stage {
    async fn ended(&self) -> String {
        match self {
            Self::Waiting(waiting) => waiting.ended().await,
            Self::Loaded(loaded) => loaded.ended().await,
            Self::Paused(built) => built.machine.wait_exit().await.to_string(),
        }
    }

    /// Brings the clone to its running container.
    pub(super) async fn go_on(
        self,
        spec: &VmSpec,
        entry: &Entry,
        watch: &mut Stopwatch,
    ) -> anyhow::Result<Built> {
        let loaded = match self {
            Self::Waiting(waiting) => waiting.load(watch).await?,
            Self::Loaded(loaded) => loaded,
            Self::Paused(built) => {
                built.machine.resume().await?;
                watch.lap("resume");
                set_clock(&built).await?;
                watch.lap("agent");
                return Ok(*built);
            }
        };
        let built = loaded.awake(spec, entry, watch).await?;
        clone::run_hook(&built, spec, entry, watch).await?;
        Ok(built)
    }
}

/// The guest's clock stood still while the clone was not wanted.
async fn set_clock(built: &Built) -> anyhow::Result<()> {
    let request = Request::SetClock {
        realtime_ns: super::realtime_ns(),
    };
    let outcome = tokio::time::timeout(GUEST_LIMIT, built.link.request(&request)).await;
    match finished(outcome.context("the clone does not answer")??)? {
        Outcome::Done => Ok(()),
        other => bail!("the guest's agent gave an answer that makes no sense ({other:?})"),
    }
}
