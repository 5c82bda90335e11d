//! From the state of another VM to a running container: the clone's side of a fork.
//!
//! Everything that takes time and does not need the source's state is done before it is asked for.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;

use anyhow::{Context as _, bail};
use fcvm_hypervisor::qemu::{DEVICE_STATE_BYTES_MAX, DeviceLine, DeviceState};
use fcvm_hypervisor::{Accelerator, Pause};
use fcvm_memory::page_file::anonymous_file;
use fcvm_memory::{GuestMapping, PageFile};
use fcvm_types::guest::ClonePlan;
use fcvm_types::record::{Lineage, VmState};
use fcvm_wire::Mark;
use serde::{Deserialize, Serialize};

use super::freeze::Frozen;
use super::link::AgentLink;
use super::machine::{self, Foundation, Prepared};
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

/// Second message: what the clone is made on. Descriptors: the memory.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Offer {
    pub(crate) accelerator: Accelerator,
    pub(crate) device_line: DeviceLine,
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
    /// The disk's content follows.
    pub(crate) has_scratch: bool,
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
    scratch: Option<File>,
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
        has_scratch: frozen.scratch.is_some(),
    };
    let mut descriptors: Vec<BorrowedFd<'_>> = vec![state.as_fd()];
    descriptors.extend(frozen.difference.as_ref().map(AsFd::as_fd));
    descriptors.extend(frozen.scratch.as_ref().map(AsFd::as_fd));
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
    let (offer, memory) = take_offer(&channel).await?;
    let accelerator = offer.accelerator;
    let prepared = machine::prepare_clone(context, spec, accelerator, memory, entry, watch).await?;
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
    fill(&foundation, &arrived, standby.vm().identity().pid)?;
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

async fn take_offer(channel: &Handover) -> anyhow::Result<(Offer, OwnedFd)> {
    let Some((offer, descriptors)) = channel.receive::<Offer>().await? else {
        bail!("the source ended, or gave up the fork");
    };
    let memory = descriptors.into_iter().next();
    Ok((offer, memory.context("the source sent no memory")?))
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
    let scratch = message.has_scratch.then(|| next("disk")).transpose()?;
    let length = state.metadata()?.len().min(DEVICE_STATE_BYTES_MAX + 1);
    let mut bytes = vec![0; usize::try_from(length)?];
    state.read_exact_at(&mut bytes, 0)?;
    Ok(Arrived {
        mark: message.mark,
        device: DeviceState::from_bytes(bytes)?,
        difference,
        scratch,
    })
}

/// Gives the waiting process the disk's content and the pages that differ from the memory below.
fn fill(foundation: &Foundation, arrived: &Arrived, pid: i32) -> anyhow::Result<()> {
    match (&arrived.scratch, &foundation.scratch) {
        (Some(content), Some(disk)) => {
            fcvm_storage::clone_file(content, disk).context("cannot fill the clone's disk")?;
        }
        (None, None) => {}
        _ => bail!("the source and its clone differ in their disks"),
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
