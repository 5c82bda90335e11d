//! Decides where each inode goes, so that directory entries can name inodes not yet written.
//!
//! Inodes follow a walk of the tree: a directory, then its entries that are no directories in the
//! order of their names, then its subdirectories in the same way. An inode goes to the first of the
//! last few blocks that has room, so that small ones fill the gaps that larger ones leave.

use std::collections::VecDeque;

use super::format::{self, DataLayout, FileType, INODE_BYTES, SLOT_BYTES};
use crate::rootfs::space::{BLOCK_BYTES, blocks_for};
use crate::rootfs::tree::{Body, FileData, NodeId, Tree};

/// How many partly filled blocks are looked at for an inode.
const OPEN_BLOCKS: usize = 16;

/// Inode number 0 is left out: user space takes it for "no entry" in directory listings.
const RESERVED_BYTES: u64 = 2 * SLOT_BYTES;

/// Where one inode goes.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Placement {
    pub(crate) node: NodeId,
    /// Offset in the metadata area.
    pub(crate) offset_bytes: u64,
    /// First block of directory or link content in the directory area, counted from its start.
    pub(crate) content_block: u64,
}

/// The layout of everything behind the file data.
#[derive(Debug)]
pub(crate) struct Plan {
    /// In the order of the walk; the root is first.
    pub(crate) placements: Vec<Placement>,
    /// Inode number and parent directory by node index.
    nids: Vec<u64>,
    parents: Vec<NodeId>,
    /// Blocks of the directory area.
    pub(crate) content_blocks: u64,
    /// Blocks of the metadata area.
    pub(crate) metadata_blocks: u64,
    pub(crate) has_chunked_files: bool,
}

/// The parts of an inode's representation that depend on its content.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Shape {
    pub(crate) layout: DataLayout,
    pub(crate) file_type: FileType,
    /// `i_size`.
    pub(crate) size_bytes: u64,
    /// Blocks of content outside the inode, of directories and links only.
    pub(crate) content_blocks: u64,
    /// Inode, attributes and what follows them.
    pub(crate) inode_bytes: u64,
}

/// Computes the [`Shape`] of a node.
pub(crate) fn shape(tree: &Tree, id: NodeId) -> Shape {
    let node = tree.node(id);
    let header_bytes = (INODE_BYTES + format::xattr_area_bytes(&node.metadata.xattrs)) as u64;
    let bare = |file_type, layout, size_bytes, tail_bytes| Shape {
        layout,
        file_type,
        size_bytes,
        content_blocks: 0,
        inode_bytes: header_bytes + tail_bytes,
    };
    match &node.body {
        Body::Directory(_) => {
            let size_bytes = format::directory_bytes(names(tree, id).into_iter());
            content_shape(FileType::Directory, header_bytes, size_bytes)
        }
        Body::Symlink(target) => {
            content_shape(FileType::Symlink, header_bytes, target.len() as u64)
        }
        Body::File(FileData::Inline(content)) => match content.len() as u64 {
            0 => bare(FileType::Regular, DataLayout::Plain, 0, 0),
            size => bare(FileType::Regular, DataLayout::Inline, size, size),
        },
        Body::File(FileData::Plain { size_bytes, .. }) => {
            bare(FileType::Regular, DataLayout::Plain, *size_bytes, 0)
        }
        Body::File(FileData::Chunked {
            size_bytes,
            chunk_bits,
            ..
        }) => {
            let table_bytes = 4 * chunk_count(*size_bytes, *chunk_bits);
            bare(
                FileType::Regular,
                DataLayout::Chunked,
                *size_bytes,
                table_bytes,
            )
        }
        Body::CharDevice { .. } => bare(FileType::CharDevice, DataLayout::Plain, 0, 0),
        Body::BlockDevice { .. } => bare(FileType::BlockDevice, DataLayout::Plain, 0, 0),
        Body::Fifo => bare(FileType::Fifo, DataLayout::Plain, 0, 0),
    }
}

/// Content goes behind the inode as far as it is no whole block and fits into the inode's block.
fn content_shape(file_type: FileType, header_bytes: u64, size_bytes: u64) -> Shape {
    let tail_bytes = size_bytes % BLOCK_BYTES;
    let inline = tail_bytes > 0 && header_bytes + tail_bytes <= BLOCK_BYTES;
    Shape {
        layout: if inline {
            DataLayout::Inline
        } else {
            DataLayout::Plain
        },
        file_type,
        size_bytes,
        content_blocks: if inline {
            size_bytes / BLOCK_BYTES
        } else {
            blocks_for(size_bytes)
        },
        inode_bytes: if inline {
            header_bytes + tail_bytes
        } else {
            header_bytes
        },
    }
}

/// Number of chunks of a sparse file.
pub(crate) fn chunk_count(size_bytes: u64, chunk_bits: u8) -> u64 {
    size_bytes.div_ceil(BLOCK_BYTES << chunk_bits)
}

/// All names of a directory with `.` and `..`, sorted as EROFS wants them: as bytes.
pub(crate) fn names(tree: &Tree, directory: NodeId) -> Vec<&[u8]> {
    let children = tree.children(directory);
    let mut names: Vec<&[u8]> = Vec::with_capacity(children.len() + 2);
    names.extend([b".".as_slice(), b".."]);
    names.extend(children.keys().map(|name| name.as_ref()));
    names.sort_unstable();
    names
}

impl Plan {
    /// Places every node of the tree.
    pub(crate) fn new(tree: &Tree) -> Self {
        let mut plan = Self {
            placements: Vec::with_capacity(tree.node_count()),
            nids: vec![0; tree.slot_count()],
            parents: vec![NodeId::ROOT; tree.slot_count()],
            content_blocks: 0,
            metadata_blocks: 0,
            has_chunked_files: false,
        };
        let mut room = Room::new();
        let mut pending = vec![NodeId::ROOT];
        while let Some(directory) = pending.pop() {
            plan.place(tree, directory, &mut room);
            let first_subdirectory = pending.len();
            for link in tree.children(directory).values() {
                if tree.is_directory(link.node) {
                    plan.parents[link.node.index()] = directory;
                    pending.push(link.node);
                } else if plan.nid(link.node) == 0 {
                    plan.place(tree, link.node, &mut room);
                }
            }
            pending[first_subdirectory..].reverse();
        }
        plan.metadata_blocks = room.block_count;
        plan
    }

    fn place(&mut self, tree: &Tree, node: NodeId, room: &mut Room) {
        let shape = shape(tree, node);
        let offset_bytes = room.take(shape.inode_bytes);
        self.nids[node.index()] = offset_bytes / SLOT_BYTES;
        self.placements.push(Placement {
            node,
            offset_bytes,
            content_block: self.content_blocks,
        });
        self.content_blocks += shape.content_blocks;
        self.has_chunked_files |= shape.layout == DataLayout::Chunked;
    }

    /// The inode number of a node; never 0 for one that is placed.
    pub(crate) fn nid(&self, node: NodeId) -> u64 {
        self.nids[node.index()]
    }

    /// The directory that holds a directory; the root holds itself.
    pub(crate) fn parent(&self, directory: NodeId) -> NodeId {
        self.parents[directory.index()]
    }
}

/// Free room at the ends of the most recent blocks of the metadata area.
struct Room {
    block_count: u64,
    /// Block index and bytes in use, a multiple of the slot size; oldest first.
    open: VecDeque<(u64, u64)>,
}

impl Room {
    fn new() -> Self {
        Self {
            block_count: 1,
            open: VecDeque::from([(0, RESERVED_BYTES)]),
        }
    }

    /// Room for an inode: within one block if it fits into any, else from the start of a block.
    fn take(&mut self, inode_bytes: u64) -> u64 {
        let fitting = self
            .open
            .iter()
            .position(|&(_, used)| used + inode_bytes <= BLOCK_BYTES);
        if let Some(position) = fitting {
            let (block, used) = &mut self.open[position];
            let offset_bytes = *block * BLOCK_BYTES + *used;
            *used = (*used + inode_bytes).next_multiple_of(SLOT_BYTES);
            if *used + INODE_BYTES as u64 > BLOCK_BYTES {
                self.open.remove(position);
            }
            return offset_bytes;
        }
        let first_block = self.block_count;
        self.block_count += blocks_for(inode_bytes);
        let used = (inode_bytes % BLOCK_BYTES).next_multiple_of(SLOT_BYTES);
        if used > 0 && used + INODE_BYTES as u64 <= BLOCK_BYTES {
            if self.open.len() == OPEN_BLOCKS {
                self.open.pop_front();
            }
            self.open.push_back((self.block_count - 1, used));
        }
        first_block * BLOCK_BYTES
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn room_never_overlaps_and_small_inodes_stay_in_one_block() {
        use proptest::prelude::*;
        proptest!(|(sizes in proptest::collection::vec(64u64..9000, 1..200))| {
            let mut room = Room::new();
            let mut taken = vec![(0, RESERVED_BYTES)];
            for size in sizes {
                let start = room.take(size);
                prop_assert_eq!(start % SLOT_BYTES, 0);
                prop_assert!(size > BLOCK_BYTES || start % BLOCK_BYTES + size <= BLOCK_BYTES);
                prop_assert!(start + size <= room.block_count * BLOCK_BYTES);
                taken.push((start, start + size));
            }
            taken.sort_unstable();
            prop_assert!(taken.windows(2).all(|pair| pair[0].1 <= pair[1].0));
        });
    }
}
