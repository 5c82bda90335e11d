//! From nothing to a running container: machine, guest, agent, container.

use std::time::Duration;

use anyhow::Context as _;
use fcvm_hypervisor::{AgentChannel, Vm};
use fcvm_types::guest::GuestPlan;
use fcvm_types::record::VmState;
use fcvm_wire::{FrameKind, Opened, Outcome, Request};

use super::link::{AgentLink, AgentStream};
use super::machine;
use super::spec::VmSpec;
use super::{Built, Entry, MACHINE_END_LIMIT, Sockets, Stopwatch};
use crate::client::finished;
use crate::context::Context;

/// Boots a VM and starts its container.
pub(super) async fn build(
    context: &Context,
    spec: &VmSpec,
    entry: &mut Entry,
    watch: &mut Stopwatch,
) -> anyhow::Result<Built> {
    let sockets = Sockets::bind(entry)?;
    let machine::Assembled {
        mut machine,
        foundation,
        mut network,
        console,
    } = machine::assemble(context, spec, entry, watch).await?;
    entry.update(|record| record.state = VmState::Booting)?;
    let channel = machine
        .take_agent()
        .context("the hypervisor gives no channel to the agent")?;
    let console_log = entry.paths.console_log();
    let first_word = first_word(&machine, channel, spec.boot_timeout, &console_log);
    // The network starts while the guest boots; where it does not, the boot is not waited for.
    let ready = async { Ok(network.ready().await?) };
    let (link, ()) = tokio::try_join!(first_word, ready)?;
    watch.lap("boot");
    let plan = GuestPlan {
        identity: spec.identity(network.guest.clone()),
        realtime_ns: super::realtime_ns(),
        read_only: spec.read_only,
        privileged: spec.privileged,
        process: spec.process.clone(),
    };
    let stream = link
        .open(&Request::Run {
            plan: Box::new(plan),
        })
        .await?;
    tokio::select! {
        opened = opened(&stream) => opened?,
        exit = machine.wait_exit() => {
            anyhow::bail!("{}", machine::boot_failure(&format!("the guest ended before the container started ({exit})"), &console_log));
        }
    }
    watch.lap("container");
    Ok(Built {
        machine,
        foundation,
        network,
        link,
        stream,
        sockets,
        console,
        serving: None,
        pages: None,
    })
}

/// Waits for the agent's first word.
async fn first_word(
    machine: &Vm,
    channel: AgentChannel,
    limit: Duration,
    console_log: &std::path::Path,
) -> anyhow::Result<AgentLink> {
    let failure = |what: &str| machine::boot_failure(what, console_log);
    let establish = async {
        let (socket, listener) = channel
            .connected()
            .await
            .context("the agent's channel fails")?;
        AgentLink::establish(socket, listener).await
    };
    let established = tokio::time::timeout(limit, establish);
    let ended = tokio::select! {
        link = established => match link {
            Ok(Ok(link)) => return Ok(link),
            // A machine that ends takes the channel with it, and tells more.
            Ok(Err(error)) => match tokio::time::timeout(MACHINE_END_LIMIT, machine.wait_exit()).await {
                Ok(exit) => exit,
                Err(_) => return Err(error.context(failure("the guest's agent does not answer as it should"))),
            },
            Err(_) => anyhow::bail!(failure(&format!("the guest did not answer within {} s (--boot-timeout)", limit.as_secs()))),
        },
        exit = machine.wait_exit() => exit,
    };
    anyhow::bail!(failure(&format!("the guest did not boot ({ended})")))
}

/// Waits until the container's process has started.
pub(super) async fn opened(stream: &AgentStream) -> anyhow::Result<()> {
    loop {
        let frame = stream.next().await?;
        match frame.kind {
            FrameKind::Opened => {
                let _: Opened = frame.parse()?;
                return Ok(());
            }
            FrameKind::Closed => {
                let outcome: Outcome = finished(frame.parse()?)?;
                anyhow::bail!(
                    "the guest's agent ended the container before it began ({outcome:?})"
                );
            }
            _ => {}
        }
    }
}
