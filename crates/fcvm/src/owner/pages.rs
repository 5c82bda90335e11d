//! A VM whose memory comes from a memory server, from its owner's side: what comes ahead is waited for, and the
//! VM ends with its server, as its guest would stand still for ever at the next page.

use std::os::fd::AsFd;
use std::path::Path;
use std::rc::Rc;

use anyhow::{Context as _, bail};
use fcvm_memory::uffd::{Notice, ServerWatch};
use tokio::io::unix::AsyncFd;

use super::vm::RunningVm;

/// The server of one VM's memory.
pub(super) struct PageService {
    watch: ServerWatch,
    /// A second descriptor of its connection.
    ready: AsyncFd<std::os::fd::OwnedFd>,
    /// The hypervisor.
    pid: i32,
    progress: Progress,
}

/// How far the server has got with the VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Progress {
    /// It has not heard of it.
    Unknown,
    /// What comes ahead is coming.
    Bringing,
    /// All of it has come.
    Brought,
}

impl PageService {
    /// Watches the server of a socket, which is to serve the process.
    pub(super) fn connect(socket: &Path, pid: i32) -> anyhow::Result<Self> {
        let watch = ServerWatch::connect(socket)
            .with_context(|| format!("the memory cannot be had from {}", socket.display()))?;
        let copy = watch.as_fd().try_clone_to_owned()?;
        Ok(Self {
            watch,
            ready: fcvm_process::watch_readable(copy)?,
            pid,
            progress: Progress::Unknown,
        })
    }

    /// Waits until what was recorded has come.
    pub(super) async fn brought(&mut self) -> anyhow::Result<()> {
        while self.progress != Progress::Brought {
            if let Some(reason) = self.step().await {
                bail!(reason);
            }
        }
        Ok(())
    }

    /// Waits until the VM gets no pages any more; tells why. May be cancelled.
    pub(super) async fn ended(&mut self) -> String {
        loop {
            if let Some(reason) = self.step().await {
                return reason;
            }
        }
    }

    /// Takes what the server says next; the reason where that is the end.
    async fn step(&mut self) -> Option<String> {
        if !self.watch.is_pending() {
            match self.ready.readable().await {
                // What is read next may be the last of it: looked at again when it is wanted.
                Ok(mut ready) => ready.clear_ready(),
                Err(error) => return Some(format!("the memory server cannot be watched: {error}")),
            }
        }
        let notice = match self.watch.next() {
            Ok(Some(notice)) => notice,
            Ok(None) => return Some("the memory server has ended".to_owned()),
            Err(error) => return Some(error.to_string()),
        };
        match notice {
            Notice::Started { pid, ahead_pages } if pid == self.pid => {
                self.progress = match ahead_pages {
                    0 => Progress::Brought,
                    _ => Progress::Bringing,
                };
            }
            Notice::Prefetched { pid, .. } if pid == self.pid => self.progress = Progress::Brought,
            Notice::Ended { pid, reason, .. } if pid == self.pid => {
                return Some(format!("the memory server serves it no longer: {reason}"));
            }
            _ => {}
        }
        None
    }
}

/// Ends the VM when its server has gone, and says so.
pub(super) async fn end_with(mut service: PageService, vm: Rc<RunningVm>) {
    let reason = service.ended().await;
    // A hypervisor that has ended by itself is told by its own end.
    if tokio::time::timeout(super::MACHINE_END_LIMIT, vm.machine.wait_exit())
        .await
        .is_err()
    {
        tracing::warn!(target: "memory", "{reason}: the VM ends");
        *vm.lost.borrow_mut() = Some(reason);
        vm.machine.kill();
    }
}
