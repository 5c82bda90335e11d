//! Licences and sources of the dependencies, against deny.toml.

use anyhow::Context;
use cargo_metadata::{Metadata, Package};
use spdx::{Expression, ParseMode};

use crate::policy::{POLICY_PATH, Policy};
use crate::report::Finding;

/// The only registry that dependencies come from, as cargo writes it.
const REGISTRY: &str = "registry+https://github.com/rust-lang/crates.io-index";

/// Checks every package of this platform.
pub(crate) fn check(metadata: &Metadata, policy: &Policy) -> anyhow::Result<Vec<Finding>> {
    let mut findings = Vec::new();
    for package in used_packages(metadata) {
        let source = package.source.as_ref().map(|source| source.repr.as_str());
        let licence = package.license.as_deref();
        let refused = refusal(&package.name, licence, source, policy)
            .with_context(|| format!("the licence of {}", package.name))?;
        findings.extend(refused.map(|message| {
            Finding::new(
                "Cargo.lock",
                0,
                format!("{} {}: {message}", package.name, package.version),
            )
        }));
    }
    findings.extend(unused_exceptions(metadata, policy));
    Ok(findings)
}

/// The packages that are compiled on this platform.
fn used_packages(metadata: &Metadata) -> impl Iterator<Item = &Package> {
    let resolved = metadata.resolve.as_ref();
    metadata.packages.iter().filter(move |package| {
        resolved.is_none_or(|resolve| resolve.nodes.iter().any(|node| node.id == package.id))
    })
}

/// Why a package is not allowed; none where it is.
fn refusal(
    name: &str,
    licence: Option<&str>,
    source: Option<&str>,
    policy: &Policy,
) -> anyhow::Result<Option<String>> {
    match source {
        None | Some(REGISTRY) => {}
        Some(other) => return Ok(Some(format!("it comes from {other}, not from crates.io"))),
    }
    let Some(licence) = licence else {
        return Ok(Some("it names no licence".to_owned()));
    };
    // Lax: old manifests write "MIT/Apache-2.0".
    let expression = Expression::parse_mode(licence, ParseMode::LAX)
        .map_err(|error| anyhow::anyhow!("'{licence}': {}", error.reason))?;
    let exceptions = policy
        .licenses
        .exceptions
        .iter()
        .filter(|exception| exception.package == name)
        .flat_map(|exception| &exception.allow);
    let allowed: Vec<&String> = policy.licenses.allow.iter().chain(exceptions).collect();
    let fits = expression.evaluate(|requirement| {
        let wanted = requirement.to_string();
        allowed.iter().any(|allowed| **allowed == wanted)
    });
    Ok((!fits).then(|| format!("its licence '{licence}' is not allowed by {POLICY_PATH}")))
}

/// An exception for a crate that is gone hides the next one of that name.
fn unused_exceptions<'a>(
    metadata: &'a Metadata,
    policy: &'a Policy,
) -> impl Iterator<Item = Finding> + 'a {
    policy
        .licenses
        .exceptions
        .iter()
        .filter(|exception| {
            !metadata
                .packages
                .iter()
                .any(|package| package.name.as_str() == exception.package)
        })
        .map(|exception| {
            let message = format!(
                "the exception for {} is not needed any more",
                exception.package
            );
            Finding::new(POLICY_PATH, 0, message)
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(name: &str, licence: Option<&str>, source: Option<&str>) -> Option<String> {
        let policy = Policy::parse(
            "[licenses]\nallow = ['MIT', 'Apache-2.0', 'Apache-2.0 WITH LLVM-exception']\n\
             exceptions = [{ crate = 'odd', allow = ['bzip2-1.0.6'] }]\n[advisories]\n",
        )
        .unwrap();
        refusal(name, licence, source, &policy).unwrap()
    }

    #[test]
    fn expressions_are_evaluated() {
        for licence in [
            "MIT",
            "MIT/Apache-2.0",
            "GPL-3.0-only OR MIT",
            "Apache-2.0 WITH LLVM-exception OR GPL-2.0-only",
            "(MIT OR GPL-3.0-only) AND Apache-2.0",
        ] {
            assert_eq!(
                refused("a", Some(licence), Some(REGISTRY)),
                None,
                "{licence}"
            );
        }
        for licence in ["GPL-3.0-only", "MIT AND GPL-3.0-only", "bzip2-1.0.6"] {
            assert!(
                refused("a", Some(licence), Some(REGISTRY)).is_some(),
                "{licence}"
            );
        }
        assert_eq!(refused("odd", Some("bzip2-1.0.6"), Some(REGISTRY)), None);
    }

    #[test]
    fn a_licence_and_the_usual_registry_are_needed() {
        assert!(refused("a", None, Some(REGISTRY)).is_some());
        assert!(refused("a", Some("MIT"), Some("git+https://registry.example/a")).is_some());
        assert_eq!(refused("a", Some("MIT"), None), None);
    }
}
