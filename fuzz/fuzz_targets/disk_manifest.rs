//! Kept disks: a manifest, and a directory that does not keep what it says; the header of an overlay.

#![no_main]

use fcvm_storage::{DiskManifest, FrozenDisk, LAYER_COUNT_MAX, Qcow2Header};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: &[u8]| {
    if let Some(header) = Qcow2Header::parse(input) {
        assert!(i64::try_from(header.size_bytes).is_ok());
        assert!(input.starts_with(b"QFI\xfb"));
    }
    let Ok(manifest) = serde_json::from_slice::<DiskManifest>(input) else {
        return;
    };
    let text = serde_json::to_vec(&manifest).unwrap();
    assert_eq!(serde_json::from_slice::<DiskManifest>(&text).unwrap(), manifest);
    // The directory is empty: nothing that lies outside may be opened in its place.
    let directory = tempfile::tempdir().unwrap();
    let inside = directory.path().join("inside");
    std::fs::create_dir(&inside).unwrap();
    std::fs::write(directory.path().join("outside"), [0; 512]).unwrap();
    assert!(manifest.layers.len() <= LAYER_COUNT_MAX || manifest.verify(&inside).is_err());
    assert!(FrozenDisk::open(&inside, &manifest).is_err());
});
