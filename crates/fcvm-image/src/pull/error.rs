//! What can go wrong with a registry, and the wording of it.

use std::path::PathBuf;

use super::credentials::CredentialError;
use crate::format::{FormatError, PlatformError};
use crate::store::StoreError;

/// Failure of [`pull`](super::pull). Partial downloads of layers are kept for the next try.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PullError {
    /// Nobody answers.
    #[error("cannot reach the registry {registry}: {reason}; check its name and the network")]
    Unreachable {
        /// The registry, with its port where one was given.
        registry: String,
        /// What the network said.
        reason: String,
    },
    /// The server's certificate is not trusted.
    #[error(
        "the certificate of the registry {registry} is not trusted: {reason}; add its authority \
         with --cert-dir, or use --tls-verify=false if you know what you do"
    )]
    Certificate {
        /// The registry.
        registry: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The HTTP client cannot be set up.
    #[error("cannot set up the connection: {reason}")]
    Setup {
        /// Why: no system certificates, or a wrong proxy.
        reason: String,
    },
    /// A certificate file is not usable.
    #[error("cannot use the certificate {}: {reason}", path.display())]
    CertificateFile {
        /// The file.
        path: PathBuf,
        /// Why.
        reason: String,
    },
    /// The connection broke, and trying again did not help.
    #[error(
        "the connection to the registry {registry} failed: {reason}; try again, what came is kept"
    )]
    Connection {
        /// The registry.
        registry: String,
        /// What the network said.
        reason: String,
    },
    /// The registry does not let us.
    #[error("the registry {registry} denies access to {repository}: {reason}")]
    Denied {
        /// The registry.
        registry: String,
        /// The repository.
        repository: String,
        /// With whose credentials, and what to do.
        reason: &'static str,
    },
    /// There is no such image.
    #[error("the registry {registry} has no image {repository} with {selector}")]
    NotFound {
        /// The registry.
        registry: String,
        /// The repository.
        repository: String,
        /// Tag or digest.
        selector: String,
    },
    /// The registry has had enough of us.
    #[error("the registry {registry} limits how much it serves; wait, or log in")]
    RateLimited {
        /// The registry.
        registry: String,
    },
    /// The registry answered with an error.
    #[error("the registry {registry} answered {status}: {message}")]
    Status {
        /// The registry.
        registry: String,
        /// HTTP status code.
        status: u16,
        /// The registry's words.
        message: String,
    },
    /// The registry does not keep to the specification.
    #[error("the registry {registry} is broken: {reason}")]
    Protocol {
        /// The registry.
        registry: String,
        /// What it did.
        reason: String,
    },
    /// Credentials cannot be read.
    #[error(transparent)]
    Credential(#[from] CredentialError),
    /// The image cannot be used.
    #[error("{reference}: {error}")]
    Format {
        /// The image.
        reference: String,
        /// What is wrong.
        error: FormatError,
    },
    /// The image is for another machine.
    #[error(transparent)]
    Platform(#[from] PlatformError),
    /// The image cannot be stored.
    #[error(transparent)]
    Store(#[from] StoreError),
}
