//! What a command asks of an owner: the payload of the frame that opens a stream on the control
//! socket. Answers have the form of the agent's (`fcvm_wire::Outcome`).

use fcvm_wire::Request;
use serde::{Deserialize, Serialize};

/// A request to an owner.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(tag = "owner", rename_all = "snake_case")]
pub(crate) enum OwnerRequest {
    /// Pass a request on to the agent, and its stream's frames with it.
    Guest {
        /// The request.
        request: Request,
    },
    /// End the VM: stop signal, grace, SIGKILL.
    Stop {
        /// Seconds of grace; the VM's own where absent.
        timeout_s: Option<u32>,
    },
    /// Send a signal to the container.
    Kill {
        /// Signal number.
        signal: i32,
    },
    /// Stop the virtual processors.
    Pause,
    /// Let them go on.
    Unpause,
    /// Tell what the hypervisor has counted.
    Counters,
}
