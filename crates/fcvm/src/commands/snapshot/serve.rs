//! Giving a snapshot's state to clones: by the command that starts them, or by a process that stays.

use std::cell::{Cell, RefCell};
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::rc::Rc;
use std::time::Duration;

use anyhow::{Context as _, bail};
use fcvm_hypervisor::{Accelerator, DeviceLine, DeviceState};
use fcvm_types::record::{Lineage, ProcessIdentity, SnapshotReference};
use fcvm_types::{SnapshotTag, VmId, VmName};
use fcvm_wire::Mark;
use serde::{Deserialize, Serialize};

use super::super::clones::{self, Family, ReadyClone, Spare};
use crate::context::{Context, create_private_dir};
use crate::handover::Handover;
use crate::owner::fork::{ForkReply, ForkRequest, Listener, connect, offer_ready};
use crate::owner::spec::VmSpec;
use crate::signals::{Arrived, Forwarded};
use crate::state::this_process;
use crate::template::{Template, Waiting, all_waiting, send_offer, send_state};

/// How long new clones are not made while the command that took the last ones is busy with them.
const BUSY_LIMIT: Duration = Duration::from_secs(2);

/// How the sockets of serving processes begin; their numbers follow.
const PREFIX: &str = "serve-";

/// A snapshot in memory.
pub(crate) struct Loaded {
    pub(super) tag: SnapshotTag,
    pub(super) id: String,
    /// The VM that it is of.
    pub(super) source: VmId,
    pub(super) source_name: VmName,
    pub(crate) spec: VmSpec,
    pub(super) accelerator: Accelerator,
    pub(super) device_line: DeviceLine,
    pub(super) template: Template,
    /// Why its memory comes from there.
    pub(super) reason: String,
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
    pub(crate) fn served(&self, serve: Option<ProcessIdentity>) -> Served {
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
    pub(crate) async fn give(&self, channels: Vec<Handover>) -> Vec<Handover> {
        for channel in &channels {
            // One whose owner has ended is found out below.
            let _ = send_offer(
                channel,
                self.accelerator,
                &self.device_line,
                &self.template,
                &self.reason,
            );
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
    context.runtime_dir.join(format!("{PREFIX}{pid}.sock"))
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
            let prefixes = [PREFIX, super::serve_memory::PREFIX];
            prefixes.iter().find_map(|prefix| {
                let rest = name.strip_prefix(prefix)?.strip_suffix(".sock")?;
                rest.parse::<i32>().ok()
            })
        });
        // One that is listened to answers.
        let is_dead = || std::os::unix::net::UnixStream::connect(entry.path()).is_err();
        if number.is_some() && connect(&entry.path()).is_err() && is_dead() {
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

/// What a serving process has.
struct Serving {
    context: Context,
    loaded: Loaded,
    served: Served,
    /// How many clones are to be ready.
    standby: usize,
    ready: RefCell<Vec<Spare>>,
    /// New ones are being made.
    filling: Cell<bool>,
}

/// `fcvm snapshot serve`: until it is told to end.
pub(super) async fn serve(context: &Context, loaded: Loaded, standby: u16) -> anyhow::Result<u8> {
    let process = this_process()?;
    let socket = ServeSocket::bind(context, process)?;
    let mut signals = Forwarded::new()?;
    let serving = Rc::new(Serving {
        context: context.clone(),
        served: loaded.served(Some(process)),
        loaded,
        standby: standby.into(),
        ready: RefCell::default(),
        filling: Cell::default(),
    });
    tokio::task::spawn_local(Rc::clone(&serving).fill());
    println!("{}", process.pid);
    loop {
        tokio::select! {
            asking = socket.listener.accept() => match asking {
                Ok(asking) => {
                    tokio::task::spawn_local(Rc::clone(&serving).answer(asking));
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

impl Serving {
    async fn answer(self: Rc<Self>, asking: Handover) {
        if let Err(error) = self.answer_one(&asking).await {
            tracing::debug!("a request was not answered: {error:#}");
        }
        // Once whoever asked is done, so that new clones are not made at the cost of theirs.
        let _ = tokio::time::timeout(BUSY_LIMIT, asking.receive::<()>()).await;
        self.fill().await;
    }

    async fn answer_one(&self, asking: &Handover) -> anyhow::Result<()> {
        asking.send(&self.served, &[])?;
        let Some((mut request, mut channels)) = asking.receive().await? else {
            return Ok(());
        };
        let mut clones = Vec::new();
        if let ForkRequest::Take { count } = request {
            let taken: Vec<Spare> = {
                let mut ready = self.ready.borrow_mut();
                let count = count.min(ready.len());
                ready.drain(..count).collect()
            };
            offer_ready(asking, &taken)?;
            clones.extend(taken.into_iter().map(|spare| spare.channel));
            match asking.receive().await? {
                Some(next) => (request, channels) = next,
                None => return Ok(()),
            }
        }
        if !matches!(request, ForkRequest::Fork) {
            return Ok(());
        }
        let channels = channels
            .into_iter()
            .map(Handover::from_fd)
            .collect::<anyhow::Result<_>>()?;
        clones.extend(self.loaded.give(channels).await);
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

    /// Makes clones ready until there are enough.
    async fn fill(self: Rc<Self>) {
        if self.filling.replace(true) {
            return;
        }
        while self.ready.borrow().len() < self.standby {
            match self.make_ready().await {
                Ok(spare) => self.ready.borrow_mut().push(spare),
                Err(error) => {
                    tracing::warn!("no clones are ready ahead (--standby): {error:#}");
                    break;
                }
            }
        }
        self.filling.set(false);
    }

    async fn make_ready(&self) -> anyhow::Result<Spare> {
        let family = Family {
            source: &self.served.spec,
            lineage: &self.served.lineage,
            ports: &[],
            remove_on_exit: false,
        };
        let spare = Spare::start(&self.context, &family)?;
        let Loaded {
            accelerator,
            device_line,
            template,
            reason,
            device,
            mark,
            ..
        } = &self.loaded;
        send_offer(&spare.channel, *accelerator, device_line, template, reason)?;
        let waits = spare.channel.receive::<Waiting>().await?;
        waits.context("a clone ended before it was ready")?;
        send_state(&spare.channel, device, None, *mark)?;
        Ok(spare)
    }
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

    /// Asks for clones that are ready.
    pub(super) async fn ask_for_ready(&self, count: usize) -> anyhow::Result<Vec<ReadyClone>> {
        clones::ask_for_ready(&self.asking, count).await
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
