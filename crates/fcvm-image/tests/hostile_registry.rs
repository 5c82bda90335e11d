//! Pulls from registries that are hostile, odd, or want a token.

mod common;
#[path = "common/server.rs"]
mod server;

use std::collections::HashMap;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use common::{Scratch, all, run};
use fcvm_image::pull::{Credential, PullError};
use fcvm_image::{Digest, Image, Platform, PullOptions, Silent, pull};
use serde_json::{Value, json};
use server::{Answer, Request, Server};

const CONFIG: &str = "application/vnd.oci.image.config.v1+json";
const LAYER: &str = "application/vnd.oci.image.layer.v1.tar";
const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const INDEX: &str = "application/vnd.oci.image.index.v1+json";

/// The documents of one small image, by the end of their path.
#[derive(Clone)]
struct Content {
    by_path: HashMap<String, Vec<u8>>,
    manifest: Vec<u8>,
    layer: Digest,
}

fn descriptor(media_type: &str, bytes: &[u8]) -> Value {
    json!({"mediaType": media_type, "digest": Digest::of(bytes).to_string(), "size": bytes.len()})
}

/// An image for the architecture whose layer is an archive of one file.
fn content(architecture: &str) -> Content {
    let mut layer = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_gnu();
    header.set_size(5);
    header.set_mode(0o644);
    layer
        .append_data(&mut header, "file", &b"hello"[..])
        .unwrap();
    let layer = layer.into_inner().unwrap();
    let config = json!({
        "architecture": architecture, "os": "linux",
        "rootfs": {"type": "layers", "diff_ids": [Digest::of(&layer).to_string()]},
    });
    let config = config.to_string().into_bytes();
    let manifest = json!({
        "schemaVersion": 2, "mediaType": MANIFEST,
        "config": descriptor(CONFIG, &config), "layers": [descriptor(LAYER, &layer)],
    });
    let manifest = manifest.to_string().into_bytes();
    let mut by_path = HashMap::new();
    for bytes in [&layer, &config] {
        by_path.insert(format!("/v2/a/blobs/{}", Digest::of(bytes)), bytes.clone());
    }
    by_path.insert(
        format!("/v2/a/manifests/{}", Digest::of(&manifest)),
        manifest.clone(),
    );
    by_path.insert("/v2/a/manifests/1".into(), manifest.clone());
    Content {
        by_path,
        manifest,
        layer: Digest::of(&layer),
    }
}

impl Content {
    fn answer(&self, path: &str) -> Answer {
        match self.by_path.get(path) {
            Some(bytes) => Answer::new(200, bytes.clone()),
            None if path == "/v2/" => Answer::new(200, ""),
            None => Answer::new(404, r#"{"errors":[{"code":"MANIFEST_UNKNOWN"}]}"#),
        }
    }
}

fn host() -> Content {
    content(&Platform::host().architecture)
}

async fn fetch(
    scratch: &Scratch,
    server: &Server,
    options: &PullOptions,
) -> Result<Image, PullError> {
    let name = format!("{}/a:1", server.address).parse().unwrap();
    pull(&scratch.store(), &name, options, &Silent).await
}

async fn failure(answer: impl Fn(&Request) -> Answer + Send + Sync + 'static) -> String {
    let scratch = Scratch::new();
    let server = Server::start(move |request, _| answer(request));
    let error = fetch(&scratch, &server, &PullOptions::default())
        .await
        .unwrap_err()
        .to_string();
    assert!(!error.contains('\n') && error.len() < 600, "{error}");
    assert!(scratch.store().list().unwrap().0.is_empty());
    assert_eq!(all(&scratch.store().dir().join("tmp")), []);
    error
}

#[tokio::test]
async fn endless_answers_are_cut_off() {
    let content = host();
    let layer = content.layer.to_string();
    for (part, expected) in [
        ("manifests", "more than 4194304 bytes"),
        ("blobs", "more than 8388608 bytes"),
        (layer.as_str(), "does not have the announced size"),
    ] {
        let (content, part) = (content.clone(), part.to_owned());
        let error = failure(move |request| {
            let mut answer = content.answer(&request.path);
            answer.endless = request.path.contains(&part);
            answer
        });
        let error = error.await;
        assert!(error.contains(expected), "{error}");
    }
    // An error page is cut off too, and what it says is not believed to be short.
    let error = failure(|request| {
        let mut answer = Answer::new(418, "");
        answer.endless = request.path != "/v2/";
        answer
    });
    assert!(error.await.contains("answered 418"));
}

#[tokio::test]
async fn nonsense_is_refused() {
    for (manifest, expected) in [
        (&b"hello"[..], "cannot be read"),
        (b"{}", "cannot be read"),
        (b"{\"schemaVersion\":1}", "schema 1"),
        (
            b"{\"schemaVersion\":2,\"manifests\":[]}",
            "it exists for no platform",
        ),
    ] {
        let error = failure(move |request| match request.path.as_str() {
            "/v2/" => Answer::new(200, ""),
            _ => Answer::new(200, manifest),
        });
        let error = error.await;
        assert!(error.contains(expected), "{error}");
    }
    let error = failure(|_| Answer::new(403, "")).await;
    assert!(error.contains("denies access to a"), "{error}");
    let error = failure(|_| Answer::new(429, "").header("retry-after: 100000".into())).await;
    assert!(error.contains("limits how much it serves"), "{error}");
    let error = failure(|_| Answer::new(401, "").header("www-authenticate: x y z,,=".into())).await;
    assert!(error.contains("needs credentials"), "{error}");
    let error =
        failure(|request| Answer::new(307, "").header(format!("location: {}x", request.path)));
    assert!(error.await.contains("too many redirects"));
}

#[tokio::test]
async fn other_architectures_are_named() {
    let error = failure(|request| content("s390x").answer(&request.path)).await;
    assert!(
        error.contains("the image is made for linux/s390x"),
        "{error}"
    );
    let other = content("s390x");
    let error = failure(move |request| {
        let mut entry = descriptor(MANIFEST, &other.manifest);
        entry["platform"] = json!({"architecture": "s390x", "os": "linux"});
        let index = json!({"schemaVersion": 2, "mediaType": INDEX, "manifests": [entry]});
        match request.path.as_str() {
            "/v2/a/manifests/1" => Answer::new(200, index.to_string()),
            path => other.answer(path),
        }
    });
    assert!(error.await.contains("it exists for linux/s390x"));
}

#[tokio::test]
async fn the_right_image_of_an_index_comes() {
    let scratch = Scratch::new();
    let (ours, other) = (host(), content("s390x"));
    let expected = Digest::of(&ours.manifest);
    let server = Server::start(move |request, _| {
        let entry = |content: &Content, architecture: &str| {
            let mut entry = descriptor(MANIFEST, &content.manifest);
            entry["platform"] = json!({"architecture": architecture, "os": "linux"});
            entry
        };
        let entries = [
            entry(&other, "s390x"),
            entry(&ours, &Platform::host().architecture),
        ];
        let index = json!({"schemaVersion": 2, "mediaType": INDEX, "manifests": entries});
        match request.path.as_str() {
            "/v2/a/manifests/1" => Answer::new(200, index.to_string()),
            path => ours.answer(path),
        }
    });
    let image = fetch(&scratch, &server, &PullOptions::default())
        .await
        .unwrap();
    assert_eq!(image.manifest_digest, expected);
}

#[tokio::test]
async fn passing_errors_are_tried_again() {
    let scratch = Scratch::new();
    let content = host();
    let tries = Arc::new(AtomicUsize::new(0));
    let server = Server::start(move |request, _| {
        // Every second answer is an error, and none of the others serves ranges.
        if request.path != "/v2/" && tries.fetch_add(1, Ordering::Relaxed).is_multiple_of(2) {
            return Answer::new(503, "");
        }
        content.answer(&request.path)
    });
    let image = fetch(&scratch, &server, &PullOptions::default())
        .await
        .unwrap();
    scratch.store().root_image(&image, &Silent).unwrap();
    assert_eq!(server.seen().len(), 7, "{:?}", server.seen());
}

#[tokio::test]
async fn a_server_without_ranges_starts_again() {
    let scratch = Scratch::new();
    let content = host();
    let store = scratch.store();
    let partial = store
        .dir()
        .join("tmp")
        .join(format!("partial-{}", content.layer.hex()));
    std::fs::write(partial, "????").unwrap();
    let server = Server::start(move |request, _| content.answer(&request.path));
    let image = fetch(&scratch, &server, &PullOptions::default())
        .await
        .unwrap();
    store.root_image(&image, &Silent).unwrap();
}

/// A registry that wants `Bearer good`, which `/token` gives for the right credentials.
fn with_token(expected: &'static str) -> Server {
    let content = host();
    Server::start(move |request, address| {
        if let Some(query) = request.path.strip_prefix("/token") {
            let right = request.has(expected)
                && (query.is_empty()
                    || (query.contains("scope=repository%3Aa%3Apull")
                        && query.contains("service=s")));
            return match right {
                true => Answer::new(200, r#"{"access_token":"good"}"#),
                false => Answer::new(401, ""),
            };
        }
        if request.has("authorization: bearer good") {
            return content.answer(&request.path);
        }
        Answer::new(401, "").header(format!(
            "www-authenticate: Bearer realm=\"http://{address}/token\",service=\"s\""
        ))
    })
}

#[tokio::test]
async fn tokens_are_fetched_once_with_the_credentials() {
    let scratch = Scratch::new();
    // "user:secret" in base64.
    let server = with_token("authorization: Basic dXNlcjpzZWNyZXQ=");
    let error = fetch(&scratch, &server, &PullOptions::default())
        .await
        .unwrap_err();
    assert!(matches!(error, PullError::Denied { .. }), "{error}");
    let credential = Some("user:secret".parse().unwrap());
    let options = PullOptions {
        credential,
        ..PullOptions::default()
    };
    let before = server.seen().len();
    fetch(&scratch, &server, &options).await.unwrap();
    let tokens = server.seen()[before..]
        .iter()
        .filter(|path| path.starts_with("/token"))
        .count();
    assert_eq!(tokens, 1);

    // An identity token goes in a form, not in the address.
    let server = with_token("content-type: application/x-www-form-urlencoded");
    let credential = Some(Credential::IdentityToken("identity".into()));
    let options = PullOptions {
        credential,
        ..PullOptions::default()
    };
    fetch(&scratch, &server, &options).await.unwrap();
    assert!(server.seen().iter().all(|path| !path.contains("identity")));
}

#[tokio::test]
async fn credentials_stay_with_the_registry_they_are_for() {
    let scratch = Scratch::new();
    let content = host();
    let elsewhere = content.clone();
    let other = Server::start(move |request, _| {
        assert!(
            !request
                .headers
                .iter()
                .any(|header| header.starts_with("authorization"))
        );
        elsewhere.answer(&request.path)
    });
    // Another host as far as credentials go: the port differs.
    let target = other.address;
    let server = Server::start(move |request, _| {
        if !request.has("authorization: Basic dXNlcjpzZWNyZXQ=") && request.path != "/v2/" {
            return Answer::new(401, "").header("www-authenticate: Basic realm=\"x\"".into());
        }
        if request.path.contains("/blobs/") {
            return Answer::new(307, "")
                .header(format!("location: http://{target}{}", request.path));
        }
        content.answer(&request.path)
    });
    let credential = Some("user:secret".parse().unwrap());
    let options = PullOptions {
        credential,
        ..PullOptions::default()
    };
    fetch(&scratch, &server, &options).await.unwrap();
    assert_eq!(other.seen().len(), 2);
}

#[tokio::test]
async fn plain_registries_elsewhere_need_permission_and_proxies_are_used() {
    let scratch = Scratch::new();
    let content = host();
    let proxy = Server::start(move |request, _| {
        // The request to tunnel to the registry's port for TLS is refused.
        match request.path.strip_prefix("http://registry.example") {
            Some(path) => content.answer(path),
            None => Answer::new(403, ""),
        }
    });
    let url = Some(format!("http://{}", proxy.address));
    let mut options = PullOptions {
        https_proxy: url.clone(),
        http_proxy: url,
        ..PullOptions::default()
    };
    let name = "registry.example/a:1".parse().unwrap();
    let error = pull(&scratch.store(), &name, &options, &Silent)
        .await
        .unwrap_err();
    assert!(matches!(error, PullError::Unreachable { .. }), "{error}");
    assert_eq!(proxy.seen(), ["registry.example:443"]);

    options.tls_verify = false;
    let image = pull(&scratch.store(), &name, &options, &Silent)
        .await
        .unwrap();
    assert_eq!(image.names[0].to_string(), "registry.example/a:1");
    options.no_proxy = Some("registry.example".into());
    let error = pull(&scratch.store(), &name, &options, &Silent)
        .await
        .unwrap_err();
    assert!(matches!(error, PullError::Unreachable { .. }), "{error}");
}

#[tokio::test]
async fn two_that_pull_the_same_fetch_it_once() {
    let scratch = Scratch::new();
    let content = host();
    let server = Server::start(move |request, _| content.answer(&request.path));
    let (first, second) = (scratch.store(), scratch.store());
    let name = format!("{}/a:1", server.address).parse().unwrap();
    let options = PullOptions::default();
    let (one, two) = tokio::join!(
        pull(&first, &name, &options, &Silent),
        pull(&second, &name, &options, &Silent),
    );
    let layer = one.unwrap().layers[0].digest.to_string();
    two.unwrap();
    let fetched = server
        .seen()
        .iter()
        .filter(|path| path.ends_with(&layer))
        .count();
    assert_eq!(fetched, 1, "{:?}", server.seen());
}

#[tokio::test]
async fn a_full_disk_is_named_and_not_filled() {
    if !rustix::process::geteuid().is_root() {
        println!("skipped: only root can mount a small file system");
        return;
    }
    let scratch = Scratch::new();
    let dir = scratch.path("small");
    std::fs::create_dir(&dir).unwrap();
    let mounted = Command::new("mount")
        .args(["-t", "tmpfs", "-o", "size=256k", "none"])
        .arg(&dir)
        .status();
    if !mounted.is_ok_and(|status| status.success()) {
        println!("skipped: this root cannot mount");
        return;
    }
    let store = fcvm_image::ImageStore::open(&dir.join("store")).unwrap();
    let layer = common::noise(1 << 20);
    let config = json!({
        "architecture": Platform::host().architecture, "os": "linux",
        "rootfs": {"type": "layers", "diff_ids": [Digest::of(&layer).to_string()]},
    });
    let config = config.to_string().into_bytes();
    let manifest = json!({
        "schemaVersion": 2, "mediaType": MANIFEST,
        "config": descriptor(CONFIG, &config), "layers": [descriptor(LAYER, &layer)],
    });
    let by_path = HashMap::from([
        (
            "/v2/a/manifests/1".to_owned(),
            manifest.to_string().into_bytes(),
        ),
        (format!("/v2/a/blobs/{}", Digest::of(&config)), config),
        (format!("/v2/a/blobs/{}", Digest::of(&layer)), layer.clone()),
    ]);
    let content = Content {
        by_path,
        manifest: Vec::new(),
        layer: Digest::of(&layer),
    };
    let server = Server::start(move |request, _| content.answer(&request.path));
    let name = format!("{}/a:1", server.address).parse().unwrap();
    let result = pull(&store, &name, &PullOptions::default(), &Silent).await;
    let left: u64 = all(store.dir()).iter().map(|(_, size)| size).sum();
    run(Command::new("umount").arg(&dir));
    let error = result.unwrap_err();
    let source = std::error::Error::source(&error).map(ToString::to_string);
    assert!(error.to_string().starts_with("cannot write "), "{error}");
    assert!(
        source.is_some_and(|source| source.contains("No space left")),
        "{error}"
    );
    assert!(left < 4096, "{left} bytes are left");
}
