//! The kernel of the lab: Debian's generic one, and an initramfs with the modules that lead to the host's
//! files.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, bail};

use super::must;

/// The package whose dependency is the newest generic kernel.
const META_PACKAGE: &str = "linux-image-amd64";
/// What the way to the host's files needs, in order.
const MODULES: [&str; 5] = [
    "virtio_pci",
    "virtio_console",
    "9pnet_virtio",
    "9p",
    "overlay",
];
const INIT: &str = include_str!("../../lab/init");

/// A kernel that is ready to boot.
pub(crate) struct LabKernel {
    pub(crate) vmlinuz: PathBuf,
    pub(crate) initramfs: PathBuf,
    /// Its modules.
    pub(crate) modules: PathBuf,
}

impl LabKernel {
    /// The kernel below `directory`, fetched and unpacked where it is not there yet; or why there is none.
    pub(crate) fn ready(directory: &Path) -> anyhow::Result<Result<Self, String>> {
        let root = directory.join("kernel");
        if !root.is_dir() {
            let partial = directory.join("kernel.partial");
            let _ = fs::remove_dir_all(&partial);
            fs::create_dir_all(&partial)?;
            if let Err(error) = fetch(&partial) {
                return Ok(Err(format!("no kernel for the lab can be had: {error:#}")));
            }
            fs::rename(&partial, &root)?;
        }
        let releases = root.join("lib/modules");
        let release = fs::read_dir(&releases)?
            .next()
            .with_context(|| format!("{} is empty", releases.display()))??
            .file_name();
        let release = release.to_string_lossy();
        let modules = releases.join(&*release);
        let initramfs = directory.join("initramfs");
        pack(&modules, &directory.join("initramfs.parts"), &initramfs)?;
        Ok(Ok(Self {
            vmlinuz: root.join(format!("boot/vmlinuz-{release}")),
            initramfs,
            modules,
        }))
    }
}

/// Fetches the package with the user's own apt and unpacks it.
fn fetch(directory: &Path) -> anyhow::Result<()> {
    let depends = Command::new("apt-cache")
        .args(["depends", META_PACKAGE])
        .output()
        .context("cannot run apt-cache")?;
    let text = String::from_utf8_lossy(&depends.stdout).into_owned();
    let package = text
        .lines()
        .find_map(|line| line.trim().strip_prefix("Depends: "))
        .context("apt knows no kernel: run 'apt-get update'")?;
    let mut download = Command::new("apt-get");
    download.args(["download", package]).current_dir(directory);
    must(download.stdout(Stdio::null()))?;
    let archive = fs::read_dir(directory)?
        .next()
        .context("nothing was downloaded")??
        .path();
    must(
        Command::new("dpkg-deb")
            .arg("-x")
            .arg(&archive)
            .arg(directory),
    )?;
    fs::remove_file(archive)?;
    let release = fs::read_dir(directory.join("lib/modules"))?
        .next()
        .context("the package has no modules")??
        .file_name();
    must(
        Command::new("busybox")
            .args(["depmod", "-b"])
            .arg(directory)
            .arg(release),
    )
}

/// Packs an initramfs: busybox, the first script, the modules in the order of loading.
fn pack(modules: &Path, parts: &Path, initramfs: &Path) -> anyhow::Result<()> {
    let _ = fs::remove_dir_all(parts);
    for directory in ["bin", "modules", "proc", "sys", "dev"] {
        fs::create_dir_all(parts.join(directory))?;
    }
    let busybox = super::find("busybox").context("busybox is not installed")?;
    fs::copy(busybox, parts.join("bin/busybox"))?;
    fs::write(parts.join("init"), INIT)?;
    fs::set_permissions(parts.join("init"), fs::Permissions::from_mode(0o755))?;
    let dependencies = Dependencies::read(&modules.join("modules.dep"))?;
    let mut list = Vec::new();
    for module in MODULES {
        for path in dependencies.in_order(module)? {
            let name = path.rsplit('/').next().unwrap_or(path).to_owned();
            if !list.contains(&name) {
                fs::copy(modules.join(path), parts.join("modules").join(&name))?;
                list.push(name);
            }
        }
    }
    fs::write(parts.join("modules/list"), list.join("\n") + "\n")?;
    let script = "find . | cpio --quiet -o -H newc -R 0:0 >\"$1\"";
    must(
        Command::new("sh")
            .args(["-c", script, "sh"])
            .arg(std::path::absolute(initramfs)?)
            .current_dir(parts),
    )
}

/// What each module depends on, from modules.dep(5): `PATH: DEPENDENCY...`, the last one to be loaded
/// first.
struct Dependencies(BTreeMap<String, Vec<String>>);

impl Dependencies {
    fn read(path: &Path) -> anyhow::Result<Self> {
        let text =
            fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
        Ok(Self::parse(&text))
    }

    fn parse(text: &str) -> Self {
        let line = |line: &str| {
            let (module, dependencies) = line.split_once(':')?;
            let paths = dependencies.split_whitespace().map(str::to_owned).collect();
            Some((module.to_owned(), paths))
        };
        Self(text.lines().filter_map(line).collect())
    }

    /// A module's dependencies and itself.
    fn in_order(&self, name: &str) -> anyhow::Result<Vec<&str>> {
        let wanted = format!("/{}.ko", name.replace('_', "-"));
        let is_wanted = |path: &str| path.replace('_', "-").ends_with(&wanted);
        let Some((path, dependencies)) = self.0.iter().find(|(path, _)| is_wanted(path)) else {
            bail!("the kernel has no module {name}");
        };
        let mut order: Vec<&str> = dependencies.iter().rev().map(String::as_str).collect();
        order.push(path);
        Ok(order)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dependencies_come_before_what_needs_them() {
        let dependencies = Dependencies::parse(
            "kernel/fs/9p/9p.ko: kernel/net/9p/9pnet.ko kernel/fs/netfs/netfs.ko\n\
             kernel/net/9p/9pnet.ko:\n\
             kernel/drivers/char/virtio-rng.ko: kernel/drivers/virtio/virtio.ko\n",
        );
        assert_eq!(
            dependencies.in_order("9p").unwrap(),
            [
                "kernel/fs/netfs/netfs.ko",
                "kernel/net/9p/9pnet.ko",
                "kernel/fs/9p/9p.ko"
            ]
        );
        assert_eq!(dependencies.in_order("virtio_rng").unwrap().len(), 2);
        assert!(dependencies.in_order("p").is_err());
    }
}
