//! OCI layers to one read-only root image: an uncompressed EROFS file, made without root.
//!
//! [`build`] reads every layer once, from the bottom one to the top one. Decoding and hashing run
//! in threads of their own; the merge keeps names and metadata in memory and writes file data to
//! its final place as it arrives. The image is the same byte for byte for the same layers, however
//! they are compressed and however threads are scheduled; `docs/format/root-image.md` describes it
//! and `docs/decisions/0001-root-image-writer.md` says why it is written here.
//!
//! Not here: where layers come from and where images are kept (the store), and locking. The caller
//! writes to a temporary file and renames it once `build` has returned.

mod erofs;
mod error;
pub mod layer;
mod merge;
mod path;
mod space;
mod stream;
mod tree;

use std::fs::File;
use std::path::PathBuf;
use std::thread;

use sha2::{Digest as _, Sha256};

use self::erofs::plan::Plan;
pub use self::error::{LayerName, Refusal, RootfsError, ShownPath};
use self::merge::{Merge, MergeError};
use self::space::{BLOCK_BYTES, Space};
use self::stream::LayerStream;
use crate::{Digest, Progress, Task};

/// Version of the image format and of every rule that decides an image's bytes. It is part of
/// [`image_key`]; raise it with any change after which the same layers give other bytes.
pub const FORMAT_VERSION: u32 = 1;

/// One layer as the store has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LayerInput {
    /// The layer's file. Its compression (none, gzip, zstd) is recognised by its first bytes.
    pub path: PathBuf,
    /// The sha256 of the uncompressed layer, from the image configuration; it is verified.
    pub diff_id: Digest,
}

impl LayerInput {
    fn name(&self, index: usize) -> LayerName {
        LayerName {
            index,
            diff_id: self.diff_id,
        }
    }
}

/// Bounds on what layers may cost. The defaults hold for any sane image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Limits {
    /// Members of all layers together.
    pub max_members: u64,
    /// Length of a member's path and of a hard link's target.
    pub max_path_bytes: usize,
    /// GNU and PAX extension headers of one member.
    pub max_header_bytes: u32,
    /// Names and values of one member's extended attributes.
    pub max_xattr_bytes: usize,
    /// Ranges with data in one sparse file.
    pub max_sparse_segments: usize,
    /// Names, attributes, links and small files in memory at one time, estimated.
    pub max_metadata_bytes: u64,
    /// Uncompressed bytes of all layers together.
    pub max_uncompressed_bytes: u64,
    /// Size of the image.
    pub max_image_bytes: u64,
}

impl Default for Limits {
    fn default() -> Self {
        const GIB: u64 = 1 << 30;
        Self {
            max_members: 8_000_000,
            max_path_bytes: 16 * 1024,
            max_header_bytes: 1024 * 1024,
            max_xattr_bytes: 128 * 1024,
            max_sparse_segments: 32 * 1024,
            max_metadata_bytes: 2 * GIB,
            max_uncompressed_bytes: 256 * GIB,
            max_image_bytes: 256 * GIB,
        }
    }
}

/// What [`build`] made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Built {
    /// Size of the image file, a multiple of 4096. Unused blocks in it are holes.
    pub size_bytes: u64,
    /// Files, directories and so on; names of one file count once.
    pub inode_count: u64,
    /// Extended attributes left out: of namespaces that Linux does not have, or those that
    /// overlayfs would take for its own.
    pub skipped_xattr_count: u64,
}

/// The key under which the image of these layers is kept: the same layers in the same order and
/// the same [`FORMAT_VERSION`] give the same image byte for byte.
pub fn image_key(diff_ids: impl IntoIterator<Item = Digest>) -> Digest {
    let mut hash = Sha256::new();
    hash.update(b"fcvm root image\0");
    hash.update(FORMAT_VERSION.to_le_bytes());
    for diff_id in diff_ids {
        hash.update(diff_id.as_bytes());
    }
    Digest::from_sha256(hash.finalize().into())
}

/// Merges `layers`, the bottom one first, into a root image in `output`.
///
/// `output` must be a regular file opened for writing; what it holds is lost. It is neither synced
/// nor renamed. `progress` gets one task, `root image`, that counts the bytes of
/// the layers' files. After an error the file holds no image: the superblock is written last.
pub fn build(
    layers: &[LayerInput],
    output: &mut File,
    limits: &Limits,
    progress: &dyn Progress,
) -> Result<Built, RootfsError> {
    let write_error = |source| RootfsError::Write { source };
    let space = Space::new(output, erofs::RESERVED_BLOCKS, limits.max_image_bytes);
    let mut merge = Merge::new(space.map_err(write_error)?, limits);
    let task = progress.start("root image", Some(input_bytes(layers)));
    merge_layers(layers, &mut merge, limits, task.as_ref())?;

    let Merge {
        tree,
        mut space,
        skipped_xattr_count,
        ..
    } = merge;
    space.settle().map_err(write_error)?;
    let plan = Plan::new(&tree);
    let image_blocks = erofs::image_blocks(&plan, &space);
    if image_blocks > (limits.max_image_bytes / BLOCK_BYTES).min(u64::from(u32::MAX) - 1) {
        let layer = layers.last().map(|layer| layer.name(layers.len() - 1));
        return Err(RootfsError::Limit {
            layer: layer.unwrap_or(LayerName {
                index: 0,
                diff_id: image_key([]),
            }),
            what: "bytes",
            limit: limits.max_image_bytes,
        });
    }
    let key = image_key(layers.iter().map(|layer| layer.diff_id));
    erofs::write(&tree, &plan, &mut space, uuid(&key)).map_err(write_error)?;
    task.finish("done");
    Ok(Built {
        size_bytes: image_blocks * BLOCK_BYTES,
        inode_count: tree.node_count() as u64,
        skipped_xattr_count,
    })
}

/// Size of all layer files; those that cannot be read are reported when their turn comes.
fn input_bytes(layers: &[LayerInput]) -> u64 {
    let sizes = layers
        .iter()
        .filter_map(|layer| std::fs::metadata(&layer.path).ok());
    sizes.map(|metadata| metadata.len()).sum()
}

/// Runs the threads and checks every digest once all of them have ended.
fn merge_layers(
    layers: &[LayerInput],
    merge: &mut Merge<'_>,
    limits: &Limits,
    task: &dyn Task,
) -> Result<(), RootfsError> {
    let stream::Pipeline {
        decoder,
        hasher,
        events,
    } = stream::pipeline(limits.max_uncompressed_bytes);
    let (merged, digests) = thread::scope(|scope| {
        let spawn = |name: &str| thread::Builder::new().name(name.into());
        let decoding = spawn("layer-decode").spawn_scoped(scope, move || decoder.run(layers));
        let hashing = spawn("layer-hash").spawn_scoped(scope, move || hasher.run());
        let mut stream = LayerStream::new(events, task);
        let merged = match (&decoding, &hashing) {
            (Ok(_), Ok(_)) => apply_layers(layers, merge, &mut stream),
            _ => Err(RootfsError::Thread),
        };
        // Lets the decoder end, and with it the hasher, when the merge stopped early.
        drop(stream);
        let digests = hashing.ok().and_then(|thread| thread.join().ok());
        (merged, digests)
    });
    let digests = digests.ok_or(RootfsError::Thread)?;
    for (index, (layer, actual)) in layers.iter().zip(digests).enumerate() {
        if layer.diff_id != actual {
            return Err(RootfsError::DiffIdMismatch {
                layer: layer.name(index),
                actual,
            });
        }
    }
    merged
}

fn apply_layers(
    layers: &[LayerInput],
    merge: &mut Merge<'_>,
    stream: &mut LayerStream<'_>,
) -> Result<(), RootfsError> {
    for (index, layer) in layers.iter().enumerate() {
        match merge.apply(&mut *stream, layer.name(index)) {
            Ok(()) => stream.finish_layer()?,
            Err(MergeError::Source) => return Err(stream.take_failure()),
            Err(MergeError::Other(error)) => return Err(error),
            Err(MergeError::Content(error)) => {
                // Read to its end, so that damage is told from malice by the digest.
                stream.finish_layer()?;
                return Err(error);
            }
        }
    }
    Ok(())
}

/// A UUID of version 8 (RFC 9562) from the image key.
fn uuid(key: &Digest) -> [u8; 16] {
    let mut uuid = [0; 16];
    uuid.copy_from_slice(&key.as_bytes()[..16]);
    uuid[6] = (uuid[6] & 0x0f) | 0x80;
    uuid[8] = (uuid[8] & 0x3f) | 0x80;
    uuid
}
