//! The JSON documents of an image, read with limits: manifest, index and configuration.
//!
//! Their types are `oci-spec`'s. What is checked here is what fcvm relies on later: digests it can
//! verify, sizes within bounds, layer types it can read, and one diff id for each layer. All bytes
//! come from registries and archives and are trusted in nothing.

use oci_spec::image::{
    Arch, Descriptor, ImageConfiguration, ImageIndex, ImageManifest, MediaType, Os,
};
use serde::Deserialize;

use crate::digest::Digest;
use crate::progress::one_line;

/// Size limit of a manifest or an index: what registries accept.
pub const MANIFEST_MAX_BYTES: u64 = 4 << 20;
/// Size limit of an image configuration.
pub const CONFIG_MAX_BYTES: u64 = 8 << 20;
/// Size limit of one layer as it is stored.
pub const LAYER_MAX_BYTES: u64 = 128 << 30;
/// Number limit of an image's layers: Docker stops at 127, overlay file systems at 500.
pub const LAYERS_MAX_COUNT: usize = 512;
/// Number limit of the entries of an index.
const INDEX_MAX_COUNT: usize = 4096;

pub(crate) const DOCKER_MANIFEST: &str = "application/vnd.docker.distribution.manifest.v2+json";
pub(crate) const DOCKER_INDEX: &str = "application/vnd.docker.distribution.manifest.list.v2+json";
const DOCKER_CONFIG: &str = "application/vnd.docker.container.image.v1+json";
const DOCKER_LAYER: &str = "application/vnd.docker.image.rootfs.diff.tar";
const DOCKER_LAYER_GZIP: &str = "application/vnd.docker.image.rootfs.diff.tar.gzip";
const DOCKER_LAYER_ZSTD: &str = "application/vnd.docker.image.rootfs.diff.tar.zstd";

/// A document of an image that cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum FormatError {
    /// The bytes are not such a document.
    #[error("the {document} cannot be read: {reason}")]
    Malformed {
        /// `image manifest`, `image index` or `image configuration`.
        document: &'static str,
        /// The parser's words.
        reason: String,
    },
    /// The document is larger than fcvm reads.
    #[error("the {document} has {size_bytes} bytes and the limit is {limit_bytes}")]
    TooLarge {
        /// Which document.
        document: &'static str,
        /// Its size.
        size_bytes: u64,
        /// The limit.
        limit_bytes: u64,
    },
    /// A manifest of Docker's first schema.
    #[error("it is an image of the old Docker schema 1; push it again with a current tool")]
    SchemaOne,
    /// Something else that registries keep: a chart, a signature, a model.
    #[error("it is no container image but an artifact of type '{0}'")]
    Artifact(String),
    /// A layer of a type that cannot be read.
    #[error("layer {number} has the unsupported type '{media_type}'")]
    LayerType {
        /// Position, 1 is the bottom layer.
        number: usize,
        /// Its media type.
        media_type: String,
    },
    /// Layers of the manifest and diff ids of the configuration differ in number.
    #[error("the manifest has {layers} layers and the configuration {diff_ids}")]
    LayerCount {
        /// Layers of the manifest.
        layers: usize,
        /// Diff ids of the configuration.
        diff_ids: usize,
    },
}

fn malformed(document: &'static str, reason: impl ToString) -> FormatError {
    FormatError::Malformed {
        document,
        reason: one_line(&reason.to_string(), 200),
    }
}

fn read<'a, T: Deserialize<'a>>(
    document: &'static str,
    bytes: &'a [u8],
    limit_bytes: u64,
) -> Result<T, FormatError> {
    let size_bytes = bytes.len() as u64;
    if size_bytes > limit_bytes {
        return Err(FormatError::TooLarge {
            document,
            size_bytes,
            limit_bytes,
        });
    }
    serde_json::from_slice(bytes).map_err(|error| malformed(document, error))
}

/// A document as a registry or a layout gives it: one image, or an index of several.
#[derive(Debug, Clone, PartialEq)]
pub enum Document {
    /// One image.
    Manifest(Box<ImageManifest>),
    /// Images for several platforms.
    Index(Box<ImageIndex>),
}

/// Reads a manifest or an index and finds out which of them it is.
pub fn parse_document(bytes: &[u8]) -> Result<Document, FormatError> {
    #[derive(Deserialize)]
    #[serde(rename_all = "camelCase")]
    struct Kind {
        schema_version: Option<u32>,
        media_type: Option<String>,
        manifests: Option<serde::de::IgnoredAny>,
    }
    let kind: Kind = read("image manifest", bytes, MANIFEST_MAX_BYTES)?;
    if kind.schema_version == Some(1) {
        return Err(FormatError::SchemaOne);
    }
    let is_index = match kind.media_type.as_deref() {
        Some(DOCKER_INDEX) => true,
        Some(DOCKER_MANIFEST) => false,
        Some(other) if MediaType::from(other) == MediaType::ImageIndex => true,
        Some(other) if MediaType::from(other) == MediaType::ImageManifest => false,
        Some(other) => return Err(FormatError::Artifact(one_line(other, 100))),
        None => kind.manifests.is_some(),
    };
    if is_index {
        parse_index(bytes).map(|index| Document::Index(Box::new(index)))
    } else {
        parse_manifest(bytes).map(|manifest| Document::Manifest(Box::new(manifest)))
    }
}

/// Reads an index.
pub fn parse_index(bytes: &[u8]) -> Result<ImageIndex, FormatError> {
    let index: ImageIndex = read("image index", bytes, MANIFEST_MAX_BYTES)?;
    if index.manifests().len() > INDEX_MAX_COUNT {
        return Err(malformed("image index", "it has too many entries"));
    }
    Ok(index)
}

/// Reads the manifest of one image.
pub fn parse_manifest(bytes: &[u8]) -> Result<ImageManifest, FormatError> {
    let manifest: ImageManifest = read("image manifest", bytes, MANIFEST_MAX_BYTES)?;
    let document = "image manifest";
    match manifest.config().media_type() {
        MediaType::ImageConfig => {}
        MediaType::Other(other) if other == DOCKER_CONFIG => {}
        other => return Err(FormatError::Artifact(one_line(other.as_ref(), 100))),
    }
    check_descriptor(document, manifest.config(), CONFIG_MAX_BYTES)?;
    if manifest.layers().len() > LAYERS_MAX_COUNT {
        return Err(malformed(
            document,
            format!("it has more than {LAYERS_MAX_COUNT} layers"),
        ));
    }
    for (index, layer) in manifest.layers().iter().enumerate() {
        if !is_layer(layer.media_type()) {
            let media_type = one_line(layer.media_type().as_ref(), 100);
            return Err(FormatError::LayerType {
                number: index + 1,
                media_type,
            });
        }
        check_descriptor(document, layer, LAYER_MAX_BYTES)?;
    }
    Ok(manifest)
}

fn is_layer(media_type: &MediaType) -> bool {
    match media_type {
        MediaType::ImageLayer | MediaType::ImageLayerGzip | MediaType::ImageLayerZstd => true,
        // Only where the layer may be passed on differs; registries that keep it serve it as any.
        MediaType::ImageLayerNonDistributable
        | MediaType::ImageLayerNonDistributableGzip
        | MediaType::ImageLayerNonDistributableZstd => true,
        MediaType::Other(other) => {
            [DOCKER_LAYER, DOCKER_LAYER_GZIP, DOCKER_LAYER_ZSTD].contains(&other.as_str())
        }
        _ => false,
    }
}

fn check_descriptor(
    document: &'static str,
    descriptor: &Descriptor,
    limit_bytes: u64,
) -> Result<(), FormatError> {
    descriptor_digest(document, descriptor)?;
    if descriptor.size() > limit_bytes {
        let reason = format!("{} is larger than {limit_bytes} bytes", descriptor.digest());
        return Err(malformed(document, reason));
    }
    Ok(())
}

/// The digest of a descriptor, where it is one that can be checked.
pub(crate) fn descriptor_digest(
    document: &'static str,
    descriptor: &Descriptor,
) -> Result<Digest, FormatError> {
    descriptor
        .digest()
        .as_ref()
        .parse()
        .map_err(|error| malformed(document, error))
}

/// Reads an image configuration.
pub fn parse_config(bytes: &[u8]) -> Result<ImageConfiguration, FormatError> {
    let config: ImageConfiguration = read("image configuration", bytes, CONFIG_MAX_BYTES)?;
    diff_ids(&config)?;
    Ok(config)
}

/// The digests of the uncompressed layers, the bottom one first.
pub fn diff_ids(config: &ImageConfiguration) -> Result<Vec<Digest>, FormatError> {
    let texts = config.rootfs().diff_ids();
    if texts.len() > LAYERS_MAX_COUNT {
        let reason = format!("it has more than {LAYERS_MAX_COUNT} layers");
        return Err(malformed("image configuration", reason));
    }
    let digests = texts.iter().map(|text| text.parse::<Digest>());
    digests
        .collect::<Result<_, _>>()
        .map_err(|error| malformed("image configuration", error))
}

/// Checks that manifest and configuration speak of the same layers.
pub(crate) fn check_layers(
    manifest: &ImageManifest,
    config: &ImageConfiguration,
) -> Result<(), FormatError> {
    let (layers, diff_ids) = (manifest.layers().len(), config.rootfs().diff_ids().len());
    if layers == diff_ids {
        Ok(())
    } else {
        Err(FormatError::LayerCount { layers, diff_ids })
    }
}

/// What an image must be made for to run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Platform {
    /// Architecture in OCI's spelling: `amd64`, `arm64`.
    pub architecture: String,
    /// Variant of it, where one is asked for: `v8`.
    pub variant: Option<String>,
}

/// An image that is made for another machine.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PlatformError {
    /// The index has nothing for this platform.
    #[error("there is no image for {wanted}; it exists for {available}")]
    NotInIndex {
        /// The platform asked for.
        wanted: String,
        /// What there is, separated by commas.
        available: String,
    },
    /// The image is made for another platform.
    #[error("the image is made for {actual} and this machine needs {wanted}")]
    Mismatch {
        /// The platform asked for.
        wanted: String,
        /// The image's.
        actual: String,
    },
}

impl Platform {
    /// The platform of this machine, in OCI's spelling.
    pub fn host() -> Self {
        let architecture = match std::env::consts::ARCH {
            "x86_64" => "amd64",
            "x86" => "386",
            "aarch64" => "arm64",
            "powerpc64" => "ppc64le",
            other => other,
        };
        Self {
            architecture: architecture.to_owned(),
            variant: None,
        }
    }

    /// Chooses the entry of an index to run: the first Linux image of this architecture, one of the
    /// asked variant before one without a variant. Where no variant is asked for, one without a
    /// variant comes before the others.
    pub fn select<'i>(&self, index: &'i ImageIndex) -> Result<&'i Descriptor, PlatformError> {
        let rank = |descriptor: &Descriptor| {
            let platform = descriptor.platform().as_ref()?;
            if *platform.os() != Os::Linux
                || platform.architecture().to_string() != self.architecture
            {
                return None;
            }
            match (self.variant.as_deref(), platform.variant().as_deref()) {
                (None, None) => Some(0),
                (Some(wanted), Some(found)) if wanted == found => Some(0),
                // Every arm64 processor is a v8.
                (None, Some("v8")) | (Some("v8"), None) => Some(1),
                (None, Some(_)) => Some(3),
                (Some(_), None) => Some(2),
                (Some(_), Some(_)) => None,
            }
        };
        let ranked = index
            .manifests()
            .iter()
            .filter_map(|entry| Some((rank(entry)?, entry)));
        if let Some((_, entry)) = ranked.min_by_key(|(rank, _)| *rank) {
            return Ok(entry);
        }
        let platforms = index
            .manifests()
            .iter()
            .filter_map(|entry| entry.platform().as_ref())
            // Attestations are listed beside images, for a platform "unknown".
            .filter(|platform| platform.os().to_string() != "unknown")
            .map(|platform| {
                let variant = platform.variant().as_ref();
                shown(&platform.os().to_string(), platform.architecture(), variant)
            });
        let mut available: Vec<String> = Vec::new();
        for platform in platforms {
            if !available.contains(&platform) {
                available.push(platform);
            }
        }
        let available = if available.is_empty() {
            "no platform".into()
        } else {
            available.join(", ")
        };
        Err(PlatformError::NotInIndex {
            wanted: self.to_string(),
            available: one_line(&available, 300),
        })
    }

    /// Checks that an image runs here.
    pub fn check(&self, config: &ImageConfiguration) -> Result<(), PlatformError> {
        let architecture = config.architecture().to_string();
        if *config.os() == Os::Linux && architecture == self.architecture {
            return Ok(());
        }
        let actual = shown(&config.os().to_string(), config.architecture(), None);
        Err(PlatformError::Mismatch {
            wanted: self.to_string(),
            actual: one_line(&actual, 100),
        })
    }
}

fn shown(os: &str, architecture: &Arch, variant: Option<&String>) -> String {
    match variant {
        Some(variant) => format!("{os}/{architecture}/{variant}"),
        None => format!("{os}/{architecture}"),
    }
}

impl std::fmt::Display for Platform {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "linux/{}", self.architecture)?;
        match &self.variant {
            Some(variant) => write!(f, "/{variant}"),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn index(platforms: &[(&str, &str, Option<&str>)]) -> ImageIndex {
        let entries = platforms
            .iter()
            .enumerate()
            .map(|(number, (os, architecture, variant))| {
                let mut platform = serde_json::json!({"os": os, "architecture": architecture});
                if let Some(variant) = variant {
                    platform["variant"] = (*variant).into();
                }
                serde_json::json!({
                    "mediaType": "application/vnd.oci.image.manifest.v1+json",
                    "digest": format!("sha256:{number:064x}"),
                    "size": 1,
                    "platform": platform,
                })
            });
        let entries: Vec<_> = entries.collect();
        let index = serde_json::json!({"schemaVersion": 2, "manifests": entries});
        parse_index(index.to_string().as_bytes()).unwrap()
    }

    fn platform(architecture: &str, variant: Option<&str>) -> Platform {
        let (architecture, variant) = (architecture.into(), variant.map(str::to_owned));
        Platform {
            architecture,
            variant,
        }
    }

    #[test]
    fn the_best_entry_of_an_index_is_chosen() {
        let index = index(&[
            ("windows", "amd64", None),
            ("unknown", "unknown", None),
            ("linux", "amd64", Some("v3")),
            ("linux", "amd64", None),
            ("linux", "arm", Some("v6")),
            ("linux", "arm", Some("v7")),
            ("linux", "arm64", Some("v8")),
            ("linux", "amd64", None),
        ]);
        for (architecture, variant, chosen) in [
            ("amd64", None, Some(3)),
            ("amd64", Some("v3"), Some(2)),
            ("amd64", Some("v2"), Some(3)),
            ("arm", Some("v7"), Some(5)),
            ("arm", None, Some(4)),
            ("arm", Some("v5"), None),
            ("arm64", None, Some(6)),
            ("arm64", Some("v8"), Some(6)),
            ("riscv64", None, None),
        ] {
            let found = platform(architecture, variant).select(&index).ok();
            let found = found.map(|entry| entry.digest().digest().trim_start_matches('0'));
            let chosen = chosen.map(|number| format!("{number:x}"));
            assert_eq!(found, chosen.as_deref(), "{architecture} {variant:?}");
        }
        let error = platform("riscv64", None)
            .select(&index)
            .unwrap_err()
            .to_string();
        assert_eq!(
            error,
            "there is no image for linux/riscv64; it exists for windows/amd64, linux/amd64/v3, \
             linux/amd64, linux/arm/v6, linux/arm/v7, linux/arm64/v8"
        );
    }

    fn manifest(change: impl Fn(&mut serde_json::Value)) -> Result<Document, FormatError> {
        let digest = format!("sha256:{}", "a".repeat(64));
        let mut manifest = serde_json::json!({
            "schemaVersion": 2,
            "config": {
                "mediaType": "application/vnd.oci.image.config.v1+json",
                "digest": digest,
                "size": 2,
            },
            "layers": [{
                "mediaType": "application/vnd.oci.image.layer.v1.tar+gzip",
                "digest": digest,
                "size": 3,
            }],
        });
        change(&mut manifest);
        parse_document(manifest.to_string().as_bytes())
    }

    #[test]
    fn manifests_of_both_families_are_read() {
        assert!(matches!(manifest(|_| ()), Ok(Document::Manifest(_))));
        let docker = manifest(|manifest| {
            manifest["mediaType"] = DOCKER_MANIFEST.into();
            manifest["config"]["mediaType"] = DOCKER_CONFIG.into();
            manifest["layers"][0]["mediaType"] = DOCKER_LAYER_GZIP.into();
        });
        assert!(matches!(docker, Ok(Document::Manifest(_))));
    }

    #[test]
    fn what_cannot_be_an_image_is_refused() {
        type Change = fn(&mut serde_json::Value);
        let cases: [(&str, Change); 9] = [
            ("schema 1", |m| m["schemaVersion"] = 1.into()),
            ("artifact of type 'application/x'", |m| {
                m["mediaType"] = "application/x".into()
            }),
            ("artifact of type 'a b'", |m| {
                m["config"]["mediaType"] = "a\nb".into()
            }),
            ("layer 1 has the unsupported type", |m| {
                m["layers"][0]["mediaType"] = "x".into()
            }),
            ("is larger than", |m| {
                m["layers"][0]["size"] = u64::MAX.into()
            }),
            ("is larger than", |m| {
                m["config"]["size"] = (1_u64 << 40).into()
            }),
            ("cannot be read", |m| {
                m["layers"][0]["digest"] = "sha256:../../etc".into()
            }),
            ("is not a digest", |m| {
                m["layers"][0]["digest"] = format!("sha512:{}", "a".repeat(128)).into();
            }),
            ("more than 512 layers", |m| {
                m["layers"] = vec![m["layers"][0].clone(); 513].into();
            }),
        ];
        for (expected, change) in cases {
            let error = manifest(change).unwrap_err().to_string();
            assert!(
                error.contains(expected) && !error.contains('\n'),
                "{expected}: {error}"
            );
        }
        let large = vec![b' '; MANIFEST_MAX_BYTES as usize + 1];
        assert!(matches!(
            parse_document(&large),
            Err(FormatError::TooLarge { .. })
        ));
        // serde_json's own limit keeps such a document from the stack's end.
        let deep = [b"[".repeat(100_000), b"]".repeat(100_000)].concat();
        assert!(parse_document(&deep).is_err() && parse_config(&deep).is_err());
    }

    proptest::proptest! {
        #[test]
        fn no_bytes_make_a_parser_panic(bytes: Vec<u8>, at in 0..400_usize, byte: u8) {
            let _ = parse_document(&bytes);
            let _ = parse_config(&bytes);
            let mut config = br#"{"architecture":"amd64","os":"linux","config":{"Env":["A=b"],
                "ExposedPorts":{"80/tcp":{}},"Volumes":{"/x":{}},"Labels":{"a":"b"}},"rootfs":
                {"type":"layers","diff_ids":["sha256:aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa"]}}"#
                .to_vec();
            proptest::prop_assert!(parse_config(&config).is_ok());
            let length = config.len();
            config[at % length] = byte;
            let _ = parse_config(&config);
        }
    }
}
