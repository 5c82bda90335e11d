//! Device state, and what it belongs to, as they are kept and handed on.

use fcvm_types::ByteSize;
use serde::{Deserialize, Serialize};

use crate::error::HypervisorError;
use crate::{firecracker, qemu};

/// Most device state that is taken, in bytes. A VM of one processor has 50 to 200 KB.
pub const DEVICE_STATE_BYTES_MAX: u64 = 64 << 20;

/// The state of a VM's processors and devices.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceState(Vec<u8>);

impl DeviceState {
    /// State that was saved before.
    ///
    /// # Errors
    ///
    /// It is empty, or longer than [`DEVICE_STATE_BYTES_MAX`].
    pub fn from_bytes(bytes: Vec<u8>) -> Result<Self, HypervisorError> {
        if bytes.is_empty() {
            return Err(failed("loaded", "it is empty".to_owned()));
        }
        if bytes.len() as u64 > DEVICE_STATE_BYTES_MAX {
            let limit = ByteSize::from_bytes(DEVICE_STATE_BYTES_MAX);
            return Err(failed("saved", format!("it is longer than {limit}")));
        }
        Ok(Self(bytes))
    }

    /// Its bytes, in the hypervisor's own format.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }
}

pub(crate) fn failed(what: &'static str, reason: String) -> HypervisorError {
    HypervisorError::State { what, reason }
}

/// The virtual hardware that a device state belongs to: it can be loaded into the same alone.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum DeviceLine {
    /// QEMU's.
    Qemu(qemu::DeviceLine),
    /// Firecracker's.
    Firecracker(firecracker::DeviceLine),
}

impl DeviceLine {
    /// What of `saved` this hardware is not, as one clause; nothing where they are the same.
    pub fn difference(&self, saved: &Self) -> Option<String> {
        match (self, saved) {
            (Self::Qemu(own), Self::Qemu(saved)) => own.difference(saved),
            (Self::Firecracker(own), Self::Firecracker(saved)) => own.difference(saved),
            _ => Some("it was made by another hypervisor".to_owned()),
        }
    }
}
