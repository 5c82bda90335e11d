//! Working sets: what is read is what was written, and names no page twice.

#![no_main]

use fcvm_memory::uffd::WorkingSet;
use libfuzzer_sys::fuzz_target;

const PAGES: u64 = 4096;

fuzz_target!(|input: &[u8]| {
    let id = [7; 16];
    let read = |bytes: &[u8]| WorkingSet::decode(bytes, PAGES * 4096, &id);
    let check = |bytes: &[u8]| {
        if let Ok(set) = read(bytes) {
            assert!(set.page_count() <= PAGES);
            assert_eq!(set.encode(PAGES * 4096, &id), bytes);
        }
    };
    check(input);
    // Past the header and its checksum, which random bytes seldom have: entries of 12 bytes.
    let entries = &input[..input.len() / 12 * 12];
    let mut bytes = b"FCVMWSET\x01\0\0\0\x01\0\0\0".to_vec();
    bytes.extend((PAGES * 4096).to_le_bytes());
    bytes.extend(id);
    bytes.extend(((entries.len() / 12) as u32).to_le_bytes());
    let checksum = crc32c::crc32c_append(crc32c::crc32c(&bytes), entries);
    bytes.extend(checksum.to_le_bytes());
    bytes.extend(entries);
    check(&bytes);
});
