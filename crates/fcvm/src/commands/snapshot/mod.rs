//! `fcvm snapshot`: the state of VMs, kept.

pub(crate) mod create;
mod memory;
mod serve;
pub(super) mod serve_memory;

use std::fs::File;
use std::os::fd::OwnedFd;

use anyhow::{Context as _, bail};
use fcvm_hypervisor::DeviceState;
use fcvm_image::progress::Progress as _;
use fcvm_memory::PAGE_BYTES;
use fcvm_snapshot::{MemoryKind, Snapshot, SnapshotError, SnapshotStore};
use fcvm_types::{ByteSize, SnapshotTag, VmId, VmName};
use serde_json::{Value, json};

use super::clones::{self, Family, Starting};
use super::fork::Answered;
use crate::args::Format;
use crate::args::clones::CloneArguments;
use crate::args::snapshot::{
    InspectArguments, LsArguments, RmArguments, RunArguments, ServeArguments, SnapshotCommand,
};
use crate::context::Context;
use crate::handover::Handover;
use crate::output::{age, table, timestamp};
use crate::owner::spec::VmSpec;
use crate::progress::Shown;
use crate::template::Template;
use memory::{Chosen, HeldServer};
pub(crate) use serve::remove_dead_sockets;
use serve::{Loaded, Served, Server};

pub(crate) async fn run(context: &Context, command: SnapshotCommand) -> anyhow::Result<u8> {
    match command {
        SnapshotCommand::Create(arguments) => create::run(context, &arguments).await,
        SnapshotCommand::Ls(arguments) => ls(context, &arguments),
        SnapshotCommand::Inspect(arguments) => inspect(context, &arguments),
        SnapshotCommand::Rm(arguments) => rm(context, &arguments),
        SnapshotCommand::Run(arguments) => run_clones(context, &arguments).await,
        SnapshotCommand::Serve(arguments) => serve(context, &arguments).await,
        SnapshotCommand::ServeMemory(arguments) => serve_memory::run(context, &arguments).await,
    }
}

fn ls(context: &Context, arguments: &LsArguments) -> anyhow::Result<u8> {
    let mut rows = Vec::new();
    let mut list = Vec::new();
    for listed in context.snapshots().list()? {
        let snapshot = match &listed.snapshot {
            Ok(snapshot) => snapshot,
            Err(error) => {
                eprintln!("Warning: {error}");
                continue;
            }
        };
        if arguments.quiet {
            println!("{}", listed.tag);
            continue;
        }
        if arguments.format == Format::Json {
            list.push(json_row(snapshot)?);
            continue;
        }
        let manifest = snapshot.manifest();
        let space = snapshot.disk_space()?;
        rows.push(vec![
            listed.tag.to_string(),
            manifest.fields.source_name.to_string(),
            manifest.fields.image.clone(),
            ByteSize::from_bytes(manifest.memory.memory_bytes).to_string(),
            ByteSize::from_bytes(space.own_bytes).to_string(),
            manifest
                .parent
                .as_ref()
                .map_or_else(String::new, |parent| parent.tag.to_string()),
            format!("{} ago", age(manifest.created_at)),
        ]);
    }
    match arguments.format {
        _ if arguments.quiet => {}
        Format::Json => println!("{}", serde_json::to_string_pretty(&list)?),
        Format::Table => table(
            &["TAG", "VM", "IMAGE", "MEMORY", "SIZE", "PARENT", "CREATED"],
            rows.into_iter(),
        ),
    }
    Ok(crate::EXIT_SUCCESS)
}

/// The stable JSON form, docs/format/json-output.md.
fn json_row(snapshot: &Snapshot) -> anyhow::Result<Value> {
    let manifest = snapshot.manifest();
    let fields = &manifest.fields;
    let space = snapshot.disk_space()?;
    Ok(json!({
        "tag": manifest.tag,
        "id": manifest.id,
        "created_at": timestamp(manifest.created_at),
        "vm": { "id": fields.source_id, "name": fields.source_name },
        "image": fields.image,
        "image_digest": fields.image_digest,
        "hypervisor": fields.hypervisor,
        "accelerator": fields.accelerator["kind"],
        "qemu_version": fields.device_line["qemu_version"],
        "firecracker_version": fields.device_line["firecracker_version"],
        "host_cpu": fields.host_cpu,
        "memory_bytes": manifest.memory.memory_bytes,
        "memory_kind": match manifest.memory.kind {
            MemoryKind::Whole => "whole",
            MemoryKind::Difference => "difference",
        },
        "memory_stored_bytes": manifest.memory.file_bytes,
        "parent": manifest.parent.as_ref().map(|parent| &parent.tag),
        "own_bytes": space.own_bytes,
        "shared_bytes": space.shared_bytes,
        "timings": fields.timings_us.iter()
            .map(|(stage, microseconds)| json!({ "stage": stage, "microseconds": microseconds }))
            .collect::<Vec<_>>(),
    }))
}

fn inspect(context: &Context, arguments: &InspectArguments) -> anyhow::Result<u8> {
    let store = context.snapshots();
    let mut list = Vec::new();
    for tag in &arguments.tags {
        let snapshot = store.open(tag)?;
        if arguments.verify {
            snapshot.verify()?;
        }
        list.push(json_row(&snapshot)?);
    }
    println!("{}", serde_json::to_string_pretty(&list)?);
    Ok(crate::EXIT_SUCCESS)
}

fn rm(context: &Context, arguments: &RmArguments) -> anyhow::Result<u8> {
    let store = context.snapshots();
    for tag in &arguments.tags {
        match store.remove(tag, arguments.prune_children) {
            Ok(removed) => removed.tags.iter().for_each(|tag| println!("{tag}")),
            Err(SnapshotError::NotFound(_)) if arguments.force => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(crate::EXIT_SUCCESS)
}

/// Reads a snapshot into memory and checks that this host can run it.
pub(crate) fn load(store: &SnapshotStore, tag: &SnapshotTag) -> anyhow::Result<Loaded> {
    let reason = "the process that has the snapshot has it in a file";
    let (loaded, _) = load_with(store, tag, |snapshot, spec| {
        memory::file(snapshot, spec, reason)
    })?;
    Ok(loaded)
}

/// The same, with the memory that was chosen.
fn load_with(
    store: &SnapshotStore,
    tag: &SnapshotTag,
    choose: impl FnOnce(&Snapshot, &VmSpec) -> anyhow::Result<Chosen>,
) -> anyhow::Result<(Loaded, Option<HeldServer>)> {
    let snapshot = store.open(tag)?;
    let fields = &snapshot.manifest().fields;
    let told = |what: &str| format!("the snapshot '{tag}' has {what} that this fcvm does not know");
    let spec: VmSpec =
        serde_json::from_value(fields.spec.clone()).with_context(|| told("a specification"))?;
    let accelerator = serde_json::from_value(fields.accelerator.clone())
        .with_context(|| told("an accelerator"))?;
    let device_line = serde_json::from_value(fields.device_line.clone())
        .with_context(|| told("a device line"))?;
    let cpu = create::host_cpu(accelerator);
    if fields.host_cpu != cpu {
        bail!(
            "the snapshot '{tag}' was made on another processor ({}), and this host has {cpu}: make it anew here",
            fields.host_cpu
        );
    }
    if !spec.root_image.exists() {
        bail!(
            "the root image of snapshot '{tag}' is gone ({}): 'fcvm image pull {}' brings it back",
            spec.root_image.display(),
            fields.image
        );
    }
    let Chosen {
        memory,
        reason,
        server,
    } = choose(&snapshot, &spec)?;
    let template = Template {
        memory,
        disk: snapshot.disk(),
    };
    let loaded = Loaded {
        tag: tag.clone(),
        id: snapshot.manifest().id.to_string(),
        source: fields.source_id.clone(),
        source_name: fields.source_name.clone(),
        spec,
        accelerator,
        device_line,
        template,
        reason,
        device: DeviceState::from_bytes(snapshot.device_state()?)?,
        mark: fields.mark.secret().parse()?,
    };
    Ok((loaded, server))
}

/// Reads the memory, with a bar where it takes long.
fn load_memory(snapshot: &Snapshot) -> anyhow::Result<File> {
    let total = snapshot.manifest().memory.page_count * PAGE_BYTES;
    let piece = Shown::passing().start("memory", Some(total));
    let mut before = 0;
    let memory = snapshot.load_memory(|done, _| {
        piece.advance(done.saturating_sub(before));
        before = done;
    })?;
    piece.finish("done");
    Ok(memory)
}

async fn serve(context: &Context, arguments: &ServeArguments) -> anyhow::Result<u8> {
    let loaded = load(&context.snapshots(), &arguments.tag)?;
    serve::serve(context, loaded, arguments.standby).await
}

async fn run_clones(context: &Context, arguments: &RunArguments) -> anyhow::Result<u8> {
    let wanted = &arguments.clones;
    wanted.check()?;
    match (&arguments.snapshot, arguments.pid) {
        (Some(tag), _) => {
            let choose = |snapshot: &Snapshot, spec: &VmSpec| {
                memory::choose(context, arguments.memory, snapshot, spec)
            };
            let (loaded, server) = load_with(&context.snapshots(), tag, choose)?;
            let (starting, channels) = start(context, wanted, &loaded.served(None), None).await?;
            let channels = channels
                .into_iter()
                .map(Handover::from_fd)
                .collect::<anyhow::Result<_>>()?;
            loaded.give(channels).await;
            let clones = clones::all_started(starting).await?;
            // It ends with the last of them.
            drop(server);
            finish(context, wanted, &loaded.spec, &clones).await
        }
        (None, Some(pid)) => {
            let server = Server::connect(context, pid).await?;
            let (starting, channels) =
                start(context, wanted, &server.served, Some(&server)).await?;
            let spec = server.served.spec.clone();
            server.give(channels).await?;
            let clones = clones::all_started(starting).await?;
            finish(context, wanted, &spec, &clones).await
        }
        (None, None) => {
            bail!("say which snapshot: --snapshot TAG, or --pid of a process that serves one")
        }
    }
}

/// Starts the owners of the clones, or asks the process that serves the snapshot for ready ones.
async fn start(
    context: &Context,
    wanted: &CloneArguments,
    served: &Served,
    server: Option<&Server>,
) -> anyhow::Result<(Vec<Starting>, Vec<OwnedFd>)> {
    let names = clones::names(&context.state()?, wanted, &served.lineage.parent_name)?;
    let family = Family {
        source: &served.spec,
        lineage: &served.lineage,
        ports: &wanted.publish,
        remove_on_exit: wanted.rm,
    };
    let ready = match server {
        // A port is given to the network when that starts, so those that are ready have none.
        Some(server) if wanted.publish.is_empty() => server.ask_for_ready(names.len()).await?,
        _ => Vec::new(),
    };
    clones::start_all(context, &family, names, ready)
}

async fn finish(
    context: &Context,
    wanted: &CloneArguments,
    spec: &VmSpec,
    clones: &[(VmId, VmName)],
) -> anyhow::Result<u8> {
    let answered = Answered {
        source: None,
        clones,
        spec,
    };
    super::fork::tell(&context.state()?, wanted, &answered).await
}
