//! Writes a merged tree as EROFS: `format` knows the bytes, `plan` the places, this the order.
//!
//! The file data is in the output file already. Behind it come the directory area, the metadata
//! area, and last of all the superblock at the start, so that an unfinished file is never taken
//! for an image.

pub(crate) mod format;
pub(crate) mod plan;

use std::io;

use self::format::{Dirent, FileType, Inode, Superblock};
use self::plan::{Placement, Plan, Shape, chunk_count, shape};
use super::space::{BLOCK_BYTES, Space};
use super::tree::{Body, ChunkRun, FileData, NodeId, Tree};

/// Blocks before the file data: the superblock's.
pub(crate) const RESERVED_BLOCKS: u32 = 1;

/// Size of the image in blocks, were it written now.
pub(crate) fn image_blocks(plan: &Plan, space: &Space<'_>) -> u64 {
    u64::from(space.end_block()) + plan.content_blocks + plan.metadata_blocks
}

/// Writes everything but file data. The caller has settled the space and checked that
/// [`image_blocks`] fits the format and its limits.
pub(crate) fn write(
    tree: &Tree,
    plan: &Plan,
    space: &mut Space<'_>,
    uuid: [u8; 16],
) -> io::Result<()> {
    let content_start_block = u64::from(space.end_block());
    let metadata_start_block = content_start_block + plan.content_blocks;
    let writer = Writer {
        tree,
        plan,
        content_start_block,
    };
    writer.write_contents(space)?;
    writer.write_inodes(space, metadata_start_block * BLOCK_BYTES)?;
    let block_count = metadata_start_block + plan.metadata_blocks;
    space.flush()?;
    space.set_block_count(block_count)?;
    let superblock = Superblock {
        root_nid: plan.nid(NodeId::ROOT) as u16,
        inode_count: plan.placements.len() as u64,
        block_count: block_count as u32,
        metadata_block: metadata_start_block as u32,
        uuid,
        has_chunked_files: plan.has_chunked_files,
    };
    space.write(format::SUPERBLOCK_OFFSET_BYTES, &superblock.encode())?;
    space.flush()
}

struct Writer<'a> {
    tree: &'a Tree,
    plan: &'a Plan,
    content_start_block: u64,
}

impl Writer<'_> {
    /// The directory area: content of directories and long links that is not behind an inode.
    fn write_contents(&self, space: &mut Space<'_>) -> io::Result<()> {
        for placement in &self.plan.placements {
            let shape = shape(self.tree, placement.node);
            if shape.content_blocks == 0 {
                continue;
            }
            let start_bytes = (self.content_start_block + placement.content_block) * BLOCK_BYTES;
            let content = self.content(placement.node);
            let length = content
                .len()
                .min((shape.content_blocks * BLOCK_BYTES) as usize);
            space.write(start_bytes, &content[..length])?;
            space.pad_block(start_bytes + length as u64)?;
        }
        Ok(())
    }

    fn write_inodes(&self, space: &mut Space<'_>, start_bytes: u64) -> io::Result<()> {
        // Serial numbers follow the walk, writing follows the file.
        let mut order: Vec<(u32, &Placement)> = (1..).zip(&self.plan.placements).collect();
        order.sort_unstable_by_key(|(_, placement)| placement.offset_bytes);
        let mut bytes = Vec::new();
        let mut at_bytes = start_bytes;
        for (serial, placement) in order {
            let gap_bytes = start_bytes + placement.offset_bytes - at_bytes;
            bytes.clear();
            bytes.resize(gap_bytes as usize, 0);
            self.encode(serial, placement, &mut bytes);
            space.write(at_bytes, &bytes)?;
            at_bytes += bytes.len() as u64;
        }
        space.pad_block(at_bytes)
    }

    /// Appends the inode, its attributes and what follows them.
    fn encode(&self, serial: u32, placement: &Placement, out: &mut Vec<u8>) {
        let node = self.tree.node(placement.node);
        let shape = shape(self.tree, placement.node);
        let inode = Inode {
            file_type: shape.file_type,
            layout: shape.layout,
            size_bytes: shape.size_bytes,
            union_word: self.union_word(placement, &shape),
            serial,
            link_count: self.link_count(placement.node),
        };
        inode.encode(&node.metadata, out);
        match (shape.layout, &node.body) {
            (format::DataLayout::Inline, _) => {
                let content = self.content(placement.node);
                out.extend_from_slice(&content[(shape.content_blocks * BLOCK_BYTES) as usize..]);
            }
            (
                _,
                Body::File(FileData::Chunked {
                    size_bytes,
                    chunk_bits,
                    runs,
                    ..
                }),
            ) => {
                encode_chunk_table(
                    chunk_count(*size_bytes, *chunk_bits),
                    *chunk_bits,
                    runs,
                    out,
                );
            }
            _ => {}
        }
    }

    fn union_word(&self, placement: &Placement, shape: &Shape) -> u32 {
        match &self.tree.node(placement.node).body {
            Body::File(FileData::Plain { extent, .. }) => extent.start_block,
            Body::File(FileData::Chunked { chunk_bits, .. }) => u32::from(*chunk_bits),
            Body::CharDevice { major, minor } | Body::BlockDevice { major, minor } => {
                format::device_word(*major, *minor)
            }
            _ if shape.content_blocks > 0 => {
                (self.content_start_block + placement.content_block) as u32
            }
            _ => 0,
        }
    }

    /// Names of a file; for a directory its own name, its `.` and the `..` of its subdirectories.
    fn link_count(&self, id: NodeId) -> u32 {
        let node = self.tree.node(id);
        match &node.body {
            Body::Directory(children) => {
                let links = children.values();
                2 + links
                    .filter(|link| self.tree.is_directory(link.node))
                    .count() as u32
            }
            _ => node.name_count,
        }
    }

    fn content(&self, id: NodeId) -> Vec<u8> {
        match &self.tree.node(id).body {
            Body::Directory(_) => self.directory(id),
            Body::Symlink(target) => target.to_vec(),
            Body::File(FileData::Inline(content)) => content.to_vec(),
            _ => Vec::new(),
        }
    }

    fn directory(&self, id: NodeId) -> Vec<u8> {
        let children = self.tree.children(id);
        let entries: Vec<Dirent<'_>> = plan::names(self.tree, id)
            .into_iter()
            .map(|name| {
                let node = match name {
                    b"." => id,
                    b".." => self.plan.parent(id),
                    name => children[name].node,
                };
                Dirent {
                    name,
                    nid: self.plan.nid(node),
                    file_type: self.file_type(node),
                }
            })
            .collect();
        format::encode_dirents(&entries)
    }

    fn file_type(&self, id: NodeId) -> FileType {
        match &self.tree.node(id).body {
            Body::Directory(_) => FileType::Directory,
            Body::File(_) => FileType::Regular,
            Body::Symlink(_) => FileType::Symlink,
            Body::CharDevice { .. } => FileType::CharDevice,
            Body::BlockDevice { .. } => FileType::BlockDevice,
            Body::Fifo => FileType::Fifo,
        }
    }
}

fn encode_chunk_table(count: u64, chunk_bits: u8, runs: &[ChunkRun], out: &mut Vec<u8>) {
    let mut next_chunk = 0;
    let holes = |from: u64, to: u64| {
        std::iter::repeat_n(format::HOLE.to_le_bytes(), (to - from) as usize).flatten()
    };
    for run in runs {
        out.extend(holes(next_chunk, u64::from(run.first_chunk)));
        for index in 0..run.chunk_count {
            out.extend((run.start_block + (index << chunk_bits)).to_le_bytes());
        }
        next_chunk = u64::from(run.first_chunk) + u64::from(run.chunk_count);
    }
    out.extend(holes(next_chunk, count));
}
