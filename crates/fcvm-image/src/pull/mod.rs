//! Images from registries, by the OCI distribution specification.
//!
//! The HTTP client is reqwest; what is here is what the specification asks of a client. `oci-client`
//! would do that too, but it reads manifests, tokens and error pages of any length into memory and
//! knows no identity tokens, and a registry is trusted in nothing here: every body has a limit.
//!
//! An interrupted download stays in the store and goes on where it stopped, within one pull and at
//! the next one.

mod client;
mod credentials;
mod error;
mod layer;

use std::collections::HashSet;
use std::path::PathBuf;

use futures_util::future::try_join_all;
use oci_spec::image::{Descriptor, ImageManifest};
use tokio::sync::Semaphore;

use self::client::Registry;
pub use self::credentials::{Credential, CredentialError};
pub use self::error::PullError;
use self::layer::LayerPull;
use crate::digest::Digest;
use crate::format::{
    self, CONFIG_MAX_BYTES, Document, FormatError, MANIFEST_MAX_BYTES, Platform, descriptor_digest,
};
use crate::progress::Progress;
use crate::reference::Reference;
use crate::store::{Image, ImageStore, StoreError};

/// How [`pull`] reaches the registry and what it asks for.
#[derive(Debug, Clone)]
pub struct PullOptions {
    /// Which image of an index. An image for another platform is refused.
    pub platform: Platform,
    /// `false`: any certificate is accepted, and plain HTTP where the server has no TLS. Even when
    /// `true`, registries on loopback addresses may be without TLS.
    pub tls_verify: bool,
    /// Directories whose `*.crt` and `*.pem` files are trusted besides the system's authorities.
    /// One that does not exist is no error.
    pub certificate_dirs: Vec<PathBuf>,
    /// User and password, before those of `credential_files`.
    pub credential: Option<Credential>,
    /// Docker's `config.json` and Podman's `auth.json` files, the most important one first. One that
    /// does not exist is no error.
    pub credential_files: Vec<PathBuf>,
    /// Proxy for https, as a URL.
    pub https_proxy: Option<String>,
    /// Proxy for plain http, as a URL.
    pub http_proxy: Option<String>,
    /// Hosts to reach without a proxy, separated by commas.
    pub no_proxy: Option<String>,
    /// Layers that are downloaded at one time.
    pub parallel_count: usize,
}

impl Default for PullOptions {
    fn default() -> Self {
        Self {
            platform: Platform::host(),
            tls_verify: true,
            certificate_dirs: Vec::new(),
            credential: None,
            credential_files: Vec::new(),
            https_proxy: None,
            http_proxy: None,
            no_proxy: None,
            parallel_count: 4,
        }
    }
}

/// Fetches an image and gives it the name `reference`. What is here already is not fetched again.
///
/// Needs a tokio runtime with time and I/O; one thread is enough. Dropped before its end it leaves
/// partial downloads for the next pull, and nothing else.
pub async fn pull(
    store: &ImageStore,
    reference: &Reference,
    options: &PullOptions,
    progress: &dyn Progress,
) -> Result<Image, PullError> {
    let registry = Registry::connect(reference, options).await?;
    let bytes = fetch_manifest(&registry, reference, options).await?;
    let manifest = format::parse_manifest(&bytes).map_err(|error| unusable(reference, error))?;
    let ingest = store.begin_resumable()?;
    let config = fetch_config(&registry, store, &manifest, options, reference).await?;
    let parallel = Semaphore::new(options.parallel_count.max(1));
    let mut seen = HashSet::new();
    let mut layers = Vec::new();
    for layer in manifest.layers() {
        let digest = digest_of(reference, layer)?;
        // Some builders list the empty layer many times.
        if seen.insert(digest) {
            let size_bytes = layer.size();
            let layer = LayerPull {
                store,
                registry: &registry,
                digest,
                size_bytes,
                progress,
            };
            layers.push(layer.run(&ingest, &parallel));
        }
    }
    try_join_all(layers).await?;
    ingest.put(&config)?;
    Ok(ingest.finish(&bytes, std::slice::from_ref(reference))?)
}

fn unusable(reference: &Reference, error: FormatError) -> PullError {
    PullError::Format {
        reference: reference.to_string(),
        error,
    }
}

fn digest_of(reference: &Reference, descriptor: &Descriptor) -> Result<Digest, PullError> {
    descriptor_digest("image manifest", descriptor).map_err(|error| unusable(reference, error))
}

/// Fetches the manifest for the platform, through an index where there is one.
async fn fetch_manifest(
    registry: &Registry,
    reference: &Reference,
    options: &PullOptions,
) -> Result<Vec<u8>, PullError> {
    let mut expected = reference.digest();
    // An index may lead to another one; nothing real goes deeper.
    for _ in 0..3 {
        let selector = match expected {
            Some(digest) => digest.to_string(),
            None => reference.tag().unwrap_or("latest").to_owned(),
        };
        let bytes = registry.manifest(&selector, MANIFEST_MAX_BYTES).await?;
        verify("the manifest", expected, &bytes)?;
        match format::parse_document(&bytes).map_err(|error| unusable(reference, error))? {
            Document::Manifest(_) => return Ok(bytes),
            Document::Index(index) => {
                let entry = options.platform.select(&index);
                expected = Some(digest_of(reference, entry?)?);
            }
        }
    }
    let (document, reason) = ("image index", "indexes lead to indexes without end".into());
    Err(unusable(
        reference,
        FormatError::Malformed { document, reason },
    ))
}

async fn fetch_config(
    registry: &Registry,
    store: &ImageStore,
    manifest: &ImageManifest,
    options: &PullOptions,
    reference: &Reference,
) -> Result<Vec<u8>, PullError> {
    let digest = digest_of(reference, manifest.config())?;
    let bytes = match store.read_blob(&digest, CONFIG_MAX_BYTES) {
        Ok(bytes) => bytes,
        Err(_) => registry.small_blob(&digest, CONFIG_MAX_BYTES).await?,
    };
    verify("the configuration", Some(digest), &bytes)?;
    let config = format::parse_config(&bytes).map_err(|error| unusable(reference, error))?;
    format::check_layers(manifest, &config).map_err(|error| unusable(reference, error))?;
    options.platform.check(&config)?;
    Ok(bytes)
}

fn verify(what: &str, expected: Option<Digest>, bytes: &[u8]) -> Result<(), PullError> {
    let actual = Digest::of(bytes);
    match expected {
        Some(expected) if expected != actual => {
            let what = format!("{what} that the registry sent");
            Err(StoreError::DigestMismatch {
                what,
                expected,
                actual,
            }
            .into())
        }
        _ => Ok(()),
    }
}
