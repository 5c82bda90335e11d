//! Pages of metadata: their types, and their bytes as in docs/format/pool.md.

use crate::compression::{Method, PACKED_BLOCKS_MAX};
use crate::error::{PoolError, Result};
use crate::layout::{BLOCK, Extent, PagePointer, RECORD_BLOCKS, TREE_MAX_HEIGHT, read_uint};

/// Bytes of a page behind its header.
pub(crate) const PAYLOAD: usize = BLOCK - HEADER;
/// Children of an inner page.
pub(crate) const FANOUT: usize = PAYLOAD / PagePointer::BYTES;
/// Slots of a map leaf.
pub(crate) const SLOTS: usize = PAYLOAD / Slot::BYTES;

const HEADER: usize = 32;
const MAGIC: [u8; 4] = *b"BPPG";

/// What a page holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum PageKind {
    Inner = 1,
    Map = 2,
    Entries = 3,
    Space = 4,
    RecordReferences = 5,
    PageReferences = 6,
    Sums = 7,
}

/// Where in a record of the pool a compressed record is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Packed {
    pub(crate) method: Method,
    /// First block and number of blocks, in the record.
    pub(crate) first: u8,
    pub(crate) count: u8,
}

/// Where a record of an object is, or a part of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct RecordPointer {
    /// Record number; 0: no pointer.
    pub(crate) record: u64,
    /// Which blocks are there.
    pub(crate) map: u16,
    /// Another slot may point to the record.
    pub(crate) is_shared: bool,
    /// It is compressed.
    pub(crate) packed: Option<Packed>,
    /// The epoch in which it got here.
    pub(crate) birth: u64,
}

impl RecordPointer {
    const SHARED: u8 = 1;
    const LZ4: u8 = 2;
    const ZSTD: u8 = 4;

    pub(crate) fn is_null(self) -> bool {
        self.record == 0
    }

    /// The pointer to data that was written to an extent.
    pub(crate) fn to(extent: Extent, map: u16, is_shared: bool, method: Option<Method>) -> Self {
        Self {
            record: extent.record(),
            map,
            is_shared,
            packed: method.map(|method| Packed {
                method,
                first: (extent.first_block % RECORD_BLOCKS) as u8,
                count: extent.block_count as u8,
            }),
            birth: 0,
        }
    }

    /// What it leads to, if it is one.
    pub(crate) fn extent(self) -> Option<Extent> {
        let extent = match self.packed {
            None => Extent::of_record(self.record),
            Some(packed) => Extent {
                first_block: self.record * RECORD_BLOCKS + u64::from(packed.first),
                block_count: u64::from(packed.count),
            },
        };
        (!self.is_null()).then_some(extent)
    }

    /// The blocks on the disk that what is seen through it depends on, as bits of those of the record.
    pub(crate) fn used_bits(self) -> u16 {
        match (self.packed, self.extent()) {
            (Some(_), Some(extent)) => extent.bits(),
            _ => self.map,
        }
    }

    /// The pointer without some of its blocks; none when none is left.
    pub(crate) fn without(self, blocks: u16) -> Self {
        match self.map & !blocks {
            0 => Self::default(),
            map => Self { map, ..self },
        }
    }

    fn encode(self, bytes: &mut [u8]) {
        bytes[..5].copy_from_slice(&self.record.to_le_bytes()[..5]);
        bytes[5..7].copy_from_slice(&self.map.to_le_bytes());
        bytes[7] = if self.is_shared { Self::SHARED } else { 0 };
        if let Some(packed) = self.packed {
            bytes[7] |= match packed.method {
                Method::Lz4 => Self::LZ4,
                Method::Zstd => Self::ZSTD,
            };
            bytes[14] = packed.first | (packed.count - 1) << 4;
        }
        bytes[8..14].copy_from_slice(&self.birth.to_le_bytes()[..6]);
    }

    fn decode(bytes: &[u8]) -> Option<Self> {
        let method = match bytes[7] & !Self::SHARED {
            0 if bytes[14] == 0 => None,
            Self::LZ4 => Some(Method::Lz4),
            Self::ZSTD => Some(Method::Zstd),
            _ => return None,
        };
        let packed = method.map(|method| Packed {
            method,
            first: bytes[14] & 15,
            count: (bytes[14] >> 4) + 1,
        });
        let fits = packed.is_none_or(|packed| {
            u64::from(packed.count) <= PACKED_BLOCKS_MAX
                && u64::from(packed.first + packed.count) <= RECORD_BLOCKS
                && bytes[7] & Self::SHARED != 0
        });
        let found = Self {
            record: read_uint(&bytes[..5]),
            map: read_uint(&bytes[5..7]) as u16,
            is_shared: bytes[7] & Self::SHARED != 0,
            packed,
            birth: read_uint(&bytes[8..14]),
        };
        let good = fits
            && bytes[15] == 0
            && (found.map == 0) == found.is_null()
            && (!found.is_null() || found == Self::default());
        good.then_some(found)
    }
}

/// Where one record of an object is. `back` is only there when `front` is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Slot {
    pub(crate) front: RecordPointer,
    /// Seen where `front` has nothing.
    pub(crate) back: RecordPointer,
}

impl Slot {
    pub(crate) const BYTES: usize = 32;

    pub(crate) fn is_null(self) -> bool {
        self.front.is_null()
    }

    /// The slot with a `front` whenever it has anything, and no `back` that nobody sees.
    pub(crate) fn normal(front: RecordPointer, back: RecordPointer) -> Self {
        let back = back.without(front.map);
        match front.is_null() {
            true => Self {
                front: back,
                back: RecordPointer::default(),
            },
            false => Self { front, back },
        }
    }

    /// Which blocks hold anything.
    pub(crate) fn map(self) -> u16 {
        self.front.map | self.back.map
    }

    /// The pointer through which block `index` is seen.
    pub(crate) fn find(self, index: u64) -> Option<RecordPointer> {
        let bit = 1 << index;
        [self.front, self.back]
            .into_iter()
            .find(|pointer| pointer.map & bit != 0)
    }

    /// The data that block `index` is a part of: what is the same for the same index is the same content.
    pub(crate) fn source(self, index: u64) -> Option<Extent> {
        self.find(index).and_then(RecordPointer::extent)
    }

    /// What it refers to.
    pub(crate) fn extents(self) -> impl Iterator<Item = Extent> {
        [self.front, self.back]
            .into_iter()
            .filter_map(RecordPointer::extent)
    }

    pub(crate) fn encode(self, bytes: &mut [u8]) {
        self.front.encode(&mut bytes[..16]);
        self.back.encode(&mut bytes[16..32]);
    }

    /// None where the bytes are no slot.
    pub(crate) fn decode(bytes: &[u8]) -> Option<Self> {
        let front = RecordPointer::decode(&bytes[..16])?;
        let back = RecordPointer::decode(&bytes[16..32])?;
        let good = (back.is_null() || !front.is_null())
            && !overlap(front, back)
            && front.map & back.map == 0;
        good.then_some(Self { front, back })
    }
}

/// Whether two pointers lead to the same blocks, or to some of them.
fn overlap(a: RecordPointer, b: RecordPointer) -> bool {
    match (a.extent(), b.extent()) {
        (Some(a), Some(b)) => a.record() == b.record() && a.bits() & b.bits() != 0,
        _ => false,
    }
}

/// A page in memory.
#[derive(Debug, Clone)]
pub(crate) enum Page {
    Inner {
        level: u8,
        children: Box<[PagePointer; FANOUT]>,
    },
    Map(Box<[Slot; SLOTS]>),
    /// A leaf of another tree: its payload.
    Raw {
        kind: PageKind,
        payload: Box<[u8; PAYLOAD]>,
    },
}

impl Page {
    /// A page of nothing.
    pub(crate) fn empty(kind: PageKind, level: u8) -> Self {
        match kind {
            _ if level > 0 => Self::Inner {
                level,
                children: Box::new([PagePointer::default(); FANOUT]),
            },
            PageKind::Map => Self::Map(Box::new([Slot::default(); SLOTS])),
            _ => Self::Raw {
                kind,
                payload: Box::new([0; PAYLOAD]),
            },
        }
    }

    /// The bytes of the page at `pointer`.
    pub(crate) fn encode(&self, pointer: PagePointer, pool_id: &[u8; 16]) -> Vec<u8> {
        let mut bytes = vec![0; BLOCK];
        let payload = &mut bytes[HEADER..];
        let (kind, level) = match self {
            Self::Inner { level, children } => {
                for (child, bytes) in children.iter().zip(payload.chunks_mut(PagePointer::BYTES)) {
                    child.encode(bytes);
                }
                (PageKind::Inner, *level)
            }
            Self::Map(slots) => {
                for (slot, bytes) in slots.iter().zip(payload.chunks_mut(Slot::BYTES)) {
                    slot.encode(bytes);
                }
                (PageKind::Map, 0)
            }
            Self::Raw {
                kind,
                payload: source,
            } => {
                payload.copy_from_slice(&source[..]);
                (*kind, 0)
            }
        };
        bytes[4..8].copy_from_slice(&MAGIC);
        bytes[8] = kind as u8;
        bytes[9] = level;
        bytes[12..16].copy_from_slice(&pool_id[..4]);
        bytes[16..24].copy_from_slice(&pointer.address.to_le_bytes());
        bytes[24..32].copy_from_slice(&pointer.birth.to_le_bytes());
        let checksum = crc32c::crc32c(&bytes[4..]);
        bytes[..4].copy_from_slice(&checksum.to_le_bytes());
        bytes
    }

    /// Reads the page at `pointer`, of which the kind of its tree's leaves and its level are known.
    pub(crate) fn decode(
        bytes: &[u8],
        pointer: PagePointer,
        pool_id: &[u8; 16],
        leaf_kind: PageKind,
        level: u8,
    ) -> std::result::Result<Self, &'static str> {
        if read_uint(&bytes[..4]) != u64::from(crc32c::crc32c(&bytes[4..])) {
            return Err("its checksum is wrong");
        }
        let kind = if level > 0 {
            PageKind::Inner
        } else {
            leaf_kind
        };
        let is_expected = bytes[4..8] == MAGIC
            && bytes[8] == kind as u8
            && bytes[9] == level
            && level <= TREE_MAX_HEIGHT
            && bytes[12..16] == pool_id[..4]
            && read_uint(&bytes[16..24]) == pointer.address
            && read_uint(&bytes[24..32]) == pointer.birth;
        if !is_expected {
            return Err("another page or an older one is in its place");
        }
        let payload = &bytes[HEADER..];
        let mut page = Self::empty(kind, level);
        match &mut page {
            Self::Inner { children, .. } => {
                for (child, bytes) in children.iter_mut().zip(payload.chunks(PagePointer::BYTES)) {
                    *child = PagePointer::decode(bytes);
                }
            }
            Self::Map(slots) => {
                for (slot, bytes) in slots.iter_mut().zip(payload.chunks(Slot::BYTES)) {
                    *slot = Slot::decode(bytes).ok_or("it has slots that no pool has")?;
                }
            }
            Self::Raw {
                payload: target, ..
            } => target.copy_from_slice(payload),
        }
        Ok(page)
    }

    pub(crate) fn children(&self) -> Result<&[PagePointer; FANOUT]> {
        match self {
            Self::Inner { children, .. } => Ok(children),
            _ => Err(mixed_up()),
        }
    }

    pub(crate) fn children_mut(&mut self) -> Result<&mut [PagePointer; FANOUT]> {
        match self {
            Self::Inner { children, .. } => Ok(children),
            _ => Err(mixed_up()),
        }
    }

    pub(crate) fn slots(&self) -> Result<&[Slot; SLOTS]> {
        match self {
            Self::Map(slots) => Ok(slots),
            _ => Err(mixed_up()),
        }
    }

    pub(crate) fn slots_mut(&mut self) -> Result<&mut [Slot; SLOTS]> {
        match self {
            Self::Map(slots) => Ok(slots),
            _ => Err(mixed_up()),
        }
    }

    pub(crate) fn payload(&self) -> Result<&[u8; PAYLOAD]> {
        match self {
            Self::Raw { payload, .. } => Ok(payload),
            _ => Err(mixed_up()),
        }
    }
}

/// Two trees share a page of different kinds: what only a damaged pool with right checksums has.
fn mixed_up() -> PoolError {
    PoolError::Damaged {
        what: "a page is used by trees of different kinds".to_owned(),
    }
}
