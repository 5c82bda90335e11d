//! `fcvm fork`: clones of a running VM.

use std::os::fd::{AsFd, BorrowedFd};

use anyhow::{Context as _, bail};
use fcvm_types::record::{Lineage, VmRecord, VmState};
use fcvm_types::{VmId, VmName};
use serde_json::json;
use tokio::task::JoinSet;

use super::clones::{self, Family, Starting};
use crate::args::Format;
use crate::args::fork::ForkArguments;
use crate::context::Context;
use crate::owner::fork::{ForkReply, ForkRequest, connect};
use crate::owner::spec::VmSpec;
use crate::state::StateStore;

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
        // The clones end with their channels; they have nothing to add.
        let _ = all_started(starting).await;
        bail!("VM '{}' could not be forked: {message}", record.name);
    }
    if !source.ports.is_empty() && arguments.publish.is_empty() {
        tracing::info!("the source keeps its published ports; -p gives a clone one of its own");
    }
    let clones = all_started(starting).await?;
    match &arguments.exec {
        Some(command) => in_all(&store, &clones, &source, command, arguments.format).await,
        None => {
            tell(&clones, arguments.format)?;
            Ok(crate::EXIT_SUCCESS)
        }
    }
}

/// Prints the clones: ids for people, as `run -d` does.
fn tell(clones: &[(VmId, VmName)], format: Format) -> anyhow::Result<()> {
    if format == Format::Json {
        let list: Vec<_> = clones
            .iter()
            .map(|(id, name)| json!({ "id": id, "name": name }))
            .collect();
        println!("{}", serde_json::to_string_pretty(&list)?);
        return Ok(());
    }
    for (id, _) in clones {
        println!("{id}");
    }
    Ok(())
}

/// Runs a command in all clones at once; the exit code is the first that is not zero.
async fn in_all(
    store: &StateStore,
    clones: &[(VmId, VmName)],
    source: &VmSpec,
    command: &str,
    format: Format,
) -> anyhow::Result<u8> {
    let mut running = JoinSet::new();
    for (index, (id, _)) in clones.iter().enumerate() {
        let (store, id, source) = (store.clone(), id.clone(), source.clone());
        let command = command.to_owned();
        running.spawn_local(async move {
            let said = clones::execute(&store, &id, &source, &command).await;
            (index, id, said)
        });
    }
    let mut answers = running.join_all().await;
    answers.sort_by_key(|(index, ..)| *index);
    let mut code = crate::EXIT_SUCCESS;
    let mut list = Vec::new();
    for (_, id, said) in answers {
        let said = said?;
        if code == crate::EXIT_SUCCESS {
            code = said.status.shell_code();
        }
        match format {
            Format::Json => list.push(json!({
                "id": id,
                "name": said.name,
                "exit_code": said.status.shell_code(),
                "stdout": String::from_utf8_lossy(&said.stdout),
                "stderr": String::from_utf8_lossy(&said.stderr),
            })),
            Format::Table => {
                for line in String::from_utf8_lossy(&said.stdout).lines() {
                    println!("{}: {line}", said.name);
                }
                for line in String::from_utf8_lossy(&said.stderr).lines() {
                    eprintln!("{}: {line}", said.name);
                }
            }
        }
    }
    if format == Format::Json {
        println!("{}", serde_json::to_string_pretty(&list)?);
    }
    Ok(code)
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
