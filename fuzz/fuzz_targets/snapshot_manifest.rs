//! Manifests of snapshots: what is read is what was written, and nothing of another tag.

#![no_main]

use fcvm_snapshot::{Manifest, MemoryKind};
use fcvm_types::SnapshotTag;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: &[u8]| {
    let tag: SnapshotTag = "one".parse().unwrap();
    if let Ok(manifest) = Manifest::parse(&tag, input) {
        check(&tag, &manifest);
    }
    // Past the checksum, which random bytes seldom have.
    if let Ok(manifest) = serde_json::from_slice::<Manifest>(input) {
        let is_difference = manifest.memory.kind == MemoryKind::Difference;
        if manifest.tag == tag && is_difference == manifest.parent.is_some() {
            check(&tag, &manifest);
        }
    }
});

fn check(tag: &SnapshotTag, manifest: &Manifest) {
    assert_eq!(manifest.tag, *tag);
    let Ok(bytes) = manifest.encode() else {
        return;
    };
    let again = Manifest::parse(tag, &bytes).unwrap();
    assert_eq!(again.encode().unwrap(), bytes);
    let other = "two".parse().unwrap();
    assert!(Manifest::parse(&other, &bytes).is_err());
}
