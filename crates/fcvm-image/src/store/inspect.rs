//! What `image inspect` shows of an image, with Podman's field names.

use std::collections::{BTreeMap, HashMap};

use oci_spec::image::{Config, History, MediaType};
use serde::Serialize;

use super::Image;
use crate::digest::Digest;

/// An image as `podman image inspect` shows it. The names and the JSON form of the fields stay.
#[derive(Debug, Serialize)]
#[serde(rename_all = "PascalCase")]
pub struct Inspection<'i> {
    /// 64 hexadecimal digits.
    id: String,
    /// Digest of the manifest.
    digest: Digest,
    /// Names with a tag.
    repo_tags: Vec<String>,
    /// Names with the manifest's digest in place of the tag.
    repo_digests: Vec<String>,
    /// When it was made, RFC 3339.
    created: Option<&'i str>,
    /// What to run, as the image specification has it.
    config: Option<&'i Config>,
    author: &'i str,
    architecture: String,
    os: String,
    /// Bytes in the store.
    size: u64,
    #[serde(rename = "RootFS")]
    rootfs: RootFs<'i>,
    labels: BTreeMap<&'i str, &'i str>,
    annotations: BTreeMap<&'i str, &'i str>,
    manifest_type: String,
    user: &'i str,
    history: &'i [History],
    /// Layers as they are stored, which Podman does not show.
    layers: Vec<StoredLayer<'i>>,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "PascalCase")]
struct RootFs<'i> {
    #[serde(rename = "Type")]
    kind: &'i str,
    layers: &'i [String],
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "PascalCase")]
struct StoredLayer<'i> {
    digest: Digest,
    diff_id: Digest,
    media_type: &'i str,
    size: u64,
}

impl Image {
    /// What `image inspect` shows.
    pub fn inspect(&self) -> Inspection<'_> {
        let run = self.config.config().as_ref();
        let mut repo_digests: Vec<String> = self
            .names
            .iter()
            .map(|name| format!("{}@{}", name.name(), self.manifest_digest))
            .collect();
        repo_digests.sort_unstable();
        repo_digests.dedup();
        Inspection {
            id: self.id.hex(),
            digest: self.manifest_digest,
            repo_tags: self
                .names
                .iter()
                .filter(|name| name.tag().is_some())
                .map(|name| name.to_string())
                .collect(),
            repo_digests,
            created: self.config.created().as_deref(),
            config: run,
            author: self.config.author().as_deref().unwrap_or_default(),
            architecture: self.config.architecture().to_string(),
            os: self.config.os().to_string(),
            size: self.size_bytes,
            rootfs: RootFs {
                kind: self.config.rootfs().typ(),
                layers: self.config.rootfs().diff_ids(),
            },
            labels: sorted(run.and_then(|run| run.labels().as_ref())),
            annotations: sorted(self.manifest.annotations().as_ref()),
            manifest_type: self
                .manifest
                .media_type()
                .as_ref()
                .unwrap_or(&MediaType::ImageManifest)
                .to_string(),
            user: run
                .and_then(|run| run.user().as_deref())
                .unwrap_or_default(),
            history: self.config.history().as_deref().unwrap_or_default(),
            layers: self
                .layers
                .iter()
                .map(|layer| StoredLayer {
                    digest: layer.digest,
                    diff_id: layer.diff_id,
                    media_type: &layer.media_type,
                    size: layer.size_bytes,
                })
                .collect(),
        }
    }
}

fn sorted(map: Option<&HashMap<String, String>>) -> BTreeMap<&str, &str> {
    let pairs = map.into_iter().flatten();
    pairs
        .map(|(key, value)| (key.as_str(), value.as_str()))
        .collect()
}
