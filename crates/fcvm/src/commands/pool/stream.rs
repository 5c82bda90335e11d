//! `fcvm pool send` and `fcvm pool receive`.

use std::fs::{File, OpenOptions};
use std::io::{BufReader, BufWriter, IsTerminal, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use anyhow::{Context as _, bail};
use blockpool::{Name, Pool};
use fcvm_image::progress::Progress;
use serde_json::json;

use super::{objects, size};
use crate::args::Format;
use crate::args::pool::{ReceiveArguments, SendArguments};
use crate::errors::printable;
use crate::output::table;
use crate::progress::Shown;

/// Bytes that wait before a pipe is written to or read from.
const PIPE_BYTES: usize = 1 << 20;

pub(super) fn send(pool: &Pool, arguments: &SendArguments) -> anyhow::Result<()> {
    let (name, from) = (&arguments.name, arguments.from.as_deref());
    let output = arguments.output.as_deref();
    let snapshot: Name = name.parse()?;
    // An existing device or pipe is written to, an existing file is not.
    let makes_file = output.is_some_and(|path| !path.exists());
    let target: Box<dyn Write> = match output {
        None if std::io::stdout().is_terminal() => bail!(
            "a stream is nothing for a terminal; use --output FILE or a pipe, as in 'fcvm pool send {name} | ssh HOST fcvm pool receive'"
        ),
        None => Box::new(std::io::stdout().lock()),
        Some(path) => Box::new(open_output(path)?),
    };
    let mut target = BufWriter::with_capacity(PIPE_BYTES, target);
    let progress = Shown::new(false);
    let task = progress.start(name, None);
    let mut told = 0;
    let sent = pool.send(
        &snapshot,
        from,
        arguments.resume.as_deref(),
        &mut target,
        |bytes| {
            task.advance(bytes - told);
            told = bytes;
        },
    );
    let sent = match sent {
        Ok(sent) => sent,
        Err(error) => {
            if let Some(path) = output.filter(|_| makes_file) {
                // Half a stream is none; the failure is what counts.
                let _ = std::fs::remove_file(path);
            }
            return Err(error.into());
        }
    };
    if let Some(reason) = &sent.stale_token {
        progress.message(reason);
    }
    if arguments.format == Format::Table {
        task.finish(&format!(
            "{}, {} of data",
            objects(usize::try_from(sent.objects)?),
            size(sent.data_bytes)
        ));
        return Ok(());
    }
    let value = json!({
        "name": name, "from": from, "objects": sent.objects, "data_bytes": sent.data_bytes,
        "stream_bytes": sent.stream_bytes, "stale_token": sent.stale_token,
    });
    let text = serde_json::to_string_pretty(&value)?;
    // Standard output may be the stream.
    match output {
        Some(_) => println!("{text}"),
        None => eprintln!("{text}"),
    }
    Ok(())
}

fn open_output(path: &Path) -> anyhow::Result<File> {
    let mut options = OpenOptions::new();
    options.write(true).mode(0o600);
    if !path.exists() || path.is_file() {
        options.create_new(true);
    }
    options
        .open(path)
        .with_context(|| format!("cannot write {}", path.display()))
}

pub(super) fn receive(pool: &Pool, arguments: &ReceiveArguments) -> anyhow::Result<()> {
    if arguments.list {
        return list(pool, arguments.format);
    }
    let dataset = arguments.dataset.as_deref();
    let dataset = dataset.map(str::parse::<Name>).transpose()?;
    let source: Box<dyn Read> = match &arguments.input {
        None if std::io::stdin().is_terminal() => bail!(
            "there is no stream on a terminal; use --input FILE or a pipe from 'fcvm pool send'"
        ),
        None => Box::new(std::io::stdin().lock()),
        Some(path) => {
            let opened = File::open(path);
            Box::new(opened.with_context(|| format!("cannot read {}", path.display()))?)
        }
    };
    let mut source = BufReader::with_capacity(PIPE_BYTES, source);
    let progress = Shown::new(false);
    let task = progress.start("receive", None);
    let mut told = 0;
    let received = pool.receive(dataset.as_ref(), arguments.force, &mut source, |bytes| {
        task.advance(bytes - told);
        told = bytes;
    })?;
    if received.is_started_over {
        progress.message("what an earlier receive had was dropped: the stream starts over");
    }
    if arguments.format == Format::Json {
        let value = json!({
            "dataset": received.dataset, "snapshot": received.snapshot,
            "objects": received.objects, "data_bytes": received.data_bytes,
            "stream_bytes": received.stream_bytes, "is_resumed": received.is_resumed,
            "is_started_over": received.is_started_over,
        });
        println!("{}", serde_json::to_string_pretty(&value)?);
        return Ok(());
    }
    task.finish(&format!("{} of data", size(received.data_bytes)));
    println!(
        "{}@{}: {}",
        printable(&received.dataset),
        printable(&received.snapshot),
        objects(usize::try_from(received.objects)?)
    );
    Ok(())
}

/// Shows receives that did not come to their end.
fn list(pool: &Pool, format: Format) -> anyhow::Result<()> {
    let partial = pool.partial_receives()?;
    if format == Format::Json {
        let rows: Vec<_> = partial
            .iter()
            .map(|partial| json!({ "dataset": partial.dataset, "token": partial.token }))
            .collect();
        println!("{}", serde_json::to_string_pretty(&rows)?);
        return Ok(());
    }
    let rows = partial
        .into_iter()
        .map(|partial| vec![partial.dataset, partial.token]);
    table(&["DATASET", "TOKEN"], rows);
    Ok(())
}
