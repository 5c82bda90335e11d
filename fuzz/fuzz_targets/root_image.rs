//! Layers to a root image: whatever they hold, the writer ends with an error or with an image, and
//! the same layers give the same bytes.

#![no_main]

#[path = "../src/scratch.rs"]
mod scratch;
#[path = "../src/tar_input.rs"]
mod tar_input;

use std::fs::File;
use std::io::{Read, Seek, Write};
use std::sync::LazyLock;

use fcvm_image::rootfs::{Built, LayerInput, Limits, build};
use fcvm_image::{Digest, Silent};
use libfuzzer_sys::fuzz_target;
use tempfile::TempDir;

static DIRECTORY: LazyLock<TempDir> = LazyLock::new(scratch::directory);

/// What one input may take.
const IMAGE_MAX_BYTES: u64 = 16 << 20;

fuzz_target!(|input: &[u8]| {
    let Some((&cut, bytes)) = input.split_first() else { return };
    let bytes = tar_input::with_valid_checksums(bytes);
    // One archive or two layers of it: whiteouts and links meet what is below them.
    let blocks = bytes.len() / 512;
    let at = (usize::from(cut) * 512).min(blocks * 512);
    let layers = match at {
        0 => vec![write_layer(0, &bytes)],
        _ => vec![write_layer(0, &bytes[..at]), write_layer(1, &bytes[at..])],
    };
    let Some((first, image)) = convert(&layers) else { return };
    let (second, again) = convert(&layers).expect("the same layers convert again");
    assert_eq!(first, second);
    assert!(image == again, "two conversions of the same layers differ");
    assert_eq!(first.size_bytes, image.len() as u64);
    assert_eq!(image[1024..1028], 0xe0f5_e1e2_u32.to_le_bytes());
});

fn write_layer(index: usize, bytes: &[u8]) -> LayerInput {
    let path = DIRECTORY.path().join(format!("layer-{index}"));
    std::fs::write(&path, bytes).expect("a layer");
    LayerInput { path, diff_id: Digest::of(bytes) }
}

fn convert(layers: &[LayerInput]) -> Option<(Built, Vec<u8>)> {
    let limits = Limits {
        max_members: 4096,
        max_path_bytes: 4096,
        max_uncompressed_bytes: IMAGE_MAX_BYTES,
        max_image_bytes: IMAGE_MAX_BYTES,
        max_metadata_bytes: IMAGE_MAX_BYTES,
        ..Limits::default()
    };
    let mut output = File::options()
        .create(true)
        .truncate(true)
        .read(true)
        .write(true)
        .open(DIRECTORY.path().join("image"))
        .expect("the image's file");
    let built = build(layers, &mut output, &limits, &Silent).ok()?;
    output.flush().ok()?;
    output.rewind().expect("a regular file");
    let mut image = Vec::new();
    output.read_to_end(&mut image).expect("a regular file");
    Some((built, image))
}
