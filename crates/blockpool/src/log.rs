//! Records of the log: operations that are durable before a checkpoint has them.
//!
//! Only bytes are made and read here; `txg` says when, `replay` what becomes of them.

use crate::layout::{BLOCK, BLOCK_BYTES, read_uint};
use crate::operation::Operation;

const MAGIC: [u8; 4] = *b"BPLG";
const HEADER: usize = 32;
/// Blocks of data that travel in a record.
pub(crate) const DATA_BLOCKS_MAX: usize = 16;

/// A record of the log.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct LogRecord {
    pub(crate) operations: Vec<Operation>,
    /// Addresses and content of blocks that were not flushed when the record was written.
    pub(crate) data: Vec<(u64, Box<[u8]>)>,
}

fn block_round(length: usize) -> usize {
    length.next_multiple_of(BLOCK)
}

/// Bytes that a record takes.
pub(crate) fn record_length(operation_bytes: usize, data_blocks: usize) -> usize {
    block_round(HEADER + operation_bytes + 8 * data_blocks) + data_blocks * BLOCK
}

/// The bytes of a record of operations that are encoded already.
pub(crate) fn encode(
    txg: u64,
    index: u64,
    operations: &[u8],
    data: &[(u64, Box<[u8]>)],
) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(record_length(operations.len(), data.len()));
    bytes.extend_from_slice(&[0; 4]);
    bytes.extend_from_slice(&MAGIC);
    bytes.extend_from_slice(&txg.to_le_bytes());
    bytes.extend_from_slice(&index.to_le_bytes());
    bytes.extend_from_slice(&(operations.len() as u32).to_le_bytes());
    bytes.extend_from_slice(&(data.len() as u32).to_le_bytes());
    bytes.extend_from_slice(operations);
    for (address, _) in data {
        bytes.extend_from_slice(&address.to_le_bytes());
    }
    bytes.resize(block_round(bytes.len()), 0);
    for (_, content) in data {
        bytes.extend_from_slice(content);
    }
    let checksum = crc32c::crc32c(&bytes[4..]);
    bytes[..4].copy_from_slice(&checksum.to_le_bytes());
    bytes
}

/// How long the record is that begins with this block; none where none of that checkpoint and index begins.
pub(crate) fn peek(block: &[u8], txg: u64, index: u64) -> Option<usize> {
    if block.len() < HEADER {
        return None;
    }
    let is_expected = block[4..8] == MAGIC
        && read_uint(&block[8..16]) == txg
        && read_uint(&block[16..24]) == index;
    let (operation_bytes, data_blocks) = lengths(block);
    let fits = data_blocks <= DATA_BLOCKS_MAX;
    (is_expected && fits).then(|| record_length(operation_bytes, data_blocks))
}

fn lengths(block: &[u8]) -> (usize, usize) {
    (
        read_uint(&block[24..28]) as usize,
        read_uint(&block[28..32]) as usize,
    )
}

/// Reads a record of which [`peek`] told the length; none where it is torn or nonsense.
pub(crate) fn decode(bytes: &[u8]) -> Option<LogRecord> {
    if bytes.len() < HEADER {
        return None;
    }
    let (operation_bytes, data_blocks) = lengths(bytes);
    let good = data_blocks <= DATA_BLOCKS_MAX
        && bytes.len() == record_length(operation_bytes, data_blocks)
        && read_uint(&bytes[..4]) == u64::from(crc32c::crc32c(&bytes[4..]));
    if !good {
        return None;
    }
    let mut rest = &bytes[HEADER..HEADER + operation_bytes];
    let mut operations = Vec::new();
    while !rest.is_empty() {
        operations.push(Operation::decode(&mut rest)?);
    }
    let addresses = bytes[HEADER + operation_bytes..]
        .chunks(8)
        .take(data_blocks);
    let contents = bytes[bytes.len() - data_blocks * BLOCK..].chunks(BLOCK_BYTES as usize);
    let data = addresses
        .zip(contents)
        .map(|(address, content)| (read_uint(address), content.into()))
        .collect();
    Some(LogRecord { operations, data })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record() -> Vec<u8> {
        let mut operations = Vec::new();
        Operation::Remove { id: 5 }.encode(&mut operations);
        encode(9, 3, &operations, &[(77, vec![8; BLOCK].into())])
    }

    #[test]
    fn a_record_survives_its_encoding() {
        let bytes = record();
        assert_eq!(peek(&bytes[..BLOCK], 9, 3), Some(bytes.len()));
        let found = decode(&bytes).unwrap();
        assert_eq!(found.operations, [Operation::Remove { id: 5 }]);
        assert_eq!(found.data, [(77, vec![8; BLOCK].into())]);
        assert_eq!(peek(&bytes, 9, 2), None);
        assert_eq!(peek(&bytes, 8, 3), None);
    }

    #[test]
    fn no_flipped_bit_is_overlooked() {
        let bytes = record();
        for bit in 0..bytes.len() * 8 {
            let mut damaged = bytes.clone();
            damaged[bit / 8] ^= 1 << (bit % 8);
            let found = peek(&damaged, 9, 3)
                .filter(|length| *length <= damaged.len())
                .and_then(|length| decode(&damaged[..length]));
            assert_eq!(found, None, "bit {bit}");
        }
    }
}
