//! From the state of another VM to a running container: the clone's side of a fork.
//!
//! Everything that takes time and does not need the source's state is done before it is asked for.

use std::path::Path;
use std::rc::Rc;
use std::time::Duration;

use anyhow::{Context as _, bail};
use fcvm_hypervisor::Pause;
use fcvm_hypervisor::qemu::{QemuStandby, QemuVm};
use fcvm_memory::{GuestMapping, PageFile};
use fcvm_storage::FrozenDisk;
use fcvm_types::guest::{ClonePlan, ExitStatus};
use fcvm_types::record::{Lineage, VmState};
use fcvm_wire::{Outcome, Request};

use super::link::{AgentLink, AgentStream};
use super::machine::{self, Foundation, Prepared};
use super::spec::VmSpec;
use super::vm::RunningVm;
use super::{Built, Entry, Sockets, Stopwatch, boot};
use crate::client::finished;
use crate::context::Context;
use crate::handover::Handover;
use crate::template::{self, StateOfVm, Waiting};

/// Random bytes that a clone gets.
const ENTROPY_BYTES: usize = 64;

/// How long the command of `--on-fork` may take.
const HOOK_LIMIT: Duration = Duration::from_secs(30);

/// Where a clone gets its state.
pub(crate) struct Source {
    pub(crate) channel: Handover,
    pub(crate) lineage: Lineage,
}

/// Makes a clone and takes its container over.
pub(super) async fn build(
    context: &Context,
    spec: &VmSpec,
    source: Source,
    entry: &mut Entry,
    watch: &mut Stopwatch,
) -> anyhow::Result<Built> {
    let Source { channel, lineage } = source;
    let sockets = Sockets::bind(entry)?;
    let (offer, template) = template::take_offer(&channel).await?;
    let expected = template.disk.clone();
    let accelerator = offer.accelerator;
    let prepared =
        machine::prepare_clone(context, spec, accelerator, template, entry, watch).await?;
    let Prepared {
        standby,
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
    let arrived = template::take_state(&channel).await?;
    watch.lap("state");
    let pid = standby.vm().identity().pid;
    fill(&foundation, expected.as_ref(), &arrived, pid)?;
    watch.lap("memory and disk");
    let plan = ClonePlan {
        identity: spec.identity(network.guest.clone()),
        realtime_ns: super::realtime_ns(),
        entropy: entropy()?,
    };
    let console_log = entry.paths.console_log();
    let (machine, link, stream) = wake(spec, standby, &arrived, plan, &console_log, watch).await?;
    watch.lap("agent");
    if let Some(command) = &spec.on_fork {
        run_hook(&link, spec, &lineage, command).await?;
        watch.lap("on-fork");
    }
    Ok(Built {
        machine,
        foundation,
        network,
        link,
        stream,
        sockets,
        console,
        serving: lineage.serve.is_some().then_some(channel),
    })
}

/// Lets the clone go on, and waits until its agent has taken its plan.
async fn wake(
    spec: &VmSpec,
    mut standby: QemuStandby,
    arrived: &StateOfVm,
    plan: ClonePlan,
    console_log: &Path,
    watch: &mut Stopwatch,
) -> anyhow::Result<(QemuVm, AgentLink, AgentStream)> {
    let socket = standby
        .take_agent()
        .context("the hypervisor gives no channel to the agent")?;
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
    let (link, stream) = tokio::select! {
        adopted = tokio::time::timeout(spec.boot_timeout, adopted) => adopted.with_context(|| {
            let limit = format!("the clone did not answer within {} s", spec.boot_timeout.as_secs());
            machine::boot_failure(&limit, console_log)
        })??,
        exit = machine.wait_exit() => bail!("the clone ended before it answered ({exit})"),
    };
    Ok((machine, link, stream))
}

/// Runs the command that the container has for becoming a clone. One that fails is told, and the clone
/// stays: it is the container's business. One that does not end is given up.
async fn run_hook(
    link: &AgentLink,
    spec: &VmSpec,
    lineage: &Lineage,
    command: &str,
) -> anyhow::Result<()> {
    let mut process = spec.shell(command);
    process.env.push(format!("FCVM_CLONE={}", spec.name));
    process
        .env
        .push(format!("FCVM_PARENT={}", lineage.parent_name));
    let ended = tokio::time::timeout(HOOK_LIMIT, link.request(&Request::Exec { process })).await;
    match ended {
        Ok(outcome) => match finished(outcome?)? {
            Outcome::Exited(ExitStatus::Code(0)) => {}
            Outcome::Exited(status) => {
                let code = status.shell_code();
                tracing::warn!(target: "vm", "the --on-fork command failed with code {code}");
            }
            other => bail!("the guest's agent gave an answer that makes no sense ({other:?})"),
        },
        Err(_) => {
            let limit = HOOK_LIMIT.as_secs();
            tracing::warn!(target: "vm", "the --on-fork command did not end within {limit} s");
        }
    }
    Ok(())
}

/// Ends a clone with the process that serves its snapshot: the channel closes then.
pub(super) async fn end_with(serving: Handover, vm: Rc<RunningVm>) {
    if let Ok(None) | Err(_) = serving.receive::<Waiting>().await {
        tracing::warn!(target: "vm", "the process that serves the snapshot has ended, and the clone with it");
        vm.stop(Some(0));
    }
}

/// Gives the waiting process the disk's content and the pages that differ from the memory below.
fn fill(
    foundation: &Foundation,
    frozen: Option<&FrozenDisk>,
    arrived: &StateOfVm,
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
