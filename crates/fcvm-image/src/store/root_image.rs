//! Converted root images: made once for each list of layers, by whoever needs one first.

use std::fs::{self, File};
use std::path::PathBuf;

use super::blob::lock_named;
use super::{CONTENT_LOCK, Image, ImageStore, Lock, StoreError};
use crate::digest::Digest;
use crate::progress::Progress;
use crate::rootfs::{self, LayerInput, Limits};

/// The key of the root image of these layers.
pub(super) fn key_of(diff_ids: &[Digest]) -> Digest {
    rootfs::image_key(diff_ids.iter().copied())
}

impl ImageStore {
    /// The read-only root image (EROFS) of the image. It is converted the first time, which verifies
    /// all layers; of several processes that ask at once, one converts and the others wait.
    pub fn root_image(
        &self,
        image: &Image,
        progress: &dyn Progress,
    ) -> Result<PathBuf, StoreError> {
        let diff_ids: Vec<Digest> = image.layers.iter().map(|layer| layer.diff_id).collect();
        let dir = self.root_images_dir();
        let key = key_of(&diff_ids);
        let path = dir.join(format!("{}.erofs", key.hex()));
        if path.is_file() {
            return Ok(path);
        }
        // No removal in between takes the layers away.
        let _content = Lock::shared(&self.dir.join(CONTENT_LOCK))?;
        let temporary = self.temporary_dir().join(format!("rootfs-{}", key.hex()));
        let mut file = lock_named(&temporary)?;
        if path.is_file() {
            // Somebody else has converted it while this process waited for the lock, and this one
            // has made the file again.
            let _ = fs::remove_file(&temporary);
            return Ok(path);
        }
        let built = self.convert(image, &mut file, progress);
        let published = built.and_then(|()| {
            file.sync_all()
                .map_err(StoreError::io("write", &temporary))?;
            fs::rename(&temporary, &path).map_err(StoreError::io("write", &path))?;
            let sync = || File::open(&dir)?.sync_all();
            sync().map_err(StoreError::io("write", &dir))
        });
        match published {
            Ok(()) => Ok(path),
            Err(error) => {
                let _ = fs::remove_file(&temporary);
                Err(error)
            }
        }
    }

    fn convert(
        &self,
        image: &Image,
        output: &mut File,
        progress: &dyn Progress,
    ) -> Result<(), StoreError> {
        let layers: Vec<LayerInput> = image
            .layers
            .iter()
            .map(|layer| LayerInput {
                path: layer.path.clone(),
                diff_id: layer.diff_id,
            })
            .collect();
        let built = rootfs::build(&layers, output, &Limits::default(), progress);
        let built = built.map_err(|error| StoreError::Convert {
            image: image.id.short(),
            source: Box::new(error),
        })?;
        tracing::debug!(
            target: "image",
            size_bytes = built.size_bytes,
            inodes = built.inode_count,
            "root image of {} converted", image.display_name()
        );
        Ok(())
    }
}
