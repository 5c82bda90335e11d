//! Giving a snapshot's state to clones: by the command that starts them, or by a process that stays.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::rc::Rc;

use anyhow::{Context as _, bail};
use fcvm_hypervisor::Accelerator;
use fcvm_hypervisor::qemu::{DeviceLine, DeviceState};
use fcvm_types::record::{Lineage, ProcessIdentity, SnapshotReference};
use fcvm_types::{SnapshotTag, VmId, VmName};
use fcvm_wire::Mark;
use serde::{Deserialize, Serialize};

use crate::context::{Context, create_private_dir};
use crate::handover::Handover;
use crate::owner::fork::{ForkReply, ForkRequest, Listener, connect};
use crate::owner::spec::VmSpec;
use crate::signals::{Arrived, Forwarded};
use crate::state::this_process;
use crate::template::{Template, all_waiting, send_offer, send_state};

/// A snapshot in memory.
pub(super) struct Loaded {
    pub(super) tag: SnapshotTag,
    pub(super) id: String,
    /// The VM that it is of.
    pub(super) source: VmId,
    pub(super) source_name: VmName,
    pub(super) spec: VmSpec,
    pub(super) accelerator: Accelerator,
    pub(super) device_line: DeviceLine,
    pub(super) template: Template,
    pub(super) device: DeviceState,
    pub(super) mark: Mark,
}

/// What a command has to know of a snapshot to start clones of it.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Served {
    pub(crate) spec: VmSpec,
    pub(crate) lineage: Lineage,
}

impl Loaded {
    /// What clones of it have in common.
    pub(super) fn served(&self, serve: Option<ProcessIdentity>) -> Served {
        Served {
            spec: self.spec.clone(),
            lineage: Lineage {
                parent: self.source.clone(),
                parent_name: self.source_name.clone(),
                snapshot: Some(self.tag.to_string()),
                serve,
                base: Some(SnapshotReference {
                    tag: self.tag.to_string(),
                    id: self.id.clone(),
                }),
            },
        }
    }

    /// Gives the state to clones; gives the channels of those that got it.
    pub(super) async fn give(&self, channels: Vec<Handover>) -> Vec<Handover> {
        for channel in &channels {
            // One whose owner has ended is found out below.
            let _ = send_offer(channel, self.accelerator, &self.device_line, &self.template);
        }
        let waiting = all_waiting(channels).await;
        for channel in &waiting {
            // A clone that has ended meanwhile says so itself.
            let _ = send_state(channel, &self.device, None, self.mark);
        }
        waiting
    }
}

/// The socket of a serving process. Removed with it.
struct ServeSocket {
    path: PathBuf,
    listener: Listener,
}

fn socket_path(context: &Context, pid: i32) -> PathBuf {
    context.runtime_dir.join(format!("serve-{pid}.sock"))
}

/// Removes the sockets that killed processes have left.
pub(crate) fn remove_dead_sockets(context: &Context) -> anyhow::Result<Vec<PathBuf>> {
    let mut removed = Vec::new();
    let Ok(entries) = std::fs::read_dir(&context.runtime_dir) else {
        return Ok(removed);
    };
    for entry in entries.flatten() {
        let name = entry.file_name();
        let number = name.to_str().and_then(|name| {
            name.strip_prefix("serve-")?
                .strip_suffix(".sock")?
                .parse::<i32>()
                .ok()
        });
        // One that is listened to answers.
        if number.is_some() && connect(&entry.path()).is_err() {
            std::fs::remove_file(entry.path())
                .with_context(|| format!("cannot remove {}", entry.path().display()))?;
            removed.push(entry.path());
        }
    }
    Ok(removed)
}

impl ServeSocket {
    fn bind(context: &Context, process: ProcessIdentity) -> anyhow::Result<Self> {
        create_private_dir(&context.runtime_dir)?;
        let path = socket_path(context, process.pid);
        // A process of the same number that was killed may have left one.
        let _ = std::fs::remove_file(&path);
        let listener = Listener::bind(&path)?;
        Ok(Self { path, listener })
    }
}

impl Drop for ServeSocket {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

/// `fcvm snapshot serve`: until it is told to end.
pub(super) async fn serve(context: &Context, loaded: Loaded) -> anyhow::Result<u8> {
    let process = this_process()?;
    let socket = ServeSocket::bind(context, process)?;
    let mut signals = Forwarded::new()?;
    println!("{}", process.pid);
    let served = Rc::new((loaded.served(Some(process)), loaded));
    loop {
        tokio::select! {
            asking = socket.listener.accept() => match asking {
                Ok(asking) => {
                    tokio::task::spawn_local(answer(asking, Rc::clone(&served)));
                }
                Err(error) => bail!("no clone can be asked for any more: {error:#}"),
            },
            arrived = signals.next() => if let Arrived::Signal(_) = arrived {
                // The clones' channels close with this process, and the clones end.
                return Ok(crate::EXIT_SUCCESS);
            },
        }
    }
}

async fn answer(asking: Handover, served: Rc<(Served, Loaded)>) {
    if let Err(error) = answer_one(asking, &served.0, &served.1).await {
        tracing::debug!("a request was not answered: {error:#}");
    }
}

async fn answer_one(asking: Handover, served: &Served, loaded: &Loaded) -> anyhow::Result<()> {
    asking.send(served, &[])?;
    let Some((ForkRequest::Fork, channels)) = asking.receive().await? else {
        return Ok(());
    };
    let channels = channels
        .into_iter()
        .map(Handover::from_fd)
        .collect::<anyhow::Result<_>>()?;
    let clones = loaded.give(channels).await;
    let reply = match clones.is_empty() {
        true => ForkReply::NoClone,
        false => ForkReply::Frozen {
            pause_us: 0,
            timings_us: Vec::new(),
        },
    };
    asking.send(&reply, &[])?;
    for clone in clones {
        // Kept open as long as the clone is there: its closing is what the clone ends by.
        tokio::task::spawn_local(async move { clone.receive::<()>().await.map(drop) });
    }
    Ok(())
}

/// A process that serves a snapshot, as a command sees it.
pub(super) struct Server {
    asking: Handover,
    pub(super) served: Served,
}

impl Server {
    /// Connects to the process of this number.
    pub(super) async fn connect(context: &Context, pid: i32) -> anyhow::Result<Self> {
        let none = || {
            format!(
                "process {pid} serves no snapshot: 'fcvm snapshot serve TAG' does, and prints its number"
            )
        };
        let asking = connect(&socket_path(context, pid)).with_context(none)?;
        let (served, _) = asking.receive::<Served>().await?.with_context(none)?;
        Ok(Self { asking, served })
    }

    /// Asks for clones.
    pub(super) async fn give(self, channels: Vec<OwnedFd>) -> anyhow::Result<()> {
        let descriptors: Vec<_> = channels.iter().map(AsFd::as_fd).collect();
        self.asking.send(&ForkRequest::Fork, &descriptors)?;
        drop(channels);
        self.asking
            .receive::<ForkReply>()
            .await?
            .context("the process that serves the snapshot has ended")?;
        Ok(())
    }
}

/// A copy of a descriptor as a file.
pub(super) fn file_of(fd: &impl AsFd) -> anyhow::Result<File> {
    Ok(File::from(fd.as_fd().try_clone_to_owned()?))
}
