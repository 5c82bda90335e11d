//! Images from archives and directories, made by the tools that people use and by nasty hand.

mod common;

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use common::{Scratch, all, run, tool_missing};
use fcvm_image::import::ImportError;
use fcvm_image::{Digest, Image, ImageStore, ImportOptions, Platform, Silent, import};

fn options(name: Option<&str>) -> ImportOptions {
    ImportOptions {
        name: name.map(|name| name.parse().unwrap()),
        platform: Platform::host(),
    }
}

fn add(store: &ImageStore, source: &str, name: Option<&str>) -> Result<Vec<Image>, ImportError> {
    import(store, &source.parse().unwrap(), &options(name), &Silent)
}

fn names(image: &Image) -> Vec<String> {
    image.names.iter().map(|name| name.to_string()).collect()
}

/// A store with one image of one layer, which is also a layout for other tools.
fn original(scratch: &Scratch) -> (PathBuf, Image) {
    let store = ImageStore::open(&scratch.path("original")).unwrap();
    let source = format!("dir:{}", scratch.rootfs("hello").display());
    let image = add(&store, &source, Some("localhost/hello:1"))
        .unwrap()
        .remove(0);
    (store.dir().to_owned(), image)
}

fn skopeo(from: &str, to: &str) {
    run(Command::new("skopeo").args(["copy", "--quiet", "--insecure-policy", from, to]));
}

#[test]
fn a_directory_becomes_an_image() {
    let scratch = Scratch::new();
    let store = scratch.store();
    let rootfs = scratch.rootfs("hello");
    fs::hard_link(rootfs.join("etc/text"), rootfs.join("etc/same")).unwrap();
    let source = format!("dir:{}", rootfs.display());
    let images = add(&store, &source, Some("localhost/hello")).unwrap();
    let image = store.resolve("hello").unwrap();
    assert_eq!(image.id, images[0].id);
    assert_eq!(names(&image), ["localhost/hello:latest"]);
    assert_eq!(image.layers.len(), 1);
    assert_eq!(image.layers[0].digest, image.layers[0].diff_id);
    let run = image.config.config().as_ref().unwrap();
    assert_eq!(run.cmd().as_ref().unwrap()[0], "sh");

    let mut archive = tar::Archive::new(File::open(&image.layers[0].path).unwrap());
    let owner = fs::metadata(&rootfs).unwrap().uid();
    let mut found = Vec::new();
    for entry in archive.entries().unwrap() {
        let entry = entry.unwrap();
        assert_eq!(entry.header().uid().unwrap(), u64::from(owner));
        let path = entry.path().unwrap().display().to_string();
        found.push((
            path,
            entry.header().entry_type(),
            entry.header().mode().unwrap(),
        ));
    }
    let paths: Vec<&str> = found.iter().map(|(path, ..)| path.as_str()).collect();
    assert_eq!(
        paths,
        [
            "./",
            "./bin/",
            "./bin/link",
            "./bin/true",
            "./etc/",
            "./etc/same",
            "./etc/text"
        ]
    );
    assert_eq!(found[2].1, tar::EntryType::Symlink);
    assert_eq!(found[3].2, 0o755);
    assert_eq!(found[6].1, tar::EntryType::Link);
    // The same tree gives the same layer.
    let again = add(&store, &source, None).unwrap().remove(0);
    assert_eq!(again.layers[0].digest, image.layers[0].digest);

    let error = add(&store, "dir:/no/such/dir", None)
        .unwrap_err()
        .to_string();
    assert_eq!(error, "cannot read /no/such/dir");
}

#[test]
fn what_skopeo_writes_is_read() {
    if tool_missing("skopeo") {
        return;
    }
    let scratch = Scratch::new();
    let (layout, image) = original(&scratch);
    let from = format!("oci:{}:localhost/hello:1", layout.display());
    let at = |name: &str| scratch.path(name).display().to_string();
    skopeo(&from, &format!("oci:{}:first", at("dir")));
    skopeo(
        &from,
        &format!("oci-archive:{}:localhost/second:2", at("oci.tar")),
    );
    skopeo(
        &from,
        &format!("docker-archive:{}:localhost/third:3", at("docker.tar")),
    );
    for compress in ["gzip", "zstd"] {
        if tool_missing(compress) {
            continue;
        }
        run(Command::new(compress)
            .args(["--keep", "--quiet"])
            .arg(at("docker.tar")));
    }
    let root = |store: &ImageStore, image: &Image| {
        fs::read(store.root_image(image, &Silent).unwrap()).unwrap()
    };
    let expected = root(&ImageStore::open(&layout).unwrap(), &image);
    let cases = [
        (format!("oci:{}:first", at("dir")), vec![]),
        (format!("oci:{}", at("dir")), vec![]),
        (
            format!("oci-archive:{}", at("oci.tar")),
            vec!["localhost/second:2"],
        ),
        (
            format!("docker-archive:{}", at("docker.tar")),
            vec!["localhost/third:3"],
        ),
        (
            format!("docker-archive:{}:localhost/third:3", at("docker.tar")),
            vec!["localhost/third:3"],
        ),
        (
            format!("docker-archive:{}", at("docker.tar.gz")),
            vec!["localhost/third:3"],
        ),
        (
            format!("docker-archive:{}", at("docker.tar.zst")),
            vec!["localhost/third:3"],
        ),
    ];
    for (number, (source, expected_names)) in cases.iter().enumerate() {
        let path = source.split(':').nth(1).unwrap();
        if !Path::new(path).exists() {
            continue;
        }
        let store = ImageStore::open(&scratch.path(&format!("store-{number}"))).unwrap();
        let found = add(&store, source, None).unwrap();
        assert_eq!(found.len(), 1, "{source}");
        assert_eq!(names(&found[0]), *expected_names, "{source}");
        assert_eq!(root(&store, &found[0]), expected, "{source}");
        // skopeo writes a Docker configuration of its own into Docker archives.
        if source.starts_with("oci") {
            assert_eq!(found[0].id, image.id, "{source}");
        }
        let named = add(&store, source, Some("localhost/given")).unwrap();
        assert!(names(&named[0]).contains(&"localhost/given:latest".to_owned()));
        assert_eq!(all(&store.dir().join("tmp")), [], "{source}");
    }
    let error = add(&scratch.store(), &format!("oci:{}:other", at("dir")), None).unwrap_err();
    assert!(
        error.to_string().contains("no image 'other'; it has first"),
        "{error}"
    );
}

#[test]
fn what_umoci_and_buildah_make_is_read() {
    let scratch = Scratch::new();
    let store = scratch.store();
    if !tool_missing("umoci") {
        let layout = scratch.path("umoci");
        let image = format!("{}:new", layout.display());
        let bundle = scratch.path("bundle");
        run(Command::new("umoci")
            .args(["init", "--layout"])
            .arg(&layout));
        run(Command::new("umoci").args(["new", "--image", &image]));
        run(Command::new("umoci")
            .args(["unpack", "--rootless", "--image", &image])
            .arg(&bundle));
        fs::write(bundle.join("rootfs/text"), "umoci").unwrap();
        run(Command::new("umoci")
            .args(["repack", "--image", &image])
            .arg(&bundle));
        let found = add(&store, &format!("oci:{image}"), Some("localhost/umoci")).unwrap();
        assert_eq!(found[0].layers.len(), 1);
        assert!(found[0].layers[0].media_type.ends_with("gzip"));
        store.root_image(&found[0], &Silent).unwrap();
    }
    if !tool_missing("buildah") {
        let state = scratch.path("containers");
        let buildah = |arguments: &[&str]| {
            let mut command = Command::new("buildah");
            command
                .args(["--storage-driver=vfs", "--root"])
                .arg(state.join("root"));
            command
                .arg("--runroot")
                .arg(state.join("run"))
                .args(arguments)
                .output()
                .unwrap()
        };
        let made = buildah(&["from", "--name", "c", "scratch"]);
        if !made.status.success() {
            println!("skipped: buildah does not work for this user here");
            return;
        }
        let rootfs = scratch.rootfs("buildah").display().to_string();
        let file = scratch.path("buildah.tar");
        assert!(buildah(&["add", "c", &rootfs, "/"]).status.success());
        assert!(
            buildah(&["config", "--cmd", "/bin/true", "--label", "a=b", "c"])
                .status
                .success()
        );
        assert!(
            buildah(&["commit", "--quiet", "c", "localhost/built:1"])
                .status
                .success()
        );
        let to = format!("docker-archive:{}:localhost/built:1", file.display());
        let pushed = buildah(&["push", "--quiet", "localhost/built:1", &to]);
        assert!(
            pushed.status.success(),
            "{}",
            String::from_utf8_lossy(&pushed.stderr)
        );
        let found = add(&store, &format!("docker-archive:{}", file.display()), None).unwrap();
        assert_eq!(names(&found[0]), ["localhost/built:1"]);
        let run = found[0].config.config().as_ref().unwrap();
        assert_eq!(run.labels().as_ref().unwrap()["a"], "b");
        store.root_image(&found[0], &Silent).unwrap();
    }
}

/// Writes an archive of these members: name, link target or none, content.
fn archive(path: &Path, members: &[(&str, Option<&str>, &[u8])]) {
    let mut builder = tar::Builder::new(File::create(path).unwrap());
    for (name, link, content) in members {
        let mut header = tar::Header::new_gnu();
        // Written by hand: the builder refuses what an attacker would write.
        header.as_old_mut().name[..name.len()].copy_from_slice(name.as_bytes());
        header.set_mode(0o644);
        header.set_size(content.len() as u64);
        if let Some(target) = link {
            header.set_entry_type(tar::EntryType::Symlink);
            header.as_old_mut().linkname[..target.len()].copy_from_slice(target.as_bytes());
        }
        header.set_cksum();
        builder.append(&header, *content).unwrap();
    }
    builder.into_inner().unwrap().flush().unwrap();
}

/// A small layer, its digest, and a Docker configuration with so many of it.
fn parts(scratch: &Scratch, count: usize) -> (Vec<u8>, String) {
    let path = scratch.path("layer.tar");
    archive(&path, &[("a", None, b"content")]);
    let layer = fs::read(path).unwrap();
    let diff_ids = vec![Digest::of(&layer).to_string(); count];
    let config = serde_json::json!({
        "architecture": Platform::host().architecture,
        "os": "linux",
        // As old versions of Docker write them.
        "config": {"Cmd": ["a"], "Entrypoint": null, "Volumes": null, "ExposedPorts": null},
        "container_config": {"Hostname": "x"},
        "rootfs": {"type": "layers", "diff_ids": diff_ids},
    });
    (layer, config.to_string())
}

#[test]
fn shared_and_linked_layers_of_docker_save_are_read() {
    let scratch = Scratch::new();
    let store = scratch.store();
    let (layer, config) = parts(&scratch, 2);
    let other = config.replace("\"Cmd\":[\"a\"]", "\"Cmd\":[\"b\"]");
    let list = br#"[
        {"Config":"one.json","RepoTags":["one:1","registry.example/one:2"],"Layers":["x/layer.tar","y/layer.tar"]},
        {"Config":"two.json","RepoTags":null,"Layers":["x/layer.tar","x/layer.tar"]}
    ]"#;
    let path = scratch.path("save.tar");
    archive(
        &path,
        &[
            ("./x/layer.tar", None, &layer),
            ("y/layer.tar", Some("../x/layer.tar"), b""),
            ("one.json", None, config.as_bytes()),
            ("two.json", None, other.as_bytes()),
            ("manifest.json", None, list),
        ],
    );
    let source = format!("docker-archive:{}", path.display());
    let found = add(&store, &source, None).unwrap();
    assert_eq!(
        names(&found[0]),
        ["docker.io/library/one:1", "registry.example/one:2"]
    );
    assert_eq!(names(&found[1]), Vec::<String>::new());
    assert_eq!(found[0].id, Digest::of(config.as_bytes()));
    assert_eq!(found[0].layers.len(), 2);
    store.root_image(&found[0], &Silent).unwrap();
    assert_eq!(
        add(&store, &format!("{source}:one:1"), None).unwrap().len(),
        1
    );
    let error = add(&store, &source, Some("localhost/x"))
        .unwrap_err()
        .to_string();
    assert!(error.contains("one name cannot be given to all"), "{error}");
    let error = add(&store, &format!("{source}:two"), None)
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("it has one:1, registry.example/one:2"),
        "{error}"
    );
}

#[test]
fn hostile_archives_get_one_line_and_leave_nothing() {
    let scratch = Scratch::new();
    let store = scratch.store();
    let (layer, config) = parts(&scratch, 1);
    let config = config.as_bytes();
    let wrong_architecture = String::from_utf8_lossy(config)
        .replace(&Platform::host().architecture, "s390x")
        .into_bytes();
    let list: &[u8] = br#"[{"Config":"c","RepoTags":["a:1"],"Layers":["l"]}]"#;
    let large = vec![b' '; 5 << 20];
    let mut damaged = layer.clone();
    damaged[513] ^= 1;
    type Members<'m> = Vec<(&'m str, Option<&'m str>, &'m [u8])>;
    let cases: Vec<(&str, Members<'_>)> = vec![
        ("has no member 'manifest.json'", vec![("c", None, config)]),
        (
            "cannot read",
            vec![("manifest.json", None, list), ("l", None, &layer)],
        ),
        (
            "cannot read",
            vec![("manifest.json", None, list), ("c", None, config)],
        ),
        ("4194304", vec![("manifest.json", None, &large)]),
        (
            "its manifest.json is wrong",
            vec![("manifest.json", None, b"{}")],
        ),
        ("it is empty", vec![("manifest.json", None, b"[]")]),
        (
            "names no member",
            vec![("manifest.json", None, br#"[{"Config":"../c","Layers":[]}]"#)],
        ),
        (
            "has the digest",
            vec![
                ("manifest.json", None, list),
                ("c", None, config),
                ("l", None, &damaged),
            ],
        ),
        (
            "made for linux/s390x",
            vec![
                ("manifest.json", None, list),
                ("c", None, &wrong_architecture),
                ("l", None, &layer),
            ],
        ),
        ("leaves it", vec![("../manifest.json", None, list)]),
        ("leaves it", vec![("/etc/passwd", None, list)]),
        (
            "leaves it",
            vec![
                ("manifest.json", None, list),
                ("c", Some("../../etc/passwd"), b""),
            ],
        ),
        (
            "cannot read",
            vec![("manifest.json", Some("manifest.json"), b"")],
        ),
        (
            "2 layers and the configuration 1",
            vec![
                (
                    "manifest.json",
                    None,
                    br#"[{"Config":"c","Layers":["l","l"]}]"#,
                ),
                ("c", None, config),
                ("l", None, &layer),
            ],
        ),
        (
            "configuration cannot be read",
            vec![
                ("manifest.json", None, list),
                ("c", None, b"{\"a\":"),
                ("l", None, &layer),
            ],
        ),
        (
            "is not an image reference",
            vec![
                (
                    "manifest.json",
                    None,
                    br#"[{"Config":"c","RepoTags":["A B"],"Layers":["l"]}]"#,
                ),
                ("c", None, config),
                ("l", None, &layer),
            ],
        ),
    ];
    let before = all(&store.dir().join("blobs"));
    for (expected, members) in &cases {
        let path = scratch.path("hostile.tar");
        archive(&path, members);
        let error = add(&store, &format!("docker-archive:{}", path.display()), None).unwrap_err();
        let error = error.to_string();
        assert!(
            error.contains(expected) && !error.contains('\n'),
            "{expected}: {error}"
        );
        assert!(store.list().unwrap().0.is_empty());
        assert_eq!(all(&store.dir().join("tmp")), [], "{expected}");
        assert_eq!(all(&store.dir().join("blobs")), before, "{expected}");
    }
}

#[test]
fn broken_files_are_told_from_archives() {
    let scratch = Scratch::new();
    let store = scratch.store();
    let (layer, _) = parts(&scratch, 1);
    let path = scratch.path("file");
    for (content, expected) in [
        (
            b"hello, this is no archive".to_vec(),
            "not a valid tar archive",
        ),
        (vec![b'x'; 4096], "not a valid tar archive"),
        (layer[..515].to_vec(), "in the middle of 'a'"),
        (vec![], "no member 'manifest.json'"),
        (b"\x1f\x8b\x08\0\0\0garbage".to_vec(), "cannot read"),
        (b"\x28\xb5\x2f\xfdgarbage".to_vec(), "cannot read"),
        (b"\xfd7zXZ\0 ".to_vec(), "xz is not supported"),
    ] {
        fs::write(&path, content).unwrap();
        let error = add(&store, &format!("docker-archive:{}", path.display()), None).unwrap_err();
        assert!(error.to_string().contains(expected), "{expected}: {error}");
    }
    let error = add(&store, &format!("oci-archive:{}", path.display()), None).unwrap_err();
    assert!(error.to_string().contains("xz"), "{error}");
    let dir = scratch.path("");
    let error = add(&store, &format!("oci:{}", dir.display()), None).unwrap_err();
    assert!(
        error.to_string().contains("no file 'oci-layout'"),
        "{error}"
    );
    assert!(
        add(&store, "oci:/no/such", None)
            .unwrap_err()
            .to_string()
            .starts_with("cannot read")
    );
    assert_eq!(all(&store.dir().join("tmp")), []);
}

#[test]
fn damaged_layouts_leave_nothing() {
    let scratch = Scratch::new();
    let (layout, image) = original(&scratch);
    let store = scratch.store();
    let source = format!("oci:{}:localhost/hello:1", layout.display());
    let blob = |digest: &Digest| layout.join("blobs/sha256").join(digest.hex());
    for digest in [image.manifest_digest, image.id, image.layers[0].digest] {
        let whole = fs::read(blob(&digest)).unwrap();
        let mut damaged = whole.clone();
        damaged[20] ^= 1;
        for (content, expected) in [
            (damaged, "has the digest"),
            (whole[1..].to_vec(), "announced size"),
        ] {
            fs::write(blob(&digest), content).unwrap();
            let error = add(&store, &source, None).unwrap_err().to_string();
            let is_document = digest != image.layers[0].digest;
            let expected = if is_document {
                "has the digest"
            } else {
                expected
            };
            assert!(error.contains(expected), "{error}");
        }
        fs::remove_file(blob(&digest)).unwrap();
        let error = add(&store, &source, None).unwrap_err().to_string();
        assert!(
            error.starts_with("cannot read") && error.contains(&digest.hex()),
            "{error}"
        );
        fs::write(blob(&digest), whole).unwrap();
        assert!(all(&store.dir().join("blobs")).is_empty());
        assert!(all(&store.dir().join("tmp")).is_empty());
    }
    add(&store, &source, None).unwrap();
}
