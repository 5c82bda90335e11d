//! Names of images, by Docker's rules.
//!
//! The grammar is that of distribution/reference (`reference.go`), with the rule for names given on
//! this machine (`localhost/`) and messages that say what is wrong. `oci-spec` reads the same grammar
//! with an expression whose compilation takes 30 ms and 20 MB in every process that names an image;
//! the tests compare with it.

use std::fmt;
use std::str::FromStr;

use crate::digest::Digest;
use crate::progress::one_line;

/// No reference is longer: a registry, 255 characters of repository, 128 of tag and a digest.
const MAX_BYTES: usize = 1024;

/// Longest repository.
const REPOSITORY_MAX_BYTES: usize = 255;
/// Longest tag.
const TAG_MAX_BYTES: usize = 128;
/// Where images are that name no registry.
const DEFAULT_REGISTRY: &str = "docker.io";

/// The registry part of names that were given on this machine and belong to no registry.
const LOCAL_REGISTRY: &str = "localhost";

/// A complete image reference: registry, repository, and a tag or digest or both.
///
/// It is shown in full (`docker.io/library/debian:latest`), as Podman does.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Reference {
    registry: String,
    repository: String,
    /// Absent only where there is a digest.
    tag: Option<String>,
    digest: Option<Digest>,
}

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
        &self.registry
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
        &self.repository
    }

    /// Tag; absent where the text had a digest only.
    pub fn tag(&self) -> Option<&str> {
        self.tag.as_deref()
    }

    /// Digest, where the text had one.
    pub fn digest(&self) -> Option<Digest> {
        self.digest
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
        let (rest, digest) = match text.split_once('@') {
            Some((rest, digest)) => match parse_digest(digest) {
                Ok(digest) => (rest, Some(digest)),
                Err(reason) => return refuse(reason),
            },
            None => (text, None),
        };
        // A colon before the last slash is that of a port.
        let name_at = rest.rfind('/').map_or(0, |slash| slash + 1);
        let (name, tag) = match rest[name_at..].rfind(':') {
            Some(colon) => {
                let (name, tag) = rest.split_at(name_at + colon);
                (name, Some(&tag[1..]))
            }
            None => (rest, None),
        };
        let (registry, path) = split_registry(name);
        let repository = if registry == DEFAULT_REGISTRY && !path.contains('/') {
            format!("library/{path}")
        } else {
            path.to_owned()
        };
        if repository.len() > REPOSITORY_MAX_BYTES {
            return refuse("its repository has more than 255 characters");
        }
        if path.contains(|c: char| c.is_ascii_uppercase()) {
            return refuse("its repository must be in lower case");
        }
        // The grammar tries a path alone too: so names of hosts with '_' and without a port are taken.
        let has_registry = is_registry(registry) || is_component(registry);
        if !has_registry || !path.split('/').all(is_component) || !tag.is_none_or(is_tag) {
            return refuse("it breaks the rules for names and tags");
        }
        let latest = || digest.is_none().then(|| "latest".to_owned());
        Ok(Self {
            registry: registry.to_owned(),
            repository,
            tag: tag.map(str::to_owned).or_else(latest),
            digest,
        })
    }
}

fn parse_digest(text: &str) -> Result<Digest, &'static str> {
    let Some(hexadecimal) = text.strip_prefix("sha256:") else {
        return Err("only sha256 digests can be checked");
    };
    if hexadecimal.len() != 64 || !hexadecimal.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return Err("its digest does not have 64 hexadecimal digits");
    }
    text.parse()
        .map_err(|_| "only sha256 digests, in lower case, can be checked")
}

/// Registry and path, as Docker splits them: the first component is a registry's if it looks like
/// the name of a host.
fn split_registry(name: &str) -> (&str, &str) {
    match name.split_once('/') {
        Some((first, path)) if first.contains(['.', ':']) || first == LOCAL_REGISTRY => {
            let old_name = first == "index.docker.io";
            (if old_name { DEFAULT_REGISTRY } else { first }, path)
        }
        _ => (DEFAULT_REGISTRY, name),
    }
}

/// Host name or address, with a port or without.
fn is_registry(text: &str) -> bool {
    let (host, port) = match text.rsplit_once(':') {
        Some((host, port)) if !port.ends_with(']') => (host, port),
        _ => (text, "0"),
    };
    let is_port = !port.is_empty() && port.bytes().all(|byte| byte.is_ascii_digit());
    if let Some(address) = host.strip_prefix('[') {
        let fits = |byte: u8| byte.is_ascii_hexdigit() || byte == b':';
        return is_port
            && address
                .strip_suffix(']')
                .is_some_and(|address| !address.is_empty() && address.bytes().all(fits));
    }
    let is_label = |label: &str| {
        let fits = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-';
        !label.is_empty()
            && label.bytes().all(fits)
            && !label.starts_with('-')
            && !label.ends_with('-')
    };
    is_port && host.split('.').all(is_label)
}

/// Letters and digits, and between them one '.', one or two '_', or any number of '-'.
fn is_component(text: &str) -> bool {
    let is_plain = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
    let bytes = text.as_bytes();
    let ends_fit = |end: Option<&u8>| end.is_some_and(|byte| is_plain(*byte));
    ends_fit(bytes.first())
        && ends_fit(bytes.last())
        && text
            .split(|c: char| u8::try_from(c).is_ok_and(is_plain))
            .all(|between| {
                matches!(between, "" | "." | "_" | "__") || between.bytes().all(|byte| byte == b'-')
            })
}

fn is_tag(text: &str) -> bool {
    let is_word = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_';
    (1..=TAG_MAX_BYTES).contains(&text.len())
        && text
            .bytes()
            .all(|byte| is_word(byte) || b".-".contains(&byte))
        && is_word(text.as_bytes()[0])
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.registry, self.repository)?;
        if let Some(tag) = &self.tag {
            write!(f, ":{tag}")?;
        }
        match &self.digest {
            Some(digest) => write!(f, "@{digest}"),
            None => Ok(()),
        }
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

    /// What another reader of the same grammar makes of the text.
    fn oracle(text: &str) -> Option<String> {
        let reference = text.parse::<oci_spec::distribution::Reference>().ok()?;
        // It takes these, and what it shows of them cannot be read again, or not be checked.
        let unusable = reference
            .repository()
            .contains(|c: char| c.is_ascii_uppercase())
            || reference
                .digest()
                .is_some_and(|digest| digest.parse::<Digest>().is_err());
        (!unusable).then(|| reference.to_string())
    }

    const ODD: [&str; 17] = [
        "a--b/c",
        "a..b",
        "a_b",
        "a__b",
        "a___b",
        "a._b",
        "a.-b",
        "a-",
        "-a/b",
        "a.b-/c",
        "a.b:/c",
        "a.b:5000/c:5000",
        "[]/a",
        "A.example/b",
        "a.a_a/a",
        "a.a_a:1/a",
        "A.a_a/a",
    ];

    #[test]
    fn odd_names_are_read_as_by_another_reader() {
        for text in ODD {
            let ours = text
                .parse::<Reference>()
                .ok()
                .map(|found| found.to_string());
            assert_eq!(ours, oracle(text), "{text}");
        }
        // The grammar has these, and the other reader has not.
        for text in ["[::1]:5000/a:latest", "[fd00::2]/a:latest"] {
            assert_eq!(text.parse::<Reference>().unwrap().to_string(), text);
        }
    }

    proptest::proptest! {
        #[test]
        fn what_is_accepted_is_read_again_and_by_others(text in "([a-zA-Z0-9._-]{1,6}(:[0-9]{1,5})?/)?[a-z0-9._/-]{1,12}(:[a-zA-Z0-9._-]{0,6})?") {
            let found = text.parse::<Reference>();
            proptest::prop_assert_eq!(found.as_ref().ok().map(Reference::to_string), oracle(&text));
            if let Ok(reference) = found {
                let again = reference.to_string().parse::<Reference>();
                proptest::prop_assert_eq!(again, Ok(reference));
            }
        }

        #[test]
        fn no_text_makes_it_panic(text: String) {
            let _ = text.parse::<Reference>();
            let _ = Reference::parse_local(&text);
        }
    }
}
