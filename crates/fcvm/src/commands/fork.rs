//! `fcvm fork`: clones of a running VM.

use std::os::fd::{AsFd, BorrowedFd};

use anyhow::{Context as _, bail};
use fcvm_types::record::{Lineage, VmRecord, VmState};
use fcvm_types::{VmId, VmName};

use super::clones::{self, Family, Starting};
use crate::args::fork::ForkArguments;
use crate::context::Context;
use crate::owner::fork::{ForkReply, ForkRequest, connect};
use crate::owner::spec::VmSpec;

pub(crate) async fn run(context: &Context, arguments: &ForkArguments) -> anyhow::Result<u8> {
    if arguments.count.is_some_and(|count| count > 1) && !arguments.publish.is_empty() {
        bail!("-p gives one clone a port: several clones cannot share it");
    }
    let store = context.state()?;
    let record = store.find(&arguments.vm)?;
    check_state(&record)?;
    let paths = store.paths(&record.id);
    let source = VmSpec::of(&paths)?;
    let names = clones::names(
        &store,
        arguments.name.as_ref(),
        &record.name,
        arguments.count,
    )?;
    let asking = connect(&paths.fork_socket()).with_context(|| {
        format!(
            "VM '{}' is ending, or its owner does not answer",
            record.name
        )
    })?;
    let lineage = Lineage {
        parent: record.id.clone(),
        parent_name: record.name.clone(),
        snapshot: None,
        serve: None,
    };
    let family = Family {
        source: &source,
        lineage: &lineage,
        ports: &arguments.publish,
        remove_on_exit: arguments.rm,
    };
    let mut starting = Vec::new();
    let mut channels = Vec::new();
    for name in names {
        let (owner, channel) = clones::start(context, &family, name)?;
        starting.push(owner);
        channels.push(channel);
    }
    let descriptors: Vec<BorrowedFd<'_>> = channels.iter().map(AsFd::as_fd).collect();
    asking.send(&ForkRequest, &descriptors)?;
    // An owner whose source gives up has to see its channel end.
    drop(channels);
    let reply = asking.receive::<ForkReply>().await?;
    let reply = reply.context("the source ended during the fork")?.0;
    if let ForkReply::Failed { message } = &reply {
        // A clone that could not be made ready knows more.
        for owner in starting {
            if let Err(error) = owner.started().await {
                tracing::debug!("{error:#}");
            }
        }
        bail!("VM '{}' could not be forked: {message}", record.name);
    }
    if !source.ports.is_empty() && arguments.publish.is_empty() {
        tracing::info!("the source keeps its published ports; -p gives a clone one of its own");
    }
    let clones = all_started(starting).await?;
    for (id, _) in &clones {
        println!("{id}");
    }
    Ok(crate::EXIT_SUCCESS)
}

fn check_state(record: &VmRecord) -> anyhow::Result<()> {
    let name = &record.name;
    match record.state {
        VmState::Running => Ok(()),
        VmState::Paused => {
            bail!("VM '{name}' is paused: 'fcvm unpause {name}' lets it go on, then fork it")
        }
        VmState::Created | VmState::Booting => {
            bail!("VM '{name}' is still starting: try again when 'fcvm ls' shows it as up")
        }
        VmState::Stopping | VmState::Exited => bail!("VM '{name}' is not running"),
    }
}

/// Waits for all; the first failure is told when the others are settled.
async fn all_started(starting: Vec<Starting>) -> anyhow::Result<Vec<(VmId, VmName)>> {
    let mut clones = Vec::new();
    let mut failure = None;
    for owner in starting {
        match owner.started().await {
            Ok(clone) => clones.push(clone),
            Err(error) => {
                failure.get_or_insert(error);
            }
        }
    }
    match failure {
        None => Ok(clones),
        Some(error) => Err(error),
    }
}
