//! Profiles: what a kernel is asked for, as data with a reason for each line.
//!
//! A profile is a TOML file (`docs/kernel.md` has the form); the built-in ones are in `profiles/`. This
//! module reads them and makes the list of [`Request`]s for one source; what becomes of the requests is
//! `resolve`'s business.

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::{BuildError, Result};

/// The profiles in this program.
const BUILT_IN: [(&str, &str); 5] = [
    ("guest-min", include_str!("../../profiles/guest-min.toml")),
    ("guest", include_str!("../../profiles/guest.toml")),
    ("guest-zfs", include_str!("../../profiles/guest-zfs.toml")),
    (
        "host-latency",
        include_str!("../../profiles/host-latency.toml"),
    ),
    ("host-full", include_str!("../../profiles/host-full.toml")),
];
/// What is no kernel by itself: profiles include it.
const PARTS: [(&str, &str); 6] = [
    (
        "hardening",
        include_str!("../../profiles/parts/hardening.toml"),
    ),
    (ZFS_PART, include_str!("../../profiles/parts/zfs.toml")),
    (
        "no-guests",
        include_str!("../../profiles/parts/no-guests.toml"),
    ),
    (
        "reserved-memory",
        include_str!("../../profiles/parts/reserved-memory.toml"),
    ),
    (
        "common-hardware",
        include_str!("../../profiles/parts/common-hardware.toml"),
    ),
    (
        "virtual-hardware",
        include_str!("../../profiles/parts/virtual-hardware.toml"),
    ),
];
/// What OpenZFS asks of a kernel, and itself.
const ZFS_PART: &str = "zfs";
/// The symbol that has OpenZFS built in.
const ZFS_SYMBOL: &str = "ZFS";
/// Profiles included in one another.
const DEPTH_MAX: usize = 8;
/// Largest profile or fragment.
pub(crate) const TEXT_MAX_BYTES: usize = 1 << 20;

/// What a kernel is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Use {
    /// A microVM's guest.
    Guest,
    /// A host on hardware.
    Host,
}

/// Version of a kernel: as many numbers as matter.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
#[serde(try_from = "String")]
pub struct KernelVersion {
    /// As in 6.1.192: 6.
    pub major: u32,
    /// As in 6.1.192: 1.
    pub minor: u32,
}

impl KernelVersion {
    /// As in 6.1: 6 and 1.
    pub const fn new(major: u32, minor: u32) -> Self {
        Self { major, minor }
    }
}

impl FromStr for KernelVersion {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        let mut numbers = text.splitn(3, '.').map(str::parse);
        match (numbers.next(), numbers.next()) {
            (Some(Ok(major)), Some(Ok(minor))) => Ok(Self { major, minor }),
            _ => Err(format!("'{text}' is no kernel version such as 6.12")),
        }
    }
}

impl TryFrom<String> for KernelVersion {
    type Error = String;

    fn try_from(text: String) -> std::result::Result<Self, String> {
        text.parse()
    }
}

impl fmt::Display for KernelVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.major, self.minor)
    }
}

/// A line of a profile.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
struct Line {
    #[serde(default = "yes")]
    set: String,
    why: String,
    cost: String,
    /// Why the result may lack it.
    optional: Option<String>,
    /// Its name in older kernels.
    formerly: Option<String>,
    /// First version that has it.
    from: Option<KernelVersion>,
    /// Last version that has it.
    until: Option<KernelVersion>,
}

fn yes() -> String {
    "y".to_owned()
}

/// The file's form.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct ProfileFile {
    summary: String,
    #[serde(rename = "use")]
    used_for: Option<Use>,
    #[serde(default)]
    include: Vec<String>,
    /// By section, then by symbol.
    #[serde(default)]
    symbols: BTreeMap<String, BTreeMap<String, Line>>,
}

/// Where a request comes from, which decides who wins.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Origin {
    /// A line of a profile.
    Profile(String),
    /// `--fragment`: file and line.
    Fragment(String),
    /// `--set`.
    Set,
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Profile(name) => write!(f, "profile {name}"),
            Self::Fragment(place) => f.write_str(place),
            Self::Set => f.write_str("--set"),
        }
    }
}

/// A symbol that is asked for.
#[derive(Debug, Clone)]
pub struct Request {
    /// Without `CONFIG_`.
    pub symbol: String,
    /// As in a `.config`; `n` for what is not set.
    pub value: String,
    /// Why it is asked for.
    pub why: String,
    /// What it costs.
    pub cost: String,
    /// Why it may be missing in the result.
    pub optional: Option<String>,
    /// Its older name, taken where the source has only that.
    pub formerly: Option<String>,
    /// The part of the profile it stands in.
    pub section: String,
    /// Who asks.
    pub origin: Origin,
    /// The value of the profile, where `--set` replaced it.
    pub replaced: Option<String>,
    from: Option<KernelVersion>,
    until: Option<KernelVersion>,
}

/// A profile with all that it includes.
#[derive(Debug, Clone)]
pub struct Profile {
    /// Its name: that of the built-in one, or the file's without `.toml`.
    pub name: String,
    /// One line.
    pub summary: String,
    /// What the kernel is for.
    pub used_for: Use,
    requests: BTreeMap<String, Request>,
    /// OpenZFS is built in, or not, against the profile's own word.
    zfs_chosen: Option<bool>,
}

impl Profile {
    /// Names and summaries of the built-in profiles.
    ///
    /// # Errors
    /// [`BuildError::Profile`] is an error in this program.
    pub fn built_in() -> Result<Vec<Self>> {
        BUILT_IN.iter().map(|(name, _)| Self::load(name)).collect()
    }

    /// A built-in profile, or the file `name` where it has a slash or ends with `.toml`.
    ///
    /// # Errors
    /// [`BuildError::UnknownProfile`], [`BuildError::Profile`], [`BuildError::Kernel`].
    pub fn load(name: &str) -> Result<Self> {
        let mut profile = Self {
            name: name.to_owned(),
            summary: String::new(),
            used_for: Use::Guest,
            requests: BTreeMap::new(),
            zfs_chosen: None,
        };
        profile.include(name, 0)?;
        if is_file(name) {
            let stem = Path::new(name).file_stem().and_then(|stem| stem.to_str());
            profile.name = stem
                .filter(|stem| is_name(stem))
                .ok_or_else(|| BuildError::Profile {
                    name: name.to_owned(),
                    reason:
                        "its file name has to be letters, digits, '-', '_', '.' and end with .toml"
                            .to_owned(),
                })?
                .to_owned();
        }
        Ok(profile)
    }

    fn include(&mut self, name: &str, depth: usize) -> Result<()> {
        let refuse = |reason: String| BuildError::Profile {
            name: name.to_owned(),
            reason,
        };
        if depth > DEPTH_MAX {
            return Err(refuse("it includes itself".to_owned()));
        }
        // A part alone would be a kernel that does not start.
        let parts = PARTS.iter().filter(|_| depth > 0);
        let known = BUILT_IN.iter().chain(parts);
        let text = match known.clone().find(|(known, _)| *known == name) {
            Some((_, text)) => (*text).to_owned(),
            None if is_file(name) => {
                let bytes = crate::files::read_bounded(Path::new(name), TEXT_MAX_BYTES)?;
                String::from_utf8(bytes).map_err(|_| refuse("it is not UTF-8".to_owned()))?
            }
            None => {
                let names: Vec<&str> = known.map(|(name, _)| *name).collect();
                return Err(BuildError::UnknownProfile {
                    name: name.to_owned(),
                    known: names.join(", "),
                });
            }
        };
        let file: ProfileFile = toml::from_str(&text)
            .map_err(|error| refuse(error.to_string().trim().replace('\n', " ")))?;
        for included in &file.include {
            self.include(included, depth + 1)?;
        }
        self.summary = file.summary;
        if let Some(used_for) = file.used_for {
            self.used_for = used_for;
        }
        for (section, lines) in file.symbols {
            for (symbol, line) in lines {
                if !is_symbol(&symbol) {
                    return Err(refuse(format!("'{symbol}' is no symbol's name")));
                }
                check_value(&line.set).map_err(|reason| refuse(format!("{symbol}: {reason}")))?;
                let request = line.request(&symbol, &section, name);
                self.requests.insert(symbol, request);
            }
        }
        Ok(())
    }

    /// Has OpenZFS built in, or not, whatever the profile says. What it asks of a kernel stays.
    ///
    /// # Errors
    /// [`BuildError::Profile`] is an error in this program.
    pub fn set_zfs(&mut self, built_in: bool) -> Result<()> {
        match (built_in, self.has_zfs()) {
            (true, false) => {
                self.zfs_chosen = Some(true);
                let summary = std::mem::take(&mut self.summary);
                self.include(ZFS_PART, 1)?;
                self.summary = summary;
            }
            (false, true) => {
                self.zfs_chosen = Some(false);
                self.requests.remove(ZFS_SYMBOL);
            }
            _ => {}
        }
        Ok(())
    }

    /// What kernels of it are called: its name, and what was chosen against its own word.
    pub fn kernel_name(&self) -> String {
        match self.zfs_chosen {
            None => self.name.clone(),
            Some(true) => format!("{}-with-zfs", self.name),
            Some(false) => format!("{}-without-zfs", self.name),
        }
    }

    /// True where OpenZFS is to be built in.
    pub fn has_zfs(&self) -> bool {
        self.requests
            .get(ZFS_SYMBOL)
            .is_some_and(|request| request.value == "y")
    }

    /// All requests, whatever the version, by section and name.
    pub fn requests(&self) -> impl Iterator<Item = &Request> {
        self.requests.values()
    }

    /// Adds the settings of a fragment; `place` is how messages call the file.
    ///
    /// # Errors
    /// [`BuildError::Setting`]; [`BuildError::Contradiction`] where it and the profile differ.
    pub fn add_fragment(&mut self, place: &str, text: &str) -> Result<()> {
        for (index, line) in text.lines().enumerate() {
            let at = format!("{place}:{}", index + 1);
            let Some((symbol, value)) = parse_line(line, &at)? else {
                continue;
            };
            let request = Request::plain(symbol, value, Origin::Fragment(at));
            match self.find(&request.symbol) {
                Some(earlier) if earlier.value != request.value => {
                    return Err(BuildError::Contradiction {
                        symbol: request.symbol,
                        first: earlier.origin.to_string(),
                        first_value: earlier.value.clone(),
                        second: request.origin.to_string(),
                        second_value: request.value,
                    });
                }
                Some(_) => {}
                None => {
                    self.requests.insert(request.symbol.clone(), request);
                }
            }
        }
        Ok(())
    }

    /// Overrides the profile and its fragments.
    ///
    /// # Errors
    /// [`BuildError::Setting`]; [`BuildError::Contradiction`] between two of the settings.
    pub fn set(&mut self, settings: &[String]) -> Result<()> {
        for setting in settings {
            let Some((symbol, value)) = parse_line(setting, "--set")? else {
                return Err(BuildError::Setting {
                    origin: "--set".to_owned(),
                    line: setting.clone(),
                });
            };
            let mut request = Request::plain(symbol, value, Origin::Set);
            if let Some(earlier) = self.find(&request.symbol) {
                if earlier.origin == Origin::Set && earlier.value != request.value {
                    return Err(BuildError::Contradiction {
                        symbol: request.symbol,
                        first: "--set".to_owned(),
                        first_value: earlier.value.clone(),
                        second: "--set".to_owned(),
                        second_value: request.value,
                    });
                }
                request.replaced = Some(earlier.value.clone());
                request.section = earlier.section.clone();
                request.cost = earlier.cost.clone();
                let name = earlier.symbol.clone();
                self.requests.remove(&name);
            }
            self.requests.insert(request.symbol.clone(), request);
        }
        Ok(())
    }

    /// The request for a symbol, by either of its names.
    fn find(&self, symbol: &str) -> Option<&Request> {
        self.requests.get(symbol).or_else(|| {
            self.requests
                .values()
                .find(|request| request.formerly.as_deref() == Some(symbol))
        })
    }

    /// What to ask of a source of this version.
    pub(crate) fn for_version(&self, version: KernelVersion) -> Vec<Request> {
        self.requests
            .values()
            .filter(|request| request.from.is_none_or(|from| version >= from))
            .filter(|request| request.until.is_none_or(|until| version <= until))
            .cloned()
            .collect()
    }
}

impl Line {
    fn request(self, symbol: &str, section: &str, profile: &str) -> Request {
        Request {
            symbol: symbol.to_owned(),
            value: self.set,
            why: self.why,
            cost: self.cost,
            optional: self.optional,
            formerly: self.formerly,
            section: section.to_owned(),
            origin: Origin::Profile(profile.to_owned()),
            replaced: None,
            from: self.from,
            until: self.until,
        }
    }
}

impl Request {
    /// A request without a reason of its own.
    pub(crate) fn plain(symbol: String, value: String, origin: Origin) -> Self {
        Self {
            symbol,
            value,
            why: "you asked for it".to_owned(),
            cost: "not known".to_owned(),
            optional: None,
            formerly: None,
            section: "Your own".to_owned(),
            origin,
            replaced: None,
            from: None,
            until: None,
        }
    }
}

/// The new name of a symbol, where some profile knows one.
pub(crate) fn new_name(symbol: &str) -> Option<String> {
    let profiles = Profile::built_in().ok()?;
    profiles
        .iter()
        .flat_map(Profile::requests)
        .find(|request| request.formerly.as_deref() == Some(symbol) && request.symbol != symbol)
        .map(|request| request.symbol.clone())
}

fn is_file(name: &str) -> bool {
    name.contains('/') || name.ends_with(".toml")
}

/// True for what can be part of a file's name and of a kernel's release.
pub(crate) fn is_name(text: &str) -> bool {
    let known = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
    (1..=64).contains(&text.len()) && !text.starts_with('.') && text.bytes().all(known)
}

fn is_symbol(text: &str) -> bool {
    !text.is_empty()
        && text.len() <= 128
        && text
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || byte == b'_')
}

/// A value as Kconfig writes it: y, m, n, a number, or a string in quotation marks.
fn check_value(value: &str) -> std::result::Result<(), String> {
    let quoted = |text: &str| {
        text.len() >= 2
            && text.starts_with('"')
            && text.ends_with('"')
            && !text[1..text.len() - 1].contains(['"', '\\'])
    };
    let number = |text: &str| {
        let digits = text.strip_prefix('-').unwrap_or(text);
        match digits.strip_prefix("0x") {
            Some(digits) => {
                !digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_hexdigit())
            }
            None => !digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_digit()),
        }
    };
    let fine = matches!(value, "y" | "m" | "n") || quoted(value) || number(value);
    if fine && !value.contains(char::is_control) {
        Ok(())
    } else {
        Err(format!(
            "'{value}' is no value: y, m, n, a number or a string in quotation marks"
        ))
    }
}

/// A setting in the form of `.config`; none for a comment or an empty line.
pub(crate) fn parse_line(line: &str, origin: &str) -> Result<Option<(String, String)>> {
    let refuse = || BuildError::Setting {
        origin: origin.to_owned(),
        line: line.chars().take(200).collect(),
    };
    let text = line.trim();
    if let Some(name) = text
        .strip_prefix("# CONFIG_")
        .and_then(|rest| rest.strip_suffix(" is not set"))
    {
        return match is_symbol(name) {
            true => Ok(Some((name.to_owned(), "n".to_owned()))),
            false => Err(refuse()),
        };
    }
    if text.is_empty() || text.starts_with('#') {
        return Ok(None);
    }
    let (name, value) = text
        .strip_prefix("CONFIG_")
        .and_then(|rest| rest.split_once('='))
        .ok_or_else(refuse)?;
    let value = value.trim_end();
    if !is_symbol(name) || check_value(value).is_err() {
        return Err(refuse());
    }
    Ok(Some((name.to_owned(), value.to_owned())))
}

#[cfg(test)]
#[path = "profile_tests.rs"]
mod tests;
