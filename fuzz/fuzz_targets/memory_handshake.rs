//! Messages of hypervisors to the memory server: what is taken is a memory in regions without overlaps.

#![no_main]

use fcvm_memory::uffd::GuestLayout;
use libfuzzer_sys::fuzz_target;

const MEMORY_BYTES: u64 = 8 << 20;

fuzz_target!(|input: &[u8]| {
    let Ok(layout) = GuestLayout::parse(input, MEMORY_BYTES) else {
        return;
    };
    let mut sum = 0;
    for region in layout.regions() {
        assert!([4096, 2 << 20].contains(&region.page_bytes));
        for number in [region.address, region.offset, region.bytes] {
            assert!(number.is_multiple_of(region.page_bytes));
        }
        let last = region.address + (region.bytes - 1);
        for address in [region.address, last] {
            assert_eq!(layout.at_address(address), Some(region));
        }
        assert_eq!(layout.at_offset(region.offset), Some(region));
        assert_eq!(
            layout.at_offset(region.offset + region.bytes - 1),
            Some(region)
        );
        sum += region.bytes;
    }
    assert_eq!(sum, MEMORY_BYTES);
    let again = serde_json::to_vec(layout.regions()).unwrap();
    assert_eq!(GuestLayout::parse(&again, MEMORY_BYTES).unwrap(), layout);
});
