//! What setup tells its caller while it works. How it is shown is the caller's business.

use std::fmt;

/// A step of setup, in the order they happen. Steps that are not needed are left out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SetupStage {
    /// Another setup holds the lock.
    Waiting,
    /// The stored kernel's checksums are compared.
    Verify,
    /// Package lists are fetched.
    Lists,
    /// The package is fetched.
    Download,
    /// The package is unpacked and the kernel extracted.
    Unpack,
    /// OpenZFS is fitted to a kernel's configuration.
    Configure,
    /// A kernel is built from source: objects.
    Build,
    /// The kernel that was built is stored.
    Store,
}

impl fmt::Display for SetupStage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Waiting => "waiting for another setup",
            Self::Verify => "checking the stored kernel",
            Self::Lists => "fetching package lists",
            Self::Download => "fetching the kernel package",
            Self::Unpack => "unpacking the kernel",
            Self::Configure => "fitting OpenZFS to the kernel",
            Self::Build => "building",
            Self::Store => "storing the kernel",
        })
    }
}

/// A sign of progress: the first event of a stage has `done` 0.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SetupEvent {
    /// The step.
    pub stage: SetupStage,
    /// Work done, in the unit of `total`.
    pub done: u64,
    /// Bytes in the whole for [`SetupStage::Download`], objects for [`SetupStage::Build`], 100 (percent) for [`SetupStage::Lists`],
    /// absent where the amount is not known.
    pub total: Option<u64>,
    /// What is worked on, for example the package's name; empty where there is nothing to say.
    pub detail: String,
}

impl SetupEvent {
    pub(crate) fn start(stage: SetupStage, detail: impl Into<String>) -> Self {
        Self {
            stage,
            done: 0,
            total: None,
            detail: detail.into(),
        }
    }
}

/// Where events go.
pub(crate) type Progress<'a> = &'a mut dyn FnMut(SetupEvent);
