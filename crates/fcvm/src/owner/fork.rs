//! The source's side of a fork: clones are asked for, made ready, and given the frozen state.

use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::rc::Rc;

use anyhow::{Context as _, bail};
use rustix::net::sockopt::socket_peercred;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use serde::{Deserialize, Serialize};
use tokio::io::unix::AsyncFd;
use tokio::task::JoinSet;

use super::clone::{Waiting, send_offer, send_state};
use super::control::check_socket_path;
use super::vm::RunningVm;
use crate::handover::Handover;

const BACKLOG: i32 = 16;

/// Asks for clones. Descriptors: a channel to the owner of each.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct ForkRequest;

/// The source's answer.
#[derive(Debug, Serialize, Deserialize)]
#[serde(tag = "reply", rename_all = "snake_case")]
pub(crate) enum ForkReply {
    /// The clones have what they need.
    Frozen {
        /// Microseconds of each stage.
        timings_us: Vec<(String, u64)>,
    },
    /// No clone could be made ready, and the source was not stopped.
    NoClone,
    /// There are no clones, and the source goes on.
    Failed {
        /// One line.
        message: String,
    },
}

/// The socket on which clones are asked for.
pub(crate) struct Listener(AsyncFd<OwnedFd>);

impl Listener {
    /// Makes the socket; only this user can connect.
    pub(crate) fn bind(path: &Path) -> anyhow::Result<Self> {
        check_socket_path(path)?;
        let bind = || -> std::io::Result<OwnedFd> {
            let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
            let socket =
                rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
            rustix::net::bind(&socket, &SocketAddrUnix::new(path)?)?;
            std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
            rustix::net::listen(&socket, BACKLOG)?;
            Ok(socket)
        };
        let socket =
            bind().with_context(|| format!("cannot make the socket {}", path.display()))?;
        Ok(Self(fcvm_process::watch_readable(socket)?))
    }

    /// The next one who asks.
    pub(crate) async fn accept(&self) -> anyhow::Result<Handover> {
        let flags = SocketFlags::CLOEXEC;
        loop {
            let mut ready = self.0.readable().await?;
            let accepted =
                ready.try_io(|socket| Ok(rustix::net::accept_with(socket.get_ref(), flags)?));
            let Ok(accepted) = accepted else { continue };
            let accepted = accepted.context("the socket fails")?;
            let peer = socket_peercred(&accepted)?.uid;
            if peer == rustix::process::geteuid() || peer.is_root() {
                return Handover::from_fd(accepted);
            }
            tracing::debug!("user {} is not allowed to connect", peer.as_raw());
        }
    }
}

/// Connects to such a socket.
pub(crate) fn connect(path: &Path) -> anyhow::Result<Handover> {
    let connect = || -> std::io::Result<OwnedFd> {
        let flags = SocketFlags::CLOEXEC;
        let socket =
            rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
        rustix::net::connect(&socket, &SocketAddrUnix::new(path)?)?;
        Ok(socket)
    };
    Handover::from_fd(connect().with_context(|| format!("cannot connect to {}", path.display()))?)
}

/// Serves those who ask until the VM ends.
pub(super) async fn serve(listener: Listener, vm: Rc<RunningVm>) {
    loop {
        match listener.accept().await {
            Ok(asking) => {
                tokio::task::spawn_local(answer(asking, Rc::clone(&vm)));
            }
            Err(error) => {
                tracing::warn!(target: "vm", "no clone can be made: {error:#}");
                // Out of descriptors: until a client leaves there is nothing to accept with.
                tokio::time::sleep(std::time::Duration::from_millis(100)).await;
            }
        }
    }
}

async fn answer(asking: Handover, vm: Rc<RunningVm>) {
    let reply = match fork(&asking, &vm).await {
        Ok(Some(timings_us)) => ForkReply::Frozen { timings_us },
        Ok(None) => ForkReply::NoClone,
        Err(error) => ForkReply::Failed {
            message: crate::errors::one_line(&error),
        },
    };
    // Whoever asked may be gone; the clones are on their own.
    let _ = asking.send(&reply, &[]);
}

/// Forks; nothing where no clone could be made ready, which the clones explain.
async fn fork(asking: &Handover, vm: &RunningVm) -> anyhow::Result<Option<Vec<(String, u64)>>> {
    let Some((ForkRequest, channels)) = asking.receive().await? else {
        bail!("nothing was asked for");
    };
    let _one_at_a_time = vm.freezing.lock().await;
    let channels: Vec<Handover> = channels
        .into_iter()
        .map(Handover::from_fd)
        .collect::<anyhow::Result<_>>()?;
    let plan = vm.plan_freeze()?;
    let template = vm.template(&plan)?;
    let device_line = vm.machine.get().device_line().clone();
    for channel in &channels {
        // One whose owner has ended is found out below.
        let _ = send_offer(channel, vm.foundation.accelerator, &device_line, &template);
    }
    let (preparation, waiting) = tokio::join!(vm.prepare_freeze(plan), all_waiting(channels));
    let preparation = preparation?;
    if waiting.is_empty() {
        return Ok(None);
    }
    let frozen = vm.freeze(preparation).await?;
    let mark = vm.link.mark();
    for channel in &waiting {
        // A clone that has ended meanwhile says so itself.
        let _ = send_state(channel, &frozen, mark);
    }
    Ok(Some(frozen.timings_us))
}

/// Waits until each clone waits, or has ended; gives those that wait.
async fn all_waiting(channels: Vec<Handover>) -> Vec<Handover> {
    let mut pending = JoinSet::new();
    for channel in channels {
        pending.spawn_local(async move {
            match channel.receive::<Waiting>().await {
                Ok(Some(_)) => Some(channel),
                Ok(None) | Err(_) => None,
            }
        });
    }
    pending.join_all().await.into_iter().flatten().collect()
}
