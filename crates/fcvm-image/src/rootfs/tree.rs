//! The merged file tree of an image: nodes, names, and the rules by which layers change them.
//!
//! Only metadata and small file contents are held here; the data of larger files is somewhere in
//! the output file and the tree remembers where. Reading tar and writing EROFS are elsewhere.
//!
//! Invariants: every directory has exactly one name; the `nlink` of any other node is the number
//! of names it has; a node without a name is freed at once, and its blocks are reported through
//! [`Tree::take_freed`]. A name remembers the layer that last touched it, because whiteouts hide
//! what lower layers hold and never what their own layer holds, whatever the order of members.

use std::cell::Cell;
use std::collections::BTreeMap;

use super::error::{Refusal, ShownPath};
use super::layer::{Timestamp, Xattr};

/// Follows as many symbolic links in one lookup as Linux does.
const MAX_SYMLINK_HOPS: usize = 40;

/// Rough memory cost of a node and of a name, for the caller's limit on metadata.
const NODE_COST_BYTES: u64 = 160;
const LINK_COST_BYTES: u64 = 48;

/// Index of a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct NodeId(u32);

impl NodeId {
    /// The root directory.
    pub(crate) const ROOT: NodeId = NodeId(0);

    /// The index as an array index; below [`Tree::slot_count`].
    pub(crate) fn index(self) -> usize {
        self.0 as usize
    }
}

/// What every kind of node has.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Metadata {
    /// Permission bits, at most `0o7777`.
    pub(crate) mode: u16,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) mtime: Timestamp,
    /// Sorted by name, each name once.
    pub(crate) xattrs: Box<[Xattr]>,
}

impl Metadata {
    fn cost_bytes(&self) -> u64 {
        self.xattrs
            .iter()
            .map(|xattr| (xattr.name.len() + xattr.value.len() + 32) as u64)
            .sum()
    }
}

/// A run of blocks of the output file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Extent {
    pub(crate) start_block: u32,
    pub(crate) block_count: u32,
}

/// Where the content of a regular file is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum FileData {
    /// Small content, kept in memory until its inode is written.
    Inline(Box<[u8]>),
    /// In consecutive blocks.
    Plain { size_bytes: u64, extent: Extent },
    /// A file with holes, in chunks of `1 << chunk_bits` blocks.
    Chunked {
        size_bytes: u64,
        chunk_bits: u8,
        extent: Extent,
        runs: Box<[ChunkRun]>,
    },
}

/// Chunks `first_chunk..first_chunk + chunk_count` of a sparse file are at `start_block`,
/// one after the other; chunks in no run are holes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct ChunkRun {
    pub(crate) first_chunk: u32,
    pub(crate) chunk_count: u32,
    pub(crate) start_block: u32,
}

/// What a node is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Body {
    Directory(BTreeMap<Box<[u8]>, Link>),
    File(FileData),
    Symlink(Box<[u8]>),
    CharDevice { major: u32, minor: u32 },
    BlockDevice { major: u32, minor: u32 },
    Fifo,
}

impl Body {
    fn cost_bytes(&self) -> u64 {
        match self {
            Body::File(FileData::Inline(content)) => content.len() as u64,
            Body::File(FileData::Chunked { runs, .. }) => runs.len() as u64 * 12,
            Body::Symlink(target) => target.len() as u64,
            _ => 0,
        }
    }
}

/// A name in a directory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Link {
    pub(crate) node: NodeId,
    /// The layer that last wrote this name.
    layer: u32,
}

/// A file system object.
#[derive(Debug, Clone)]
pub(crate) struct Node {
    pub(crate) metadata: Metadata,
    pub(crate) body: Body,
    /// Number of names; 1 for every directory.
    pub(crate) name_count: u32,
    /// For directories: the layer that already removed everything lower layers hold below it.
    purged_by: Option<u32>,
}

/// The tree; see the module's text for its invariants.
#[derive(Debug)]
pub(crate) struct Tree {
    slots: Vec<Option<Node>>,
    vacant: Vec<NodeId>,
    freed: Vec<Extent>,
    memory_bytes: u64,
    lookup_count: Cell<u64>,
}

/// Metadata of a directory that no layer describes: the root before any entry for it, and the
/// parents that a member needs but its layer does not list.
pub(crate) fn implied_directory() -> Metadata {
    Metadata {
        mode: 0o755,
        ..Metadata::default()
    }
}

impl Tree {
    pub(crate) fn new() -> Self {
        let mut tree = Self {
            slots: Vec::new(),
            vacant: Vec::new(),
            freed: Vec::new(),
            memory_bytes: 0,
            lookup_count: Cell::new(0),
        };
        let root = tree.allocate(implied_directory(), Body::Directory(BTreeMap::new()));
        tree.node_mut(root).name_count = 1;
        tree
    }

    /// One more than the highest index of any node.
    pub(crate) fn slot_count(&self) -> usize {
        self.slots.len()
    }

    /// Number of nodes.
    pub(crate) fn node_count(&self) -> usize {
        self.slots.len() - self.vacant.len()
    }

    /// Estimate of the memory that nodes, names and contents take.
    pub(crate) fn memory_bytes(&self) -> u64 {
        self.memory_bytes
    }

    /// Path components looked up so far. A short member can cause many lookups through symbolic
    /// links, so the caller bounds them.
    pub(crate) fn lookup_count(&self) -> u64 {
        self.lookup_count.get()
    }

    /// Blocks of files that lost their last name since the last call.
    pub(crate) fn take_freed(&mut self) -> Vec<Extent> {
        std::mem::take(&mut self.freed)
    }

    pub(crate) fn node(&self, id: NodeId) -> &Node {
        self.slots[id.index()]
            .as_ref()
            .expect("a name always leads to a node")
    }

    fn node_mut(&mut self, id: NodeId) -> &mut Node {
        self.slots[id.index()]
            .as_mut()
            .expect("a name always leads to a node")
    }

    pub(crate) fn children(&self, directory: NodeId) -> &BTreeMap<Box<[u8]>, Link> {
        match &self.node(directory).body {
            Body::Directory(children) => children,
            _ => unreachable!("only directories are looked into"),
        }
    }

    fn children_mut(&mut self, directory: NodeId) -> &mut BTreeMap<Box<[u8]>, Link> {
        match &mut self.node_mut(directory).body {
            Body::Directory(children) => children,
            _ => unreachable!("only directories are looked into"),
        }
    }

    pub(crate) fn is_directory(&self, id: NodeId) -> bool {
        matches!(self.node(id).body, Body::Directory(_))
    }

    /// The node called `name` in `directory`.
    pub(crate) fn child(&self, directory: NodeId, name: &[u8]) -> Option<NodeId> {
        self.children(directory).get(name).map(|link| link.node)
    }

    /// Walks to the directory at `path`, following symbolic links inside the image; absolute link
    /// targets start at its root. `None` when a component does not exist.
    pub(crate) fn find_directory(&self, path: &[&[u8]]) -> Result<Option<NodeId>, Refusal> {
        match self.walk(path)? {
            Walk::Found(id) => Ok(Some(id)),
            Walk::Missing { .. } => Ok(None),
        }
    }

    /// As [`find_directory`](Self::find_directory), creating what is missing for `layer`.
    pub(crate) fn make_directories(
        &mut self,
        path: &[&[u8]],
        layer: u32,
    ) -> Result<NodeId, Refusal> {
        match self.walk(path)? {
            Walk::Found(id) => Ok(id),
            Walk::Missing {
                mut directory,
                rest,
            } => {
                for name in rest {
                    if *name == *b".." {
                        // Behind a component that does not exist yet; Linux would not go there.
                        return Err(Refusal::LinkClimbsOut);
                    }
                    if name.len() > super::path::MAX_NAME_BYTES {
                        return Err(Refusal::NameTooLong(name.len()));
                    }
                    let body = Body::Directory(BTreeMap::new());
                    let created = self.allocate(implied_directory(), body);
                    self.attach(directory, &name, created, layer);
                    directory = created;
                }
                Ok(directory)
            }
        }
    }

    fn walk(&self, path: &[&[u8]]) -> Result<Walk, Refusal> {
        // Innermost directory last; the root is never popped.
        let mut trail = vec![NodeId::ROOT];
        // Components still to go, next one last.
        let mut pending: Vec<&[u8]> = path.iter().rev().copied().collect();
        let mut hops = 0;
        while let Some(name) = pending.pop() {
            self.lookup_count.set(self.lookup_count.get() + 1);
            let here = trail[trail.len() - 1];
            if name == b".." {
                trail.pop();
                if trail.is_empty() {
                    return Err(Refusal::LinkClimbsOut);
                }
                continue;
            }
            let Some(child) = self.child(here, name) else {
                pending.push(name);
                let rest = pending.iter().rev().map(|&name| Box::from(name)).collect();
                return Ok(Walk::Missing {
                    directory: here,
                    rest,
                });
            };
            match &self.node(child).body {
                Body::Directory(_) => trail.push(child),
                Body::Symlink(target) => {
                    hops += 1;
                    if hops > MAX_SYMLINK_HOPS {
                        return Err(Refusal::SymlinkLoop);
                    }
                    if target.starts_with(b"/") {
                        trail.truncate(1);
                    }
                    let components = target.split(|&byte| byte == b'/');
                    pending.extend(components.rev().filter(|name| !matches!(*name, b"" | b".")));
                }
                _ => return Err(Refusal::ParentNotDirectory(ShownPath::new(name))),
            }
        }
        Ok(Walk::Found(trail[trail.len() - 1]))
    }

    /// Writes `directory/name` for `layer`. A directory over a directory changes its metadata and
    /// keeps what is in it; everything else replaces what was there.
    pub(crate) fn put(
        &mut self,
        directory: NodeId,
        name: &[u8],
        metadata: Metadata,
        body: Body,
        layer: u32,
    ) {
        if let Some(existing) = self.child(directory, name) {
            if self.is_directory(existing) && matches!(body, Body::Directory(_)) {
                self.set_metadata(existing, metadata);
                let link = self
                    .children_mut(directory)
                    .get_mut(name)
                    .expect("just found");
                link.layer = layer;
                return;
            }
            self.remove(directory, name);
        }
        let node = self.allocate(metadata, body);
        self.attach(directory, name, node, layer);
    }

    /// Replaces the metadata of a directory.
    pub(crate) fn set_metadata(&mut self, id: NodeId, metadata: Metadata) {
        self.memory_bytes += metadata.cost_bytes();
        let old = std::mem::replace(&mut self.node_mut(id).metadata, metadata);
        self.memory_bytes -= old.cost_bytes();
    }

    /// Gives `target`, which is no directory, another name.
    pub(crate) fn put_hard_link(
        &mut self,
        directory: NodeId,
        name: &[u8],
        target: NodeId,
        layer: u32,
    ) {
        if let Some(link) = self.children_mut(directory).get_mut(name)
            && link.node == target
        {
            link.layer = layer;
            return;
        }
        // Counted first: the name that is replaced may be a directory that holds the target.
        self.node_mut(target).name_count += 1;
        self.remove(directory, name);
        self.node_mut(target).name_count -= 1;
        self.attach(directory, name, target, layer);
    }

    /// Removes `directory/name` and everything below it, if it exists.
    pub(crate) fn remove(&mut self, directory: NodeId, name: &[u8]) {
        let Some((key, link)) = self.children_mut(directory).remove_entry(name) else {
            return;
        };
        self.memory_bytes -= LINK_COST_BYTES + key.len() as u64;
        let mut unlinked = vec![link.node];
        while let Some(id) = unlinked.pop() {
            let node = self.node_mut(id);
            node.name_count -= 1;
            if node.name_count > 0 {
                continue;
            }
            let node = self.release(id);
            if let Body::Directory(children) = node.body {
                for (key, link) in children {
                    self.memory_bytes -= LINK_COST_BYTES + key.len() as u64;
                    unlinked.push(link.node);
                }
            }
        }
    }

    /// A whiteout in `layer`: removes what lower layers hold at `directory/name`.
    pub(crate) fn white_out(&mut self, directory: NodeId, name: &[u8], layer: u32) {
        let Some(&link) = self.children(directory).get(name) else {
            return;
        };
        if self.is_directory(link.node) {
            self.purge(link.node, layer);
        }
        self.hide(directory, name, link, layer);
    }

    /// An opaque marker in `layer`: removes what lower layers hold below `directory`.
    pub(crate) fn purge(&mut self, directory: NodeId, layer: u32) {
        // Parents come before their children. A directory that this layer purged before holds
        // nothing of lower layers any more, so the work of all markers together stays linear.
        let mut directories = Vec::new();
        let mut pending = vec![directory];
        while let Some(id) = pending.pop() {
            if self.node(id).purged_by == Some(layer) {
                continue;
            }
            self.node_mut(id).purged_by = Some(layer);
            directories.push(id);
            let links = self.children(id).values();
            pending.extend(
                links
                    .map(|link| link.node)
                    .filter(|&node| self.is_directory(node)),
            );
        }
        for &id in directories.iter().rev() {
            let lower: Vec<(Box<[u8]>, Link)> = self
                .children(id)
                .iter()
                .filter(|(_, link)| link.layer != layer)
                .map(|(name, link)| (name.clone(), *link))
                .collect();
            for (name, link) in lower {
                self.hide(id, &name, link, layer);
            }
        }
    }

    /// Removes a name that a lower layer wrote. A directory that holds something of `layer`, which
    /// can be there before its whiteout, becomes the implied directory that it would be had the
    /// whiteout come first.
    fn hide(&mut self, directory: NodeId, name: &[u8], link: Link, layer: u32) {
        if link.layer == layer {
            return;
        }
        if !self.holds_entries(link.node) {
            self.remove(directory, name);
            return;
        }
        self.set_metadata(link.node, implied_directory());
        if let Some(link) = self.children_mut(directory).get_mut(name) {
            link.layer = layer;
        }
    }

    fn holds_entries(&self, id: NodeId) -> bool {
        matches!(&self.node(id).body, Body::Directory(children) if !children.is_empty())
    }

    fn allocate(&mut self, metadata: Metadata, body: Body) -> NodeId {
        self.memory_bytes += NODE_COST_BYTES + metadata.cost_bytes() + body.cost_bytes();
        let node = Node {
            metadata,
            body,
            name_count: 0,
            purged_by: None,
        };
        if let Some(id) = self.vacant.pop() {
            self.slots[id.index()] = Some(node);
            return id;
        }
        // The caller's limit on members keeps the count far below `u32::MAX`.
        let id = NodeId(self.slots.len() as u32);
        self.slots.push(Some(node));
        id
    }

    fn attach(&mut self, directory: NodeId, name: &[u8], node: NodeId, layer: u32) {
        self.memory_bytes += LINK_COST_BYTES + name.len() as u64;
        self.node_mut(node).name_count += 1;
        self.children_mut(directory)
            .insert(name.into(), Link { node, layer });
    }

    fn release(&mut self, id: NodeId) -> Node {
        let node = self.slots[id.index()].take().expect("a node is freed once");
        self.vacant.push(id);
        self.memory_bytes -= NODE_COST_BYTES + node.metadata.cost_bytes() + node.body.cost_bytes();
        if let Body::File(FileData::Plain { extent, .. } | FileData::Chunked { extent, .. }) =
            &node.body
            && extent.block_count > 0
        {
            self.freed.push(*extent);
        }
        node
    }
}

enum Walk {
    Found(NodeId),
    Missing {
        directory: NodeId,
        rest: Vec<Box<[u8]>>,
    },
}
