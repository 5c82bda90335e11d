//! What is in a pool: datasets, the objects in them, the snapshots of these; their names and their stored form.
//!
//! What an object holds is in its map, which is not read here.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use crate::compression::Compression;
use crate::error::{PoolError, Result};
use crate::layout::{OBJECT_MAX_BYTES, PagePointer, TREE_MAX_HEIGHT, Tree, read_uint};
use crate::page::PAYLOAD;

const ENTRY_BYTES: usize = 400;
const NAME_OFFSET: usize = 72;
const ORIGIN_OFFSET: usize = 328;
/// The longest name.
pub(crate) const NAME_MAX_BYTES: usize = 255;
/// Entries of a leaf.
pub(crate) const ENTRIES: u64 = (PAYLOAD / ENTRY_BYTES) as u64;

/// Identifies a dataset, object or snapshot; never used twice in a pool.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ObjectId(pub(crate) u64);

impl fmt::Display for ObjectId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// What an entry is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum EntryKind {
    Dataset = 1,
    Object = 2,
    Snapshot = 3,
    /// Removed; its map is on its way to be freed.
    Dying = 4,
}

impl EntryKind {
    pub(crate) fn from_byte(byte: u8) -> Option<Self> {
        Some(match byte {
            1 => Self::Dataset,
            2 => Self::Object,
            3 => Self::Snapshot,
            4 => Self::Dying,
            _ => return None,
        })
    }
}

/// A dataset, object or snapshot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Entry {
    pub(crate) id: u64,
    pub(crate) kind: EntryKind,
    pub(crate) parent: u64,
    pub(crate) name: String,
    pub(crate) size_bytes: u64,
    pub(crate) map: Tree,
    /// What was born until then may be shared.
    pub(crate) share_epoch: u64,
    pub(crate) created_epoch: u64,
    pub(crate) created_unix_s: i64,
    /// [`CHECKED`] and [`compression_of`], for a dataset.
    pub(crate) options: u8,
    /// Which snapshot of which pool it was received from; zeros when it was made here.
    pub(crate) origin: Origin,
}

/// Option of a dataset: its objects are never written in place, and every block has a checksum.
pub(crate) const CHECKED: u8 = 1;
/// Option of a dataset: what is written is compressed so.
const COMPRESSION: [(u8, Compression); 2] = [(2, Compression::Lz4), (4, Compression::Zstd)];
const COMPRESSION_BITS: u8 = 6;

/// Whether a dataset can have such options.
pub(crate) fn are_options(options: u8) -> bool {
    options & !(CHECKED | COMPRESSION_BITS) == 0 && options & COMPRESSION_BITS != COMPRESSION_BITS
}

/// How the options of a dataset say that what is written is compressed.
pub(crate) fn compression_of(options: u8) -> Compression {
    let mut all = COMPRESSION.into_iter();
    let found = all.find(|(bits, _)| options & COMPRESSION_BITS == *bits);
    found.map_or(Compression::Off, |(_, compression)| compression)
}

/// The options that say so.
pub(crate) fn compression_bits(compression: Compression) -> u8 {
    let mut all = COMPRESSION.into_iter();
    all.find(|(_, known)| *known == compression)
        .map_or(0, |(bits, _)| bits)
}

/// Names a snapshot among those of all pools.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Hash)]
pub(crate) struct Origin {
    pub(crate) pool_id: [u8; 16],
    pub(crate) id: u64,
}

impl Origin {
    pub(crate) const BYTES: usize = 24;

    pub(crate) fn encode(self, bytes: &mut [u8]) {
        bytes[..16].copy_from_slice(&self.pool_id);
        bytes[16..24].copy_from_slice(&self.id.to_le_bytes());
    }

    pub(crate) fn decode(bytes: &[u8]) -> Self {
        let mut pool_id = [0; 16];
        pool_id.copy_from_slice(&bytes[..16]);
        Self {
            pool_id,
            id: read_uint(&bytes[16..24]),
        }
    }
}

impl Entry {
    fn encode(&self, bytes: &mut [u8]) {
        bytes[..8].copy_from_slice(&self.id.to_le_bytes());
        bytes[8] = self.kind as u8;
        bytes[9] = self.map.height;
        bytes[10] = self.name.len() as u8;
        bytes[11] = self.options;
        bytes[16..24].copy_from_slice(&self.parent.to_le_bytes());
        bytes[24..32].copy_from_slice(&self.size_bytes.to_le_bytes());
        self.map.root.encode(&mut bytes[32..48]);
        bytes[48..56].copy_from_slice(&self.share_epoch.to_le_bytes());
        bytes[56..64].copy_from_slice(&self.created_epoch.to_le_bytes());
        bytes[64..72].copy_from_slice(&self.created_unix_s.to_le_bytes());
        bytes[NAME_OFFSET..NAME_OFFSET + self.name.len()].copy_from_slice(self.name.as_bytes());
        self.origin
            .encode(&mut bytes[ORIGIN_OFFSET..ORIGIN_OFFSET + Origin::BYTES]);
    }

    /// None where the bytes are no entry; `Some(None)` where there is none.
    fn decode(bytes: &[u8]) -> Option<Option<Self>> {
        let id = read_uint(&bytes[..8]);
        if id == 0 {
            return Some(None);
        }
        let name = bytes.get(NAME_OFFSET..NAME_OFFSET + usize::from(bytes[10]))?;
        let entry = Self {
            id,
            kind: EntryKind::from_byte(bytes[8])?,
            parent: read_uint(&bytes[16..24]),
            name: std::str::from_utf8(name).ok()?.to_owned(),
            size_bytes: read_uint(&bytes[24..32]),
            map: Tree {
                root: PagePointer::decode(&bytes[32..48]),
                height: bytes[9],
            },
            share_epoch: read_uint(&bytes[48..56]),
            created_epoch: read_uint(&bytes[56..64]),
            created_unix_s: read_uint(&bytes[64..72]) as i64,
            options: bytes[11],
            origin: Origin::decode(&bytes[ORIGIN_OFFSET..ORIGIN_OFFSET + Origin::BYTES]),
        };
        let has_name = entry.kind != EntryKind::Dying;
        let good = entry.size_bytes <= OBJECT_MAX_BYTES
            && are_options(entry.options)
            && entry.map.height <= TREE_MAX_HEIGHT
            && has_name == check_name(&entry.name).is_ok();
        good.then_some(Some(entry))
    }
}

/// Whether a text can be the name of a dataset, object or snapshot.
///
/// # Errors
///
/// [`PoolError::Name`] with the rule that it breaks.
pub fn check_name(name: &str) -> Result<()> {
    let reason = if name.is_empty() {
        "it is empty"
    } else if name.len() > NAME_MAX_BYTES {
        "it has more than 255 bytes"
    } else if name == "." || name == ".." {
        "it means a directory"
    } else if name.contains(['/', '@']) {
        "'/' and '@' separate names"
    } else if name.contains(char::is_control) {
        "it has a control character"
    } else {
        return Ok(());
    };
    Err(PoolError::Name {
        name: name.to_owned(),
        reason,
    })
}

/// All entries, by id and by name.
#[derive(Debug, Default)]
pub(crate) struct Catalog {
    entries: BTreeMap<u64, Entry>,
    names: BTreeMap<(u64, String), u64>,
    dying: BTreeSet<u64>,
    dirty_leaves: BTreeSet<u64>,
}

impl Catalog {
    pub(crate) fn get(&self, id: u64) -> Option<&Entry> {
        self.entries.get(&id)
    }

    /// An entry that must not get another name, parent or kind.
    pub(crate) fn get_mut(&mut self, id: u64) -> Option<&mut Entry> {
        let entry = self.entries.get_mut(&id)?;
        self.dirty_leaves.insert(id / ENTRIES);
        Some(entry)
    }

    pub(crate) fn find(&self, parent: u64, name: &str) -> Option<&Entry> {
        let id = self.names.get(&(parent, name.to_owned()))?;
        self.entries.get(id)
    }

    /// What is in a dataset (0: the datasets), or the snapshots of an object, by name.
    pub(crate) fn children(&self, parent: u64) -> impl Iterator<Item = &Entry> {
        let range = (parent, String::new())..(parent + 1, String::new());
        self.names
            .range(range)
            .filter_map(|(_, id)| self.entries.get(id))
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = &Entry> {
        self.entries.values()
    }

    /// An entry whose map is to be freed.
    pub(crate) fn first_dying(&self) -> Option<u64> {
        self.dying.first().copied()
    }

    pub(crate) fn insert(&mut self, entry: Entry) {
        self.dirty_leaves.insert(entry.id / ENTRIES);
        if entry.kind == EntryKind::Dying {
            self.dying.insert(entry.id);
        } else {
            self.names
                .insert((entry.parent, entry.name.clone()), entry.id);
        }
        self.entries.insert(entry.id, entry);
    }

    pub(crate) fn remove(&mut self, id: u64) -> Option<Entry> {
        let entry = self.entries.remove(&id)?;
        self.dirty_leaves.insert(id / ENTRIES);
        self.dying.remove(&id);
        if entry.kind != EntryKind::Dying {
            self.names.remove(&(entry.parent, entry.name.clone()));
        }
        Some(entry)
    }

    /// The name as users write it: `dataset/object@snapshot`.
    pub(crate) fn full_name(&self, entry: &Entry) -> String {
        let parent = self.get(entry.parent);
        match (entry.kind, parent) {
            (EntryKind::Object, Some(dataset)) => format!("{}/{}", dataset.name, entry.name),
            (EntryKind::Snapshot, Some(object)) => {
                format!("{}@{}", self.full_name(object), entry.name)
            }
            _ => entry.name.clone(),
        }
    }

    /// Takes over a stored leaf. False where it is none.
    pub(crate) fn load_leaf(&mut self, leaf: u64, payload: &[u8; PAYLOAD]) -> bool {
        for (index, bytes) in payload.chunks_exact(ENTRY_BYTES).enumerate() {
            match Entry::decode(bytes) {
                None => return false,
                Some(None) => {}
                Some(Some(entry)) if entry.id == leaf * ENTRIES + index as u64 => {
                    self.insert(entry);
                }
                Some(Some(_)) => return false,
            }
        }
        self.dirty_leaves.clear();
        true
    }

    /// Whether every entry has the parent that its kind needs.
    pub(crate) fn is_consistent(&self) -> bool {
        self.entries.values().all(|entry| {
            let parent = self.get(entry.parent).map(|parent| parent.kind);
            match entry.kind {
                EntryKind::Dataset | EntryKind::Dying => entry.parent == 0,
                EntryKind::Object => parent == Some(EntryKind::Dataset),
                EntryKind::Snapshot => parent == Some(EntryKind::Object),
            }
        })
    }

    /// The payload of a leaf; none where it has no entry.
    pub(crate) fn save_leaf(&self, leaf: u64) -> Option<Box<[u8; PAYLOAD]>> {
        let first = leaf * ENTRIES;
        let mut entries = self.entries.range(first..first + ENTRIES).peekable();
        entries.peek()?;
        let mut payload = Box::new([0; PAYLOAD]);
        for (id, entry) in entries {
            let at = (id - first) as usize * ENTRY_BYTES;
            entry.encode(&mut payload[at..at + ENTRY_BYTES]);
        }
        Some(payload)
    }

    /// A leaf that is out of date.
    pub(crate) fn first_dirty(&self) -> Option<u64> {
        self.dirty_leaves.first().copied()
    }

    /// A leaf is not out of date any more.
    pub(crate) fn set_clean(&mut self, leaf: u64) {
        self.dirty_leaves.remove(&leaf);
    }

    pub(crate) fn dirty_count(&self) -> usize {
        self.dirty_leaves.len()
    }
}
