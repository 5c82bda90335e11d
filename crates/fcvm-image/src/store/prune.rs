//! Freeing what nothing refers to, and counting what there is.

use std::collections::HashSet;
use std::fs::{self, DirEntry};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use super::blob::lock_if_free;
use super::root_image::key_of;
use super::{BLOBS, CONTENT_LOCK, ImageStore, Index, Lock, StoreError, index};
use crate::digest::Digest;
use crate::format::{self, CONFIG_MAX_BYTES, MANIFEST_MAX_BYTES};

/// What [`ImageStore::prune`] removed.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Pruned {
    /// Ids of the images that were removed.
    pub images: Vec<Digest>,
    /// Bytes freed on disk.
    pub freed_bytes: u64,
}

/// What the store takes on disk, for `system df`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Usage {
    /// Images there are.
    pub image_count: usize,
    /// Images that a VM uses.
    pub active_count: usize,
    /// Manifests, configurations and layers, each counted once, in bytes on disk.
    pub content_bytes: u64,
    /// Converted root images, in bytes on disk.
    pub root_image_bytes: u64,
    /// Temporary files: downloads that wait to be resumed, and what crashes left.
    pub temporary_bytes: u64,
    /// What removing all images that no VM uses would free.
    pub reclaimable_bytes: u64,
}

/// What a set of images needs.
struct Needed {
    blobs: HashSet<String>,
    root_images: HashSet<String>,
}

impl ImageStore {
    /// Removes nameless images (with `all` also those with names) that no VM uses, and frees
    /// everything that no remaining image refers to: blobs, converted root images, temporary files.
    ///
    /// # Errors
    ///
    /// [`StoreError::Busy`] while another process adds an image.
    pub fn prune(&self, in_use: &dyn Fn(&Digest) -> bool, all: bool) -> Result<Pruned, StoreError> {
        let lock = Lock::try_exclusive(&self.dir.join(CONTENT_LOCK))?;
        let mut images = Vec::new();
        index::update(&self.dir, |index| {
            for manifest in index.manifests() {
                let unwanted = all || index.names_of(manifest).is_empty();
                if unwanted && !in_use(&manifest) {
                    images.push(self.config_digest(manifest).unwrap_or(manifest));
                    index.entries.retain(|entry| entry.manifest != manifest);
                }
            }
            Ok(())
        })?;
        let freed_bytes = self.sweep(&lock, true)?;
        Ok(Pruned {
            images,
            freed_bytes,
        })
    }

    /// Frees what no image refers to; downloads that wait to be resumed are kept.
    pub(super) fn free_content(&self) -> Result<u64, StoreError> {
        let lock = Lock::try_exclusive(&self.dir.join(CONTENT_LOCK))?;
        self.sweep(&lock, false)
    }

    /// Frees these blobs if no image refers to them.
    pub(super) fn free_blobs(&self, blobs: &[Digest]) -> Result<(), StoreError> {
        let _lock = Lock::try_exclusive(&self.dir.join(CONTENT_LOCK))?;
        let needed = self.needed(&Index::read(&self.dir)?.manifests())?;
        for digest in blobs {
            if !needed.blobs.contains(&digest.hex()) {
                let path = self.blob_path(digest);
                fs::remove_file(&path).map_err(StoreError::io("remove", &path))?;
            }
        }
        Ok(())
    }

    /// Counts what the store takes.
    pub fn usage(&self, in_use: &dyn Fn(&Digest) -> bool) -> Result<Usage, StoreError> {
        let index = Index::read(&self.dir)?;
        let manifests = index.manifests();
        let active: Vec<Digest> = manifests
            .iter()
            .copied()
            .filter(|digest| in_use(digest))
            .collect();
        let kept = self.needed(&active)?;
        let mut usage = Usage {
            image_count: manifests.len(),
            active_count: active.len(),
            ..Usage::default()
        };
        each_file(&self.dir.join(BLOBS), |name, _, size_bytes| {
            usage.content_bytes += size_bytes;
            if !kept.blobs.contains(name) {
                usage.reclaimable_bytes += size_bytes;
            }
            Ok(())
        })?;
        each_file(&self.root_images_dir(), |name, _, size_bytes| {
            usage.root_image_bytes += size_bytes;
            if !kept.root_images.contains(name) {
                usage.reclaimable_bytes += size_bytes;
            }
            Ok(())
        })?;
        each_file(&self.temporary_dir(), |_, _, size_bytes| {
            usage.temporary_bytes += size_bytes;
            usage.reclaimable_bytes += size_bytes;
            Ok(())
        })?;
        Ok(usage)
    }

    /// The names of the files that these images need. A damaged image counts with what can still be
    /// read of it: its file is kept until the image is removed.
    fn needed(&self, manifests: &[Digest]) -> Result<Needed, StoreError> {
        let mut needed = Needed {
            blobs: HashSet::new(),
            root_images: HashSet::new(),
        };
        for digest in manifests {
            needed.blobs.insert(digest.hex());
            let Ok(bytes) = self.read_blob(digest, MANIFEST_MAX_BYTES) else {
                continue;
            };
            let Ok(manifest) = format::parse_manifest(&bytes) else {
                continue;
            };
            let blobs = manifest.layers().iter().chain([manifest.config()]);
            for blob in blobs {
                needed
                    .blobs
                    .insert(format::descriptor_digest("image manifest", blob)?.hex());
            }
            let config = format::descriptor_digest("image manifest", manifest.config())?;
            let Ok(bytes) = self.read_blob(&config, CONFIG_MAX_BYTES) else {
                continue;
            };
            let Ok(diff_ids) = format::parse_config(&bytes).and_then(|c| format::diff_ids(&c))
            else {
                continue;
            };
            needed
                .root_images
                .insert(format!("{}.erofs", key_of(&diff_ids).hex()));
        }
        Ok(needed)
    }

    /// Removes files that nothing needs. The exclusive lock says that nobody adds any.
    fn sweep(&self, _lock: &Lock, downloads: bool) -> Result<u64, StoreError> {
        let needed = self.needed(&Index::read(&self.dir)?.manifests())?;
        let mut freed_bytes = 0;
        let mut remove = |entry: &DirEntry, size_bytes: u64| {
            fs::remove_file(entry.path()).map_err(StoreError::io("remove", &entry.path()))?;
            freed_bytes += size_bytes;
            Ok(())
        };
        each_file(&self.dir.join(BLOBS), |name, entry, size_bytes| {
            if needed.blobs.contains(name) {
                Ok(())
            } else {
                remove(entry, size_bytes)
            }
        })?;
        each_file(&self.root_images_dir(), |name, entry, size_bytes| {
            if needed.root_images.contains(name) {
                return Ok(());
            }
            remove(entry, size_bytes)
        })?;
        if downloads {
            let _lock = index::lock(&self.dir)?;
            each_file(&self.temporary_dir(), |_, entry, size_bytes| {
                // With both locks held nobody works here; a lock all the same is respected.
                match lock_if_free(&entry.path())? {
                    Some(_held) => remove(entry, size_bytes),
                    None => Ok(()),
                }
            })?;
        }
        Ok(freed_bytes)
    }
}

/// Calls `visit` with name, entry and bytes on disk of every file in `dir`.
fn each_file(
    dir: &Path,
    mut visit: impl FnMut(&str, &DirEntry, u64) -> Result<(), StoreError>,
) -> Result<(), StoreError> {
    let entries = fs::read_dir(dir).map_err(StoreError::io("read", dir))?;
    for entry in entries {
        let entry = entry.map_err(StoreError::io("read", dir))?;
        let metadata = match entry.metadata() {
            Ok(metadata) if metadata.is_file() => metadata,
            Ok(_) => continue,
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => return Err(StoreError::io("read", &entry.path())(error)),
        };
        visit(
            &entry.file_name().to_string_lossy(),
            &entry,
            metadata.blocks() * 512,
        )?;
    }
    Ok(())
}
