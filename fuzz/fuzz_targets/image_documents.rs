//! Manifests, indexes and configurations: what registries, layouts and archives say of an image.

#![no_main]

use fcvm_image::Platform;
use fcvm_image::format::{self, Document};
use fcvm_image::import::parse_docker_manifest;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: &[u8]| {
    match format::parse_document(input) {
        Ok(Document::Index(index)) => {
            if let Ok(chosen) = Platform::host().select(&index) {
                assert!(index.manifests().contains(chosen));
            }
        }
        Ok(Document::Manifest(manifest)) => {
            // What was accepted is stored as it came, and read again.
            assert_eq!(format::parse_manifest(input).ok().as_ref(), Some(&*manifest));
        }
        Err(error) => assert_one_line(&error.to_string()),
    }
    match format::parse_config(input) {
        Ok(config) => {
            let diff_ids = format::diff_ids(&config).expect("it was accepted with them");
            assert_eq!(diff_ids.len(), config.rootfs().diff_ids().len());
            if let Err(error) = Platform::host().check(&config) {
                assert_one_line(&error.to_string());
            }
        }
        Err(error) => assert_one_line(&error.to_string()),
    }
    if let Err(reason) = parse_docker_manifest(input) {
        assert_one_line(&reason);
    }
});

/// Errors are shown on a terminal: hostile text must not reach it as it is.
fn assert_one_line(text: &str) {
    assert!(!text.contains(|c: char| c.is_control()), "{text:?}");
}
