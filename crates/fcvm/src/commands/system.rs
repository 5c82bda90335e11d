//! `fcvm system`: what takes space, and freeing it.

use std::io::{BufRead, IsTerminal, Write};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use anyhow::bail;
use fcvm_storage::ScratchStore;
use fcvm_types::ByteSize;
use fcvm_types::record::VmState;
use serde_json::json;

use crate::args::Format;
use crate::args::system::SystemCommand;
use crate::context::Context;
use crate::output::table;

pub(crate) async fn run(context: &Context, command: SystemCommand) -> anyhow::Result<u8> {
    match command {
        SystemCommand::Df { format } => df(context, format),
        SystemCommand::Prune { all, warm, force } => prune(context, all, warm || all, force),
    }
}

/// What a kind of thing takes.
struct Row {
    kind: &'static str,
    total: usize,
    active: usize,
    size_bytes: u64,
    reclaimable_bytes: u64,
}

fn df(context: &Context, format: Format) -> anyhow::Result<u8> {
    let rows = measure(context)?;
    if format == Format::Json {
        let rows: Vec<_> = rows
            .iter()
            .map(|row| {
                json!({
                    "kind": row.kind, "total": row.total, "active": row.active,
                    "size_bytes": row.size_bytes, "reclaimable_bytes": row.reclaimable_bytes,
                })
            })
            .collect();
        println!("{}", serde_json::to_string_pretty(&rows)?);
        return Ok(crate::EXIT_SUCCESS);
    }
    let size = |bytes| ByteSize::from_bytes(bytes).to_string();
    let rows = rows.iter().map(|row| {
        vec![
            row.kind.to_owned(),
            row.total.to_string(),
            row.active.to_string(),
            size(row.size_bytes),
            size(row.reclaimable_bytes),
        ]
    });
    table(&["TYPE", "TOTAL", "ACTIVE", "SIZE", "RECLAIMABLE"], rows);
    Ok(crate::EXIT_SUCCESS)
}

fn measure(context: &Context) -> anyhow::Result<Vec<Row>> {
    let images = super::image::store(context)?.usage(&super::image::in_use(context)?)?;
    let store = context.state()?;
    let records = store.list()?;
    let ended_bytes = records
        .iter()
        .filter(|record| record.state == VmState::Exited)
        .map(|record| disk_bytes(&store.paths(&record.id).directory));
    let kernels = context.data_dir.join("kernels");
    let disks = context.data_dir.join("disks");
    let mut rows = vec![
        Row {
            kind: "Images",
            total: images.image_count,
            active: images.active_count,
            size_bytes: images.content_bytes + images.root_image_bytes + images.temporary_bytes,
            reclaimable_bytes: images.reclaimable_bytes,
        },
        Row {
            kind: "VMs",
            total: records.len(),
            active: records
                .iter()
                .filter(|record| record.state != VmState::Exited)
                .count(),
            size_bytes: disk_bytes(&context.data_dir.join("vms")),
            reclaimable_bytes: ended_bytes.sum(),
        },
        Row {
            kind: "Snapshots",
            total: context.snapshots().list()?.len(),
            active: 0,
            size_bytes: disk_bytes(context.snapshots().directory()),
            reclaimable_bytes: crate::warm::disk_bytes(context)?,
        },
        Row {
            kind: "Kernels",
            total: std::fs::read_dir(&kernels).map_or(0, |entries| {
                entries
                    .flatten()
                    .filter(|entry| {
                        entry.path().join("manifest.json").is_file() && !entry.path().is_symlink()
                    })
                    .count()
            }),
            active: usize::from(kernels.join("current").exists()),
            size_bytes: disk_bytes(&kernels),
            reclaimable_bytes: 0,
        },
        Row {
            kind: "Disk templates",
            total: std::fs::read_dir(&disks).map_or(0, Iterator::count),
            active: 0,
            size_bytes: disk_bytes(&disks),
            reclaimable_bytes: disk_bytes(&disks),
        },
    ];
    rows.extend(pool_row(context)?);
    Ok(rows)
}

/// The pool that disks of VMs are in, where there is one. Its file is used again, never given back.
fn pool_row(context: &Context) -> anyhow::Result<Option<Row>> {
    let pool = context.data_dir.join("pool/pool.img");
    if !pool.exists() {
        return Ok(None);
    }
    let mounted = super::pool::mount::mounted_pool(&crate::disks::pool_directory(context))?;
    Ok(Some(Row {
        kind: "Disk pool",
        total: 1,
        active: usize::from(mounted.is_some()),
        size_bytes: disk_bytes(&pool),
        reclaimable_bytes: 0,
    }))
}

/// Bytes that a tree takes on its file system.
fn disk_bytes(path: &Path) -> u64 {
    let Ok(metadata) = path.symlink_metadata() else {
        return 0;
    };
    let own = metadata.blocks() * 512;
    if !metadata.is_dir() {
        return own;
    }
    let Ok(entries) = std::fs::read_dir(path) else {
        return own;
    };
    own + entries
        .flatten()
        .map(|entry| disk_bytes(&entry.path()))
        .sum::<u64>()
}

fn prune(context: &Context, all: bool, warm: bool, force: bool) -> anyhow::Result<u8> {
    if !force && !confirmed(all, warm)? {
        bail!("nothing was removed");
    }
    let store = context.state()?;
    let mut vms_freed = 0;
    let mut vms = 0;
    // The listing itself settles what dead owners left.
    for record in store
        .list()?
        .into_iter()
        .filter(|record| record.state == VmState::Exited)
    {
        let _lock = store.lock()?;
        vms_freed += disk_bytes(&store.paths(&record.id).directory);
        store.remove(&record.id)?;
        println!("Removed VM {} ({})", record.id.short(), record.name);
        vms += 1;
    }
    let mut leftovers = store.remove_leftovers()?;
    leftovers.extend(super::snapshot::remove_dead_sockets(context)?);
    let swept = context.snapshots().sweep()?;
    if swept.folder_count > 0 {
        println!("Removed {} unfinished snapshots", swept.folder_count);
    }
    let caches = crate::warm::prune(context, warm)?;
    caches
        .tags
        .iter()
        .for_each(|tag| println!("Removed start-up cache {tag}"));
    leftovers
        .iter()
        .for_each(|path| println!("Removed leftover {}", path.display()));
    let images = super::image::store(context)?.prune(&super::image::in_use(context)?, all)?;
    images
        .images
        .iter()
        .for_each(|id| println!("Removed image {}", id.short()));
    let templates = match fcvm_storage::find_mkfs(&context.search_path.to_string_lossy()) {
        Some(mkfs) => ScratchStore::new(context.data_dir.join("disks"), mkfs).prune()?,
        None => 0,
    };
    let freed = vms_freed + swept.freed_bytes + caches.freed_bytes + images.freed_bytes + templates;
    let freed = ByteSize::from_bytes(freed);
    println!(
        "{vms} VMs, {} images and {} leftovers removed, {freed} freed",
        images.images.len(),
        leftovers.len()
    );
    Ok(crate::EXIT_SUCCESS)
}

fn confirmed(all: bool, warm: bool) -> anyhow::Result<bool> {
    if !std::io::stdin().is_terminal() {
        bail!("this removes what nothing uses: say so with --force where nobody can be asked");
    }
    let images = if all {
        "all images that no VM uses"
    } else {
        "nameless images"
    };
    let caches = if warm { "all start-up caches, " } else { "" };
    print!("Remove all VMs that have ended, {images}, {caches}and temporary files? [y/N] ");
    std::io::stdout().flush()?;
    let mut answer = String::new();
    std::io::stdin().lock().read_line(&mut answer)?;
    Ok(matches!(answer.trim(), "y" | "Y" | "yes"))
}
