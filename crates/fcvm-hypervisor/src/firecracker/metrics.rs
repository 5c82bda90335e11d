//! Firecracker's own counters: what it writes to a pipe each minute and when it is asked, summed up.
//!
//! Each line is a JSON object with what has happened since the line before. Members whose names end with
//! a unit of time are no counts and are left out. The counters are Firecracker's, by its own names:
//! `vcpu.exit_mmio_write`, `block.read_bytes`, `net.tx_packets_count`, ...

use std::collections::BTreeMap;
use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use rustix::fs::{CWD, Mode};
use serde::Serialize;
use serde_json::Value;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, BufReader};
use tokio::net::unix::pipe;
use tokio::sync::watch;
use tokio::task::AbortHandle;

/// Name of the pipe in the VM's directory.
pub(super) const METRICS_NAME: &str = "metrics";
/// Most bytes of a line; they have some 12,000.
const LINE_BYTES_MAX: u64 = 256 << 10;
/// Most counters that are kept; there are some 300.
const COUNTERS_MAX: usize = 2000;

/// What has happened in a VM, by the names of Firecracker's metrics.
pub type Counters = BTreeMap<String, u64>;

#[derive(Serialize)]
pub(super) struct Metrics {
    pub(super) metrics_path: &'static str,
}

/// The reading end of a VM's pipe.
#[derive(Debug)]
pub(super) struct MetricsReader {
    counters: Arc<Mutex<Counters>>,
    /// How many lines have been read.
    lines: watch::Receiver<u64>,
    task: AbortHandle,
}

impl Drop for MetricsReader {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl MetricsReader {
    /// Makes the pipe and reads it from now on.
    pub(super) fn start(path: &Path) -> io::Result<Self> {
        rustix::fs::mkfifoat(CWD, path, Mode::RUSR | Mode::WUSR)?;
        // Open for writing too, so that it has no end before Firecracker has opened it.
        let reader = pipe::OpenOptions::new()
            .read_write(true)
            .open_receiver(path)?;
        let counters = Arc::default();
        let (told, lines) = watch::channel(0);
        let task = tokio::spawn(read(reader, Arc::clone(&counters), told));
        Ok(Self {
            counters,
            lines,
            task: task.abort_handle(),
        })
    }

    /// How many lines have come.
    pub(super) fn line_count(&self) -> u64 {
        *self.lines.borrow()
    }

    /// Waits for a line after so many; gives the sums.
    pub(super) async fn after(&self, count: u64) -> Counters {
        let mut lines = self.lines.clone();
        // The pipe has no end, so that there is one, or none yet.
        let _ = lines.wait_for(|now| *now > count).await;
        lock(&self.counters).clone()
    }
}

async fn read(reader: pipe::Receiver, counters: Arc<Mutex<Counters>>, told: watch::Sender<u64>) {
    let mut reader = BufReader::new(reader);
    let mut line = Vec::new();
    loop {
        line.clear();
        let mut part = (&mut reader).take(LINE_BYTES_MAX);
        match part.read_until(b'\n', &mut line).await {
            Ok(count) if count > 0 => {}
            _ => return,
        }
        match serde_json::from_slice(&line) {
            Ok(Value::Object(members)) => {
                let mut sums = lock(&counters);
                for (name, value) in &members {
                    add(&mut sums, name, value);
                }
            }
            _ => tracing::debug!("firecracker: a line of metrics that is none"),
        }
        told.send_modify(|count| *count += 1);
    }
}

/// Adds the counts of a member and of those in it.
fn add(sums: &mut Counters, name: &str, value: &Value) {
    match value {
        Value::Object(members) => {
            for (inner, value) in members {
                add(sums, &format!("{name}.{inner}"), value);
            }
        }
        Value::Number(number)
            if !["_us", "_ms", "_ns"]
                .iter()
                .any(|unit| name.ends_with(unit)) =>
        {
            let Some(count) = number.as_u64() else {
                return;
            };
            if sums.len() < COUNTERS_MAX || sums.contains_key(name) {
                let sum = sums.entry(name.to_owned()).or_default();
                *sum = sum.saturating_add(count);
            }
        }
        _ => {}
    }
}

/// Nothing panics while the lock is held; a poisoned one is still good.
fn lock(counters: &Mutex<Counters>) -> std::sync::MutexGuard<'_, Counters> {
    counters.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn counts_are_summed_and_times_are_not() {
        let mut sums = Counters::new();
        let line = json!({
            "utc_timestamp_ms": 1_541_591_155_180_u64,
            "api_server": {"process_startup_time_us": 7},
            "block": {"read_bytes": 4096, "read_agg": {"min_us": 1, "sum_us": 5}, "odd": -1},
            "text": "x",
        });
        for _ in 0..2 {
            for (name, value) in line.as_object().unwrap() {
                add(&mut sums, name, value);
            }
        }
        assert_eq!(
            sums,
            Counters::from([("block.read_bytes".to_owned(), 8192)])
        );
        for number in 0..2 * COUNTERS_MAX {
            add(&mut sums, &format!("name{number}"), &json!(1));
        }
        assert_eq!(sums.len(), COUNTERS_MAX);
    }
}
