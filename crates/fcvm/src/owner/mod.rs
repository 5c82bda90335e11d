//! The owner process of a VM: acquires what it needs, runs it, releases it in reverse order.
//!
//! The VM lives and dies with this process. Everything acquired is a guard that releases itself when
//! dropped, and what would outlive a crash is in the state record before it exists.

mod boot;
pub(crate) mod clone;
mod control;
pub(crate) mod fork;
mod freeze;
mod health;
mod jail;
pub(crate) mod link;
pub(crate) mod log;
mod machine;
mod pages;
mod parking;
mod request;
mod reserve;
mod slot;
pub(crate) mod spec;
pub(crate) mod standby;
mod supervisor;
mod vm;
pub(crate) mod warm;

use std::fs::File;
use std::io::Write;
use std::rc::Rc;
use std::time::{Duration, Instant, SystemTime};

use anyhow::Context as _;
use fcvm_types::record::{
    Health, Lineage, ProcessIdentity, RECORD_VERSION, Resource, VmRecord, VmState,
};
use time::OffsetDateTime;
use tokio::net::UnixListener;
use tracing::Instrument;

use crate::attach::LocalIo;
use crate::context::{Context, create_private_dir};
use crate::handover::Handover;
use crate::signals::{Arrived, Forwarded};
use crate::state::{StateStore, VmPaths, this_process};
pub(crate) use jail::jailer;
use link::{AgentLink, AgentStream};
pub(crate) use machine::{accelerator, firecracker, qemu};
pub(crate) use request::OwnerRequest;
use slot::MachineSlot;
use spec::{Readiness, VmSpec};
use supervisor::{Ending, Supervisor};
use vm::RunningVm;

/// Who gets the container's output besides the log.
pub(crate) enum Front {
    /// This process's standard streams.
    Terminal {
        /// Standard input is passed on.
        interactive: bool,
    },
    /// Nobody; the command that started this owner waits for one line on this pipe.
    Detached {
        /// Where the line goes.
        report: File,
    },
    /// Nobody.
    Nobody,
}

/// What a VM begins with.
pub(crate) enum Origin {
    /// Its kernel.
    Boot,
    /// The state of another VM.
    Clone(clone::Source),
    /// A clone that was made ready ahead.
    Ready(Box<standby::Ready>),
    /// The started state that the start-up cache has, or its kernel where it has none.
    Warm(Box<warm::Cache>),
}

/// Runs a VM to its end; gives the exit code for the command line.
pub(crate) async fn run(
    context: &Context,
    spec: VmSpec,
    origin: Origin,
    front: Front,
) -> anyhow::Result<u8> {
    let span = tracing::info_span!("vm", name = spec.name.as_str());
    own(context, spec, origin, front).instrument(span).await
}

async fn own(context: &Context, spec: VmSpec, origin: Origin, front: Front) -> anyhow::Result<u8> {
    let (mut report, interactive) = match front {
        Front::Terminal { interactive } => (None, Some(interactive)),
        Front::Detached { report } => (Some(report), None),
        Front::Nobody => (None, None),
    };
    let started = start(context, &spec, origin, report.is_some()).await;
    if let Some(report) = &mut report {
        tell(report, &started)?;
    }
    drop(report);
    let Started {
        entry,
        vm,
        stream,
        sockets,
        signals,
        stop_requests,
        console,
        cache,
    } = started?;
    let local = match interactive {
        Some(interactive) => Some(LocalIo::start(
            interactive,
            spec.process.terminal.is_some(),
        )?),
        None => None,
    };
    let control =
        tokio::task::spawn_local(control::serve(sockets.control, Rc::clone(&vm)).in_current_span());
    let attending = attend(&vm, &spec, sockets.fork);
    let keeping = cache.map(|cache| {
        warm::Keeping::start(
            cache,
            Rc::clone(&vm),
            spec.clone(),
            entry.paths.fork_socket(),
        )
    });
    let log = log::ContainerLog::create(&entry.paths.container_log())?;
    let supervisor = Supervisor::new(&vm, &spec, stream, signals, stop_requests, local, log);
    let ending = supervisor.run().await;
    control.abort();
    if let Some(keeping) = keeping {
        keeping.end().await;
    }
    attending.iter().for_each(tokio::task::JoinHandle::abort);
    supervisor::power_off(&vm, &ending).await;
    console.abort();
    entry.finish(&vm.record.borrow(), &ending)?;
    match ending {
        Ending::Exited(status) => Ok(status.shell_code()),
        Ending::Lost(reason) => anyhow::bail!("VM '{}' was lost: {reason}", spec.name),
    }
}

/// Starts what goes on beside the container.
fn attend(
    vm: &Rc<RunningVm>,
    spec: &VmSpec,
    forks: fork::Listener,
) -> Vec<tokio::task::JoinHandle<()>> {
    let [disks, reserve] = [(); 2].map(|()| Rc::clone(vm));
    let mut tasks = vec![
        tokio::task::spawn_local(watch_network(Rc::clone(vm)).in_current_span()),
        tokio::task::spawn_local(async move { disks.watch_disks().await }.in_current_span()),
        tokio::task::spawn_local(fork::serve(forks, Rc::clone(vm)).in_current_span()),
        tokio::task::spawn_local(async move { reserve.fill_reserve().await }.in_current_span()),
    ];
    if let Some(check) = spec.health.clone() {
        let watch = health::watch(Rc::clone(vm), check, spec.process.clone());
        tasks.push(tokio::task::spawn_local(watch.in_current_span()));
    }
    tasks
}

/// Tells the command that started this owner how it went.
fn tell(report: &mut File, started: &anyhow::Result<Started>) -> anyhow::Result<()> {
    let readiness = match started {
        Ok(_) => Readiness::Started,
        Err(error) => Readiness::Failed {
            code: error.downcast_ref().map_or(
                crate::errors::EXIT_FCVM_FAILED,
                |exit: &crate::errors::ExitError| exit.code,
            ),
            message: crate::errors::one_line(error),
        },
    };
    // The command may have been killed meanwhile; the VM was asked for all the same.
    let _ = writeln!(report, "{}", serde_json::to_string(&readiness)?);
    Ok(())
}

/// A VM whose container has started.
struct Started {
    entry: Entry,
    vm: Rc<RunningVm>,
    stream: AgentStream,
    sockets: Sockets,
    signals: Forwarded,
    stop_requests: tokio::sync::mpsc::UnboundedReceiver<Option<u32>>,
    console: tokio::task::JoinHandle<()>,
    cache: Option<Box<warm::Cache>>,
}

/// The data path of `run`, on the way down.
async fn start(
    context: &Context,
    spec: &VmSpec,
    origin: Origin,
    detached: bool,
) -> anyhow::Result<Started> {
    let (place, step) = first_step(context, spec, origin)?;
    let Place {
        mut entry,
        mut watch,
        mut signals,
    } = place;
    if detached {
        entry.take_stderr()?;
    }
    let interrupted = async {
        loop {
            if let Arrived::Signal(signal) = signals.next().await {
                return signal;
            }
        }
    };
    let build = async {
        match step {
            Step::Boot => {
                let built = boot::build(context, spec, &mut entry, &mut watch).await?;
                Ok((built, None))
            }
            Step::Clone(source) => {
                let built = clone::build(context, spec, source, &mut entry, &mut watch).await?;
                Ok((built, None))
            }
            Step::Warm(cache) => warm::build(context, spec, cache, &mut entry, &mut watch).await,
            Step::GoOn(stage) => Ok((stage.go_on(spec, &entry, &mut watch).await?, None)),
        }
    };
    let (built, cache): (Built, _) = tokio::select! {
        built = build => built?,
        signal = interrupted => {
            return Err(crate::errors::ExitError {
                code: 128 + u8::try_from(signal).unwrap_or(0),
                message: format!("the start of VM '{}' was interrupted by signal {signal}", spec.name),
            }
            .into());
        }
    };
    let mut record = entry.record.clone();
    record.state = VmState::Running;
    record.started_at = Some(OffsetDateTime::now_utc());
    record.health = spec.health.as_ref().map(|_| Health::Starting);
    record.timings_us = watch.laps;
    entry.store.write(&record)?;
    let mut started = started(context, spec, entry, record, built, signals);
    started.cache = cache;
    Ok(started)
}

/// What is to be done for the container to run.
enum Step {
    Boot,
    Clone(clone::Source),
    Warm(Box<warm::Cache>),
    GoOn(Box<standby::Stage>),
}

/// The VM's place, a new one or that of a clone that was ready, and what is to be done there.
fn first_step(context: &Context, spec: &VmSpec, origin: Origin) -> anyhow::Result<(Place, Step)> {
    let new = |lineage| Place::new(context, spec, lineage, VmState::Created);
    Ok(match origin {
        Origin::Boot => (new(None)?, Step::Boot),
        Origin::Clone(source) => {
            let lineage = source.lineage.clone();
            (new(Some(lineage))?, Step::Clone(source))
        }
        Origin::Warm(cache) => (new(None)?, Step::Warm(cache)),
        Origin::Ready(ready) => {
            let (place, stage) = ready.assigned(spec)?;
            (place, Step::GoOn(Box::new(stage)))
        }
    })
}

/// What an owner has before it acquires anything else.
struct Place {
    entry: Entry,
    watch: Stopwatch,
    signals: Forwarded,
}

impl Place {
    fn new(
        context: &Context,
        spec: &VmSpec,
        lineage: Option<Lineage>,
        state: VmState,
    ) -> anyhow::Result<Self> {
        let mut watch = Stopwatch::new(spec.timings_us.clone());
        let signals = Forwarded::new()?;
        let entry = Entry::create(context, spec, lineage, state)?;
        watch.lap("record");
        Ok(Self {
            entry,
            watch,
            signals,
        })
    }

    /// Writes the stages so far into the record.
    fn tell_stages(&mut self) -> anyhow::Result<()> {
        let laps = self.watch.laps.clone();
        self.entry.update(|record| record.timings_us = laps)
    }
}

/// The VM as the owner's parts share it from now on.
fn started(
    context: &Context,
    spec: &VmSpec,
    entry: Entry,
    record: VmRecord,
    built: Built,
    signals: Forwarded,
) -> Started {
    let Built {
        machine,
        foundation,
        network,
        link,
        stream,
        sockets,
        console,
        serving,
        pages,
    } = built;
    let (stop, stop_requests) = tokio::sync::mpsc::unbounded_channel();
    let vm = Rc::new(RunningVm {
        store: entry.store.clone(),
        record: record.into(),
        machine: MachineSlot::new(machine),
        foundation,
        connection: network.connection.into(),
        network,
        link,
        stop_requests: stop,
        pausing: false.into(),
        changed: tokio::sync::Notify::new(),
        freezing: tokio::sync::Mutex::new(()),
        reserves: reserve::Reserves::new(context, spec),
        out_of_space: false.into(),
        lost: None.into(),
    });
    if let Some(pages) = pages {
        tokio::task::spawn_local(pages::end_with(pages, Rc::clone(&vm)).in_current_span());
    }
    if let Some(serving) = serving {
        tokio::task::spawn_local(clone::end_with(serving, Rc::clone(&vm)).in_current_span());
    }
    Started {
        entry,
        vm,
        stream,
        sockets,
        signals,
        stop_requests,
        console,
        cache: None,
    }
}

/// How long after its channels a machine may end for the one to be the reason of the other.
const MACHINE_END_LIMIT: Duration = Duration::from_secs(1);

/// Says when the network's helper has ended: the VM goes on without its network.
async fn watch_network(vm: Rc<RunningVm>) {
    if let Some(helper) = &vm.network.helper {
        let exit = helper.wait().await;
        // It also ends with the machine, whose end is told elsewhere.
        if tokio::time::timeout(MACHINE_END_LIMIT, vm.machine.wait_exit())
            .await
            .is_err()
        {
            tracing::warn!(target: "network", "the VM has no network any more: {exit}");
        }
    }
}

/// A VM whose container runs, before it is known as running.
struct Built {
    machine: fcvm_hypervisor::Vm,
    foundation: machine::Foundation,
    network: fcvm_network::Attachment,
    link: AgentLink,
    stream: AgentStream,
    sockets: Sockets,
    console: tokio::task::JoinHandle<()>,
    /// The process that serves the snapshot of a clone, which ends with it.
    serving: Option<Handover>,
    /// Who brings its memory.
    pages: Option<pages::PageService>,
}

/// Where other processes ask this owner.
struct Sockets {
    control: UnixListener,
    fork: fork::Listener,
}

impl Sockets {
    fn bind(entry: &mut Entry) -> anyhow::Result<Self> {
        entry.note(Resource::Path {
            path: entry.paths.runtime.display().to_string(),
        })?;
        create_private_dir(&entry.paths.runtime)?;
        Ok(Self {
            control: control::bind(&entry.paths.control_socket())?,
            fork: fork::Listener::bind(&entry.paths.fork_socket())?,
        })
    }
}

/// The VM's place in the state store. Dropped before `finish`, it leaves nothing behind.
pub(super) struct Entry {
    store: StateStore,
    paths: VmPaths,
    record: VmRecord,
    finished: bool,
}

impl Entry {
    fn create(
        context: &Context,
        spec: &VmSpec,
        lineage: Option<Lineage>,
        state: VmState,
    ) -> anyhow::Result<Self> {
        let store = context.state()?;
        let mut record = first_record(spec, this_process()?);
        record.lineage = lineage;
        record.state = state;
        store.create(&record)?;
        let entry = Self {
            paths: store.paths(&spec.id),
            store,
            record,
            finished: false,
        };
        entry.write_spec(spec)?;
        Ok(entry)
    }

    fn write_spec(&self, spec: &VmSpec) -> anyhow::Result<()> {
        let path = self.paths.spec();
        std::fs::write(&path, serde_json::to_vec(spec)?)
            .with_context(|| format!("cannot write {}", path.display()))
    }

    /// Makes a clone that was ready ahead the VM that is wanted.
    fn assign(&mut self, spec: &VmSpec) -> anyhow::Result<()> {
        self.write_spec(spec)?;
        let mut record = self.record.clone();
        record.state = VmState::Booting;
        record.name = spec.name.clone();
        record.remove_on_exit = spec.remove_on_exit;
        record.created_at = OffsetDateTime::now_utc();
        self.store.rename(&record)?;
        self.record = record;
        Ok(())
    }

    /// From here on what this process says goes to the owner's log.
    fn take_stderr(&self) -> anyhow::Result<()> {
        let file = File::options()
            .create(true)
            .append(true)
            .open(self.paths.owner_log())
            .context("cannot write the owner's log")?;
        rustix::stdio::dup2_stderr(&file).context("cannot redirect stderr")
    }

    fn update(&mut self, change: impl FnOnce(&mut VmRecord)) -> anyhow::Result<()> {
        change(&mut self.record);
        self.store.write(&self.record)
    }

    /// Removes what an attempt left whose guards are dropped, for another one.
    fn begin_again(&mut self) -> anyhow::Result<()> {
        let _ = std::fs::remove_dir_all(&self.paths.runtime);
        self.update(|record| {
            record.state = VmState::Created;
            record.lineage = None;
            record.resources.clear();
        })
    }

    /// Enters a resource before it exists.
    fn note(&mut self, resource: Resource) -> anyhow::Result<()> {
        self.update(|record| record.resources.push(resource))
    }

    /// Writes how the VM ended, or removes it.
    fn finish(mut self, record: &VmRecord, ending: &Ending) -> anyhow::Result<()> {
        self.finished = true;
        let _lock = self.store.lock()?;
        if record.remove_on_exit {
            return self.store.remove(&record.id);
        }
        let _ = std::fs::remove_dir_all(&self.paths.runtime);
        let mut record = record.clone();
        record.state = VmState::Exited;
        record.finished_at = Some(OffsetDateTime::now_utc());
        record.resources.clear();
        match ending {
            Ending::Exited(status) => record.exit = Some(*status),
            Ending::Lost(reason) => record.error = Some(reason.clone()),
        }
        self.store.write(&record)
    }
}

impl Drop for Entry {
    fn drop(&mut self) {
        if self.finished {
            return;
        }
        if let Err(error) = self.store.remove(&self.record.id) {
            tracing::warn!(target: "vm", "{error:#}");
        }
    }
}

fn first_record(spec: &VmSpec, owner: ProcessIdentity) -> VmRecord {
    VmRecord {
        version: RECORD_VERSION,
        id: spec.id.clone(),
        name: spec.name.clone(),
        state: VmState::Created,
        owner,
        image: spec.image.clone(),
        image_digest: spec.image_digest.clone(),
        command: spec.process.args.clone(),
        cpu_count: spec.cpu_count,
        memory_bytes: spec.memory_bytes,
        hypervisor: spec.hypervisor.to_string(),
        hypervisor_reason: spec.hypervisor_reason.clone(),
        accelerator: String::new(),
        network: String::new(),
        ports: spec.ports.clone(),
        labels: spec.labels.clone(),
        remove_on_exit: spec.remove_on_exit,
        stop_signal: spec.stop_signal,
        terminal: spec.process.terminal.is_some(),
        created_at: OffsetDateTime::now_utc(),
        started_at: None,
        finished_at: None,
        exit: None,
        error: None,
        health: None,
        lineage: None,
        start_cache: None,
        memory_origin: None,
        disk_store: None,
        timings_us: Vec::new(),
        resources: Vec::new(),
    }
}

/// Times of the stages of a start.
pub(crate) struct Stopwatch {
    last: Instant,
    pub(crate) laps: Vec<(String, u64)>,
}

impl Stopwatch {
    pub(crate) fn new(laps: Vec<(String, u64)>) -> Self {
        Self {
            last: Instant::now(),
            laps,
        }
    }

    /// What was done until now was done ahead, and the time since then was nobody's.
    pub(crate) fn went_ahead(&mut self) {
        for (stage, _) in &mut self.laps {
            stage.push_str(" (ahead)");
        }
        self.last = Instant::now();
    }

    /// Ends a stage.
    pub(crate) fn lap(&mut self, stage: &str) {
        let now = Instant::now();
        let microseconds = u64::try_from((now - self.last).as_micros()).unwrap_or(u64::MAX);
        tracing::debug!(target: "vm", "{stage}: {:.1} ms", microseconds as f64 / 1000.0);
        self.laps.push((stage.to_owned(), microseconds));
        self.last = now;
    }
}

/// The realtime clock in nanoseconds since 1970.
fn realtime_ns() -> u64 {
    let since = SystemTime::now()
        .duration_since(SystemTime::UNIX_EPOCH)
        .unwrap_or(Duration::ZERO);
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}
