//! Boot entries as text, and the list of those that fcvm installed.

use std::path::{Path, PathBuf};

use serde::Serialize;

use super::{Loader, beneath};
use crate::{Result, files};

/// An entry to write. File names are relative to the kernel's directory.
pub(super) struct Text {
    pub(super) id: String,
    pub(super) title: String,
    pub(super) initrd: Option<String>,
    pub(super) command_line: String,
}

/// An entry that is installed.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Entry {
    /// The kernel's version.
    pub version: String,
    /// What starts it.
    #[serde(serialize_with = "loader_name")]
    pub loader: &'static str,
    /// The file that holds the entry, relative to the root.
    pub path: PathBuf,
}

fn loader_name<S: serde::Serializer>(
    name: &&str,
    serializer: S,
) -> std::result::Result<S::Ok, S::Error> {
    serializer.serialize_str(name)
}

impl Loader {
    /// Its name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Grub => "grub",
            Self::SystemdBoot => "systemd-boot",
            Self::EfiStub => "efi-stub",
        }
    }
}

const BEGIN: &str = "### BEGIN fcvm ";
const END: &str = "### END fcvm ";

/// A `custom.cfg` with the entries of this version; all else in it stays.
pub(super) fn grub(old: &str, version: &str, entries: &[Text]) -> String {
    let mut text = without_block(old, version);
    if !text.is_empty() && !text.ends_with('\n') {
        text.push('\n');
    }
    text += &format!("{BEGIN}{version}\n");
    for entry in entries {
        text += &format!(
            "menuentry '{}' --class gnu-linux --id '{}' {{\n",
            entry.title, entry.id
        );
        // /boot may be a file system of its own, and then it is GRUB's root.
        for (test, directory) in [("if", "/boot"), ("else", "")] {
            match test {
                "if" => text += &format!("    if [ -f /boot/vmlinuz-{version} ]; then\n"),
                _ => text += "    else\n",
            }
            text += &format!(
                "        linux {directory}/vmlinuz-{version} {}\n",
                entry.command_line
            );
            if let Some(initrd) = &entry.initrd {
                text += &format!("        initrd {directory}/{initrd}\n");
            }
        }
        text += "    fi\n}\n";
    }
    text += &format!("{END}{version}\n");
    text
}

fn without_block(old: &str, version: &str) -> String {
    let (begin, end) = (format!("{BEGIN}{version}"), format!("{END}{version}"));
    // A block without an end is left alone: nobody knows what follows it.
    let whole = old.lines().any(|line| line == begin) && old.lines().any(|line| line == end);
    let mut kept = String::new();
    let mut inside = false;
    for line in old.lines() {
        if whole && line == begin {
            inside = true;
        }
        if !inside {
            kept += line;
            kept.push('\n');
        }
        if line == end {
            inside = false;
        }
    }
    kept
}

/// An entry of the Boot Loader Specification, type 1.
pub(super) fn boot_loader_specification(entry: &Text, version: &str) -> String {
    let mut text = format!(
        "# Written by 'fcvm kernel install'.\ntitle {}\nversion {version}\nsort-key fcvm\nlinux /fcvm/{version}/vmlinuz\n",
        entry.title
    );
    if let Some(initrd) = &entry.initrd {
        text += &format!("initrd /fcvm/{version}/{initrd}\n");
    }
    text + &format!("options {}\n", entry.command_line)
}

/// The entries that fcvm installed below a root directory.
pub fn list(root: &Path, esp: &Path) -> Result<Vec<Entry>> {
    let mut entries = Vec::new();
    let custom = PathBuf::from("boot/grub/custom.cfg");
    let path = beneath(root, &custom)?;
    if path.exists() {
        let bytes = files::read_bounded(&path, super::TEXT_BYTES_MAX)?;
        let text = String::from_utf8_lossy(&bytes);
        let versions = text.lines().filter_map(|line| line.strip_prefix(BEGIN));
        entries.extend(versions.map(|version| Entry {
            version: version.to_owned(),
            loader: Loader::Grub.name(),
            path: custom.clone(),
        }));
    }
    for (directory, prefix, suffix, loader) in [
        ("loader/entries", "fcvm-", ".conf", Loader::SystemdBoot),
        ("EFI/fcvm", "", ".efi", Loader::EfiStub),
    ] {
        let directory = esp.join(directory);
        for path in files::entries(&beneath(root, &directory)?)? {
            let name = path
                .file_name()
                .unwrap_or_default()
                .to_string_lossy()
                .into_owned();
            let version = name
                .strip_prefix(prefix)
                .and_then(|name| name.strip_suffix(suffix))
                .filter(|version| !version.ends_with("-rescue"));
            if let Some(version) = version {
                entries.push(Entry {
                    version: version.to_owned(),
                    loader: loader.name(),
                    path: directory.join(&name),
                });
            }
        }
    }
    entries.sort();
    Ok(entries)
}
