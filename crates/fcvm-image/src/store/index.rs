//! The index: which images exist and what they are called.
//!
//! `index.json` of the OCI image layout, one entry for each name and one for each nameless image.
//! It is read without a lock, because it is only ever replaced by a rename, and changed under one.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use oci_spec::image::{DescriptorBuilder, ImageIndex, ImageIndexBuilder, MediaType, Sha256Digest};

use super::{BLOBS, Lock, StoreError, TEMPORARY, read_bounded};
use crate::digest::Digest;
use crate::reference::Reference;

const INDEX: &str = "index.json";
const INDEX_LOCK: &str = "index.lock";
const LAYOUT: &str = "oci-layout";
const LAYOUT_VERSION: &str = "1.0.0";
const LAYOUT_MAX_BYTES: u64 = 4096;
const INDEX_MAX_BYTES: u64 = 64 << 20;

/// The annotation in which an OCI layout keeps a name.
pub(crate) const NAME_ANNOTATION: &str = "org.opencontainers.image.ref.name";

/// A name of an image, or a nameless image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Entry {
    pub(super) manifest: Digest,
    pub(super) name: Option<Reference>,
    media_type: MediaType,
    size_bytes: u64,
}

/// The index in memory. An image is in it with all its names, or once without one.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Index {
    pub(super) entries: Vec<Entry>,
}

/// Checks the layout's version, and writes it where the store is new.
pub(super) fn check_layout(dir: &Path) -> Result<(), StoreError> {
    #[derive(serde::Deserialize)]
    #[serde(rename_all = "camelCase")]
    struct Layout {
        image_layout_version: String,
    }
    let path = dir.join(LAYOUT);
    let bytes = match read_bounded(&path, LAYOUT_MAX_BYTES) {
        Ok(bytes) => bytes,
        Err(StoreError::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
            let _lock = lock(dir)?;
            let text = format!("{{\"imageLayoutVersion\":\"{LAYOUT_VERSION}\"}}");
            return replace(dir, LAYOUT, text.as_bytes());
        }
        Err(error) => return Err(error),
    };
    let layout: Layout = serde_json::from_slice(&bytes).map_err(|error| StoreError::Damaged {
        path: path.clone(),
        reason: error.to_string(),
        remedy: "remove this file and try again",
    })?;
    if layout.image_layout_version == LAYOUT_VERSION {
        Ok(())
    } else {
        let version = crate::progress::one_line(&layout.image_layout_version, 50);
        Err(StoreError::LaterVersion { path, version })
    }
}

/// Changes the index. Changes of several processes happen one after the other; after an error of
/// `change` nothing has changed.
pub(super) fn update<T>(
    dir: &Path,
    change: impl FnOnce(&mut Index) -> Result<T, StoreError>,
) -> Result<T, StoreError> {
    let _lock = lock(dir)?;
    let mut index = Index::read(dir)?;
    let result = change(&mut index)?;
    let bytes = serde_json::to_vec(&index.to_oci())
        .map_err(|error| StoreError::io("write", &dir.join(INDEX))(io::Error::other(error)))?;
    replace(dir, INDEX, &bytes)?;
    Ok(result)
}

/// Keeps everybody else from changing the index, and from having temporary files for that.
pub(super) fn lock(dir: &Path) -> Result<Lock, StoreError> {
    Lock::exclusive(&dir.join(INDEX_LOCK))
}

/// Replaces a small file of the store: after a crash it is the old one or the new one.
fn replace(dir: &Path, name: &str, bytes: &[u8]) -> Result<(), StoreError> {
    let path = dir.join(name);
    let write = || -> io::Result<()> {
        let mut file = tempfile::Builder::new()
            .prefix(name)
            .tempfile_in(dir.join(TEMPORARY))?;
        file.write_all(bytes)?;
        file.as_file().sync_all()?;
        file.persist(&path).map_err(|error| error.error)?;
        File::open(dir)?.sync_all()
    };
    write().map_err(StoreError::io("write", &path))
}

impl Index {
    pub(super) fn read(dir: &Path) -> Result<Self, StoreError> {
        let path = dir.join(INDEX);
        let bytes = match read_bounded(&path, INDEX_MAX_BYTES) {
            Ok(bytes) => bytes,
            Err(StoreError::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
                return Ok(Self::default());
            }
            Err(error) => return Err(error),
        };
        Self::parse(&bytes).map_err(|reason| StoreError::Damaged {
            reason: crate::progress::one_line(&reason, 200),
            remedy: "move it away and get the images again, their layers are still here",
            path,
        })
    }

    pub(super) fn parse(bytes: &[u8]) -> Result<Self, String> {
        let index: ImageIndex = serde_json::from_slice(bytes).map_err(|error| error.to_string())?;
        let mut entries = Vec::with_capacity(index.manifests().len());
        for descriptor in index.manifests() {
            let annotations = descriptor.annotations().as_ref();
            let name = annotations.and_then(|annotations| annotations.get(NAME_ANNOTATION));
            let name = name.map(|name| name.parse::<Reference>()).transpose();
            let digest = descriptor.digest().as_ref();
            entries.push(Entry {
                manifest: digest.parse().map_err(|error| format!("{error}"))?,
                name: name.map_err(|error| error.to_string())?,
                media_type: descriptor.media_type().clone(),
                size_bytes: descriptor.size(),
            });
        }
        Ok(Self { entries })
    }

    fn to_oci(&self) -> ImageIndex {
        let entries = self.entries.iter().map(|entry| {
            let digest: Sha256Digest = entry
                .manifest
                .hex()
                .parse()
                .expect("a digest has 64 hexadecimal digits");
            let builder = DescriptorBuilder::default()
                .media_type(entry.media_type.clone())
                .digest(digest)
                .size(entry.size_bytes);
            let builder = match &entry.name {
                Some(name) => builder.annotations(HashMap::from([(
                    NAME_ANNOTATION.to_owned(),
                    name.to_string(),
                )])),
                None => builder,
            };
            builder.build().expect("all required fields are set")
        });
        ImageIndexBuilder::default()
            .schema_version(2_u32)
            .media_type(MediaType::ImageIndex)
            .manifests(entries.collect::<Vec<_>>())
            .build()
            .expect("all required fields are set")
    }

    /// Digests of all images, each once.
    pub(super) fn manifests(&self) -> Vec<Digest> {
        let mut digests: Vec<Digest> = self.entries.iter().map(|entry| entry.manifest).collect();
        digests.sort_unstable();
        digests.dedup();
        digests
    }

    pub(super) fn named(&self, name: &Reference) -> Option<Digest> {
        let mut entries = self.entries.iter();
        entries
            .find(|entry| entry.name.as_ref() == Some(name))
            .map(|entry| entry.manifest)
    }

    pub(super) fn names_of(&self, manifest: Digest) -> Vec<Reference> {
        let entries = self
            .entries
            .iter()
            .filter(|entry| entry.manifest == manifest);
        let mut names: Vec<Reference> = entries.filter_map(|entry| entry.name.clone()).collect();
        names.sort_by_key(Reference::to_string);
        names
    }

    /// Enters an image that is completely in the store.
    pub(super) fn add(&mut self, manifest: Digest, media_type: MediaType, size_bytes: u64) {
        if !self.entries.iter().any(|entry| entry.manifest == manifest) {
            self.entries.push(Entry {
                manifest,
                name: None,
                media_type,
                size_bytes,
            });
        }
    }

    /// Gives the name to an image of the index; the one that had it may become nameless.
    pub(super) fn set_name(&mut self, name: &Reference, manifest: Digest) {
        if self.named(name) == Some(manifest) {
            return;
        }
        self.take_name(name);
        let Some(at) = self
            .entries
            .iter()
            .position(|entry| entry.manifest == manifest)
        else {
            return;
        };
        if self.entries[at].name.is_none() {
            self.entries[at].name = Some(name.clone());
        } else {
            let entry = Entry {
                name: Some(name.clone()),
                ..self.entries[at].clone()
            };
            self.entries.push(entry);
        }
    }

    /// Takes the name from its image, which stays without one if it was the last.
    pub(super) fn take_name(&mut self, name: &Reference) -> Option<Digest> {
        let at = self
            .entries
            .iter()
            .position(|entry| entry.name.as_ref() == Some(name))?;
        let manifest = self.entries[at].manifest;
        let count = self
            .entries
            .iter()
            .filter(|entry| entry.manifest == manifest)
            .count();
        if count > 1 {
            self.entries.remove(at);
        } else {
            self.entries[at].name = None;
        }
        Some(manifest)
    }
}

/// Where the blobs of a layout are, for those who read one.
pub(crate) fn layout_blob(digest: &Digest) -> PathBuf {
    Path::new(BLOBS).join(digest.hex())
}
