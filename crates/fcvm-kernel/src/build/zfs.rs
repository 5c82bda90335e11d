//! OpenZFS built into a kernel: which release fits which kernel, its source, and adding it to the kernel's.
//!
//! The source is Debian's package zfs-dkms. What upstream's `copy-builtin` does is done here, with two differences:
//! the kernel's tree only ever gains files, so that the objects of a kernel without ZFS stay valid; and what
//! `configure` finds out about one configuration (`zfs_config.h`) is kept with that configuration's objects, so that
//! kernels of several profiles come from one tree.

use std::fmt;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use super::builder::Plan;
use super::process::fetch_output;
use super::profile::KernelVersion;
use super::source::{self, Offer, Source};
use super::store::{BuiltKernel, BuiltZfs};
use super::{BuildError, Result};
use crate::files;
use crate::progress::{Progress, SetupEvent, SetupStage};

/// What everybody is told who builds one.
pub const LICENCE_REMARK: &str = "OpenZFS (CDDL) and Linux (GPL-2.0) are one binary in this kernel: \
     it is for your own use, do not pass it on";

/// Objects that it adds to a kernel, about.
pub(crate) const OBJECT_COUNT: u64 = 300;
/// Releases of OpenZFS in Debian, the one to prefer first: suite, release, oldest and newest kernel (its file META,
/// and what it was built with here).
const RELEASES: [Release; 3] = [
    Release::new("bookworm", "2.1.11", "debian:6.1", (3, 10), (6, 2)),
    Release::new("trixie", "2.3.9", "debian:6.12", (4, 18), (6, 19)),
    Release::new("sid", "2.4.4", "debian:7.2", (4, 18), (7, 2)),
];
/// Debian's package with the source of the kernel's part.
const PACKAGE: &str = "zfs-dkms";
/// Where it is added to the kernel's configuration.
const KCONFIG: &str = "config ZFS\n\
     \tbool \"OpenZFS\"\n\
     \tdepends on BLOCK && EFI_PARTITION\n\
     \tselect ZLIB_INFLATE\n\
     \tselect ZLIB_DEFLATE\n\
     \thelp\n\
     \t  The OpenZFS file system.\n";
/// The line of `fs/Kconfig` before which its line is put.
const KCONFIG_BEFORE: &str = "source \"fs/ext2/Kconfig\"";
const KCONFIG_LINE: &str = "source \"fs/zfs/Kconfig\"";
const MAKEFILE_LINE: &str = "obj-$(CONFIG_ZFS) += zfs/";
/// In the kernel's tree: what configure found out is in each configuration's own directory.
const CONFIG_POINTER: &str = "#include <generated/zfs_config.h>\n";
/// Largest `zfs_config.h`, `META`, `fs/Kconfig`.
const TEXT_MAX_BYTES: usize = 1 << 20;
/// What configure was run for, beside its result.
const CONFIGURED: &str = "include/generated/zfs_config.inputs";
/// Its result.
const CONFIG_HEADER: &str = "include/generated/zfs_config.h";

/// A release of OpenZFS that Debian has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Release {
    /// Debian's suite.
    pub(crate) suite: &'static str,
    /// Its version there.
    pub(crate) version: &'static str,
    /// The suite's own kernel.
    source: &'static str,
    oldest: KernelVersion,
    newest: KernelVersion,
}

impl Release {
    const fn new(
        suite: &'static str,
        version: &'static str,
        source: &'static str,
        oldest: (u32, u32),
        newest: (u32, u32),
    ) -> Self {
        Self {
            suite,
            version,
            source,
            oldest: KernelVersion::new(oldest.0, oldest.1),
            newest: KernelVersion::new(newest.0, newest.1),
        }
    }
}

impl fmt::Display for Release {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            suite,
            version,
            oldest,
            newest,
            ..
        } = self;
        write!(f, "{version} of {suite} (Linux {oldest} to {newest})")
    }
}

/// The source of OpenZFS on the disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Zfs {
    /// Package and its version: names the content.
    pub id: String,
    /// Its version, as `zfs version` tells it without the packaging's: 2.3.9.
    pub version: String,
    tree: PathBuf,
}

/// The release for a kernel: the first of the table that knows it.
///
/// # Errors
/// [`BuildError::ZfsMismatch`] where none does.
pub(crate) fn release_for(kernel: KernelVersion) -> Result<Release> {
    RELEASES
        .into_iter()
        .find(|release| (release.oldest..=release.newest).contains(&kernel))
        .ok_or_else(|| BuildError::ZfsMismatch {
            kernel: kernel.to_string(),
            known: RELEASES.map(|release| release.to_string()).join(", "),
        })
}

/// The version of OpenZFS that images of a suite have to have: that of the newest built kernel with the suite's release.
///
/// # Errors
/// [`BuildError::Options`] that says which kernel to build.
pub fn version_for_suite(kernels: &[BuiltKernel], suite: &str) -> Result<String> {
    let names = RELEASES.map(|release| release.suite);
    let Some(release) = RELEASES.iter().find(|release| release.suite == suite) else {
        return Err(BuildError::Options(format!(
            "no kernel with the OpenZFS of {suite} can be built: known are {}",
            names.join(", ")
        )));
    };
    let series = |version: &str| {
        version
            .rsplit_once('.')
            .map(|(series, _)| series.to_owned())
    };
    let built: Vec<(&str, &BuiltZfs)> = kernels
        .iter()
        .filter_map(|kernel| Some((kernel.name.as_str(), kernel.zfs.as_ref()?)))
        .collect();
    if let Some((_, zfs)) = built
        .iter()
        .find(|(_, zfs)| series(&zfs.version) == series(release.version))
    {
        return Ok(zfs.version.clone());
    }
    let others: Vec<String> = built
        .iter()
        .map(|(name, zfs)| format!("{name} has {}", zfs.version))
        .collect();
    Err(BuildError::Options(format!(
        "{suite} has OpenZFS {} and no built kernel has it{}: 'fcvm kernel build --profile guest-zfs --source \
         {}', or name the version (--zfs={})",
        release.version,
        match others.is_empty() {
            true => String::new(),
            false => format!(" ({})", others.join(", ")),
        },
        release.source,
        release.version,
    )))
}

/// Fetches and unpacks the source of OpenZFS that fits a kernel, where it is not there yet.
///
/// # Errors
/// [`BuildError::ZfsMismatch`], [`BuildError::Kernel`] from apt, [`BuildError::Failed`].
pub fn fetch(directory: &Path, source: &Source, progress: Progress<'_>) -> Result<Zfs> {
    let release = release_for(source.version)?;
    files::create_dir(directory)?;
    let _lock = files::lock(directory, progress)?;
    files::remove_partial(directory)?;
    let existing = |id: &str| Some(directory.join(id).join("zfs")).filter(|tree| tree.is_dir());
    let (id, tree) =
        match source::newest_package(directory, release.suite, PACKAGE, &existing, progress)? {
            Offer::There { id, tree } => (id, tree),
            Offer::Fetch(offer) => {
                let package = offer.fetch(progress)?;
                progress(SetupEvent::start(SetupStage::Unpack, offer.id.clone()));
                let staging = files::partial_dir(directory)?;
                unpack(&package, staging.path())?;
                let target = directory.join(&offer.id);
                fs::rename(staging.path().join("new"), &target)
                    .map_err(BuildError::file("create", &target))?;
                files::remove(&package)?;
                (offer.id, target.join("zfs"))
            }
        };
    let version = check_meta(&tree, source.version)?;
    Ok(Zfs { id, version, tree })
}

/// Takes `usr/src/zfs-VERSION` out of a package, as `new/zfs`.
fn unpack(package: &Path, staging: &Path) -> Result<()> {
    let all = staging.join("all");
    let mut command = Command::new("dpkg-deb");
    command.arg("--extract").arg(package).arg(&all);
    fetch_output("unpacking OpenZFS (dpkg-deb)", &mut command)?;
    let sources = files::entries(&all.join("usr/src"))?;
    let [tree] = sources.as_slice() else {
        return Err(BuildError::Failed {
            action: format!("unpacking {}", package.display()),
            reason: "it has no source of OpenZFS in /usr/src".to_owned(),
            log: None,
        });
    };
    let new = staging.join("new");
    files::create_dir(&new)?;
    let target = new.join("zfs");
    fs::rename(tree, &target).map_err(BuildError::file("create", &target))
}

/// The version in the file META, after its own word on kernels is seen to allow this one.
fn check_meta(tree: &Path, kernel: KernelVersion) -> Result<String> {
    let path = tree.join("META");
    let bytes = files::read_bounded(&path, TEXT_MAX_BYTES)?;
    let text = String::from_utf8_lossy(&bytes);
    let field = |name: &str| {
        text.lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))
            .map(str::trim)
            .unwrap_or_default()
    };
    let bound = |name: &str| field(name).parse::<KernelVersion>();
    let version = field("Version").to_owned();
    match (bound("Linux-Minimum"), bound("Linux-Maximum")) {
        (Ok(oldest), Ok(newest)) if (oldest..=newest).contains(&kernel) => Ok(version),
        _ => Err(BuildError::ZfsMismatch {
            kernel: kernel.to_string(),
            known: format!(
                "{version} (Linux {} to {})",
                field("Linux-Minimum"),
                field("Linux-Maximum")
            ),
        }),
    }
}

/// Makes `CONFIG_ZFS` known to a kernel's Kconfig. A directory of the user's is left as it is: it has ZFS or it is
/// refused.
///
/// # Errors
/// [`BuildError::Options`], [`BuildError::ZfsMismatch`], [`BuildError::Kernel`].
pub(crate) fn declare(source: &Source) -> Result<()> {
    let kconfig = source.tree.join("fs/zfs/Kconfig");
    if !source.is_fixed {
        return match kconfig.is_file() {
            true => Ok(()),
            false => Err(BuildError::Options(format!(
                "{} has no fs/zfs, and a directory of yours is not changed: run OpenZFS's copy-builtin on it, or \
                 give it as tar: or git:",
                source.tree.display()
            ))),
        };
    }
    release_for(source.version)?;
    files::create_dir(&source.tree.join("fs/zfs"))?;
    write_differing(&kconfig, KCONFIG.as_bytes())?;
    let path = source.tree.join("fs/Kconfig");
    let text = read_text(&path)?;
    if text.lines().any(|line| line == KCONFIG_LINE) {
        return Ok(());
    }
    if !text.lines().any(|line| line == KCONFIG_BEFORE) {
        return Err(BuildError::Source {
            text: source.spec.to_string(),
            reason: format!("its fs/Kconfig has no line '{KCONFIG_BEFORE}'"),
        });
    }
    let with = text.replacen(
        KCONFIG_BEFORE,
        &format!("{KCONFIG_LINE}\n{KCONFIG_BEFORE}"),
        1,
    );
    Ok(files::write_atomically(&path, with.as_bytes())?)
}

/// Adds ZFS to the kernel's tree and finds out about this configuration. Whatever is up to date is not touched.
/// The lock has to be held until the kernel is built: another version of ZFS would change the tree.
///
/// # Errors
/// [`BuildError::Failed`] with configure's reason, [`BuildError::File`].
pub(crate) fn add(
    plan: &Plan,
    zfs: &Zfs,
    output: &Path,
    log: &Path,
    progress: Progress<'_>,
) -> Result<File> {
    let beside = source::directory(&plan.source)?;
    let lock = files::lock(beside, progress)?;
    let inputs = format!("{}\n{}", plan.key, zfs.id);
    let configured = output.join(CONFIGURED);
    let header = output.join(CONFIG_HEADER);
    let stamp = beside.join("zfs.id");
    let is_added = fs::read_to_string(&stamp).is_ok_and(|id| id == zfs.id);
    let is_configured = fs::read_to_string(&configured).is_ok_and(|text| text == inputs);
    if is_added && is_configured && header.is_file() {
        return Ok(lock);
    }
    progress(SetupEvent::start(SetupStage::Configure, zfs.id.clone()));
    let mut command = plan.options.make().command(&plan.source, output);
    command.arg(format!("--jobs={}", plan.options.jobs.max(1)));
    command.args(["olddefconfig", "prepare", "scripts"]);
    fetch_output(
        "preparing the kernel for OpenZFS (make prepare)",
        &mut command,
    )?;
    // The same path for every configuration, because configure writes it into what is copied.
    let work = beside.join("zfs");
    files::remove(&work)?;
    let mut command = Command::new("cp");
    command.arg("--archive").arg(&zfs.tree).arg(&work);
    fetch_output("copying OpenZFS (cp)", &mut command)?;
    configure(plan, &work, output, log)?;
    if !is_added {
        files::remove(&stamp)?;
        copy_differing(&work.join("include"), &plan.source.tree.join("include/zfs"))?;
        copy_differing(&work.join("module"), &plan.source.tree.join("fs/zfs"))?;
        let pointer = plan.source.tree.join("include/zfs/zfs_config.h");
        write_differing(&pointer, CONFIG_POINTER.as_bytes())?;
        let makefile = plan.source.tree.join("fs/Makefile");
        let text = read_text(&makefile)?;
        if !text.lines().any(|line| line == MAKEFILE_LINE) {
            files::write_atomically(&makefile, format!("{text}{MAKEFILE_LINE}\n").as_bytes())?;
        }
        files::write_atomically(&stamp, zfs.id.as_bytes())?;
    }
    let found = files::read_bounded(&work.join("zfs_config.h"), TEXT_MAX_BYTES)?;
    write_differing(&header, &found)?;
    files::write_atomically(&configured, inputs.as_bytes())?;
    files::remove(&work)?;
    Ok(lock)
}

/// Runs OpenZFS's configure: some hundred questions to the kernel's headers.
fn configure(plan: &Plan, work: &Path, output: &Path, log: &Path) -> Result<()> {
    let log_file = File::create(log).map_err(BuildError::file("create", log))?;
    let option = |name: &str, path: &Path| format!("--{name}={}", path.display());
    let mut command = Command::new("./configure");
    command
        .current_dir(work)
        .args(["--enable-linux-builtin", "--with-config=kernel"])
        .arg(option("with-linux", &plan.source.tree))
        .arg(option("with-linux-obj", output))
        .env("LC_ALL", "C")
        .env("MAKEFLAGS", format!("--jobs={}", plan.options.jobs.max(1)))
        .stdin(Stdio::null())
        .stdout(log_file);
    for name in [
        "ARCH",
        "CROSS_COMPILE",
        "CC",
        "CFLAGS",
        "KCFLAGS",
        "CONFIG_SITE",
    ] {
        command.env_remove(name);
    }
    if let Some(llvm) = plan.options.make().llvm {
        command.env("KERNEL_LLVM", llvm);
    }
    let failed = |reason: String| BuildError::Failed {
        action: "configuring OpenZFS for this kernel".to_owned(),
        reason,
        log: Some(log.to_owned()),
    };
    let ended = command
        .output()
        .map_err(|error| failed(format!("cannot start its configure: {error}")))?;
    match ended.status.success() {
        true => Ok(()),
        false => Err(failed(configure_error(&String::from_utf8_lossy(
            &ended.stderr,
        )))),
    }
}

/// Its error, which it breaks into lines with asterisks.
fn configure_error(said: &str) -> String {
    const WORDS_MAX: usize = 50;
    let text = said
        .split_once("configure: error:")
        .map_or(said, |(_, text)| text);
    let words: Vec<&str> = text
        .split_whitespace()
        .filter(|word| *word != "***")
        .take(WORDS_MAX)
        .collect();
    match words.is_empty() {
        true => "it gave no reason".to_owned(),
        false => words.join(" "),
    }
}

fn read_text(path: &Path) -> Result<String> {
    let bytes = files::read_bounded(path, TEXT_MAX_BYTES)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// Writes a file where its content differs: make looks at the time.
fn write_differing(path: &Path, bytes: &[u8]) -> Result<()> {
    if fs::read(path).is_ok_and(|there| there == bytes) {
        return Ok(());
    }
    Ok(files::write_atomically(path, bytes)?)
}

/// Copies a tree; files with the same content keep their time, and none goes.
fn copy_differing(from: &Path, to: &Path) -> Result<()> {
    files::create_dir(to)?;
    for path in files::entries(from)? {
        let Some(name) = path.file_name() else {
            continue;
        };
        let target = to.join(name);
        if path.is_dir() {
            copy_differing(&path, &target)?;
            continue;
        }
        let bytes = fs::read(&path).map_err(BuildError::file("read", &path))?;
        if fs::read(&target).is_ok_and(|there| there == bytes) {
            continue;
        }
        fs::write(&target, bytes).map_err(BuildError::file("write", &target))?;
    }
    Ok(())
}

#[cfg(test)]
#[path = "zfs_tests.rs"]
mod tests;
