//! Starting the owners of clones, whichever state they continue from.

use std::os::fd::{AsFd, OwnedFd};
use std::process::{Child, Stdio};

use anyhow::{Context as _, bail};
use fcvm_types::guest::ExitStatus;
use fcvm_types::record::Lineage;
use fcvm_types::{PortMapping, VmId, VmName};
use fcvm_wire::{Channel, FrameKind, Outcome, Request};
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::net::unix::pipe;

use crate::client::{Client, Flow, finished};
use crate::context::Context;
use crate::errors::ExitError;
use crate::handover::Handover;
use crate::owner::clone::Source;
use crate::owner::spec::{Readiness, VmSpec};
use crate::owner::{self, Front, Origin};
use crate::state::{StateStore, random};
use crate::template::Assignment;

/// Most that is kept of what a command says in a clone.
const SAID_BYTES_MAX: usize = 1 << 20;

/// What the clones of one command have in common.
pub(crate) struct Family<'a> {
    /// The specification of the VM whose state they continue.
    pub(crate) source: &'a VmSpec,
    pub(crate) lineage: &'a Lineage,
    pub(crate) ports: &'a [PortMapping],
    pub(crate) remove_on_exit: bool,
}

impl Family<'_> {
    /// What a clone's owner is told to run.
    fn assignment(&self, name: VmName) -> anyhow::Result<Assignment> {
        let id = VmId::from_random(random()?);
        let mut spec = self.source.clone();
        spec.hostname = id.short().to_owned();
        spec.id = id;
        spec.name = name;
        spec.ports = self.ports.to_vec();
        spec.remove_on_exit |= self.remove_on_exit;
        spec.timings_us = Vec::new();
        Ok(Assignment {
            spec,
            lineage: self.lineage.clone(),
        })
    }
}

/// An owner that is starting.
pub(crate) struct Starting {
    pub(crate) id: VmId,
    pub(crate) name: VmName,
    process: Child,
    report: BufReader<pipe::Receiver>,
}

impl Starting {
    /// Waits until the clone answers.
    pub(crate) async fn started(mut self) -> anyhow::Result<(VmId, VmName)> {
        let mut line = String::new();
        self.report
            .read_line(&mut line)
            .await
            .context("cannot read the owner's report")?;
        match serde_json::from_str(&line) {
            Ok(Readiness::Started) => Ok((self.id, self.name)),
            Ok(Readiness::Failed { code, message }) => Err(ExitError {
                code,
                message: format!("clone '{}': {message}", self.name),
            }
            .into()),
            Err(_) => {
                let status = self.process.wait().context("cannot wait for the owner")?;
                bail!(
                    "the owner of clone '{}' ended before it had started ({status})",
                    self.name
                )
            }
        }
    }
}

/// Waits for all; the first failure is told when the others are settled.
pub(crate) async fn all_started(starting: Vec<Starting>) -> anyhow::Result<Vec<(VmId, VmName)>> {
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

/// Starts the owner of a clone; gives it, and the end of its channel for whoever has the state.
pub(crate) fn start(
    context: &Context,
    family: &Family<'_>,
    name: VmName,
) -> anyhow::Result<(Starting, OwnedFd)> {
    let assignment = family.assignment(name)?;
    let (channel, owners_end) = Handover::pair()?;
    channel.send(&assignment, &[])?;
    let program = std::env::current_exe().context("cannot find this program's own file")?;
    let mut process = std::process::Command::new(program)
        .arg("--data-dir")
        .arg(&context.data_dir)
        .arg("--runtime-dir")
        .arg(&context.runtime_dir)
        .args(["owner", "--clone"])
        .stdin(Stdio::from(owners_end))
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .current_dir("/")
        .spawn()
        .context("cannot start the owner process")?;
    let stdout = process.stdout.take().context("the owner has no output")?;
    let stdout = OwnedFd::from(stdout);
    rustix::io::ioctl_fionbio(&stdout, true)?;
    let report = pipe::Receiver::from_owned_fd(stdout).context("cannot read the owner's report")?;
    let starting = Starting {
        id: assignment.spec.id,
        name: assignment.spec.name,
        process,
        report: BufReader::new(report),
    };
    Ok((starting, channel.into_fd()))
}

/// What a command said in a clone.
pub(crate) struct Said {
    pub(crate) name: VmName,
    pub(crate) status: ExitStatus,
    pub(crate) stdout: Vec<u8>,
    pub(crate) stderr: Vec<u8>,
}

/// Runs a shell command in a clone, as the container's user, and collects what it says.
pub(crate) async fn execute(
    store: &StateStore,
    id: &VmId,
    source: &VmSpec,
    command: &str,
) -> anyhow::Result<Said> {
    let record = store.find(id.as_str())?;
    let process = source.shell(command);
    let client = Client::connect(store, &record).await?;
    let mut client = client.start(Request::Exec { process }).await?;
    let mut flow = Flow::default();
    let mut output = [Vec::new(), Vec::new()];
    loop {
        let frame = client.next().await?;
        match frame.kind {
            FrameKind::Data => {
                flow.received(&frame)?;
                let channel = frame.channel;
                let said = &mut output[usize::from(channel == Channel::Stderr)];
                // What is more is taken and dropped.
                let room = SAID_BYTES_MAX.saturating_sub(said.len());
                said.extend_from_slice(&frame.payload[..frame.payload.len().min(room)]);
                if let Some(credit) = flow.taken(frame.stream, channel, frame.payload.len()) {
                    client.send(credit).await?;
                }
            }
            FrameKind::Closed => {
                let [stdout, stderr] = output;
                let name = record.name;
                return match finished(frame.parse()?)? {
                    Outcome::Exited(status) => Ok(Said {
                        name,
                        status,
                        stdout,
                        stderr,
                    }),
                    other => bail!("clone '{name}' gave an answer that makes no sense ({other:?})"),
                };
            }
            _ => {}
        }
    }
}

/// Starts the owners of clones with these names.
pub(crate) fn start_all(
    context: &Context,
    family: &Family<'_>,
    names: Vec<VmName>,
) -> anyhow::Result<(Vec<Starting>, Vec<OwnedFd>)> {
    let mut starting = Vec::new();
    let mut channels = Vec::new();
    for name in names {
        let (owner, channel) = start(context, family, name)?;
        starting.push(owner);
        channels.push(channel);
    }
    Ok((starting, channels))
}

/// `fcvm owner --clone`: the other side of [`start`].
pub(crate) async fn owner(context: &Context) -> anyhow::Result<u8> {
    let channel = std::io::stdin().as_fd().try_clone_to_owned()?;
    let own_use = "this command is for fcvm's own use";
    let channel = Handover::from_fd(channel).context(own_use)?;
    let report = super::run::leave_command()?;
    let Some((assignment, _)) = channel.receive::<Assignment>().await.context(own_use)? else {
        bail!(own_use);
    };
    let source = Source {
        channel,
        lineage: assignment.lineage,
    };
    let front = Front::Detached { report };
    owner::run(context, assignment.spec, Origin::Clone(source), front).await
}

/// Names for clones: PREFIX-1, PREFIX-2, ..., those that are taken passed over unless they were asked
/// for; without a count one clone, which gets the very name that was asked for.
pub(crate) fn names(
    store: &StateStore,
    wanted: Option<&VmName>,
    default: &VmName,
    count: Option<u16>,
) -> anyhow::Result<Vec<VmName>> {
    let taken = store.list()?;
    let is_taken = |name: &VmName| taken.iter().any(|record| record.name == *name);
    let refuse = |name: &VmName| {
        bail!(
            "the name '{name}' is in use: choose other names with --name, or remove that VM with 'fcvm rm {name}'"
        )
    };
    if let (Some(name), None) = (wanted, count) {
        if is_taken(name) {
            return refuse(name);
        }
        return Ok(vec![name.clone()]);
    }
    let prefix = wanted.unwrap_or(default);
    let mut names = Vec::new();
    for number in 1_u32.. {
        if names.len() == usize::from(count.unwrap_or(1)) {
            break;
        }
        let name: VmName = format!("{prefix}-{number}").parse()?;
        match (is_taken(&name), wanted) {
            (false, _) => names.push(name),
            (true, Some(_)) => return refuse(&name),
            (true, None) => {}
        }
    }
    Ok(names)
}
