//! Makes the documents of an image that has none yet: one uncompressed layer and a configuration.

use std::collections::HashMap;

use oci_spec::image::{
    Arch, ConfigBuilder, DescriptorBuilder, HistoryBuilder, ImageConfigurationBuilder,
    ImageManifestBuilder, MediaType, Os, RootFsBuilder, Sha256Digest,
};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use crate::digest::Digest;
use crate::format::Platform;
use crate::reference::Reference;
use crate::store::{Image, Ingest, StoreError};

const PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// What is to be said of a new image.
pub(crate) struct Description<'d> {
    /// The uncompressed layer, which is in the store, and its size.
    pub(crate) layer: (Digest, u64),
    /// Platform the files are made for.
    pub(crate) platform: &'d Platform,
    /// Command to run where none is given.
    pub(crate) command: &'d str,
    /// How the layer came to be, for the history.
    pub(crate) created_by: String,
    /// Labels to give.
    pub(crate) labels: HashMap<String, String>,
    /// Names to give.
    pub(crate) names: &'d [Reference],
}

/// Writes configuration and manifest and enters the image.
pub(crate) fn finish(ingest: Ingest, image: Description<'_>) -> Result<Image, StoreError> {
    let (layer, layer_bytes) = image.layer;
    let created = OffsetDateTime::now_utc()
        .replace_nanosecond(0)
        .expect("0 is a nanosecond");
    let created = created
        .format(&Rfc3339)
        .expect("the clock shows a year of four digits");
    let history = HistoryBuilder::default()
        .created(created.as_str())
        .created_by(image.created_by)
        .build()
        .expect("no field is required");
    let rootfs = RootFsBuilder::default()
        .typ("layers")
        .diff_ids([layer.to_string()])
        .build()
        .expect("all required fields are set");
    let run = ConfigBuilder::default()
        .env([PATH.to_owned()])
        .cmd([image.command.to_owned()])
        .labels(image.labels)
        .build()
        .expect("no field is required");
    let config = ImageConfigurationBuilder::default()
        .created(created.as_str())
        .architecture(Arch::from(image.platform.architecture.as_str()))
        .os(Os::Linux)
        .config(run)
        .rootfs(rootfs)
        .history([history])
        .build()
        .expect("all required fields are set");
    let config = serde_json::to_vec(&config).expect("an image configuration is valid JSON");
    let config_digest = ingest.put(&config)?;
    let manifest = manifest(
        (config_digest, config.len() as u64),
        &[(layer, layer_bytes)],
    );
    ingest.finish(&manifest, image.names)
}

/// The manifest of an image whose layers are uncompressed: digests and sizes in bytes.
pub(crate) fn manifest(config: (Digest, u64), layers: &[(Digest, u64)]) -> Vec<u8> {
    let descriptor = |media_type, (digest, size_bytes): (Digest, u64)| {
        let digest: Sha256Digest = digest
            .hex()
            .parse()
            .expect("a digest has 64 hexadecimal digits");
        DescriptorBuilder::default()
            .media_type(media_type)
            .digest(digest)
            .size(size_bytes)
            .build()
            .expect("all required fields are set")
    };
    let layers: Vec<_> = layers
        .iter()
        .map(|layer| descriptor(MediaType::ImageLayer, *layer))
        .collect();
    let manifest = ImageManifestBuilder::default()
        .schema_version(2_u32)
        .media_type(MediaType::ImageManifest)
        .config(descriptor(MediaType::ImageConfig, config))
        .layers(layers)
        .build()
        .expect("all required fields are set");
    serde_json::to_vec(&manifest).expect("a manifest is valid JSON")
}
