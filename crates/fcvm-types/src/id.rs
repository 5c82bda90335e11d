//! Names and identifiers of VMs and snapshots.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Characters of a full VM identifier: 128 bits in lower-case hexadecimal.
pub const VM_ID_CHARS: usize = 32;
/// Characters of the short form shown in tables and used in file names.
pub const VM_ID_SHORT_CHARS: usize = 12;
/// Longest VM name: it becomes the guest's host name, which Linux limits to 64 bytes.
pub const VM_NAME_MAX_CHARS: usize = 63;

/// A text that is no valid identifier or name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum IdError {
    /// Not 32 lower-case hexadecimal characters.
    #[error("'{0}' is not a VM id: {VM_ID_CHARS} hexadecimal characters are expected")]
    Id(String),
    /// Empty, too long, or with a character that names cannot have.
    #[error(
        "'{0}' is not a VM name: use 1 to {VM_NAME_MAX_CHARS} letters, digits, '_', '.' or '-', the first one a letter or a digit"
    )]
    Name(String),
    /// Empty, too long, or with a character that tags cannot have.
    #[error(
        "'{0}' is not a snapshot's tag: use 1 to {VM_NAME_MAX_CHARS} letters, digits, '_', '.' or '-', the first one a letter or a digit"
    )]
    Tag(String),
}

/// Whether a text is a name of VMs or a tag of snapshots: one file name that is not hidden.
fn is_name(text: &str) -> bool {
    let first_fits = text
        .bytes()
        .next()
        .is_some_and(|byte| byte.is_ascii_alphanumeric());
    let all_fit = text
        .bytes()
        .all(|byte| byte.is_ascii_alphanumeric() || b"_.-".contains(&byte));
    first_fits && all_fit && text.len() <= VM_NAME_MAX_CHARS
}

/// Identifier of a VM: 128 random bits, written as 32 lower-case hexadecimal characters.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct VmId(String);

impl VmId {
    /// Makes the identifier out of 128 random bits.
    pub fn from_random(bits: [u8; 16]) -> Self {
        use fmt::Write;
        let mut text = String::with_capacity(VM_ID_CHARS);
        for byte in bits {
            // Writing to a String cannot fail.
            let _ = write!(text, "{byte:02x}");
        }
        Self(text)
    }

    /// All 32 characters.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The first 12 characters, as tables show them.
    pub fn short(&self) -> &str {
        &self.0[..VM_ID_SHORT_CHARS]
    }
}

impl FromStr for VmId {
    type Err = IdError;

    fn from_str(text: &str) -> Result<Self, IdError> {
        let hexadecimal = |byte: u8| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte);
        if text.len() == VM_ID_CHARS && text.bytes().all(hexadecimal) {
            Ok(Self(text.to_owned()))
        } else {
            Err(IdError::Id(text.to_owned()))
        }
    }
}

impl TryFrom<String> for VmId {
    type Error = IdError;

    fn try_from(text: String) -> Result<Self, IdError> {
        text.parse()
    }
}

impl From<VmId> for String {
    fn from(id: VmId) -> Self {
        id.0
    }
}

impl fmt::Display for VmId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for VmId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "VmId({})", self.short())
    }
}

/// Name of a VM, unique among the VMs of one data directory.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct VmName(String);

impl VmName {
    /// The name as given.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// A readable name out of random bits, in Podman's form `adjective_noun`.
    pub fn generate(bits: [u8; 2]) -> Self {
        const ADJECTIVES: [&str; 16] = [
            "amber", "brisk", "calm", "clever", "eager", "frosty", "gentle", "keen", "lucid",
            "mellow", "nimble", "proud", "quiet", "rapid", "sunny", "witty",
        ];
        const NOUNS: [&str; 16] = [
            "badger", "crane", "dolphin", "falcon", "gecko", "heron", "ibex", "jackdaw", "lynx",
            "marten", "newt", "otter", "puffin", "raven", "stoat", "wren",
        ];
        let [first, second] = bits;
        let adjective = ADJECTIVES[usize::from(first & 15)];
        let noun = NOUNS[usize::from(second & 15)];
        Self(format!(
            "{adjective}_{noun}{}",
            (first >> 4) * 16 + (second >> 4)
        ))
    }
}

impl FromStr for VmName {
    type Err = IdError;

    fn from_str(text: &str) -> Result<Self, IdError> {
        if is_name(text) {
            Ok(Self(text.to_owned()))
        } else {
            Err(IdError::Name(text.to_owned()))
        }
    }
}

impl TryFrom<String> for VmName {
    type Error = IdError;

    fn try_from(text: String) -> Result<Self, IdError> {
        text.parse()
    }
}

impl From<VmName> for String {
    fn from(name: VmName) -> Self {
        name.0
    }
}

impl fmt::Display for VmName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Tag of a snapshot, unique among the snapshots of one data directory.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct SnapshotTag(String);

impl SnapshotTag {
    /// The tag as given.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for SnapshotTag {
    type Err = IdError;

    fn from_str(text: &str) -> Result<Self, IdError> {
        if is_name(text) {
            Ok(Self(text.to_owned()))
        } else {
            Err(IdError::Tag(text.to_owned()))
        }
    }
}

impl TryFrom<String> for SnapshotTag {
    type Error = IdError;

    fn try_from(text: String) -> Result<Self, IdError> {
        text.parse()
    }
}

impl From<SnapshotTag> for String {
    fn from(tag: SnapshotTag) -> Self {
        tag.0
    }
}

impl fmt::Display for SnapshotTag {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_round_trip_and_refuse_everything_else() {
        let id = VmId::from_random([0xab; 16]);
        assert_eq!(id.as_str(), "ab".repeat(16));
        assert_eq!(id.short(), "abababababab");
        assert_eq!(id.as_str().parse::<VmId>().unwrap(), id);
        for bad in [
            "",
            "ab",
            "../etc/passwd",
            &"AB".repeat(16),
            &"ab".repeat(17),
        ] {
            assert!(bad.parse::<VmId>().is_err(), "{bad}");
        }
    }

    #[test]
    fn names_follow_podmans_rule() {
        for good in ["web", "a", "Web-1.2_x", &"a".repeat(63)] {
            assert!(good.parse::<VmName>().is_ok(), "{good}");
            assert!(good.parse::<SnapshotTag>().is_ok(), "{good}");
        }
        for bad in ["", "-web", ".", "..", "a/b", "a b", "ü", &"a".repeat(64)] {
            assert!(bad.parse::<VmName>().is_err(), "{bad}");
            assert!(bad.parse::<SnapshotTag>().is_err(), "{bad}");
        }
    }

    #[test]
    fn every_generated_name_is_valid() {
        for first in 0..=255 {
            for second in 0..=255 {
                let name = VmName::generate([first, second]);
                assert!(name.as_str().parse::<VmName>().is_ok(), "{name}");
            }
        }
    }
}
