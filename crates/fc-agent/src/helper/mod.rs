//! Requests that read or write files, or that wait: each is served by a process of its own, so that
//! nothing a container does to its files can stop the agent.

mod archive;
mod numbers;
mod probe;
mod processes;
mod unpack;

use fcvm_wire::{Failure, FailureKind, Outcome, Request};

use crate::container::Container;
use crate::failure::bad_request;
use crate::spawn::{self, HelperIo, Spawned};

/// Starts the helper for a request.
pub(crate) fn start(request: Request, container: Option<&Container>) -> Result<Spawned, Failure> {
    let running = container.ok_or_else(|| bad_request("the container has not been started"));
    match request {
        Request::ArchiveRead { path, follow } => {
            let container = running?;
            spawn::helper(false, true, Some(&container.pidfd), |io| {
                in_container(container, io, |io| archive::read(&path, follow, io.stdout))
            })
        }
        Request::ArchiveWrite {
            directory,
            keep_owners,
        } => {
            let container = running?;
            spawn::helper(true, false, Some(&container.pidfd), |io| {
                in_container(container, io, |io| {
                    unpack::write(&directory, keep_owners, io.stdin)
                })
            })
        }
        Request::Stat { path } => {
            let container = running?;
            spawn::helper(false, false, Some(&container.pidfd), |io| {
                in_container(container, io, |_| archive::stat(&path))
            })
        }
        Request::Processes => {
            let container = running?;
            container.check_running()?;
            spawn::helper(false, false, Some(&container.pidfd), |io| {
                in_container(container, io, |_| processes::list())
            })
        }
        Request::Stats => spawn::helper(false, false, None, |_| answer(numbers::read())),
        Request::HttpProbe { url, timeout_ms } => {
            spawn::helper(false, false, None, |_| answer(probe::get(&url, timeout_ms)))
        }
        // The server itself serves all others.
        _ => Err(Failure {
            kind: FailureKind::Unsupported,
            message: "the agent does not know this request".into(),
        }),
    }
}

fn answer(result: Result<Outcome, Failure>) -> Outcome {
    result.unwrap_or_else(Outcome::Failed)
}

/// Does the work with the container's root as "/", so that all its links resolve inside.
fn in_container(
    container: &Container,
    io: HelperIo,
    work: impl FnOnce(HelperIo) -> Result<Outcome, Failure>,
) -> Outcome {
    answer(container.enter_files().and_then(|()| work(io)))
}
