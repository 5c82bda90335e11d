//! The log of a pool, whatever the medium made of it.

#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: &[u8]| {
    // The checksum of the first record is made right: what is behind it is what is looked for.
    let mut bytes = input.to_vec();
    let length = bytes.len().next_multiple_of(4096).max(4096);
    bytes.resize(length, 0);
    bytes[4..8].copy_from_slice(b"BPLG");
    bytes[8..24].fill(0);
    let operation_bytes = u32::from_le_bytes([bytes[24], bytes[25], bytes[26], bytes[27]]) % 4096;
    bytes[24..28].copy_from_slice(&operation_bytes.to_le_bytes());
    bytes[28..32].fill(0);
    let end = (32 + operation_bytes as usize).next_multiple_of(4096).min(length);
    let checksum = crc32c::crc32c(&bytes[4..end]);
    bytes[..4].copy_from_slice(&checksum.to_le_bytes());
    let count = blockpool::parse_log(&bytes, 0);
    assert!(count <= operation_bytes as usize, "more operations than bytes");
});
