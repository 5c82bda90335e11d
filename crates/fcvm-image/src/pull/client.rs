//! One registry: its address, what it wants to know of us, and bounded answers.

use std::fs;
use std::io;
use std::net::IpAddr;
use std::path::Path;
use std::time::Duration;

use http_auth::ChallengeParser;
use reqwest::header::{ACCEPT, AUTHORIZATION, HeaderMap, HeaderValue, RANGE, WWW_AUTHENTICATE};
use reqwest::redirect::{Attempt, Policy};
use reqwest::{Client, NoProxy, Proxy, RequestBuilder, Response, StatusCode, Url};
use tokio::sync::Mutex;

use super::credentials::{self, Credential};
use super::{PullError, PullOptions};
use crate::digest::Digest;
use crate::format::{DOCKER_INDEX, DOCKER_MANIFEST};
use crate::progress::one_line;
use crate::reference::Reference;

const CONNECT_TIMEOUT: Duration = Duration::from_secs(20);
const READ_TIMEOUT: Duration = Duration::from_secs(60);
const TOKEN_MAX_BYTES: u64 = 1 << 20;
const ERROR_MAX_BYTES: u64 = 16 << 10;
const REDIRECTS_MAX_COUNT: usize = 10;
const OCI_MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const OCI_INDEX: &str = "application/vnd.oci.image.index.v1+json";

/// A registry that was reached, and one repository of it.
pub(super) struct Registry {
    http: Client,
    /// `https://registry.example/v2/library/debian`.
    repository_url: String,
    is_encrypted: bool,
    tls_verify: bool,
    /// For messages.
    name: String,
    repository: String,
    credential: Option<Credential>,
    /// What the registry accepted or was given last.
    authorization: Mutex<Option<HeaderValue>>,
}

/// Why a request has no usable answer.
pub(super) enum Failure {
    /// Trying again later may help, after the time the registry asks for.
    Transient {
        error: PullError,
        after: Option<Duration>,
    },
    /// It will not.
    Lasting(PullError),
}

impl From<Failure> for PullError {
    fn from(failure: Failure) -> Self {
        match failure {
            Failure::Transient { error, .. } | Failure::Lasting(error) => error,
        }
    }
}

impl Registry {
    /// Finds out how the registry is reached.
    pub(super) async fn connect(
        reference: &Reference,
        options: &PullOptions,
    ) -> Result<Self, PullError> {
        let credential = match &options.credential {
            Some(credential) => Some(credential.clone()),
            None => find_credential(reference, options).await?,
        };
        let mut registry = Self {
            http: client(options)?,
            repository_url: String::new(),
            is_encrypted: true,
            tls_verify: options.tls_verify,
            name: reference.registry().to_owned(),
            repository: reference.repository().to_owned(),
            credential,
            authorization: Mutex::new(None),
        };
        let server = reference.server();
        let may_be_plain = !options.tls_verify || is_loopback(server);
        if let Err(error) = registry
            .http
            .get(format!("https://{server}/v2/"))
            .send()
            .await
        {
            if let Some(reason) = certificate_problem(&error) {
                return Err(PullError::Certificate {
                    registry: registry.name,
                    reason,
                });
            }
            if !may_be_plain {
                return Err(registry.unreachable(&error));
            }
            let plain = registry
                .http
                .get(format!("http://{server}/v2/"))
                .send()
                .await;
            plain.map_err(|error| registry.unreachable(&error))?;
            registry.is_encrypted = false;
        }
        let scheme = if registry.is_encrypted {
            "https"
        } else {
            "http"
        };
        let repository = reference.repository();
        registry.repository_url = format!("{scheme}://{server}/v2/{repository}");
        Ok(registry)
    }

    /// A manifest or index, by tag or digest.
    pub(super) async fn manifest(
        &self,
        selector: &str,
        limit_bytes: u64,
    ) -> Result<Vec<u8>, PullError> {
        let accept = format!("{OCI_MANIFEST}, {OCI_INDEX}, {DOCKER_MANIFEST}, {DOCKER_INDEX}");
        let url = format!("{}/manifests/{selector}", self.repository_url);
        self.small(&url, &accept, selector, limit_bytes).await
    }

    /// A blob that fits in memory.
    pub(super) async fn small_blob(
        &self,
        digest: &Digest,
        limit_bytes: u64,
    ) -> Result<Vec<u8>, PullError> {
        let url = format!("{}/blobs/{digest}", self.repository_url);
        self.small(&url, "*/*", &digest.to_string(), limit_bytes)
            .await
    }

    /// The rest of a blob from `offset_bytes` on. The answer may begin at 0 all the same.
    pub(super) async fn blob(
        &self,
        digest: &Digest,
        offset_bytes: u64,
    ) -> Result<Response, Failure> {
        let url = format!("{}/blobs/{digest}", self.repository_url);
        self.get(&url, &digest.to_string(), |request| match offset_bytes {
            0 => request,
            offset => request.header(RANGE, format!("bytes={offset}-")),
        })
        .await
    }

    async fn small(
        &self,
        url: &str,
        accept: &str,
        selector: &str,
        limit_bytes: u64,
    ) -> Result<Vec<u8>, PullError> {
        super::layer::retried(async |_| {
            let response = self
                .get(url, selector, |request| request.header(ACCEPT, accept))
                .await?;
            self.body(response, limit_bytes).await
        })
        .await
    }

    /// Sends a request, with what the registry wants to know of us, once it has said what.
    async fn get(
        &self,
        url: &str,
        selector: &str,
        adapt: impl Fn(RequestBuilder) -> RequestBuilder,
    ) -> Result<Response, Failure> {
        let mut sent = self.authorization.lock().await.clone();
        for _ in 0..2 {
            let mut request = adapt(self.http.get(url));
            if let Some(authorization) = &sent {
                request = request.header(AUTHORIZATION, authorization.clone());
            }
            let response = request.send().await.map_err(|error| self.broken(&error))?;
            if response.status() != StatusCode::UNAUTHORIZED {
                return self.check(response, selector).await;
            }
            let challenges = response.headers().clone();
            drop(response);
            let mut current = self.authorization.lock().await;
            if *current == sent {
                *current = Some(self.authorize(&challenges).await?);
            }
            sent.clone_from(&current);
        }
        Err(Failure::Lasting(self.denied()))
    }

    /// Refuses every status but success.
    async fn check(&self, response: Response, selector: &str) -> Result<Response, Failure> {
        let status = response.status();
        if status.is_success() || status == StatusCode::RANGE_NOT_SATISFIABLE {
            return Ok(response);
        }
        let registry = self.name.clone();
        let after = response
            .headers()
            .get("retry-after")
            .and_then(|value| value.to_str().ok());
        let after = after
            .and_then(|text| text.parse().ok())
            .map(Duration::from_secs);
        match status {
            StatusCode::NOT_FOUND => Err(Failure::Lasting(PullError::NotFound {
                registry,
                repository: self.repository.clone(),
                selector: selector.to_owned(),
            })),
            StatusCode::FORBIDDEN => Err(Failure::Lasting(self.denied())),
            StatusCode::TOO_MANY_REQUESTS => {
                let error = PullError::RateLimited { registry };
                Err(Failure::Transient { error, after })
            }
            _ => {
                let body = self
                    .body(response, ERROR_MAX_BYTES)
                    .await
                    .unwrap_or_default();
                let error = PullError::Status {
                    registry,
                    status: status.as_u16(),
                    message: words(&body),
                };
                if status.is_server_error() || status == StatusCode::REQUEST_TIMEOUT {
                    Err(Failure::Transient { error, after })
                } else {
                    Err(Failure::Lasting(error))
                }
            }
        }
    }

    /// Reads a body that has to be short.
    async fn body(&self, mut response: Response, limit_bytes: u64) -> Result<Vec<u8>, Failure> {
        let mut bytes = Vec::new();
        while let Some(chunk) = response
            .chunk()
            .await
            .map_err(|error| self.broken(&error))?
        {
            if (bytes.len() + chunk.len()) as u64 > limit_bytes {
                let reason = format!("it sends more than {limit_bytes} bytes of a small document");
                return Err(Failure::Lasting(self.protocol(reason)));
            }
            bytes.extend_from_slice(&chunk);
        }
        Ok(bytes)
    }

    /// Answers the registry's challenge: with the password, or with a token that another server
    /// gives for it.
    async fn authorize(&self, headers: &HeaderMap) -> Result<HeaderValue, Failure> {
        let mut basic = false;
        for value in headers.get_all(WWW_AUTHENTICATE) {
            let Ok(text) = value.to_str() else { continue };
            for challenge in ChallengeParser::new(text).flatten() {
                if challenge.scheme.eq_ignore_ascii_case("bearer") {
                    let parameter = |name: &str| {
                        let mut parameters = challenge.params.iter();
                        let found = parameters.find(|(key, _)| key.eq_ignore_ascii_case(name));
                        found.map(|(_, value)| value.to_unescaped())
                    };
                    return self.token(parameter("realm"), parameter("service")).await;
                }
                basic |= challenge.scheme.eq_ignore_ascii_case("basic");
            }
        }
        match &self.credential {
            Some(Credential::Password { user, password }) if basic => {
                // reqwest knows how to write it.
                let request = self
                    .http
                    .get(&self.repository_url)
                    .basic_auth(user, Some(password));
                let request = request.build().ok();
                let header =
                    request.and_then(|request| request.headers().get(AUTHORIZATION).cloned());
                header.ok_or_else(|| Failure::Lasting(self.denied()))
            }
            _ => Err(Failure::Lasting(self.denied())),
        }
    }

    /// Gets a token for this repository (distribution specification, token authentication).
    async fn token(
        &self,
        realm: Option<String>,
        service: Option<String>,
    ) -> Result<HeaderValue, Failure> {
        #[derive(serde::Deserialize)]
        struct Token {
            token: Option<String>,
            access_token: Option<String>,
        }
        let protocol = |reason: &str| Failure::Lasting(self.protocol(reason.to_owned()));
        let realm = realm.and_then(|realm| Url::parse(&realm).ok());
        let realm = realm.ok_or_else(|| protocol("it does not say where to get a token"))?;
        if self.is_encrypted && self.tls_verify && realm.scheme() != "https" {
            return Err(protocol("it asks to send credentials without encryption"));
        }
        let scope = format!("repository:{}:pull", self.repository);
        let mut parameters = vec![("scope", scope.as_str())];
        if let Some(service) = &service {
            parameters.push(("service", service));
        }
        let request = match &self.credential {
            None => self.http.get(realm).query(&parameters),
            Some(Credential::Password { user, password }) => self
                .http
                .get(realm)
                .query(&parameters)
                .basic_auth(user, Some(password)),
            Some(Credential::IdentityToken(token)) => {
                parameters.extend([
                    ("grant_type", "refresh_token"),
                    ("refresh_token", token.as_str()),
                    ("client_id", "fcvm"),
                ]);
                self.http.post(realm).form(&parameters)
            }
        };
        let response = request.send().await.map_err(|error| self.broken(&error))?;
        if matches!(
            response.status(),
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN
        ) {
            return Err(Failure::Lasting(self.denied()));
        }
        let response = self.check(response, "token").await?;
        let body = self.body(response, TOKEN_MAX_BYTES).await?;
        let token = serde_json::from_slice::<Token>(&body).ok();
        let token = token.and_then(|token| token.token.or(token.access_token));
        let header = token.and_then(|token| HeaderValue::try_from(format!("Bearer {token}")).ok());
        let mut header = header.ok_or_else(|| protocol("its token server gives no token"))?;
        header.set_sensitive(true);
        Ok(header)
    }

    pub(super) fn broken(&self, error: &reqwest::Error) -> Failure {
        let (registry, reason) = (self.name.clone(), words_of(error));
        Failure::Transient {
            error: PullError::Connection { registry, reason },
            after: None,
        }
    }

    pub(super) fn protocol(&self, reason: String) -> PullError {
        PullError::Protocol {
            registry: self.name.clone(),
            reason,
        }
    }

    fn unreachable(&self, error: &reqwest::Error) -> PullError {
        PullError::Unreachable {
            registry: self.name.clone(),
            reason: words_of(error),
        }
    }

    fn denied(&self) -> PullError {
        PullError::Denied {
            registry: self.name.clone(),
            repository: self.repository.clone(),
            reason: match self.credential {
                Some(_) => "the credentials are wrong or do not suffice, or there is no such image",
                None => {
                    "it needs credentials (--creds, or 'podman login'), or there is no such image"
                }
            },
        }
    }
}

async fn find_credential(
    reference: &Reference,
    options: &PullOptions,
) -> Result<Option<Credential>, PullError> {
    let (files, reference) = (options.credential_files.clone(), reference.clone());
    // A credential helper may ask the user something.
    let found = tokio::task::spawn_blocking(move || credentials::find(&files, &reference)).await;
    let found = found.map_err(|error| PullError::Setup {
        reason: error.to_string(),
    })?;
    Ok(found?)
}

fn client(options: &PullOptions) -> Result<Client, PullError> {
    // Only the first call in a process has an effect; the program has no other use of TLS.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let setup = |error: reqwest::Error| PullError::Setup {
        reason: words_of(&error),
    };
    let tls_verify = options.tls_verify;
    let mut builder = Client::builder()
        .user_agent(concat!("fcvm/", env!("CARGO_PKG_VERSION")))
        .connect_timeout(CONNECT_TIMEOUT)
        .read_timeout(READ_TIMEOUT)
        .redirect(Policy::custom(move |attempt| redirect(attempt, tls_verify)))
        .danger_accept_invalid_certs(!tls_verify)
        .no_proxy();
    let no_proxy = options.no_proxy.as_deref().and_then(NoProxy::from_string);
    if let Some(proxy) = &options.https_proxy {
        builder = builder.proxy(
            Proxy::https(proxy)
                .map_err(setup)?
                .no_proxy(no_proxy.clone()),
        );
    }
    if let Some(proxy) = &options.http_proxy {
        builder = builder.proxy(Proxy::http(proxy).map_err(setup)?.no_proxy(no_proxy));
    }
    let mut certificates = Vec::new();
    for dir in &options.certificate_dirs {
        certificates.extend(read_certificates(dir)?);
    }
    if tls_verify && !certificates.is_empty() {
        builder = builder.tls_certs_merge(certificates);
    }
    builder.build().map_err(setup)
}

/// Follows to another server, but not from encryption to none.
fn redirect(attempt: Attempt<'_>, tls_verify: bool) -> reqwest::redirect::Action {
    let was_encrypted = attempt
        .previous()
        .last()
        .is_some_and(|url| url.scheme() == "https");
    if attempt.previous().len() > REDIRECTS_MAX_COUNT {
        attempt.error("too many redirects")
    } else if tls_verify && was_encrypted && attempt.url().scheme() != "https" {
        attempt.error("a redirect leads to a server without TLS")
    } else {
        attempt.follow()
    }
}

fn read_certificates(dir: &Path) -> Result<Vec<reqwest::Certificate>, PullError> {
    let unusable = |path: &Path, reason: String| PullError::CertificateFile {
        path: path.to_owned(),
        reason,
    };
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(unusable(dir, error.to_string())),
    };
    let mut certificates = Vec::new();
    for entry in entries {
        let path = entry
            .map_err(|error| unusable(dir, error.to_string()))?
            .path();
        if !path
            .extension()
            .is_some_and(|extension| extension == "crt" || extension == "pem")
        {
            continue;
        }
        let bytes = fs::read(&path).map_err(|error| unusable(&path, error.to_string()))?;
        let found = reqwest::Certificate::from_pem_bundle(&bytes)
            .map_err(|error| unusable(&path, words_of(&error)))?;
        certificates.extend(found);
    }
    Ok(certificates)
}

/// Docker's rule for registries that need no TLS.
fn is_loopback(server: &str) -> bool {
    let host = match server.strip_prefix('[') {
        Some(rest) => rest.split(']').next().unwrap_or_default(),
        None => server.split(':').next().unwrap_or_default(),
    };
    host == "localhost"
        || host
            .parse::<IpAddr>()
            .is_ok_and(|address| address.is_loopback())
}

/// Says what is wrong with a certificate, if that is what the error is about.
fn certificate_problem(error: &(dyn std::error::Error + 'static)) -> Option<String> {
    if let Some(error @ rustls::Error::InvalidCertificate(_)) = error.downcast_ref() {
        return Some(one_line(&error.to_string(), 200));
    }
    // An io::Error does not name what it holds as its source.
    let held = error
        .downcast_ref::<io::Error>()
        .and_then(io::Error::get_ref);
    match held {
        Some(held) => certificate_problem(held),
        None => certificate_problem(error.source()?),
    }
}

/// The innermost cause: what came before says that a request was sent.
fn words_of(error: &reqwest::Error) -> String {
    let mut cause: &dyn std::error::Error = error;
    while let Some(source) = cause.source() {
        cause = source;
    }
    one_line(&cause.to_string(), 200)
}

/// The registry's own words in an error page (distribution specification, error codes).
fn words(body: &[u8]) -> String {
    #[derive(serde::Deserialize)]
    struct Errors {
        errors: Vec<OneError>,
    }
    #[derive(serde::Deserialize)]
    struct OneError {
        code: Option<String>,
        message: Option<String>,
    }
    let text = match serde_json::from_slice::<Errors>(body) {
        Ok(Errors { errors }) => {
            let texts = errors
                .into_iter()
                .filter_map(|error| error.message.or(error.code));
            texts.collect::<Vec<_>>().join(", ")
        }
        Err(_) => String::from_utf8_lossy(body).into_owned(),
    };
    if text.trim().is_empty() {
        "no reason is given".into()
    } else {
        one_line(&text, 200)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loopback_is_told_from_names_that_look_like_it() {
        for server in [
            "localhost",
            "localhost:5000",
            "127.0.0.1:5000",
            "127.1.2.3",
            "[::1]:5000",
        ] {
            assert!(is_loopback(server), "{server}");
        }
        for server in [
            "registry.example",
            "localhost.registry.example",
            "10.0.0.1:5000",
            "[::2]",
        ] {
            assert!(!is_loopback(server), "{server}");
        }
    }

    #[test]
    fn error_pages_are_put_in_one_line() {
        let page = br#"{"errors":[{"code":"DENIED","message":"go\naway"},{"code":"X"}]}"#;
        assert_eq!(words(page), "go away, X");
        assert_eq!(words(b"<html>\n"), "<html>");
        assert_eq!(words(b""), "no reason is given");
        assert!(words(&[b'a'; 5000]).len() < 300);
    }
}
