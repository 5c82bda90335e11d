//! `fcvm snapshot serve-memory`: the memory of a snapshot for hypervisors that ask for it page by page.
//!
//! The socket, the log and what is kept with the snapshot are here; serving is `fcvm_memory::uffd`'s.

use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use fcvm_memory::uffd::{MemorySource, Notice, Server, ServerEvent, ServerOptions};
use fcvm_snapshot::Snapshot;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use super::load_memory;
use crate::args::snapshot::ServeMemoryArguments;
use crate::context::{Context, create_private_dir};
use crate::signals::{Arrived, Forwarded};
use crate::state::this_process;

/// How its socket begins; the process's number follows.
pub(in crate::commands) const PREFIX: &str = "serve-memory-";

/// How long one that ends when it is idle waits for the first to come.
const IDLE_LIMIT: Duration = Duration::from_secs(60);

pub(super) async fn run(context: &Context, arguments: &ServeMemoryArguments) -> anyhow::Result<u8> {
    allow_descriptors();
    let snapshot = context.snapshots().open(&arguments.tag)?;
    let working_set = snapshot.working_set().unwrap_or_else(|error| {
        tracing::warn!(target: "memory", "{error}: it is recorded anew");
        None
    });
    let source = MemorySource::new(&load_memory(&snapshot)?)?;
    let options = ServerOptions {
        name: snapshot.manifest().id.to_string(),
        record_window: Duration::from_secs(arguments.record),
        idle_limit: arguments.exit_when_idle.then_some(IDLE_LIMIT),
        working_set,
        ..ServerOptions::default()
    };
    let process = this_process()?;
    create_private_dir(&context.runtime_dir)?;
    let name = format!("{PREFIX}{}.sock", process.pid);
    let socket = context.runtime_dir.join(name);
    let server = Server::bind(&socket, Arc::new(source), options)?;
    let stopper = server.stopper();
    let mut signals = Forwarded::new()?;
    println!("{}", socket.display());
    let serving = tokio::task::spawn_blocking(move || server.run(|event| note(&snapshot, &event)));
    tokio::pin!(serving);
    let summary = loop {
        tokio::select! {
            ended = &mut serving => break ended.context("the memory server failed")??,
            arrived = signals.next() => if let Arrived::Signal(_) = arrived {
                stopper.stop();
            },
        }
    };
    tracing::info!(target: "memory", "{} clones served: {}", summary.ended_count, summary.ended);
    Ok(crate::EXIT_SUCCESS)
}

/// Three descriptors a clone: as many as this process may have. Where they are too few, clones are refused.
fn allow_descriptors() {
    let Rlimit { maximum, .. } = getrlimit(Resource::Nofile);
    let current = maximum;
    if let Err(errno) = setrlimit(Resource::Nofile, Rlimit { current, maximum }) {
        tracing::warn!(target: "memory", "the limit of open files cannot be raised: {errno}");
    }
}

/// What happens, in the log; what was recorded, with the snapshot.
fn note(snapshot: &Snapshot, event: &ServerEvent<'_>) {
    match event {
        ServerEvent::Notice(Notice::Started { pid, .. }) => {
            tracing::info!(target: "memory", "process {pid} is served");
        }
        ServerEvent::Notice(Notice::Ended {
            pid,
            reason,
            is_failure,
            statistics,
        }) => {
            if *is_failure {
                tracing::warn!(target: "memory", "process {pid} was killed: {reason}");
            }
            tracing::info!(target: "memory", "process {pid} is served no longer ({reason}): {statistics}");
        }
        ServerEvent::Notice(Notice::Refused { pid, reason }) => {
            tracing::debug!(target: "memory", "process {pid} was not heard: {reason}");
        }
        ServerEvent::Recorded(set) => match snapshot.store_working_set(set) {
            Ok(true) => {
                let pages = set.page_count();
                tracing::info!(target: "memory", "{pages} pages come ahead from now on");
            }
            Ok(false) => {}
            Err(error) => tracing::warn!(target: "memory", "{error}"),
        },
        _ => {}
    }
}
