//! From the state of another VM to a running container: the clone's side of a fork.
//!
//! Everything that takes time and does not need the source's state is done before it is asked for:
//! [`prepare`], [`Waiting::load`] and [`Loaded::awake`] follow each other. A clone that is made ready
//! ahead (`standby.rs`) stops between two of them until somebody wants it.

use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::Duration;

use anyhow::{Context as _, bail};
use fcvm_hypervisor::{AgentChannel, DeviceState, MemoryBackend, Pause, Standby, Vm};
use fcvm_memory::{GuestMapping, PageFile};
use fcvm_storage::FrozenDisk;
use fcvm_types::guest::{ClonePlan, ExitStatus};
use fcvm_types::record::{Lineage, VmState};
use fcvm_wire::{Mark, Outcome, Request};
use tokio::net::UnixListener;

use super::link::{Adopting, AgentLink, AgentStream};
use super::machine::{self, Foundation, Prepared};
use super::pages::PageService;
use super::spec::VmSpec;
use super::vm::RunningVm;
use super::{Built, Entry, Sockets, Stopwatch, boot, parking};
use crate::client::finished;
use crate::context::Context;
use crate::handover::Handover;
use crate::template::{self, StateOfVm};

/// Random bytes that a clone gets.
const ENTROPY_BYTES: usize = 64;

/// How long the command of `--on-fork` may take.
const HOOK_LIMIT: Duration = Duration::from_secs(30);

/// Where a clone gets its state.
pub(crate) struct Source {
    pub(crate) channel: Handover,
    pub(crate) lineage: Lineage,
}

/// What every clone has from its preparation on.
struct Common {
    channel: Handover,
    lineage: Lineage,
    sockets: Sockets,
    foundation: Foundation,
    network: fcvm_network::Attachment,
    console: tokio::task::JoinHandle<()>,
}

/// A clone whose process waits for the state.
pub(super) struct Waiting {
    common: Common,
    standby: Standby,
    disk: Option<FrozenDisk>,
    /// Where the memory comes from, if not from a file.
    memory_server: Option<PathBuf>,
}

/// How a clone's agent comes to its plan.
enum Connecting {
    /// It is on its way.
    Sent(Adopting),
    /// It is sent when the agent has connected.
    Awaited(UnixListener, ClonePlan),
}

/// A clone that has the state and stands still.
pub(super) struct Loaded {
    common: Common,
    machine: Vm,
    agent: AgentChannel,
    mark: Mark,
    pages: Option<PageService>,
}

/// Makes a clone and takes its container over.
pub(super) async fn build(
    context: &Context,
    spec: &VmSpec,
    source: Source,
    entry: &mut Entry,
    watch: &mut Stopwatch,
) -> anyhow::Result<Built> {
    let waiting = prepare(context, spec, source, entry, watch).await?;
    entry.update(|record| record.state = VmState::Booting)?;
    let loaded = waiting.load(watch).await?;
    let built = loaded.awake(spec, entry, watch).await?;
    run_hook(&built, spec, entry, watch).await?;
    Ok(built)
}

/// Acquires what a clone is made of, and tells the source that it waits.
pub(super) async fn prepare(
    context: &Context,
    spec: &VmSpec,
    source: Source,
    entry: &mut Entry,
    watch: &mut Stopwatch,
) -> anyhow::Result<Waiting> {
    let Source { channel, lineage } = source;
    let sockets = Sockets::bind(entry)?;
    let (offer, template) = template::take_offer(&channel).await?;
    entry.update(|record| record.memory_origin = Some(offer.origin))?;
    let disk = template.disk.clone();
    let accelerator = offer.accelerator;
    let prepared =
        machine::prepare_clone(context, spec, accelerator, template, entry, watch).await?;
    let Prepared {
        standby,
        foundation,
        mut network,
        console,
    } = prepared;
    if let Some(difference) = standby.device_line().difference(&offer.device_line) {
        bail!("the source's state does not fit: {difference}");
    }
    network.ready().await?;
    watch.lap("network ready");
    channel.send(&template::Waiting, &[])?;
    Ok(Waiting {
        common: Common {
            channel,
            lineage,
            sockets,
            foundation,
            network,
            console,
        },
        standby,
        disk,
        memory_server: offer.memory_server,
    })
}

impl Waiting {
    /// Waits for the state and loads it.
    pub(super) async fn load(self, watch: &mut Stopwatch) -> anyhow::Result<Loaded> {
        let Self {
            common,
            mut standby,
            disk,
            memory_server,
        } = self;
        let arrived = template::take_state(&common.channel).await?;
        watch.lap("state");
        let pid = standby.identity().pid;
        fill(&common.foundation, disk.as_ref(), &arrived, pid)?;
        watch.lap("memory and disk");
        // Connected before the state is loaded, or what the guest was saying then is lost.
        let agent = standby
            .take_agent()
            .context("the hypervisor gives no channel to the agent")?;
        let (machine, pages) = load_state(standby, &arrived.device, memory_server).await?;
        watch.lap("load");
        Ok(Loaded {
            common,
            machine,
            agent,
            mark: arrived.mark,
            pages,
        })
    }

    /// Waits until the process has ended.
    pub(super) async fn ended(&self) -> String {
        self.standby.wait_exit().await.to_string()
    }
}

impl Loaded {
    /// Lets the clone go on, and waits until its agent has taken its plan.
    pub(super) async fn awake(
        self,
        spec: &VmSpec,
        entry: &Entry,
        watch: &mut Stopwatch,
    ) -> anyhow::Result<Built> {
        let Self {
            common,
            machine,
            agent,
            mark,
            pages,
        } = self;
        let plan = ClonePlan {
            identity: spec.identity(common.network.guest.clone()),
            realtime_ns: super::realtime_ns(),
            entropy: entropy()?,
        };
        let adopting = match agent {
            AgentChannel::Connected(socket) => {
                // On its way before the guest runs: the first thing that its agent reads.
                let adopting = AgentLink::adopt(socket, None, mark, plan).await?;
                machine.resume().await?;
                Connecting::Sent(adopting)
            }
            AgentChannel::Awaited(listener) => {
                machine.resume().await?;
                Connecting::Awaited(listener, plan)
            }
        };
        watch.lap("resume");
        let adopted = async {
            let adopting = match adopting {
                Connecting::Sent(adopting) => adopting,
                // The container stands still until its agent has taken its plan.
                Connecting::Awaited(listener, plan) => {
                    let socket = parking::accept(&listener, mark).await?;
                    AgentLink::adopt(socket, Some(listener), mark, plan).await?
                }
            };
            let (link, stream) = adopting.finish().await?;
            boot::opened(&stream).await?;
            Ok::<_, anyhow::Error>((link, stream))
        };
        let (link, stream) = in_time(spec, &machine, &entry.paths.console_log(), adopted).await?;
        watch.lap("agent");
        let Common {
            channel,
            lineage,
            sockets,
            foundation,
            network,
            console,
        } = common;
        Ok(Built {
            machine,
            foundation,
            network,
            link,
            stream,
            sockets,
            console,
            serving: lineage.serve.is_some().then_some(channel),
            pages,
        })
    }

    /// Waits until the process has ended.
    pub(super) async fn ended(&self) -> String {
        self.machine.wait_exit().await.to_string()
    }
}

/// Loads the state; where the memory comes from a server, what that brings ahead is waited for.
async fn load_state(
    standby: Standby,
    state: &DeviceState,
    memory_server: Option<PathBuf>,
) -> anyhow::Result<(Vm, Option<PageService>)> {
    let Some(socket) = memory_server else {
        let machine = standby.load(state, &MemoryBackend::File).await?;
        return Ok((machine, None));
    };
    let mut pages = PageService::connect(&socket, standby.identity().pid)?;
    let handing = hand_over(standby.memory_listener()?, socket.clone());
    let memory = MemoryBackend::Uffd(socket);
    let loading = standby.load(state, &memory);
    let machine = tokio::select! {
        machine = loading => machine?,
        // The hypervisor would wait for ever.
        reason = pages.ended() => bail!("the clone cannot have its memory: {reason}"),
        error = handing => bail!("the clone cannot have its memory: {error}"),
    };
    pages
        .brought()
        .await
        .context("the clone cannot have its memory")?;
    Ok((machine, Some(pages)))
}

/// Hands the server the connection of a process that cannot reach it; does not return unless that fails.
async fn hand_over(listener: Option<UnixListener>, server: PathBuf) -> std::io::Error {
    let Some(listener) = listener else {
        return std::future::pending().await;
    };
    let handed = async {
        let (connection, _) = listener.accept().await?;
        fcvm_memory::uffd::hand_over(&server, connection.as_fd())
    };
    match handed.await {
        Ok(()) => std::future::pending().await,
        Err(error) => error,
    }
}

async fn in_time(
    spec: &VmSpec,
    machine: &Vm,
    console_log: &Path,
    adopted: impl Future<Output = anyhow::Result<(AgentLink, AgentStream)>>,
) -> anyhow::Result<(AgentLink, AgentStream)> {
    tokio::select! {
        adopted = tokio::time::timeout(spec.boot_timeout, adopted) => adopted.with_context(|| {
            let limit = format!("the clone did not answer within {} s", spec.boot_timeout.as_secs());
            machine::boot_failure(&limit, console_log)
        })?,
        exit = machine.wait_exit() => bail!("the clone ended before it answered ({exit})"),
    }
}

/// Runs the command that the container has for becoming a clone. One that fails is told, and the clone
/// stays: it is the container's business. One that does not end is given up.
pub(super) async fn run_hook(
    built: &Built,
    spec: &VmSpec,
    entry: &Entry,
    watch: &mut Stopwatch,
) -> anyhow::Result<()> {
    let Some(command) = &spec.on_fork else {
        return Ok(());
    };
    let mut process = spec.shell(command);
    process.env.push(format!("FCVM_CLONE={}", spec.name));
    if let Some(lineage) = &entry.record.lineage {
        process
            .env
            .push(format!("FCVM_PARENT={}", lineage.parent_name));
    }
    let request = Request::Exec { process };
    let request = built.link.request(&request);
    match tokio::time::timeout(HOOK_LIMIT, request).await {
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
    watch.lap("on-fork");
    Ok(())
}

/// Ends a clone with the process that serves its snapshot: the channel closes then.
pub(super) async fn end_with(serving: Handover, vm: Rc<RunningVm>) {
    if let Ok(None) | Err(_) = serving.receive::<template::Waiting>().await {
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
