//! Debian images made on this machine with mmdebstrap, where no registry is needed or reachable.
//!
//! The tree comes as a tar stream, which becomes the one layer of an image without touching the disk
//! twice. It is kept uncompressed: compressing it would take longer than everything that follows.

use std::fs;
use std::io;
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
    let mut command = command(options)?;
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
        return Err(explain_failure(&options.suite, &lines));
    }
    let layer = layer.commit(None)?;
    task.finish("installed");
    let image = Description {
        layer,
        platform: &options.platform,
        // Essential, and so in every variant.
        command: "bash",
        created_by,
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
    if !options.include.is_empty() {
        command.arg(format!("--include={}", options.include.join(",")));
    }
    command.args([&options.suite, "-"]);
    command.args(&options.sources);
    Ok(command)
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

fn explain_failure(suite: &str, lines: &[String]) -> BootstrapError {
    let reason = explain(lines);
    let suite = suite.to_owned();
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
