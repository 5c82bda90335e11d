//! The source's side of a fork: clones are asked for, made ready, and given the frozen state.

use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::rc::Rc;

use anyhow::{Context as _, bail};
use fcvm_types::VmId;
use rustix::net::sockopt::socket_peercred;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use serde::{Deserialize, Serialize};
use tokio::io::unix::AsyncFd;

use super::control::check_socket_path;
use super::reserve::Reserve;
use super::vm::RunningVm;
use crate::commands::clones::Spare;
use crate::handover::Handover;
use crate::template::{Template, all_waiting, send_offer, send_state};

/// Why clones of a running VM map its memory.
pub(super) const OF_A_FORK: &str = "it is that of a running VM, which is in a file";

const BACKLOG: i32 = 16;

/// What is asked of a source.
#[derive(Debug, Serialize, Deserialize)]
#[serde(tag = "request", rename_all = "snake_case")]
pub(crate) enum ForkRequest {
    /// Clones that were made ready ahead, at most so many. `Fork` has to follow.
    Take {
        /// How many.
        count: usize,
    },
    /// Clones, besides those that were taken. Descriptors: a channel to the owner of each.
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
    /// forked; `copy`: all that is in use; `save`: the same, by the hypervisor itself.
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
    /// Clones that are ready. Descriptors: where each is asked for.
    Ready {
        /// Their ids.
        ids: Vec<VmId>,
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
    if let Err(error) = serve_one(&asking, &vm).await {
        let message = crate::errors::one_line(&error);
        // Whoever asked may be gone.
        let _ = asking.send(&ForkReply::Failed { message }, &[]);
    }
    vm.replace_reserve(&asking).await;
}

async fn serve_one(asking: &Handover, vm: &Rc<RunningVm>) -> anyhow::Result<()> {
    let Some((mut request, mut channels)) = asking.receive().await? else {
        return Ok(());
    };
    let reply = match request {
        ForkRequest::Estimate => Some(ForkReply::Estimate(vm.estimate()?)),
        ForkRequest::Usage => Some(ForkReply::Usage(vm.usage()?)),
        ForkRequest::Take { .. } | ForkRequest::Fork => None,
    };
    if let Some(reply) = reply {
        return asking.send(&reply, &[]);
    }
    let _one_at_a_time = vm.freezing.lock().await;
    vm.check_running()?;
    let mut taken = Vec::new();
    let reserve = match request {
        ForkRequest::Take { count } => {
            let mut reserve = vm.take_reserve();
            if let Some(reserve) = &mut reserve {
                let count = count.min(reserve.clones.len());
                taken.extend(reserve.clones.drain(..count));
            }
            offer_ready(asking, &taken)?;
            match asking.receive().await? {
                Some(next) => (request, channels) = next,
                None => return Ok(()),
            }
            reserve
        }
        // What is ready is of no use after the freeze.
        _ => vm.take_reserve(),
    };
    if !matches!(request, ForkRequest::Fork) {
        bail!("clones were taken and no fork was asked for");
    }
    let channels = channels
        .into_iter()
        .map(Handover::from_fd)
        .collect::<anyhow::Result<_>>()?;
    let taken = taken.into_iter().map(|spare| spare.channel).collect();
    fork(asking, vm, reserve, taken, channels).await
}

/// Hands clones that are ready over to the one who asks.
pub(crate) fn offer_ready(asking: &Handover, clones: &[Spare]) -> anyhow::Result<()> {
    let wishes: Vec<_> = clones.iter().map(|spare| spare.wishes.as_fd()).collect();
    let ids = clones.iter().map(|spare| spare.id.clone()).collect();
    asking.send(&ForkReply::Ready { ids }, &wishes)
}

/// Freezes the VM and gives its state to the clones that wait already and to new ones.
async fn fork(
    asking: &Handover,
    vm: &Rc<RunningVm>,
    reserve: Option<Reserve>,
    mut waiting: Vec<Handover>,
    channels: Vec<Handover>,
) -> anyhow::Result<()> {
    let device_line = vm.machine.get().device_line();
    let offer = |template: &Template| {
        for channel in &channels {
            // One whose owner has ended is found out below.
            let _ = send_offer(
                channel,
                vm.foundation.accelerator,
                &device_line,
                template,
                OF_A_FORK,
            );
        }
    };
    let preparation = match reserve {
        Some(reserve) => {
            offer(&reserve.template);
            waiting.extend(all_waiting(channels).await);
            vm.refresh(reserve.preparation)?
        }
        None => {
            let plan = vm.plan_freeze()?;
            offer(&vm.template(&plan)?);
            let (preparation, new) = tokio::join!(vm.prepare_freeze(plan), all_waiting(channels));
            waiting.extend(new);
            preparation?
        }
    };
    if waiting.is_empty() {
        return asking.send(&ForkReply::NoClone, &[]);
    }
    let mut frozen = vm.freeze(preparation).await?;
    let mark = vm.link.mark();
    for channel in &waiting {
        // A clone that has ended meanwhile says so itself.
        let _ = send_state(channel, &frozen.state, frozen.difference.as_ref(), mark);
    }
    tokio::task::spawn_local({
        let vm = Rc::clone(vm);
        async move { vm.set_clock().await }
    });
    let reply = ForkReply::Frozen {
        pause_us: frozen.pause_us(),
        timings_us: std::mem::take(&mut frozen.timings_us),
    };
    // Whoever asked may be gone; the clones are on their own.
    let _ = asking.send(&reply, &[]);
    vm.settle(frozen).await;
    Ok(())
}
