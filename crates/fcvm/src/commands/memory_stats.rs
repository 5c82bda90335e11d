//! `fcvm stats --memory`: what memory servers do for the VMs whose memory they have.

use fcvm_memory::uffd::Summary;
use fcvm_types::ByteSize;
use fcvm_types::memory::PageServiceStatistics;
use fcvm_types::record::{Resource, VmRecord};
use serde_json::{Value, json};

use super::snapshot::serve_memory::PREFIX;
use crate::args::Format;
use crate::context::Context;
use crate::output::table;

/// A server of this user's, and what it says.
struct Server {
    pid: i32,
    summary: Summary,
}

/// Asks all servers and prints what they say.
pub(super) fn print(context: &Context, format: Format) -> anyhow::Result<()> {
    let records = context.state()?.list()?;
    let servers = servers(context);
    if format == Format::Json {
        let values: Vec<Value> = servers
            .iter()
            .map(|server| json_row(server, &records))
            .collect();
        println!("{}", serde_json::to_string_pretty(&values)?);
        return Ok(());
    }
    let columns = [
        "SERVER PID",
        "CLONE",
        "FAULTS",
        "ZERO",
        "COPIED",
        "P50 US",
        "P99 US",
        "AHEAD",
        "LATE",
    ];
    let rows = servers.iter().flat_map(|server| {
        let served = server.summary.served.iter();
        let served = served.map(|(pid, statistics)| {
            let name = vm_of(&records, *pid)
                .map_or_else(|| format!("process {pid}"), |vm| vm.name.to_string());
            row(server.pid, name, statistics)
        });
        let ended = format!("({} ended)", server.summary.ended_count);
        served.chain([row(server.pid, ended, &server.summary.ended)])
    });
    table(&columns, rows);
    Ok(())
}

/// The servers that answer; one that has ended meanwhile is none.
fn servers(context: &Context) -> Vec<Server> {
    let Ok(entries) = std::fs::read_dir(&context.runtime_dir) else {
        return Vec::new();
    };
    let mut servers: Vec<Server> = entries
        .flatten()
        .filter_map(|entry| {
            let name = entry.file_name();
            let name = name.to_str()?;
            let pid = name.strip_prefix(PREFIX)?.strip_suffix(".sock")?;
            let pid = pid.parse().ok()?;
            match Summary::ask(&entry.path()) {
                Ok(summary) => Some(Server { pid, summary }),
                Err(error) => {
                    tracing::debug!(target: "memory", "server {pid}: {error}");
                    None
                }
            }
        })
        .collect();
    servers.sort_by_key(|server| server.pid);
    servers
}

/// The VM whose hypervisor has this number.
fn vm_of(records: &[VmRecord], hypervisor: i32) -> Option<&VmRecord> {
    let is_it = |resource: &Resource| matches!(resource, Resource::Process { identity, .. } if identity.pid == hypervisor);
    records
        .iter()
        .find(|record| record.resources.iter().any(is_it))
}

fn row(server: i32, clone: String, statistics: &PageServiceStatistics) -> Vec<String> {
    let microseconds = |share| {
        format!(
            "{:.1}",
            statistics.latency.quantile_ns(share) as f64 / 1000.0
        )
    };
    vec![
        server.to_string(),
        clone,
        statistics.faults.to_string(),
        statistics.zero_faults.to_string(),
        ByteSize::from_bytes(statistics.fault_bytes).to_string(),
        microseconds(0.5),
        microseconds(0.99),
        statistics.prefetched_pages.to_string(),
        statistics.prefetch_late_pages.to_string(),
    ]
}

fn json_row(server: &Server, records: &[VmRecord]) -> Value {
    let served: Vec<Value> = server
        .summary
        .served
        .iter()
        .map(|(pid, statistics)| {
            let vm = vm_of(records, *pid);
            json!({
                "pid": pid,
                "vm": vm.map(|vm| json!({"id": vm.id, "name": vm.name})),
                "statistics": statistics,
            })
        })
        .collect();
    json!({
        "server_pid": server.pid,
        "served": served,
        "ended_count": server.summary.ended_count,
        "ended": server.summary.ended,
    })
}
