//! Names of images, by Docker's rules.
//!
//! The grammar is the distribution specification's, read by `oci-spec`; added here are the rule for
//! names given on this machine (`localhost/`) and messages that say what is wrong.

use std::fmt;
use std::str::FromStr;

use oci_spec::distribution::{ParseError, Reference as OciReference};

use crate::digest::Digest;
use crate::progress::one_line;

/// No reference is longer: a registry, 255 characters of repository, 128 of tag and a digest.
const MAX_BYTES: usize = 1024;

/// The registry part of names that were given on this machine and belong to no registry.
const LOCAL_REGISTRY: &str = "localhost";

/// A complete image reference: registry, repository, and a tag or digest or both.
///
/// It is shown in full (`docker.io/library/debian:latest`), as Podman does.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Reference(OciReference);

/// A text that is no image reference.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "'{text}' is not an image reference: {reason}; write [registry[:port]/]name[:tag][@sha256:...]"
)]
pub struct ReferenceError {
    text: String,
    reason: &'static str,
}

impl Reference {
    /// Reads a name that is given to an image on this machine, as `tag` and `bootstrap` do: a short
    /// name belongs to `localhost/`, where a registry's name would promise an origin it has not.
    ///
    /// # Errors
    ///
    /// The text breaks the rules, or asks for a digest, which nobody can give.
    pub fn parse_local(text: &str) -> Result<Self, ReferenceError> {
        let reference = if is_short(text) {
            format!("{LOCAL_REGISTRY}/{text}").parse::<Self>()
        } else {
            text.parse::<Self>()
        };
        let reference = reference.map_err(|error| ReferenceError {
            text: shown(text),
            ..error
        })?;
        if reference.digest().is_some() {
            return Err(ReferenceError {
                text: shown(text),
                reason: "a name that is given to an image has a tag and no digest",
            });
        }
        Ok(reference)
    }

    /// Registry, with its port where the text had one: `docker.io`, `localhost:5000`.
    pub fn registry(&self) -> &str {
        self.0.registry()
    }

    /// Where the registry's server is: Docker Hub is not at its name.
    pub(crate) fn server(&self) -> &str {
        match self.registry() {
            "docker.io" => "registry-1.docker.io",
            other => other,
        }
    }

    /// Repository: `library/debian`.
    pub fn repository(&self) -> &str {
        self.0.repository()
    }

    /// Tag; absent where the text had a digest only.
    pub fn tag(&self) -> Option<&str> {
        self.0.tag()
    }

    /// Digest, where the text had one.
    pub fn digest(&self) -> Option<Digest> {
        // Only such a digest passes `from_str`.
        self.0.digest().and_then(|text| text.parse().ok())
    }

    /// Registry and repository, without tag and digest.
    pub fn name(&self) -> String {
        format!("{}/{}", self.registry(), self.repository())
    }
}

/// What `text` may stand for in the store, most likely first: a short name is looked for among the
/// names given here, then under Docker Hub.
pub(crate) fn candidates(text: &str) -> Vec<Reference> {
    let local = if is_short(text) {
        format!("{LOCAL_REGISTRY}/{text}").parse().ok()
    } else {
        None
    };
    local.into_iter().chain(text.parse().ok()).collect()
}

/// The first component names no registry: it has no dot and no port and is not `localhost`.
fn is_short(text: &str) -> bool {
    match text.split_once('/') {
        None => true,
        Some((first, _)) => {
            !first.contains(['.', ':'])
                && first != LOCAL_REGISTRY
                && first.to_ascii_lowercase() == first
        }
    }
}

fn shown(text: &str) -> String {
    one_line(text, 200)
}

impl FromStr for Reference {
    type Err = ReferenceError;

    fn from_str(text: &str) -> Result<Self, ReferenceError> {
        let refuse = |reason| {
            Err(ReferenceError {
                text: shown(text),
                reason,
            })
        };
        if text.is_empty() {
            return refuse("it is empty");
        }
        if text.len() > MAX_BYTES {
            return refuse("it is too long");
        }
        if text.contains("://") {
            return refuse("it has a URL scheme, and a reference begins with the registry's name");
        }
        // Docker refuses it because it cannot be told from an image id.
        if Digest::from_hex(text).is_ok() {
            return refuse("64 hexadecimal digits are an image id");
        }
        let reference = match OciReference::from_str(text) {
            Ok(reference) => reference,
            Err(error) => return refuse(explain(text, &error)),
        };
        // A first component in capitals that is no registry: it would not be read again.
        if reference
            .repository()
            .contains(|c: char| c.is_ascii_uppercase())
        {
            return refuse("its repository must be in lower case");
        }
        if let Some(digest) = reference.digest()
            && digest.parse::<Digest>().is_err()
        {
            return refuse("only sha256 digests, in lower case, can be checked");
        }
        Ok(Self(reference))
    }
}

fn explain(text: &str, error: &ParseError) -> &'static str {
    let path = text.split_once('/').map_or(text, |(_, rest)| rest);
    let name = path.split(['@', ':']).next().unwrap_or(path);
    match error {
        ParseError::DigestInvalidFormat | ParseError::DigestInvalidLength => {
            "its digest does not have 64 hexadecimal digits"
        }
        ParseError::DigestUnsupported => "only sha256 digests can be checked",
        ParseError::NameTooLong => "its repository has more than 255 characters",
        _ if name.chars().any(|c| c.is_ascii_uppercase()) => "its repository must be in lower case",
        _ if text.contains("@sha256:") => "its digest does not have 64 hexadecimal digits",
        _ => "it breaks the rules for names and tags",
    }
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

impl serde::Serialize for Reference {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DIGEST: &str = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

    #[test]
    fn dockers_rules_complete_a_reference() {
        let with_digest = format!("host:5000/a/b:tag@{DIGEST}");
        let digest_only = format!("debian@{DIGEST}");
        for (text, full) in [
            ("debian", "docker.io/library/debian:latest"),
            ("debian:bookworm", "docker.io/library/debian:bookworm"),
            ("user/app", "docker.io/user/app:latest"),
            ("docker.io/debian", "docker.io/library/debian:latest"),
            ("index.docker.io/debian", "docker.io/library/debian:latest"),
            ("localhost/x", "localhost/x:latest"),
            ("localhost:5000/x", "localhost:5000/x:latest"),
            ("host:5000/a/b", "host:5000/a/b:latest"),
            (
                "registry.example/a__b/c-d.e:V1.0_x",
                "registry.example/a__b/c-d.e:V1.0_x",
            ),
            ("x:5000", "docker.io/library/x:5000"),
            (&with_digest, &with_digest),
            (&digest_only, &format!("docker.io/library/debian@{DIGEST}")),
        ] {
            let reference = text.parse::<Reference>().unwrap();
            assert_eq!(reference.to_string(), full, "{text}");
            assert_eq!(full.parse::<Reference>().unwrap(), reference, "{text}");
        }
        let reference = with_digest.parse::<Reference>().unwrap();
        assert_eq!(reference.registry(), "host:5000");
        assert_eq!(reference.repository(), "a/b");
        assert_eq!(reference.tag(), Some("tag"));
        assert_eq!(reference.digest().unwrap().to_string(), DIGEST);
    }

    #[test]
    fn everything_else_is_refused_with_its_reason() {
        let upper_digest = format!("a@{}", DIGEST.replace("e3b0", "E3B0"));
        for (bad, reason) in [
            ("", "empty"),
            ("Debian", "lower case"),
            ("registry.example/App:x", "lower case"),
            ("Team/app", "lower case"),
            ("https://registry.example/app", "URL scheme"),
            (&DIGEST[7..], "image id"),
            (&upper_digest, "lower case"),
            ("a@sha256:12", "64 hexadecimal digits"),
            (&format!("a@sha512:{}", "0".repeat(128)), "sha256"),
            (&"a".repeat(300), "255 characters"),
            (&"a".repeat(5000), "too long"),
            ("a:b:c", "breaks the rules"),
            ("a b", "breaks the rules"),
            ("a/../b", "breaks the rules"),
            ("/a", "breaks the rules"),
            ("a/", "breaks the rules"),
            ("a:", "breaks the rules"),
            ("-a", "breaks the rules"),
            ("a\nb", "breaks the rules"),
        ] {
            let error = bad.parse::<Reference>().unwrap_err().to_string();
            assert!(error.contains(reason), "{bad}: {error}");
            assert!(!error.contains('\n') && error.len() < 500, "{error}");
        }
    }

    #[test]
    fn short_names_given_here_belong_to_localhost() {
        for (text, full) in [
            ("debian:bookworm", "localhost/debian:bookworm"),
            ("me/app", "localhost/me/app:latest"),
            ("localhost/app", "localhost/app:latest"),
            ("registry.example/app", "registry.example/app:latest"),
        ] {
            assert_eq!(Reference::parse_local(text).unwrap().to_string(), full);
        }
        assert!(Reference::parse_local(&format!("a@{DIGEST}")).is_err());
        let found: Vec<String> = candidates("debian")
            .iter()
            .map(Reference::to_string)
            .collect();
        assert_eq!(
            found,
            ["localhost/debian:latest", "docker.io/library/debian:latest"]
        );
        assert_eq!(candidates("registry.example/a").len(), 1);
        assert!(candidates("A B").is_empty());
    }
}
