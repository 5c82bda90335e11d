//! What clones are made from, and how it travels between processes of fcvm.
//!
//! A clone's owner gets, one after the other: what it is to run ([`Assignment`]), what it is made on
//! ([`Offer`], with descriptors of memory and disk), and, once it waits, the state ([`StateMessage`]).
//! The one who has the state may be the source's owner in a fork, or a process that has read a
//! snapshot.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use anyhow::{Context as _, bail};
use fcvm_hypervisor::{Accelerator, DEVICE_STATE_BYTES_MAX, DeviceLine, DeviceState};
use fcvm_memory::page_file::anonymous_file;
use fcvm_storage::{FrozenDisk, LayerFormat};
use fcvm_types::VmName;
use fcvm_types::record::{Lineage, MemoryOrigin};
use fcvm_wire::Mark;
use serde::{Deserialize, Serialize};
use tokio::task::JoinSet;

use crate::handover::Handover;
use crate::owner::spec::VmSpec;

/// What a clone is made on; some of it may get its content only when the source is frozen.
pub(crate) struct Template {
    pub(crate) memory: TemplateMemory,
    pub(crate) disk: Option<FrozenDisk>,
}

/// The memory that a clone is made on.
pub(crate) enum TemplateMemory {
    /// Mapped copy-on-write.
    File(OwnedFd),
    /// Brought page by page by the memory server of this socket.
    Served(PathBuf),
}

impl TemplateMemory {
    /// The file, where the one who has it needs it.
    pub(crate) fn file(&self) -> anyhow::Result<File> {
        match self {
            Self::File(file) => Ok(file.try_clone()?.into()),
            Self::Served(_) => bail!("the memory is with its server"),
        }
    }
}

/// State that belongs to a template.
pub(crate) struct StateOfVm {
    /// By which the agent knows its new owner.
    pub(crate) mark: Mark,
    pub(crate) device: DeviceState,
    /// A page file over the memory.
    pub(crate) difference: Option<File>,
}

/// First message to a clone's owner: what it is to run. Descriptors: for one that is made ready ahead,
/// the channel on which it is asked for.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Assignment {
    pub(crate) spec: VmSpec,
    pub(crate) lineage: Lineage,
}

/// What a clone that was made ready ahead is asked for with. Descriptor: where its owner reports.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Wish {
    pub(crate) name: VmName,
    pub(crate) remove_on_exit: bool,
}

/// Second message: what the clone is made on. Descriptors: the memory where it is a file, then the files of
/// the disk.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Offer {
    pub(crate) accelerator: Accelerator,
    pub(crate) device_line: DeviceLine,
    /// Where the memory comes from, and why.
    pub(crate) origin: MemoryOrigin,
    /// Instead of the memory's descriptor.
    pub(crate) memory_server: Option<PathBuf>,
    pub(crate) disk: Option<DiskOffer>,
}

/// The disk that a clone is made on.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct DiskOffer {
    /// Formats of its files, the lowest first.
    pub(crate) layers: Vec<LayerFormat>,
    pub(crate) size_bytes: u64,
}

/// The clone's answer: its process waits.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Waiting;

/// Last message: the state. Descriptors: device state, then what is said to be there.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct StateMessage {
    /// By which the agent knows its new owner.
    pub(crate) mark: Mark,
    /// A page file over the memory follows.
    pub(crate) has_difference: bool,
}

/// Tells a clone what it is made on.
pub(crate) fn send_offer(
    channel: &Handover,
    accelerator: Accelerator,
    device_line: &DeviceLine,
    template: &Template,
    reason: &str,
) -> anyhow::Result<()> {
    let layers = template.disk.as_ref().map_or(&[][..], FrozenDisk::layers);
    let offer = Offer {
        accelerator,
        device_line: device_line.clone(),
        origin: MemoryOrigin {
            backend: match &template.memory {
                TemplateMemory::File(_) => "file".to_owned(),
                TemplateMemory::Served(_) => "uffd".to_owned(),
            },
            reason: reason.to_owned(),
        },
        memory_server: match &template.memory {
            TemplateMemory::File(_) => None,
            TemplateMemory::Served(socket) => Some(socket.clone()),
        },
        disk: template.disk.as_ref().map(|disk| DiskOffer {
            layers: layers.iter().map(|layer| layer.format).collect(),
            size_bytes: disk.size_bytes(),
        }),
    };
    let mut descriptors = Vec::new();
    if let TemplateMemory::File(memory) = &template.memory {
        descriptors.push(memory.as_fd());
    }
    descriptors.extend(layers.iter().map(|layer| layer.file.as_fd()));
    channel.send(&offer, &descriptors)
}

/// Takes what a clone is made on.
pub(crate) async fn take_offer(channel: &Handover) -> anyhow::Result<(Offer, Template)> {
    let Some((offer, descriptors)) = channel.receive::<Offer>().await? else {
        bail!("the source ended, or gave up the fork");
    };
    let mut descriptors = descriptors.into_iter();
    let memory = match &offer.memory_server {
        Some(socket) => TemplateMemory::Served(socket.clone()),
        None => {
            let memory = descriptors.next().context("the source sent no memory")?;
            TemplateMemory::File(memory)
        }
    };
    let disk = match &offer.disk {
        Some(disk) => {
            let files = descriptors.map(File::from);
            let layers: Vec<_> = files.zip(disk.layers.iter().copied()).collect();
            if layers.len() != disk.layers.len() {
                bail!("the source sent {} files of its disk", layers.len());
            }
            let disk = FrozenDisk::from_layers(layers, disk.size_bytes);
            Some(disk.context("cannot use the source's disk")?)
        }
        None => None,
    };
    Ok((offer, Template { memory, disk }))
}

/// Waits until each clone waits, or has ended; gives those that wait.
pub(crate) async fn all_waiting(channels: Vec<Handover>) -> Vec<Handover> {
    let mut pending = JoinSet::new();
    for channel in channels {
        pending.spawn_local(async move {
            match channel.receive::<Waiting>().await {
                Ok(Some(_)) => Some(channel),
                Ok(None) | Err(_) => None,
            }
        });
    }
    pending.join_all().await.into_iter().flatten().collect()
}

/// Sends the state to a clone that waits.
pub(crate) fn send_state(
    channel: &Handover,
    device: &DeviceState,
    difference: Option<&File>,
    mark: Mark,
) -> anyhow::Result<()> {
    let state = anonymous_file("fcvm-device-state", 0)?;
    state
        .write_all_at(device.as_bytes(), 0)
        .context("cannot hand the device state on")?;
    let message = StateMessage {
        mark,
        has_difference: difference.is_some(),
    };
    let mut descriptors: Vec<BorrowedFd<'_>> = vec![state.as_fd()];
    descriptors.extend(difference.map(AsFd::as_fd));
    channel.send(&message, &descriptors)
}

/// Takes the state.
pub(crate) async fn take_state(channel: &Handover) -> anyhow::Result<StateOfVm> {
    let Some((message, descriptors)) = channel.receive::<StateMessage>().await? else {
        bail!("the source ended, or gave up the fork");
    };
    let mut files = descriptors.into_iter().map(File::from);
    let mut next = |what: &str| {
        files
            .next()
            .with_context(|| format!("the source sent no {what}"))
    };
    let state = next("device state")?;
    let difference = message.has_difference.then(|| next("pages")).transpose()?;
    let length = state.metadata()?.len().min(DEVICE_STATE_BYTES_MAX + 1);
    let mut bytes = vec![0; usize::try_from(length)?];
    state.read_exact_at(&mut bytes, 0)?;
    Ok(StateOfVm {
        mark: message.mark,
        device: DeviceState::from_bytes(bytes)?,
        difference,
    })
}
