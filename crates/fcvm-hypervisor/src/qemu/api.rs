//! QMP, QEMU's control protocol: commands with a time limit each, and events.
//!
//! One JSON object per line either way, docs/interop/qmp-spec in QEMU. A generated client of the
//! whole protocol (the `qapi` crate) would be 40 times the code for the five commands used here and
//! bounds neither a line's length nor the time to an answer.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use serde::Deserialize;
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::{mpsc, oneshot, watch};

use super::NAME;
use crate::error::HypervisorError;
use crate::version::Version;
use crate::vm::VmEvent;

/// Longest line accepted from QEMU, in bytes. The answers used here are far below.
const LINE_BYTES_MAX: u64 = 1 << 20;
/// Events kept for a reader that is late. A guest can provoke events, so later ones are dropped.
const EVENTS_MAX: usize = 64;

/// Why QEMU said it ends, the `reason` of its SHUTDOWN event.
pub(super) type ShutdownReason = String;

/// A connection to QEMU's control channel.
#[derive(Debug)]
pub(super) struct QmpClient {
    writer: tokio::sync::Mutex<OwnedWriteHalf>,
    shared: Arc<Shared>,
    events: tokio::sync::Mutex<mpsc::Receiver<VmEvent>>,
    ended: watch::Receiver<bool>,
    /// Status of the latest migration, which is how device state is loaded.
    migration: watch::Receiver<String>,
    version: Version,
}

#[derive(Debug, Default)]
struct Shared {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    next_id: u64,
    waiting: HashMap<u64, oneshot::Sender<Result<Value, String>>>,
    shutdown: Option<ShutdownReason>,
    /// Why no more answers come.
    closed: Option<String>,
}

/// What QEMU may send after its greeting.
#[derive(Deserialize)]
struct Message {
    id: Option<u64>,
    #[serde(rename = "return")]
    returned: Option<Value>,
    error: Option<QmpFailure>,
    event: Option<String>,
    #[serde(default)]
    data: Value,
}

#[derive(Deserialize)]
struct QmpFailure {
    desc: String,
}

#[derive(Deserialize)]
struct Greeting {
    #[serde(rename = "QMP")]
    qmp: GreetingBody,
}

#[derive(Deserialize)]
struct GreetingBody {
    version: GreetingVersion,
}

#[derive(Deserialize)]
struct GreetingVersion {
    qemu: GreetingNumbers,
}

#[derive(Deserialize)]
struct GreetingNumbers {
    major: u16,
    minor: u16,
    micro: u16,
}

impl QmpClient {
    /// Reads the greeting and leaves the negotiation mode.
    pub(super) async fn connect(
        stream: UnixStream,
        timeout: Duration,
    ) -> Result<Self, HypervisorError> {
        let (reader, writer) = stream.into_split();
        let mut reader = BufReader::new(reader);
        let greeting = within("greeting", timeout, read_line(&mut reader)).await?;
        let greeting = greeting.map_err(|reason| HypervisorError::Disconnected {
            hypervisor: NAME,
            reason,
        })?;
        let numbers = serde_json::from_slice::<Greeting>(&greeting)
            .map_err(|error| HypervisorError::Disconnected {
                hypervisor: NAME,
                reason: format!("its greeting is not QMP: {error}"),
            })?
            .qmp
            .version
            .qemu;
        let shared = Arc::new(Shared::default());
        let (event_sender, events) = mpsc::channel(EVENTS_MAX);
        let (ended_sender, ended) = watch::channel(false);
        let (migration_sender, migration) = watch::channel(String::new());
        let dispatcher = Dispatcher {
            shared: Arc::clone(&shared),
            events: event_sender,
            migration: migration_sender,
            dropped_events: 0,
        };
        tokio::spawn(dispatcher.run(reader, ended_sender));
        let client = Self {
            writer: tokio::sync::Mutex::new(writer),
            shared,
            events: tokio::sync::Mutex::new(events),
            ended,
            migration,
            version: Version {
                major: numbers.major,
                minor: numbers.minor,
                micro: numbers.micro,
            },
        };
        client
            .execute("qmp_capabilities", Value::Null, timeout)
            .await?;
        Ok(client)
    }

    /// Version that QEMU told in its greeting.
    pub(super) fn version(&self) -> Version {
        self.version
    }

    /// Sends a command and waits for its answer.
    pub(super) async fn execute(
        &self,
        command: &str,
        arguments: Value,
        timeout: Duration,
    ) -> Result<Value, HypervisorError> {
        let (sender, answer) = oneshot::channel();
        let id = {
            let mut state = self.shared.lock();
            if let Some(reason) = &state.closed {
                return Err(HypervisorError::Disconnected {
                    hypervisor: NAME,
                    reason: reason.clone(),
                });
            }
            state.next_id += 1;
            let id = state.next_id;
            state.waiting.insert(id, sender);
            id
        };
        // Whatever way this call ends, also by being cancelled, its entry goes.
        let _entry = Entry {
            shared: &self.shared,
            id,
        };
        let exchange = async {
            self.send(command, arguments, id).await?;
            match answer.await {
                Ok(Ok(value)) => Ok(value),
                Ok(Err(reason)) => Err(HypervisorError::Refused {
                    hypervisor: NAME,
                    command: command.to_owned(),
                    reason,
                }),
                Err(_) => Err(self.disconnected()),
            }
        };
        within(command, timeout, exchange).await?
    }

    async fn send(&self, command: &str, arguments: Value, id: u64) -> Result<(), HypervisorError> {
        let mut message = json!({ "execute": command, "id": id });
        if !arguments.is_null() {
            message["arguments"] = arguments;
        }
        let mut line = message.to_string().into_bytes();
        line.push(b'\n');
        let mut writer = self.writer.lock().await;
        writer
            .write_all(&line)
            .await
            .map_err(|error| HypervisorError::Disconnected {
                hypervisor: NAME,
                reason: error.to_string(),
            })
    }

    /// The next event; `None` when the channel has ended.
    pub(super) async fn next_event(&self) -> Option<VmEvent> {
        self.events.lock().await.recv().await
    }

    /// Waits until a migration has ended, and tells whether it succeeded. The capability `events`
    /// must be set.
    pub(super) async fn migrated(&self, timeout: Duration) -> Result<bool, HypervisorError> {
        let mut migration = self.migration.clone();
        let over = |status: &String| matches!(status.as_str(), "completed" | "failed");
        let waited = within("migrate-incoming", timeout, migration.wait_for(over)).await?;
        match waited {
            Ok(status) => Ok(*status == "completed"),
            Err(_) => Err(self.disconnected()),
        }
    }

    /// Forgets the events that have arrived.
    pub(super) async fn forget_events(&self) {
        let mut events = self.events.lock().await;
        while events.try_recv().is_ok() {}
    }

    /// Waits until all that QEMU sent has been read, and tells why it said it would end.
    pub(super) async fn drained(&self) -> Option<ShutdownReason> {
        let mut ended = self.ended.clone();
        let _ = ended.wait_for(|ended| *ended).await;
        self.shared.lock().shutdown.clone()
    }

    fn disconnected(&self) -> HypervisorError {
        HypervisorError::Disconnected {
            hypervisor: NAME,
            reason: self
                .shared
                .lock()
                .closed
                .clone()
                .unwrap_or_else(|| "the connection was lost".to_owned()),
        }
    }
}

impl Shared {
    /// Nothing panics while this lock is held; a poisoned one is still good.
    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

struct Entry<'a> {
    shared: &'a Shared,
    id: u64,
}

impl Drop for Entry<'_> {
    fn drop(&mut self) {
        self.shared.lock().waiting.remove(&self.id);
    }
}

/// Reads the channel to its end and hands on what arrives.
struct Dispatcher {
    shared: Arc<Shared>,
    events: mpsc::Sender<VmEvent>,
    migration: watch::Sender<String>,
    dropped_events: u64,
}

impl Dispatcher {
    async fn run(mut self, mut reader: BufReader<OwnedReadHalf>, ended: watch::Sender<bool>) {
        let reason = loop {
            let line = match read_line(&mut reader).await {
                Ok(line) => line,
                Err(reason) => break reason,
            };
            match serde_json::from_slice(&line) {
                Ok(message) => self.dispatch(message),
                Err(error) => break format!("it sent a line that is not QMP: {error}"),
            }
        };
        {
            let mut state = self.shared.lock();
            state.closed = Some(reason);
            state.waiting.clear();
        }
        let _ = ended.send(true);
    }

    fn dispatch(&mut self, message: Message) {
        if let Some(event) = message.event {
            self.event(&event, &message.data);
        } else if let Some(id) = message.id {
            let answer = match message.error {
                Some(failure) => Err(failure.desc),
                None => Ok(message.returned.unwrap_or_default()),
            };
            if let Some(waiting) = self.shared.lock().waiting.remove(&id) {
                let _ = waiting.send(answer);
            }
        }
    }

    fn event(&mut self, name: &str, data: &Value) {
        tracing::trace!("event {name} {data}");
        let event = match name {
            "SHUTDOWN" => {
                let reason = text(data, "reason");
                self.shared.lock().shutdown.get_or_insert(reason);
                return;
            }
            "MIGRATION" => {
                let _ = self.migration.send(text(data, "status"));
                return;
            }
            "STOP" => VmEvent::Stopped,
            "RESUME" => VmEvent::Resumed,
            "BLOCK_IO_ERROR" => VmEvent::DiskError {
                disk: text(data, "node-name"),
                write: data["operation"] == "write",
                no_space: data["nospace"] == true,
                reason: text(data, "reason"),
            },
            _ => return,
        };
        if self.events.try_send(event).is_err() {
            self.dropped_events += 1;
            if self.dropped_events.is_power_of_two() {
                tracing::debug!("{} events found no reader", self.dropped_events);
            }
        }
    }
}

fn text(data: &Value, field: &str) -> String {
    data[field].as_str().unwrap_or("unknown").to_owned()
}

/// One line without its end, or why there is none.
async fn read_line(reader: &mut BufReader<OwnedReadHalf>) -> Result<Vec<u8>, String> {
    let mut line = Vec::new();
    let length = reader
        .take(LINE_BYTES_MAX)
        .read_until(b'\n', &mut line)
        .await
        .map_err(|error| error.to_string())?;
    if length == 0 {
        return Err("it has ended".to_owned());
    }
    if line.pop() != Some(b'\n') {
        return Err(format!("a line is incomplete after {length} bytes"));
    }
    Ok(line)
}

async fn within<T>(
    command: &str,
    timeout: Duration,
    work: impl Future<Output = T>,
) -> Result<T, HypervisorError> {
    tokio::time::timeout(timeout, work)
        .await
        .map_err(|_| HypervisorError::Timeout {
            hypervisor: NAME,
            command: command.to_owned(),
            timeout_s: timeout.as_secs(),
        })
}
