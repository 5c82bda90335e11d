//! Pulls from Debian's docker-registry, which the tests start themselves.

mod common;
#[path = "common/registry.rs"]
mod registry;

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use common::{Recorder, Scratch, all, noise, run, tool_missing};
use fcvm_image::pull::PullError;
use fcvm_image::{
    Image, ImageStore, ImportOptions, Platform, Progress, PullOptions, Reference, Silent, Task,
    import, pull,
};
use registry::{Proxy, Registry, layout};
use tokio::sync::Notify;

/// More than one read of a socket, and not compressible.
const LAYER_BYTES: usize = 3 << 20;

fn absent() -> bool {
    tool_missing("docker-registry") || tool_missing("skopeo")
}

/// Makes an image with a large file and returns the layout that has it, and the image.
fn source(scratch: &Scratch) -> (ImageStore, Image) {
    let rootfs = scratch.rootfs("source");
    fs::write(rootfs.join("noise"), noise(LAYER_BYTES)).unwrap();
    let store = ImageStore::open(&scratch.path("source")).unwrap();
    let from = format!("dir:{}", rootfs.display()).parse().unwrap();
    let name = Some("localhost/source".parse().unwrap());
    let options = ImportOptions {
        name,
        platform: Platform::host(),
    };
    let image = import(&store, &from, &options, &Silent).unwrap().remove(0);
    (store, image)
}

fn push(registry: &Registry, source: &ImageStore) -> Reference {
    registry.push(
        &layout(source.dir(), "localhost/source:latest"),
        "team/app:1",
    );
    registry.name("team/app:1").parse().unwrap()
}

async fn quietly(store: &ImageStore, name: &Reference) -> Result<Image, PullError> {
    pull(store, name, &PullOptions::default(), &Silent).await
}

#[tokio::test]
async fn an_image_comes_whole_and_only_once() {
    if absent() {
        return;
    }
    let scratch = Scratch::new();
    let (source, original) = source(&scratch);
    let registry = Registry::plain(&scratch);
    let name = push(&registry, &source);
    let store = scratch.store();
    let progress = Recorder::default();
    let options = PullOptions::default();
    let image = pull(&store, &name, &options, &progress).await.unwrap();
    assert_eq!(image.id, original.id);
    assert_eq!(image.names, std::slice::from_ref(&name));
    assert_eq!(image.layers[0].diff_id, original.layers[0].diff_id);
    // Compressed on its way, and so another file.
    assert_ne!(image.layers[0].digest, original.layers[0].digest);
    let short = image.layers[0].digest.short();
    assert_eq!(progress.lines(), [format!("{short}: done")]);
    let root = |store: &ImageStore, image| store.root_image(image, &Silent).unwrap();
    let (ours, theirs) = (root(&store, &image), root(&source, &original));
    assert_eq!(fs::read(ours).unwrap(), fs::read(theirs).unwrap());

    let before = all(store.dir());
    let progress = Recorder::default();
    pull(&store, &name, &options, &progress).await.unwrap();
    assert_eq!(progress.lines(), [format!("{short}: already here")]);
    assert_eq!(all(store.dir()), before);

    // By digest: the registry is asked for exactly this one.
    let by_digest = format!("{}@{}", name.name(), image.manifest_digest)
        .parse()
        .unwrap();
    let again = quietly(&store, &by_digest).await.unwrap();
    assert_eq!(again.manifest_digest, image.manifest_digest);
    assert_eq!(again.names.len(), 2);
    assert_eq!(store.resolve(&by_digest.to_string()).unwrap().id, image.id);
}

#[tokio::test]
async fn broken_connections_are_resumed_within_a_pull() {
    if absent() {
        return;
    }
    let scratch = Scratch::new();
    let (source, original) = source(&scratch);
    let registry = Registry::plain(&scratch);
    push(&registry, &source);
    let proxy = Proxy::start(registry.address, 1 << 20, 2);
    let name = format!("{}/team/app:1", proxy.address).parse().unwrap();
    let store = scratch.store();
    let image = quietly(&store, &name).await.unwrap();
    assert_eq!(image.id, original.id);
    let requests = proxy.requests();
    assert_eq!(requests.matches("range: bytes=").count(), 2, "{requests}");
    assert!(!requests.contains("range: bytes=0-"), "{requests}");
    store.root_image(&image, &Silent).unwrap();
}

/// Tells when something has come.
struct Watcher(Arc<Notify>, AtomicU64);

impl Progress for Watcher {
    fn start(&self, _name: &str, _total_bytes: Option<u64>) -> Box<dyn Task> {
        Box::new(Self(self.0.clone(), AtomicU64::new(0)))
    }

    fn message(&self, _text: &str) {}
}

impl Task for Watcher {
    fn advance(&self, bytes: u64) {
        if self.1.fetch_add(bytes, Ordering::Relaxed) + bytes > 64 << 10 {
            self.0.notify_one();
        }
    }

    fn finish(&self, _outcome: &str) {}
}

#[tokio::test]
async fn an_abandoned_pull_is_resumed_by_the_next() {
    if absent() {
        return;
    }
    let scratch = Scratch::new();
    let (source, original) = source(&scratch);
    let registry = Registry::plain(&scratch);
    let name = push(&registry, &source);
    let store = scratch.store();
    let options = PullOptions::default();
    let some_came = Arc::new(Notify::new());
    let watcher = Watcher(some_came.clone(), AtomicU64::new(0));
    tokio::select! {
        // Else a fast pull may have ended before the notification is looked at.
        biased;
        () = some_came.notified() => {}
        result = pull(&store, &name, &options, &watcher) => panic!("it ended: {result:?}"),
    }
    let left: Vec<_> = all(&store.dir().join("tmp"));
    assert!(
        matches!(left.as_slice(), [(_, size)] if *size > 64 << 10),
        "{left:?}"
    );
    assert_eq!(store.list().unwrap().0.len(), 0);

    let progress = Recorder::default();
    let image = pull(&store, &name, &options, &progress).await.unwrap();
    assert_eq!(image.id, original.id);
    assert!(
        progress.lines()[0].ends_with(": done, resumed"),
        "{:?}",
        progress.lines()
    );
    assert_eq!(all(&store.dir().join("tmp")), []);
}

#[tokio::test]
async fn what_was_left_and_is_wrong_is_fetched_again() {
    if absent() {
        return;
    }
    let scratch = Scratch::new();
    let (source, original) = source(&scratch);
    let registry = Registry::plain(&scratch);
    let name = push(&registry, &source);
    let layer = quietly(&scratch.store(), &name).await.unwrap().layers[0].clone();
    for size_bytes in [1, layer.size_bytes, layer.size_bytes + 1] {
        let store = ImageStore::open(&scratch.path(&format!("store-{size_bytes}"))).unwrap();
        let partial = store
            .dir()
            .join("tmp")
            .join(format!("partial-{}", layer.digest.hex()));
        fs::write(partial, vec![b'?'; size_bytes as usize]).unwrap();
        assert_eq!(quietly(&store, &name).await.unwrap().id, original.id);
        assert_eq!(all(&store.dir().join("tmp")), []);
    }
}

#[tokio::test]
async fn damaged_content_is_refused_and_not_kept() {
    if absent() {
        return;
    }
    let scratch = Scratch::new();
    let (source, _) = source(&scratch);
    let registry = Registry::plain(&scratch);
    let name = push(&registry, &source);
    let image = quietly(&scratch.store(), &name).await.unwrap();
    let layer = image.layers[0].clone();
    let store = ImageStore::open(&scratch.path("fresh")).unwrap();
    let empty = files_without_locks(&store);

    let path = registry.blob(&layer.digest.to_string());
    let whole = fs::read(&path).unwrap();
    let mut damaged = whole.clone();
    damaged[1000] ^= 1;
    fs::write(&path, &damaged).unwrap();
    let error = quietly(&store, &name).await.unwrap_err().to_string();
    let expected = layer.digest.to_string();
    assert!(error.contains(&format!("instead of {expected}")), "{error}");
    assert_eq!(files_without_locks(&store), empty, "{error}");

    // The same length is announced and more is sent than was.
    damaged.extend(noise(100_000));
    fs::write(&path, &damaged).unwrap();
    let error = quietly(&store, &name).await.unwrap_err().to_string();
    assert!(
        error.contains("does not have the announced size"),
        "{error}"
    );
    assert!(store.list().unwrap().0.is_empty());

    fs::write(&path, &whole).unwrap();
    let manifest = registry.blob(&image.manifest_digest.to_string());
    let text = fs::read_to_string(&manifest)
        .unwrap()
        .replace("\"schemaVersion\":2", "\"schemaVersion\": 2");
    fs::write(&manifest, text).unwrap();
    let by_digest = format!("{}@{}", name.name(), image.manifest_digest)
        .parse()
        .unwrap();
    let error = quietly(&store, &by_digest).await.unwrap_err().to_string();
    assert!(
        error.contains("the manifest that the registry sent has the digest"),
        "{error}"
    );
}

fn files_of(files: &[(std::path::PathBuf, u64)]) -> Vec<std::path::PathBuf> {
    files.iter().map(|(path, _)| path.clone()).collect()
}

fn files_without_locks(store: &ImageStore) -> Vec<std::path::PathBuf> {
    let files = files_of(&all(store.dir()));
    files
        .into_iter()
        .filter(|path| path.extension().is_none_or(|e| e != "lock"))
        .collect()
}

#[tokio::test]
async fn what_is_not_there_is_named() {
    if absent() {
        return;
    }
    let scratch = Scratch::new();
    let registry = Registry::plain(&scratch);
    let store = scratch.store();
    let name = registry.name("no/such:1").parse().unwrap();
    let error = quietly(&store, &name).await.unwrap_err();
    assert!(matches!(error, PullError::NotFound { .. }), "{error}");
    let error = error.to_string();
    assert!(error.contains("has no image no/such with 1"), "{error}");

    let address = registry.address;
    drop(registry);
    let name = format!("{address}/no/such:1").parse().unwrap();
    let error = quietly(&store, &name).await.unwrap_err();
    assert!(matches!(error, PullError::Unreachable { .. }), "{error}");
    assert!(error.to_string().contains("refused"), "{error}");
    assert!(
        files_without_locks(&store)
            .iter()
            .all(|path| path.ends_with("oci-layout"))
    );
}

#[tokio::test]
async fn passwords_come_from_the_caller_or_from_files() {
    if absent() {
        return;
    }
    let scratch = Scratch::new();
    let (source, original) = source(&scratch);
    let registry = Registry::with_password(&scratch);
    let name = push(&registry, &source);
    let store = scratch.store();
    let error = quietly(&store, &name).await.unwrap_err();
    assert!(matches!(error, PullError::Denied { .. }), "{error}");
    assert!(error.to_string().contains("needs credentials"), "{error}");

    let mut options = PullOptions {
        credential: Some("user:wrong".parse().unwrap()),
        ..PullOptions::default()
    };
    let error = pull(&store, &name, &options, &Silent).await.unwrap_err();
    assert!(
        error.to_string().contains("the credentials are wrong"),
        "{error}"
    );

    options.credential = Some("user:secret".parse().unwrap());
    let image = pull(&store, &name, &options, &Silent).await.unwrap();
    assert_eq!(image.id, original.id);

    // "user:secret" in base64, as 'podman login' writes it.
    let file = scratch.path("auth.json");
    let json = format!(
        r#"{{"auths":{{"{}":{{"auth":"dXNlcjpzZWNyZXQ="}}}}}}"#,
        registry.address
    );
    fs::write(&file, json).unwrap();
    options.credential = None;
    options.credential_files = vec![scratch.path("absent"), file];
    pull(&store, &name, &options, &Silent).await.unwrap();
}

/// Helpers are looked up in PATH, which only a process of its own can have changed.
#[tokio::test]
async fn credential_helpers_are_asked() {
    const NAME: &str = "FCVM_TEST_NAME";
    const DIR: &str = "FCVM_TEST_DIR";
    if let (Ok(name), Ok(dir)) = (std::env::var(NAME), std::env::var(DIR)) {
        let dir = Path::new(&dir);
        let store = ImageStore::open(&dir.join("store")).unwrap();
        let options = PullOptions {
            credential_files: vec![dir.join("config.json")],
            ..PullOptions::default()
        };
        let result = pull(&store, &name.parse().unwrap(), &options, &Silent).await;
        let text = result.map_or_else(|error| error.to_string(), |image| image.id.to_string());
        fs::write(dir.join("result"), text).unwrap();
        return;
    }
    if absent() {
        return;
    }
    let scratch = Scratch::new();
    let (source, original) = source(&scratch);
    let registry = Registry::with_password(&scratch);
    let name = push(&registry, &source);
    let helper = scratch.path("docker-credential-test");
    let config = scratch.path("config.json");
    let json = format!(r#"{{"credHelpers":{{"{}":"test"}}}}"#, registry.address);
    fs::write(&config, json).unwrap();
    let path = std::env::var("PATH").unwrap();
    for (script, expected) in [
        (
            r#"echo "{\"ServerURL\":\"$server\",\"Username\":\"user\",\"Secret\":\"secret\"}""#,
            original.id.to_string(),
        ),
        (
            "echo credentials not found in store; exit 1",
            "needs credentials".into(),
        ),
        (
            "echo it is locked >&2; exit 1",
            "docker-credential-test failed: it is locked".into(),
        ),
        ("echo nonsense", "config.json cannot be used".into()),
        ("", "is it installed?".into()),
    ] {
        let text = format!("#!/bin/sh\nserver=$(cat)\n{script}\n");
        fcvm_testing::write_program(&helper, &text);
        if script.is_empty() {
            fs::set_permissions(&helper, fs::Permissions::from_mode(0o644)).unwrap();
        }
        run(Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "credential_helpers_are_asked"])
            .env(NAME, name.to_string())
            .env(DIR, scratch.path(""))
            .env("PATH", format!("{}:{path}", scratch.path("").display())));
        let result = fs::read_to_string(scratch.path("result")).unwrap();
        assert!(result.contains(&expected), "{result}");
    }
}

#[tokio::test]
async fn certificates_are_verified_unless_told_otherwise() {
    if absent() || tool_missing("openssl") {
        return;
    }
    let scratch = Scratch::new();
    let (source, original) = source(&scratch);
    let registry = Registry::with_tls(&scratch);
    let name = push(&registry, &source);
    let store = scratch.store();
    let error = quietly(&store, &name).await.unwrap_err();
    assert!(matches!(error, PullError::Certificate { .. }), "{error}");
    assert!(error.to_string().contains("--tls-verify=false"), "{error}");

    let mut options = PullOptions {
        tls_verify: false,
        ..PullOptions::default()
    };
    assert_eq!(
        pull(&store, &name, &options, &Silent).await.unwrap().id,
        original.id
    );

    options.tls_verify = true;
    options.certificate_dirs = vec![scratch.path("absent"), scratch.path("tls")];
    assert_eq!(
        pull(&store, &name, &options, &Silent).await.unwrap().id,
        original.id
    );
}
