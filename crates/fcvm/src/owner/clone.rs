//! From the state of another VM to a running container: the clone's side of a fork.
//!
//! Everything that takes time and does not need the source's state is done before it is asked for.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::FileExt;

use anyhow::{Context as _, bail};
use fcvm_hypervisor::qemu::{DEVICE_STATE_BYTES_MAX, DeviceLine, DeviceState};
use fcvm_hypervisor::{Accelerator, Pause};
use fcvm_memory::page_file::anonymous_file;
use fcvm_memory::{GuestMapping, PageFile};
use fcvm_storage::{FrozenDisk, LayerFormat};
use fcvm_types::guest::ClonePlan;
use fcvm_types::record::{Lineage, VmState};
use fcvm_wire::Mark;
use serde::{Deserialize, Serialize};

use super::freeze::Frozen;
use super::link::AgentLink;
use super::machine::{self, Foundation, Prepared, Template};
use super::spec::VmSpec;
use super::{Built, Entry, Sockets, Stopwatch, boot};
use crate::context::Context;
use crate::handover::Handover;

/// Random bytes that a clone gets.
const ENTROPY_BYTES: usize = 64;

/// First message to a clone's owner: what it is to run.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Assignment {
    pub(crate) spec: VmSpec,
    pub(crate) lineage: Lineage,
}

/// Second message: what the clone is made on. Descriptors: the memory, then the files of the disk.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Offer {
    pub(crate) accelerator: Accelerator,
    pub(crate) device_line: DeviceLine,
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

/// Where a clone gets its state.
pub(crate) struct Source {
    pub(crate) channel: Handover,
    pub(crate) lineage: Lineage,
}

/// State that has arrived.
struct Arrived {
    mark: Mark,
    device: DeviceState,
    difference: Option<File>,
}

/// Tells a clone what it is made on.
pub(super) fn send_offer(
    channel: &Handover,
    accelerator: Accelerator,
    device_line: &DeviceLine,
    template: &Template,
) -> anyhow::Result<()> {
    let layers = template.disk.as_ref().map_or(&[][..], FrozenDisk::layers);
    let offer = Offer {
        accelerator,
        device_line: device_line.clone(),
        disk: template.disk.as_ref().map(|disk| DiskOffer {
            layers: layers.iter().map(|layer| layer.format).collect(),
            size_bytes: disk.size_bytes(),
        }),
    };
    let mut descriptors = vec![template.memory.as_fd()];
    descriptors.extend(layers.iter().map(|layer| layer.file.as_fd()));
    channel.send(&offer, &descriptors)
}

/// Sends the state of a frozen VM to a clone.
pub(super) fn send_state(channel: &Handover, frozen: &Frozen, mark: Mark) -> anyhow::Result<()> {
    let state = anonymous_file("fcvm-device-state", 0)?;
    state
        .write_all_at(frozen.state.as_bytes(), 0)
        .context("cannot hand the device state on")?;
    let message = StateMessage {
        mark,
        has_difference: frozen.difference.is_some(),
    };
    let mut descriptors: Vec<BorrowedFd<'_>> = vec![state.as_fd()];
    descriptors.extend(frozen.difference.as_ref().map(AsFd::as_fd));
    channel.send(&message, &descriptors)
}

/// Makes a clone and takes its container over.
pub(super) async fn build(
    context: &Context,
    spec: &VmSpec,
    source: Source,
    entry: &mut Entry,
    watch: &mut Stopwatch,
) -> anyhow::Result<Built> {
    let channel = source.channel;
    let sockets = Sockets::bind(entry)?;
    let (offer, template) = take_offer(&channel).await?;
    let expected = template.disk.clone();
    let accelerator = offer.accelerator;
    let prepared =
        machine::prepare_clone(context, spec, accelerator, template, entry, watch).await?;
    let Prepared {
        mut standby,
        foundation,
        mut network,
        console,
    } = prepared;
    if let Some(difference) = standby.vm().device_line().difference(&offer.device_line) {
        bail!("the source's state does not fit: {difference}");
    }
    network.ready().await?;
    watch.lap("network ready");
    entry.update(|record| record.state = VmState::Booting)?;
    channel.send(&Waiting, &[])?;
    let arrived = take_state(&channel).await?;
    watch.lap("state");
    fill(
        &foundation,
        expected.as_ref(),
        &arrived,
        standby.vm().identity().pid,
    )?;
    watch.lap("memory and disk");
    let socket = standby
        .take_agent()
        .context("the hypervisor gives no channel to the agent")?;
    let plan = ClonePlan {
        identity: spec.identity(network.guest.clone()),
        realtime_ns: super::realtime_ns(),
        entropy: entropy()?,
    };
    // On its way before the guest runs: the first thing that its agent reads.
    let adopting = AgentLink::adopt(socket, arrived.mark, plan).await?;
    let machine = standby.load(&arrived.device).await?;
    watch.lap("load");
    machine.resume().await?;
    watch.lap("resume");
    let adopted = async {
        let (link, stream) = adopting.finish().await?;
        boot::opened(&stream).await?;
        Ok::<_, anyhow::Error>((link, stream))
    };
    let console_log = entry.paths.console_log();
    let (link, stream) = tokio::select! {
        adopted = tokio::time::timeout(spec.boot_timeout, adopted) => adopted.with_context(|| {
            let limit = format!("the clone did not answer within {} s", spec.boot_timeout.as_secs());
            machine::boot_failure(&limit, &console_log)
        })??,
        exit = machine.wait_exit() => bail!("the clone ended before it answered ({exit})"),
    };
    watch.lap("agent");
    Ok(Built {
        machine,
        foundation,
        network,
        link,
        stream,
        sockets,
        console,
    })
}

async fn take_offer(channel: &Handover) -> anyhow::Result<(Offer, Template)> {
    let Some((offer, descriptors)) = channel.receive::<Offer>().await? else {
        bail!("the source ended, or gave up the fork");
    };
    let mut descriptors = descriptors.into_iter();
    let memory = descriptors.next().context("the source sent no memory")?;
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

async fn take_state(channel: &Handover) -> anyhow::Result<Arrived> {
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
    Ok(Arrived {
        mark: message.mark,
        device: DeviceState::from_bytes(bytes)?,
        difference,
    })
}

/// Gives the waiting process the disk's content and the pages that differ from the memory below.
fn fill(
    foundation: &Foundation,
    frozen: Option<&FrozenDisk>,
    arrived: &Arrived,
    pid: i32,
) -> anyhow::Result<()> {
    if let (Some(frozen), Some(disk)) = (frozen, &*foundation.scratch.borrow()) {
        foundation.store.fill(disk, frozen)?;
    }
    if let Some(difference) = &arrived.difference {
        let pages = PageFile::open(difference.try_clone()?)?;
        let memory = foundation.memory.borrow();
        GuestMapping::find(pid, &*memory)?.apply(&pages)?;
    }
    Ok(())
}

fn entropy() -> anyhow::Result<String> {
    let bytes: [u8; ENTROPY_BYTES] = crate::state::random()?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}
