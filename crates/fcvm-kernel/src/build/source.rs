//! Where a kernel's source comes from: Debian's packages, a directory, an archive, a repository.

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::str::FromStr;

use super::process::fetch_output;
use super::profile::{KernelVersion, is_name};
use super::{BuildError, Result};
use crate::debian::{Apt, Candidate};
use crate::files;
use crate::progress::{Progress, SetupEvent, SetupStage};
use crate::vmlinux::Architecture;

/// Kernels that Debian has the source of, and the suites that have it.
const DEBIAN: [(&str, &str); 3] = [("6.1", "bookworm"), ("6.12", "trixie"), ("7.2", "sid")];
/// Where Debian's archive is.
const MIRROR: &str = "http://deb.debian.org";
/// The keys of Debian's archive: package debian-archive-keyring.
const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";
/// What of a source configuring it takes: 23 MB of 1.5 GB.
const CONFIGURATION_PARTS: [&str; 5] = [
    "--wildcards",
    "--no-wildcards-match-slash",
    "*/Kbuild",
    "*/Makefile",
    "*/scripts",
];
/// The rest of them.
const CONFIGURATION_PARTS_DEEP: [&str; 3] = [
    "*/arch/x86/Makefile*",
    "--wildcards-match-slash",
    "*/Kconfig*",
];
/// What an unpacked source takes.
pub(crate) const TREE_MB: u64 = 1_700;
/// What its package takes meanwhile.
const PACKAGE_MB: u64 = 200;
/// Longest output of a checksum.
const SHA256_CHARS: usize = 64;

/// A source as the user names it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SourceSpec {
    /// Debian's package `linux-source-VERSION`.
    Debian(String),
    /// A directory, used where it is.
    Tree(PathBuf),
    /// An archive and its SHA-256.
    Archive(PathBuf, String),
    /// A repository and a branch, tag or commit.
    Git(String, String),
}

impl FromStr for SourceSpec {
    type Err = BuildError;

    fn from_str(text: &str) -> Result<Self> {
        let refuse = |reason: &str| BuildError::Source {
            text: text.chars().take(200).collect(),
            reason: reason.to_owned(),
        };
        let (kind, rest) = text.split_once(':').ok_or_else(|| {
            refuse(&format!(
                "known are {}, tree:DIR, tar:FILE#sha256=SUM and git:URL#REF",
                debian_names()
            ))
        })?;
        match kind {
            "debian" if DEBIAN.iter().any(|(version, _)| *version == rest) => {
                Ok(Self::Debian(rest.to_owned()))
            }
            "debian" => Err(refuse(&format!("Debian has {}", debian_names()))),
            "tree" if !rest.is_empty() => Ok(Self::Tree(rest.into())),
            "tar" => match rest.rsplit_once("#sha256=") {
                Some((file, sum)) if is_sha256(sum) && !file.is_empty() => {
                    Ok(Self::Archive(file.into(), sum.to_ascii_lowercase()))
                }
                _ => Err(refuse(
                    "an archive needs the SHA-256 that its publisher gives: tar:FILE#sha256=SUM",
                )),
            },
            "git" => match rest.rsplit_once('#') {
                Some((url, reference))
                    if !url.is_empty()
                        && !url.starts_with('-')
                        && !reference.is_empty()
                        && !reference.starts_with('-') =>
                {
                    Ok(Self::Git(url.to_owned(), reference.to_owned()))
                }
                _ => Err(refuse(
                    "a repository needs a branch, tag or commit: git:URL#REF",
                )),
            },
            _ => Err(refuse(&format!(
                "known are {}, tree:DIR, tar:FILE#sha256=SUM and git:URL#REF",
                debian_names()
            ))),
        }
    }
}

impl fmt::Display for SourceSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Debian(version) => write!(f, "debian:{version}"),
            Self::Tree(path) => write!(f, "tree:{}", path.display()),
            Self::Archive(path, sum) => write!(f, "tar:{}#sha256={sum}", path.display()),
            Self::Git(url, reference) => write!(f, "git:{url}#{reference}"),
        }
    }
}

fn debian_names() -> String {
    let names: Vec<String> = DEBIAN
        .iter()
        .map(|(version, _)| format!("debian:{version}"))
        .collect();
    names.join(", ")
}

fn is_sha256(text: &str) -> bool {
    text.len() == SHA256_CHARS && text.bytes().all(|byte| byte.is_ascii_hexdigit())
}

/// How much of a source is needed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scope {
    /// To configure: Kconfig files and scripts.
    Configuration,
    /// To build: all of it.
    Whole,
}

/// A source on the disk.
#[derive(Debug, Clone)]
pub struct Source {
    /// Names its content, where that cannot change: part of directories' names.
    pub id: String,
    /// The kernel's source directory.
    pub tree: PathBuf,
    /// Its version, as far as profiles care.
    pub version: KernelVersion,
    /// All of it: 6.1.192.
    pub release: String,
    /// As the user named it.
    pub spec: SourceSpec,
    /// The content cannot change; a directory of the user's can.
    pub is_fixed: bool,
}

/// Fetches and unpacks a source below `directory` where it is not there yet.
///
/// # Errors
/// [`BuildError::Kernel`] from apt, [`BuildError::Checksum`], [`BuildError::Failed`],
/// [`BuildError::Space`], [`BuildError::Source`].
pub fn fetch(
    directory: &Path,
    spec: &SourceSpec,
    scope: Scope,
    progress: Progress<'_>,
) -> Result<Source> {
    if let SourceSpec::Tree(path) = spec {
        let tree = fs::canonicalize(path).map_err(BuildError::file("find", path))?;
        let digest = files::sha256_hex(tree.as_os_str().as_encoded_bytes());
        return read(spec, tree, format!("tree-{}", &digest[..12]), false);
    }
    files::create_dir(directory)?;
    let _lock = files::lock(directory, progress)?;
    files::remove_partial(directory)?;
    match spec {
        SourceSpec::Debian(version) => debian(directory, spec, version, scope, progress),
        SourceSpec::Archive(path, sum) => archive(directory, spec, path, sum, scope, progress),
        SourceSpec::Git(url, reference) => git(directory, spec, url, reference, progress),
        SourceSpec::Tree(_) => Err(BuildError::Options("a tree is used in place".to_owned())),
    }
}

/// Looks at a source directory.
fn read(spec: &SourceSpec, tree: PathBuf, id: String, is_fixed: bool) -> Result<Source> {
    let refuse = |reason: &str| BuildError::Source {
        text: spec.to_string(),
        reason: reason.to_owned(),
    };
    let makefile = files::read_bounded(&tree.join("Makefile"), 1 << 20)
        .map_err(|_| refuse("it has no Makefile, so it is no kernel's source"))?;
    if !tree.join("Kconfig").is_file() || !tree.join("arch/x86/Kconfig").is_file() {
        return Err(refuse("it has no Kconfig, so it is no kernel's source"));
    }
    let text = String::from_utf8_lossy(&makefile);
    let number = |name: &str| {
        text.lines()
            .take(20)
            .find_map(|line| line.strip_prefix(name)?.trim_start().strip_prefix('='))
            .map(|value| value.trim().to_owned())
    };
    let parts: Option<Vec<String>> = ["VERSION", "PATCHLEVEL", "SUBLEVEL"]
        .iter()
        .map(|name| number(name))
        .collect();
    let release = parts
        .ok_or_else(|| refuse("its Makefile tells no version"))?
        .join(".");
    let version = release.parse().map_err(|reason: String| refuse(&reason))?;
    if tree
        .to_str()
        .is_none_or(|path| path.contains([' ', ':', '\n']))
    {
        return Err(refuse("make takes no path with a blank or a colon"));
    }
    Ok(Source {
        id,
        tree,
        version,
        release,
        spec: spec.clone(),
        is_fixed,
    })
}

/// The directory of a source: the whole one where it is there, else the one of this scope.
fn existing(directory: &Path, id: &str, scope: Scope) -> Option<PathBuf> {
    let whole = directory.join(id).join("linux");
    let part = directory.join(format!("{id}.config")).join("linux");
    if whole.is_dir() {
        Some(whole)
    } else {
        (scope == Scope::Configuration && part.is_dir()).then_some(part)
    }
}

fn debian(
    directory: &Path,
    spec: &SourceSpec,
    version: &str,
    scope: Scope,
    progress: Progress<'_>,
) -> Result<Source> {
    let package = format!("linux-source-{version}");
    let suite = DEBIAN
        .iter()
        .find(|(known, _)| *known == version)
        .map_or("sid", |(_, suite)| *suite);
    let there = |id: &str| existing(directory, id, scope);
    let offer = match newest_package(directory, suite, &package, &there, progress)? {
        Offer::There { id, tree } => return read(spec, tree, id, true),
        Offer::Fetch(offer) => offer,
    };
    if scope == Scope::Whole {
        super::check_space(
            directory,
            TREE_MB + PACKAGE_MB,
            "the source with its package",
        )?;
    }
    let fetched = offer.fetch(progress)?;
    progress(SetupEvent::start(SetupStage::Unpack, offer.id.clone()));
    let staging = files::partial_dir(directory)?;
    let archive = staging.path().join("source.tar.xz");
    let member = format!("./usr/src/{package}.tar.xz");
    extract_member(&fetched, &member, &archive)?;
    let tree = unpack(directory, staging.path(), &archive, &offer.id, scope)?;
    if scope == Scope::Whole {
        files::remove(&fetched)?;
    }
    read(spec, tree, offer.id, true)
}

/// What there is of a package of Debian's.
pub(crate) enum Offer {
    /// Its newest version is unpacked.
    There {
        /// Package and version.
        id: String,
        /// Where.
        tree: PathBuf,
    },
    /// It can be fetched.
    Fetch(Fetchable),
}

/// A package that can be fetched.
pub(crate) struct Fetchable {
    /// Package and version.
    pub(crate) id: String,
    apt: Apt,
    candidate: Candidate,
}

impl Fetchable {
    /// Fetches it; the file is the caller's to remove.
    pub(crate) fn fetch(&self, progress: Progress<'_>) -> Result<PathBuf> {
        Ok(self.apt.fetch_candidate(&self.candidate, progress)?.path)
    }
}

/// The newest version of a package in a suite; `there` tells where a version is unpacked.
///
/// Lists are fetched once a day. Without the network, what is there is used for ever.
pub(crate) fn newest_package(
    directory: &Path,
    suite: &str,
    package: &str,
    there: &dyn Fn(&str) -> Option<PathBuf>,
    progress: Progress<'_>,
) -> Result<Offer> {
    let apt_directory = directory.join("apt").join(suite);
    let apt = Apt::with_sources(&apt_directory, Architecture::X86_64, &apt_sources(suite))?;
    let mut known = apt.package(package);
    if (known.is_err() || !apt.lists_are_fresh())
        && let Err(error) = apt.update(progress)
    {
        return match newest(directory, package, there) {
            Some((id, tree)) => {
                tracing::warn!("{error}; {id} is used, which is there");
                Ok(Offer::There { id, tree })
            }
            None => Err(error.into()),
        };
    }
    if known.is_err() {
        known = apt.package(package);
    }
    let candidate = known?;
    let id = format!("{package}_{}", candidate.version().replace(':', "_"));
    Ok(match there(&id) {
        Some(tree) => Offer::There { id, tree },
        None => Offer::Fetch(Fetchable { id, apt, candidate }),
    })
}

/// The newest version of a package that is there.
fn newest(
    directory: &Path,
    package: &str,
    there: &dyn Fn(&str) -> Option<PathBuf>,
) -> Option<(String, PathBuf)> {
    let prefix = format!("{package}_");
    let mut found: Vec<_> = files::entries(directory)
        .ok()?
        .into_iter()
        .filter_map(|path| {
            let name = path.file_name()?.to_str()?;
            let id = name.strip_suffix(".config").unwrap_or(name);
            id.starts_with(&prefix).then(|| id.to_owned())
        })
        .filter_map(|id| {
            let tree = there(&id)?;
            let time = fs::metadata(&tree).ok()?.modified().ok()?;
            Some((time, id, tree))
        })
        .collect();
    found.sort();
    found.pop().map(|(_, id, tree)| (id, tree))
}

/// The directory that holds a source's tree, and what is kept beside it.
pub(crate) fn directory(source: &Source) -> Result<&Path> {
    source
        .tree
        .parent()
        .filter(|_| source.is_fixed)
        .ok_or_else(|| BuildError::Options(format!("{} is not changed", source.tree.display())))
}

fn apt_sources(suite: &str) -> String {
    let line = |archive: &str, suite: &str| {
        format!("deb [signed-by={KEYRING}] {MIRROR}/{archive} {suite} main contrib\n")
    };
    match suite {
        "sid" => line("debian", suite),
        _ => line("debian", suite) + &line("debian-security", &format!("{suite}-security")),
    }
}

/// Takes one file out of a Debian package.
fn extract_member(package: &Path, member: &str, target: &Path) -> Result<()> {
    let failed = |reason: String| BuildError::Failed {
        action: format!("unpacking {}", package.display()),
        reason,
        log: None,
    };
    let file = fs::File::create(target).map_err(BuildError::file("create", target))?;
    let mut reader = Command::new("dpkg-deb")
        .arg("--fsys-tarfile")
        .arg(package)
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .map_err(|error| failed(format!("cannot start dpkg-deb: {error}")))?;
    let tarfile = reader.stdout.take().map_or_else(Stdio::null, Stdio::from);
    let output = Command::new("tar")
        .args(["--extract", "--to-stdout", member])
        .stdin(tarfile)
        .stdout(file)
        .output();
    // dpkg-deb ends early where tar has found what it wants.
    let _ = reader.wait();
    let output = output.map_err(|error| failed(format!("cannot start tar: {error}")))?;
    match output.status.success() {
        true => Ok(()),
        false => Err(failed(super::process::first_error(
            &String::from_utf8_lossy(&output.stderr),
        ))),
    }
}

/// Unpacks an archive with one directory at its top.
fn unpack(
    directory: &Path,
    staging: &Path,
    archive: &Path,
    id: &str,
    scope: Scope,
) -> Result<PathBuf> {
    let linux = staging.join("new/linux");
    files::create_dir(&linux)?;
    let name = match scope {
        Scope::Whole => {
            super::check_space(directory, TREE_MB, "the unpacked source")?;
            id.to_owned()
        }
        Scope::Configuration => format!("{id}.config"),
    };
    let mut command = Command::new("tar");
    command
        .args([
            "--extract",
            "--no-same-owner",
            "--strip-components=1",
            "--file",
        ])
        .arg(archive)
        .arg("--directory")
        .arg(&linux);
    if scope == Scope::Configuration {
        command
            .args(CONFIGURATION_PARTS)
            .args(CONFIGURATION_PARTS_DEEP);
    }
    fetch_output("unpacking the kernel's source (tar)", &mut command)?;
    let target = directory.join(name);
    files::remove(&target)?;
    fs::rename(staging.join("new"), &target).map_err(BuildError::file("create", &target))?;
    Ok(target.join("linux"))
}

fn archive(
    directory: &Path,
    spec: &SourceSpec,
    path: &Path,
    sum: &str,
    scope: Scope,
    progress: Progress<'_>,
) -> Result<Source> {
    let id = format!("tar-{}", &sum[..16]);
    if let Some(tree) = existing(directory, &id, scope) {
        return read(spec, tree, id, true);
    }
    progress(SetupEvent::start(SetupStage::Verify, ""));
    let found = super::sha256_file(path)?;
    if found != sum {
        return Err(BuildError::Checksum {
            path: path.to_owned(),
            expected: sum.to_owned(),
            found,
        });
    }
    progress(SetupEvent::start(SetupStage::Unpack, id.clone()));
    let staging = files::partial_dir(directory)?;
    let tree = unpack(directory, staging.path(), path, &id, scope)?;
    read(spec, tree, id, true)
}

fn git(
    directory: &Path,
    spec: &SourceSpec,
    url: &str,
    reference: &str,
    progress: Progress<'_>,
) -> Result<Source> {
    let run = |action: &str, at: &Path, arguments: &[&str]| {
        let mut command = Command::new("git");
        command
            .arg("-C")
            .arg(at)
            .args(arguments)
            .env("LC_ALL", "C")
            .env("GIT_TERMINAL_PROMPT", "0")
            .stdin(Stdio::null());
        fetch_output(action, &mut command)
    };
    progress(SetupEvent::start(SetupStage::Download, url));
    let staging = files::partial_dir(directory)?;
    let repository = staging.path().join("new/linux");
    files::create_dir(&repository)?;
    run(
        "making a repository (git init)",
        &repository,
        &["init", "--quiet"],
    )?;
    run(
        "fetching the source (git fetch)",
        &repository,
        &["fetch", "--quiet", "--depth=1", "--", url, reference],
    )?;
    let commit = run(
        "reading the commit (git rev-parse)",
        &repository,
        &["rev-parse", "FETCH_HEAD"],
    )?;
    let commit = commit.trim();
    let id = format!("git-{}", commit.get(..16).unwrap_or(commit));
    if !is_name(&id) {
        return Err(BuildError::Source {
            text: spec.to_string(),
            reason: "git names no commit".to_owned(),
        });
    }
    if let Some(tree) = existing(directory, &id, Scope::Whole) {
        return read(spec, tree, id, true);
    }
    run(
        "checking the source out (git checkout)",
        &repository,
        &["checkout", "--quiet", "FETCH_HEAD"],
    )?;
    // Without it the release would tell of a repository that is not the kernel's own.
    files::remove(&repository.join(".git"))?;
    let target = directory.join(&id);
    files::remove(&target)?;
    fs::rename(staging.path().join("new"), &target).map_err(BuildError::file("create", &target))?;
    read(spec, target.join("linux"), id, true)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sources_are_read_as_they_are_shown() {
        let sum = "ab".repeat(32);
        for text in [
            "debian:6.12",
            "tree:/usr/src/linux",
            &format!("tar:linux.tar.xz#sha256={sum}"),
            "git:https://git.example/linux#v6.12",
        ] {
            assert_eq!(text.parse::<SourceSpec>().unwrap().to_string(), *text);
        }
        for text in [
            "",
            "6.1",
            "debian:5.10",
            "tar:linux.tar.xz",
            "tar:x#sha256=12",
            "git:u",
            "git:-u#x",
            "svn:x",
        ] {
            let message = text.parse::<SourceSpec>().unwrap_err().to_string();
            assert!(message.contains("is no source"), "{message}");
        }
    }
}
