//! Compressed records: their bytes in an extent, and how they become records again.
//!
//! Where an extent is and who refers to it is not known here.

use crate::layout::{BLOCK, RECORD, read_uint};

/// The most blocks that a compressed record may take: with more than these it is stored as it is.
pub(crate) const PACKED_BLOCKS_MAX: u64 = 14;
/// The length before the compressed bytes.
const HEADER: usize = 4;
/// What zstd's own program takes where nothing is asked for.
const ZSTD_LEVEL: i32 = 3;

/// How what is written to a dataset is compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Compression {
    /// Not at all.
    #[default]
    Off,
    /// LZ4: hardly slower than none.
    Lz4,
    /// Zstandard: smaller, and slower to write.
    Zstd,
}

/// How an extent was compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Method {
    Lz4,
    Zstd,
}

impl Compression {
    pub(crate) fn method(self) -> Option<Method> {
        match self {
            Self::Off => None,
            Self::Lz4 => Some(Method::Lz4),
            Self::Zstd => Some(Method::Zstd),
        }
    }
}

impl Method {
    /// The bytes of the extent of a record; none where it would take too many blocks.
    pub(crate) fn pack(self, record: &[u8]) -> Option<Vec<u8>> {
        debug_assert_eq!(record.len(), RECORD, "records are compressed as a whole");
        let room = PACKED_BLOCKS_MAX as usize * BLOCK;
        let packed = match self {
            Self::Lz4 => lz4_flex::block::compress(record),
            Self::Zstd => zstd::bulk::compress(record, ZSTD_LEVEL).ok()?,
        };
        if HEADER + packed.len() > room {
            return None;
        }
        let mut bytes = (packed.len() as u32).to_le_bytes().to_vec();
        bytes.extend_from_slice(&packed);
        bytes.resize(bytes.len().next_multiple_of(BLOCK), 0);
        Some(bytes)
    }

    /// The record in an extent; none where there is none in it, whatever its bytes are.
    pub(crate) fn unpack(self, extent: &[u8]) -> Option<Vec<u8>> {
        let (header, rest) = extent.split_at_checked(HEADER)?;
        let packed = rest.get(..read_uint(header) as usize)?;
        let mut record = vec![0; RECORD];
        let length = match self {
            Self::Lz4 => lz4_flex::block::decompress_into(packed, &mut record).ok()?,
            Self::Zstd => zstd::bulk::decompress_to_buffer(packed, &mut record).ok()?,
        };
        (length == RECORD).then_some(record)
    }
}

/// Reads an extent of `bytes`, as LZ4 and as Zstandard; for fuzzing.
///
/// Returns how many of the two understand it.
#[must_use]
pub fn parse_extent(bytes: &[u8]) -> usize {
    let methods = [Method::Lz4, Method::Zstd].into_iter();
    methods.filter_map(|method| method.unpack(bytes)).count()
}

#[cfg(test)]
mod tests {
    use super::*;

    const METHODS: [Method; 2] = [Method::Lz4, Method::Zstd];

    fn noise(seed: u32, length: usize) -> Vec<u8> {
        let mut word = seed;
        let mut next = || {
            word = word.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (word >> 24) as u8
        };
        (0..length).map(|_| next()).collect()
    }

    #[test]
    fn a_record_takes_as_many_blocks_as_it_needs_and_comes_back() {
        for (noise_blocks, blocks) in [(0, 1), (1, 2), (5, 6), (12, 13)] {
            let mut record = noise(7, noise_blocks * BLOCK);
            record.resize(RECORD, 5);
            for method in METHODS {
                let packed = method.pack(&record).unwrap();
                assert_eq!(packed.len(), blocks * BLOCK, "{method:?} {noise_blocks}");
                assert_eq!(method.unpack(&packed).unwrap(), record);
            }
        }
        for method in METHODS {
            assert_eq!(method.pack(&noise(8, RECORD)), None);
        }
    }

    #[test]
    fn what_is_no_record_is_told() {
        let mut record = noise(7, 3 * BLOCK);
        record.resize(RECORD, 5);
        for method in METHODS {
            let packed = method.pack(&record).unwrap();
            for cut in [0, 3, 4, 100, BLOCK] {
                assert_eq!(method.unpack(&packed[..cut]), None, "{method:?} {cut}");
            }
            for length in [0, 1, 5000, u32::MAX] {
                let mut wrong = packed.clone();
                wrong[..4].copy_from_slice(&length.to_le_bytes());
                assert_eq!(method.unpack(&wrong), None, "{method:?} {length}");
            }
            // A record of another size.
            let short = match method {
                Method::Lz4 => lz4_flex::block::compress(&record[..RECORD - 1]),
                Method::Zstd => zstd::bulk::compress(&record[..RECORD - 1], 3).unwrap(),
            };
            let mut wrong = (short.len() as u32).to_le_bytes().to_vec();
            wrong.extend(short);
            assert_eq!(method.unpack(&wrong), None, "{method:?}");
            for seed in 0..500 {
                let mut wrong = packed.clone();
                let at = 4 + seed as usize * 7 % 8000;
                let bytes = noise(seed, 9);
                wrong[at..at + 9].copy_from_slice(&bytes);
                // Whatever comes out, it is a record or nothing.
                let unpacked = method.unpack(&wrong);
                assert!(unpacked.is_none_or(|record| record.len() == RECORD));
            }
        }
    }
}
