//! Frozen disks under names in a directory, and what a manifest says of them.

use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use crate::checksum::crc32c_of;
use crate::clone::clone_file;
use crate::disk::{FrozenDisk, Layer, LayerFormat, allocated_bytes};
use crate::error::StorageError;
use crate::host::{name_file, nameless_file};
use crate::qcow2::Qcow2Header;

/// Most layers of a disk that is kept: more than ever come together where chains are merged.
pub const LAYER_COUNT_MAX: usize = 64;

/// A frozen disk in a directory, as it is written down beside it. docs/format/disk-overlay.md.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiskManifest {
    /// Size that a guest sees.
    pub size_bytes: u64,
    /// The files, the lowest first: 1 to [`LAYER_COUNT_MAX`].
    pub layers: Vec<LayerManifest>,
}

/// A file of a [`DiskManifest`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LayerManifest {
    /// Its name in the directory.
    pub file: String,
    /// How to read it.
    pub format: LayerFormat,
    /// Its length.
    pub file_bytes: u64,
    /// Space that it took when it was written down.
    pub allocated_bytes: u64,
    /// CRC-32C of its bytes.
    pub crc32c: u32,
}

/// Where a frozen disk is kept.
#[derive(Debug, Clone, Copy)]
pub struct Shelf<'a> {
    /// The directory of its files.
    pub directory: &'a Path,
    /// A directory in a mounted pool, and how names in it begin: files that are in that pool stay there.
    pub pool: Option<(&'a Path, &'a str)>,
}

impl<'a, P: AsRef<Path> + ?Sized> From<&'a P> for Shelf<'a> {
    fn from(directory: &'a P) -> Self {
        Self {
            directory: directory.as_ref(),
            pool: None,
        }
    }
}

impl Shelf<'_> {
    fn pool_path(&self, file: &str) -> Option<PathBuf> {
        let (directory, prefix) = self.pool?;
        Some(directory.join(format!("{prefix}-{file}")))
    }

    /// Where a file is to be kept that is open.
    fn place(&self, layer: &File, file: &str) -> io::Result<PathBuf> {
        if let Some((directory, _)) = self.pool
            && layer.metadata()?.dev() == directory.metadata()?.dev()
            && let Some(path) = self.pool_path(file)
        {
            return Ok(path);
        }
        Ok(self.directory.join(file))
    }

    /// Where a file is kept.
    fn find(&self, file: &str) -> PathBuf {
        let path = self.directory.join(file);
        match self.pool_path(file) {
            Some(in_pool) if path.symlink_metadata().is_err() => in_pool,
            _ => path,
        }
    }

    /// Makes the names in it durable.
    fn sync(&self) -> io::Result<()> {
        let pool = self.pool.map(|(directory, _)| directory);
        [Some(self.directory), pool]
            .into_iter()
            .flatten()
            .try_for_each(|directory| File::open(directory)?.sync_all())
    }
}

impl FrozenDisk {
    /// Keeps the disk on `shelf`, as `NAME-0.raw`, `NAME-1.qcow2` and so on, and syncs it. A file
    /// that has no name yet gets one, a file with a name elsewhere on the file system gets a second
    /// one (in a pool a clone), and only what is on another file system is copied. Whoever wrote to the disk before it
    /// was frozen must have ended, as far as the disk goes on in overlays.
    ///
    /// # Errors
    ///
    /// `name` is no file name, a file of such a name is there already, or the directory is gone, full
    /// or can not be written to. Nothing that was not there is left there.
    pub fn persist<'a>(
        &self,
        shelf: impl Into<Shelf<'a>>,
        name: &str,
    ) -> Result<DiskManifest, StorageError> {
        let shelf = shelf.into();
        let directory = shelf.directory;
        check_name(directory, name)?;
        let mut added = Added(Vec::new());
        let mut layers = Vec::new();
        for (index, layer) in self.layers().iter().enumerate() {
            let failed = |source| StorageError::from_io("keep a disk", directory, source);
            let suffix = match layer.format {
                LayerFormat::Raw => "raw",
                LayerFormat::Qcow2 => "qcow2",
            };
            let file = format!("{name}-{index}.{suffix}");
            let path = shelf.place(&layer.file, &file).map_err(failed)?;
            if give_name(&layer.file, &path).map_err(failed)? {
                added.0.push(path.clone());
            }
            let kept = File::open(&path).map_err(failed)?;
            kept.sync_all().map_err(failed)?;
            layers.push(LayerManifest {
                file,
                format: layer.format,
                file_bytes: kept.metadata().map_err(failed)?.len(),
                allocated_bytes: allocated_bytes(&kept).map_err(failed)?,
                crc32c: crc32c_of(&kept).map_err(failed)?,
            });
        }
        shelf
            .sync()
            .map_err(|source| StorageError::from_io("keep a disk", directory, source))?;
        added.0.clear();
        Ok(DiskManifest {
            size_bytes: self.size_bytes(),
            layers,
        })
    }

    /// Opens what [`persist`](Self::persist) kept. The bytes themselves are not looked at, see
    /// [`DiskManifest::verify`].
    ///
    /// # Errors
    ///
    /// A file is missing, or is not of the length, format and size that the manifest says.
    pub fn open<'a>(
        shelf: impl Into<Shelf<'a>>,
        manifest: &DiskManifest,
    ) -> Result<Self, StorageError> {
        let shelf = shelf.into();
        let directory = shelf.directory;
        let count = manifest.layers.len();
        if count == 0 || count > LAYER_COUNT_MAX {
            return Err(StorageError::Damaged {
                path: directory.to_owned(),
                reason: format!("its manifest has {count} layers"),
            });
        }
        let mut layers = Vec::new();
        for layer in &manifest.layers {
            check_name(directory, &layer.file)?;
            let path = shelf.find(&layer.file);
            let file = open_layer(&path)?;
            check_layer(&file, layer, manifest.size_bytes, layers.is_empty()).map_err(
                |reason| StorageError::Damaged {
                    path: path.clone(),
                    reason,
                },
            )?;
            layers.push(Layer {
                file: Arc::new(file),
                format: layer.format,
            });
        }
        Ok(Self::new(layers, manifest.size_bytes))
    }
}

impl DiskManifest {
    /// Compares the files on `shelf` with this manifest, every byte of them.
    ///
    /// # Errors
    ///
    /// As [`FrozenDisk::open`], and where the bytes of a file are not those that were kept.
    pub fn verify<'a>(&self, shelf: impl Into<Shelf<'a>>) -> Result<(), StorageError> {
        let shelf = shelf.into();
        let directory = shelf.directory;
        let disk = FrozenDisk::open(shelf, self)?;
        for (layer, kept) in disk.layers().iter().zip(&self.layers) {
            let path = shelf.find(&kept.file);
            let found = crc32c_of(&layer.file)
                .map_err(|source| StorageError::from_io("verify a disk", directory, source))?;
            if found != kept.crc32c {
                let wanted = kept.crc32c;
                return Err(StorageError::Damaged {
                    path,
                    reason: format!("its CRC-32C is {found:08x} and was {wanted:08x}"),
                });
            }
        }
        Ok(())
    }

    /// Names of the files, for whoever removes the disk.
    pub fn files(&self) -> impl Iterator<Item = &str> {
        self.layers.iter().map(|layer| &*layer.file)
    }
}

/// Names given so far: taken back where the rest fails.
struct Added(Vec<PathBuf>);

impl Drop for Added {
    fn drop(&mut self) {
        for path in &self.0 {
            // What can not be removed now can not be removed by anyone else either.
            let _ = std::fs::remove_file(path);
        }
    }
}

/// Gives the file a name, or a copy of it where that can not be. False where it has that name already.
fn give_name(file: &File, path: &Path) -> io::Result<bool> {
    match name_file(file, path) {
        Ok(()) => return Ok(true),
        Err(Errno::EXIST) => {
            let (known, there) = (file.metadata()?, path.symlink_metadata()?);
            return if (known.dev(), known.ino()) == (there.dev(), there.ino()) {
                Ok(false)
            } else {
                Err(Errno::EXIST.into())
            };
        }
        // Another file system; a file that had a name and lost it; too many names; names of files
        // that are not one's own, see protected_hardlinks in proc_sys_fs(5).
        Err(Errno::XDEV | Errno::NOENT | Errno::MLINK | Errno::PERM) => {}
        Err(errno) => return Err(errno.into()),
    }
    let copy = nameless_file(path.parent().unwrap_or(path))?;
    clone_file(file, &copy)?;
    match name_file(&copy, path) {
        Ok(()) => Ok(true),
        // A file system without nameless files.
        Err(Errno::NOENT) => {
            let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
            let target: File = rustix::fs::open(path, flags, Mode::RUSR | Mode::WUSR)?.into();
            clone_file(file, &target)
                .map(|_| true)
                .inspect_err(|_| drop(std::fs::remove_file(path)))
        }
        Err(errno) => Err(errno.into()),
    }
}

fn open_layer(path: &Path) -> Result<File, StorageError> {
    // A pipe in its place shall not keep anyone waiting, nor a link lead elsewhere.
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW | OFlags::NONBLOCK;
    match rustix::fs::open(path, flags, Mode::empty()) {
        Ok(file) => Ok(file.into()),
        Err(Errno::NOENT) => Err(StorageError::Damaged {
            path: path.to_owned(),
            reason: "the file is missing".to_owned(),
        }),
        Err(Errno::LOOP) => Err(StorageError::Damaged {
            path: path.to_owned(),
            reason: "it is a symbolic link".to_owned(),
        }),
        Err(errno) => Err(StorageError::from_io(
            "open a disk",
            path.parent().unwrap_or(path),
            errno.into(),
        )),
    }
}

/// Why a file is not the layer that the manifest tells of.
fn check_layer(
    file: &File,
    layer: &LayerManifest,
    size_bytes: u64,
    is_lowest: bool,
) -> Result<(), String> {
    let data = file.metadata().map_err(|error| error.to_string())?;
    if !data.is_file() {
        return Err("it is not a regular file".to_owned());
    }
    let (found, wanted) = (data.len(), layer.file_bytes);
    if found != wanted {
        return Err(format!("it has {found} bytes and had {wanted}"));
    }
    let found = match layer.format {
        LayerFormat::Raw if !is_lowest => return Err("a raw file lies on another".to_owned()),
        LayerFormat::Raw => found,
        LayerFormat::Qcow2 => {
            let header = Qcow2Header::read(file)
                .map_err(|error| error.to_string())?
                .ok_or("it is not a qcow2 file of version 3")?;
            if header.names_backing_file || header.names_data_file {
                return Err("it names another file, which no disk of fcvm's does".to_owned());
            }
            header.size_bytes
        }
    };
    if found != size_bytes {
        return Err(format!(
            "it is a disk of {found} bytes, not of {size_bytes}"
        ));
    }
    Ok(())
}

/// The name is one file name, so that nothing outside the directory is reached by it.
fn check_name(directory: &Path, name: &str) -> Result<(), StorageError> {
    let mut components = Path::new(name).components();
    match (components.next(), components.next()) {
        (Some(Component::Normal(only)), None) if only == name => Ok(()),
        _ => Err(StorageError::Damaged {
            path: directory.to_owned(),
            reason: format!("'{}' is not a file name", name.escape_debug()),
        }),
    }
}
