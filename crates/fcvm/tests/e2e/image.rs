//! OCI images made by hand: what the tests run, and what no honest tool makes.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use sha2::{Digest, Sha256};

/// A layer in the making: an uncompressed tar archive.
pub(crate) struct Layer(tar::Builder<Vec<u8>>);

impl Layer {
    pub(crate) fn new() -> Self {
        Self(tar::Builder::new(Vec::new()))
    }

    fn header(kind: tar::EntryType, mode: u32, size: usize) -> tar::Header {
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(kind);
        header.set_mode(mode);
        header.set_size(size as u64);
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(1_700_000_000);
        header
    }

    pub(crate) fn directory(mut self, path: &str, mode: u32) -> Self {
        let mut header = Self::header(tar::EntryType::Directory, mode, 0);
        self.0
            .append_data(&mut header, path, std::io::empty())
            .unwrap();
        self
    }

    pub(crate) fn file(mut self, path: &str, mode: u32, content: &[u8]) -> Self {
        let mut header = Self::header(tar::EntryType::Regular, mode, content.len());
        self.0.append_data(&mut header, path, content).unwrap();
        self
    }

    pub(crate) fn owned(mut self, path: &str, mode: u32, id: u64, content: &[u8]) -> Self {
        let mut header = Self::header(tar::EntryType::Regular, mode, content.len());
        header.set_uid(id);
        header.set_gid(id);
        self.0.append_data(&mut header, path, content).unwrap();
        self
    }

    pub(crate) fn link(mut self, path: &str, target: &str) -> Self {
        let mut header = Self::header(tar::EntryType::Symlink, 0o777, 0);
        self.0.append_link(&mut header, path, target).unwrap();
        self
    }

    /// A member whose name is written as it is, however wrong.
    pub(crate) fn raw(mut self, name: &str, content: &[u8]) -> Self {
        let mut header = Self::header(tar::EntryType::Regular, 0o644, content.len());
        header.as_old_mut().name[..name.len()].copy_from_slice(name.as_bytes());
        header.set_cksum();
        self.0.append(&header, content).unwrap();
        self
    }

    pub(crate) fn finish(self) -> Vec<u8> {
        self.0.into_inner().unwrap()
    }
}

/// An image in the making.
pub(crate) struct Image {
    pub(crate) layers: Vec<Vec<u8>>,
    pub(crate) architecture: &'static str,
    /// The `config` of the image's configuration.
    pub(crate) config: Value,
    /// What the configuration calls the layers, where that is a lie.
    pub(crate) diff_ids: Option<Vec<String>>,
}

/// The image specification's name of this machine.
pub(crate) const ARCHITECTURE: &str = if cfg!(target_arch = "aarch64") {
    "arm64"
} else {
    "amd64"
};
pub(crate) const OTHER_ARCHITECTURE: &str = if cfg!(target_arch = "aarch64") {
    "amd64"
} else {
    "arm64"
};

pub(crate) fn digest(bytes: &[u8]) -> String {
    let hash: String = Sha256::digest(bytes)
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    format!("sha256:{hash}")
}

impl Image {
    pub(crate) fn of(layers: Vec<Vec<u8>>) -> Self {
        Self {
            layers,
            architecture: ARCHITECTURE,
            config: json!({"Cmd": ["sh"]}),
            diff_ids: None,
        }
    }

    /// Writes an OCI layout that holds this image under `tag`; gives the manifest's digest.
    pub(crate) fn write(&self, directory: &Path, tag: &str) -> String {
        let blobs = directory.join("blobs/sha256");
        fs::create_dir_all(&blobs).unwrap();
        let put = |bytes: &[u8], media_type: &str| {
            let digest = digest(bytes);
            fs::write(blob(directory, &digest), bytes).unwrap();
            json!({"mediaType": media_type, "digest": digest, "size": bytes.len()})
        };
        let layers: Vec<Value> = self
            .layers
            .iter()
            .map(|layer| put(layer, "application/vnd.oci.image.layer.v1.tar"))
            .collect();
        let diff_ids = self
            .diff_ids
            .clone()
            .unwrap_or_else(|| self.layers.iter().map(|layer| digest(layer)).collect());
        let config = json!({
            "architecture": self.architecture,
            "os": "linux",
            "config": self.config,
            "rootfs": {"type": "layers", "diff_ids": diff_ids},
        });
        let config = put(
            &serde_json::to_vec(&config).unwrap(),
            "application/vnd.oci.image.config.v1+json",
        );
        let manifest_type = "application/vnd.oci.image.manifest.v1+json";
        let manifest = json!({"schemaVersion": 2, "mediaType": manifest_type, "config": config, "layers": layers});
        let mut manifest = put(&serde_json::to_vec(&manifest).unwrap(), manifest_type);
        manifest["annotations"] = json!({"org.opencontainers.image.ref.name": tag});
        manifest["platform"] = json!({"architecture": self.architecture, "os": "linux"});
        let index = json!({"schemaVersion": 2, "manifests": [manifest]});
        fs::write(directory.join("index.json"), index.to_string()).unwrap();
        fs::write(
            directory.join("oci-layout"),
            r#"{"imageLayoutVersion":"1.0.0"}"#,
        )
        .unwrap();
        manifest["digest"].as_str().unwrap().to_owned()
    }
}

/// File of a blob in a layout.
pub(crate) fn blob(directory: &Path, digest: &str) -> PathBuf {
    directory.join("blobs").join(digest.replace(':', "/"))
}

/// The layer of the suite's image: busybox, users, and files that tests look at.
pub(crate) fn busybox_layer(busybox: &Path, tool: &Path) -> Vec<u8> {
    let list = super::process::must(busybox.to_str().unwrap(), &["--list"]);
    let mut layer = Layer::new();
    for directory in [
        "bin", "etc", "home", "home/app", "data", "root", "var", "var/www",
    ] {
        layer = layer.directory(directory, 0o755);
    }
    layer = layer
        .directory("tmp", 0o1777)
        .file("bin/busybox", 0o755, &fs::read(busybox).unwrap())
        .file("bin/tool", 0o755, &fs::read(tool).unwrap());
    for applet in list.text().lines().filter(|applet| *applet != "busybox") {
        layer = layer.link(&format!("bin/{applet}"), "busybox");
    }
    layer
        .file(
            "etc/passwd",
            0o644,
            b"root:x:0:0:root:/root:/bin/sh\napp:x:1000:1000::/home/app:/bin/sh\n",
        )
        .file(
            "etc/group",
            0o644,
            b"root:x:0:\napp:x:1000:\naudio:x:29:app\n",
        )
        .file("data/hello", 0o644, b"hello\n")
        .file("data/text", 0o644, b"no program\n")
        .file("data/script", 0o755, b"#!/no/such/interpreter\n")
        .owned("data/far", 0o640, 100_000, b"far\n")
        .link("data/link", "hello")
        .link("data/out", "/etc")
        .file("var/www/index.html", 0o644, b"served by the guest\n")
        .finish()
}

/// The first of the paths that is a static busybox.
pub(crate) fn find_busybox() -> Option<PathBuf> {
    ["/bin/busybox", "/usr/bin/busybox"]
        .into_iter()
        .map(PathBuf::from)
        .find(|path| {
            path.metadata()
                .is_ok_and(|data| data.permissions().mode() & 0o111 != 0)
        })
}
