//! What a VM's writable disk consists of: files, one upon the other.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;

use fiemap::{Fiemap, FiemapExtentFlags};
use rustix::fs::{Mode, OFlags};
use serde::{Deserialize, Serialize};

/// How the bytes of a disk lie in a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LayerFormat {
    /// As they are.
    Raw,
    /// qcow2, version 3. What it does not have shows from the layer below. It names no other file, so
    /// the hypervisor has to be told of that layer.
    Qcow2,
}

/// A file of a disk. A clone of it is the same file.
#[derive(Debug, Clone)]
pub struct Layer {
    /// Open for reading alone, but for the last layer of a [`Disk`]. It may have no name.
    pub file: Arc<File>,
    /// How to read it.
    pub format: LayerFormat,
}

/// A disk that one VM writes to.
///
/// It is not `Clone`, and nothing makes one from files that another has: no two of them ever have
/// the same last layer. Its own file has no name, so that it ends with the processes that have it open.
#[derive(Debug)]
pub struct Disk {
    layers: Vec<Layer>,
    size_bytes: u64,
}

/// The state of a disk at one instant, which nobody changes any more. A clone of it is the same state.
#[derive(Debug, Clone)]
pub struct FrozenDisk {
    layers: Vec<Layer>,
    size_bytes: u64,
}

/// Space that a disk takes on the host, in bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct DiskUsage {
    /// What it alone takes, and what is free again when it goes.
    pub own_bytes: u64,
    /// What it shares with the state that it was made from, and may share with others: layers below,
    /// and blocks of its own file that are another's too (reflink).
    pub shared_bytes: u64,
}

impl Disk {
    /// A disk in one file of raw bytes, open for reading and writing, that no other disk has.
    ///
    /// # Errors
    ///
    /// The file can not be looked at.
    pub fn raw(file: File) -> io::Result<Self> {
        let size_bytes = file.metadata()?.len();
        let top = Layer {
            file: Arc::new(file),
            format: LayerFormat::Raw,
        };
        Ok(Self {
            layers: vec![top],
            size_bytes,
        })
    }

    pub(crate) fn new(below: &[Layer], top: Layer, size_bytes: u64) -> Self {
        let mut layers = below.to_vec();
        layers.push(top);
        Self { layers, size_bytes }
    }

    /// Its files, the lowest first. The last one is open for writing, and this disk's alone.
    pub fn layers(&self) -> &[Layer] {
        &self.layers
    }

    /// Size that the guest sees.
    pub fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    /// Number of layers, at least 1. Each costs the guest's reads a look, and the hypervisor memory.
    pub fn depth(&self) -> usize {
        self.layers.len()
    }

    /// Space that it takes now.
    ///
    /// # Errors
    ///
    /// A file can not be looked at.
    pub fn usage(&self) -> io::Result<DiskUsage> {
        let (below, top) = self.split();
        if let Some((own_bytes, referenced_bytes)) = pool_bytes(&top.file) {
            return Ok(DiskUsage {
                own_bytes,
                shared_bytes: referenced_bytes.saturating_sub(own_bytes) + sum_allocated(below)?,
            });
        }
        let top_bytes = allocated_bytes(&top.file)?;
        let shared_bytes = shared_bytes(&top.file).min(top_bytes);
        Ok(DiskUsage {
            own_bytes: top_bytes - shared_bytes,
            shared_bytes: shared_bytes + sum_allocated(below)?,
        })
    }

    /// The layers below the last one, and that.
    pub(crate) fn split(&self) -> (&[Layer], &Layer) {
        split(&self.layers)
    }
}

impl FrozenDisk {
    /// The state in files that another process has frozen and handed on, the lowest first.
    ///
    /// # Errors
    ///
    /// There is no file, or one cannot be opened for reading alone.
    pub fn from_layers(layers: Vec<(File, LayerFormat)>, size_bytes: u64) -> io::Result<Self> {
        if layers.is_empty() {
            return Err(io::Error::from(io::ErrorKind::InvalidInput));
        }
        let read_only = |(file, format): (File, LayerFormat)| {
            let file = Arc::new(read_only(&file)?);
            Ok(Layer { file, format })
        };
        let layers = layers
            .into_iter()
            .map(read_only)
            .collect::<io::Result<_>>()?;
        Ok(Self { layers, size_bytes })
    }

    pub(crate) fn new(layers: Vec<Layer>, size_bytes: u64) -> Self {
        Self { layers, size_bytes }
    }

    /// Its files, the lowest first, all open for reading alone.
    pub fn layers(&self) -> &[Layer] {
        &self.layers
    }

    /// Size that a guest sees.
    pub fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    /// Number of layers, at least 1.
    pub fn depth(&self) -> usize {
        self.layers.len()
    }

    /// Whether a file of it is on the file system of `directory`.
    ///
    /// # Errors
    ///
    /// A file or the directory can not be looked at.
    pub fn is_partly_in(&self, directory: &Path) -> io::Result<bool> {
        let device = directory.metadata()?.dev();
        for layer in &self.layers {
            if layer.file.metadata()?.dev() == device {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Space of its files that are in a mounted pool.
    pub fn pool_usage(&self) -> DiskUsage {
        let mut usage = DiskUsage::default();
        for layer in &self.layers {
            if let Some((own_bytes, referenced_bytes)) = pool_bytes(&layer.file) {
                usage.own_bytes += own_bytes;
                usage.shared_bytes += referenced_bytes.saturating_sub(own_bytes);
            }
        }
        usage
    }

    /// Space that its files take.
    ///
    /// # Errors
    ///
    /// A file can not be looked at.
    pub fn allocated_bytes(&self) -> io::Result<u64> {
        sum_allocated(&self.layers)
    }

    pub(crate) fn split(&self) -> (&[Layer], &Layer) {
        split(&self.layers)
    }
}

/// Disks have at least one layer: [`Disk::raw`] and [`Disk::new`] give them one, and what is opened
/// from a manifest is checked.
fn split(layers: &[Layer]) -> (&[Layer], &Layer) {
    let last = layers.len() - 1;
    (&layers[..last], &layers[last])
}

fn sum_allocated(layers: &[Layer]) -> io::Result<u64> {
    layers
        .iter()
        .map(|layer| allocated_bytes(&layer.file))
        .sum()
}

/// Bytes of the medium that a file takes.
pub(crate) fn allocated_bytes(file: &File) -> io::Result<u64> {
    Ok(file.metadata()?.blocks() * 512)
}

/// What a file in a mounted pool has for itself and what it refers to: none elsewhere.
fn pool_bytes(file: &File) -> Option<(u64, u64)> {
    let read = |name: &str| -> Option<u64> {
        let mut buffer = [0; 24];
        let length = rustix::fs::fgetxattr(file, name, &mut buffer).ok()?;
        let text = std::str::from_utf8(buffer.get(..length)?).ok()?;
        text.parse().ok()
    };
    Some((
        read("user.blockpool.exclusive_bytes")?,
        read("user.blockpool.referenced_bytes")?,
    ))
}

/// What a file in a mounted pool has for itself: nothing where it is not in one, or is gone.
pub fn pool_file_bytes(path: &Path) -> u64 {
    let bytes = File::open(path).ok().and_then(|file| pool_bytes(&file));
    bytes.map_or(0, |(own_bytes, _)| own_bytes)
}

/// Bytes of a file in blocks that are other files' too: none where the file system does not tell, as
/// those without such blocks do not.
fn shared_bytes(file: &File) -> u64 {
    Fiemap::new(file)
        .map_while(Result::ok)
        .filter(|extent| extent.fe_flags.contains(FiemapExtentFlags::SHARED))
        .map(|extent| extent.fe_length)
        .sum()
}

/// The same file, open for reading alone: through that descriptor nobody can write, whatever the
/// process that inherits it does, and QEMU asks for just such a one where a layer is read-only.
pub(crate) fn read_only(file: &File) -> io::Result<File> {
    let own = format!("/proc/self/fd/{}", file.as_raw_fd());
    let flags = OFlags::RDONLY | OFlags::CLOEXEC;
    Ok(rustix::fs::open(own, flags, Mode::empty())?.into())
}
