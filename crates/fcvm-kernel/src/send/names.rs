//! Names of datasets and snapshots. They are words of a command line on another host: what a shell would read
//! as more than a word is refused, blanks among it, which ZFS would allow.

use std::fmt;
use std::str::FromStr;

use super::{Request, SendError};

/// `ZFS_MAX_DATASET_NAME_LEN`, its zero byte not counted.
const NAME_BYTES_MAX: usize = 255;

/// A dataset: `pool/path`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Dataset(String);

/// A snapshot: `pool/path@name`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Snapshot {
    dataset: Dataset,
    name: String,
}

fn is_component(text: &str) -> bool {
    !text.is_empty()
        && !text.starts_with('-')
        && text
            .chars()
            .all(|c| c.is_ascii_alphanumeric() || "_-.:".contains(c))
}

impl FromStr for Dataset {
    type Err = SendError;

    fn from_str(text: &str) -> Result<Self, SendError> {
        if text.len() <= NAME_BYTES_MAX && text.split('/').all(is_component) {
            Ok(Self(text.to_owned()))
        } else {
            Err(SendError::Name(text.to_owned(), "dataset, as pool/name"))
        }
    }
}

impl FromStr for Snapshot {
    type Err = SendError;

    fn from_str(text: &str) -> Result<Self, SendError> {
        let refuse = || SendError::Name(text.to_owned(), "snapshot, as pool/name@snapshot");
        let (dataset, name) = text.split_once('@').ok_or_else(refuse)?;
        if text.len() > NAME_BYTES_MAX || !is_component(name) {
            return Err(refuse());
        }
        Ok(Self {
            dataset: dataset.parse().map_err(|_| refuse())?,
            name: name.to_owned(),
        })
    }
}

impl Dataset {
    /// A snapshot of it.
    pub(super) fn snapshot(&self, name: &str) -> Snapshot {
        Snapshot {
            dataset: self.clone(),
            name: name.to_owned(),
        }
    }
}

impl Snapshot {
    /// Its dataset.
    pub fn dataset(&self) -> &Dataset {
        &self.dataset
    }

    /// What follows the `@`.
    pub fn name(&self) -> &str {
        &self.name
    }
}

impl fmt::Display for Dataset {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Display for Snapshot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}@{}", self.dataset, self.name)
    }
}

pub(super) fn check_host(host: &str) -> Result<(), SendError> {
    let good = !host.is_empty()
        && !host.starts_with('-')
        && host
            .chars()
            .all(|c| c.is_ascii_alphanumeric() || "_-.:@[]%".contains(c));
    if good {
        Ok(())
    } else {
        Err(SendError::Name(
            host.to_owned(),
            "host, as name or user@name",
        ))
    }
}

/// The tag of the hold: one per destination, the same in the next run.
pub(super) fn hold_tag(request: &Request) -> String {
    let host = request.ssh_host.as_deref().unwrap_or("here");
    let place = format!("{host}:{}", request.destination);
    let digest = crate::files::sha256_hex(place.as_bytes());
    format!("fcvm-send-{}", &digest[..16])
}
