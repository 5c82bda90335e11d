//! `stop`, `kill`, `rm`, `wait`, `pause`, `unpause`: verbs for several VMs at once.

use fcvm_types::record::{VmRecord, VmState};

use crate::args::{KillArguments, RmArguments, StopArguments, VmsArguments, WaitArguments};
use crate::client::Client;
use crate::context::Context;
use crate::errors::{EXIT_FCVM_FAILED, one_line};
use crate::owner::OwnerRequest;
use crate::state::StateStore;

pub(crate) async fn stop(context: &Context, arguments: &StopArguments) -> anyhow::Result<u8> {
    let store = context.state()?;
    let select = Select {
        names: &arguments.vms,
        all: arguments.all,
        ignore: arguments.ignore,
    };
    let records = select.records(&store, |record| record.state != VmState::Exited)?;
    let stops = records.iter().map(|(name, record)| {
        let store = store.clone();
        let (name, record, time) = (name.clone(), record.clone(), arguments.time);
        tokio::task::spawn_local(async move { (name, stop_one(&store, &record, time).await) })
    });
    // All at once: the grace of one is not the delay of the next.
    let stops: Vec<_> = stops.collect();
    let mut report = Report::default();
    for stop in stops {
        let (name, result) = stop.await?;
        report.add(&name, result);
    }
    Ok(report.code)
}

async fn stop_one(store: &StateStore, record: &VmRecord, time: Option<u32>) -> anyhow::Result<()> {
    if record.state == VmState::Exited {
        return Ok(());
    }
    match Client::connect(store, record).await {
        Ok(client) => {
            client
                .request(&OwnerRequest::Stop { timeout_s: time })
                .await?;
        }
        Err(error) => {
            // Not listening yet, or no more: its owner takes the signal instead.
            tracing::debug!("{error:#}");
            fcvm_process::terminate(record.owner);
        }
    }
    Ok(fcvm_process::wait_gone(record.owner).await?)
}

pub(crate) async fn kill(context: &Context, arguments: &KillArguments) -> anyhow::Result<u8> {
    let signal = crate::signals::parse(&arguments.signal)?;
    let store = context.state()?;
    let select = Select {
        names: &arguments.vms,
        all: arguments.all,
        ignore: false,
    };
    let mut report = Report::default();
    for (name, record) in select.records(&store, |record| record.state != VmState::Exited)? {
        let killed = async {
            let client = Client::connect(&store, &record).await?;
            client
                .request(&OwnerRequest::Kill { signal })
                .await
                .map(drop)
        };
        report.add(&name, killed.await);
    }
    Ok(report.code)
}

pub(crate) async fn pause(context: &Context, arguments: &VmsArguments) -> anyhow::Result<u8> {
    ask(context, arguments, VmState::Running, &OwnerRequest::Pause).await
}

pub(crate) async fn unpause(context: &Context, arguments: &VmsArguments) -> anyhow::Result<u8> {
    ask(context, arguments, VmState::Paused, &OwnerRequest::Unpause).await
}

async fn ask(
    context: &Context,
    arguments: &VmsArguments,
    applies: VmState,
    request: &OwnerRequest,
) -> anyhow::Result<u8> {
    let store = context.state()?;
    let select = Select {
        names: &arguments.vms,
        all: arguments.all,
        ignore: false,
    };
    let mut report = Report::default();
    for (name, record) in select.records(&store, |record| record.state == applies)? {
        let asked = async {
            Client::connect(&store, &record)
                .await?
                .request(request)
                .await
                .map(drop)
        };
        report.add(&name, asked.await);
    }
    Ok(report.code)
}

pub(crate) async fn rm(context: &Context, arguments: &RmArguments) -> anyhow::Result<u8> {
    let store = context.state()?;
    let mut report = Report::default();
    for name in &arguments.vms {
        if arguments.force && store.remove_unreadable(name)? {
            report.add(name, Ok(()));
        }
    }
    let names: Vec<String> = arguments
        .vms
        .iter()
        .filter(|name| !report.done.contains(name))
        .cloned()
        .collect();
    let select = Select {
        names: &names,
        all: arguments.all,
        ignore: arguments.force,
    };
    for (name, record) in select.records(&store, |_| true)? {
        report.add(&name, rm_one(&store, &record, arguments.force).await);
    }
    Ok(report.code)
}

pub(crate) async fn rm_one(
    store: &StateStore,
    record: &VmRecord,
    force: bool,
) -> anyhow::Result<()> {
    if record.state != VmState::Exited {
        if !force {
            anyhow::bail!(
                "VM '{}' is running: stop it first, or remove it with 'fcvm rm -f'",
                record.name
            );
        }
        stop_one(store, record, Some(0)).await?;
    }
    let _lock = store.lock()?;
    store.remove(&record.id)
}

pub(crate) async fn wait(context: &Context, arguments: &WaitArguments) -> anyhow::Result<u8> {
    let store = context.state()?;
    let mut records = Vec::new();
    for name in &arguments.vms {
        records.push(store.find(name)?);
    }
    for record in records {
        fcvm_process::wait_gone(record.owner).await?;
        // A VM that was to be removed has taken its exit code with it, as in Podman.
        let ended = store.find(record.id.as_str()).ok();
        match ended.and_then(|record| record.exit) {
            Some(exit) => println!("{}", exit.shell_code()),
            None => println!("-1"),
        }
    }
    Ok(crate::EXIT_SUCCESS)
}

/// Which VMs a command means.
struct Select<'a> {
    names: &'a [String],
    all: bool,
    ignore: bool,
}

impl Select<'_> {
    /// The VMs with the text that named each; `applies` limits `--all`.
    fn records(
        &self,
        store: &StateStore,
        applies: impl Fn(&VmRecord) -> bool,
    ) -> anyhow::Result<Vec<(String, VmRecord)>> {
        if self.all {
            let records = store.list()?.into_iter().filter(applies);
            return Ok(records
                .map(|record| (record.id.short().to_owned(), record))
                .collect());
        }
        let mut records: Vec<(String, VmRecord)> = Vec::new();
        for name in self.names {
            match store.find(name) {
                Ok(record) if records.iter().any(|(_, other)| other.id == record.id) => {}
                Ok(record) => records.push((name.clone(), record)),
                Err(_) if self.ignore => {}
                Err(error) => return Err(error),
            }
        }
        Ok(records)
    }
}

/// Prints the name of each VM that was dealt with, and an error for each that was not.
#[derive(Default)]
struct Report {
    code: u8,
    done: Vec<String>,
}

impl Report {
    fn add(&mut self, name: &str, result: anyhow::Result<()>) {
        match result {
            Ok(()) => {
                println!("{name}");
                self.done.push(name.to_owned());
            }
            Err(error) => {
                eprintln!("Error: {}", one_line(&error));
                self.code = EXIT_FCVM_FAILED;
            }
        }
    }
}
