//! The end: processes, file systems, power.

use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use fcvm_wire::Failure;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::WaitOptions;
use rustix::system::{RebootCommand, reboot};

use crate::container::Container;
use crate::link::Link;
use crate::{console, disks, sys};

/// Time for killed processes to go; one in an uninterruptible wait may never.
const PROCESSES_LIMIT: Duration = Duration::from_secs(5);
/// Time for the host to take the last answer.
const ANSWER_LIMIT: Duration = Duration::from_secs(1);

fn wait_for(fd: &PollFd<'_>, deadline: Instant) -> bool {
    let left = deadline.saturating_duration_since(Instant::now());
    let Ok(timeout) = Timespec::try_from(left) else {
        return false;
    };
    matches!(poll(&mut [fd.clone()], Some(&timeout)), Ok(1..))
}

/// Kills every process and waits until they are gone.
///
/// There is no grace here: the host gives it with signals before it asks for the end.
pub(crate) fn end_processes(container: Option<&Container>, children: &OwnedFd) {
    if let Some(container) = container.filter(|container| !container.ended) {
        // The kernel kills all other processes of the container with its first one.
        let _ = sys::kill(container.pid.as_raw_nonzero().get(), libc::SIGKILL);
    }
    // Helpers and exec sessions: all processes but the agent itself.
    let _ = sys::kill(-1, libc::SIGKILL);
    let deadline = Instant::now() + PROCESSES_LIMIT;
    loop {
        let mut record = [0_u8; 128];
        while matches!(rustix::io::read(children, &mut record), Ok(1..)) {}
        loop {
            match rustix::process::wait(WaitOptions::NOHANG) {
                Ok(Some(_)) => {}
                Ok(None) => break,
                // No child is left.
                Err(_) => return,
            }
        }
        if !wait_for(&PollFd::new(children, PollFlags::IN), deadline) {
            console::line("some processes did not end when they were killed");
            return;
        }
    }
}

/// Writes the disks back and unmounts them.
pub(crate) fn release_disks() -> Result<(), Failure> {
    let released = disks::release();
    if let Err(failure) = &released {
        console::line(&failure.message);
    }
    released
}

/// Sends what is queued, as long as the host takes it.
pub(crate) fn drain(link: &mut Link) {
    let deadline = Instant::now() + ANSWER_LIMIT;
    while link.flush().is_ok() && link.is_waiting() {
        let waited = wait_for(
            &PollFd::from_borrowed_fd(link.as_fd(), PollFlags::OUT),
            deadline,
        );
        if !waited {
            return;
        }
        link.woken();
    }
}

/// Powers off. Where the machine cannot, it restarts, which ends a hypervisor started with
/// `-no-reboot` as well.
pub(crate) fn off() -> ! {
    let _ = reboot(RebootCommand::Restart);
    let _ = reboot(RebootCommand::PowerOff);
    let _ = reboot(RebootCommand::Halt);
    sys::exit_now(0)
}
