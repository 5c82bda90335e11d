//! `fcvm pool`: the block-cloning pool from the command line.

mod bench;
pub(crate) mod create;
pub(crate) mod mount;
mod stream;

use std::fs::{File, OpenOptions};
use std::io::Read;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context as _, bail};
use blockpool::{Compression, FileDisk, Kind, Listed, Name, Object, ObjectSpace, Pool, PoolError};
use fcvm_image::progress::Progress;
use fcvm_types::ByteSize;
use rustix::fs::SeekFrom;
use serde_json::json;

use crate::args::Format;
use crate::args::pool::{CompressionName, PoolArguments, PoolCommand, SetArguments, Switch};
use crate::context::Context;
use crate::errors::{EXIT_FCVM_FAILED, printable};
use crate::output::{age, table, timestamp};
use crate::progress::Shown;

/// Bytes that are copied at a time.
const COPY_BYTES: usize = 1 << 20;

pub(crate) fn run(context: &Context, arguments: PoolArguments) -> anyhow::Result<u8> {
    let path = match arguments.pool {
        Some(path) => path,
        None => context.data_dir.join("pool/pool.img"),
    };
    match arguments.command {
        PoolCommand::Create { size } => {
            create::create(&path, size.bytes())?;
            println!("{}", path.display());
        }
        PoolCommand::Grow { size } => open(&path)?.grow(size.bytes())?,
        PoolCommand::Status { format } => status(&path, format)?,
        PoolCommand::Ls { name, format } => ls(&open(&path)?, name.as_deref(), format)?,
        PoolCommand::Import { file, name } => import(&open(&path)?, &file, &name)?,
        PoolCommand::Export { name, file } => export(&open(&path)?, &name, &file)?,
        PoolCommand::Clone { source, target } => {
            let (source, target) = (source.parse()?, target.parse()?);
            change(&path, |pool| pool.clone_object(&source, &target))?;
        }
        PoolCommand::Snapshot { name } => {
            let snapshot = name.parse()?;
            let count = change(&path, |pool| pool.snapshot(&snapshot))?;
            println!("{name}: {}", objects(count));
        }
        PoolCommand::Rollback { name } => {
            let snapshot = name.parse()?;
            let count = change(&path, |pool| pool.rollback(&snapshot))?;
            println!("{name}: {}", objects(count));
        }
        PoolCommand::Destroy { recursive, names } => destroy(&open(&path)?, &names, recursive)?,
        PoolCommand::Send(arguments) => stream::send(&open(&path)?, &arguments)?,
        PoolCommand::Receive(arguments) => stream::receive(&open(&path)?, &arguments)?,
        PoolCommand::Set(arguments) => set(&path, &arguments)?,
        PoolCommand::Mount(command) => return mount::run(context, &path, command),
        PoolCommand::Scrub { format } => return scrub(&open(&path)?, format),
        PoolCommand::Check { repair, format } => return check(&path, repair, format),
    }
    Ok(crate::EXIT_SUCCESS)
}

/// Changes a pool, durably.
fn change<T>(path: &Path, change: impl FnOnce(&Pool) -> blockpool::Result<T>) -> anyhow::Result<T> {
    let pool = open(path)?;
    let changed = change(&pool)?;
    pool.flush()?;
    Ok(changed)
}

fn set(path: &Path, arguments: &SetArguments) -> anyhow::Result<()> {
    let dataset: Name = arguments.dataset.parse()?;
    change(path, |pool| {
        make_dataset(pool, &dataset)?;
        let mut options = pool.find(&dataset)?.options;
        if let Some(checksum) = arguments.checksum {
            options.checksum = checksum == Switch::On;
        }
        if let Some(compression) = arguments.compression {
            options.compression = match compression {
                CompressionName::Off => Compression::Off,
                CompressionName::Lz4 => Compression::Lz4,
                CompressionName::Zstd => Compression::Zstd,
            };
        }
        pool.set_options(&dataset, options)
    })
}

fn compression_name(compression: Compression) -> &'static str {
    match compression {
        Compression::Off => "off",
        Compression::Lz4 => "lz4",
        Compression::Zstd => "zstd",
    }
}

fn make_dataset(pool: &Pool, name: &Name) -> blockpool::Result<()> {
    match pool.create_dataset(name) {
        Ok(_) | Err(PoolError::Exists { .. }) => Ok(()),
        Err(error) => Err(error),
    }
}

fn objects(count: usize) -> String {
    format!("{count} object{}", if count == 1 { "" } else { "s" })
}

fn open(path: &Path) -> anyhow::Result<Pool> {
    Pool::open(Arc::new(disk(path)?)).with_context(|| path.display().to_string())
}

fn disk(path: &Path) -> anyhow::Result<FileDisk> {
    match FileDisk::open(path) {
        Err(PoolError::File { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => {
            bail!(
                "there is no pool {}; make one with 'fcvm pool create --size SIZE'",
                path.display()
            )
        }
        other => Ok(other?),
    }
}

fn size(bytes: u64) -> String {
    ByteSize::from_bytes(bytes).to_string()
}

fn status(path: &Path, format: Format) -> anyhow::Result<()> {
    let pool = open(path)?;
    let listed = pool.list(None)?;
    let ids: Vec<_> = listed.iter().map(|entry| entry.id).collect();
    let mut all = ObjectSpace::default();
    for space in pool.object_space(&ids)? {
        all += space;
    }
    let space = pool.space();
    let saved_bytes = all.referenced_bytes.saturating_sub(space.data_bytes);
    let count = |kind| listed.iter().filter(|entry| entry.kind == kind).count();
    let host_bytes = std::fs::metadata(path)
        .map(|found| std::os::unix::fs::MetadataExt::blocks(&found) * 512)?;
    let values = [
        ("size_bytes", "size", space.size_bytes),
        (
            "reserved_bytes",
            "superblocks and logs",
            space.reserved_bytes,
        ),
        ("data_bytes", "data", space.data_bytes),
        ("metadata_bytes", "metadata", space.metadata_bytes),
        (
            "freeing_bytes",
            "free with the next checkpoint",
            space.freeing_bytes,
        ),
        ("free_bytes", "free", space.free_bytes),
        (
            "referenced_bytes",
            "referenced by objects and snapshots",
            all.referenced_bytes,
        ),
        ("written_bytes", "held by that", all.written_bytes),
        ("saved_bytes", "saved by cloning", saved_bytes),
        ("host_bytes", "taken on the host", host_bytes),
    ];
    let counts = [
        ("datasets", count(Kind::Dataset)),
        ("objects", count(Kind::Object)),
        ("snapshots", count(Kind::Snapshot)),
    ];
    if format == Format::Json {
        let mut value = json!({ "pool": path, "counted_records": space.counted_records, "counted_pages": space.counted_pages });
        for (member, _, bytes) in values {
            value[member] = bytes.into();
        }
        for (member, count) in counts {
            value[member] = count.into();
        }
        value["ratio"] = all.ratio().into();
        println!("{}", serde_json::to_string_pretty(&value)?);
        return Ok(());
    }
    let counts = counts
        .into_iter()
        .map(|(label, count)| vec![label.to_owned(), count.to_string()]);
    let values = values
        .into_iter()
        .map(|(_, label, bytes)| vec![label.to_owned(), size(bytes)])
        .chain([vec!["held per referenced byte".to_owned(), ratio(&all)]]);
    table(&["POOL", &path.display().to_string()], values.chain(counts));
    Ok(())
}

fn ls(pool: &Pool, name: Option<&str>, format: Format) -> anyhow::Result<()> {
    let name = name.map(str::parse::<Name>).transpose()?;
    let listed = pool.list(name.as_ref())?;
    let ids: Vec<_> = listed.iter().map(|entry| entry.id).collect();
    let spaces = pool.object_space(&ids)?;
    if format == Format::Json {
        let rows: Vec<_> = listed
            .iter()
            .zip(&spaces)
            .map(|(entry, space)| row_json(entry, space))
            .collect();
        println!("{}", serde_json::to_string_pretty(&rows)?);
        return Ok(());
    }
    let rows = listed.iter().zip(&spaces).map(|(entry, space)| {
        let bytes = |bytes| match entry.kind {
            Kind::Dataset => "-".to_owned(),
            _ => size(bytes),
        };
        vec![
            printable(&entry.name),
            kind_name(entry.kind).to_owned(),
            bytes(entry.size_bytes),
            bytes(space.referenced_bytes),
            bytes(space.exclusive_bytes),
            ratio(space),
            created(entry).map_or_else(String::new, |time| age(time) + " ago"),
        ]
    });
    table(
        &[
            "NAME",
            "KIND",
            "SIZE",
            "REFERENCED",
            "EXCLUSIVE",
            "RATIO",
            "CREATED",
        ],
        rows,
    );
    Ok(())
}

/// What a byte of space holds.
fn ratio(space: &ObjectSpace) -> String {
    let ratio = space.ratio();
    ratio.map_or_else(|| "-".to_owned(), |ratio| format!("{ratio:.2}"))
}

fn kind_name(kind: Kind) -> &'static str {
    match kind {
        Kind::Dataset => "dataset",
        Kind::Object => "object",
        Kind::Snapshot => "snapshot",
    }
}

fn created(entry: &Listed) -> Option<time::OffsetDateTime> {
    time::OffsetDateTime::from_unix_timestamp(entry.created_unix_s).ok()
}

fn row_json(entry: &Listed, space: &ObjectSpace) -> serde_json::Value {
    let mut row = json!({
        "name": entry.name,
        "kind": kind_name(entry.kind),
        "size_bytes": entry.size_bytes,
        "referenced_bytes": space.referenced_bytes,
        "exclusive_bytes": space.exclusive_bytes,
        "written_bytes": space.written_bytes,
        "ratio": space.ratio(),
        "created_at": created(entry).map(timestamp),
    });
    if entry.kind == Kind::Dataset {
        row["checksum"] = entry.options.checksum.into();
        row["compression"] = compression_name(entry.options.compression).into();
    }
    row
}

fn destroy(pool: &Pool, names: &[String], recursive: bool) -> anyhow::Result<()> {
    let names: Vec<Name> = names
        .iter()
        .map(|name| name.parse())
        .collect::<Result<_, _>>()?;
    for name in &names {
        pool.destroy(name, recursive)?;
    }
    Ok(pool.checkpoint()?)
}

/// Makes the object for an import, and its dataset if need be.
fn new_object(pool: &Pool, name: &Name, size_bytes: u64) -> anyhow::Result<Object> {
    make_dataset(pool, &name.dataset().parse()?)?;
    Ok(pool.create_object(name, size_bytes)?)
}

fn import(pool: &Pool, file: &Path, name: &str) -> anyhow::Result<()> {
    let name: Name = name.parse()?;
    let from_stdin = file == Path::new("-");
    let failed = || format!("cannot read {}", file.display());
    let source = (!from_stdin)
        .then(|| File::open(file))
        .transpose()
        .with_context(failed)?;
    let length = source
        .as_ref()
        .map(|source| rustix::fs::seek(source, SeekFrom::End(0)));
    let length_bytes = length.transpose().with_context(failed)?;
    let object = new_object(pool, &name, length_bytes.unwrap_or(0))?;
    let progress = Shown::new(false);
    let task = progress.start(&name.to_string(), length_bytes);
    let copied = match &source {
        Some(source) => import_file(source, length_bytes.unwrap_or(0), &object, &*task),
        None => import_stream(std::io::stdin().lock(), &object, &*task),
    };
    let done = copied.with_context(failed).and_then(|copied| {
        pool.flush()?;
        Ok(copied)
    });
    match done {
        Ok(copied) => task.finish(&size(copied)),
        Err(error) => {
            // Half an import is none; the failure is what counts.
            let _ = pool.destroy(&name, false).and_then(|_| pool.checkpoint());
            return Err(error);
        }
    }
    Ok(())
}

/// Copies what is no hole.
fn import_file(
    source: &File,
    length_bytes: u64,
    object: &Object,
    task: &dyn fcvm_image::progress::Task,
) -> anyhow::Result<u64> {
    let mut buffer = vec![0; COPY_BYTES];
    let mut at = 0;
    let mut copied = 0;
    while at < length_bytes {
        let begin = match rustix::fs::seek(source, SeekFrom::Data(at)) {
            Ok(begin) => begin,
            Err(rustix::io::Errno::NXIO) => break,
            // A device knows no holes.
            Err(rustix::io::Errno::INVAL) => at,
            Err(errno) => return Err(errno.into()),
        };
        let length = (length_bytes - begin).min(COPY_BYTES as u64) as usize;
        let piece = &mut buffer[..length];
        source.read_exact_at(piece, begin)?;
        copied += write_what_is_not_zero(object, piece, begin)?;
        task.advance(begin + length as u64 - at);
        at = begin + length as u64;
    }
    Ok(copied)
}

/// Writes the records that have anything in them; returns how many bytes.
fn write_what_is_not_zero(object: &Object, bytes: &[u8], offset_bytes: u64) -> anyhow::Result<u64> {
    let mut at = 0;
    let mut written = 0;
    while at < bytes.len() {
        let left = blockpool::RECORD_BYTES - (offset_bytes + at as u64) % blockpool::RECORD_BYTES;
        let end = bytes.len().min(at + left as usize);
        if bytes[at..end].iter().any(|byte| *byte != 0) {
            object.write_at(&bytes[at..end], offset_bytes + at as u64)?;
            written += (end - at) as u64;
        }
        at = end;
    }
    Ok(written)
}

fn import_stream(
    mut source: impl Read,
    object: &Object,
    task: &dyn fcvm_image::progress::Task,
) -> anyhow::Result<u64> {
    let mut buffer = vec![0; COPY_BYTES];
    let mut at = 0;
    loop {
        let mut filled = 0;
        while filled < buffer.len() {
            match source.read(&mut buffer[filled..])? {
                0 => break,
                count => filled += count,
            }
        }
        if filled == 0 {
            return Ok(at);
        }
        object.set_size(at + filled as u64)?;
        write_what_is_not_zero(object, &buffer[..filled], at)?;
        at += filled as u64;
        task.advance(filled as u64);
    }
}

fn export(pool: &Pool, name: &str, file: &Path) -> anyhow::Result<()> {
    let object = pool.open_object(&name.parse()?)?;
    let length_bytes = object.size_bytes()?;
    let failed = || format!("cannot write {}", file.display());
    let target = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(file)
        .with_context(failed)?;
    target.set_len(length_bytes).with_context(failed)?;
    let progress = Shown::new(false);
    let task = progress.start(name, Some(length_bytes));
    let mut buffer = vec![0; COPY_BYTES];
    let mut at = 0;
    while let Some((begin, end)) = object.next_data(at)? {
        let length = (end - begin).min(COPY_BYTES as u64) as usize;
        let piece = &mut buffer[..length];
        object.read_at(piece, begin)?;
        target.write_all_at(piece, begin).with_context(failed)?;
        task.advance(begin + length as u64 - at);
        at = begin + length as u64;
    }
    target.sync_all().with_context(failed)?;
    task.finish(&size(length_bytes));
    Ok(())
}

fn scrub(pool: &Pool, format: Format) -> anyhow::Result<u8> {
    let progress = Shown::new(false);
    let task = progress.start("scrub", None);
    let mut told = 0;
    let report = pool.scrub(|blocks| {
        task.advance((blocks - told) * blockpool::BLOCK_BYTES);
        told = blocks;
    })?;
    task.finish(&format!(
        "{} pages of metadata and {} of shared data read",
        report.page_copies, report.data_blocks
    ));
    if format == Format::Json {
        let lost: Vec<_> = report
            .lost
            .iter()
            .map(|lost| {
                json!({
                    "name": lost.name, "offset_bytes": lost.offset_bytes,
                    "length_bytes": lost.length_bytes, "reason": lost.reason,
                })
            })
            .collect();
        let value = json!({
            "page_copies": report.page_copies, "repaired_copies": report.repaired_copies,
            "data_blocks": report.data_blocks, "new_sums": report.new_sums,
            "lost": lost, "problems": report.problems,
        });
        println!("{}", serde_json::to_string_pretty(&value)?);
    } else {
        println!(
            "{} damaged copies repaired, {} blocks verified, {} got their first checksum",
            report.repaired_copies,
            report.data_blocks - report.new_sums,
            report.new_sums
        );
        for lost in &report.lost {
            println!(
                "lost: {} bytes at {} of '{}': {}",
                lost.length_bytes,
                lost.offset_bytes,
                printable(&lost.name),
                lost.reason
            );
        }
        for problem in &report.problems {
            println!("{problem}");
        }
    }
    let is_whole = report.lost.is_empty() && report.problems.is_empty();
    Ok(if is_whole {
        crate::EXIT_SUCCESS
    } else {
        EXIT_FCVM_FAILED
    })
}

fn check(path: &Path, repair: bool, format: Format) -> anyhow::Result<u8> {
    let disk = Arc::new(disk(path)?);
    let pool = match repair {
        true => Pool::open_and_recount(disk),
        false => Pool::open(disk),
    };
    let report = pool.with_context(|| path.display().to_string())?.check()?;
    if format == Format::Json {
        let value = json!({
            "page_count": report.page_count, "record_count": report.record_count,
            "shared_record_count": report.shared_record_count,
            "problem_count": report.problem_count, "problems": report.problems,
        });
        println!("{}", serde_json::to_string_pretty(&value)?);
    } else {
        for problem in &report.problems {
            println!("{problem}");
        }
        println!(
            "{} records of data, {} of them with several references, {} pages of metadata: {} problems",
            report.record_count,
            report.shared_record_count,
            report.page_count,
            report.problem_count
        );
    }
    Ok(if report.problem_count == 0 {
        crate::EXIT_SUCCESS
    } else {
        EXIT_FCVM_FAILED
    })
}
