//! A VM whose memory comes from a memory server, from its owner's side: what comes ahead is waited for, and the
//! VM ends with its server, as its guest would stand still for ever at the next page.

use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::Duration;

use anyhow::{Context as _, bail};
use fcvm_memory::uffd::{Notice, ServerWatch, Summary};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use tokio::io::unix::AsyncFd;

use super::vm::RunningVm;

/// How long nothing may come from a server that is to bring memory. It tells each second how far it has got.
const STANDSTILL_LIMIT: Duration = Duration::from_secs(30);

/// The server of one VM's memory.
pub(super) struct PageService {
    socket: PathBuf,
    watch: ServerWatch,
    /// A second descriptor of its connection.
    ready: AsyncFd<OwnedFd>,
    /// The hypervisor.
    pid: i32,
    progress: Progress,
    standstill_limit: Duration,
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
        let watch = ServerWatch::connect_for(socket, pid)
            .with_context(|| format!("the memory cannot be had from {}", socket.display()))?;
        let copy = watch.as_fd().try_clone_to_owned()?;
        Ok(Self {
            socket: socket.to_owned(),
            watch,
            ready: fcvm_process::watch_readable(copy)?,
            pid,
            progress: Progress::Unknown,
            standstill_limit: STANDSTILL_LIMIT,
        })
    }

    /// Watches anew after the connection has ended, which the server may only have given up. The reason where
    /// the VM gets no pages any more.
    fn again(&mut self) -> Option<String> {
        let Ok(again) = Self::connect(&self.socket, self.pid) else {
            return Some("the memory server has ended".to_owned());
        };
        (self.watch, self.ready) = (again.watch, again.ready);
        if self.progress == Progress::Unknown {
            return None;
        }
        match Summary::ask(&self.socket) {
            Ok(summary) if summary.served.iter().any(|(pid, _)| *pid == self.pid) => None,
            Ok(_) => Some("the memory server serves it no longer".to_owned()),
            Err(error) => Some(error.to_string()),
        }
    }

    /// Waits until what was recorded has come, as long as more of it comes.
    pub(super) async fn brought(&mut self) -> anyhow::Result<()> {
        while self.progress != Progress::Brought {
            let limit = self.standstill_limit;
            match tokio::time::timeout(limit, self.step()).await {
                Ok(None) => {}
                Ok(Some(reason)) => bail!(reason),
                Err(_) => bail!(
                    "the memory server at {} stands still: nothing has come from it for {} s",
                    self.socket.display(),
                    limit.as_secs()
                ),
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

    /// Waits until the server has said something: to read before that would hold up the owner.
    async fn readable(&self) -> std::io::Result<()> {
        while !self.watch.is_pending() {
            let mut ready = self.ready.readable().await?;
            let at_once = Timespec {
                tv_sec: 0,
                tv_nsec: 0,
            };
            let mut polled = [PollFd::new(self.ready.get_ref(), PollFlags::IN)];
            if poll(&mut polled, Some(&at_once))? > 0 {
                break;
            }
            // It was read together with what came before.
            ready.clear_ready();
        }
        Ok(())
    }

    /// Takes what the server says next; the reason where that is the end.
    async fn step(&mut self) -> Option<String> {
        if let Err(error) = self.readable().await {
            return Some(format!("the memory server cannot be watched: {error}"));
        }
        let notice = match self.watch.next() {
            Ok(Some(notice)) => notice,
            Ok(None) => return self.again(),
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
            Notice::Refused { pid, reason } if pid == self.pid => {
                return Some(format!("the memory server does not serve it: {reason}"));
            }
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

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader, Write};
    use std::os::unix::net::{UnixListener, UnixStream};

    use fcvm_types::memory::PageServiceStatistics;

    use super::*;

    const PID: i32 = 42;

    /// The next connection, and what is asked there.
    fn asked(listener: &UnixListener) -> (UnixStream, String) {
        let (socket, _) = listener.accept().unwrap();
        let mut question = String::new();
        BufReader::new(&socket).read_line(&mut question).unwrap();
        (socket, question)
    }

    /// The next connection of who asks to watch.
    fn accept(listener: &UnixListener) -> UnixStream {
        let (mut socket, question) = asked(listener);
        assert_eq!(question, "{\"question\":\"watch\",\"pid\":42}\n");
        socket.write_all(b"{\"event\":\"watching\"}\n").unwrap();
        socket
    }

    /// A server that watches, and the connection on which it tells.
    fn watched(directory: &Path) -> (PageService, UnixStream) {
        let path = directory.join("socket");
        let listener = UnixListener::bind(&path).unwrap();
        let server = std::thread::spawn(move || accept(&listener));
        let service = PageService::connect(&path, PID).unwrap();
        (service, server.join().unwrap())
    }

    fn started(pid: i32, pages: u64) -> String {
        format!("{{\"event\":\"started\",\"pid\":{pid},\"ahead_pages\":{pages}}}\n")
    }

    #[tokio::test]
    async fn what_comes_ahead_is_waited_for_and_the_end_is_told() {
        let directory = tempfile::tempdir().unwrap();
        let (mut service, mut server) = watched(directory.path());
        let other = PID + 1;
        let brought = format!("{{\"event\":\"prefetched\",\"pid\":{other},\"pages\":9}}\n");
        let all = started(other, 0) + &started(PID, 5) + &brought;
        server.write_all(all.as_bytes()).unwrap();
        let early = tokio::time::timeout(std::time::Duration::from_millis(50), service.brought());
        assert!(early.await.is_err());
        let brought = brought.replace(&other.to_string(), &PID.to_string());
        server.write_all(brought.as_bytes()).unwrap();
        service.brought().await.unwrap();
        drop(server);
        assert_eq!(service.ended().await, "the memory server has ended");
    }

    #[tokio::test]
    async fn a_vm_without_pages_ahead_need_not_wait_and_one_that_is_given_up_is_told() {
        let directory = tempfile::tempdir().unwrap();
        let (mut service, mut server) = watched(directory.path());
        server.write_all(started(PID, 0).as_bytes()).unwrap();
        service.brought().await.unwrap();
        let statistics = serde_json::to_string(&PageServiceStatistics::default());
        let end = format!(
            "{{\"event\":\"ended\",\"pid\":{PID},\"reason\":\"it lied\",\"is_failure\":true,\"statistics\":{}}}\n",
            statistics.unwrap()
        );
        server.write_all(end.as_bytes()).unwrap();
        let reason = service.ended().await;
        assert_eq!(reason, "the memory server serves it no longer: it lied");
    }

    #[tokio::test]
    async fn a_refusal_and_a_server_that_stands_still_are_told() {
        let directory = tempfile::tempdir().unwrap();
        let (mut service, mut server) = watched(directory.path());
        service.standstill_limit = Duration::from_millis(50);
        let progress = format!("{{\"event\":\"prefetching\",\"pid\":{PID},\"pages\":3}}\n");
        server.write_all(started(PID, 5).as_bytes()).unwrap();
        server.write_all(progress.as_bytes()).unwrap();
        let told = service.brought().await.unwrap_err().to_string();
        assert!(told.contains("stands still"), "{told}");
        let refused = format!("{{\"event\":\"refused\",\"pid\":{PID},\"reason\":\"no room\"}}\n");
        server.write_all(refused.as_bytes()).unwrap();
        assert_eq!(
            service.ended().await,
            "the memory server does not serve it: no room"
        );
    }

    #[tokio::test]
    async fn a_server_that_gives_the_connection_up_is_asked_again() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("socket");
        let listener = UnixListener::bind(&path).unwrap();
        let server = std::thread::spawn(move || {
            let mut first = accept(&listener);
            first.write_all(started(PID, 5).as_bytes()).unwrap();
            drop(first);
            let mut second = accept(&listener);
            let (mut asking, question) = asked(&listener);
            assert_eq!(question, "{\"question\":\"statistics\"}\n");
            let summary = Summary {
                served: vec![(PID, PageServiceStatistics::default())],
                ..Summary::default()
            };
            serde_json::to_writer(&mut asking, &summary).unwrap();
            asking.write_all(b"\n").unwrap();
            let brought = format!("{{\"event\":\"prefetched\",\"pid\":{PID},\"pages\":5}}\n");
            second.write_all(brought.as_bytes()).unwrap();
        });
        let mut service = PageService::connect(&path, PID).unwrap();
        service.brought().await.unwrap();
        server.join().unwrap();
        assert_eq!(service.ended().await, "the memory server has ended");
    }
}
