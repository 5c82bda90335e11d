//! Applies layers to the tree: each member by the rules of the OCI image specification, its data
//! to the output file.
//!
//! What a path means is in `path`, what happens to the tree in `tree`; this module connects them
//! and keeps the caller's limits.

use std::io::{self, BufRead};

use super::Limits;
use super::erofs::format;
use super::error::{LayerName, Refusal, RootfsError, ShownPath};
use super::layer::{LayerError, LayerReader, Member, MemberKind, Segment, Xattr};
use super::path::{self, MemberPath};
use super::space::{BLOCK_BYTES, Space, SpaceError, blocks_for};
use super::tree::{Body, ChunkRun, Extent, FileData, Metadata, NodeId, Tree};
use crate::progress::one_line;

/// Small files are kept in memory until their inodes are written; after this many bytes of them
/// in one image, further ones go to blocks of their own. Part of the format.
const INLINE_BUDGET_BYTES: u64 = 64 * 1024 * 1024;

/// Sparse files get the smallest chunks with which their table has at most this many entries.
const MAX_CHUNKS: u64 = 1 << 18;
/// Largest chunk the format can express, as a power of two of blocks.
const MAX_CHUNK_BITS: u8 = 31;

/// Path components that may be looked up per member allowed: far above what any image needs, and
/// a bound on the time that a few members can cost through chains of symbolic links.
const MAX_LOOKUPS_PER_MEMBER: u64 = 128;

/// How much of the tar parser's messages is shown.
const MAX_REASON_CHARS: usize = 160;

/// Longest text of a symbolic link in Linux.
const MAX_SYMLINK_BYTES: usize = 4095;

/// Failure to apply a layer.
pub(super) enum MergeError {
    /// The stream failed and knows why.
    Source,
    /// The layer's content is at fault; a wrong digest would explain it better.
    Content(RootfsError),
    /// Anything else.
    Other(RootfsError),
}

/// Failure of one member, before the layer's and member's names are added.
enum Fault {
    Refused(Refusal),
    Layer(LayerError),
    Space(SpaceError),
    Limit { what: &'static str, limit: u64 },
}

impl From<Refusal> for Fault {
    fn from(refusal: Refusal) -> Self {
        Self::Refused(refusal)
    }
}

impl From<LayerError> for Fault {
    fn from(error: LayerError) -> Self {
        Self::Layer(error)
    }
}

impl From<SpaceError> for Fault {
    fn from(error: SpaceError) -> Self {
        Self::Space(error)
    }
}

impl From<io::Error> for Fault {
    fn from(error: io::Error) -> Self {
        Self::Space(SpaceError::Io(error))
    }
}

/// The state that layers are applied to, from the bottom one to the top one.
pub(super) struct Merge<'a> {
    pub(super) tree: Tree,
    pub(super) space: Space<'a>,
    pub(super) skipped_xattr_count: u64,
    limits: &'a Limits,
    member_count: u64,
    inline_left_bytes: u64,
}

impl<'a> Merge<'a> {
    pub(super) fn new(space: Space<'a>, limits: &'a Limits) -> Self {
        Self {
            tree: Tree::new(),
            space,
            skipped_xattr_count: 0,
            limits,
            member_count: 0,
            inline_left_bytes: INLINE_BUDGET_BYTES,
        }
    }

    /// Applies one layer from its uncompressed bytes.
    pub(super) fn apply(
        &mut self,
        source: impl BufRead,
        name: LayerName,
    ) -> Result<(), MergeError> {
        let mut reader = LayerReader::new(source, self.limits);
        let mut last_path = Vec::new();
        loop {
            let fault = match reader.next_member() {
                Ok(None) => return Ok(()),
                Ok(Some(member)) => {
                    last_path.clone_from(&member.path);
                    match self.apply_member(&mut reader, member, name.index as u32) {
                        Ok(()) => continue,
                        Err(fault) => fault,
                    }
                }
                Err(error) => Fault::Layer(error),
            };
            return Err(self.explain(fault, name, &last_path));
        }
    }

    fn explain(&self, fault: Fault, layer: LayerName, last_path: &[u8]) -> MergeError {
        let refused = |path: &[u8], reason| {
            MergeError::Content(RootfsError::Member {
                layer,
                member: ShownPath::new(path),
                reason,
            })
        };
        match fault {
            Fault::Refused(reason) => refused(last_path, reason),
            Fault::Layer(LayerError::Member { path, reason }) => refused(&path, reason),
            Fault::Layer(LayerError::Tar(reason)) => MergeError::Content(RootfsError::Tar {
                layer,
                member: ShownPath::new(last_path),
                // Some of the parser's messages quote what they found, however long it is.
                reason: one_line(&reason, MAX_REASON_CHARS),
            }),
            Fault::Layer(LayerError::Io(_)) => MergeError::Source,
            Fault::Space(SpaceError::Io(source)) => {
                MergeError::Other(RootfsError::Write { source })
            }
            Fault::Space(SpaceError::Full) => MergeError::Other(RootfsError::Limit {
                layer,
                what: "bytes",
                limit: self.limits.max_image_bytes,
            }),
            Fault::Limit { what, limit } => {
                MergeError::Other(RootfsError::Limit { layer, what, limit })
            }
        }
    }

    fn apply_member<R: BufRead>(
        &mut self,
        reader: &mut LayerReader<R>,
        mut member: Member,
        layer: u32,
    ) -> Result<(), Fault> {
        self.member_count += 1;
        if self.member_count > self.limits.max_members {
            return Err(Fault::Limit {
                what: "members",
                limit: self.limits.max_members,
            });
        }
        let member_path = std::mem::take(&mut member.path);
        match path::classify(&member_path, self.limits.max_path_bytes)? {
            MemberPath::Bookkeeping => {}
            MemberPath::Opaque { directory } => {
                if let Some(directory) = self.hidden_directory(&directory)? {
                    self.tree.purge(directory, layer);
                }
            }
            MemberPath::Whiteout { parent, name } => {
                if let Some(parent) = self.hidden_directory(&parent)? {
                    self.tree.white_out(parent, name, layer);
                }
            }
            MemberPath::Root => {
                if member.kind != MemberKind::Directory {
                    return Err(Refusal::ReplacesRoot.into());
                }
                let metadata = self.metadata(&mut member)?;
                self.tree.set_metadata(NodeId::ROOT, metadata);
            }
            MemberPath::Entry { parent, name } => {
                let directory = self.tree.make_directories(&parent, layer)?;
                self.put(reader, member, directory, name, layer)?;
            }
        }
        self.reclaim();
        let max_lookups = self
            .limits
            .max_members
            .saturating_mul(MAX_LOOKUPS_PER_MEMBER);
        if self.tree.lookup_count() > max_lookups {
            return Err(Fault::Limit {
                what: "path components to look up",
                limit: max_lookups,
            });
        }
        if self.tree.memory_bytes() > self.limits.max_metadata_bytes {
            let limit = self.limits.max_metadata_bytes;
            return Err(Fault::Limit {
                what: "bytes of metadata",
                limit,
            });
        }
        Ok(())
    }

    /// The directory of a whiteout; where there is none, there is nothing to hide.
    fn hidden_directory(&self, path: &[&[u8]]) -> Result<Option<NodeId>, Refusal> {
        match self.tree.find_directory(path) {
            Err(Refusal::ParentNotDirectory(_)) => Ok(None),
            found => found,
        }
    }

    fn put<R: BufRead>(
        &mut self,
        reader: &mut LayerReader<R>,
        mut member: Member,
        directory: NodeId,
        name: &[u8],
        layer: u32,
    ) -> Result<(), Fault> {
        let metadata = self.metadata(&mut member)?;
        let body = match member.kind {
            MemberKind::HardLink { target } => {
                let target = self.hard_link_target(&target)?;
                self.tree.put_hard_link(directory, name, target, layer);
                return Ok(());
            }
            MemberKind::File { size_bytes } => {
                // Removed first, so that the new content can have the blocks of the old one.
                self.tree.remove(directory, name);
                self.reclaim();
                Body::File(self.store(reader, size_bytes, &metadata)?)
            }
            MemberKind::Sparse {
                size_bytes,
                segments,
            } => Body::File(self.store_sparse(reader, size_bytes, &segments, &metadata)?),
            MemberKind::Symlink { target } => {
                if target.is_empty() || target.len() > MAX_SYMLINK_BYTES {
                    return Err(Refusal::LinkTarget(target.len()).into());
                }
                if target.contains(&0) {
                    return Err(Refusal::NulByte.into());
                }
                Body::Symlink(target.into())
            }
            MemberKind::Directory => Body::Directory(Default::default()),
            MemberKind::CharDevice { major, minor } => Body::CharDevice { major, minor },
            MemberKind::BlockDevice { major, minor } => Body::BlockDevice { major, minor },
            MemberKind::Fifo => Body::Fifo,
        };
        self.tree.put(directory, name, metadata, body, layer);
        Ok(())
    }

    fn reclaim(&mut self) {
        for extent in self.tree.take_freed() {
            self.space.free(extent);
        }
    }

    fn hard_link_target(&self, target: &[u8]) -> Result<NodeId, Refusal> {
        let shown = || ShownPath::new(target);
        if target.is_empty() {
            return Err(Refusal::LinkTarget(0));
        }
        let mut directory = path::components(target, self.limits.max_path_bytes)?;
        let name = directory
            .pop()
            .ok_or_else(|| Refusal::HardLinkToDirectory(shown()))?;
        let node = match self.tree.find_directory(&directory)? {
            Some(directory) => self.tree.child(directory, name),
            None => None,
        };
        let node = node.ok_or_else(|| Refusal::HardLinkMissing(shown()))?;
        if self.tree.is_directory(node) {
            return Err(Refusal::HardLinkToDirectory(shown()));
        }
        Ok(node)
    }

    fn metadata(&mut self, member: &mut Member) -> Result<Metadata, Refusal> {
        let xattrs = std::mem::take(&mut member.xattrs);
        // Linux has no permissions on symbolic links; archives say what they like.
        let is_symlink = matches!(member.kind, MemberKind::Symlink { .. });
        Ok(Metadata {
            mode: if is_symlink { 0o777 } else { member.mode },
            uid: member.uid,
            gid: member.gid,
            mtime: member.mtime,
            xattrs: self.kept_xattrs(xattrs)?,
        })
    }

    /// Drops attributes that no Linux file system could hold and those by which overlayfs would
    /// take the root image for one of its own layers; sorts the others.
    fn kept_xattrs(&mut self, xattrs: Vec<Xattr>) -> Result<Box<[Xattr]>, Refusal> {
        let count = xattrs.len();
        let mut kept: Vec<Xattr> = xattrs
            .into_iter()
            .filter(|xattr| format::xattr_index(&xattr.name).is_some())
            .filter(|xattr| !xattr.name.starts_with(b"trusted.overlay."))
            .collect();
        self.skipped_xattr_count += (count - kept.len()) as u64;
        // The sort is stable: of equal names the last stays, which is the one that counts.
        kept.sort_by(|a, b| a.name.cmp(&b.name));
        kept.reverse();
        kept.dedup_by(|a, b| a.name == b.name);
        kept.reverse();
        let too_large = |size_bytes, limit_bytes| Refusal::XattrsTooLarge {
            size_bytes,
            limit_bytes,
        };
        let largest = kept
            .iter()
            .map(|xattr| xattr.value.len())
            .max()
            .unwrap_or(0);
        if largest > format::MAX_XATTR_VALUE_BYTES {
            return Err(too_large(largest, format::MAX_XATTR_VALUE_BYTES));
        }
        let area_bytes = format::xattr_area_bytes(&kept);
        if area_bytes > format::MAX_XATTR_AREA_BYTES {
            return Err(too_large(area_bytes, format::MAX_XATTR_AREA_BYTES));
        }
        Ok(kept.into())
    }

    /// Whether a file of this size goes into its inode's block.
    fn inline(&mut self, size_bytes: u64, metadata: &Metadata) -> bool {
        let header_bytes = format::INODE_BYTES + format::xattr_area_bytes(&metadata.xattrs);
        let inline =
            header_bytes as u64 + size_bytes <= BLOCK_BYTES && size_bytes <= self.inline_left_bytes;
        if inline {
            self.inline_left_bytes -= size_bytes;
        }
        inline || size_bytes == 0
    }

    fn store<R: BufRead>(
        &mut self,
        reader: &mut LayerReader<R>,
        size_bytes: u64,
        metadata: &Metadata,
    ) -> Result<FileData, Fault> {
        if self.inline(size_bytes, metadata) {
            let mut content = Vec::with_capacity(size_bytes as usize);
            reader.read_data::<Fault>(|bytes| {
                content.extend_from_slice(bytes);
                Ok(())
            })?;
            return Ok(FileData::Inline(content.into()));
        }
        let extent = self.space.allocate(blocks_for(size_bytes))?;
        let mut at_bytes = u64::from(extent.start_block) * BLOCK_BYTES;
        reader.read_data::<Fault>(|bytes| {
            self.space.write(at_bytes, bytes)?;
            at_bytes += bytes.len() as u64;
            Ok(())
        })?;
        self.space.pad_block(at_bytes)?;
        Ok(FileData::Plain { size_bytes, extent })
    }

    fn store_sparse<R: BufRead>(
        &mut self,
        reader: &mut LayerReader<R>,
        size_bytes: u64,
        segments: &[Segment],
        metadata: &Metadata,
    ) -> Result<FileData, Fault> {
        if let [whole] = segments
            && whole.length_bytes == size_bytes
        {
            return self.store(reader, size_bytes, metadata);
        }
        if size_bytes == 0 {
            return Ok(FileData::Inline(Box::default()));
        }
        let chunk_bits = chunk_bits_for(size_bytes)?;
        let mut runs = chunk_runs(size_bytes, segments, chunk_bits);
        let block_count = runs
            .iter()
            .map(|run| run_blocks(run, size_bytes, chunk_bits))
            .sum();
        // Never from used blocks: what no segment covers must read as zeros.
        let extent = self.space.allocate_fresh(block_count)?;
        place_runs(&mut runs, extent, size_bytes, chunk_bits);
        self.write_segments(reader, segments, &runs, chunk_bits)?;
        Ok(FileData::Chunked {
            size_bytes,
            chunk_bits,
            extent,
            runs: runs.into(),
        })
    }

    fn write_segments<R: BufRead>(
        &mut self,
        reader: &mut LayerReader<R>,
        segments: &[Segment],
        runs: &[ChunkRun],
        chunk_bits: u8,
    ) -> Result<(), Fault> {
        let mut segments = segments.iter();
        let mut runs = runs.iter().peekable();
        let (mut at_bytes, mut left_bytes) = (0u64, 0u64);
        let chunk_bytes = BLOCK_BYTES << chunk_bits;
        reader.read_data::<Fault>(|mut bytes| {
            while !bytes.is_empty() {
                if left_bytes == 0 {
                    // The reader hands out exactly the bytes of all segments, and each of them
                    // lies within one run.
                    let segment = segments.next().ok_or(Refusal::SparseMap)?;
                    let chunk = segment.offset_bytes / chunk_bytes;
                    let within =
                        |run: &ChunkRun| chunk < u64::from(run.first_chunk + run.chunk_count);
                    while runs.peek().is_some_and(|run| !within(run)) {
                        runs.next();
                    }
                    let run = runs.peek().ok_or(Refusal::SparseMap)?;
                    let run_start_bytes = u64::from(run.first_chunk) * chunk_bytes;
                    at_bytes = u64::from(run.start_block) * BLOCK_BYTES
                        + (segment.offset_bytes - run_start_bytes);
                    left_bytes = segment.length_bytes;
                }
                let length = (bytes.len() as u64).min(left_bytes);
                let (now, later) = bytes.split_at(length as usize);
                self.space.write(at_bytes, now)?;
                at_bytes += length;
                left_bytes -= length;
                bytes = later;
            }
            Ok(())
        })
    }
}

fn chunk_bits_for(size_bytes: u64) -> Result<u8, Refusal> {
    (0..=MAX_CHUNK_BITS)
        .find(|bits| size_bytes.div_ceil(BLOCK_BYTES << bits) <= MAX_CHUNKS)
        .filter(|_| i64::try_from(size_bytes).is_ok())
        .ok_or(Refusal::FileTooLarge(size_bytes))
}

/// The chunks that segments touch, as runs without addresses yet.
fn chunk_runs(size_bytes: u64, segments: &[Segment], chunk_bits: u8) -> Vec<ChunkRun> {
    let chunk_bytes = BLOCK_BYTES << chunk_bits;
    let mut runs: Vec<ChunkRun> = Vec::new();
    for segment in segments {
        debug_assert!(segment.offset_bytes + segment.length_bytes <= size_bytes);
        // Below MAX_CHUNKS by the choice of the chunk size.
        let first = (segment.offset_bytes / chunk_bytes) as u32;
        let end = (segment.offset_bytes + segment.length_bytes).div_ceil(chunk_bytes) as u32;
        match runs.last_mut() {
            Some(run) if first <= run.first_chunk + run.chunk_count => {
                run.chunk_count = run.chunk_count.max(end - run.first_chunk);
            }
            _ => runs.push(ChunkRun {
                first_chunk: first,
                chunk_count: end - first,
                start_block: 0,
            }),
        }
    }
    runs
}

/// Blocks of a run; the last chunk of a file ends with the file.
fn run_blocks(run: &ChunkRun, size_bytes: u64, chunk_bits: u8) -> u64 {
    let start = u64::from(run.first_chunk) << chunk_bits;
    let end = (u64::from(run.first_chunk) + u64::from(run.chunk_count)) << chunk_bits;
    end.min(blocks_for(size_bytes)) - start
}

fn place_runs(runs: &mut [ChunkRun], extent: Extent, size_bytes: u64, chunk_bits: u8) {
    let mut next_block = extent.start_block;
    for run in runs {
        run.start_block = next_block;
        next_block += run_blocks(run, size_bytes, chunk_bits) as u32;
    }
}
