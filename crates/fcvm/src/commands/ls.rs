//! `fcvm ls`: the VMs, in Podman's columns.

use anyhow::bail;
use fcvm_types::ByteSize;
use fcvm_types::record::{Health, Lineage, VmRecord, VmState};
use serde_json::json;

use crate::args::{Format, LsArguments};
use crate::context::Context;
use crate::output::{age, shorten, table};
use crate::owner::fork::{ForkReply, ForkRequest, Usage, connect};
use crate::state::StateStore;

pub(crate) async fn run(context: &Context, arguments: &LsArguments) -> anyhow::Result<u8> {
    let filters = arguments
        .filter
        .iter()
        .map(|text| Filter::parse(text))
        .collect::<anyhow::Result<Vec<_>>>()?;
    let store = context.state()?;
    let mut records = store.all()?;
    let wants_ended = arguments.all
        || filters
            .iter()
            .any(|filter| matches!(filter, Filter::Status(_)));
    records.retain(|record| {
        (wants_ended || !matches!(record.state, VmState::Exited | VmState::Standby))
            && arguments
                .pid
                .is_none_or(|pid| record.owner.pid == pid && record.state != VmState::Exited)
            && filters.iter().all(|filter| filter.matches(record))
    });
    let mut usages = Vec::new();
    if arguments.size {
        for record in &records {
            usages.push(usage(&store, record).await);
        }
    }
    if arguments.quiet {
        for record in &records {
            println!(
                "{}",
                if arguments.no_trunc {
                    record.id.as_str()
                } else {
                    record.id.short()
                }
            );
        }
    } else if arguments.format == Format::Json {
        let mut rows: Vec<_> = records.iter().map(json_row).collect();
        for (row, usage) in rows.iter_mut().zip(&usages) {
            row["usage"] = serde_json::to_value(usage)?;
        }
        println!("{}", serde_json::to_string_pretty(&rows)?);
    } else {
        print_table(&records, &usages, arguments);
    }
    Ok(crate::EXIT_SUCCESS)
}

/// Asks the owner of a VM that runs; `None` where it does not answer.
async fn usage(store: &StateStore, record: &VmRecord) -> Option<Usage> {
    if !matches!(record.state, VmState::Running | VmState::Paused) {
        return None;
    }
    let owner = connect(&store.paths(&record.id).fork_socket()).ok()?;
    owner.send(&ForkRequest::Usage, &[]).ok()?;
    match owner.receive::<ForkReply>().await {
        Ok(Some((ForkReply::Usage(usage), _))) => Some(usage),
        _ => None,
    }
}

fn print_table(records: &[VmRecord], usages: &[Option<Usage>], arguments: &LsArguments) {
    let mut columns = vec![
        "VM ID", "IMAGE", "COMMAND", "CREATED", "STATUS", "PORTS", "NAMES",
    ];
    let with_lineage = records.iter().any(|record| record.lineage.is_some());
    if with_lineage {
        columns.push("PARENT");
    }
    if arguments.size {
        columns.extend(["MEMORY", "OWN MEMORY", "OWN DISK"]);
    }
    let size = |bytes| ByteSize::from_bytes(bytes).to_string();
    let rows = records.iter().enumerate().map(|(index, record)| {
        let mut row = table_row(record, arguments.no_trunc);
        if with_lineage {
            row.push(record.lineage.as_ref().map_or_else(String::new, parent));
        }
        if arguments.size {
            row.extend(match usages.get(index) {
                Some(Some(usage)) => [
                    size(usage.memory_pss_bytes),
                    size(usage.guest_private_bytes),
                    size(usage.disk_private_bytes),
                ],
                _ => [const { String::new() }; 3],
            });
        }
        row
    });
    table(&columns, rows);
}

/// `web`, `web (snapshot warm)`, `web (snapshot warm, served by 4711)`.
fn parent(lineage: &Lineage) -> String {
    let name = &lineage.parent_name;
    match (&lineage.snapshot, &lineage.serve) {
        (Some(snapshot), Some(serve)) => {
            format!("{name} (snapshot {snapshot}, served by {})", serve.pid)
        }
        (Some(snapshot), None) => format!("{name} (snapshot {snapshot})"),
        (None, _) => name.to_string(),
    }
}

fn table_row(record: &VmRecord, whole: bool) -> Vec<String> {
    let command = record.command.join(" ");
    let ports: Vec<String> = record.ports.iter().map(ToString::to_string).collect();
    vec![
        if whole {
            record.id.to_string()
        } else {
            record.id.short().to_owned()
        },
        record.image.clone(),
        if whole {
            command
        } else {
            shorten(&command, 24)
        },
        format!("{} ago", age(record.created_at)),
        status(record),
        ports.join(", "),
        record.name.to_string(),
    ]
}

/// The state as a person reads it: `Up 5 minutes (healthy)`, `Exited (0) 2 hours ago`.
pub(crate) fn status(record: &VmRecord) -> String {
    let since = |prefix: &str| match record.started_at {
        Some(at) => format!("{prefix} {}", age(at)),
        None => prefix.to_owned(),
    };
    let health = match record.health {
        Some(Health::Starting) => " (starting)",
        Some(Health::Healthy) => " (healthy)",
        Some(Health::Unhealthy) => " (unhealthy)",
        None => "",
    };
    match record.state {
        VmState::Standby => "Standby".to_owned(),
        VmState::Created => "Created".to_owned(),
        VmState::Booting => "Booting".to_owned(),
        VmState::Running => since("Up") + health,
        VmState::Paused => since("Up") + " (paused)",
        VmState::Stopping => since("Up") + " (stopping)",
        VmState::Exited => {
            let ago = record
                .finished_at
                .map_or(String::new(), |at| format!(" {} ago", age(at)));
            match record.exit {
                Some(exit) => format!("Exited ({}){ago}", exit.shell_code()),
                None => format!("Lost{ago}"),
            }
        }
    }
}

/// The stable JSON form, docs/format/json-output.md.
pub(crate) fn json_row(record: &VmRecord) -> serde_json::Value {
    json!({
        "id": record.id,
        "name": record.name,
        "image": record.image,
        "image_digest": record.image_digest,
        "command": record.command,
        "state": record.state,
        "status": status(record),
        "health": record.health,
        "exit_code": record.exit.map(fcvm_types::guest::ExitStatus::shell_code),
        "error": record.error,
        "owner_pid": (record.state != VmState::Exited).then_some(record.owner.pid),
        "cpus": record.cpu_count,
        "memory_bytes": record.memory_bytes,
        "hypervisor": record.hypervisor,
        "accelerator": record.accelerator,
        "network": record.network,
        "ports": record.ports,
        "labels": record.labels,
        "lineage": record.lineage,
        "created_at": crate::output::timestamp(record.created_at),
        "started_at": record.started_at.map(crate::output::timestamp),
        "finished_at": record.finished_at.map(crate::output::timestamp),
    })
}

/// A condition of `--filter`.
enum Filter {
    Name(String),
    Id(String),
    Status(String),
    Ancestor(String),
    Label(String, Option<String>),
}

impl Filter {
    fn parse(text: &str) -> anyhow::Result<Self> {
        let Some((key, value)) = text.split_once('=') else {
            bail!(
                "'{text}' is no filter: write KEY=VALUE with name, id, label, status or ancestor"
            );
        };
        let value = value.to_owned();
        Ok(match key {
            "name" => Self::Name(value),
            "id" => Self::Id(value),
            "status" => Self::Status(value),
            "ancestor" => Self::Ancestor(value),
            "label" => match value.split_once('=') {
                Some((name, value)) => Self::Label(name.to_owned(), Some(value.to_owned())),
                None => Self::Label(value, None),
            },
            _ => bail!("'{key}' is no filter: write name, id, label, status or ancestor"),
        })
    }

    fn matches(&self, record: &VmRecord) -> bool {
        match self {
            Self::Name(part) => record.name.as_str().contains(part),
            Self::Id(prefix) => record.id.as_str().starts_with(prefix),
            Self::Status(state) => {
                serde_json::to_value(record.state).is_ok_and(|value| value == state.as_str())
            }
            Self::Ancestor(image) => {
                record.image.contains(image) || record.image_digest.contains(image)
            }
            Self::Label(name, value) => record
                .labels
                .get(name)
                .is_some_and(|has| value.as_ref().is_none_or(|wanted| wanted == has)),
        }
    }
}
