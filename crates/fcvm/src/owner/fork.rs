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

use super::control::check_socket_path;
use super::vm::RunningVm;
use crate::handover::Handover;
use crate::template::{all_waiting, send_offer, send_state};

const BACKLOG: i32 = 16;

/// What is asked of a source.
#[derive(Debug, Serialize, Deserialize)]
#[serde(tag = "request", rename_all = "snake_case")]
pub(crate) enum ForkRequest {
    /// Clones. Descriptors: a channel to the owner of each.
    Fork,
    /// What that would cost.
    Estimate,
    /// What the VM takes now.
    Usage,
}

/// What a VM takes of its host, in bytes.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub(crate) struct Usage {
    /// The hypervisor's part of all memory, what is shared counted in parts (PSS).
    pub(crate) memory_pss_bytes: u64,
    /// Of the guest's memory, the same.
    pub(crate) guest_pss_bytes: u64,
    /// Of the guest's memory, what no other VM shares.
    pub(crate) guest_private_bytes: u64,
    /// What the disk has of its own.
    pub(crate) disk_private_bytes: u64,
    /// What the disk shares with the state that it was made from.
    pub(crate) disk_shared_bytes: u64,
}

/// What a fork would cost.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Estimate {
    /// `succession`: nothing of the memory is copied; `difference`: what the VM wrote since it was
    /// forked; `copy`: all that is in use.
    pub(crate) way: String,
    /// Size of the guest's memory.
    pub(crate) memory_bytes: u64,
    /// What of it is in use on the host.
    pub(crate) resident_bytes: u64,
    /// What is copied.
    pub(crate) copied_bytes: u64,
    /// How the disk is branched; absent where there is none.
    pub(crate) disk_method: Option<String>,
    /// What the VM's disk has of its own.
    pub(crate) disk_bytes: u64,
}

/// The source's answer.
#[derive(Debug, Serialize, Deserialize)]
#[serde(tag = "reply", rename_all = "snake_case")]
pub(crate) enum ForkReply {
    /// The clones have what they need.
    Frozen {
        /// How long the source stood still, in microseconds.
        pause_us: u64,
        /// Microseconds of each stage.
        timings_us: Vec<(String, u64)>,
    },
    /// What a fork would cost.
    Estimate(Estimate),
    /// What the VM takes.
    Usage(Usage),
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
    let reply = serve_one(&asking, &vm)
        .await
        .unwrap_or_else(|error| ForkReply::Failed {
            message: crate::errors::one_line(&error),
        });
    // Whoever asked may be gone; the clones are on their own.
    let _ = asking.send(&reply, &[]);
}

async fn serve_one(asking: &Handover, vm: &Rc<RunningVm>) -> anyhow::Result<ForkReply> {
    let Some((request, channels)) = asking.receive().await? else {
        bail!("nothing was asked for");
    };
    match request {
        ForkRequest::Fork => fork(channels, vm).await,
        ForkRequest::Estimate => Ok(ForkReply::Estimate(vm.estimate()?)),
        ForkRequest::Usage => Ok(ForkReply::Usage(vm.usage()?)),
    }
}

async fn fork(channels: Vec<OwnedFd>, vm: &Rc<RunningVm>) -> anyhow::Result<ForkReply> {
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
        return Ok(ForkReply::NoClone);
    }
    let frozen = vm.freeze(preparation).await?;
    tokio::task::spawn_local({
        let vm = Rc::clone(vm);
        async move { vm.set_clock().await }
    });
    let mark = vm.link.mark();
    for channel in &waiting {
        // A clone that has ended meanwhile says so itself.
        let _ = send_state(channel, &frozen.state, frozen.difference.as_ref(), mark);
    }
    Ok(ForkReply::Frozen {
        pause_us: frozen.pause_us(),
        timings_us: frozen.timings_us,
    })
}
