//! User names, passwords and tokens, from the caller or from Docker's and Podman's files.
//!
//! The files and the credential helpers that they name are read by `docker_credential`. Which file is
//! asked for what is decided here.

use std::fmt;
use std::fs::File;
use std::io::{self, BufReader, Read};
use std::path::{Path, PathBuf};

use docker_credential::{CredentialRetrievalError, DockerCredential};

use crate::progress::one_line;
use crate::reference::Reference;

const FILE_MAX_BYTES: u64 = 4 << 20;

/// What proves to a registry who asks. Not shown by `Debug`.
#[derive(Clone, PartialEq, Eq)]
pub enum Credential {
    /// User and password.
    Password {
        /// User name.
        user: String,
        /// Password.
        password: String,
    },
    /// A token that is exchanged for one that gives access.
    IdentityToken(String),
}

impl fmt::Debug for Credential {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Password { .. } => "Password",
            Self::IdentityToken(_) => "IdentityToken",
        })
    }
}

/// Credentials that cannot be read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CredentialError {
    /// The text is not `user:password`.
    #[error("credentials are written user:password")]
    NoColon,
    /// The file cannot be opened.
    #[error("cannot read the credentials in {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The operating system's answer.
        source: io::Error,
    },
    /// The file, or the helper it names, does not give what it should.
    #[error("the credentials in {} cannot be used: {reason}", path.display())]
    Unusable {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
}

impl std::str::FromStr for Credential {
    type Err = CredentialError;

    /// Reads `user:password`; the password may have colons.
    fn from_str(text: &str) -> Result<Self, CredentialError> {
        let (user, password) = text.split_once(':').ok_or(CredentialError::NoColon)?;
        Ok(Self::Password {
            user: user.to_owned(),
            password: password.to_owned(),
        })
    }
}

/// Looks for the credentials of an image. May run a credential helper and wait for it.
pub(super) fn find(
    files: &[PathBuf],
    reference: &Reference,
) -> Result<Option<Credential>, CredentialError> {
    for path in files {
        let bytes = match read(path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(source) => {
                return Err(CredentialError::Read {
                    path: path.clone(),
                    source,
                });
            }
        };
        for key in keys(reference) {
            match docker_credential::get_credential_from_reader(bytes.as_slice(), &key) {
                Ok(DockerCredential::UsernamePassword(user, password)) if user.is_empty() => {
                    // Docker writes such entries for registries it has logged out of.
                    let _ = password;
                }
                Ok(DockerCredential::UsernamePassword(user, password)) => {
                    return Ok(Some(Credential::Password { user, password }));
                }
                Ok(DockerCredential::IdentityToken(token)) => {
                    return Ok(Some(Credential::IdentityToken(token)));
                }
                Err(error) => match explain(&error) {
                    None => {}
                    Some(reason) => {
                        return Err(CredentialError::Unusable {
                            path: path.clone(),
                            reason,
                        });
                    }
                },
            }
        }
    }
    Ok(None)
}

fn read(path: &Path) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let file = BufReader::new(File::open(path)?);
    file.take(FILE_MAX_BYTES).read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// The keys under which credentials may be kept: Podman's for a part of a registry, the registry's
/// own, and for Docker Hub the address it had in its first years.
fn keys(reference: &Reference) -> Vec<String> {
    let mut keys = Vec::new();
    let mut name = reference.name();
    while let Some((parent, _)) = name.rsplit_once('/') {
        keys.push(name.clone());
        name = parent.to_owned();
    }
    keys.push(name);
    if reference.registry() == "docker.io" {
        keys.push("https://index.docker.io/v1/".into());
    }
    keys
}

/// `None`: there are no credentials under this key.
fn explain(error: &CredentialRetrievalError) -> Option<String> {
    match error {
        CredentialRetrievalError::NoCredentialConfigured => None,
        // Helpers agree on these words, and on writing them to either stream.
        CredentialRetrievalError::HelperFailure {
            helper,
            stdout,
            stderr,
        } => {
            let text = format!("{stdout} {stderr}");
            if text.contains("credentials not found") {
                None
            } else {
                Some(format!(
                    "the helper {helper} failed: {}",
                    one_line(&text, 200)
                ))
            }
        }
        CredentialRetrievalError::HelperCommunicationError => {
            Some("the credential helper that it names cannot be run; is it installed?".into())
        }
        CredentialRetrievalError::ConfigReadError => Some("the file is not valid JSON".into()),
        other => Some(one_line(&other.to_string(), 200)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(json: &str, reference: &str) -> Result<Option<Credential>, CredentialError> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("auth.json");
        std::fs::write(&path, json).unwrap();
        find(
            &[dir.path().join("absent"), path],
            &reference.parse().unwrap(),
        )
    }

    fn password(user: &str, password: &str) -> Option<Credential> {
        Some(Credential::Password {
            user: user.into(),
            password: password.into(),
        })
    }

    #[test]
    fn dockers_and_podmans_keys_are_found() {
        // "u:p" and "v:q" in base64.
        let json = r#"{"auths": {
            "https://index.docker.io/v1/": {"auth": "dTpw"},
            "registry.example": {"auth": "dTpw"},
            "registry.example/team": {"auth": "djpx"},
            "registry.example:5000": {"auth": "", "identitytoken": "t"},
            "logged-out.example": {}
        }}"#;
        assert_eq!(found(json, "debian").unwrap(), password("u", "p"));
        assert_eq!(
            found(json, "registry.example/a/b").unwrap(),
            password("u", "p")
        );
        assert_eq!(
            found(json, "registry.example/team/b").unwrap(),
            password("v", "q")
        );
        let token = Credential::IdentityToken("t".into());
        assert_eq!(found(json, "registry.example:5000/a").unwrap(), Some(token));
        assert_eq!(found(json, "logged-out.example/a").unwrap(), None);
        assert_eq!(found(json, "other.example/a").unwrap(), None);
    }

    #[test]
    fn a_broken_file_is_named() {
        for json in [
            "",
            "{",
            r#"{"auths": {"registry.example": {"auth": "%%"}}}"#,
        ] {
            let error = found(json, "registry.example/a").unwrap_err().to_string();
            assert!(error.contains("auth.json"), "{error}");
        }
        let error = "nocolon".parse::<Credential>().unwrap_err().to_string();
        assert!(error.contains("user:password"), "{error}");
    }

    #[test]
    fn passwords_are_not_shown() {
        let credential = "user:secret".parse::<Credential>().unwrap();
        assert_eq!(format!("{credential:?}"), "Password");
    }
}
