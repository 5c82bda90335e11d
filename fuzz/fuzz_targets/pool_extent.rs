//! Extents of compressed records, whatever the medium made of them.

#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: &[u8]| {
    let _ = blockpool::parse_extent(input);
    // Most lengths are wrong: what is behind a right one is what is looked for.
    let mut bytes = (input.len() as u32).to_le_bytes().to_vec();
    bytes.extend_from_slice(input);
    let _ = blockpool::parse_extent(&bytes);
});
