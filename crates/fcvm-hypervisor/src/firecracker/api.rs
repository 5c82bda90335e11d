//! The control channel: HTTP requests over a Unix socket, each with a time limit.
//!
//! Firecracker answers them in one thread, one after the other, and not at all while that thread
//! hangs, as it does when a handler of page faults has died. Each request has a connection of its
//! own, so that one without an answer leaves nothing behind. The requests are those of
//! src/firecracker/swagger/firecracker.yaml in Firecracker.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use fcvm_types::record::ProcessIdentity;
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Bytes;
use hyper::{Method, Request, StatusCode};
use hyper_util::rt::TokioIo;
use serde::{Deserialize, Serialize};
use tokio::net::UnixStream;

use super::NAME;
use crate::error::HypervisorError;
use crate::version::Version;

/// Most bytes of an answer. Those of the requests used here are far below.
const ANSWER_BYTES_MAX: usize = 1 << 20;
/// Most characters of a reason that are shown.
const REASON_CHARS_MAX: usize = 400;
/// How long until the socket of a process that has just started is tried again.
const LISTEN_RETRY: Duration = Duration::from_millis(2);

/// What can be asked of Firecracker.
#[derive(Debug)]
pub(super) struct ApiClient {
    socket: PathBuf,
}

#[derive(Deserialize)]
struct VersionAnswer {
    firecracker_version: String,
}

#[derive(Deserialize)]
struct InstanceAnswer {
    state: String,
}

#[derive(Deserialize)]
struct Fault {
    fault_message: String,
}

impl ApiClient {
    /// Nothing is sent yet.
    pub(super) fn new(socket: PathBuf) -> Self {
        Self { socket }
    }

    /// Waits until something listens on the socket: its file is there a moment before.
    pub(super) async fn listening(&self, timeout: Duration) -> Result<(), HypervisorError> {
        let listening = async {
            loop {
                match UnixStream::connect(&self.socket).await {
                    Ok(_) => return Ok(()),
                    Err(error) if is_early(&error) => tokio::time::sleep(LISTEN_RETRY).await,
                    Err(error) => return Err(disconnected(error.to_string())),
                }
            }
        };
        within("listening", timeout, listening).await
    }

    /// The process that listens on the socket.
    pub(super) async fn server(&self) -> Result<ProcessIdentity, HypervisorError> {
        let stream = UnixStream::connect(&self.socket)
            .await
            .map_err(|error| disconnected(error.to_string()))?;
        let found = stream.peer_cred().and_then(|server| {
            let pid = server
                .pid()
                .ok_or_else(|| io::Error::from(io::ErrorKind::NotFound))?;
            fcvm_process::process_identity(pid)
        });
        found.map_err(|error| disconnected(format!("its process cannot be found: {error}")))
    }

    /// The version that it says it is.
    pub(super) async fn version(&self, timeout: Duration) -> Result<Version, HypervisorError> {
        let answer: VersionAnswer = self.get("/version", timeout).await?;
        let version = answer.firecracker_version;
        Version::parse_start(&version).ok_or_else(|| {
            disconnected(format!(
                "it says that its version is '{}'",
                one_line(&version)
            ))
        })
    }

    /// The state of its VM: `Not started`, `Running` or `Paused`.
    pub(super) async fn state(&self, timeout: Duration) -> Result<String, HypervisorError> {
        let answer: InstanceAnswer = self.get("/", timeout).await?;
        Ok(answer.state)
    }

    async fn get<T: for<'a> Deserialize<'a>>(
        &self,
        path: &str,
        timeout: Duration,
    ) -> Result<T, HypervisorError> {
        let answer = self.send(Method::GET, path, Bytes::new(), timeout).await?;
        serde_json::from_slice(&answer).map_err(|error| {
            disconnected(format!(
                "its answer to 'GET {path}' is not the expected one: {error}"
            ))
        })
    }

    /// Sets a part of the VM up, or makes something happen.
    pub(super) async fn put(
        &self,
        path: &str,
        body: &impl Serialize,
        timeout: Duration,
    ) -> Result<(), HypervisorError> {
        self.change(Method::PUT, path, body, timeout).await
    }

    /// Changes a part of the VM.
    pub(super) async fn patch(
        &self,
        path: &str,
        body: &impl Serialize,
        timeout: Duration,
    ) -> Result<(), HypervisorError> {
        self.change(Method::PATCH, path, body, timeout).await
    }

    async fn change(
        &self,
        method: Method,
        path: &str,
        body: &impl Serialize,
        timeout: Duration,
    ) -> Result<(), HypervisorError> {
        let body = serde_json::to_vec(body).map_err(|error| HypervisorError::InvalidSpec {
            what: format!("what '{method} {path}' says"),
            reason: error.to_string(),
        })?;
        self.send(method, path, body.into(), timeout)
            .await
            .map(drop)
    }

    /// The body of the answer.
    async fn send(
        &self,
        method: Method,
        path: &str,
        body: Bytes,
        timeout: Duration,
    ) -> Result<Bytes, HypervisorError> {
        let command = format!("{method} {path}");
        let exchange = self.exchange(method, path, body);
        let (status, answer) = within(&command, timeout, exchange).await?;
        if status.is_success() {
            return Ok(answer);
        }
        let reason = match serde_json::from_slice::<Fault>(&answer) {
            Ok(fault) => one_line(&fault.fault_message),
            Err(_) => format!("it answered with status {} and no reason", status.as_u16()),
        };
        Err(HypervisorError::Refused {
            hypervisor: NAME,
            command,
            reason,
        })
    }

    async fn exchange(
        &self,
        method: Method,
        path: &str,
        body: Bytes,
    ) -> Result<(StatusCode, Bytes), HypervisorError> {
        let stream = UnixStream::connect(&self.socket)
            .await
            .map_err(|error| disconnected(error.to_string()))?;
        let broken = |error: hyper::Error| disconnected(error.to_string());
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
            .await
            .map_err(broken)?;
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header("Host", "localhost")
            .header("Accept", "application/json")
            .header("Content-Type", "application/json")
            .body(Full::new(body))
            .map_err(|error| disconnected(error.to_string()))?;
        let answer = async move {
            let response = sender.send_request(request).await.map_err(broken)?;
            let status = response.status();
            let body = Limited::new(response.into_body(), ANSWER_BYTES_MAX);
            let body = body
                .collect()
                .await
                .map_err(|error| disconnected(format!("its answer cannot be read: {error}")))?;
            // The sender is dropped here, which ends the connection.
            Ok((status, body.to_bytes()))
        };
        let (answer, _) = tokio::join!(answer, connection);
        answer
    }
}

fn is_early(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused
    )
}

fn disconnected(reason: String) -> HypervisorError {
    HypervisorError::Disconnected {
        hypervisor: NAME,
        reason,
    }
}

/// Firecracker's reasons have line breaks where they quote another error.
fn one_line(text: &str) -> String {
    let words: Vec<&str> = text.split_whitespace().collect();
    let line = words.join(" ");
    let shown: String = line.chars().take(REASON_CHARS_MAX).collect();
    shown
        .escape_debug()
        .to_string()
        .replace("\\'", "'")
        .replace("\\\"", "\"")
}

async fn within<T>(
    command: &str,
    timeout: Duration,
    work: impl Future<Output = Result<T, HypervisorError>>,
) -> Result<T, HypervisorError> {
    tokio::time::timeout(timeout, work)
        .await
        .unwrap_or_else(|_| {
            Err(HypervisorError::Timeout {
                hypervisor: NAME,
                command: command.to_owned(),
                timeout_s: timeout.as_secs(),
            })
        })
}
