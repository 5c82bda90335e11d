//! Kernels that were built: `built/NAME/` with `manifest.json`, `vmlinux`, `bzImage`, `config` and `build.log`.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::builder::{Plan, strip};
use super::profile::{Use, is_name};
use super::zfs;
use super::{BuildError, Directories, Result};
use crate::KernelError;
use crate::files;
use crate::manifest::{Check, GuestKernel, MANIFEST_NAME, StoredFile};
use crate::vmlinux::{self, Architecture, IMAGE_SIZE_MAX_BYTES, ImageError};

/// Version of the manifest.
const VERSION: u32 = 1;
const MANIFEST_MAX_BYTES: usize = 4 << 20;
/// Names the kernel that `run` takes where none is named.
const SELECTED: &str = "selected";

/// A line of a kernel's profile and what became of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BuiltSymbol {
    /// Without `CONFIG_`.
    pub symbol: String,
    /// What was asked for.
    pub value: String,
    /// What it is.
    pub result: String,
    /// Part of the profile.
    pub section: String,
    /// Why it was asked for.
    pub why: String,
    /// What it costs.
    pub cost: String,
    /// Who asked.
    pub origin: String,
    /// The profile's own value, where the user asked for another.
    pub replaced: Option<String>,
}

/// OpenZFS in a built kernel.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BuiltZfs {
    /// Its version: userland of the same is to be used with it.
    pub version: String,
    /// Debian's package and its version.
    pub package: String,
}

/// A built kernel.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BuiltKernel {
    version: u32,
    /// Its name.
    pub name: String,
    /// SHA-256 over all that it was made of.
    pub key: String,
    /// The profile's name.
    pub profile: String,
    /// What it is for.
    #[serde(rename = "use")]
    pub used_for: Use,
    /// The source as the user named it.
    pub source: String,
    /// The source's content, as its directory is called.
    pub source_id: String,
    /// As `uname -r` prints it.
    pub release: String,
    /// OpenZFS, where it was built in.
    #[serde(default)]
    pub zfs: Option<BuiltZfs>,
    /// The compiler.
    pub compiler: String,
    /// The processor it was built for, where one was named.
    pub march: Option<String>,
    /// Objects of the build.
    pub object_count: u64,
    /// Seconds since 1970.
    pub built_at_seconds: u64,
    vmlinux: StoredFile,
    image: StoredFile,
    config: StoredFile,
    /// The profile's lines.
    pub symbols: Vec<BuiltSymbol>,
    #[serde(skip)]
    directory: PathBuf,
}

impl BuiltKernel {
    /// Reads a kernel's directory.
    ///
    /// # Errors
    /// [`BuildError::Kernel`] for one that is damaged.
    pub fn read(directory: &Path) -> Result<Self> {
        let path = directory.join(MANIFEST_NAME);
        let bytes = files::read_bounded(&path, MANIFEST_MAX_BYTES)?;
        let damaged = |reason: String| KernelError::Damaged {
            path: path.clone(),
            reason,
        };
        let mut kernel: Self = serde_json::from_slice(&bytes)
            .map_err(|error| damaged(format!("is not a manifest ({error})")))?;
        if kernel.version != VERSION {
            let (found, supported) = (kernel.version, VERSION);
            return Err(KernelError::FutureVersion {
                path,
                found,
                supported,
            }
            .into());
        }
        kernel.directory = directory.to_owned();
        Ok(kernel)
    }

    /// Compares sizes and times of its files with their record.
    ///
    /// # Errors
    /// [`BuildError::Kernel`] for one that is damaged.
    pub fn check(&self) -> Result<()> {
        for file in [&self.vmlinux, &self.image, &self.config] {
            file.check(&self.directory, Check::Quick)?;
        }
        Ok(())
    }

    /// True where OpenZFS was built in, from wherever it came.
    pub fn has_zfs(&self) -> bool {
        let is_it = |line: &BuiltSymbol| line.symbol == "ZFS" && line.result == "y";
        self.zfs.is_some() || self.symbols.iter().any(is_it)
    }

    /// The configuration's text.
    ///
    /// # Errors
    /// [`BuildError::Kernel`].
    pub fn config(&self) -> Result<String> {
        super::resolve::read_config(&self.config_path())
    }

    /// The configuration.
    pub fn config_path(&self) -> PathBuf {
        self.directory.join("config")
    }

    /// The uncompressed kernel.
    pub fn vmlinux_path(&self) -> PathBuf {
        self.directory.join("vmlinux")
    }

    /// The compressed kernel, for boot loaders.
    pub fn image_path(&self) -> PathBuf {
        self.directory.join("bzImage")
    }

    /// Sizes of the uncompressed and of the compressed kernel.
    pub fn sizes_bytes(&self) -> (u64, u64) {
        (self.vmlinux.size_bytes, self.image.size_bytes)
    }

    /// As a guest's kernel: without modules.
    pub fn guest_kernel(&self) -> GuestKernel {
        GuestKernel {
            zfs: self.zfs.as_ref().map(|zfs| zfs.version.clone()),
            version: self.release.clone(),
            package: Some(format!("{} ({})", self.name, self.source)),
            architecture: Architecture::X86_64,
            vmlinux: self.vmlinux_path(),
            modules: Vec::new(),
        }
    }
}

/// Stores what a build left in its output directory.
pub(crate) fn put(
    directories: &Directories,
    plan: &Plan,
    output: &Path,
    log: &Path,
    object_count: u64,
    vmlinux: PathBuf,
) -> Result<BuiltKernel> {
    files::create_dir(&directories.built)?;
    let staging = files::partial_dir(&directories.built)?;
    let at = staging.path();
    let stripped = at.join("stripped");
    strip(plan, &vmlinux, &stripped)?;
    let bytes = files::read_bounded(&stripped, IMAGE_SIZE_MAX_BYTES)?;
    files::remove(&stripped)?;
    let release = release(plan.profile.used_for, &bytes).map_err(|source| KernelError::Image {
        path: vmlinux,
        source,
    })?;
    let image = files::read_bounded(&output.join("arch/x86/boot/bzImage"), IMAGE_SIZE_MAX_BYTES)?;
    let kernel = BuiltKernel {
        version: VERSION,
        name: plan.name.clone(),
        key: plan.key.clone(),
        profile: plan.profile.kernel_name(),
        used_for: plan.profile.used_for,
        source: plan.source.spec.to_string(),
        source_id: plan.source.id.clone(),
        release: release.unwrap_or_else(|| plan.source.release.clone()),
        zfs: plan.zfs.as_ref().map(|zfs| BuiltZfs {
            version: zfs.version.clone(),
            package: zfs.id.clone(),
        }),
        compiler: plan
            .resolved
            .values
            .get("CC_VERSION_TEXT")
            .map_or(String::new(), |text| text.trim_matches('"').to_owned()),
        march: plan.options.march.clone(),
        object_count,
        built_at_seconds: std::time::SystemTime::now()
            .duration_since(std::time::UNIX_EPOCH)
            .map_or(0, |since| since.as_secs()),
        vmlinux: StoredFile::create(at, "vmlinux".to_owned(), &bytes)?,
        image: StoredFile::create(at, "bzImage".to_owned(), &image)?,
        config: StoredFile::create(at, "config".to_owned(), plan.resolved.text.as_bytes())?,
        symbols: symbols(plan),
        directory: directories.built.join(&plan.name),
    };
    fs::copy(log, at.join("build.log")).map_err(BuildError::file("copy", log))?;
    let manifest = at.join(MANIFEST_NAME);
    let mut text = serde_json::to_vec_pretty(&kernel)
        .map_err(|error| BuildError::file("write", &manifest)(error.into()))?;
    text.push(b'\n');
    files::write_synced(&manifest, &text)?;
    files::remove(&kernel.directory)?;
    let kept = staging.keep();
    fs::rename(&kept, &kernel.directory).map_err(BuildError::file("create", &kernel.directory))?;
    files::sync_dir(&directories.built)?;
    Ok(kernel)
}

/// What an uncompressed kernel says it is. One for guests has to be one that a microVM boots; a host's is started by a
/// boot loader, from its other form.
fn release(used_for: Use, kernel: &[u8]) -> std::result::Result<Option<String>, ImageError> {
    Ok(match used_for {
        Use::Guest => vmlinux::extract(kernel)?.release(),
        Use::Host => vmlinux::release(kernel),
    })
}

fn symbols(plan: &Plan) -> Vec<BuiltSymbol> {
    let result = |symbol: &str| plan.resolved.values.get(symbol).map_or("n", String::as_str);
    plan.resolved
        .requests
        .iter()
        .map(|request| BuiltSymbol {
            symbol: request.symbol.clone(),
            value: request.value.clone(),
            result: result(&request.symbol).to_owned(),
            section: request.section.clone(),
            why: request.why.clone(),
            cost: request.cost.clone(),
            origin: request.origin.to_string(),
            replaced: request.replaced.clone(),
        })
        .collect()
}

/// How many objects the last build of the same profile and source had.
pub(crate) fn expected_objects(directories: &Directories, plan: &Plan) -> Option<u64> {
    let kernels = list(directories).ok()?;
    let count = |profile: &str| {
        let alike =
            |kernel: &&BuiltKernel| kernel.profile == profile && kernel.source_id == plan.source.id;
        kernels.iter().find(alike).map(|kernel| kernel.object_count)
    };
    let chosen = plan.profile.kernel_name();
    count(&chosen).or_else(|| match plan.zfs {
        Some(_) => Some(count(&plan.profile.name)? + zfs::OBJECT_COUNT),
        None => None,
    })
}

/// All built kernels that can be read, the newest first.
///
/// # Errors
/// [`BuildError::Kernel`] where the directory cannot be read.
pub fn list(directories: &Directories) -> Result<Vec<BuiltKernel>> {
    let mut kernels: Vec<BuiltKernel> = files::entries(&directories.built)?
        .iter()
        .filter(|path| {
            path.file_name()
                .is_some_and(|name| !name.as_encoded_bytes().starts_with(b"."))
        })
        .filter_map(|path| BuiltKernel::read(path).ok())
        .collect();
    kernels.sort_by(|one, other| {
        (other.built_at_seconds, &one.name).cmp(&(one.built_at_seconds, &other.name))
    });
    Ok(kernels)
}

/// A kernel by its name, an unambiguous beginning of it, or its profile (the newest).
///
/// # Errors
/// [`BuildError::NoKernel`], [`BuildError::Ambiguous`].
pub fn find(directories: &Directories, name: &str) -> Result<BuiltKernel> {
    let kernels = list(directories)?;
    let exact = kernels
        .iter()
        .find(|kernel| kernel.name == name)
        .or_else(|| kernels.iter().find(|kernel| kernel.profile == name));
    if let Some(kernel) = exact {
        return Ok(kernel.clone());
    }
    let matching: Vec<&BuiltKernel> = kernels
        .iter()
        .filter(|kernel| !name.is_empty() && kernel.name.starts_with(name))
        .collect();
    match matching.as_slice() {
        [kernel] => Ok((*kernel).clone()),
        [] => Err(BuildError::NoKernel {
            name: name.to_owned(),
        }),
        several => Err(BuildError::Ambiguous {
            name: name.to_owned(),
            candidates: several
                .iter()
                .map(|kernel| kernel.name.as_str())
                .collect::<Vec<_>>()
                .join(", "),
        }),
    }
}

/// Removes a kernel. VMs that run have it in memory; one that is selected is no longer.
///
/// # Errors
/// [`BuildError::Kernel`].
pub fn remove(directories: &Directories, kernel: &BuiltKernel) -> Result<()> {
    if selected_name(directories)?.as_deref() == Some(kernel.name.as_str()) {
        select(directories, None)?;
    }
    Ok(files::remove(&directories.built.join(&kernel.name))?)
}

/// Makes a kernel the one that is booted where none is named; none goes back to the packaged one.
///
/// # Errors
/// [`BuildError::Options`] for a kernel of a host, [`BuildError::File`].
pub fn select(directories: &Directories, kernel: Option<&BuiltKernel>) -> Result<()> {
    let path = directories.built.join(SELECTED);
    let Some(kernel) = kernel else {
        return Ok(files::remove(&path)?);
    };
    if kernel.used_for == Use::Host {
        return Err(BuildError::Options(format!(
            "{} is a host's kernel: guests have the profiles guest-min, guest and guest-zfs",
            kernel.name
        )));
    }
    let staging = files::partial_dir(&directories.built)?;
    let new = staging.path().join(SELECTED);
    files::write_synced(&new, format!("{}\n", kernel.name).as_bytes())?;
    fs::rename(&new, &path).map_err(BuildError::file("replace", &path))?;
    Ok(files::sync_dir(&directories.built)?)
}

/// The kernel that [`select`] chose.
///
/// # Errors
/// [`BuildError::Kernel`] where it is damaged or gone.
pub fn selected(directories: &Directories) -> Result<Option<BuiltKernel>> {
    let Some(name) = selected_name(directories)? else {
        return Ok(None);
    };
    let kernel = BuiltKernel::read(&directories.built.join(name))?;
    kernel.check()?;
    Ok(Some(kernel))
}

fn selected_name(directories: &Directories) -> Result<Option<String>> {
    let path = directories.built.join(SELECTED);
    match fs::read_to_string(&path) {
        Ok(text) => Ok(Some(text.trim().to_owned()).filter(|name| is_name(name))),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(BuildError::file("read", &path)(error)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hosts_kernel_needs_no_entry_point_of_a_microvm() {
        let kernel = b"\x7fELF ... Linux version 6.1.192-fcvm-host (fcvm@fcvm) ...";
        let found = release(Use::Host, kernel).unwrap();
        assert_eq!(found.as_deref(), Some("6.1.192-fcvm-host"));
        assert!(release(Use::Guest, kernel).is_err());
    }
}
