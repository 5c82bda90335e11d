//! What a VM consists of, in no hypervisor's words.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;

use fcvm_types::{ByteSize, PortMapping};
use rustix::fs::{MemfdFlags, SealFlags};
use serde::{Deserialize, Serialize};

/// Least memory of a VM: what a kernel and the agent need to come up.
pub const MEMORY_MIN: ByteSize = ByteSize::from_mib(64);
/// Most virtual processors of a VM.
pub const CPU_COUNT_MAX: u32 = 64;
/// Most disks of a VM.
pub const DISK_COUNT_MAX: usize = 8;

/// Everything a VM is started from. Descriptors go over to the hypervisor.
#[derive(Debug)]
pub struct LaunchSpec {
    /// Virtual processors, 1 to [`CPU_COUNT_MAX`].
    pub cpu_count: u32,
    /// Guest memory.
    pub memory: GuestMemory,
    /// Uncompressed kernel (`vmlinux`), absolute or relative to the working directory.
    pub kernel: PathBuf,
    /// Initial RAM disk.
    pub initramfs: Option<PathBuf>,
    /// Added to the end of the kernel's command line, where they win over the driver's own.
    pub extra_kernel_args: Vec<String>,
    /// Block devices.
    pub disks: Vec<DiskSpec>,
    /// Network interface; none where absent.
    pub network: Option<NetworkSpec>,
    /// What runs the guest's instructions.
    pub accelerator: Accelerator,
    /// Where the guest's serial console is written: a pipe or a file, open for writing. The guest
    /// writes without bound, so the reader limits what it keeps; a reader that does not read stops
    /// the guest's console and nothing else.
    pub console: OwnedFd,
}

/// Guest memory: an anonymous file that the owner keeps, shared with the hypervisor.
///
/// The owner's descriptor lets it hand the memory to a later process or seal it, memfd_create(2).
#[derive(Debug)]
pub struct GuestMemory {
    file: OwnedFd,
    size: ByteSize,
}

impl GuestMemory {
    /// Memory of `size`, all zero; pages are allocated when they are touched.
    ///
    /// # Errors
    ///
    /// The kernel refused the file.
    pub fn new(size: ByteSize) -> io::Result<Self> {
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let file = rustix::fs::memfd_create("fcvm-guest-memory", flags)?;
        rustix::fs::ftruncate(&file, size.bytes())?;
        // Nobody who has it can take pages away from under another.
        rustix::fs::fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW)?;
        Ok(Self { file, size })
    }

    /// Size of the memory.
    pub fn size(&self) -> ByteSize {
        self.size
    }

    /// A second handle on the same memory.
    ///
    /// # Errors
    ///
    /// The process has too many descriptors open.
    pub fn try_clone(&self) -> io::Result<Self> {
        Ok(Self {
            file: self.file.try_clone()?,
            size: self.size,
        })
    }

    /// Bytes of the host's memory that the guest's memory takes now.
    ///
    /// # Errors
    ///
    /// The file can not be looked at.
    pub fn resident_bytes(&self) -> io::Result<u64> {
        let blocks = rustix::fs::fstat(&self.file)?.st_blocks;
        Ok(u64::try_from(blocks).unwrap_or(0) * 512)
    }
}

impl From<GuestMemory> for OwnedFd {
    fn from(memory: GuestMemory) -> Self {
        memory.file
    }
}

impl AsFd for GuestMemory {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// A block device, raw bytes in a file.
#[derive(Debug)]
pub struct DiskSpec {
    /// Open for reading, and for writing too unless `read_only`. It may have no name any more.
    pub file: File,
    /// Serial number by which the guest finds it: at most 20 letters, digits, '-', '_' and '.'.
    pub serial: String,
    /// The guest can not write to it. Many VMs may share the file.
    pub read_only: bool,
}

/// A network interface.
#[derive(Debug)]
pub struct NetworkSpec {
    /// What it is connected to.
    pub backend: NetworkBackend,
    /// Address of the guest's side.
    pub mac: [u8; 6],
}

/// What a network interface is connected to.
#[derive(Debug)]
pub enum NetworkBackend {
    /// A connected stream socket that carries Ethernet frames, each behind its length in four
    /// bytes, most significant first: what passt speaks.
    Stream(OwnedFd),
    /// The hypervisor's own user-mode network, 10.0.2.0/24 with its gateway at 10.0.2.2 and its
    /// name server at 10.0.2.3.
    User {
        /// Ports of the host that lead into the guest. Only IPv4 addresses can be listened on.
        forwards: Vec<PortMapping>,
        /// fec0::/64 with its gateway at fec0::2 as well.
        ipv6: bool,
    },
}

/// What runs the guest's instructions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "kind")]
pub enum Accelerator {
    /// The processor itself, through /dev/kvm.
    Kvm,
    /// Translation to the host's instructions.
    Tcg {
        /// Frequency of the host's time stamp counter, which the guest's is: spares the guest a
        /// calibration that can spin forever on a loaded host. The guest calibrates where absent.
        tsc_khz: Option<u32>,
    },
}

impl Accelerator {
    /// `kvm` or `tcg`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Kvm => "kvm",
            Self::Tcg { .. } => "tcg",
        }
    }
}
