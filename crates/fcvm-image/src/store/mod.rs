//! The content store: images by digest in one directory, shared by all fcvm processes of a user.
//!
//! `docs/format/image-store.md` describes the files and what holds between them. In short: the
//! directory is an OCI image layout, a file of it never changes once it has its final name, and the
//! index, replaced as a whole, decides what exists. Crashes leave temporary files only, which
//! [`ImageStore::prune`] removes.

mod blob;
mod error;
mod health;
mod index;
mod prune;
mod root_image;

use std::collections::HashSet;
use std::fs::{self, DirBuilder, File};
use std::io::{self, Read};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use oci_spec::image::{Descriptor, ImageConfiguration, ImageManifest};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

pub(crate) use self::blob::{CopyError, Ingest, Partial};
pub use self::error::StoreError;
pub use self::health::HealthCheck;
use self::index::{Entry, Index};
pub(crate) use self::index::{NAME_ANNOTATION, layout_blob};
pub use self::prune::{Pruned, Usage};
use crate::digest::Digest;
use crate::format::{self, CONFIG_MAX_BYTES, MANIFEST_MAX_BYTES};
use crate::reference::{Reference, candidates};

const BLOBS: &str = "blobs/sha256";
const TEMPORARY: &str = "tmp";
const ROOT_IMAGES: &str = "rootfs";
/// Shared by those that add content, exclusive for the one that removes it.
const CONTENT_LOCK: &str = "content.lock";

const GET_AGAIN: &str = "remove the image with 'fcvm image rm --force' and get it again";

/// The images of one user on this machine. Cheap to clone.
#[derive(Debug, Clone)]
pub struct ImageStore {
    dir: PathBuf,
}

/// An image of the store.
#[derive(Debug, Clone)]
pub struct Image {
    /// Identifier: digest of the configuration, as Docker and Podman have it.
    pub id: Digest,
    /// Digest of the manifest.
    pub manifest_digest: Digest,
    /// Names, sorted; empty when another image took the last one over.
    pub names: Vec<Reference>,
    /// The manifest.
    pub manifest: ImageManifest,
    /// The configuration: what to run, and how.
    pub config: ImageConfiguration,
    /// The image's own health check.
    pub health_check: Option<HealthCheck>,
    /// Layers, the bottom one first.
    pub layers: Vec<Layer>,
    /// Size in the store: manifest, configuration and layers as they are compressed.
    pub size_bytes: u64,
}

/// A layer of an image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layer {
    /// Digest of the layer's file.
    pub digest: Digest,
    /// Digest of the layer when uncompressed.
    pub diff_id: Digest,
    /// Media type of the manifest, which tells the compression.
    pub media_type: String,
    /// Size of the layer's file.
    pub size_bytes: u64,
    /// The layer's file.
    pub path: PathBuf,
}

impl Image {
    /// When the image was made, where its configuration says so.
    pub fn created_at(&self) -> Option<OffsetDateTime> {
        let text = self.config.created().as_deref()?;
        OffsetDateTime::parse(text, &Rfc3339).ok()
    }

    /// The first name, else the short id: what messages call the image.
    pub fn display_name(&self) -> String {
        self.names
            .first()
            .map_or_else(|| self.id.short(), Reference::to_string)
    }
}

impl ImageStore {
    /// Opens the store in `dir` and makes it where there is none. An existing store may be on a
    /// read-only file system.
    pub fn open(dir: &Path) -> Result<Self, StoreError> {
        let store = Self {
            dir: dir.to_owned(),
        };
        for name in [BLOBS, TEMPORARY, ROOT_IMAGES] {
            let path = dir.join(name);
            if !path.is_dir() {
                let made = DirBuilder::new().recursive(true).mode(0o700).create(&path);
                made.map_err(StoreError::io("make the directory", &path))?;
            }
        }
        index::check_layout(dir)?;
        Ok(store)
    }

    /// The store's directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// All images, those with names first, in their order, and why each of the others cannot be
    /// read.
    pub fn list(&self) -> Result<(Vec<Image>, Vec<StoreError>), StoreError> {
        let index = Index::read(&self.dir)?;
        let mut images = Vec::new();
        let mut damaged = Vec::new();
        for digest in index.manifests() {
            match self.load(&index, digest) {
                Ok(image) => images.push(image),
                Err(error) => damaged.push(error),
            }
        }
        images.sort_by_key(|image| {
            let name = image.names.first().map(Reference::to_string);
            (name.is_none(), name, image.id)
        });
        Ok((images, damaged))
    }

    /// Finds the image that `text` means: a reference (a short one stands for `localhost/` first,
    /// then for Docker Hub), a manifest digest, an image id or the beginning of one.
    pub fn resolve(&self, text: &str) -> Result<Image, StoreError> {
        let index = Index::read(&self.dir)?;
        let digest = self.find(&index, text)?;
        self.load(&index, digest)
    }

    fn find(&self, index: &Index, text: &str) -> Result<Digest, StoreError> {
        let references = candidates(text);
        let named = references
            .iter()
            .find_map(|reference| index.named(reference));
        if let Some(digest) = named {
            return Ok(digest);
        }
        // `name@digest` means the image of this digest if it has such a name with any tag.
        for reference in &references {
            let same = |entry: &&Entry| {
                Some(entry.manifest) == reference.digest()
                    && entry
                        .name
                        .as_ref()
                        .is_some_and(|name| name.name() == reference.name())
            };
            if let Some(entry) = index.entries.iter().find(same) {
                return Ok(entry.manifest);
            }
        }
        let prefix = text.strip_prefix("sha256:").unwrap_or(text);
        let is_hex = prefix
            .bytes()
            .all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
        if !prefix.is_empty() && prefix.len() <= 64 && is_hex {
            let mut found = HashSet::new();
            for manifest in index.manifests() {
                let is_manifest = prefix.len() == 64 && manifest.hex() == prefix;
                // A damaged image has no id any more, and must not be in the way of others.
                let id = self.config_digest(manifest).map(|id| id.hex());
                if is_manifest || id.is_ok_and(|id| id.starts_with(prefix)) {
                    found.insert(manifest);
                }
            }
            match found.len() {
                0 => {}
                1 => return Ok(found.into_iter().next().expect("one was counted")),
                count => {
                    return Err(StoreError::Ambiguous {
                        text: text.to_owned(),
                        count,
                    });
                }
            }
        } else if references.is_empty() {
            text.parse::<Reference>()?;
        }
        Err(StoreError::NotFound(crate::progress::one_line(text, 200)))
    }

    /// The image with this manifest, whatever its names.
    pub fn get(&self, manifest_digest: Digest) -> Result<Image, StoreError> {
        let index = Index::read(&self.dir)?;
        if !index.manifests().contains(&manifest_digest) {
            return Err(StoreError::NotFound(manifest_digest.to_string()));
        }
        self.load(&index, manifest_digest)
    }

    /// Gives the image another name, which is taken from the image that has it now.
    pub fn tag(&self, image: &Image, name: &Reference) -> Result<(), StoreError> {
        index::update(&self.dir, |index| {
            if !index.manifests().contains(&image.manifest_digest) {
                return Err(StoreError::NotFound(image.display_name()));
            }
            index.set_name(name, image.manifest_digest);
            Ok(())
        })
    }

    /// Takes a name from its image. The image stays, nameless perhaps.
    pub fn untag(&self, name: &Reference) -> Result<(), StoreError> {
        index::update(&self.dir, |index| match index.take_name(name) {
            Some(_) => Ok(()),
            None => Err(StoreError::NotFound(name.to_string())),
        })
    }

    /// Removes what `text` means and frees what nothing else refers to. A name is taken away; the
    /// image goes with its last one. An id removes the image, and where `several_names` are allowed
    /// all of them.
    ///
    /// `in_use` tells whether a VM uses the image with this manifest: then it stays. VMs that run hold
    /// their files open, so a caller may say no for them.
    pub fn remove(
        &self,
        text: &str,
        in_use: &dyn Fn(&Digest) -> bool,
        several_names: bool,
    ) -> Result<Removed, StoreError> {
        let removed = index::update(&self.dir, |index| {
            let manifest = self.find(index, text)?;
            let name = candidates(text)
                .into_iter()
                .find(|name| index.named(name).is_some());
            let names = index.names_of(manifest);
            if let Some(name) = name
                && names.len() > 1
            {
                index.take_name(&name);
                return Ok(Removed {
                    untagged: vec![name],
                    image: None,
                    freed_bytes: 0,
                });
            }
            if names.len() > 1 && !several_names {
                let id = self.config_digest(manifest)?.short();
                return Err(StoreError::SeveralNames {
                    id,
                    count: names.len(),
                });
            }
            if in_use(&manifest) {
                return Err(StoreError::InUse(text.to_owned()));
            }
            // A damaged image can be removed too: its id is told where it can be read.
            let id = self.config_digest(manifest).unwrap_or(manifest);
            index.entries.retain(|entry| entry.manifest != manifest);
            Ok(Removed {
                untagged: names,
                image: Some(id),
                freed_bytes: 0,
            })
        })?;
        let freed_bytes = match self.free_content() {
            Ok(freed) => freed,
            // Somebody adds an image at this moment; the next removal or prune frees it.
            Err(StoreError::Busy) => 0,
            Err(error) => return Err(error),
        };
        Ok(Removed {
            freed_bytes,
            ..removed
        })
    }

    fn load(&self, index: &Index, digest: Digest) -> Result<Image, StoreError> {
        let names = index.names_of(digest);
        let named = names
            .first()
            .map_or_else(|| digest.to_string(), Reference::to_string);
        self.load_named(names, digest).map_err(|error| match error {
            StoreError::Damaged { path, reason, .. } => StoreError::DamagedImage {
                image: named,
                path,
                reason,
            },
            other => other,
        })
    }

    fn load_named(&self, names: Vec<Reference>, digest: Digest) -> Result<Image, StoreError> {
        let manifest_bytes = self.read_blob(&digest, MANIFEST_MAX_BYTES)?;
        let manifest = format::parse_manifest(&manifest_bytes)?;
        let id = format::descriptor_digest("image manifest", manifest.config())?;
        let config_bytes = self.read_blob(&id, CONFIG_MAX_BYTES)?;
        let config = format::parse_config(&config_bytes)?;
        format::check_layers(&manifest, &config)?;
        let mut layers = Vec::with_capacity(manifest.layers().len());
        for (layer, diff_id) in manifest.layers().iter().zip(format::diff_ids(&config)?) {
            layers.push(self.layer(layer, diff_id)?);
        }
        let documents_bytes = (manifest_bytes.len() + config_bytes.len()) as u64;
        let layers_bytes: u64 = layers.iter().map(|layer| layer.size_bytes).sum();
        Ok(Image {
            id,
            manifest_digest: digest,
            names,
            size_bytes: documents_bytes + layers_bytes,
            manifest,
            config,
            health_check: health::parse(&config_bytes),
            layers,
        })
    }

    fn layer(&self, descriptor: &Descriptor, diff_id: Digest) -> Result<Layer, StoreError> {
        let digest = format::descriptor_digest("image manifest", descriptor)?;
        Ok(Layer {
            digest,
            diff_id,
            media_type: descriptor.media_type().to_string(),
            size_bytes: descriptor.size(),
            path: self.blob_path(&digest),
        })
    }

    /// The image id, without reading more than the manifest.
    fn config_digest(&self, manifest: Digest) -> Result<Digest, StoreError> {
        let bytes = self.read_blob(&manifest, MANIFEST_MAX_BYTES)?;
        let manifest = format::parse_manifest(&bytes)?;
        Ok(format::descriptor_digest(
            "image manifest",
            manifest.config(),
        )?)
    }

    pub(crate) fn blob_path(&self, digest: &Digest) -> PathBuf {
        self.dir.join(BLOBS).join(digest.hex())
    }

    fn temporary_dir(&self) -> PathBuf {
        self.dir.join(TEMPORARY)
    }

    fn root_images_dir(&self) -> PathBuf {
        self.dir.join(ROOT_IMAGES)
    }

    /// Reads a small blob and checks its digest.
    pub(crate) fn read_blob(&self, digest: &Digest, limit: u64) -> Result<Vec<u8>, StoreError> {
        let path = self.blob_path(digest);
        let damaged = |reason: &str| StoreError::Damaged {
            path: path.clone(),
            reason: reason.to_owned(),
            remedy: GET_AGAIN,
        };
        let bytes = match read_bounded(&path, limit) {
            Err(StoreError::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
                return Err(damaged("it is missing"));
            }
            other => other?,
        };
        if Digest::of(&bytes) == *digest {
            Ok(bytes)
        } else {
            Err(damaged("its content does not have the digest of its name"))
        }
    }
}

/// What [`ImageStore::remove`] did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Removed {
    /// Names taken away.
    pub untagged: Vec<Reference>,
    /// The image's id, if it was removed and did not only lose a name.
    pub image: Option<Digest>,
    /// Bytes freed on disk.
    pub freed_bytes: u64,
}

fn read_bounded(path: &Path, limit: u64) -> Result<Vec<u8>, StoreError> {
    let read = || -> io::Result<Vec<u8>> {
        let mut bytes = Vec::new();
        File::open(path)?.take(limit + 1).read_to_end(&mut bytes)?;
        Ok(bytes)
    };
    let bytes = read().map_err(StoreError::io("read", path))?;
    if bytes.len() as u64 > limit {
        return Err(StoreError::Damaged {
            path: path.to_owned(),
            reason: format!("it is larger than {limit} bytes"),
            remedy: GET_AGAIN,
        });
    }
    Ok(bytes)
}

/// A lock file that is held until the value is dropped. Its content means nothing.
#[derive(Debug)]
pub(crate) struct Lock(#[allow(dead_code, reason = "held for its lock")] File);

impl Lock {
    fn open(path: &Path) -> Result<File, StoreError> {
        let mut options = fs::OpenOptions::new();
        options.create(true).truncate(false).write(true);
        std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
        options
            .open(path)
            .map_err(StoreError::io("open the lock file", path))
    }

    fn exclusive(path: &Path) -> Result<Self, StoreError> {
        let file = Self::open(path)?;
        file.lock().map_err(StoreError::io("lock", path))?;
        Ok(Self(file))
    }

    fn shared(path: &Path) -> Result<Self, StoreError> {
        let file = Self::open(path)?;
        file.lock_shared().map_err(StoreError::io("lock", path))?;
        Ok(Self(file))
    }

    fn try_exclusive(path: &Path) -> Result<Self, StoreError> {
        let file = Self::open(path)?;
        match file.try_lock() {
            Ok(()) => Ok(Self(file)),
            Err(fs::TryLockError::WouldBlock) => Err(StoreError::Busy),
            Err(fs::TryLockError::Error(source)) => Err(StoreError::io("lock", path)(source)),
        }
    }
}
