//! Short texts of the command line and of JSON documents: ports, sizes, ids, names.

#![no_main]

use fcvm_types::{ByteSize, PortMapping, VmId, VmName};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    if let Ok(mapping) = text.parse::<PortMapping>() {
        assert!(mapping.host_port > 0 && mapping.guest_port > 0);
        drop(mapping.to_string());
    }
    if let Ok(size) = text.parse::<ByteSize>() {
        drop(size.to_string());
        let bytes = size.bytes().to_string();
        assert_eq!(bytes.parse::<ByteSize>().as_ref(), Ok(&size));
    }
    if let Ok(id) = text.parse::<VmId>() {
        assert_eq!(id.as_str(), text);
    }
    if let Ok(name) = text.parse::<VmName>() {
        assert_eq!(name.as_str(), text);
        assert!(!text.contains(['/', '\0', '\n']) && text != "." && text != "..");
    }
});
