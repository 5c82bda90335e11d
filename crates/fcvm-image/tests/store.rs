//! The store as several processes and mishaps leave it.

mod common;

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;

use common::{Scratch, all, run, tool_missing};
use fcvm_image::{
    Digest, Image, ImageStore, ImportOptions, Platform, Reference, Silent, StoreError, import,
};

fn add(scratch: &Scratch, store: &ImageStore, text: &str, name: Option<&str>) -> Image {
    let from = format!("dir:{}", scratch.rootfs(text).display())
        .parse()
        .unwrap();
    let name = name.map(|name| name.parse().unwrap());
    let options = ImportOptions {
        name,
        platform: Platform::host(),
    };
    import(store, &from, &options, &Silent).unwrap().remove(0)
}

fn unused(_: &Digest) -> bool {
    false
}

fn names(image: &Image) -> Vec<String> {
    image.names.iter().map(Reference::to_string).collect()
}

#[test]
fn images_are_found_by_name_id_and_digest() {
    let scratch = Scratch::new();
    let store = scratch.store();
    let one = add(&scratch, &store, "one", Some("localhost/one"));
    let two = add(&scratch, &store, "two", Some("docker.io/library/two:2"));
    for text in [
        "one",
        "one:latest",
        "localhost/one",
        &one.id.hex(),
        &one.id.hex()[..8],
        &one.id.to_string(),
        &one.manifest_digest.to_string(),
        &format!("one@{}", one.manifest_digest),
    ] {
        assert_eq!(store.resolve(text).unwrap().id, one.id, "{text}");
    }
    assert_eq!(store.resolve("two:2").unwrap().id, two.id);
    let error = store.resolve("two").unwrap_err().to_string();
    assert!(error.contains("no image 'two' is here"), "{error}");
    assert!(matches!(
        store.resolve("A B"),
        Err(StoreError::Reference(_))
    ));
    assert!(matches!(store.resolve(""), Err(StoreError::Reference(_))));
    assert!(store.created_now(&one));
}

trait CreatedNow {
    fn created_now(&self, image: &Image) -> bool;
}

impl CreatedNow for ImageStore {
    fn created_now(&self, image: &Image) -> bool {
        let age = time::OffsetDateTime::now_utc() - image.created_at().unwrap();
        age.whole_minutes().abs() < 10
    }
}

#[test]
fn a_name_moves_and_leaves_a_nameless_image() {
    let scratch = Scratch::new();
    let store = scratch.store();
    let one = add(&scratch, &store, "one", Some("localhost/app"));
    let two = add(&scratch, &store, "two", Some("localhost/app"));
    assert_eq!(store.resolve("app").unwrap().id, two.id);
    assert_eq!(store.resolve(&one.id.hex()).unwrap().names, []);
    let listed: Vec<Digest> = store
        .list()
        .unwrap()
        .0
        .iter()
        .map(|image| image.id)
        .collect();
    assert_eq!(listed, [two.id, one.id]);

    let other = Reference::parse_local("other:1").unwrap();
    store.tag(&one, &other).unwrap();
    assert_eq!(
        names(&store.resolve("other:1").unwrap()),
        ["localhost/other:1"]
    );
    store.tag(&two, &other).unwrap();
    assert_eq!(
        names(&store.get(two.manifest_digest).unwrap()),
        ["localhost/app:latest", "localhost/other:1"]
    );
    store.untag(&other).unwrap();
    assert!(matches!(store.untag(&other), Err(StoreError::NotFound(_))));

    let pruned = store.prune(&unused, false).unwrap();
    assert_eq!(pruned.images, [one.id]);
    assert!(pruned.freed_bytes > 0);
    assert_eq!(store.list().unwrap().0.len(), 1);
}

#[test]
fn removal_respects_names_and_use_and_frees_everything() {
    let scratch = Scratch::new();
    let store = scratch.store();
    let image = add(&scratch, &store, "one", Some("localhost/one"));
    let root = store.root_image(&image, &Silent).unwrap();
    store
        .tag(&image, &"localhost/two".parse().unwrap())
        .unwrap();

    let error = store.remove(&image.id.short(), &unused, false).unwrap_err();
    assert!(
        matches!(error, StoreError::SeveralNames { count: 2, .. }),
        "{error}"
    );
    let removed = store.remove("two", &unused, false).unwrap();
    assert_eq!((removed.untagged.len(), removed.image), (1, None));
    let used = |digest: &Digest| *digest == image.manifest_digest;
    assert!(matches!(
        store.remove("one", &used, false),
        Err(StoreError::InUse(_))
    ));
    let usage = store.usage(&used).unwrap();
    assert_eq!((usage.image_count, usage.active_count), (1, 1));
    assert_eq!(usage.reclaimable_bytes, 0);
    assert!(usage.content_bytes > 0 && usage.root_image_bytes > 0);
    assert_eq!(
        store.prune(&used, true).unwrap(),
        fcvm_image::store::Pruned::default()
    );

    let usage = store.usage(&unused).unwrap();
    assert_eq!(
        usage.reclaimable_bytes,
        usage.content_bytes + usage.root_image_bytes
    );
    let removed = store.remove("one", &unused, false).unwrap();
    assert_eq!(removed.image, Some(image.id));
    assert_eq!(removed.freed_bytes, usage.reclaimable_bytes);
    assert!(!root.exists());
    assert_eq!(all(&store.dir().join("blobs")), []);
    assert_eq!(all(&store.dir().join("tmp")), []);
}

#[test]
fn layers_that_another_image_has_stay() {
    let scratch = Scratch::new();
    let store = scratch.store();
    let one = add(&scratch, &store, "same", Some("localhost/one"));
    // The same layer and another configuration, which tells the directory's name.
    fs::rename(scratch.path("rootfs-same"), scratch.path("renamed")).unwrap();
    let from = format!("dir:{}", scratch.path("renamed").display());
    let name = Some("localhost/two".parse().unwrap());
    let options = ImportOptions {
        name,
        platform: Platform::host(),
    };
    let two = import(&store, &from.parse().unwrap(), &options, &Silent)
        .unwrap()
        .remove(0);
    assert_ne!(one.id, two.id);
    assert_eq!(one.layers, two.layers);
    let root = store.root_image(&one, &Silent).unwrap();
    assert_eq!(store.root_image(&two, &Silent).unwrap(), root);
    store.remove("one", &unused, false).unwrap();
    assert!(root.exists() && two.layers[0].path.exists());
}

#[test]
fn what_crashes_leave_is_pruned_and_what_is_in_use_is_not() {
    let scratch = Scratch::new();
    let store = scratch.store();
    let image = add(&scratch, &store, "one", Some("localhost/one"));
    let tmp = store.dir().join("tmp");
    fs::write(tmp.join("blob-crashed"), "x").unwrap();
    let partial = tmp.join(format!("partial-{}", "0".repeat(64)));
    fs::write(&partial, "x").unwrap();
    fs::write(tmp.join(format!("rootfs-{}", "0".repeat(64))), "x").unwrap();
    fs::write(store.dir().join("blobs/sha256").join("1".repeat(64)), "x").unwrap();
    fs::write(store.dir().join("rootfs").join("2.erofs"), "x").unwrap();
    let busy = fs::File::create(tmp.join("blob-busy")).unwrap();
    busy.lock().unwrap();
    // A removal keeps downloads that wait to be resumed.
    let other = add(&scratch, &store, "two", None);
    store.remove(&other.id.hex(), &unused, false).unwrap();
    assert!(partial.exists());
    store.prune(&unused, false).unwrap();
    assert!(matches!(all(&tmp).as_slice(), [(path, _)] if path.ends_with("blob-busy")));
    assert_eq!(all(&store.dir().join("blobs")).len(), 3);
    assert_eq!(all(&store.dir().join("rootfs")), []);
    assert_eq!(store.resolve("one").unwrap().id, image.id);

    // Somebody adds an image.
    let adding = fs::File::open(store.dir().join("content.lock")).unwrap();
    adding.lock_shared().unwrap();
    assert!(matches!(store.prune(&unused, true), Err(StoreError::Busy)));
    assert_eq!(store.remove("one", &unused, false).unwrap().freed_bytes, 0);
    drop(adding);
    assert!(store.prune(&unused, false).unwrap().freed_bytes > 0);
}

#[test]
fn damaged_files_are_named_with_a_remedy() {
    let scratch = Scratch::new();
    let store = scratch.store();
    let image = add(&scratch, &store, "one", Some("localhost/one"));
    let other = add(&scratch, &store, "two", Some("localhost/two"));
    let manifest = store
        .dir()
        .join("blobs/sha256")
        .join(image.manifest_digest.hex());
    let whole = fs::read(&manifest).unwrap();
    for damage in [&b"{}"[..], b"", &whole[1..]] {
        fs::write(&manifest, damage).unwrap();
        let error = store.resolve("one").unwrap_err().to_string();
        assert!(
            error.contains("fcvm image rm --force localhost/one:latest"),
            "{error}"
        );
        assert!(error.contains(&image.manifest_digest.hex()), "{error}");
        // The others are not affected.
        assert_eq!(store.resolve(&other.id.short()).unwrap().id, other.id);
        let (images, errors) = store.list().unwrap();
        assert_eq!((images.len(), errors.len()), (1, 1));
        assert_eq!(images[0].id, other.id);
    }
    fs::remove_file(&manifest).unwrap();
    assert!(
        store
            .resolve("one")
            .unwrap_err()
            .to_string()
            .contains("it is missing")
    );
    store.remove("one", &unused, true).unwrap();
    assert_eq!(store.list().unwrap().0.len(), 1);

    let layer = &other.layers[0].path;
    let mut bytes = fs::read(layer).unwrap();
    let last = bytes.len() - 600;
    bytes[last] ^= 1;
    fs::write(layer, bytes).unwrap();
    let error = store.root_image(&other, &Silent).unwrap_err();
    assert!(matches!(error, StoreError::Convert { .. }), "{error}");
    assert_eq!(all(&store.dir().join("rootfs")), []);
    assert_eq!(all(&store.dir().join("tmp")), []);

    let index = store.dir().join("index.json");
    for damage in [
        "",
        "{",
        "[]",
        r#"{"schemaVersion":2,"manifests":[{"digest":"x"}]}"#,
    ] {
        fs::write(&index, damage).unwrap();
        let error = store.list().unwrap_err().to_string();
        assert!(
            error.contains("index.json is damaged") && !error.contains('\n'),
            "{error}"
        );
        // Nothing that is still there is freed.
        assert!(store.prune(&unused, true).is_err());
    }
    fs::write(
        store.dir().join("oci-layout"),
        r#"{"imageLayoutVersion":"2.0.0"}"#,
    )
    .unwrap();
    let error = ImageStore::open(store.dir()).unwrap_err().to_string();
    assert!(error.contains("later layout version '2.0.0'"), "{error}");
}

#[test]
fn many_add_and_convert_at_once() {
    let scratch = Scratch::new();
    let store = scratch.store();
    let rootfs = scratch.rootfs("shared");
    std::thread::scope(|scope| {
        for number in 0..8 {
            let (store, rootfs) = (&store, &rootfs);
            scope.spawn(move || {
                // Every one opens the store by itself, as processes do.
                let store = ImageStore::open(store.dir()).unwrap();
                let from = format!("dir:{}", rootfs.display()).parse().unwrap();
                let name = Some(format!("localhost/n{number}").parse().unwrap());
                let options = ImportOptions {
                    name,
                    platform: Platform::host(),
                };
                let image = import(&store, &from, &options, &Silent).unwrap().remove(0);
                store.root_image(&image, &Silent).unwrap();
            });
        }
    });
    let mut found: Vec<String> = store.list().unwrap().0.iter().flat_map(names).collect();
    found.sort();
    let expected: Vec<String> = (0..8).map(|n| format!("localhost/n{n}:latest")).collect();
    assert_eq!(found, expected);
    assert_eq!(all(&store.dir().join("rootfs")).len(), 1);
    assert_eq!(all(&store.dir().join("tmp")), []);
}

#[test]
fn others_can_read_the_store() {
    if tool_missing("skopeo") || tool_missing("umoci") {
        return;
    }
    let scratch = Scratch::new();
    let store = scratch.store();
    let image = add(&scratch, &store, "one", Some("localhost/one"));
    let layout = format!("oci:{}:localhost/one:latest", store.dir().display());
    let shown = run(Command::new("skopeo").args(["inspect", "--config", "--raw", &layout]));
    assert_eq!(Digest::of(shown.as_bytes()), image.id);
    let copy = scratch.path("copy");
    run(Command::new("skopeo")
        .args(["copy", "--quiet", "--insecure-policy", &layout])
        .arg(format!("oci:{}:one", copy.display())));
    run(Command::new("umoci")
        .args(["unpack", "--rootless", "--image"])
        .arg(format!("{}:one", copy.display()))
        .arg(scratch.path("bundle")));
    let text = fs::read_to_string(scratch.path("bundle/rootfs/etc/text")).unwrap();
    assert_eq!(text, "one");
}

#[test]
fn a_store_that_cannot_be_written_can_be_read() {
    if rustix::process::geteuid().is_root() {
        println!("skipped: root can write everywhere");
        return;
    }
    let scratch = Scratch::new();
    let store = scratch.store();
    add(&scratch, &store, "one", Some("localhost/one"));
    let lock = |mode| {
        for dir in ["", "tmp", "blobs/sha256", "rootfs"] {
            let path = store.dir().join(Path::new(dir));
            fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
        }
    };
    lock(0o500);
    let again = ImageStore::open(store.dir()).unwrap();
    let found = again.resolve("one").map(|image| names(&image));
    let from = format!("dir:{}", scratch.rootfs("two").display())
        .parse()
        .unwrap();
    let options = ImportOptions {
        name: None,
        platform: Platform::host(),
    };
    let refused = import(&again, &from, &options, &Silent);
    lock(0o700);
    assert_eq!(found.unwrap(), ["localhost/one:latest"]);
    assert!(refused.unwrap_err().to_string().starts_with("cannot "));
}
