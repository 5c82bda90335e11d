//! `fcvm fork`: clones of a running VM.

use std::os::fd::{AsFd, BorrowedFd};

use anyhow::{Context as _, bail};
use fcvm_types::record::{Lineage, VmRecord, VmState};
use fcvm_types::{ByteSize, VmId, VmName};
use serde_json::json;
use tokio::task::JoinSet;

use super::clones::{self, Family, Said};
use crate::args::Format;
use crate::args::clones::CloneArguments;
use crate::args::fork::ForkArguments;
use crate::context::Context;
use crate::handover::Handover;
use crate::owner::fork::{ForkReply, ForkRequest, connect};
use crate::owner::spec::VmSpec;
use crate::state::StateStore;

pub(crate) async fn run(context: &Context, arguments: &ForkArguments) -> anyhow::Result<u8> {
    let wanted = &arguments.clones;
    wanted.check()?;
    let store = context.state()?;
    let record = store.find(&arguments.vm)?;
    check_state(&record)?;
    let paths = store.paths(&record.id);
    let source = VmSpec::of(&paths)?;
    if source.hugepages {
        // Firecracker maps no file in such pages.
        bail!(
            "VM '{}' has its memory in hugepages, and is cloned by a snapshot: 'fcvm snapshot create', then 'fcvm snapshot run'",
            record.name
        );
    }
    let names = clones::names(&store, wanted, &record.name)?;
    let asking = connect(&paths.fork_socket()).with_context(|| {
        format!(
            "VM '{}' is ending, or its owner does not answer",
            record.name
        )
    })?;
    if arguments.dry_run {
        return estimate(&asking, &record, arguments).await;
    }
    let lineage = Lineage {
        parent: record.id.clone(),
        parent_name: record.name.clone(),
        snapshot: None,
        serve: None,
        base: record.lineage.as_ref().and_then(|own| own.base.clone()),
    };
    let family = Family {
        source: &source,
        lineage: &lineage,
        ports: &wanted.publish,
        remove_on_exit: wanted.rm,
    };
    // A port is given to the network when that starts, so those that are ready have none.
    let ready = match wanted.publish.is_empty() {
        true => clones::ask_for_ready(&asking, names.len()).await?,
        false => Vec::new(),
    };
    let (starting, channels) = clones::start_all(context, &family, names, ready)?;
    let descriptors: Vec<BorrowedFd<'_>> = channels.iter().map(AsFd::as_fd).collect();
    asking.send(&ForkRequest::Fork, &descriptors)?;
    // An owner whose source gives up has to see its channel end.
    drop(channels);
    let reply = asking.receive().await?;
    let (reply, _) = reply.context("the source ended during the fork")?;
    if let ForkReply::Failed { message } = &reply {
        // The clones end with their channels; they have nothing to add.
        let _ = clones::all_started(starting).await;
        bail!("VM '{}' could not be forked: {message}", record.name);
    }
    let clones = clones::all_started(starting).await?;
    let answered = Answered {
        source: Stood::of(&record, &reply),
        clones: &clones,
        spec: &source,
    };
    tell(&store, wanted, &answered).await
}

/// Clones that have started.
pub(super) struct Answered<'a> {
    /// The VM that they were forked from.
    pub(super) source: Option<Stood<'a>>,
    pub(super) clones: &'a [(VmId, VmName)],
    pub(super) spec: &'a VmSpec,
}

/// A VM that stood still for its clones.
pub(super) struct Stood<'a> {
    pub(super) record: &'a VmRecord,
    /// How long, in microseconds.
    pub(super) pause_us: u64,
    /// Microseconds of each stage.
    pub(super) timings_us: &'a [(String, u64)],
}

impl<'a> Stood<'a> {
    fn of(record: &'a VmRecord, reply: &'a ForkReply) -> Option<Self> {
        match reply {
            ForkReply::Frozen {
                pause_us,
                timings_us,
            } => Some(Self {
                record,
                pause_us: *pause_us,
                timings_us,
            }),
            _ => None,
        }
    }
}

/// Prints the clones and what they say; the exit code is the first that is not zero.
pub(super) async fn tell(
    store: &StateStore,
    wanted: &CloneArguments,
    answered: &Answered<'_>,
) -> anyhow::Result<u8> {
    let said = match &wanted.exec {
        Some(command) => in_all(store, answered.clones, answered.spec, command).await?,
        None => Vec::new(),
    };
    match wanted.format {
        Format::Json => print_json(answered, &said)?,
        Format::Table if wanted.exec.is_some() => said.iter().for_each(print_said),
        Format::Table => answered.clones.iter().for_each(|(id, _)| println!("{id}")),
    }
    let codes = said.iter().map(|said| said.status.shell_code());
    let failed = codes.into_iter().find(|code| *code != crate::EXIT_SUCCESS);
    Ok(failed.unwrap_or(crate::EXIT_SUCCESS))
}

/// `--dry-run`
async fn estimate(
    asking: &Handover,
    record: &VmRecord,
    arguments: &ForkArguments,
) -> anyhow::Result<u8> {
    asking.send(&ForkRequest::Estimate, &[])?;
    let estimate = match asking.receive::<ForkReply>().await? {
        Some((ForkReply::Estimate(estimate), _)) => estimate,
        Some((ForkReply::Failed { message }, _)) => bail!("{message}"),
        _ => bail!("VM '{}' is ending", record.name),
    };
    if arguments.clones.format == Format::Json {
        println!("{}", serde_json::to_string_pretty(&estimate)?);
        return Ok(crate::EXIT_SUCCESS);
    }
    let size = |bytes| ByteSize::from_bytes(bytes).to_string();
    println!(
        "memory   {} of {} in use; {}",
        size(estimate.resident_bytes),
        size(estimate.memory_bytes),
        match estimate.way.as_str() {
            "succession" => "none is copied, and all clones share it until they write".to_owned(),
            "difference" => format!(
                "{} that the VM wrote since it was forked are copied to each clone, which share the rest",
                size(estimate.copied_bytes)
            ),
            "save" => format!(
                "{} are written once while the VM stands still, or less where it was forked before, and all clones share them until they write",
                size(estimate.copied_bytes)
            ),
            _ => format!(
                "{} are copied once while the VM stands still, as QEMU's own network cannot move to another process",
                size(estimate.copied_bytes)
            ),
        }
    );
    match &estimate.disk_method {
        Some(method) => println!(
            "disk     {} of its own; each clone's is made by {method}",
            size(estimate.disk_bytes)
        ),
        None => println!("disk     none: the container is read-only"),
    }
    let count = arguments.clones.count.unwrap_or(1);
    println!(
        "clones   {count}: a process each for fcvm, the hypervisor and the network; what a clone writes is its own"
    );
    Ok(crate::EXIT_SUCCESS)
}

/// The stable JSON form, docs/format/json-output.md.
fn print_json(answered: &Answered<'_>, said: &[Said]) -> anyhow::Result<()> {
    let clones: Vec<_> = answered
        .clones
        .iter()
        .enumerate()
        .map(|(index, (id, name))| {
            let mut clone = json!({ "id": id, "name": name });
            if let Some(said) = said.get(index) {
                clone["exit_code"] = said.status.shell_code().into();
                clone["stdout"] = String::from_utf8_lossy(&said.stdout).into();
                clone["stderr"] = String::from_utf8_lossy(&said.stderr).into();
            }
            clone
        })
        .collect();
    let source = answered.source.as_ref().map(|stood| {
        let record = stood.record;
        let timings: Vec<_> = stood
            .timings_us
            .iter()
            .map(|(stage, microseconds)| json!({ "stage": stage, "microseconds": microseconds }))
            .collect();
        json!({
            "id": record.id,
            "name": record.name,
            "pause_microseconds": stood.pause_us,
            "timings": timings,
        })
    });
    let all = json!({ "source": source, "clones": clones });
    println!("{}", serde_json::to_string_pretty(&all)?);
    Ok(())
}

fn print_said(said: &Said) {
    for line in String::from_utf8_lossy(&said.stdout).lines() {
        println!("{}: {line}", said.name);
    }
    for line in String::from_utf8_lossy(&said.stderr).lines() {
        eprintln!("{}: {line}", said.name);
    }
}

/// Runs a command in all clones at once; what they say, in their order.
async fn in_all(
    store: &StateStore,
    clones: &[(VmId, VmName)],
    source: &VmSpec,
    command: &str,
) -> anyhow::Result<Vec<Said>> {
    let mut running = JoinSet::new();
    for (index, (id, _)) in clones.iter().enumerate() {
        let (store, id, source) = (store.clone(), id.clone(), source.clone());
        let command = command.to_owned();
        running.spawn_local(async move {
            let said = clones::execute(&store, &id, &source, &command).await;
            (index, said)
        });
    }
    let mut answers = running.join_all().await;
    answers.sort_by_key(|(index, _)| *index);
    answers.into_iter().map(|(_, said)| said).collect()
}

pub(crate) fn check_state(record: &VmRecord) -> anyhow::Result<()> {
    let name = &record.name;
    match record.state {
        VmState::Running => Ok(()),
        VmState::Paused => {
            bail!("VM '{name}' is paused: 'fcvm unpause {name}' lets it go on, then fork it")
        }
        VmState::Standby => bail!("VM '{name}' waits to become a clone: fork its parent"),
        VmState::Created | VmState::Booting => {
            bail!("VM '{name}' is still starting: try again when 'fcvm ls' shows it as up")
        }
        VmState::Stopping | VmState::Exited => bail!("VM '{name}' is not running"),
    }
}
