//! The directory of guest kernels: what setup puts there, and how it is found again.

use std::fs;
use std::io;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use crate::manifest::{
    Check, GuestKernel, MANIFEST_NAME, MANIFEST_VERSION, Manifest, StoredFile, StoredModule,
};
use crate::modules::ModuleIndex;
use crate::progress::{Progress, SetupEvent, SetupStage};
use crate::vmlinux::{self, Architecture};
use crate::{KernelError, Result, debian, files, package};

/// What a guest needs of its kernel: the microVM's bus (one of two), agent channel (one of two), disks, network,
/// random numbers, and the file systems of the root image, of the overlay on it and of the writable disk, in the order of
/// docs/format/guest.md.
pub const DEFAULT_MODULES: [&str; 10] = [
    "virtio_mmio",
    "virtio_pci",
    "virtio_console",
    "vmw_vsock_virtio_transport",
    "virtio_blk",
    "virtio_net",
    "virtio_rng",
    "erofs",
    "overlay",
    "ext4",
];

/// Name of the link to the kernel in use.
const CURRENT: &str = "current";
/// Directory of apt's state while setup runs.
const APT: &str = "apt";

/// What [`setup`] is to do.
#[derive(Debug, Clone)]
pub struct SetupOptions {
    /// What the guest runs on.
    pub architecture: Architecture,
    /// Modules that the guest needs; what they depend on is found.
    pub modules: Vec<String>,
    /// Fetch the newest kernel even where one is installed.
    pub upgrade: bool,
    /// Take this Debian package in place of fetching one.
    pub package: Option<PathBuf>,
}

impl SetupOptions {
    /// The default set of modules, for `architecture`.
    pub fn new(architecture: Architecture) -> Self {
        Self {
            architecture,
            modules: DEFAULT_MODULES.map(str::to_owned).to_vec(),
            upgrade: false,
            package: None,
        }
    }
}

/// Makes sure that a guest kernel is in `directory` (created where missing) and returns it.
///
/// Nothing is fetched where an intact one is there. Two setups at once are safe: one waits for the
/// other. What a killed one left is removed. A damaged kernel is replaced. After an upgrade the
/// previous kernel stays, earlier ones are removed.
///
/// # Errors
/// Any [`KernelError`]; the kernel that was there before, if any, stays in use.
pub fn setup(
    directory: &Path,
    options: &SetupOptions,
    progress: &mut dyn FnMut(SetupEvent),
) -> Result<GuestKernel> {
    files::create_dir(directory)?;
    let _lock = files::lock(directory, progress)?;
    files::remove_partial(directory)?;
    if !options.upgrade && options.package.is_none() {
        match usable(directory, options, progress) {
            Ok(Some(kernel)) => return Ok(kernel),
            Ok(None) => {}
            Err(error @ KernelError::FutureVersion { .. }) => return Err(error),
            Err(error) => tracing::warn!("{error}; it is replaced"),
        }
    }
    let apt = directory.join(APT);
    let (deb, description) = match &options.package {
        Some(path) => (path.clone(), None),
        None => {
            let fetched = debian::fetch(&apt, options.architecture, options.upgrade, progress)?;
            (fetched.path, Some(fetched.description))
        }
    };
    progress(SetupEvent::start(SetupStage::Unpack, ""));
    let previous = current_name(directory)?;
    let name = store(directory, &deb, description, options)?;
    make_current(directory, &name)?;
    remove_others(directory, &[Some(name), previous])?;
    files::remove(&apt)?;
    read_current(directory, Check::Quick)?.ok_or_else(|| KernelError::Damaged {
        path: directory.join(CURRENT),
        reason: "was removed by another program".to_owned(),
    })
}

/// The kernel that [`setup`] installed, or none; sizes and times of its files are compared.
///
/// # Errors
/// [`KernelError::Damaged`] or [`KernelError::FutureVersion`], which say what to do.
pub fn installed(directory: &Path) -> Result<Option<GuestKernel>> {
    read_current(directory, Check::Quick)
}

/// As [`installed`], comparing the SHA-256 of every file.
///
/// # Errors
/// As for [`installed`].
pub fn verify(directory: &Path) -> Result<Option<GuestKernel>> {
    read_current(directory, Check::Full)
}

/// The installed kernel, where it is intact and what `options` ask for.
fn usable(
    directory: &Path,
    options: &SetupOptions,
    progress: Progress<'_>,
) -> Result<Option<GuestKernel>> {
    let Some(name) = current_name(directory)? else {
        return Ok(None);
    };
    progress(SetupEvent::start(SetupStage::Verify, ""));
    let kernel_directory = directory.join(name);
    let manifest = Manifest::read(&kernel_directory)?;
    manifest.check(&kernel_directory, Check::Full)?;
    let wanted =
        manifest.architecture == options.architecture && manifest.module_roots == options.modules;
    Ok(wanted.then(|| manifest.into_kernel(&kernel_directory)))
}

fn read_current(directory: &Path, check: Check) -> Result<Option<GuestKernel>> {
    let Some(name) = current_name(directory)? else {
        return Ok(None);
    };
    let kernel_directory = directory.join(name);
    let manifest = Manifest::read(&kernel_directory)?;
    manifest.check(&kernel_directory, check)?;
    Ok(Some(manifest.into_kernel(&kernel_directory)))
}

/// What the link points to; none where there is no link, or where it leads nowhere.
fn current_name(directory: &Path) -> Result<Option<String>> {
    let link = directory.join(CURRENT);
    match fs::read_link(&link) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(KernelError::file("read", &link)(error)),
        Ok(target) => {
            let name = target
                .to_str()
                .filter(|name| !name.is_empty() && !name.contains('/') && !name.starts_with('.'))
                .ok_or_else(|| KernelError::Damaged {
                    path: link.clone(),
                    reason: format!("points to {}", target.display()),
                })?;
            Ok(directory
                .join(name)
                .join(MANIFEST_NAME)
                .is_file()
                .then(|| name.to_owned()))
        }
    }
}

/// Takes the package apart and stores its kernel under a name made of release and content.
fn store(
    directory: &Path,
    deb: &Path,
    description: Option<String>,
    options: &SetupOptions,
) -> Result<String> {
    let unpacking = files::partial_dir(directory)?;
    let staging = files::partial_dir(directory)?;
    let unpacked = package::unpack(deb, unpacking.path())?;
    let manifest = stage(staging.path(), deb, &unpacked, description, options)?;
    manifest.write(staging.path())?;
    let name = directory_name(&manifest);
    let target = directory.join(&name);
    let intact = Manifest::read(&target)
        .and_then(|stored| stored.check(&target, Check::Full))
        .is_ok();
    if !intact {
        files::remove(&target)?;
        let staging = staging.keep();
        fs::rename(&staging, &target).map_err(KernelError::file("create", &target))?;
        files::sync_dir(directory)?;
    }
    Ok(name)
}

/// Writes the files of a kernel's directory, all but the manifest.
fn stage(
    staging: &Path,
    deb: &Path,
    unpacked: &package::UnpackedPackage,
    description: Option<String>,
    options: &SetupOptions,
) -> Result<Manifest> {
    let image = vmlinux::extract(&unpacked.vmlinuz).map_err(|source| KernelError::Image {
        path: deb.to_owned(),
        source,
    })?;
    if image.architecture != options.architecture {
        return Err(KernelError::Architecture {
            path: deb.to_owned(),
            found: image.architecture,
            expected: options.architecture,
        });
    }
    let index = ModuleIndex::read(&unpacked.modules, &unpacked.builtin)?;
    let loadable = index.resolve(&options.modules)?;
    files::create_dir(&staging.join("modules"))?;
    let list: String = loadable
        .iter()
        .map(|module| format!("{}.ko\n", module.name))
        .collect();
    files::write_synced(&staging.join("modules/list"), list.as_bytes())?;
    let modules = loadable
        .into_iter()
        .map(|module| {
            let path = format!("modules/{}.ko", module.name);
            let file = StoredFile::create(staging, path, &module.bytes)?;
            Ok(StoredModule {
                name: module.name,
                file,
            })
        })
        .collect::<Result<_>>()?;
    files::write_synced(&staging.join("config"), &unpacked.config)?;
    Ok(Manifest {
        version: MANIFEST_VERSION,
        release: image.release().unwrap_or_else(|| "unknown".to_owned()),
        package: description.or_else(|| deb.file_stem()?.to_str().map(str::to_owned)),
        architecture: image.architecture,
        module_roots: options.modules.clone(),
        vmlinux: StoredFile::create(staging, "vmlinux".to_owned(), &image.bytes)?,
        modules,
    })
}

/// `RELEASE-DIGEST`, the digest over all that a guest gets of it.
fn directory_name(manifest: &Manifest) -> String {
    const DIGEST_CHARS: usize = 12;
    let mut content = format!("{}\n", manifest.vmlinux.sha256);
    for module in &manifest.modules {
        content.push_str(&format!("{} {}\n", module.name, module.file.sha256));
    }
    for root in &manifest.module_roots {
        content.push_str(&format!("{root}\n"));
    }
    let digest = files::sha256_hex(content.as_bytes());
    format!("{}-{}", manifest.release, &digest[..DIGEST_CHARS])
}

/// Points the link to `name`, by rename.
fn make_current(directory: &Path, name: &str) -> Result<()> {
    let link = directory.join(CURRENT);
    let holder = files::partial_dir(directory)?;
    let new = holder.path().join(CURRENT);
    symlink(name, &new).map_err(KernelError::file("create", &new))?;
    fs::rename(&new, &link).map_err(KernelError::file("replace", &link))?;
    files::sync_dir(directory)
}

/// Removes kernels other than `kept`. One in `kept` may still be read by a VM that is starting.
fn remove_others(directory: &Path, kept: &[Option<String>]) -> Result<()> {
    for path in files::entries(directory)? {
        let name = path.file_name().and_then(|name| name.to_str());
        let is_kernel = path.join(MANIFEST_NAME).is_file() && name != Some(CURRENT);
        if is_kernel && !kept.iter().any(|kept| kept.as_deref() == name) {
            files::remove(&path)?;
        }
    }
    Ok(())
}
