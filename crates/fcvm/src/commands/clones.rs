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

use crate::args::clones::CloneArguments;
use crate::client::{Client, Flow, finished};
use crate::context::Context;
use crate::errors::ExitError;
use crate::handover::Handover;
use crate::owner::clone::Source;
use crate::owner::fork::{ForkReply, ForkRequest};
use crate::owner::spec::{Readiness, VmSpec};
use crate::owner::{self, Front, Origin, standby};
use crate::state::{StateStore, random};
use crate::template::{Assignment, Wish};

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
        spec.standby = 0;
        spec.timings_us = Vec::new();
        Ok(Assignment {
            spec,
            lineage: self.lineage.clone(),
        })
    }
}

/// An owner that is starting.
pub(crate) struct Starting {
    id: VmId,
    name: VmName,
    /// Where it is a child of this process.
    process: Option<Child>,
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
                let ended = format!(
                    "the owner of clone '{}' ended before it had started",
                    self.name
                );
                match self.process {
                    Some(mut process) => {
                        bail!(
                            "{ended} ({})",
                            process.wait().context("cannot wait for the owner")?
                        )
                    }
                    None => bail!(ended),
                }
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
    let mut process = spawn_owner(context, owners_end, Stdio::piped())?;
    let stdout = process.stdout.take().context("the owner has no output")?;
    let starting = Starting {
        id: assignment.spec.id,
        name: assignment.spec.name,
        process: Some(process),
        report: report_from(OwnedFd::from(stdout))?,
    };
    Ok((starting, channel.into_fd()))
}

fn spawn_owner(context: &Context, channel: OwnedFd, report: Stdio) -> anyhow::Result<Child> {
    let program = std::env::current_exe().context("cannot find this program's own file")?;
    std::process::Command::new(program)
        .arg("--data-dir")
        .arg(&context.data_dir)
        .arg("--runtime-dir")
        .arg(&context.runtime_dir)
        .args(["owner", "--clone"])
        .stdin(Stdio::from(channel))
        .stdout(report)
        .stderr(Stdio::null())
        .current_dir("/")
        .spawn()
        .context("cannot start the owner process")
}

fn report_from(pipe: OwnedFd) -> anyhow::Result<BufReader<pipe::Receiver>> {
    rustix::io::ioctl_fionbio(&pipe, true)?;
    let report = pipe::Receiver::from_owned_fd(pipe).context("cannot read the owner's report")?;
    Ok(BufReader::new(report))
}

/// A clone that is made ready before anybody wants it, as the process sees it that has the state.
pub(crate) struct Spare {
    pub(crate) id: VmId,
    /// Where it gets the state.
    pub(crate) channel: Handover,
    /// Where it is asked for. Closed, it ends the clone.
    pub(crate) wishes: OwnedFd,
}

impl Spare {
    /// Starts its owner, which goes as far as it can.
    pub(crate) fn start(context: &Context, family: &Family<'_>) -> anyhow::Result<Self> {
        let mut assignment = family.assignment("standby".parse()?)?;
        let id = assignment.spec.id.clone();
        assignment.spec.name = format!("standby-{}", id.short()).parse()?;
        // Whatever way it ends before it is wanted, nothing of it stays.
        assignment.spec.remove_on_exit = true;
        let (wishes, owners_end) = Handover::pair()?;
        let (channel, owners_channel) = Handover::pair()?;
        channel.send(&assignment, &[owners_end.as_fd()])?;
        drop(owners_end);
        let mut process = spawn_owner(context, owners_channel, Stdio::null())?;
        let identity = fcvm_process::process_identity(i32::try_from(process.id())?);
        tokio::task::spawn_local(async move {
            if let Ok(identity) = identity {
                let _ = fcvm_process::wait_gone(identity).await;
                let _ = process.try_wait();
            }
        });
        Ok(Self {
            id,
            channel,
            wishes: wishes.into_fd(),
        })
    }
}

/// A clone that is ready to be asked for.
pub(crate) struct ReadyClone {
    id: VmId,
    wishes: Handover,
}

impl ReadyClone {
    /// Asks for it; gives nothing where it has ended meanwhile.
    fn ask(self, family: &Family<'_>, name: &VmName) -> anyhow::Result<Option<Starting>> {
        let (report, theirs) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)
            .context("cannot make a pipe")?;
        let wish = Wish {
            name: name.clone(),
            remove_on_exit: family.source.remove_on_exit | family.remove_on_exit,
        };
        if let Err(error) = self.wishes.send(&wish, &[theirs.as_fd()]) {
            tracing::debug!("a clone that was ready has ended: {error:#}");
            return Ok(None);
        }
        Ok(Some(Starting {
            id: self.id,
            name: name.clone(),
            process: None,
            report: report_from(report)?,
        }))
    }
}

/// Asks a process that has the state for clones that are ready.
pub(crate) async fn ask_for_ready(
    asking: &Handover,
    count: usize,
) -> anyhow::Result<Vec<ReadyClone>> {
    asking.send(&ForkRequest::Take { count }, &[])?;
    match asking.receive::<ForkReply>().await? {
        Some((ForkReply::Ready { ids }, channels)) => ids
            .into_iter()
            .zip(channels)
            .map(|(id, wishes)| {
                let wishes = Handover::from_fd(wishes)?;
                Ok(ReadyClone { id, wishes })
            })
            .collect(),
        Some((ForkReply::Failed { message }, _)) => bail!("{message}"),
        _ => bail!("the source is ending"),
    }
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

/// Starts clones with these names, out of those that are ready and new ones; gives the channels of the
/// new ones.
pub(crate) fn start_all(
    context: &Context,
    family: &Family<'_>,
    names: Vec<VmName>,
    ready: Vec<ReadyClone>,
) -> anyhow::Result<(Vec<Starting>, Vec<OwnedFd>)> {
    let mut starting = Vec::new();
    let mut channels = Vec::new();
    let mut ready = ready.into_iter();
    for name in names {
        if let Some(clone) = ready.next()
            && let Some(asked) = clone.ask(family, &name)?
        {
            starting.push(asked);
            continue;
        }
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
    let received = channel.receive::<Assignment>().await.context(own_use)?;
    let (assignment, mut wishes) = received.context(own_use)?;
    let source = Source {
        channel,
        lineage: assignment.lineage,
    };
    if let Some(wishes) = wishes.pop() {
        let wishes = Handover::from_fd(wishes)?;
        return standby::run(context, assignment.spec, source, &wishes).await;
    }
    let front = Front::Detached { report };
    owner::run(context, assignment.spec, Origin::Clone(source), front).await
}

/// Names for clones: PREFIX-1, PREFIX-2, ..., those that are taken passed over unless they were asked
/// for; without a count one clone, which gets the very name that was asked for.
pub(crate) fn names(
    store: &StateStore,
    clones: &CloneArguments,
    default: &VmName,
) -> anyhow::Result<Vec<VmName>> {
    let (wanted, count) = (clones.name.as_ref(), clones.count);
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
