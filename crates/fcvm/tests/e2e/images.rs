//! Images: names, lists, removal, imports of every kind, and those that no honest tool makes.

use std::fs;

use serde_json::json;

use crate::base::{IMAGE, base};
use crate::image::{Image, Layer, OTHER_ARCHITECTURE, blob, digest};
use crate::lab::{Lab, tree};
use crate::process::must;

/// The import fails with one line that has this text, and leaves the store as it was.
#[track_caller]
fn refused(lab: &Lab, source: &str, said: &[&str]) {
    let before = tree(&lab.data.join("images"));
    let line = lab.fails(125, &["image", "import", source, "bad:1"]);
    assert!(
        said.iter()
            .any(|text| line.to_lowercase().contains(&text.to_lowercase())),
        "{said:?} in: {line}"
    );
    let content = |files: Vec<(std::path::PathBuf, u64)>| {
        files
            .into_iter()
            .filter(|(path, _)| {
                path.extension().is_none_or(|end| end != "lock") && !path.ends_with("oci-layout")
            })
            .collect::<Vec<_>>()
    };
    assert_eq!(
        content(tree(&lab.data.join("images"))),
        content(before),
        "files are left of the refused image"
    );
    assert_eq!(lab.ok(&["image", "ls", "-q"]), "");
}

#[test]
fn broken_layouts_are_refused() {
    let Some(lab) = Lab::without_images() else {
        return;
    };
    let layer = Layer::new().file("hello", 0o644, b"hello\n").finish();
    let write = |name: &str, image: &Image| {
        let directory = lab.file(name);
        image.write(&directory, "latest");
        (format!("oci:{}", directory.display()), directory)
    };

    // A layer whose bytes are not what its digest says; one that is cut short; one that is missing.
    let image = Image::of(vec![layer.clone()]);
    let (source, directory) = write("changed", &image);
    let mut changed = layer.clone();
    changed[600] ^= 1;
    fs::write(blob(&directory, &digest(&layer)), &changed).unwrap();
    refused(&lab, &source, &["digest"]);
    let (source, directory) = write("short", &image);
    fs::write(blob(&directory, &digest(&layer)), &layer[..700]).unwrap();
    refused(&lab, &source, &["digest", "short", "bytes", "truncated"]);
    let (source, directory) = write("missing", &image);
    fs::remove_file(blob(&directory, &digest(&layer))).unwrap();
    refused(
        &lab,
        &source,
        &["no such file", "missing", "not there", "has no"],
    );
    // A configuration that names other layers.
    let lie = Image {
        diff_ids: Some(vec![digest(b"something else")]),
        ..Image::of(vec![layer.clone()])
    };
    let (source, _) = write("lie", &lie);
    import_or_run_refused(&lab, &source, &["digest", "diff", "promises"]);
    // For other machines only.
    let (source, _) = write(
        "other",
        &Image {
            architecture: OTHER_ARCHITECTURE,
            ..Image::of(vec![layer])
        },
    );
    refused(&lab, &source, &[OTHER_ARCHITECTURE]);
    // Not a layout at all.
    let garbage = lab.file("garbage");
    fs::create_dir(&garbage).unwrap();
    refused(
        &lab,
        &format!("oci:{}", garbage.display()),
        &["layout", "index.json"],
    );
    fs::write(garbage.join("index.json"), "{").unwrap();
    fs::write(
        garbage.join("oci-layout"),
        r#"{"imageLayoutVersion":"1.0.0"}"#,
    )
    .unwrap();
    refused(&lab, &format!("oci:{}", garbage.display()), &["index"]);
    refused(&lab, "oci:/no/such/dir", &["/no/such/dir"]);
    refused(&lab, "docker-archive:/no/such/file", &["/no/such/file"]);
    refused(&lab, "tape:/dev/st0", &["oci:", "docker-archive:"]);
    lab.finish();
}

/// Some lies are found only when the layers are read: at the import or at the first run.
#[track_caller]
fn import_or_run_refused(lab: &Lab, source: &str, said: &[&str]) {
    let imported = lab.fcvm(&["image", "import", source, "bad:1"]);
    let failed = if imported.code == 0 {
        lab.fcvm(&["run", "--rm", "--network", "none", "bad:1", "true"])
    } else {
        imported
    };
    let line = crate::lab::one_error(failed, 125, source);
    assert!(
        said.iter().any(|text| line.to_lowercase().contains(text)),
        "{said:?} in: {line}"
    );
    lab.fcvm(&["image", "rm", "bad:1"]);
    assert_eq!(lab.ok(&["image", "ls", "-q"]), "");
    assert_eq!(lab.ok(&["ls", "-a", "-q"]), "");
}

#[test]
fn malicious_and_truncated_layers_are_refused() {
    let Some(lab) = Lab::without_images() else {
        return;
    };
    let whole = Layer::new().file("big", 0o644, &vec![7; 100_000]).finish();
    for (name, layer, said) in [
        (
            "climbs",
            Layer::new().raw("../../climbs", b"x").finish(),
            "..",
        ),
        (
            "through",
            Layer::new()
                .link("out", "/")
                .raw("out/../../x", b"x")
                .finish(),
            "..",
        ),
        ("truncated", whole[..50_000].to_vec(), "end"),
        ("garbage", vec![0x5a; 10_000], "tar"),
    ] {
        let directory = lab.file(name);
        Image::of(vec![layer]).write(&directory, "latest");
        let source = format!("oci:{}", directory.display());
        import_or_run_refused(
            &lab,
            &source,
            &[said, "archive", "member", "layer", "truncated"],
        );
    }
    // An absolute name and a link that leads out stay inside of the image.
    let layer = Layer::new()
        .raw("/absolute", b"inside\n")
        .link("etc2", "/etc")
        .raw("etc2/through", b"inside\n")
        .finish();
    let directory = lab.file("absolute");
    Image::of(vec![base().unwrap().layer.clone(), layer]).write(&directory, "latest");
    let imported = lab.fcvm(&[
        "image",
        "import",
        &format!("oci:{}", directory.display()),
        "bad:1",
    ]);
    let run = [
        "run",
        "--rm",
        "--network",
        "none",
        "bad:1",
        "cat",
        "/absolute",
        "/etc/through",
    ];
    let output = if imported.code == 0 {
        lab.fcvm(&run)
    } else {
        imported
    };
    if output.code == 0 {
        assert_eq!(output.text(), "inside\ninside\n");
    } else {
        crate::lab::one_error(output, 125, "absolute names");
    }
    for path in ["/absolute", "/etc/through", "/climbs"] {
        assert!(
            !std::path::Path::new(path).exists(),
            "{path} was written on the host"
        );
    }
    lab.fcvm(&["image", "rm", "-f", "bad:1"]);
    lab.finish();
}

#[test]
fn images_are_listed_tagged_inspected_removed_and_pruned() {
    let Some(lab) = Lab::without_images() else {
        return;
    };
    let layout = format!("oci:{}", base().unwrap().layout.display());
    lab.import(&layout, "first:1");
    lab.ok(&["image", "tag", "first:1", "second:2"]);
    let names = lab.ok(&["image", "ls"]);
    assert!(
        names.contains("first") && names.contains("second"),
        "{names}"
    );
    let listed = lab.json(&["image", "ls", "--format", "json"]);
    assert!(!listed.as_array().unwrap().is_empty(), "{listed}");
    let inspected = lab.json(&["image", "inspect", "first:1"]);
    assert!(
        inspected.to_string().contains("FROM_IMAGE=yes"),
        "{inspected}"
    );
    assert_eq!(
        lab.first_run(&[
            "run",
            "--rm",
            "--network",
            "none",
            "second:2",
            "echo",
            "named"
        ]),
        "named\n"
    );

    // An image that a VM uses is kept until the VM is removed, or until it is forced.
    lab.idle_vm_of("second:2", "user", &["--network", "none"]);
    lab.ok(&["image", "rm", "first:1"]);
    let line = lab.fails(125, &["image", "rm", "second:2"]);
    assert!(line.contains("use"), "{line}");
    lab.ok(&["stop", "user"]);
    let line = lab.fails(125, &["image", "rm", "second:2"]);
    assert!(line.contains("use"), "{line}");
    lab.ok(&["system", "prune", "--force"]);
    assert_eq!(lab.ok(&["ls", "-a", "-q"]), "", "prune removes ended VMs");
    assert_eq!(
        lab.ok(&["image", "ls", "-q"]).lines().count(),
        1,
        "and keeps images with a name"
    );
    // A damaged one hides no other, and can be removed.
    let mut other = Image::of(vec![base().unwrap().layer.clone()]);
    other.config["Env"] = serde_json::json!(["OTHER=1"]);
    other.write(&lab.file("other"), "latest");
    lab.import(&format!("oci:{}", lab.file("other").display()), "other:1");
    let manifest = lab.json(&["image", "inspect", "other:1"])[0]["digest"].clone();
    fs::remove_file(blob(&lab.data.join("images"), manifest.as_str().unwrap())).unwrap();
    let output = lab.fcvm(&["image", "ls"]);
    assert!(
        output.code == 0 && output.text().contains("second"),
        "{output:?}"
    );
    assert!(
        output.stderr.starts_with("Warning: ") && output.stderr.lines().count() == 1,
        "{output:?}"
    );
    lab.ok(&["image", "rm", "--force", "other:1"]);
    assert_eq!(lab.ok(&["image", "ls", "-q"]).lines().count(), 1);
    let used = |lab: &Lab| {
        tree(&lab.data.join("images"))
            .iter()
            .map(|(_, size)| size)
            .sum::<u64>()
    };
    assert!(used(&lab) > 1 << 20);
    assert!(lab.ok(&["system", "df"]).to_lowercase().contains("image"));
    lab.json(&["system", "df", "--format", "json"]);
    lab.ok(&["system", "prune", "--all", "--force"]);
    assert_eq!(lab.ok(&["image", "ls", "-q"]), "");
    assert!(
        used(&lab) < 64 << 10,
        "{:?}",
        tree(&lab.data.join("images"))
    );
    let line = lab.fails(125, &["image", "rm", "first:1"]);
    assert!(line.contains("first"), "{line}");
    lab.finish();
}

/// The same content by every way in is the same file system in the guest.
#[test]
fn imports_of_every_kind_run() {
    let Some(lab) = Lab::without_images() else {
        return;
    };
    let layout = base().unwrap().layout.to_str().unwrap().to_owned();
    let path = |name: &str| lab.file(name).to_str().unwrap().to_owned();
    if crate::base::find("skopeo").is_none() {
        println!("skipped: skopeo is not installed");
        return;
    }
    let from = format!("oci:{layout}:latest");
    let copy = |to: &str| must("skopeo", &["--insecure-policy", "copy", "-q", &from, to]);
    copy(&format!("docker-archive:{}:app:1", path("docker.tar")));
    copy(&format!("oci-archive:{}:latest", path("oci.tar")));
    must("gzip", &["-k", &path("docker.tar")]);
    let root = path("root");
    fs::create_dir(&root).unwrap();
    let layer = lab.write("layer.tar", &base().unwrap().layer);
    must("tar", &["-C", &root, "--no-same-owner", "-xf", &layer]);
    let archive = format!("docker-archive:{}", path("docker.tar"));
    let zipped = format!("docker-archive:{}", path("docker.tar.gz"));
    let oci = format!("oci-archive:{}", path("oci.tar"));
    for (source, name) in [
        (&archive, None),
        (&zipped, Some("zipped:1")),
        (&oci, Some("oci:1")),
        (&format!("dir:{root}"), Some("dir:1")),
    ] {
        let output = lab.fcvm(&[&["image", "import", source][..], name.as_slice()].concat());
        assert_eq!(output.code, 0, "{source}: {output:?}");
        let image = name.unwrap_or("app:1");
        let output = lab.fcvm(&[
            "run",
            "--rm",
            "--network",
            "none",
            image,
            "cat",
            "/data/link",
        ]);
        assert_eq!(
            (output.code, output.text().as_str()),
            (0, "hello\n"),
            "{source}: {output:?}"
        );
    }
    // Owners and modes as the layer has them; two imports of one content are one root image.
    let script = "stat -c '%u:%g %a' /data/far /tmp; readlink /data/out";
    assert_eq!(
        lab.ok(&[
            "run",
            "--rm",
            "--network",
            "none",
            "zipped:1",
            "sh",
            "-c",
            script
        ]),
        "100000:100000 640\n0:0 1777\n/etc\n"
    );
    let layers = |image: &str| lab.json(&["image", "inspect", image])[0]["layers"].clone();
    assert_eq!(layers("app:1"), layers("zipped:1"));
    lab.finish();
}

#[test]
fn layers_are_merged_by_the_rules() {
    let Some(lab) = Lab::without_images() else {
        return;
    };
    let busybox = base().unwrap().layer.clone();
    let second = Layer::new()
        .file("data/.wh.hello", 0o644, b"")
        .directory("opaque", 0o755)
        .file("opaque/old", 0o644, b"old\n")
        .file("usr/bin/late", 0o4755, b"x")
        .finish();
    let third = Layer::new()
        .file("opaque/.wh..wh..opq", 0o644, b"")
        .file("opaque/new", 0o644, b"new\n")
        .file("data/text", 0o600, b"replaced\n")
        .finish();
    let directory = lab.file("merged");
    let config = json!({"Entrypoint": ["/bin/sh", "-c"], "Cmd": ["echo from the image"]});
    Image {
        config,
        ..Image::of(vec![busybox, second, third])
    }
    .write(&directory, "latest");
    lab.import(&format!("oci:{}", directory.display()), "merged:1");
    let script = "ls /data/hello 2>&1; ls -a /opaque | tail -n +3; cat /data/text; stat -c %a /usr/bin/late; ls -a /data | grep wh";
    let text = lab
        .fcvm(&["run", "--rm", "--network", "none", "merged:1", script])
        .text();
    assert_eq!(
        text,
        "ls: /data/hello: No such file or directory\nnew\nreplaced\n4755\n"
    );
    assert_eq!(
        lab.ok(&["run", "--rm", "--network", "none", "merged:1"]),
        "from the image\n"
    );
    lab.finish();
}

#[test]
fn an_unknown_image_is_told() {
    let Some(lab) = Lab::new() else { return };
    let line = lab.fails(125, &["run", "--rm", "--pull", "never", "nosuch:1", "true"]);
    assert!(line.contains("nosuch"), "{line}");
    // Nobody listens there.
    let line = lab.fails(125, &["run", "--rm", "127.0.0.1:1/nosuch:1", "true"]);
    assert!(line.contains("127.0.0.1:1"), "{line}");
    for bad in ["", "UPPER/case", "a:b:c", "name@sha256:short", "..", "-x"] {
        let line = lab.fcvm(&["run", "--rm", "--", bad, "true"]);
        assert_eq!(line.code, 125, "{bad}: {line:?}");
    }
    assert_eq!(
        lab.json(&["image", "inspect", IMAGE])
            .as_array()
            .unwrap()
            .len(),
        1
    );
    lab.finish();
}
