//! `fcvm snapshot create`: the command asks the VM's owner as a clone would, and keeps what it gets.

use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;

use anyhow::{Context as _, bail};
use fcvm_hypervisor::Accelerator;
use fcvm_hypervisor::DeviceState;
use fcvm_memory::PageFile;
use fcvm_snapshot::{Draft, ManifestFields, Mark, RootImage, Snapshot, SnapshotStore, Stored};
use fcvm_types::record::{Lineage, VmRecord};
use fcvm_types::{SnapshotTag, VmName};

use super::super::clones::{self, Family};
use super::super::fork::check_state;
use super::super::lifecycle::rm_one;
use crate::args::snapshot::CreateArguments;
use crate::context::Context;
use crate::handover::Handover;
use crate::owner::fork::{ForkReply, ForkRequest, connect};
use crate::owner::spec::VmSpec;
use crate::template::{
    Offer, StateOfVm, Template, TemplateMemory, Waiting, send_offer, send_state, take_offer,
    take_state,
};

/// Bytes compared at a time.
const COMPARED_BYTES: usize = 1 << 20;

/// A VM as of one instant, as its owner has handed it on.
pub(crate) struct Kept {
    offer: Offer,
    template: Template,
    state: StateOfVm,
    pause_us: u64,
    timings_us: Vec<(String, u64)>,
}

pub(super) async fn run(context: &Context, arguments: &CreateArguments) -> anyhow::Result<u8> {
    if crate::warm::is_cache(&arguments.tag) {
        bail!(
            "tags like '{}' are those of start-up caches: choose another tag",
            arguments.tag
        );
    }
    let state = context.state()?;
    let record = state.find(&arguments.vm)?;
    check_state(&record)?;
    let spec = VmSpec::of(&state.paths(&record.id))?;
    if arguments.verify && spec.hugepages {
        bail!(
            "--verify starts a clone from a file, which no VM with hugepages does: leave it out, and let 'fcvm snapshot run' show that it starts"
        );
    }
    let store = context.snapshots();
    // Taken first: a tag that exists is told before the VM is stopped for it.
    let mut draft = store.begin(&arguments.tag)?;
    let kept = keep(&state.paths(&record.id).fork_socket(), &record).await?;
    tracing::info!(target: "vm", "the VM stood still for {:.1} ms", kept.pause_us as f64 / 1000.0);
    let parent = match arguments.full {
        true => None,
        false => parent(&store, &record),
    };
    let fields = write(&mut draft, &record, &spec, &kept, parent.as_ref())?;
    if arguments.verify {
        let stored = draft.load(parent.as_ref())?;
        compare(&arguments.tag, &stored.memory, &kept)?;
        verify(context, &arguments.tag, &spec, &record, &kept, stored).await?;
    }
    let snapshot = draft.finish(fields)?;
    println!("{}", snapshot.manifest().id);
    Ok(crate::EXIT_SUCCESS)
}

/// Asks for the VM's state.
pub(crate) async fn keep(socket: &std::path::Path, record: &VmRecord) -> anyhow::Result<Kept> {
    let ending = || {
        format!(
            "VM '{}' is ending, or its owner does not answer",
            record.name
        )
    };
    let asking = connect(socket).with_context(ending)?;
    let (channel, theirs) = Handover::pair()?;
    asking.send(&ForkRequest::Fork, &[theirs.as_fd()])?;
    drop(theirs);
    let received = async {
        let (offer, template) = take_offer(&channel).await?;
        channel.send(&Waiting, &[])?;
        let state = take_state(&channel).await?;
        Ok::<_, anyhow::Error>((offer, template, state))
    };
    let received = received.await;
    let reply = asking.receive::<ForkReply>().await?.with_context(ending)?.0;
    match (reply, received) {
        (ForkReply::Failed { message }, _) => {
            bail!("VM '{}' could not be frozen: {message}", record.name)
        }
        (
            ForkReply::Frozen {
                pause_us,
                timings_us,
            },
            Ok((offer, template, state)),
        ) => Ok(Kept {
            offer,
            template,
            state,
            pause_us,
            timings_us,
        }),
        (_, Err(error)) => Err(error),
        (_, Ok(_)) => bail!(ending()),
    }
}

/// The snapshot to which the VM's memory is a difference, where it is still there.
fn parent(store: &SnapshotStore, record: &VmRecord) -> Option<Snapshot> {
    store.referenced(record.lineage.as_ref()?.base.as_ref()?)
}

/// Writes all of it but the manifest, whose fields it gives.
pub(crate) fn write(
    draft: &mut Draft,
    record: &VmRecord,
    spec: &VmSpec,
    kept: &Kept,
    parent: Option<&Snapshot>,
) -> anyhow::Result<ManifestFields> {
    draft.write_state(kept.state.device.as_bytes())?;
    let memory = kept.template.memory.file()?;
    let over = match &kept.state.difference {
        Some(file) => Some(PageFile::open(file.try_clone()?)?),
        None => None,
    };
    match (parent, &over) {
        (Some(parent), Some(over)) => draft.write_memory_difference(&memory, over, parent)?,
        (Some(parent), None) => draft.write_memory_comparison(&memory, parent)?,
        (None, over) => draft.write_memory_whole(&memory, over.as_ref())?,
    }
    if let Some(disk) = &kept.template.disk {
        draft.write_disk(disk)?;
    }
    Ok(ManifestFields {
        source_id: record.id.clone(),
        source_name: record.name.clone(),
        image: record.image.clone(),
        image_digest: record.image_digest.clone(),
        root_image: RootImage {
            path: spec.root_image.clone(),
            digest: spec
                .root_image
                .file_name()
                .map_or_else(String::new, |name| name.to_string_lossy().into_owned()),
        },
        spec: serde_json::to_value(spec)?,
        hypervisor: record.hypervisor.clone(),
        device_line: serde_json::to_value(&kept.offer.device_line)?,
        accelerator: serde_json::to_value(kept.offer.accelerator)?,
        host_cpu: host_cpu(kept.offer.accelerator),
        mark: Mark::new(String::from(kept.state.mark)),
        timings_us: kept.timings_us.clone(),
    })
}

/// What of the host's processor a snapshot depends on: with KVM the guest has seen its model and its
/// features, while QEMU's own processor is the same everywhere.
pub(crate) fn host_cpu(accelerator: Accelerator) -> String {
    match accelerator {
        Accelerator::Tcg { .. } => "QEMU's own".to_owned(),
        Accelerator::Kvm => {
            let text = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
            let field = |name: &str| {
                text.lines()
                    .find_map(|line| line.strip_prefix(name)?.split_once(':'))
                    .map_or("", |(_, value)| value.trim())
            };
            format!("{}; {}", field("model name"), field("flags"))
        }
    }
}

/// Starts a clone of what is on the disk, and ends it once it has answered.
async fn verify(
    context: &Context,
    tag: &SnapshotTag,
    spec: &VmSpec,
    record: &VmRecord,
    kept: &Kept,
    stored: Stored,
) -> anyhow::Result<()> {
    let template = Template {
        memory: TemplateMemory::File(stored.memory.into()),
        disk: stored.disk,
    };
    let device = DeviceState::from_bytes(stored.device_state)?;
    let lineage = Lineage {
        parent: record.id.clone(),
        parent_name: record.name.clone(),
        snapshot: Some(tag.to_string()),
        serve: None,
        base: None,
    };
    let family = Family {
        source: spec,
        lineage: &lineage,
        ports: &[],
        remove_on_exit: true,
    };
    let name: VmName = format!("verify-{}", std::process::id()).parse()?;
    let (owner, channel) = clones::start(context, &family, name)?;
    let channel = Handover::from_fd(channel)?;
    let offer = &kept.offer;
    let reason = "it is a trial of what was written";
    send_offer(
        &channel,
        offer.accelerator,
        &offer.device_line,
        &template,
        reason,
    )?;
    let failed = || format!("the snapshot '{tag}' was not made: a clone of it does not start");
    if channel.receive::<Waiting>().await?.is_some() {
        send_state(&channel, &device, None, kept.state.mark)?;
    }
    let (id, _) = owner.started().await.with_context(failed)?;
    let store = context.state()?;
    let said = clones::execute(&store, &id, spec, "true").await;
    rm_one(&store, &store.find(id.as_str())?, true).await?;
    said.with_context(failed)?;
    Ok(())
}

/// Compares what is on the disk with the memory that was frozen, byte by byte.
fn compare(tag: &SnapshotTag, stored: &File, kept: &Kept) -> anyhow::Result<()> {
    let frozen = kept.template.memory.file()?;
    let expected = match &kept.state.difference {
        None => frozen,
        Some(difference) => {
            let size = frozen.metadata()?.len();
            let both = fcvm_memory::page_file::anonymous_file("fcvm-compared", size)?;
            fcvm_storage::clone_file(&frozen, &both).context("cannot copy the memory")?;
            PageFile::open(difference.try_clone()?)?.restore_into(&both)?;
            both
        }
    };
    if is_same(stored, &expected)? {
        return Ok(());
    }
    bail!("the snapshot '{tag}' was not made: its memory on the disk is not that of the VM")
}

fn is_same(one: &File, other: &File) -> anyhow::Result<bool> {
    let length = one.metadata()?.len();
    if length != other.metadata()?.len() {
        return Ok(false);
    }
    let mut bytes = [vec![0; COMPARED_BYTES], vec![0; COMPARED_BYTES]];
    let mut offset = 0;
    while offset < length {
        let count = usize::try_from(length - offset)?.min(COMPARED_BYTES);
        let [first, second] = &mut bytes;
        one.read_exact_at(&mut first[..count], offset)?;
        other.read_exact_at(&mut second[..count], offset)?;
        if first[..count] != second[..count] {
            return Ok(false);
        }
        offset += count as u64;
    }
    Ok(true)
}
