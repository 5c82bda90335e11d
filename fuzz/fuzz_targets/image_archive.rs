//! Archives of images (`docker-archive:`, `oci-archive:`): imported into a store, which they must
//! not damage.

#![no_main]

#[path = "../src/scratch.rs"]
mod scratch;
#[path = "../src/tar_input.rs"]
mod tar_input;

use std::sync::LazyLock;

use fcvm_image::{ImageStore, ImportOptions, Platform, Silent, Source, import};
use libfuzzer_sys::fuzz_target;
use tempfile::TempDir;

static DIRECTORY: LazyLock<TempDir> = LazyLock::new(scratch::directory);
static STORE: LazyLock<ImageStore> =
    LazyLock::new(|| ImageStore::open(&DIRECTORY.path().join("store")).expect("a store"));

fuzz_target!(|input: &[u8]| {
    let Some((&kind, bytes)) = input.split_first() else { return };
    let file = DIRECTORY.path().join("archive");
    std::fs::write(&file, tar_input::with_valid_checksums(bytes)).expect("the archive's file");
    let source = match kind % 2 {
        0 => Source::DockerArchive { file, name: None },
        _ => Source::OciArchive { file, name: None },
    };
    let options = ImportOptions { name: None, platform: Platform::host() };
    match import(&STORE, &source, &options, &Silent) {
        Ok(images) => {
            for image in &images {
                let found = STORE.get(image.manifest_digest).expect("what was imported is there");
                assert_eq!(found.layers, image.layers);
                let removed = STORE.remove(&image.manifest_digest.to_string(), &|_| false, true);
                removed.expect("and can be removed");
            }
        }
        Err(error) => {
            let text = error.to_string();
            assert!(!text.contains(|c: char| c.is_control()), "{text:?}");
        }
    }
    assert!(STORE.list().expect("the store is intact").0.is_empty());
});
