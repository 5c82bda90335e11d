//! Images to measure with: one that boots quickly, one that is large enough to convert.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Context as _;

use crate::lab::{Lab, find_program, finished};

/// Name of the image of one static program.
pub(crate) const BUSYBOX_NAME: &str = "localhost/bench/busybox:2";
const DEBIAN_NAME: &str = "localhost/bench/debian:1";

/// What the measured commands need.
const APPLETS: [&str; 9] = [
    "sh",
    "true",
    "echo",
    "cat",
    "dd",
    "sleep",
    "sha256sum",
    "ls",
    "mkdir",
];

/// Imports the busybox image unless it is there.
pub(crate) fn import_busybox(lab: &Lab) -> anyhow::Result<()> {
    if lab.inspect(BUSYBOX_NAME).is_ok() {
        return Ok(());
    }
    let busybox =
        find_program("busybox").context("busybox is missing: install Debian's busybox-static")?;
    let root = tempfile::tempdir_in(&lab.data_dir)?;
    let make = |path: &str| fs::create_dir_all(root.path().join(path));
    for directory in ["bin", "etc", "tmp", "root"] {
        make(directory).with_context(|| format!("cannot create {directory}"))?;
    }
    fs::copy(&busybox, root.path().join("bin/busybox"))?;
    for applet in APPLETS {
        symlink("busybox", root.path().join("bin").join(applet))?;
    }
    fs::write(
        root.path().join("etc/passwd"),
        "root:x:0:0:root:/root:/bin/sh\n",
    )?;
    fs::write(root.path().join("etc/group"), "root:x:0:\n")?;
    let source = format!("dir:{}", root.path().display());
    lab.run(&["image", "import", &source, BUSYBOX_NAME])?;
    Ok(())
}

/// A Debian image as an OCI layout with gzip layers, as registries hold them: the directory.
pub(crate) fn debian_layout(lab: &Lab) -> anyhow::Result<PathBuf> {
    let layout = lab.data_dir.join("debian-oci");
    if layout.join("index.json").is_file() {
        return Ok(layout);
    }
    if lab.inspect(DEBIAN_NAME).is_err() {
        eprintln!("preparing: {DEBIAN_NAME} (minutes, once)");
        lab.run(&[
            "image",
            "bootstrap",
            "debian:bookworm",
            "--tag",
            DEBIAN_NAME,
        ])?;
    }
    // fcvm's content store is an OCI layout itself.
    let partial = tempfile::tempdir_in(&lab.data_dir)?;
    let store = lab.data_dir.join("fcvm/images");
    copy_layout(&store, DEBIAN_NAME, partial.path())?;
    fs::rename(partial.keep(), &layout).context("cannot keep the Debian image")?;
    Ok(layout)
}

fn copy_layout(from: &Path, name: &str, to: &Path) -> anyhow::Result<()> {
    let mut command = Command::new("skopeo");
    command.args(["copy", "--quiet", "--insecure-policy"]);
    command.arg(format!("oci:{}:{name}", from.display()));
    command.arg(format!("oci:{}:latest", to.display()));
    finished(command, "skopeo copy").map(drop)
}
