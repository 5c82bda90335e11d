//! State records: files that an older, newer or crashed fcvm left, or that somebody edited.

#![no_main]

use fcvm_types::VmRecord;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: &[u8]| {
    if let Ok(record) = serde_json::from_slice::<VmRecord>(input) {
        let bytes = serde_json::to_vec(&record).expect("a record that was read can be written");
        let again: VmRecord = serde_json::from_slice(&bytes).expect("and read again");
        assert_eq!(again, record);
        // It becomes part of paths.
        assert!(!record.name.as_str().contains('/') && !record.name.as_str().starts_with('.'));
        assert!(record.id.as_str().bytes().all(|byte| byte.is_ascii_hexdigit()));
    }
});
