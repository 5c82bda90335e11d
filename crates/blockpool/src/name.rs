//! Names as users write them: `dataset`, `dataset/object`, `dataset/object@snapshot`, `dataset@snapshot`.

use std::fmt;
use std::str::FromStr;

use crate::catalog::check_name;
use crate::error::PoolError;

/// A dataset, an object in one, or a snapshot of either.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Name {
    dataset: String,
    object: Option<String>,
    snapshot: Option<String>,
}

impl Name {
    /// The dataset.
    #[must_use]
    pub fn dataset(&self) -> &str {
        &self.dataset
    }

    /// The object in it, where one is named.
    #[must_use]
    pub fn object(&self) -> Option<&str> {
        self.object.as_deref()
    }

    /// The same thing at another snapshot.
    pub(crate) fn at_snapshot(&self, snapshot: &str) -> Result<Self, PoolError> {
        check_name(snapshot)?;
        Ok(Self {
            snapshot: Some(snapshot.to_owned()),
            ..self.clone()
        })
    }

    /// The snapshot, where one is named.
    #[must_use]
    pub fn snapshot(&self) -> Option<&str> {
        self.snapshot.as_deref()
    }
}

impl FromStr for Name {
    type Err = PoolError;

    fn from_str(text: &str) -> Result<Self, PoolError> {
        let (path, snapshot) = match text.split_once('@') {
            Some((path, snapshot)) => (path, Some(snapshot.to_owned())),
            None => (text, None),
        };
        let (dataset, object) = match path.split_once('/') {
            Some((dataset, object)) => (dataset.to_owned(), Some(object.to_owned())),
            None => (path.to_owned(), None),
        };
        for part in [Some(&dataset), object.as_ref(), snapshot.as_ref()]
            .into_iter()
            .flatten()
        {
            check_name(part)?;
        }
        Ok(Self {
            dataset,
            object,
            snapshot,
        })
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.dataset)?;
        if let Some(object) = &self.object {
            write!(f, "/{object}")?;
        }
        if let Some(snapshot) = &self.snapshot {
            write!(f, "@{snapshot}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_and_written() {
        for text in [
            "disks",
            "disks/web",
            "disks/web@before",
            "disks@monday",
            "ä/ö@ü",
        ] {
            let name: Name = text.parse().unwrap();
            assert_eq!(name.to_string(), text);
        }
        let name: Name = "disks/web@before".parse().unwrap();
        let parts = (name.dataset(), name.object(), name.snapshot());
        assert_eq!(parts, ("disks", Some("web"), Some("before")));
        let long = "x".repeat(256);
        for text in [
            "", "/", "a/", "/a", "a@", "@a", "a/b/c", "a@b@c", "a/b@c/d", "a\nb", "..", "a/.",
            &long,
        ] {
            assert!(text.parse::<Name>().is_err(), "{text:?}");
        }
    }
}
