//! Debian's cloud kernel package, fetched with apt as any user.
//!
//! apt runs with the host's sources, keyrings and proxies, but with state, lists and cache in a
//! directory of ours, so nothing of the host's is read for writing and no privilege is needed. apt
//! verifies signatures and checksums; an unauthenticated package is refused. The host's own lists are
//! tried first, because fetching lists takes longer than fetching the kernel.

use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, SystemTime};

use crate::files;
use crate::progress::{Progress, SetupEvent, SetupStage};
use crate::vmlinux::Architecture;
use crate::{KernelError, Result};

/// Lists of an unfinished setup that are younger are used again.
const LISTS_FRESH: Duration = Duration::from_secs(24 * 60 * 60);
/// The host's own lists, as apt calls the directory.
const HOST_LISTS: &str = "/var/lib/apt/lists";
/// Options of the host that are not taken over: hooks, and where the host keeps its state.
const HOST_OPTIONS_LEFT_OUT: [&str; 6] = [
    "APT::Update",
    "APT::Sandbox",
    "APT::Architecture",
    "DPkg",
    "Dir::State",
    "Dir::Cache",
];

/// A fetched package.
#[derive(Debug)]
pub(crate) struct FetchedPackage {
    /// The .deb file.
    pub(crate) path: PathBuf,
    /// `name version`.
    pub(crate) description: String,
}

/// Fetches the newest kernel package for `architecture` into `directory`, which is kept between
/// attempts and removed by the caller after success.
///
/// `newest` fetches lists even where the host has some.
pub(crate) fn fetch(
    directory: &Path,
    architecture: Architecture,
    newest: bool,
    progress: Progress<'_>,
) -> Result<FetchedPackage> {
    let apt = Apt::prepare(directory, architecture)?;
    if !newest && Some(architecture) == Architecture::host() {
        match apt.fetch_newest(Lists::Host, progress) {
            Ok(Some(fetched)) => return Ok(fetched),
            Ok(None) => {}
            // The archive drops a version when a newer one comes: the host's lists are old.
            Err(KernelError::ProgramFailed { output, .. }) => {
                tracing::debug!(%output, "the host's package lists do not do");
            }
            Err(error) => return Err(error),
        }
    }
    let update_failure = match apt.lists_are_fresh() {
        true => None,
        false => apt.update(progress).err(),
    };
    match (apt.fetch_newest(Lists::Own, progress)?, update_failure) {
        // One unreachable source among several does not matter as long as the kernel's answers.
        (Some(fetched), _) => Ok(fetched),
        (None, Some(failure)) => Err(failure),
        (None, None) => Err(KernelError::NoPackage {
            package: apt.meta_package(),
        }),
    }
}

/// Whose package lists apt reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Lists {
    Host,
    Own,
}

/// A package that apt can download.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Candidate {
    name: String,
    version: String,
    size_bytes: u64,
}

impl Candidate {
    /// Its version.
    pub(crate) fn version(&self) -> &str {
        &self.version
    }
}

/// apt with directories of its own.
pub(crate) struct Apt {
    /// Sources in place of the host's.
    sources: Option<PathBuf>,
    directory: PathBuf,
    architecture: Architecture,
}

impl Apt {
    /// Lays out the directories and writes the configuration for both kinds of lists.
    fn prepare(directory: &Path, architecture: Architecture) -> Result<Self> {
        Self::lay_out(Self {
            sources: None,
            directory: directory.to_owned(),
            architecture,
        })
    }

    /// With sources of its own (sources.list(5)), not the host's; what is in `directory` is used again.
    pub(crate) fn with_sources(
        directory: &Path,
        architecture: Architecture,
        sources: &str,
    ) -> Result<Self> {
        files::create_dir(directory)?;
        let path = directory.join("sources.list");
        fs::write(&path, sources).map_err(KernelError::file("write", &path))?;
        Self::lay_out(Self {
            sources: Some(path),
            directory: directory.to_owned(),
            architecture,
        })
    }

    /// The newest version of a package.
    pub(crate) fn package(&self, name: &str) -> Result<Candidate> {
        let missing = || KernelError::NoPackage {
            package: name.to_owned(),
        };
        let record = self.show(Lists::Own, name)?.ok_or_else(missing)?;
        let version = field(&record, "Version").ok_or_else(missing)?;
        let size = field(&record, "Size").and_then(|size| size.parse().ok());
        Ok(Candidate {
            name: name.to_owned(),
            version: version.to_owned(),
            size_bytes: size.unwrap_or(0),
        })
    }

    /// Downloads a package that [`Apt::package`] found.
    pub(crate) fn fetch_candidate(
        &self,
        candidate: &Candidate,
        progress: Progress<'_>,
    ) -> Result<FetchedPackage> {
        self.download(Lists::Own, candidate, progress)
    }

    fn lay_out(apt: Self) -> Result<Self> {
        let directory = &apt.directory;
        for name in ["lists/partial", "cache/archives/partial", "packages"] {
            files::create_dir(&directory.join(name))?;
        }
        let status = directory.join("status");
        fs::write(&status, "").map_err(KernelError::file("write", &status))?;
        let host = apt.host_configuration()?;
        for lists in [Lists::Host, Lists::Own] {
            let path = apt.configuration_path(lists);
            let text = format!("{host}{}", apt.own_configuration(lists));
            fs::write(&path, text).map_err(KernelError::file("write", &path))?;
        }
        Ok(apt)
    }

    fn configuration_path(&self, lists: Lists) -> PathBuf {
        self.directory.join(match lists {
            Lists::Host => "host-lists.conf",
            Lists::Own => "own-lists.conf",
        })
    }

    /// The host's options, less those that point at its state or start its hooks.
    fn host_configuration(&self) -> Result<String> {
        let dump = self.run(
            "reading apt's configuration (apt-config)",
            "apt-config",
            None,
            &["dump"],
        )?;
        Ok(dump
            .lines()
            .filter(|line| {
                !HOST_OPTIONS_LEFT_OUT
                    .iter()
                    .any(|name| line.starts_with(name))
            })
            .map(|line| format!("{line}\n"))
            .collect())
    }

    fn own_configuration(&self, lists: Lists) -> String {
        let directory = self.directory.display();
        let lists = match lists {
            Lists::Host => HOST_LISTS.to_owned(),
            Lists::Own => format!("{directory}/lists"),
        };
        let architecture = self.architecture.debian_name();
        let sources = self.sources.as_ref().map_or(String::new(), |path| {
            format!(
                "Dir::Etc::sourcelist \"{}\";\nDir::Etc::sourceparts \"/dev/null\";\n",
                path.display()
            )
        });
        // Dir::Etc::main and parts: the host's files are in this one already. Sandbox::User: the
        // sandbox user may not enter our directory, and without root there is no other user anyway.
        // Error-Mode: a source that does not answer is an error to tell, not a list that is empty.
        format!(
            "Dir::Etc::main \"/dev/null\";\n\
             Dir::Etc::parts \"/dev/null\";\n\
             {sources}\
             Dir::State \"{directory}\";\n\
             Dir::State::lists \"{lists}\";\n\
             Dir::State::status \"{directory}/status\";\n\
             Dir::Cache \"{directory}/cache\";\n\
             Dir::Cache::archives \"{directory}/cache/archives\";\n\
             Dir::Log \"{directory}\";\n\
             APT::Architecture \"{architecture}\";\n\
             APT::Architectures {{ \"{architecture}\"; }};\n\
             APT::Sandbox::User \"root\";\n\
             APT::Get::AllowUnauthenticated \"false\";\n\
             APT::Status-Fd \"1\";\n\
             APT::Update::Error-Mode \"any\";\n\
             Acquire::Languages \"none\";\n\
             Acquire::IndexTargets::deb::DEP-11::DefaultEnabled \"false\";\n"
        )
    }

    /// The package that names the newest kernel by its dependency.
    fn meta_package(&self) -> String {
        format!("linux-image-cloud-{}", self.architecture.debian_name())
    }

    /// Downloads the newest kernel that the lists have, where they have one.
    fn fetch_newest(&self, lists: Lists, progress: Progress<'_>) -> Result<Option<FetchedPackage>> {
        match self.candidate(lists)? {
            Some(candidate) => self.download(lists, &candidate, progress).map(Some),
            None => Ok(None),
        }
    }

    pub(crate) fn lists_are_fresh(&self) -> bool {
        fs::metadata(self.directory.join("updated"))
            .and_then(|metadata| metadata.modified())
            .is_ok_and(|time| {
                SystemTime::now()
                    .duration_since(time)
                    .is_ok_and(|age| age < LISTS_FRESH)
            })
    }

    pub(crate) fn update(&self, progress: Progress<'_>) -> Result<()> {
        progress(SetupEvent {
            total: Some(100),
            ..SetupEvent::start(SetupStage::Lists, "")
        });
        let mut report = |percent: f64| {
            progress(SetupEvent {
                stage: SetupStage::Lists,
                done: percent as u64,
                total: Some(100),
                detail: String::new(),
            });
        };
        self.run_with_progress(
            "fetching package lists (apt-get update)",
            Lists::Own,
            &["update"],
            &self.directory,
            &mut report,
        )?;
        let stamp = self.directory.join("updated");
        fs::write(&stamp, "").map_err(KernelError::file("write", &stamp))
    }

    /// The kernel package that the meta package depends on, where the lists have both.
    fn candidate(&self, lists: Lists) -> Result<Option<Candidate>> {
        let Some(meta) = self.show(lists, &self.meta_package())? else {
            return Ok(None);
        };
        let Some((name, version)) = field(&meta, "Depends").and_then(parse_dependency) else {
            return Ok(None);
        };
        let query = match &version {
            Some(version) => format!("{name}={version}"),
            None => name.clone(),
        };
        let Some(record) = self.show(lists, &query)? else {
            return Ok(None);
        };
        let version = version.or_else(|| field(&record, "Version").map(str::to_owned));
        let size_bytes = field(&record, "Size").and_then(|size| size.parse().ok());
        Ok(version.map(|version| Candidate {
            name,
            version,
            size_bytes: size_bytes.unwrap_or(0),
        }))
    }

    /// The record of a package; none where the lists do not have it.
    fn show(&self, lists: Lists, package: &str) -> Result<Option<String>> {
        let arguments = ["show", "--no-all-versions", package];
        match self.run(
            "reading package lists (apt-cache)",
            "apt-cache",
            Some(lists),
            &arguments,
        ) {
            Ok(record) if record.trim().is_empty() => Ok(None),
            Ok(record) => Ok(Some(record)),
            Err(KernelError::ProgramFailed { output, .. })
                if output.contains("No packages found") =>
            {
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }

    fn download(
        &self,
        lists: Lists,
        candidate: &Candidate,
        progress: Progress<'_>,
    ) -> Result<FetchedPackage> {
        let total = Some(candidate.size_bytes).filter(|size| *size > 0);
        let description = format!("{} {}", candidate.name, candidate.version);
        let mut report = |percent: f64| {
            progress(SetupEvent {
                stage: SetupStage::Download,
                done: (candidate.size_bytes as f64 * percent / 100.0) as u64,
                total,
                detail: description.clone(),
            });
        };
        report(0.0);
        let packages = self.directory.join("packages");
        let query = format!("{}={}", candidate.name, candidate.version);
        self.run_with_progress(
            &format!("fetching {} (apt-get download)", candidate.name),
            lists,
            &["download", &query],
            &packages,
            &mut report,
        )?;
        let prefix = format!("{}_", candidate.name);
        let is_package = |path: &PathBuf| {
            path.extension().is_some_and(|extension| extension == "deb")
                && path
                    .file_name()
                    .is_some_and(|name| name.as_encoded_bytes().starts_with(prefix.as_bytes()))
        };
        match files::entries(&packages)?.into_iter().find(is_package) {
            Some(path) => Ok(FetchedPackage { path, description }),
            None => Err(KernelError::NoPackage {
                package: candidate.name.clone(),
            }),
        }
    }

    fn command(&self, program: &'static str, lists: Option<Lists>) -> Command {
        let mut command = Command::new(program);
        // The program's words are parsed, and shown in errors.
        command.env("LC_ALL", "C").stdin(Stdio::null());
        if let Some(lists) = lists {
            command.env("APT_CONFIG", self.configuration_path(lists));
        }
        command
    }

    /// Runs a program to its end and returns what it wrote.
    fn run(
        &self,
        action: &str,
        program: &'static str,
        lists: Option<Lists>,
        arguments: &[&str],
    ) -> Result<String> {
        let output = self
            .command(program, lists)
            .args(arguments)
            .output()
            .map_err(|source| KernelError::Program { program, source })?;
        if output.status.success() {
            Ok(String::from_utf8_lossy(&output.stdout).into_owned())
        } else {
            Err(failure(action, &String::from_utf8_lossy(&output.stderr)))
        }
    }

    /// Runs apt-get and reports the percentages of its status lines.
    fn run_with_progress(
        &self,
        action: &str,
        lists: Lists,
        arguments: &[&str],
        working_directory: &Path,
        report: &mut dyn FnMut(f64),
    ) -> Result<()> {
        let program = "apt-get";
        let stderr_path = self.directory.join("apt-get.stderr");
        let stderr =
            File::create(&stderr_path).map_err(KernelError::file("create", &stderr_path))?;
        let mut child = self
            .command(program, Some(lists))
            .arg("--quiet")
            .args(arguments)
            .current_dir(working_directory)
            .stdout(Stdio::piped())
            .stderr(stderr)
            .spawn()
            .map_err(|source| KernelError::Program { program, source })?;
        if let Some(stdout) = child.stdout.take() {
            let lines = BufReader::new(stdout).lines();
            for percent in lines
                .map_while(std::result::Result::ok)
                .filter_map(|line| status_percent(&line))
            {
                report(percent);
            }
        }
        let status = child
            .wait()
            .map_err(|source| KernelError::Program { program, source })?;
        if status.success() {
            return Ok(());
        }
        let said = fs::read(&stderr_path).unwrap_or_default();
        Err(failure(action, &String::from_utf8_lossy(&said)))
    }
}

/// The last errors among the lines a program wrote, or its last line.
fn failure(action: &str, said: &str) -> KernelError {
    const LINES_MAX: usize = 3;
    let errors: Vec<&str> = said.lines().filter(|line| line.starts_with("E:")).collect();
    let output = match errors.as_slice() {
        [] => said
            .lines()
            .rfind(|line| !line.trim().is_empty())
            .unwrap_or("it gave no reason")
            .to_owned(),
        [.., _] => {
            let shown = &errors[errors.len().saturating_sub(LINES_MAX)..];
            let texts: Vec<&str> = shown
                .iter()
                .map(|line| line.trim_start_matches("E:").trim())
                .collect();
            texts.join("; ")
        }
    };
    KernelError::ProgramFailed {
        action: action.to_owned(),
        output,
    }
}

/// Percentage in a line `dlstatus:FILE:PERCENT:TEXT` (apt's README.progress-reporting).
fn status_percent(line: &str) -> Option<f64> {
    let percent: f64 = line
        .strip_prefix("dlstatus:")?
        .split(':')
        .nth(1)?
        .parse()
        .ok()?;
    percent.is_finite().then(|| percent.clamp(0.0, 100.0))
}

/// The value of a field of a package's record, where it is on one line.
fn field<'a>(record: &'a str, name: &str) -> Option<&'a str> {
    record
        .lines()
        .take_while(|line| !line.is_empty())
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))
        .map(str::trim)
}

/// Name and exact version of the kernel in `linux-image-6.1.0-56-cloud-amd64 (= 6.1.192-2), ...`.
fn parse_dependency(depends: &str) -> Option<(String, Option<String>)> {
    let dependency = depends
        .split(',')
        .map(str::trim)
        .find(|dependency| dependency.starts_with("linux-image-"))?;
    let (name, relation) = match dependency.split_once(' ') {
        None => (dependency, None),
        Some((name, relation)) => (name, Some(relation)),
    };
    let version = relation
        .and_then(|relation| relation.trim().strip_prefix("(="))
        .and_then(|rest| rest.strip_suffix(')'))
        .map(|version| version.trim().to_owned());
    // These become arguments of apt.
    let plain = |text: &str| {
        text.bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || b"+-.:~".contains(&byte))
    };
    (plain(name) && version.as_deref().is_none_or(plain)).then(|| (name.to_owned(), version))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_dependency_names_package_and_version() {
        assert_eq!(
            parse_dependency("linux-image-6.1.0-56-cloud-amd64 (= 6.1.192-2)"),
            Some((
                "linux-image-6.1.0-56-cloud-amd64".to_owned(),
                Some("6.1.192-2".to_owned())
            ))
        );
        assert_eq!(
            parse_dependency("linux-base, linux-image-6.1.0-56-cloud-amd64"),
            Some(("linux-image-6.1.0-56-cloud-amd64".to_owned(), None))
        );
        assert_eq!(parse_dependency("linux-base (= 1)"), None);
        assert_eq!(parse_dependency("linux-image-x (= 1;rm)"), None);
    }

    #[test]
    fn a_field_is_found_in_the_first_record_only() {
        let record = "Package: a\nVersion: 1\n\nPackage: b\nSize: 9\n";
        assert_eq!(field(record, "Version"), Some("1"));
        assert_eq!(field(record, "Size"), None);
    }

    #[test]
    fn status_lines_give_percentages() {
        assert_eq!(
            status_percent("dlstatus:1:12.5:Retrieving file"),
            Some(12.5)
        );
        assert_eq!(status_percent("dlstatus:1:900:x"), Some(100.0));
        for line in ["", "Get:1 x", "dlstatus:1:nan:x", "dlstatus:1"] {
            assert_eq!(status_percent(line), None, "{line}");
        }
    }

    #[test]
    fn the_errors_of_apt_are_told_and_not_its_warnings() {
        let said = "W: old\nE: first\nE: second\nnoise\n";
        let error = failure("fetching (apt-get update)", said).to_string();
        assert_eq!(error, "fetching (apt-get update) failed: first; second");
        let error = failure("x", "only this\n\n").to_string();
        assert_eq!(error, "x failed: only this");
    }
}
