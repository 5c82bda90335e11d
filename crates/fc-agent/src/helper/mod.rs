//! Requests that read or write files, or that wait: each is served by a process of its own, so that
//! nothing a container does to its files can stop the agent.

use fcvm_wire::{Failure, FailureKind, Request};

use crate::container::Container;
use crate::spawn::Spawned;

/// Starts the helper for a request.
pub(crate) fn start(request: Request, container: Option<&Container>) -> Result<Spawned, Failure> {
    let _ = container;
    Err(Failure {
        kind: FailureKind::Unsupported,
        message: format!("the agent does not serve this request yet: {request:?}"),
    })
}
