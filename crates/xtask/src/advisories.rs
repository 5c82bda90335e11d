//! Known vulnerabilities of dependencies.
//!
//! A copy of the facts in RustSec's advisory database lies in the repository, so that the check needs
//! no network: identifier, crate, kind and versions of every advisory that was not withdrawn. The
//! `update-advisories` command writes it anew.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use semver::{Version, VersionReq};
use serde::Deserialize;

use crate::lock_file::LockedPackage;
use crate::policy::Policy;
use crate::report::Finding;

/// The copy, below the workspace.
const LIST_PATH: &str = "crates/xtask/data/advisories.toml";

/// One advisory.
#[derive(Debug, Deserialize)]
pub(crate) struct Advisory {
    id: String,
    #[serde(rename = "crate")]
    package: String,
    /// `vulnerability`, or what RustSec calls informational: `unsound`, `unmaintained`, `notice`.
    kind: String,
    #[serde(default)]
    patched: Vec<VersionReq>,
    #[serde(default)]
    unaffected: Vec<VersionReq>,
}

#[derive(Deserialize)]
struct List {
    advisory: Vec<Advisory>,
}

impl Advisory {
    /// RustSec's rule: affected unless patched or unaffected.
    fn affects(&self, version: &Version) -> bool {
        !self
            .patched
            .iter()
            .chain(&self.unaffected)
            .any(|requirement| matches(requirement, version))
    }
}

/// A pre-release is compared by its number alone, so that it is never taken for patched by accident
/// of Cargo's rule that requirements without a pre-release match none.
fn matches(requirement: &VersionReq, version: &Version) -> bool {
    let plain = Version::new(version.major, version.minor, version.patch);
    requirement.matches(&plain)
}

/// Reads the copy.
pub(crate) fn read(root: &Path) -> anyhow::Result<Vec<Advisory>> {
    let text = std::fs::read_to_string(root.join(LIST_PATH))
        .with_context(|| format!("cannot read {LIST_PATH}"))?;
    parse(&text)
}

fn parse(text: &str) -> anyhow::Result<Vec<Advisory>> {
    let list: List =
        toml::from_str(text).with_context(|| format!("{LIST_PATH} is not understood"))?;
    Ok(list.advisory)
}

/// Compares locked packages with the advisories.
pub(crate) fn check(
    advisories: &[Advisory],
    packages: &[LockedPackage],
    policy: &Policy,
    lock_file: &str,
) -> Vec<Finding> {
    let ignored = |id: &str| policy.advisories.ignore.iter().any(|entry| entry.id == id);
    packages
        .iter()
        .flat_map(|package| {
            advisories
                .iter()
                .filter(|advisory| {
                    advisory.package == package.name && advisory.affects(&package.version)
                })
                .filter(|advisory| !ignored(&advisory.id))
                .map(|advisory| {
                    let patched: Vec<String> =
                        advisory.patched.iter().map(ToString::to_string).collect();
                    let remedy = match patched.as_slice() {
                        [] => "no version is patched".to_owned(),
                        versions => format!("patched: {}", versions.join(" or ")),
                    };
                    let message = format!(
                        "{} {} has {} ({}); {remedy}",
                        package.name, package.version, advisory.id, advisory.kind
                    );
                    Finding::new(lock_file, 0, message)
                })
        })
        .collect()
}

/// The front matter of an advisory in RustSec's repository.
#[derive(Deserialize)]
struct Source {
    advisory: SourceAdvisory,
    versions: SourceVersions,
}

#[derive(Deserialize)]
struct SourceAdvisory {
    id: String,
    package: String,
    informational: Option<String>,
    withdrawn: Option<String>,
}

#[derive(Deserialize)]
struct SourceVersions {
    #[serde(default)]
    patched: Vec<String>,
    #[serde(default)]
    unaffected: Vec<String>,
}

/// Writes the copy out of a checkout of the database, and returns the number of advisories.
pub(crate) fn update(root: &Path, database: &Path) -> anyhow::Result<usize> {
    let mut lines = Vec::new();
    for path in advisory_files(database)? {
        let text = std::fs::read_to_string(&path)
            .with_context(|| format!("cannot read {}", path.display()))?;
        lines.extend(entry(&text).with_context(|| path.display().to_string())?);
    }
    if lines.is_empty() {
        bail!(
            "{} holds no advisories: is it a checkout of advisory-db?",
            database.display()
        );
    }
    lines.sort();
    let mut text = String::from(
        "# Facts of RustSec's advisory database (https://rustsec.org), public domain (CC0-1.0); written by\n\
         # 'cargo xtask update-advisories DIR'. An advisory that does not concern us goes into deny.toml.\n\
         advisory = [\n",
    );
    for line in &lines {
        writeln!(text, "  {line},")?;
    }
    text.push_str("]\n");
    parse(&text)?;
    std::fs::write(root.join(LIST_PATH), text)
        .with_context(|| format!("cannot write {LIST_PATH}"))?;
    Ok(lines.len())
}

fn advisory_files(database: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    let crates = database.join("crates");
    let entries =
        std::fs::read_dir(&crates).with_context(|| format!("cannot read {}", crates.display()))?;
    for directory in entries {
        for file in std::fs::read_dir(directory?.path())? {
            files.push(file?.path());
        }
    }
    files.retain(|path| path.extension().is_some_and(|extension| extension == "md"));
    Ok(files)
}

/// One line of the copy; none for a withdrawn advisory.
fn entry(text: &str) -> anyhow::Result<Option<String>> {
    let front_matter = text
        .strip_prefix("```toml\n")
        .and_then(|rest| rest.split_once("\n```"))
        .map(|(front_matter, _)| front_matter)
        .context("it does not begin with a TOML block")?;
    let source: Source = toml::from_str(front_matter)?;
    let advisory = source.advisory;
    if advisory.withdrawn.is_some() {
        return Ok(None);
    }
    let kind = advisory
        .informational
        .unwrap_or_else(|| "vulnerability".to_owned());
    let mut line = format!(
        "{{ crate = {:?}, id = {:?}, kind = {kind:?}",
        advisory.package, advisory.id
    );
    for (name, versions) in [
        ("patched", source.versions.patched),
        ("unaffected", source.versions.unaffected),
    ] {
        if !versions.is_empty() {
            write!(line, ", {name} = {versions:?}")?;
        }
    }
    line.push_str(" }");
    Ok(Some(line))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lock_file;

    const SOURCE: &str = "```toml\n[advisory]\nid = \"RUSTSEC-2025-0001\"\npackage = \"leaky\"\n\
        date = \"2025-01-01\"\n\n[versions]\npatched = [\">= 1.2.3\", \">= 1.1.5, < 1.2.0\"]\n\
        unaffected = [\"< 1.0.0\"]\n```\n\n# It leaks\n";
    const LOCK: &str = "version = 4\n[[package]]\nname = \"leaky\"\nversion = \"VERSION\"\n\
        source = \"registry+https://github.com/rust-lang/crates.io-index\"\n\
        [[package]]\nname = \"own\"\nversion = \"0.1.0\"\n";

    fn findings(version: &str, ignore: &str) -> Vec<Finding> {
        let line = entry(SOURCE).unwrap().unwrap();
        let list = parse(&format!("advisory = [\n  {line},\n]\n")).unwrap();
        let packages = lock_file::parse(&LOCK.replace("VERSION", version)).unwrap();
        let text = format!("[licenses]\nallow = []\n[advisories]\nignore = [{ignore}]\n");
        check(
            &list,
            &packages,
            &Policy::parse(&text).unwrap(),
            "Cargo.lock",
        )
    }

    #[test]
    fn affected_versions_are_found_and_others_are_not() {
        for version in ["1.0.0", "1.1.4", "1.2.0", "1.2.2", "1.2.0-alpha.1"] {
            let found = findings(version, "");
            assert_eq!(found.len(), 1, "{version}");
            assert!(found[0].to_string().contains("RUSTSEC-2025-0001"));
        }
        for version in ["0.9.9", "1.1.5", "1.1.9", "1.2.3", "2.0.0"] {
            assert_eq!(findings(version, ""), [], "{version}");
        }
    }

    #[test]
    fn an_advisory_can_be_ignored_with_a_reason_only() {
        let ignore = "{ id = 'RUSTSEC-2025-0001', reason = 'not called' }";
        assert_eq!(findings("1.0.0", ignore), []);
        let without =
            "[licenses]\nallow = []\n[advisories]\nignore = [{ id = 'RUSTSEC-2025-0001' }]\n";
        assert!(Policy::parse(without).is_err());
    }

    #[test]
    fn withdrawn_advisories_are_left_out() {
        let withdrawn = SOURCE.replace("date =", "withdrawn = \"2025-02-02\"\ndate =");
        assert_eq!(entry(&withdrawn).unwrap(), None);
        assert!(entry("no advisory").is_err());
    }

    #[test]
    fn the_copy_in_the_repository_is_understood() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR"))
            .ancestors()
            .nth(2)
            .unwrap();
        let list = read(root).unwrap();
        // An old, well-known one: RustSec never drops them.
        let known = list
            .iter()
            .find(|advisory| advisory.id == "RUSTSEC-2020-0071")
            .unwrap();
        assert_eq!(known.package, "time");
        assert!(known.affects(&Version::new(0, 2, 22)) && !known.affects(&Version::new(0, 3, 0)));
    }
}
