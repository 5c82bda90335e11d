//! From requests to a configuration, by the source's own Kconfig, and the check that none got lost.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};

use super::kconfig::Tree;
use super::process::{Make, fetch_output};
use super::profile::{Origin, Profile, Request, parse_line};
use super::source::Source;
use super::zfs;
use super::{BuildError, Result};
use crate::files;

/// Largest `.config`: a distribution's has 300 kB.
const CONFIG_MAX_BYTES: usize = 8 << 20;

/// A symbol whose value is not the one asked for.
#[derive(Debug, Clone)]
pub struct Lost {
    /// What was asked for; the symbol as this source calls it.
    pub request: Request,
    /// Its value in the result.
    pub found: String,
    /// Why, as one clause.
    pub reason: String,
}

/// A configuration and what became of each request.
#[derive(Debug, Clone)]
pub struct Resolved {
    /// The text of `.config`.
    pub text: String,
    /// Its symbols that are not `n`.
    pub values: BTreeMap<String, String>,
    /// The requests that this source can have, by the names it has for them.
    pub requests: Vec<Request>,
    /// Those that were lost though nothing says that they may be.
    pub lost: Vec<Lost>,
    /// Those that may be missing, and are.
    pub absent: Vec<Lost>,
    /// Requests that weaken what the profile asks for the kernel's defence, each as one line.
    pub warnings: Vec<String>,
    /// Number of symbols that the source knows.
    pub known_count: usize,
}

/// Resolves `profile` with the Kconfig of `source`, in `output` (an `O=` directory of its own, which keeps
/// the configuration programs for the next time).
///
/// # Errors
/// [`BuildError::Missing`], [`BuildError::Failed`], [`BuildError::File`]; [`BuildError::ZfsMismatch`] and
/// [`BuildError::Options`] where OpenZFS is to be built in and cannot be.
pub fn resolve(source: &Source, profile: &Profile, output: &Path, make: &Make) -> Result<Resolved> {
    if profile.has_zfs() {
        zfs::declare(source)?;
    }
    let tree = Tree::read(&source.tree, "x86")?;
    let mut requests = profile.for_version(source.version);
    for request in &mut requests {
        if let Some(formerly) = &request.formerly
            && !tree.has(&request.symbol)
            && tree.has(formerly)
        {
            request.symbol.clone_from(formerly);
        }
    }
    files::create_dir(output)?;
    let wanted = output.join("wanted.config");
    let mut text = String::new();
    for request in requests.iter().filter(|request| tree.has(&request.symbol)) {
        let _ = writeln!(text, "CONFIG_{}={}", request.symbol, request.value);
    }
    fs::write(&wanted, text).map_err(BuildError::file("write", &wanted))?;
    let mut command = make.command(source, output);
    command
        .arg(format!("KCONFIG_ALLCONFIG={}", wanted.display()))
        .arg("allnoconfig");
    // Its result is complete: olddefconfig, which building begins with, changes nothing of it, or the build fails.
    fetch_output("configuring the kernel (make allnoconfig)", &mut command)?;
    let text = read_config(&output.join(".config"))?;
    let values = parse_config(&text);
    let warnings = warnings(&requests);
    let (lost, absent) = compare(&tree, &requests, &values);
    Ok(Resolved {
        text,
        values,
        requests,
        lost,
        absent,
        warnings,
        known_count: tree.symbol_count(),
    })
}

impl Resolved {
    /// An error where a symbol was lost.
    ///
    /// # Errors
    /// [`BuildError::Options`] with every lost symbol.
    pub fn check(&self) -> Result<()> {
        match self.lost.as_slice() {
            [] => Ok(()),
            lost => {
                let lines: Vec<String> = lost.iter().map(Lost::to_string).collect();
                Err(BuildError::Options(lines.join("; ")))
            }
        }
    }
}

impl std::fmt::Display for Lost {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "CONFIG_{} is {} in place of {}: {} (asked for by {})",
            self.request.symbol, self.found, self.request.value, self.reason, self.request.origin
        )
    }
}

fn compare(
    tree: &Tree,
    requests: &[Request],
    values: &BTreeMap<String, String>,
) -> (Vec<Lost>, Vec<Lost>) {
    let mut lost = Vec::new();
    let mut absent = Vec::new();
    for request in requests {
        let found = values.get(&request.symbol).map_or("n", String::as_str);
        // A symbol that does not exist is off, which is what 'n' asks for - unless it is the user
        // who wrote it: that is a slip of the pen.
        let unknown = !tree.has(&request.symbol) && !matches!(request.origin, Origin::Profile(_));
        if found == request.value && !unknown {
            continue;
        }
        let mut reason = tree.explain(&request.symbol, &request.value, values);
        // Symbols that Kconfig sets by trying the compiler.
        if reason.contains("CC_HAS_") {
            reason.push_str(", which a newer compiler has");
        }
        let entry = Lost {
            reason,
            found: found.to_owned(),
            request: request.clone(),
        };
        match request.optional {
            Some(_) => absent.push(entry),
            None => lost.push(entry),
        }
    }
    (lost, absent)
}

/// Defences that were asked off.
fn warnings(requests: &[Request]) -> Vec<String> {
    requests
        .iter()
        .filter(|request| request.replaced.as_deref() == Some("y") && request.value == "n")
        .filter(|request| DEFENCES.contains(&request.section.as_str()))
        .map(|request| {
            format!(
                "CONFIG_{} is off because you asked: it is a defence ({}); what it saves: {}",
                request.symbol, request.section, request.cost
            )
        })
        .collect()
}

/// The sections of `profiles/hardening.toml`.
const DEFENCES: [&str; 3] = [
    "Faults of processors",
    "Memory is not corrupted unseen",
    "Addresses",
];

/// Reads a `.config`.
pub(crate) fn read_config(path: &Path) -> Result<String> {
    let bytes = files::read_bounded(path, CONFIG_MAX_BYTES)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// The symbols of a `.config` that are not `n`.
pub fn parse_config(text: &str) -> BTreeMap<String, String> {
    text.lines()
        .filter_map(|line| match parse_line(line, "") {
            Ok(Some((symbol, value))) if value != "n" => Some((symbol, value)),
            // Strings with escapes are compared as they are written.
            Err(_) => line
                .strip_prefix("CONFIG_")?
                .split_once('=')
                .map(|(symbol, value)| (symbol.to_owned(), value.to_owned())),
            _ => None,
        })
        .collect()
}

/// A line of [`difference`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Differing {
    /// Without `CONFIG_`.
    pub symbol: String,
    /// Value in the first; `n` where it is off.
    pub first: String,
    /// Value in the second.
    pub second: String,
}

/// The symbols in which two configurations differ. What describes the compiler is left out.
pub fn difference(
    first: &BTreeMap<String, String>,
    second: &BTreeMap<String, String>,
) -> Vec<Differing> {
    const MEASURED: [&str; 6] = ["CC_", "GCC", "CLANG_VERSION", "AS_", "LD_", "RUSTC"];
    let mut symbols: Vec<&String> = first.keys().chain(second.keys()).collect();
    symbols.sort();
    symbols.dedup();
    symbols
        .into_iter()
        .filter(|symbol| !MEASURED.iter().any(|prefix| symbol.starts_with(prefix)))
        .filter_map(|symbol| {
            let value = |of: &BTreeMap<String, String>| {
                of.get(symbol).map_or("n", String::as_str).to_owned()
            };
            let (first, second) = (value(first), value(second));
            (first != second).then(|| Differing {
                symbol: symbol.clone(),
                first,
                second,
            })
        })
        .collect()
}

/// Where configurations of a source are resolved.
pub(crate) fn directory(work: &Path, source: &Source) -> PathBuf {
    work.join(&source.id).join("resolve")
}
