//! `fcvm stats`: what VMs use, seen from the guest and from the host.

use std::collections::BTreeMap;
use std::time::Duration;

use fcvm_types::ByteSize;
use fcvm_types::guest::GuestStats;
use fcvm_types::record::{Resource, VmRecord, VmState};
use fcvm_wire::{Outcome, Request};
use serde_json::json;

use crate::args::{Format, StatsArguments};
use crate::client::Client;
use crate::context::Context;
use crate::output::table;
use crate::owner::OwnerRequest;
use crate::state::StateStore;

/// Interval over which the processor's share is measured when only one print is asked for.
const SINGLE_INTERVAL: Duration = Duration::from_millis(500);

/// One look at a VM.
struct Sample {
    record: VmRecord,
    /// Absent while the VM is paused: nothing in it can answer.
    guest: Option<GuestStats>,
    /// Memory of the hypervisor and helper processes, proportional set size, bytes.
    host_pss_bytes: u64,
    /// Processor time of those processes, nanoseconds.
    host_cpu_ns: u64,
    /// By the hypervisor's own names; only where they are shown.
    counters: BTreeMap<String, u64>,
    taken: tokio::time::Instant,
}

pub(crate) async fn run(context: &Context, arguments: &StatsArguments) -> anyhow::Result<u8> {
    if arguments.memory {
        return memory(context, arguments).await;
    }
    let store = context.state()?;
    let mut before = sample(&store, arguments).await?;
    let interval = if arguments.no_stream {
        SINGLE_INTERVAL
    } else {
        Duration::from_secs(arguments.interval.into())
    };
    loop {
        tokio::time::sleep(interval).await;
        let after = sample(&store, arguments).await?;
        print(&before, &after, arguments)?;
        if arguments.no_stream || (after.is_empty() && !arguments.vms.is_empty()) {
            return Ok(crate::EXIT_SUCCESS);
        }
        before = after;
    }
}

/// What memory servers do, once or again and again.
async fn memory(context: &Context, arguments: &StatsArguments) -> anyhow::Result<u8> {
    loop {
        clear(arguments);
        super::memory_stats::print(context, arguments.format)?;
        if arguments.no_stream {
            return Ok(crate::EXIT_SUCCESS);
        }
        tokio::time::sleep(Duration::from_secs(arguments.interval.into())).await;
    }
}

/// A terminal shows one table after the other in the same place.
fn clear(arguments: &StatsArguments) {
    use std::io::IsTerminal;
    let is_table = arguments.format == Format::Table;
    if is_table && !arguments.no_stream && std::io::stdout().is_terminal() {
        // Home and clear, as top does.
        print!("\x1b[H\x1b[J");
    }
}

async fn sample(store: &StateStore, arguments: &StatsArguments) -> anyhow::Result<Vec<Sample>> {
    let names = &arguments.vms;
    let records = if names.is_empty() {
        store
            .list()?
            .into_iter()
            .filter(|record| matches!(record.state, VmState::Running | VmState::Paused))
            .collect()
    } else {
        names
            .iter()
            .map(|name| store.find(name))
            .collect::<anyhow::Result<Vec<_>>>()?
    };
    let mut samples = Vec::new();
    for record in records {
        if record.state == VmState::Exited {
            anyhow::bail!("VM '{}' is not running", record.name);
        }
        let guest = if record.state == VmState::Paused {
            None
        } else {
            guest_stats(store, &record).await?
        };
        let counters = match arguments.format {
            Format::Json => counters(store, &record).await?,
            Format::Table => BTreeMap::new(),
        };
        let (host_pss_bytes, host_cpu_ns) = host_use(&record);
        samples.push(Sample {
            record,
            guest,
            host_pss_bytes,
            host_cpu_ns,
            counters,
            taken: tokio::time::Instant::now(),
        });
    }
    Ok(samples)
}

async fn counters(store: &StateStore, record: &VmRecord) -> anyhow::Result<BTreeMap<String, u64>> {
    let client = Client::connect(store, record).await?;
    match client.request(&OwnerRequest::Counters).await? {
        Outcome::Counters(counters) => Ok(counters),
        other => anyhow::bail!("the VM's owner gave an answer that makes no sense ({other:?})"),
    }
}

async fn guest_stats(store: &StateStore, record: &VmRecord) -> anyhow::Result<Option<GuestStats>> {
    match Client::connect(store, record)
        .await?
        .guest(Request::Stats)
        .await?
    {
        Outcome::Stats(stats) => Ok(Some(stats)),
        other => anyhow::bail!("the guest's agent gave an answer that makes no sense ({other:?})"),
    }
}

/// Proportional set size and processor time of the owner and the helpers of a VM.
fn host_use(record: &VmRecord) -> (u64, u64) {
    let helpers = record
        .resources
        .iter()
        .filter_map(|resource| match resource {
            Resource::Process { identity, .. } => Some(*identity),
            Resource::Path { .. } => None,
        });
    let processes = std::iter::once(record.owner)
        .chain(helpers)
        .filter(|identity| fcvm_process::is_running(*identity));
    processes
        .map(|identity| (pss_bytes(identity.pid), cpu_ns(identity.pid)))
        .fold((0, 0), |sum, one| (sum.0 + one.0, sum.1 + one.1))
}

/// `Pss` of smaps_rollup, proc(5); 0 when it cannot be read.
fn pss_bytes(pid: i32) -> u64 {
    let text = std::fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix("Pss:"));
    line.and_then(|rest| rest.trim().trim_end_matches(" kB").parse::<u64>().ok())
        .unwrap_or(0)
        * 1024
}

/// utime and stime of `/proc/PID/stat`, proc(5), in nanoseconds.
fn cpu_ns(pid: i32) -> u64 {
    let text = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let ticks = || -> Option<u64> {
        let mut fields = text.rsplit_once(") ")?.1.split(' ').skip(11);
        Some(fields.next()?.parse::<u64>().ok()? + fields.next()?.parse::<u64>().ok()?)
    };
    ticks().unwrap_or(0) * 1_000_000_000 / rustix::param::clock_ticks_per_second()
}

/// Share of one processor used between two readings, in percent.
fn percent(before_ns: u64, after_ns: u64, elapsed: Duration) -> f64 {
    let elapsed_ns = elapsed.as_nanos().max(1) as f64;
    after_ns.saturating_sub(before_ns) as f64 / elapsed_ns * 100.0
}

fn print(before: &[Sample], after: &[Sample], arguments: &StatsArguments) -> anyhow::Result<()> {
    let shares: Vec<f64> = after
        .iter()
        .map(|now| {
            let earlier = before
                .iter()
                .find(|sample| sample.record.id == now.record.id);
            earlier.map_or(0.0, |earlier| {
                percent(
                    earlier.host_cpu_ns,
                    now.host_cpu_ns,
                    now.taken - earlier.taken,
                )
            })
        })
        .collect();
    if arguments.format == Format::Json {
        let rows: Vec<_> = after
            .iter()
            .zip(&shares)
            .map(|(sample, share)| json_row(sample, *share))
            .collect();
        println!("{}", serde_json::to_string_pretty(&rows)?);
        return Ok(());
    }
    clear(arguments);
    let columns = [
        "ID",
        "NAME",
        "CPU %",
        "MEM USAGE / LIMIT",
        "HOST PSS",
        "NET IO",
        "BLOCK IO",
        "PIDS",
    ];
    table(
        &columns,
        after
            .iter()
            .zip(&shares)
            .map(|(sample, share)| row(sample, *share)),
    );
    Ok(())
}

fn row(sample: &Sample, share: f64) -> Vec<String> {
    let size = |bytes| ByteSize::from_bytes(bytes).to_string();
    let limit = size(sample.record.memory_bytes);
    let mut row = vec![
        sample.record.id.short().to_owned(),
        sample.record.name.to_string(),
        format!("{share:.1}%"),
    ];
    match &sample.guest {
        Some(guest) => row.extend([
            format!(
                "{} / {limit}",
                size(
                    guest
                        .memory_total_bytes
                        .saturating_sub(guest.memory_available_bytes)
                )
            ),
            size(sample.host_pss_bytes),
            format!(
                "{} / {}",
                size(guest.network_received_bytes),
                size(guest.network_sent_bytes)
            ),
            format!(
                "{} / {}",
                size(guest.disk_read_bytes),
                size(guest.disk_written_bytes)
            ),
            guest.process_count.to_string(),
        ]),
        None => row.extend([
            format!("- / {limit}"),
            size(sample.host_pss_bytes),
            "paused".to_owned(),
            "paused".to_owned(),
            "-".to_owned(),
        ]),
    }
    row
}

fn json_row(sample: &Sample, share: f64) -> serde_json::Value {
    json!({
        "id": sample.record.id,
        "name": sample.record.name,
        "cpu_percent": (share * 10.0).round() / 10.0,
        "memory_limit_bytes": sample.record.memory_bytes,
        "host_pss_bytes": sample.host_pss_bytes,
        "host_cpu_ns": sample.host_cpu_ns,
        "guest": sample.guest,
        "hypervisor_counters": sample.counters,
    })
}
