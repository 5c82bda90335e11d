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
/// Translated code of a VM that boots: a boot fills a sixth of it, and a full one is thrown away
/// and filled again.
pub const TRANSLATION_CACHE_BOOT: ByteSize = ByteSize::from_mib(256);
/// Translated code of a clone, which is private memory of each.
pub const TRANSLATION_CACHE_CLONE: ByteSize = ByteSize::from_mib(32);

/// Everything a VM is started from. Descriptors go over to the hypervisor.
#[derive(Debug)]
pub struct LaunchSpec {
    /// The virtual machine.
    pub hardware: HardwareSpec,
    /// What it boots.
    pub boot: BootSpec,
}

/// A virtual machine, and what stands behind it on the host.
#[derive(Debug)]
pub struct HardwareSpec {
    /// Virtual processors, 1 to [`CPU_COUNT_MAX`].
    pub cpu_count: u32,
    /// Guest memory.
    pub memory: GuestMemory,
    /// Block devices.
    pub disks: Vec<DiskSpec>,
    /// Network interface; none where absent.
    pub network: Option<NetworkSpec>,
    /// What runs the guest's instructions.
    pub accelerator: Accelerator,
    /// Most memory for translated code where instructions are emulated; see
    /// [`TRANSLATION_CACHE_BOOT`] and [`TRANSLATION_CACHE_CLONE`].
    pub translation_cache: ByteSize,
    /// Where the guest's serial console is written: a pipe or a file, open for writing. The guest
    /// writes without bound, so the reader limits what it keeps; a reader that does not read stops
    /// the guest's console and nothing else.
    pub console: OwnedFd,
}

/// What a VM boots.
#[derive(Debug)]
pub struct BootSpec {
    /// Uncompressed kernel (`vmlinux`), absolute or relative to the working directory.
    pub kernel: PathBuf,
    /// Initial RAM disk.
    pub initramfs: Option<PathBuf>,
    /// Added to the end of the kernel's command line, where they win over the driver's own.
    pub extra_kernel_args: Vec<String>,
}

/// Guest memory: an anonymous file that the owner keeps, mapped by the hypervisor.
///
/// The owner's descriptor lets it hand the memory to a later process or seal it, memfd_create(2).
#[derive(Debug)]
pub struct GuestMemory {
    file: OwnedFd,
    size: ByteSize,
    mapping: MemoryMapping,
}

/// Whether the guest's writes reach the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MemoryMapping {
    /// They do: the file is this VM's memory, and nobody else's.
    Shared,
    /// They stay private to the VM: the file is read by all the clones that map it.
    CopyOnWrite,
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
        Ok(Self {
            file,
            size,
            mapping: MemoryMapping::Shared,
        })
    }

    /// The memory of a clone: starts as `file` is when a page is first touched.
    ///
    /// # Errors
    ///
    /// The file's size cannot be read.
    pub fn copy_on_write(file: OwnedFd) -> io::Result<Self> {
        let size = u64::try_from(rustix::fs::fstat(&file)?.st_size).unwrap_or(0);
        Ok(Self {
            file,
            size: ByteSize::from_bytes(size),
            mapping: MemoryMapping::CopyOnWrite,
        })
    }

    /// Size in bytes.
    pub fn size(&self) -> ByteSize {
        self.size
    }

    /// Who sees what the guest writes.
    pub fn mapping(&self) -> MemoryMapping {
        self.mapping
    }

    /// A second descriptor of the same memory, for the owner to keep.
    ///
    /// # Errors
    ///
    /// No descriptor is left.
    pub fn try_clone(&self) -> io::Result<Self> {
        Ok(Self {
            file: self.file.try_clone()?,
            ..*self
        })
    }

    /// Bytes of it that are allocated.
    ///
    /// # Errors
    ///
    /// The file's metadata cannot be read.
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

/// A block device.
#[derive(Debug)]
pub struct DiskSpec {
    /// What it is made of, the lowest first: each holds what was written since the one below was
    /// frozen. Only the last one is written to.
    pub layers: Vec<DiskLayer>,
    /// Serial number by which the guest finds it: at most 20 letters, digits, '-', '_' and '.'.
    pub serial: String,
    /// The guest can not write to it. Many VMs may share the file.
    pub read_only: bool,
}

impl DiskSpec {
    /// A disk that is one file of raw bytes, open for reading, and for writing too unless
    /// `read_only`. The file may have no name any more.
    pub fn raw(file: File, serial: &str, read_only: bool) -> Self {
        Self {
            layers: vec![DiskLayer {
                file,
                format: DiskFormat::Raw,
            }],
            serial: serial.to_owned(),
            read_only,
        }
    }
}

/// A file of a block device.
#[derive(Debug)]
pub struct DiskLayer {
    /// The file.
    pub file: File,
    /// What its bytes mean.
    pub format: DiskFormat,
}

/// What the bytes of a disk's file mean. The hypervisor does not guess it: a guest could write what
/// looks like another format.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DiskFormat {
    /// The disk's bytes.
    Raw,
    /// QEMU's copy-on-write format, over the layer below.
    Qcow2,
}

/// A network interface.
#[derive(Debug)]
pub struct NetworkSpec {
    /// What it is connected to.
    pub backend: NetworkBackend,
    /// Address of the guest's side.
    pub mac: [u8; 6],
    /// A guest that goes on from saved state tells the network its address unasked, for a network that
    /// has not heard of it. It costs the guest work in its first instants.
    pub announce: bool,
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
    /// A tap device.
    Tap {
        /// Name of the device.
        name: String,
        /// The namespaces in which it is, entered by the hypervisor's process in this order; those of
        /// the owner where there are none.
        namespaces: Vec<OwnedFd>,
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
