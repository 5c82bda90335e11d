//! Installing a host kernel below a root directory: its files and its boot entries.
//!
//! [`plan`] lists every change and makes none; [`Plan::apply`] makes them, each file whole or not at all,
//! entries after what they name. Nothing outside the root is touched: a symbolic link that leads out of it is
//! refused. No boot loader's program is run. Where the kernel comes from is the caller's business
//! ([`HostKernel`]).

mod command_line;
mod entries;
mod image;
mod kexec;
mod rescue;
#[cfg(test)]
mod tests;

use std::fs;
use std::path::{Component, Path, PathBuf};

use serde::Serialize;

pub use command_line::{CommandLineError, check_root, for_rescue, running};
pub use entries::{Entry, list};
pub use image::{HostKernel, KernelFacts};
pub use kexec::{Kexec, kexec};
pub use rescue::{Rescue, rescue};

use crate::{KernelError, Result, files};

/// What starts the kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Loader {
    /// GRUB 2, through `custom.cfg`, which its stock configuration reads at boot.
    Grub,
    /// systemd-boot, through the entries of the Boot Loader Specification.
    SystemdBoot,
    /// The firmware itself; the command line is built into the kernel.
    EfiStub,
}

/// How a kernel is installed.
#[derive(Debug, Clone)]
pub struct Options {
    /// The system's root directory.
    pub root: PathBuf,
    /// The EFI system partition, relative to the root; unused by GRUB.
    pub esp: PathBuf,
    /// What starts it.
    pub loader: Loader,
    /// The kernel's command line; unused by the EFI stub.
    pub command_line: String,
    /// An initramfs for the rescue entry; the kernel's own otherwise.
    pub rescue_initrd: Option<PathBuf>,
}

/// Where a file's bytes come from.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Content {
    CopyOf(PathBuf),
    Bytes(Vec<u8>),
}

/// What is done to a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Action {
    /// It is not there yet.
    Create,
    /// It is there with other content.
    Replace,
    /// It is there as it shall be.
    Keep,
}

/// A change of a file below the root.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Change {
    /// Relative to the root.
    pub path: PathBuf,
    /// What is done.
    pub action: Action,
    /// What for.
    pub reason: String,
    #[serde(skip)]
    content: Content,
}

/// All changes in their order.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Plan {
    /// The kernel's version.
    pub version: String,
    /// The changes.
    pub changes: Vec<Change>,
    /// What remains for the administrator.
    pub remarks: Vec<String>,
    #[serde(skip)]
    root: PathBuf,
}

/// Configuration files are small.
const TEXT_BYTES_MAX: usize = 1 << 20;

/// Lists what installing a kernel changes.
pub fn plan(kernel: &HostKernel, options: &Options) -> Result<Plan> {
    let root = fs::canonicalize(&options.root)
        .map_err(KernelError::file("use the root directory", &options.root))?;
    let facts = kernel.facts()?;
    let mut plan = Plan {
        version: facts.version.clone(),
        changes: Vec::new(),
        remarks: Vec::new(),
        root,
    };
    match options.loader {
        Loader::EfiStub => plan_stub(&mut plan, kernel, &facts, options)?,
        Loader::Grub | Loader::SystemdBoot => {
            check_root(&options.command_line, kernel.initrd.is_some())
                .map_err(|error| refuse(kernel, error.to_string()))?;
            plan_loader(&mut plan, kernel, &facts, options)?;
        }
    }
    Ok(plan)
}

fn refuse(kernel: &HostKernel, reason: String) -> KernelError {
    KernelError::Install {
        path: kernel.vmlinuz.clone(),
        reason,
    }
}

fn plan_stub(
    plan: &mut Plan,
    kernel: &HostKernel,
    facts: &KernelFacts,
    options: &Options,
) -> Result<()> {
    if !facts.efi_stub {
        return Err(refuse(
            kernel,
            "it has no EFI stub: build it with CONFIG_EFI_STUB=y".to_owned(),
        ));
    }
    let config = kernel.config_text()?;
    let built_in = config
        .lines()
        .find_map(|line| line.strip_prefix("CONFIG_CMDLINE=\""))
        .and_then(|rest| rest.strip_suffix('"'))
        .filter(|text| !text.is_empty());
    let Some(built_in) = built_in else {
        return Err(refuse(
            kernel,
            "its configuration has no CONFIG_CMDLINE: without a boot loader the command line must be built in".to_owned(),
        ));
    };
    let has_initramfs = config
        .lines()
        .any(|line| line.starts_with("CONFIG_INITRAMFS_SOURCE=\"") && line.len() > 26);
    check_root(built_in, has_initramfs).map_err(|error| refuse(kernel, error.to_string()))?;
    let name = format!("{}.efi", facts.version);
    let path = options.esp.join("EFI/fcvm").join(&name);
    plan.copy(path, &kernel.vmlinuz, "the kernel, started by the firmware")?;
    plan.remarks.push(format!(
        "tell the firmware: efibootmgr --create --disk DISK --part N --label 'fcvm {}' --loader '\\EFI\\fcvm\\{name}'",
        facts.version
    ));
    Ok(())
}

fn plan_loader(
    plan: &mut Plan,
    kernel: &HostKernel,
    facts: &KernelFacts,
    options: &Options,
) -> Result<()> {
    let version = &facts.version;
    let grub = options.loader == Loader::Grub;
    let (directory, suffix) = if grub {
        (PathBuf::from("boot"), format!("-{version}"))
    } else {
        (options.esp.join("fcvm").join(version), String::new())
    };
    let name = |stem: &str| format!("{stem}{suffix}");
    plan.copy(
        directory.join(name("vmlinuz")),
        &kernel.vmlinuz,
        "the kernel",
    )?;
    if let Some(config) = &kernel.config {
        plan.copy(directory.join(name("config")), config, "its configuration")?;
    }
    if let Some(initrd) = &kernel.initrd {
        plan.copy(directory.join(name("initrd.img")), initrd, "its initramfs")?;
    }
    if let Some(rescue) = &options.rescue_initrd {
        plan.copy(
            directory.join(name("rescue.img")),
            rescue,
            "the initramfs of the rescue entry",
        )?;
    }
    let entries = both_entries(kernel, version, options, &name);
    if grub {
        let path = PathBuf::from("boot/grub/custom.cfg");
        let old = plan.read_text(&path)?;
        let new = entries::grub(&old, version, &entries);
        plan.write(
            path,
            new.into_bytes(),
            "its entries, between marks; the rest of the file stays",
        )?;
        plan.remarks.push(
            "the default entry stays as it is: choose this one in GRUB's menu, or with grub-reboot"
                .to_owned(),
        );
    } else {
        for entry in &entries {
            let path = options
                .esp
                .join("loader/entries")
                .join(format!("{}.conf", entry.id));
            let text = entries::boot_loader_specification(entry, version);
            plan.write(path, text.into_bytes(), &entry.title)?;
        }
        plan.remarks.push("the default entry stays as it is: choose this one in the menu, or with bootctl set-oneshot".to_owned());
    }
    Ok(())
}

/// The normal entry and the one for rescue; `name` gives the name of a file beside the kernel.
fn both_entries(
    kernel: &HostKernel,
    version: &str,
    options: &Options,
    name: &dyn Fn(&str) -> String,
) -> [entries::Text; 2] {
    let initrd = kernel.initrd.as_ref().map(|_| name("initrd.img"));
    let rescue_initrd = options
        .rescue_initrd
        .as_ref()
        .map(|_| name("rescue.img"))
        .or_else(|| initrd.clone());
    [
        entries::Text {
            id: format!("fcvm-{version}"),
            title: format!("Linux {version} (fcvm)"),
            initrd,
            command_line: options.command_line.clone(),
        },
        entries::Text {
            id: format!("fcvm-{version}-rescue"),
            title: format!("Linux {version} (fcvm, rescue: read-only, no tuning)"),
            initrd: rescue_initrd,
            command_line: for_rescue(&options.command_line),
        },
    ]
}

impl Plan {
    fn copy(&mut self, path: PathBuf, source: &Path, reason: &str) -> Result<()> {
        let target = beneath(&self.root, &path)?;
        let action = match (fs::metadata(&target), fs::metadata(source)) {
            (Err(_), _) => Action::Create,
            (Ok(old), Ok(new)) if old.len() == new.len() && same(&target, source) => Action::Keep,
            _ => Action::Replace,
        };
        self.push(path, action, reason, Content::CopyOf(source.to_owned()));
        Ok(())
    }

    fn write(&mut self, path: PathBuf, bytes: Vec<u8>, reason: &str) -> Result<()> {
        let action = match fs::read(beneath(&self.root, &path)?) {
            Err(_) => Action::Create,
            Ok(old) if old == bytes => Action::Keep,
            Ok(_) => Action::Replace,
        };
        self.push(path, action, reason, Content::Bytes(bytes));
        Ok(())
    }

    fn push(&mut self, path: PathBuf, action: Action, reason: &str, content: Content) {
        self.changes.push(Change {
            path,
            action,
            reason: reason.to_owned(),
            content,
        });
    }

    fn read_text(&self, path: &Path) -> Result<String> {
        let path = beneath(&self.root, path)?;
        if !path.exists() {
            return Ok(String::new());
        }
        let bytes = files::read_bounded(&path, TEXT_BYTES_MAX)?;
        String::from_utf8(bytes).map_err(|_| KernelError::Install {
            path,
            reason: "it is no text".to_owned(),
        })
    }

    /// Makes the changes. Entries come after the files that they name: when it stops halfway, no entry leads
    /// nowhere.
    pub fn apply(&self) -> Result<()> {
        for change in &self.changes {
            if change.action == Action::Keep {
                continue;
            }
            // Looked up again: a link may have been put there since.
            let path = beneath(&self.root, &change.path)?;
            files::create_dir(path.parent().unwrap_or(&self.root))?;
            match &change.content {
                Content::Bytes(bytes) => files::write_atomically(&path, bytes)?,
                Content::CopyOf(source) => files::copy_atomically(source, &path)?,
            }
            files::make_readable(&path)?;
        }
        Ok(())
    }
}

fn same(one: &Path, other: &Path) -> bool {
    matches!((fs::read(one), fs::read(other)), (Ok(one), Ok(other)) if one == other)
}

/// The path below a root directory; refused where it, or a symbolic link on its way, leads out.
pub(crate) fn beneath(root: &Path, relative: &Path) -> Result<PathBuf> {
    let path = root.join(relative);
    let refuse = || KernelError::Install {
        path: path.clone(),
        reason: format!(
            "it is not below {}: nothing outside the root directory is changed",
            root.display()
        ),
    };
    if !relative
        .components()
        .all(|part| matches!(part, Component::Normal(_)))
    {
        return Err(refuse());
    }
    let root = fs::canonicalize(root).map_err(KernelError::file("use the root directory", root))?;
    let mut walked = root.clone();
    for part in relative.components() {
        walked.push(part);
        // What is not there is made by us; a link that leads nowhere is not followed.
        match fs::canonicalize(&walked) {
            Ok(real) if real.starts_with(&root) => {}
            Err(_) if fs::symlink_metadata(&walked).is_err() => {}
            _ => return Err(refuse()),
        }
    }
    Ok(root.join(relative))
}
