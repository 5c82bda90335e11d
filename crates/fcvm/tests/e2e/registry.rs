//! Images from a real registry on loopback: Debian's docker-registry, pushed to with skopeo.

use std::fs;
use std::net::TcpListener;
use std::path::PathBuf;
use std::process::Command;

use crate::base::{base, find};
use crate::lab::{Lab, tree};
use crate::process::{Running, must};

/// A registry that serves plain HTTP on loopback as long as it lives.
struct Registry {
    address: String,
    storage: PathBuf,
    _process: Running,
}

impl Registry {
    fn start(lab: &Lab) -> Option<Self> {
        for program in ["docker-registry", "skopeo"] {
            if find(program).is_none() {
                println!("skipped: {program} is not installed");
                return None;
            }
        }
        let port = TcpListener::bind("127.0.0.1:0")
            .unwrap()
            .local_addr()
            .unwrap()
            .port();
        let address = format!("127.0.0.1:{port}");
        let storage = lab.file("registry");
        let config = format!(
            "version: 0.1\nlog: {{level: info}}\nstorage: {{filesystem: {{rootdirectory: {}}}}}\nhttp: {{addr: '{address}'}}\n",
            storage.display()
        );
        let mut command = Command::new(find("docker-registry").unwrap());
        command.arg("serve").arg(lab.write("registry.yml", config));
        let process = Running::start(command);
        process.stderr.wait_for("listening on");
        Some(Self {
            address,
            storage,
            _process: process,
        })
    }

    fn push(&self, name: &str) -> String {
        let reference = format!("{}/{name}", self.address);
        let from = format!("oci:{}:latest", base().unwrap().layout.display());
        must(
            "skopeo",
            &[
                "--insecure-policy",
                "copy",
                "-q",
                "--dest-tls-verify=false",
                &from,
                &format!("docker://{reference}"),
            ],
        );
        reference
    }

    /// Files of the blobs, largest first.
    fn blobs(&self) -> Vec<PathBuf> {
        let mut files = tree(&self.storage.join("docker/registry/v2/blobs"));
        files.sort_by_key(|(_, size)| std::cmp::Reverse(*size));
        files.into_iter().map(|(path, _)| path).collect()
    }
}

#[test]
fn an_image_is_pulled_and_run() {
    let Some(lab) = Lab::without_images() else {
        return;
    };
    let Some(registry) = Registry::start(&lab) else {
        return;
    };
    let image = registry.push("team/app:1");
    // On loopback TLS is not asked for, as in Docker.
    let first = lab.fcvm(&["run", "--rm", "--network", "none", &image, "echo", "first"]);
    assert_eq!(
        (first.code, first.text().as_str()),
        (0, "first\n"),
        "{first:?}"
    );
    let run = |options: &[&str], command: &[&str]| {
        lab.fcvm(
            &[
                &["run", "--rm", "--network", "none", "--tls-verify=false"],
                options,
                &[image.as_str()],
                command,
            ]
            .concat(),
        )
    };
    let output = run(&[], &["cat", "/data/hello"]);
    assert_eq!(
        (output.code, output.text().as_str()),
        (0, "hello\n"),
        "{output:?}"
    );
    let listed = lab.ok(&["image", "ls"]);
    assert!(listed.contains("team/app"), "{listed}");

    // By digest, and with every policy.
    let pulled = lab.ok(&["image", "pull", "-q", "--tls-verify=false", &image]);
    assert!(!pulled.trim().is_empty());
    let inspected = lab.json(&["image", "inspect", &image]).to_string();
    let at = inspected.find("sha256:").unwrap();
    assert!(inspected[at..].len() > 71);
    assert_eq!(
        run(&["--pull", "always"], &["echo", "asked"]).text(),
        "asked\n"
    );
    drop(registry);
    // The registry is gone: what is here still runs, what has to be asked for does not.
    assert_eq!(
        run(&["--pull", "missing"], &["echo", "kept"]).text(),
        "kept\n"
    );
    crate::lab::one_error(
        run(&["--pull", "always"], &["true"]),
        125,
        "a pull without a registry",
    );
    lab.finish();
}

#[test]
fn what_the_registry_sends_is_verified() {
    let Some(lab) = Lab::without_images() else {
        return;
    };
    let Some(registry) = Registry::start(&lab) else {
        return;
    };
    let image = registry.push("app:1");
    let pull = ["image", "pull", "-q", "--tls-verify=false", image.as_str()];
    let line = lab.fails(
        125,
        &[
            "image",
            "pull",
            "-q",
            "--tls-verify=false",
            &format!("{}/nosuch:1", registry.address),
        ],
    );
    assert!(line.contains("nosuch"), "{line}");
    let line = lab.fails(
        125,
        &[
            "image",
            "pull",
            "-q",
            "--tls-verify=false",
            &format!("{}/app:2", registry.address),
        ],
    );
    assert!(line.contains("app") && line.contains('2'), "{line}");

    // The layer's bytes are others than its digest says.
    let layer = &registry.blobs()[0];
    let good = fs::read(layer).unwrap();
    let mut changed = good.clone();
    let middle = changed.len() / 2;
    changed[middle] ^= 0xff;
    fs::write(layer, &changed).unwrap();
    let line = lab.fails(125, &pull);
    assert!(line.contains("digest") || line.contains("sha256"), "{line}");
    assert_eq!(lab.ok(&["image", "ls", "-q"]), "");
    fs::write(layer, &good).unwrap();
    lab.ok(&pull);
    assert_eq!(
        lab.first_run(&["run", "--rm", "--network", "none", &image, "echo", "whole"]),
        "whole\n"
    );
    lab.finish();
}
