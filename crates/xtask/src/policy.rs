//! The part of deny.toml that is checked here. The format is cargo-deny's own.

use std::path::Path;

use anyhow::Context;
use serde::Deserialize;

/// Name of the file below the workspace.
pub(crate) const POLICY_PATH: &str = "deny.toml";

/// deny.toml; sections that only cargo-deny reads are passed over.
#[derive(Debug, Deserialize)]
pub(crate) struct Policy {
    pub(crate) licenses: Licenses,
    pub(crate) advisories: Advisories,
}

#[derive(Debug, Deserialize)]
pub(crate) struct Licenses {
    /// SPDX identifiers.
    pub(crate) allow: Vec<String>,
    #[serde(default)]
    pub(crate) exceptions: Vec<Exception>,
}

/// Licences that one crate may have.
#[derive(Debug, Deserialize)]
pub(crate) struct Exception {
    #[serde(rename = "crate")]
    pub(crate) package: String,
    pub(crate) allow: Vec<String>,
}

#[derive(Debug, Deserialize)]
pub(crate) struct Advisories {
    #[serde(default)]
    pub(crate) ignore: Vec<Ignored>,
}

/// An advisory that does not concern us.
#[derive(Debug, Deserialize)]
pub(crate) struct Ignored {
    pub(crate) id: String,
    /// Why; an entry without a reason does not parse.
    #[allow(dead_code, reason = "its presence is what is checked")]
    reason: String,
}

impl Policy {
    pub(crate) fn read(root: &Path) -> anyhow::Result<Self> {
        let path = root.join(POLICY_PATH);
        let text = std::fs::read_to_string(&path)
            .with_context(|| format!("cannot read {}", path.display()))?;
        Self::parse(&text)
    }

    pub(crate) fn parse(text: &str) -> anyhow::Result<Self> {
        toml::from_str(text).context("deny.toml is not understood")
    }
}
