//! Capabilities of the container: Podman's default set, and what --cap-add and --cap-drop make of it.

use anyhow::bail;
use fcvm_types::capability::{CAPABILITIES, capability_number};

/// Podman's default.
const DEFAULT: [&str; 11] = [
    "CHOWN",
    "DAC_OVERRIDE",
    "FOWNER",
    "FSETID",
    "KILL",
    "NET_BIND_SERVICE",
    "SETFCAP",
    "SETGID",
    "SETPCAP",
    "SETUID",
    "SYS_CHROOT",
];

/// Every capability, with its prefix.
pub(crate) fn all() -> Vec<String> {
    CAPABILITIES
        .iter()
        .map(|name| format!("CAP_{name}"))
        .collect()
}

/// The container's capabilities, with their prefix.
pub(crate) fn resolve(
    add: &[String],
    drop: &[String],
    privileged: bool,
) -> anyhow::Result<Vec<String>> {
    if privileged {
        return Ok(all());
    }
    let added = parse(add)?;
    let dropped = parse(drop)?;
    let everything_dropped = dropped.is_none();
    let everything_added = added.is_none();
    let (added, dropped) = (added.unwrap_or_default(), dropped.unwrap_or_default());
    let kept = CAPABILITIES.iter().filter(|name| {
        if added.contains(name) {
            return true;
        }
        let base = if everything_added {
            true
        } else {
            !everything_dropped && DEFAULT.contains(name)
        };
        base && !dropped.contains(name)
    });
    Ok(kept.map(|name| format!("CAP_{name}")).collect())
}

/// The named capabilities; `None` for ALL.
fn parse(names: &[String]) -> anyhow::Result<Option<Vec<&'static str>>> {
    let mut parsed = Vec::new();
    for text in names.iter().flat_map(|list| list.split(',')) {
        let upper = text.to_ascii_uppercase();
        if matches!(upper.as_str(), "ALL" | "CAP_ALL") {
            return Ok(None);
        }
        match capability_number(&upper) {
            Some(number) => parsed.push(CAPABILITIES[number]),
            None => bail!(
                "'{text}' is no capability: capabilities(7) lists them, without or with CAP_, or write ALL"
            ),
        }
    }
    Ok(Some(parsed))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn resolved(add: &[&str], drop: &[&str]) -> Vec<String> {
        let own = |names: &[&str]| {
            names
                .iter()
                .map(|name| (*name).to_owned())
                .collect::<Vec<_>>()
        };
        resolve(&own(add), &own(drop), false).unwrap()
    }

    #[test]
    fn podmans_rules() {
        assert_eq!(resolved(&[], &[]).len(), 11);
        assert_eq!(resolved(&[], &["ALL"]), Vec::<String>::new());
        assert_eq!(resolved(&["net_raw"], &["all"]), ["CAP_NET_RAW"]);
        assert_eq!(resolved(&["CAP_NET_RAW"], &[]).len(), 12);
        assert_eq!(resolved(&["ALL"], &["SYS_ADMIN"]).len(), 40);
        assert!(!resolved(&[], &["chown,kill"]).contains(&"CAP_CHOWN".to_owned()));
        assert!(resolve(&["FLY".to_owned()], &[], false).is_err());
    }
}
