//! Which crate may depend on which: the rule of ARCHITECTURE.md.

use cargo_metadata::{DependencyKind, Metadata, Package};

use crate::report::Finding;

/// What everything may depend on, each only on those before it.
const BASE: [&str; 3] = ["fcvm-types", "fcvm-wire", "fcvm-process"];
/// Each depends on the base, never on another one.
const ENGINES: [&str; 8] = [
    "blockpool",
    "blockpool-fuse",
    "fcvm-hypervisor",
    "fcvm-image",
    "fcvm-kernel",
    "fcvm-memory",
    "fcvm-network",
    "fcvm-storage",
];
/// What is kept of several engines at once, and the engines that it is over.
const KEEPER: (&str, [&str; 2]) = ("fcvm-snapshot", ["fcvm-memory", "fcvm-storage"]);
/// The composer: sees all of the above.
const COMPOSER: &str = "fcvm";
/// The guest's side: sees data types and protocol, never what runs on the host.
const AGENT: &str = "fc-agent";
/// What tests share, and only they.
const TESTING: &str = "fcvm-testing";
/// Tools of the project, which the product never sees: they may look at engines.
const TOOLS: [&str; 3] = ["fcvm-bench", "reference-schemes", "xtask"];

/// Libraries that only some crates may use.
const RESTRICTED: [(&str, &[&str]); 5] = [
    ("clap", &["fcvm"]),
    ("clap_complete", &["fcvm"]),
    ("clap_mangen", &["fcvm"]),
    ("anyhow", &["fcvm", "fc-agent", "fcvm-bench", "xtask"]),
    ("indicatif", &["fcvm"]),
];

/// A dependency, as far as the rule sees it.
#[derive(Debug, Clone, Copy)]
struct Edge<'a> {
    from: &'a str,
    to: &'a str,
    /// Only tests have it.
    development: bool,
}

/// Checks all members of the workspace.
pub(crate) fn check(metadata: &Metadata) -> Vec<Finding> {
    let members = metadata.workspace_packages();
    let names: Vec<&str> = members
        .iter()
        .map(|package| package.name.as_str())
        .collect();
    members
        .iter()
        .flat_map(|package| check_package(package, &names, metadata))
        .collect()
}

fn check_package(package: &Package, members: &[&str], metadata: &Metadata) -> Vec<Finding> {
    let path = package
        .manifest_path
        .strip_prefix(&metadata.workspace_root)
        .unwrap_or(&package.manifest_path)
        .to_string();
    let manifest = std::fs::read_to_string(&package.manifest_path).unwrap_or_default();
    if !is_known(&package.name) {
        let message = "the dependency rule does not know this crate: give it its place in crates/xtask/src/dependencies.rs and in ARCHITECTURE.md";
        return vec![Finding::new(path, 1, message)];
    }
    package
        .dependencies
        .iter()
        .filter_map(|dependency| {
            let edge = Edge {
                from: &package.name,
                to: &dependency.name,
                development: dependency.kind == DependencyKind::Development,
            };
            let message = refusal(edge, members.contains(&edge.to))?;
            Some(Finding::new(&*path, line_of(&manifest, edge.to), message))
        })
        .collect()
}

fn is_known(name: &str) -> bool {
    BASE.contains(&name)
        || ENGINES.contains(&name)
        || TOOLS.contains(&name)
        || [KEEPER.0, COMPOSER, AGENT, TESTING].contains(&name)
}

/// Why a dependency is not allowed; none where it is.
fn refusal(edge: Edge<'_>, is_member: bool) -> Option<String> {
    let Edge {
        from,
        to,
        development,
    } = edge;
    if !is_member {
        let (_, users) = RESTRICTED.iter().find(|(library, _)| *library == to)?;
        return (!users.contains(&from) && !development)
            .then(|| format!("{from} uses {to}, which only {} may", users.join(", ")));
    }
    if to == TESTING {
        return (!development).then(|| format!("{from} depends on {to}: only tests may"));
    }
    let position = |name: &str| BASE.iter().position(|base| *base == name);
    let reason = if let Some(own) = position(from) {
        if position(to).is_some_and(|other| other < own) {
            return None;
        }
        "the base depends on nothing above it"
    } else if ENGINES.contains(&from) {
        let is_over_pool = ["fcvm-storage", "blockpool-fuse"].contains(&from);
        if BASE.contains(&to) || (is_over_pool && to == "blockpool") {
            return None;
        }
        "engines depend on the base only, never on each other"
    } else if from == KEEPER.0 {
        if BASE.contains(&to) || KEEPER.1.contains(&to) {
            return None;
        }
        "snapshots are kept of memory and disks, and know nothing of what made them"
    } else if from == AGENT {
        if ["fcvm-types", "fcvm-wire"].contains(&to) {
            return None;
        }
        "the agent sees fcvm-types and fcvm-wire only"
    } else if TOOLS.contains(&to) || to == AGENT {
        "programs of their own are no libraries"
    } else if TOOLS.contains(&from) && to == COMPOSER {
        "tools run the command line as its users do"
    } else {
        return None;
    };
    Some(format!("{from} depends on {to}: {reason}"))
}

/// The line of a manifest that names a dependency; 1 where it is not found.
fn line_of(manifest: &str, dependency: &str) -> usize {
    manifest
        .lines()
        .position(|line| {
            line.strip_prefix(dependency)
                .is_some_and(|rest| rest.starts_with([' ', '=', '.']))
        })
        .map_or(1, |index| index + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(from: &str, to: &str) -> bool {
        let edge = Edge {
            from,
            to,
            development: false,
        };
        refusal(edge, is_known(to)).is_some()
    }

    #[test]
    fn the_rule_of_the_architecture_holds() {
        for (from, to) in [
            ("fcvm-wire", "fcvm-types"),
            ("fcvm-process", "fcvm-types"),
            ("fcvm-image", "fcvm-types"),
            ("fcvm-network", "fcvm-process"),
            ("fc-agent", "fcvm-wire"),
            ("fcvm", "fcvm-kernel"),
            ("fcvm-snapshot", "fcvm-memory"),
            ("fcvm-bench", "fcvm-image"),
            ("fcvm-storage", "blockpool"),
            ("blockpool-fuse", "blockpool"),
            ("fcvm", "clap"),
            ("fc-agent", "anyhow"),
            ("fcvm-image", "tar"),
        ] {
            assert!(!refused(from, to), "{from} -> {to}");
        }
        for (from, to) in [
            ("fcvm-types", "fcvm-wire"),
            ("fcvm-types", "fcvm-image"),
            ("fcvm-wire", "fcvm-process"),
            ("fcvm-image", "fcvm-kernel"),
            ("fcvm-image", "blockpool"),
            ("blockpool", "fcvm-storage"),
            ("fcvm-image", "fcvm"),
            ("fcvm-snapshot", "fcvm-hypervisor"),
            ("fcvm-memory", "fcvm-snapshot"),
            ("fc-agent", "fcvm-process"),
            ("fc-agent", "fcvm-image"),
            ("fcvm", "fc-agent"),
            ("fcvm", "xtask"),
            ("fcvm-bench", "fcvm"),
            ("fcvm-image", "clap"),
            ("fcvm-kernel", "anyhow"),
            ("fcvm-kernel", "fcvm-testing"),
        ] {
            assert!(refused(from, to), "{from} -> {to}");
        }
    }

    #[test]
    fn tests_may_use_what_the_product_may_not() {
        let edge = Edge {
            from: "fcvm-image",
            to: "anyhow",
            development: true,
        };
        assert_eq!(refusal(edge, false), None);
        let edge = Edge {
            from: "fcvm-image",
            to: "fcvm-kernel",
            development: true,
        };
        assert!(refusal(edge, true).is_some());
        let edge = Edge {
            to: TESTING,
            ..edge
        };
        assert_eq!(refusal(edge, true), None);
    }

    #[test]
    fn the_line_of_a_dependency_is_found() {
        let manifest = "[dependencies]\nfcvm-types-old = 1\nfcvm-types.workspace = true\n";
        assert_eq!(line_of(manifest, "fcvm-types"), 3);
        assert_eq!(line_of(manifest, "serde"), 1);
    }
}
