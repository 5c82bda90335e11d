//! Debian images made on this machine with mmdebstrap, where no registry is needed or reachable.
//!
//! The tree comes as a tar stream, which becomes the one layer of an image without touching the disk
//! twice. It is kept uncompressed: compressing it would take longer than everything that follows.
//!
//! With OpenZFS the image gets its userland of one version, and a package without files that stands for the kernel's
//! part, because that is not a module of a package: it is built into the kernel.

use std::collections::HashMap;
use std::fs::{self, Permissions};
use std::io;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;

use rustix::fs::{StatVfsMountFlags, statfs, statvfs};

use crate::compose::{self, Description};
use crate::format::{LAYER_MAX_BYTES, Platform};
use crate::progress::{Progress, one_line};
use crate::reference::{Reference, ReferenceError};
use crate::store::{CopyError, Image, ImageStore, StoreError};
use crate::tool::{Tool, explain};

/// Which packages an image has besides those that are asked for; mmdebstrap's `--variant`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Variant {
    /// Packages marked essential: no apt.
    Essential,
    /// Essential packages and apt: the smallest image that can install more.
    #[default]
    Apt,
    /// `Apt` and the packages of required priority, as debootstrap's minbase.
    Minbase,
}

impl Variant {
    fn name(self) -> &'static str {
        match self {
            Self::Essential => "essential",
            Self::Apt => "apt",
            Self::Minbase => "minbase",
        }
    }
}

/// The label that tells of which version the OpenZFS of an image is.
pub const ZFS_LABEL: &str = "fcvm.zfs";
/// Packages of OpenZFS's userland.
const ZFS_PACKAGES: [&str; 2] = ["zfsutils-linux", "zfs-zed"];
/// The package that stands for the kernel's part.
const ZFS_KERNEL_PACKAGE: &str = "fcvm-zfs-in-kernel";

/// What [`bootstrap`] is to make.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BootstrapOptions {
    /// The mmdebstrap program: a path, or a name to look up in PATH.
    pub program: PathBuf,
    /// Suite of Debian: `bookworm`, `trixie`, `sid`.
    pub suite: String,
    /// Packages to install besides those of the variant.
    pub include: Vec<String>,
    /// Which packages come without being asked for.
    pub variant: Variant,
    /// The version of OpenZFS to install, without the packaging's part: `2.3.9`.
    pub zfs: Option<String>,
    /// Where packages come from: a mirror's URL or the path of a file in the form of sources.list.
    /// Where absent, mmdebstrap's default: Debian's own mirror, with updates and security for a
    /// stable release. Proxies of this machine's apt configuration are used in any case.
    pub sources: Option<String>,
    /// Name of the image; `localhost/debian:SUITE` where absent.
    pub name: Option<Reference>,
    /// Architecture of the image.
    pub platform: Platform,
    /// Directory in which the tree is made before it is packed. Where absent, mmdebstrap's default,
    /// which is TMPDIR.
    pub work_dir: Option<PathBuf>,
}

impl BootstrapOptions {
    /// The smallest image of this suite that has apt, for this machine.
    pub fn new(suite: &str) -> Self {
        Self {
            program: "mmdebstrap".into(),
            suite: suite.to_owned(),
            include: Vec::new(),
            variant: Variant::default(),
            zfs: None,
            sources: None,
            name: None,
            platform: Platform::host(),
            work_dir: memory_dir(),
        }
    }
}

/// A directory in memory that has room for a tree. dpkg syncs several files for each package, which
/// takes most of the time on a disk.
pub fn memory_dir() -> Option<PathBuf> {
    const TMPFS: i64 = 0x0102_1994;
    const ROOM_BYTES: u64 = 2 << 30;
    let dir = Path::new("/dev/shm");
    let system = statfs(dir).ok()?;
    let mount = statvfs(dir).ok()?;
    let is_usable = system.f_type == TMPFS
        && !mount
            .f_flag
            .intersects(StatVfsMountFlags::NOEXEC | StatVfsMountFlags::RDONLY)
        && mount.f_bavail.saturating_mul(mount.f_frsize) >= ROOM_BYTES;
    // What is written there is taken from the memory that the machine has left.
    let memory = fs::read_to_string("/proc/meminfo").ok()?;
    let line = memory
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let available_kib: u64 = line.trim().strip_suffix(" kB")?.parse().ok()?;
    (is_usable && available_kib >> 10 >= ROOM_BYTES >> 20).then(|| dir.to_owned())
}

/// Failure of [`bootstrap`]. Nothing of the image is kept.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BootstrapError {
    /// The suite's name is none.
    #[error("'{0}' is not a suite of Debian; write its name, for example bookworm")]
    Suite(String),
    /// A package's name is none.
    #[error("'{0}' is not the name of a Debian package")]
    Package(String),
    /// The sources are neither a URL nor a file.
    #[error("'{0}' is neither a mirror's URL nor the absolute path of a sources.list file")]
    Sources(String),
    /// The suite gives no valid name.
    #[error(transparent)]
    Reference(#[from] ReferenceError),
    /// The architecture has no name in Debian.
    #[error("Debian has no architecture '{0}'")]
    Architecture(String),
    /// mmdebstrap is not installed.
    #[error("mmdebstrap is not installed; install it with 'apt install mmdebstrap'")]
    Missing,
    /// mmdebstrap cannot be started.
    #[error("cannot start {}", program.display())]
    Start {
        /// The program.
        program: PathBuf,
        /// The operating system's answer.
        source: io::Error,
    },
    /// mmdebstrap needs user namespaces that this user does not have.
    #[error(
        "mmdebstrap cannot work as this user: {0}; install uidmap, give the user ranges in \
         /etc/subuid and /etc/subgid, and allow user namespaces, or run it as root"
    )]
    NoNamespaces(String),
    /// The archive of the suite cannot be verified.
    #[error(
        "the packages of {suite} cannot be verified: {reason}; install a current \
         debian-archive-keyring"
    )]
    Keyring {
        /// The suite.
        suite: String,
        /// mmdebstrap's words.
        reason: String,
    },
    /// The suite's OpenZFS is of another version.
    #[error(
        "{suite} has no OpenZFS {version}, which the kernel has: build the kernel anew ('fcvm kernel build --profile \
         guest-zfs'), or make the image of the suite that the kernel's OpenZFS is from"
    )]
    Zfs {
        /// The suite.
        suite: String,
        /// The version that was asked for.
        version: String,
    },
    /// The package that stands for the kernel's part cannot be made.
    #[error("cannot make a package for OpenZFS in the kernel: {0}")]
    Stub(String),
    /// mmdebstrap failed.
    #[error("mmdebstrap could not make {suite}: {reason}")]
    Failed {
        /// The suite.
        suite: String,
        /// Its last error lines.
        reason: String,
    },
    /// The tree cannot be read from mmdebstrap.
    #[error("cannot read the output of mmdebstrap")]
    Read(#[source] io::Error),
    /// The image cannot be stored.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// Makes an image of a Debian suite and enters it in the store.
///
/// Works as root and as an ordinary user (mmdebstrap's unshare mode). The calling thread is busy
/// until the image is there.
pub fn bootstrap(
    store: &ImageStore,
    options: &BootstrapOptions,
    progress: &dyn Progress,
) -> Result<Image, BootstrapError> {
    check(options)?;
    let name = match &options.name {
        Some(name) => name.clone(),
        None => Reference::parse_local(&format!("debian:{}", options.suite))?,
    };
    let stub = options.zfs.as_deref().map(zfs_stub).transpose()?;
    let mut command = command(options)?;
    if let Some(stub) = &stub {
        install_first(&mut command, stub.path());
    }
    command.args([&options.suite, "-"]);
    command.args(&options.sources);
    let created_by = format!("mmdebstrap {}", arguments_shown(&command));
    let ingest = store.begin()?;
    let mut layer = ingest.writer(LAYER_MAX_BYTES)?;
    let task = progress.start(&format!("debian {}", options.suite), None);
    let ended = thread::scope(|scope| -> Result<_, BootstrapError> {
        let started = Tool::start(scope, &mut command, |line| report(line, progress));
        let (tool, mut output) = started.map_err(|source| match source.kind() {
            io::ErrorKind::NotFound => BootstrapError::Missing,
            _ => BootstrapError::Start {
                program: options.program.clone(),
                source,
            },
        })?;
        let copied = layer.copy_from(&mut output, &|bytes| task.advance(bytes));
        // A tool whose output nobody reads any more ends.
        drop(output);
        match copied {
            Ok(()) => {}
            Err(CopyError::Store(error)) => return Err(error.into()),
            Err(CopyError::Source(error)) => return Err(BootstrapError::Read(error)),
        }
        tool.wait().map_err(BootstrapError::Read)
    });
    let (status, lines) = ended?;
    if !status.success() {
        return Err(explain_failure(options, &lines));
    }
    let layer = layer.commit(None)?;
    task.finish("installed");
    let image = Description {
        layer,
        platform: &options.platform,
        // Essential, and so in every variant.
        command: "bash",
        created_by,
        labels: options
            .zfs
            .iter()
            .map(|version| (ZFS_LABEL.to_owned(), version.clone()))
            .collect::<HashMap<_, _>>(),
        names: &[name],
    };
    Ok(compose::finish(ingest, image)?)
}

fn check(options: &BootstrapOptions) -> Result<(), BootstrapError> {
    let fits = |text: &str, others: &[u8]| {
        let mut bytes = text.bytes();
        bytes
            .next()
            .is_some_and(|first| first.is_ascii_alphanumeric())
            && text.len() <= 100
            && bytes.all(|byte| byte.is_ascii_alphanumeric() || others.contains(&byte))
    };
    if !fits(&options.suite, b"-_.") {
        return Err(BootstrapError::Suite(one_line(&options.suite, 100)));
    }
    // Name, with an architecture or a version: what apt takes, and nothing it reads as an option.
    if let Some(bad) = options
        .include
        .iter()
        .find(|package| !fits(package, b"+-.:=~"))
    {
        return Err(BootstrapError::Package(one_line(bad, 100)));
    }
    if let Some(version) = &options.zfs
        && !fits(version, b".")
    {
        return Err(BootstrapError::Package(one_line(version, 100)));
    }
    match options.sources.as_deref() {
        None => Ok(()),
        Some(sources) if sources.starts_with('/') || sources.contains("://") => Ok(()),
        Some(other) => Err(BootstrapError::Sources(one_line(other, 200))),
    }
}

fn command(options: &BootstrapOptions) -> Result<Command, BootstrapError> {
    let architecture = match options.platform.architecture.as_str() {
        "amd64" => "amd64",
        "arm64" => "arm64",
        "386" => "i386",
        "arm" => "armhf",
        "ppc64le" => "ppc64el",
        "riscv64" => "riscv64",
        "s390x" => "s390x",
        other => return Err(BootstrapError::Architecture(one_line(other, 50))),
    };
    let mut command = Command::new(&options.program);
    command.env("LC_ALL", "C.UTF-8");
    if let Some(dir) = &options.work_dir {
        command.env("TMPDIR", dir);
    }
    // Nobody reads package descriptions in other languages.
    command.args([
        "--mode=auto",
        "--format=tar",
        "--aptopt=Acquire::Languages \"none\"",
    ]);
    command.arg(format!("--variant={}", options.variant.name()));
    command.arg(format!("--architectures={architecture}"));
    let mut packages = options.include.clone();
    if let Some(version) = &options.zfs {
        command.arg("--components=main,contrib");
        // apt takes a pattern: whatever the packaging's part is.
        packages.extend(ZFS_PACKAGES.map(|package| format!("{package}={version}*")));
    }
    if !packages.is_empty() {
        command.arg(format!("--include={}", packages.join(",")));
    }
    Ok(command)
}

/// A package without files that provides what zfs-zed asks of the kernel.
fn zfs_stub(version: &str) -> Result<tempfile::TempDir, BootstrapError> {
    let failed = |error: io::Error| BootstrapError::Stub(error.to_string());
    let directory = tempfile::Builder::new()
        .prefix("fcvm-zfs-")
        .tempdir()
        .map_err(failed)?;
    // Without root, mmdebstrap works as another user.
    fs::set_permissions(directory.path(), Permissions::from_mode(0o755)).map_err(failed)?;
    let tree = directory.path().join("tree/DEBIAN");
    fs::create_dir_all(&tree).map_err(failed)?;
    fs::set_permissions(&tree, Permissions::from_mode(0o755)).map_err(failed)?;
    let control = format!(
        "Package: {ZFS_KERNEL_PACKAGE}\nVersion: {version}\nArchitecture: all\nProvides: zfs-modules\n\
         Maintainer: fcvm <root@localhost>\n\
         Description: OpenZFS {version} is built into the kernel\n"
    );
    fs::write(tree.join("control"), control).map_err(failed)?;
    let output = Command::new("dpkg-deb")
        .args(["--root-owner-group", "--build"])
        .arg(directory.path().join("tree"))
        .arg(directory.path().join("stub.deb"))
        .output()
        .map_err(|error| BootstrapError::Stub(format!("cannot start dpkg-deb: {error}")))?;
    match output.status.success() {
        true => {
            let stub = directory.path().join("stub.deb");
            fs::set_permissions(stub, Permissions::from_mode(0o644)).map_err(failed)?;
            Ok(directory)
        }
        false => {
            let said = String::from_utf8_lossy(&output.stderr);
            Err(BootstrapError::Stub(one_line(&said, 200)))
        }
    }
}

/// Lets mmdebstrap install the stub before apt decides what the packages need.
fn install_first(command: &mut Command, directory: &Path) {
    command.env("FCVM_STUB", directory.join("stub.deb"));
    command.arg("--essential-hook=cp \"$FCVM_STUB\" \"$1/stub.deb\"");
    command.arg("--essential-hook=chroot \"$1\" dpkg --install /stub.deb && rm \"$1/stub.deb\"");
}

fn arguments_shown(command: &Command) -> String {
    let arguments = command
        .get_args()
        .map(|argument| argument.to_string_lossy());
    arguments.collect::<Vec<_>>().join(" ")
}

/// Shows mmdebstrap's own lines; those of apt and dpkg would be hundreds.
fn report(line: &str, progress: &dyn Progress) {
    tracing::debug!(target: "image", "mmdebstrap: {line}");
    if let Some(text) = line.strip_prefix("I: ") {
        progress.message(text);
    } else if line.starts_with("W: ") || line.starts_with("E: ") {
        progress.message(line);
    }
}

fn explain_failure(options: &BootstrapOptions, lines: &[String]) -> BootstrapError {
    let suite = options.suite.clone();
    if let Some(version) = &options.zfs
        && lines.iter().any(|line| {
            line.contains(&format!("Version '{version}*' for '")) && line.contains("was not found")
        })
    {
        let version = version.clone();
        return BootstrapError::Zfs { suite, version };
    }
    let reason = explain(lines);
    let mentions = |words: &[&str]| words.iter().any(|word| reason.contains(word));
    if mentions(&[
        "unshare",
        "newuidmap",
        "subuid",
        "user namespaces",
        "must be root",
    ]) {
        BootstrapError::NoNamespaces(reason)
    } else if mentions(&["NO_PUBKEY", "not signed", "keyring"]) {
        BootstrapError::Keyring { suite, reason }
    } else {
        BootstrapError::Failed { suite, reason }
    }
}
