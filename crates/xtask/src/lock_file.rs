//! The packages in a Cargo.lock, of all platforms.

use std::path::Path;

use anyhow::Context;
use semver::Version;
use serde::Deserialize;

/// A locked package.
#[derive(Debug, Deserialize)]
pub(crate) struct LockedPackage {
    pub(crate) name: String,
    pub(crate) version: Version,
    /// Absent for the workspace's own.
    pub(crate) source: Option<String>,
}

#[derive(Deserialize)]
struct LockFile {
    package: Vec<LockedPackage>,
}

/// Reads `root`/`path`.
pub(crate) fn read(root: &Path, path: &str) -> anyhow::Result<Vec<LockedPackage>> {
    let text =
        std::fs::read_to_string(root.join(path)).with_context(|| format!("cannot read {path}"))?;
    parse(&text).with_context(|| format!("{path} is not understood"))
}

pub(crate) fn parse(text: &str) -> anyhow::Result<Vec<LockedPackage>> {
    let file: LockFile = toml::from_str(text)?;
    Ok(file
        .package
        .into_iter()
        .filter(|package| package.source.is_some())
        .collect())
}
