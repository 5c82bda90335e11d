//! Units, the superblock and where things are: docs/format/pool.md. Pages are in `page`, log records in `log`.

use std::fmt;

use crate::error::{PoolError, Result};

/// The version of the format that is written.
pub const VERSION: u32 = 3;
/// The oldest version that is read: it has no checksums of data and no options.
const VERSION_MIN: u32 = 1;
/// The unit of addresses.
pub const BLOCK_BYTES: u64 = 4096;
/// The unit in which objects get space.
pub const RECORD_BYTES: u64 = 65_536;
/// Blocks of a record.
pub(crate) const RECORD_BLOCKS: u64 = RECORD_BYTES / BLOCK_BYTES;
/// The largest object: 16 TiB.
pub const OBJECT_MAX_BYTES: u64 = 1 << 44;
/// The smallest pool.
pub const POOL_MIN_BYTES: u64 = 4 << 20;
/// The largest pool: 1 PiB.
pub const POOL_MAX_BYTES: u64 = 1 << 50;
/// The highest tree that is needed: 254^6 leaves of entries are more than ids can ever be given out.
pub(crate) const TREE_MAX_HEIGHT: u8 = 6;

/// [`BLOCK_BYTES`] as a length.
pub(crate) const BLOCK: usize = BLOCK_BYTES as usize;
/// [`RECORD_BYTES`] as a length.
pub(crate) const RECORD: usize = RECORD_BYTES as usize;

const MAGIC: [u8; 8] = *b"BLKPOOL\0";
/// The records of a log area: least and most.
const LOG_RECORDS: (u64, u64) = (16, 256);
/// Where a superblock names the trees.
const TREES_OFFSET: usize = 80;
/// A log area has this part of the pool.
const LOG_PART: u64 = 512;

/// Which tree of the superblock.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum TreeName {
    Entries = 0,
    Space = 1,
    RecordReferences = 2,
    PageReferences = 3,
    Sums = 4,
}

/// How many trees a superblock names.
pub(crate) const TREE_COUNT: usize = 5;

/// Address and birth of a page. All zeros is no page.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Hash)]
pub(crate) struct PagePointer {
    pub(crate) address: u64,
    /// 0: there is one copy.
    pub(crate) second: u64,
    pub(crate) birth: u64,
}

impl PagePointer {
    pub(crate) const BYTES: usize = 16;

    pub(crate) fn is_null(self) -> bool {
        self.address == 0
    }

    pub(crate) fn encode(self, bytes: &mut [u8]) {
        bytes[..5].copy_from_slice(&self.address.to_le_bytes()[..5]);
        bytes[5..10].copy_from_slice(&self.second.to_le_bytes()[..5]);
        bytes[10..16].copy_from_slice(&self.birth.to_le_bytes()[..6]);
    }

    pub(crate) fn decode(bytes: &[u8]) -> Self {
        Self {
            address: read_uint(&bytes[..5]),
            second: read_uint(&bytes[5..10]),
            birth: read_uint(&bytes[10..16]),
        }
    }
}

/// A tree of pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Tree {
    pub(crate) root: PagePointer,
    pub(crate) height: u8,
}

/// Blocks of data that are given out, shared and freed as one: a record, or the part of one that a compressed record takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Extent {
    pub(crate) first_block: u64,
    /// [`RECORD_BLOCKS`] for a record, fewer inside one for others.
    pub(crate) block_count: u64,
}

impl Extent {
    pub(crate) fn of_record(record: u64) -> Self {
        Self {
            first_block: record * RECORD_BLOCKS,
            block_count: RECORD_BLOCKS,
        }
    }

    pub(crate) fn is_record(self) -> bool {
        self.block_count == RECORD_BLOCKS
    }

    /// The record that it is, or is a part of.
    pub(crate) fn record(self) -> u64 {
        self.first_block / RECORD_BLOCKS
    }

    /// Its blocks, as bits of those of the record.
    pub(crate) fn bits(self) -> u16 {
        let first = self.first_block % RECORD_BLOCKS;
        (((1u32 << self.block_count) - 1) << first) as u16
    }

    pub(crate) fn offset_bytes(self) -> u64 {
        self.first_block * BLOCK_BYTES
    }

    pub(crate) fn length_bytes(self) -> u64 {
        self.block_count * BLOCK_BYTES
    }
}

impl fmt::Display for Extent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.is_record() {
            true => write!(f, "record {}", self.record()),
            false => write!(f, "the extent at block {}", self.first_block),
        }
    }
}

/// An unsigned number of up to 8 bytes, little-endian.
pub(crate) fn read_uint(bytes: &[u8]) -> u64 {
    let mut full = [0; 8];
    full[..bytes.len()].copy_from_slice(bytes);
    u64::from_le_bytes(full)
}

/// What a superblock tells.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Superblock {
    pub(crate) pool_id: [u8; 16],
    pub(crate) txg: u64,
    pub(crate) epoch: u64,
    pub(crate) size_blocks: u64,
    pub(crate) log_records: u64,
    pub(crate) next_id: u64,
    /// Blocks that hold data.
    pub(crate) data_blocks: u64,
    pub(crate) trees: [Tree; TREE_COUNT],
}

impl Superblock {
    /// That of an empty pool.
    pub(crate) fn new(pool_id: [u8; 16], size_bytes: u64) -> Result<Self> {
        let size_records = check_pool_size(size_bytes)?;
        Ok(Self {
            pool_id,
            txg: 0,
            epoch: 1,
            size_blocks: size_records * RECORD_BLOCKS,
            log_records: (size_records / LOG_PART).clamp(LOG_RECORDS.0, LOG_RECORDS.1),
            next_id: 1,
            data_blocks: 0,
            trees: [Tree::default(); TREE_COUNT],
        })
    }

    /// Byte offsets of the two copies.
    pub(crate) fn offsets_bytes(txg: u64) -> [u64; 2] {
        let first = 4 * (txg % 2);
        [first * BLOCK_BYTES, (first + 8) * BLOCK_BYTES]
    }

    /// Byte offset of the log area that follows checkpoint `txg`.
    pub(crate) fn log_offset_bytes(&self, txg: u64) -> u64 {
        (1 + self.log_records * (txg % 2)) * RECORD_BYTES
    }

    /// Bytes of one log area.
    pub(crate) fn log_bytes(&self) -> u64 {
        self.log_records * RECORD_BYTES
    }

    /// The first block that data and pages may have.
    pub(crate) fn first_block(&self) -> u64 {
        (1 + 2 * self.log_records) * RECORD_BLOCKS
    }

    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut bytes = vec![0; BLOCK];
        bytes[4..12].copy_from_slice(&MAGIC);
        bytes[12..16].copy_from_slice(&VERSION.to_le_bytes());
        bytes[16..32].copy_from_slice(&self.pool_id);
        let numbers = [
            self.txg,
            self.epoch,
            self.size_blocks,
            self.log_records,
            self.next_id,
            self.data_blocks,
        ];
        for (index, number) in numbers.into_iter().enumerate() {
            bytes[32 + 8 * index..40 + 8 * index].copy_from_slice(&number.to_le_bytes());
        }
        for (index, tree) in self.trees.iter().enumerate() {
            let at = TREES_OFFSET + 24 * index;
            tree.root.encode(&mut bytes[at..at + PagePointer::BYTES]);
            bytes[at + PagePointer::BYTES] = tree.height;
        }
        let checksum = crc32c::crc32c(&bytes[4..]);
        bytes[..4].copy_from_slice(&checksum.to_le_bytes());
        bytes
    }

    /// Reads one copy.
    pub(crate) fn decode(bytes: &[u8]) -> Result<Self> {
        let not_a_pool = |reason| PoolError::NotAPool { reason };
        if bytes.len() != BLOCK || bytes[4..12] != MAGIC {
            return Err(not_a_pool("it does not begin as one"));
        }
        if read_uint(&bytes[..4]) != u64::from(crc32c::crc32c(&bytes[4..])) {
            return Err(not_a_pool("the checksum of its superblock is wrong"));
        }
        let version = read_uint(&bytes[12..16]) as u32;
        if !(VERSION_MIN..=VERSION).contains(&version) {
            return Err(PoolError::Version { found: version });
        }
        let mut pool_id = [0; 16];
        pool_id.copy_from_slice(&bytes[16..32]);
        let number = |index: usize| read_uint(&bytes[32 + 8 * index..40 + 8 * index]);
        let mut trees = [Tree::default(); TREE_COUNT];
        for (index, tree) in trees.iter_mut().enumerate() {
            let at = TREES_OFFSET + 24 * index;
            tree.root = PagePointer::decode(&bytes[at..at + PagePointer::BYTES]);
            tree.height = bytes[at + PagePointer::BYTES];
        }
        let found = Self {
            pool_id,
            txg: number(0),
            epoch: number(1),
            size_blocks: number(2),
            log_records: number(3),
            next_id: number(4),
            data_blocks: match version {
                ..3 => number(5).saturating_mul(RECORD_BLOCKS),
                _ => number(5),
            },
            trees,
        };
        found.check()?;
        Ok(found)
    }

    fn check(&self) -> Result<()> {
        let in_range = |value: u64, (least, most): (u64, u64)| (least..=most).contains(&value);
        let sizes = (POOL_MIN_BYTES / BLOCK_BYTES, POOL_MAX_BYTES / BLOCK_BYTES);
        let good = in_range(self.size_blocks, sizes)
            && self.size_blocks.is_multiple_of(RECORD_BLOCKS)
            && in_range(self.log_records, LOG_RECORDS)
            && self.first_block() < self.size_blocks
            && self.txg < u64::MAX
            && self.epoch < 1 << 48
            && self.trees.iter().all(|tree| tree.height <= TREE_MAX_HEIGHT);
        if good {
            return Ok(());
        }
        Err(PoolError::Damaged {
            what: "its superblock has values that no pool has".to_owned(),
        })
    }
}

/// The whole records of a pool of that size.
pub(crate) fn check_pool_size(size_bytes: u64) -> Result<u64> {
    if (POOL_MIN_BYTES..=POOL_MAX_BYTES).contains(&size_bytes) {
        return Ok(size_bytes / RECORD_BYTES);
    }
    Err(PoolError::Size {
        what: "a pool",
        size_bytes,
        min_bytes: POOL_MIN_BYTES,
        max_bytes: POOL_MAX_BYTES,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_superblock_survives_its_encoding() {
        let mut superblock = Superblock::new([7; 16], 1 << 30).unwrap();
        superblock.txg = 99;
        superblock.trees[3] = Tree {
            root: PagePointer {
                address: (1 << 40) - 1,
                second: 5,
                birth: (1 << 48) - 2,
            },
            height: 4,
        };
        let bytes = superblock.encode();
        assert_eq!(Superblock::decode(&bytes).unwrap(), superblock);
        for bit in 0..bytes.len() * 8 {
            let mut damaged = bytes.clone();
            damaged[bit / 8] ^= 1 << (bit % 8);
            assert!(Superblock::decode(&damaged).is_err(), "bit {bit}");
        }
    }

    #[test]
    fn another_version_is_named() {
        let mut bytes = Superblock::new([0; 16], 1 << 30).unwrap().encode();
        bytes[12] = VERSION as u8 + 1;
        let checksum = crc32c::crc32c(&bytes[4..]);
        bytes[..4].copy_from_slice(&checksum.to_le_bytes());
        let error = Superblock::decode(&bytes).unwrap_err();
        assert!(
            matches!(error, PoolError::Version { found } if found == VERSION + 1),
            "{error}"
        );
    }
}
