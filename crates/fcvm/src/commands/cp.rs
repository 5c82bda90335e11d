//! `fcvm cp`: files between a VM and the host as tar streams, by the rules of `docker cp`.
//!
//! The guest's archive is untrusted: it is unpacked below one directory, out of which no member can
//! lead, whatever its name or the links before it.

use std::fs::File;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};
use fcvm_wire::frame::{Frame, MAX_DATA_BYTES};
use fcvm_wire::message::PathStat;
use fcvm_wire::{Channel, FailureKind, FrameKind, Outcome, Request};
use tokio::sync::mpsc;

use crate::args::CpArguments;
use crate::client::{Client, Flow, finished};
use crate::context::Context;
use crate::errors::guest_failure;
use crate::state::{StateStore, random};

/// One end of a copy.
#[derive(Debug, PartialEq, Eq)]
enum End {
    /// A path in a VM.
    Vm(String, String),
    /// A path of the host.
    Local(PathBuf),
    /// A tar archive on standard input or output.
    Stream,
}

impl End {
    /// `VM:PATH`; a host path with a colon is written `./a:b`.
    fn parse(text: &str) -> Self {
        match text.split_once(':') {
            _ if text == "-" => Self::Stream,
            Some((vm, path)) if !vm.is_empty() && !vm.contains('/') && !vm.starts_with('.') => {
                Self::Vm(
                    vm.to_owned(),
                    if path.is_empty() {
                        "/".to_owned()
                    } else {
                        path.to_owned()
                    },
                )
            }
            _ => Self::Local(text.into()),
        }
    }
}

pub(crate) async fn run(context: &Context, arguments: &CpArguments) -> anyhow::Result<u8> {
    let store = context.state()?;
    match (
        End::parse(&arguments.source),
        End::parse(&arguments.destination),
    ) {
        (End::Vm(vm, path), End::Stream) => {
            let request = Request::ArchiveRead {
                path,
                follow: arguments.follow_link,
            };
            let client = connect(&store, &vm).await?.start(request).await?;
            download(client, |mut archive| {
                std::io::copy(&mut archive, &mut std::io::stdout().lock())
                    .context("cannot write the archive")
                    .map(drop)
            })
            .await?;
        }
        (End::Vm(vm, path), End::Local(destination)) => {
            from_vm(&store, arguments, &vm, path, &destination).await?
        }
        (End::Local(source), End::Vm(vm, path)) => {
            to_vm(&store, arguments, &source, &vm, &path).await?
        }
        (End::Stream, End::Vm(vm, path)) => {
            let request = Request::ArchiveWrite {
                directory: path,
                keep_owners: arguments.archive,
            };
            let client = connect(&store, &vm).await?.start(request).await?;
            upload(client, |mut archive| {
                std::io::copy(&mut std::io::stdin().lock(), &mut archive)
                    .context("cannot read the archive")
                    .map(drop)
            })
            .await?;
        }
        (End::Vm(..), End::Vm(..)) => {
            bail!("one end of a copy has to be on the host: copy in two steps")
        }
        _ => bail!("one end of a copy has to be in a VM: write it as VM:PATH"),
    }
    Ok(crate::EXIT_SUCCESS)
}

async fn connect(store: &StateStore, vm: &str) -> anyhow::Result<Client> {
    Client::connect(store, &store.find(vm)?).await
}

/// What a path in the VM is; `None` where there is nothing.
async fn stat(store: &StateStore, vm: &str, path: &str) -> anyhow::Result<Option<PathStat>> {
    let client = connect(store, vm).await?;
    match client
        .start(Request::Stat {
            path: path.to_owned(),
        })
        .await?
        .outcome()
        .await?
    {
        Outcome::Stat(stat) => Ok(Some(stat)),
        Outcome::Failed(failure) if failure.kind == FailureKind::PathNotFound => Ok(None),
        Outcome::Failed(failure) => Err(guest_failure(failure)),
        other => bail!("the guest's agent gave an answer that makes no sense ({other:?})"),
    }
}

/// The path means the content of the directory, not the directory.
fn means_content(path: &str) -> bool {
    path.ends_with("/.") || path == "."
}

async fn from_vm(
    store: &StateStore,
    arguments: &CpArguments,
    vm: &str,
    path: String,
    destination: &Path,
) -> anyhow::Result<()> {
    let Some(source) = stat(store, vm, &path).await? else {
        bail!("there is no '{path}' in VM '{vm}'")
    };
    let into = place(&path, source.is_directory, destination)?;
    let request = Request::ArchiveRead {
        path,
        follow: arguments.follow_link,
    };
    let client = connect(store, vm).await?.start(request).await?;
    let owners = arguments.archive && rustix::process::geteuid().is_root();
    download(client, move |archive| into.unpack(archive, owners)).await
}

/// Where an archive goes on the host.
#[derive(Debug)]
enum Place {
    /// Its members, under their own names, into an existing directory.
    Into(PathBuf),
    /// Its one first-level member, under this name.
    As(PathBuf),
}

fn place(source: &str, source_is_directory: bool, destination: &Path) -> anyhow::Result<Place> {
    let ends_with_slash = destination.as_os_str().as_encoded_bytes().ends_with(b"/");
    let shown = destination.display();
    match std::fs::metadata(destination) {
        Ok(metadata) if metadata.is_dir() => Ok(Place::Into(destination.to_owned())),
        Ok(_) if source_is_directory => bail!("cannot copy a directory over the file {shown}"),
        Ok(_) if ends_with_slash => bail!("{shown} is not a directory"),
        Ok(_) => Ok(Place::As(destination.to_owned())),
        Err(_) if source_is_directory && means_content(source) => {
            std::fs::create_dir(destination).with_context(|| format!("cannot create {shown}"))?;
            Ok(Place::Into(destination.to_owned()))
        }
        Err(_) if ends_with_slash && !source_is_directory => bail!("there is no directory {shown}"),
        Err(_) => Ok(Place::As(destination.to_owned())),
    }
}

impl Place {
    fn unpack(&self, archive: impl Read, owners: bool) -> anyhow::Result<()> {
        match self {
            Self::Into(directory) => unpack(archive, directory, owners),
            Self::As(target) => {
                let parent = target
                    .parent()
                    .filter(|parent| !parent.as_os_str().is_empty())
                    .unwrap_or(Path::new("."));
                let temporary = Temporary::create(parent)?;
                unpack(archive, &temporary.0, owners)?;
                let mut members = std::fs::read_dir(&temporary.0)?;
                let (Some(member), None) = (members.next(), members.next()) else {
                    bail!("the guest sent an archive that does not hold one file or directory");
                };
                std::fs::rename(member?.path(), target)
                    .with_context(|| format!("cannot write {}", target.display()))
            }
        }
    }
}

/// A directory that is removed with all that is left in it.
struct Temporary(PathBuf);

impl Temporary {
    fn create(parent: &Path) -> anyhow::Result<Self> {
        let path = parent.join(format!(".fcvm-cp-{:016x}", u64::from_le_bytes(random()?)));
        std::fs::create_dir(&path)
            .with_context(|| format!("cannot write into {}", parent.display()))?;
        Ok(Self(path))
    }
}

impl Drop for Temporary {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn unpack(archive: impl Read, directory: &Path, owners: bool) -> anyhow::Result<()> {
    let mut archive = tar::Archive::new(archive);
    archive.set_preserve_permissions(true);
    archive.set_preserve_ownerships(owners);
    // The library refuses members that lead out of the directory, also through links.
    archive
        .unpack(directory)
        .with_context(|| format!("cannot copy into {}", directory.display()))?;
    // What follows the archive's end is padding.
    std::io::copy(&mut archive.into_inner(), &mut std::io::sink())?;
    Ok(())
}

async fn to_vm(
    store: &StateStore,
    arguments: &CpArguments,
    source: &Path,
    vm: &str,
    path: &str,
) -> anyhow::Result<()> {
    let shown = source.display();
    let metadata = if arguments.follow_link {
        std::fs::metadata(source)
    } else {
        std::fs::symlink_metadata(source)
    };
    let source_is_directory = metadata
        .with_context(|| format!("cannot read {shown}"))?
        .is_dir();
    let content = source_is_directory && means_content(&source.to_string_lossy());
    let target = stat(store, vm, path).await?;
    let (parent, last) = split(path);
    let (directory, name) = match target {
        Some(stat) if stat.is_directory && content => (path.to_owned(), None),
        Some(stat) if stat.is_directory => {
            let name = std::path::absolute(source)?;
            let Some(name) = name.file_name() else {
                bail!("{shown} has no name: add '/.' to copy its content")
            };
            (path.to_owned(), Some(name.to_owned()))
        }
        Some(_) if source_is_directory => {
            bail!("cannot copy a directory over the file '{path}' in VM '{vm}'")
        }
        None if path.ends_with('/') && !source_is_directory => {
            bail!("there is no directory '{path}' in VM '{vm}'")
        }
        _ => (parent.to_owned(), Some(last.into())),
    };
    let client = connect(store, vm).await?;
    let client = client
        .start(Request::ArchiveWrite {
            directory,
            keep_owners: arguments.archive,
        })
        .await?;
    let (source, follow) = (source.to_owned(), arguments.follow_link);
    upload(client, move |archive| {
        let mut builder = tar::Builder::new(archive);
        builder.follow_symlinks(false);
        pack(
            &mut builder,
            &source,
            name.as_deref().map_or(Path::new("."), Path::new),
            follow,
        )?;
        builder
            .into_inner()
            .and_then(|archive| archive.flush())
            .context("cannot send the archive")
    })
    .await
}

/// Parent and last component of a path in a VM.
fn split(path: &str) -> (&str, &str) {
    let trimmed = path.trim_end_matches('/');
    match trimmed.rsplit_once('/') {
        Some(("", last)) => ("/", last),
        Some((parent, last)) => (parent, last),
        None => ("/", trimmed),
    }
}

fn pack<W: Write>(
    builder: &mut tar::Builder<W>,
    source: &Path,
    name: &Path,
    follow: bool,
) -> anyhow::Result<()> {
    let metadata = if follow {
        std::fs::metadata(source)
    } else {
        std::fs::symlink_metadata(source)
    }?;
    let packed = if metadata.is_dir() {
        builder.append_dir_all(name, source)
    } else if metadata.is_file() && follow {
        File::open(source).and_then(|mut file| builder.append_file(name, &mut file))
    } else {
        builder.append_path_with_name(source, name)
    };
    packed.with_context(|| format!("cannot copy {}", source.display()))
}

/// A channel's bytes, for a thread that reads.
struct ChannelReader {
    chunks: mpsc::Receiver<Vec<u8>>,
    taken: mpsc::UnboundedSender<usize>,
    current: Vec<u8>,
    at: usize,
}

impl Read for ChannelReader {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        if self.at == self.current.len() {
            // The other side counts credit; when it is gone nobody needs the number.
            let _ = self.taken.send(self.current.len());
            let Some(chunk) = self.chunks.blocking_recv() else {
                return Ok(0);
            };
            (self.current, self.at) = (chunk, 0);
        }
        let length = buffer.len().min(self.current.len() - self.at);
        buffer[..length].copy_from_slice(&self.current[self.at..self.at + length]);
        self.at += length;
        Ok(length)
    }
}

/// Frames the stream brings, for `consume` in a thread of its own.
async fn download(
    mut client: Client,
    consume: impl FnOnce(ChannelReader) -> anyhow::Result<()> + Send + 'static,
) -> anyhow::Result<()> {
    // Holds a whole window of the smallest frames' worth: the credit bounds it in bytes.
    let (sender, chunks) = mpsc::channel(64);
    let (taken, mut credits) = mpsc::unbounded_channel();
    let mut consumer = tokio::task::spawn_blocking(move || {
        consume(ChannelReader {
            chunks,
            taken,
            current: Vec::new(),
            at: 0,
        })
    });
    let mut sender = Some(sender);
    let mut flow = Flow::default();
    let mut outcome = None;
    loop {
        tokio::select! {
            frame = client.next(), if outcome.is_none() => {
                let frame = frame?;
                match frame.kind {
                    FrameKind::Data if frame.channel == Channel::Stdout => {
                        flow.received(&frame)?;
                        if let Some(sender) = &sender {
                            // Fails when the consumer gave up; its own error tells why.
                            let _ = sender.send(frame.payload).await;
                        }
                    }
                    FrameKind::Closed => {
                        outcome = Some(finished(frame.parse()?));
                        sender = None;
                    }
                    _ => {}
                }
            }
            Some(bytes) = credits.recv() => {
                if let Some(credit) = flow.taken(1, Channel::Stdout, bytes) {
                    client.send(credit).await?;
                }
            }
            consumed = &mut consumer => {
                consumed??;
                return outcome.unwrap_or_else(|| bail!("the guest sent more than an archive")).map(drop);
            }
        }
        // The guest's own error tells more than the end of the archive that follows from it.
        if let Some(Err(_)) = &outcome {
            return outcome.unwrap_or_else(|| Ok(Outcome::Done)).map(drop);
        }
    }
}

/// A channel's bytes, from a thread that writes.
struct ChannelWriter {
    chunks: mpsc::Sender<Vec<u8>>,
    buffer: Vec<u8>,
}

impl Write for ChannelWriter {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let length = bytes.len().min(MAX_DATA_BYTES - self.buffer.len());
        self.buffer.extend_from_slice(&bytes[..length]);
        if self.buffer.len() == MAX_DATA_BYTES {
            self.flush()?;
        }
        Ok(length)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        if self.buffer.is_empty() {
            return Ok(());
        }
        let chunk = std::mem::replace(&mut self.buffer, Vec::with_capacity(MAX_DATA_BYTES));
        self.chunks
            .blocking_send(chunk)
            .map_err(|_| std::io::ErrorKind::BrokenPipe.into())
    }
}

/// What `produce` writes in a thread of its own, as frames to the stream.
async fn upload(
    mut client: Client,
    produce: impl FnOnce(&mut ChannelWriter) -> anyhow::Result<()> + Send + 'static,
) -> anyhow::Result<()> {
    let (sender, mut chunks) = mpsc::channel(4);
    let producer = tokio::task::spawn_blocking(move || {
        let mut writer = ChannelWriter {
            chunks: sender,
            buffer: Vec::new(),
        };
        produce(&mut writer)?;
        writer.flush().context("the VM took no more of the archive")
    });
    let mut producer = Some(producer);
    let mut flow = Flow::default();
    loop {
        tokio::select! {
            frame = client.next() => {
                let frame = frame?;
                match frame.kind {
                    FrameKind::Credit => flow.stdin.credited(frame.parse_credit()?),
                    FrameKind::Closed => return finished(frame.parse()?).map(drop),
                    _ => {}
                }
            }
            chunk = chunks.recv(), if producer.is_some() && flow.stdin_open() => match chunk {
                Some(chunk) => {
                    flow.stdin.sent(chunk.len());
                    client.send(Frame::data(1, Channel::Stdin, chunk)).await?;
                }
                None => {
                    if let Some(producer) = producer.take() {
                        // A source that cannot be read ends the copy before the archive looks whole.
                        producer.await??;
                    }
                    client.send(Frame::eof(1, Channel::Stdin)).await?;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ends_are_told_apart() {
        assert_eq!(
            End::parse("web:/etc/hosts"),
            End::Vm("web".into(), "/etc/hosts".into())
        );
        assert_eq!(End::parse("web:"), End::Vm("web".into(), "/".into()));
        for local in ["file", "./a:b", "/a:b", "dir/a:b", ":x"] {
            assert_eq!(End::parse(local), End::Local(local.into()));
        }
        assert_eq!(End::parse("-"), End::Stream);
    }

    #[test]
    fn guest_paths_are_split() {
        assert_eq!(split("/a/b"), ("/a", "b"));
        assert_eq!(split("/a/b/"), ("/a", "b"));
        assert_eq!(split("/a"), ("/", "a"));
        assert_eq!(split("a"), ("/", "a"));
    }

    #[test]
    fn a_hostile_archive_stays_inside() {
        let dir = tempfile::tempdir().unwrap();
        let inside = dir.path().join("inside");
        std::fs::create_dir(&inside).unwrap();
        let mut builder = tar::Builder::new(Vec::new());
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(tar::EntryType::Symlink);
        header.set_size(0);
        builder.append_link(&mut header, "door", "..").unwrap();
        let mut header = tar::Header::new_gnu();
        header.set_size(1);
        header.set_mode(0o644);
        builder
            .append_data(&mut header, "door/escaped", &b"x"[..])
            .unwrap();
        let archive = builder.into_inner().unwrap();
        assert!(Place::Into(inside).unpack(&archive[..], false).is_err());
        assert!(!dir.path().join("escaped").exists());
    }
}
