//! The initramfs: the agent as `/init`, and the modules it loads first.
//!
//! An uncompressed cpio archive in the "new ASCII" format (cpio(5); Documentation/driver-api/
//! early-userspace/buffer-format.rst), reproducible byte for byte: times and owners are 0, inode
//! numbers count up, and the members are, in this order,
//!
//! ```text
//! dev/ dev/console (character device 5:1) proc/ sys/
//! modules/ modules/list modules/NAME.ko ...    one file name per line, in the order of loading
//! init                                          the agent, mode 0755
//! ```
//!
//! Uncompressed, because the guest's processor may be an emulated one.

use std::io::{self, Write};
use std::path::{Path, PathBuf};

use cpio::newc::{Builder, ModeFileType, trailer};

use crate::manifest::{GuestKernel, GuestModule};
use crate::{KernelError, Result, agent, files};

/// Part of the name of every archive, so that an archive of another layout is never taken.
const LAYOUT_VERSION: u32 = 1;
/// Archives that are kept; the longest unused go first.
const KEPT_COUNT: usize = 4;
/// Largest agent: a guest of the smallest memory must hold it twice.
const AGENT_MAX_BYTES: usize = 32 << 20;
/// Largest module, as in the modules' own limit.
const MODULE_MAX_BYTES: usize = 64 << 20;
/// Drivers of the two buses that devices may be on.
const MMIO_MODULE: &str = "virtio_mmio";
const PCI_MODULE: &str = "virtio_pci";
/// What the second of them depends on, and nothing else does.
const PCI_DEPENDENCIES: [&str; 2] = ["virtio_pci_legacy_dev", "virtio_pci_modern_dev"];
/// Driver of the agent's channel under QEMU.
const SERIAL_MODULE: &str = "virtio_console";
/// Driver of the agent's channel under Firecracker.
const VSOCK_MODULE: &str = "vmw_vsock_virtio_transport";

/// The devices of a hypervisor, which need some of a kernel's modules and not others.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Devices {
    /// QEMU's microvm: the agent's channel is a virtio-serial port.
    Qemu,
    /// Firecracker: the agent's channel is a vsock connection, and there is a source of random numbers.
    Firecracker,
    /// The same, on a PCI bus.
    FirecrackerPci,
}

impl Devices {
    /// Whether a module has a device.
    fn needs(self, module: &str) -> bool {
        const ONLY_FIRECRACKERS: [&str; 4] = [
            "vsock",
            "vmw_vsock_virtio_transport_common",
            VSOCK_MODULE,
            "virtio_rng",
        ];
        let is_pcis = module == PCI_MODULE || PCI_DEPENDENCIES.contains(&module);
        match self {
            Self::Qemu => !is_pcis && !ONLY_FIRECRACKERS.contains(&module),
            Self::Firecracker => !is_pcis && module != SERIAL_MODULE,
            Self::FirecrackerPci => module != MMIO_MODULE && module != SERIAL_MODULE,
        }
    }

    /// What a kernel made ready by an earlier version may not have, and what it has in the same place: where
    /// neither is a module both are built in.
    fn additions(self) -> &'static [(&'static str, &'static str)] {
        match self {
            Self::Qemu => &[],
            Self::Firecracker => &[(VSOCK_MODULE, SERIAL_MODULE)],
            Self::FirecrackerPci => &[(VSOCK_MODULE, SERIAL_MODULE), (PCI_MODULE, MMIO_MODULE)],
        }
    }

    /// The modules to load.
    fn modules(self, kernel: &GuestKernel) -> Result<Vec<&GuestModule>> {
        let has = |name: &str| kernel.modules.iter().any(|module| module.name == name);
        for (needed, instead) in self.additions() {
            if has(instead) && !has(needed) {
                return Err(KernelError::ModuleMissing {
                    module: (*needed).to_owned(),
                    needed_by:
                        "a guest of Firecracker ('fcvm setup kernel' adds it to the packaged kernel)"
                            .to_owned(),
                });
            }
        }
        let needed = |module: &&GuestModule| self.needs(&module.name);
        Ok(kernel.modules.iter().filter(needed).collect())
    }
}

/// The initramfs of an agent and a kernel, made where `directory` does not have it yet.
///
/// The archives are named by the checksums of what is in them, so a new agent never meets an old
/// archive. A few are kept.
///
/// # Errors
/// [`KernelError::Agent`] for a file that cannot be process 1, [`KernelError::File`].
pub fn initramfs(
    directory: &Path,
    kernel: &GuestKernel,
    agent: &Path,
    devices: Devices,
) -> Result<PathBuf> {
    let program = read_agent(kernel, agent)?;
    let modules = devices.modules(kernel)?;
    let mut content = format!("{LAYOUT_VERSION} {}\n", files::sha256_hex(&program));
    for module in &modules {
        content.push_str(&format!("{} {}\n", module.name, module.sha256));
    }
    let name = format!("{}.cpio", files::sha256_hex(content.as_bytes()));
    let parent = directory.join("initramfs");
    let size_bytes = archive_size_bytes(&modules, program.len() as u64);
    files::cached(&parent, &name, size_bytes, KEPT_COUNT, || {
        archive(&modules, &program)
    })
}

/// The archive's bytes, for callers that keep it elsewhere.
///
/// # Errors
/// As for [`initramfs`].
pub fn initramfs_bytes(kernel: &GuestKernel, agent: &Path, devices: Devices) -> Result<Vec<u8>> {
    archive(&devices.modules(kernel)?, &read_agent(kernel, agent)?)
}

fn read_agent(kernel: &GuestKernel, path: &Path) -> Result<Vec<u8>> {
    let program = files::read_bounded(path, AGENT_MAX_BYTES)?;
    agent::check(&program, kernel.architecture).map_err(|reason| KernelError::Agent {
        path: path.to_owned(),
        reason,
    })?;
    Ok(program)
}

/// A module whose content is not the recorded one never gets into an archive.
fn archive(stored: &[&GuestModule], program: &[u8]) -> Result<Vec<u8>> {
    let mut modules = Vec::with_capacity(stored.len());
    for module in stored {
        let bytes = files::read_bounded(&module.path, MODULE_MAX_BYTES)?;
        if files::sha256_hex(&bytes) != module.sha256 {
            return Err(KernelError::Damaged {
                path: module.path.clone(),
                reason: "has another content".to_owned(),
            });
        }
        modules.push((module_path(&module.name), bytes));
    }
    let list = list(stored);
    let mut archive = Archive::default();
    let members = || -> io::Result<Vec<u8>> {
        archive.directory("dev")?;
        archive.console("dev/console")?;
        archive.directory("proc")?;
        archive.directory("sys")?;
        archive.directory("modules")?;
        archive.file("modules/list", 0o644, list.as_bytes())?;
        for (path, bytes) in &modules {
            archive.file(path, 0o644, bytes)?;
        }
        archive.file("init", 0o755, program)?;
        trailer(archive.bytes)
    };
    members().map_err(KernelError::file("pack", Path::new("the initramfs")))
}

/// Size of what [`archive`] makes: a cached archive of another size is damaged.
fn archive_size_bytes(stored: &[&GuestModule], program_bytes: u64) -> u64 {
    const HEADER_BYTES: u64 = 110;
    // The name ends with a NUL byte; name and content are padded to four bytes each.
    let member = |name: &str, content_bytes: u64| {
        (HEADER_BYTES + name.len() as u64 + 1).next_multiple_of(4)
            + content_bytes.next_multiple_of(4)
    };
    let empty = ["dev", "dev/console", "proc", "sys", "modules", "TRAILER!!!"];
    let modules = stored
        .iter()
        .map(|module| member(&module_path(&module.name), module.size_bytes));
    empty.iter().map(|name| member(name, 0)).sum::<u64>()
        + modules.sum::<u64>()
        + member("modules/list", list(stored).len() as u64)
        + member("init", program_bytes)
}

fn module_path(name: &str) -> String {
    format!("modules/{name}.ko")
}

fn list(modules: &[&GuestModule]) -> String {
    modules
        .iter()
        .map(|module| format!("{}.ko\n", module.name))
        .collect()
}

/// An archive being written.
#[derive(Default)]
pub(crate) struct Archive {
    pub(crate) bytes: Vec<u8>,
    member_count: u32,
}

impl Archive {
    pub(crate) fn directory(&mut self, name: &str) -> io::Result<()> {
        let builder = Builder::new(name).nlink(2).mode(0o755);
        self.member(builder.set_mode_file_type(ModeFileType::Directory), &[])
    }

    /// The kernel opens it as process 1's standard streams.
    pub(crate) fn console(&mut self, name: &str) -> io::Result<()> {
        let builder = Builder::new(name).mode(0o600).rdev_major(5).rdev_minor(1);
        self.member(builder.set_mode_file_type(ModeFileType::Char), &[])
    }

    pub(crate) fn file(&mut self, name: &str, mode: u32, content: &[u8]) -> io::Result<()> {
        let builder = Builder::new(name).mode(mode);
        self.member(builder.set_mode_file_type(ModeFileType::Regular), content)
    }

    fn member(&mut self, builder: Builder, content: &[u8]) -> io::Result<()> {
        self.member_count += 1;
        let size = u32::try_from(content.len()).map_err(io::Error::other)?;
        let mut writer = builder.ino(self.member_count).write(&mut self.bytes, size);
        writer.write_all(content)?;
        writer.finish().map(|_| ())
    }
}

#[cfg(test)]
#[path = "initramfs_tests.rs"]
mod tests;
