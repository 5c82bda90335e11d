//! What the tests of the root image share: layers made by hand, building, reading the result.

pub mod reader;
pub mod tarball;

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

use fcvm_image::rootfs::{Built, LayerInput, Limits, RootfsError, build};
use fcvm_image::{Digest, Silent};
use tempfile::TempDir;

use self::reader::Image;

/// A root image in a directory of its own.
pub struct TestImage {
    pub directory: TempDir,
    pub path: PathBuf,
    pub built: Built,
}

impl TestImage {
    pub fn bytes(&self) -> Vec<u8> {
        std::fs::read(&self.path).unwrap()
    }

    pub fn read(&self) -> Image {
        Image::open(&self.path)
    }
}

/// Writes layers as given, with the digests of `plain`, into `directory`.
pub fn layer_files(directory: &Path, layers: &[(Vec<u8>, Digest)]) -> Vec<LayerInput> {
    let write = |(index, (bytes, diff_id)): (usize, &(Vec<u8>, Digest))| {
        let path = directory.join(format!("layer-{index}"));
        File::create(&path).unwrap().write_all(bytes).unwrap();
        LayerInput {
            path,
            diff_id: *diff_id,
        }
    };
    layers.iter().enumerate().map(write).collect()
}

pub fn try_build(layers: &[Vec<u8>], limits: &Limits) -> Result<TestImage, RootfsError> {
    let layers: Vec<_> = layers
        .iter()
        .map(|layer| (layer.clone(), Digest::of(layer)))
        .collect();
    try_build_as(&layers, limits)
}

/// As [`try_build`], for layers whose bytes are not what their digest is of: compressed ones.
pub fn try_build_as(
    layers: &[(Vec<u8>, Digest)],
    limits: &Limits,
) -> Result<TestImage, RootfsError> {
    let directory = tempfile::tempdir().unwrap();
    let inputs = layer_files(directory.path(), layers);
    let path = directory.path().join("image");
    let mut file = File::create(&path).unwrap();
    let built = build(&inputs, &mut file, limits, &Silent)?;
    assert_eq!(file.metadata().unwrap().len(), built.size_bytes);
    Ok(TestImage {
        directory,
        path,
        built,
    })
}

/// Builds, checks with `fsck.erofs` where there is one, and reads with the tests' own reader.
pub fn build_image(layers: &[Vec<u8>]) -> TestImage {
    let image = try_build(layers, &Limits::default()).unwrap_or_else(|error| panic!("{error}"));
    fsck(&image.path);
    image
}

/// Fails on anything that `fsck.erofs` finds; says so once when there is no such tool.
pub fn fsck(image: &Path) {
    let Ok(output) = Command::new("fsck.erofs").arg(image).output() else {
        static ONCE: std::sync::Once = std::sync::Once::new();
        ONCE.call_once(|| eprintln!("skipped: fsck.erofs is not installed (package erofs-utils)"));
        return;
    };
    assert!(
        output.status.success(),
        "fsck.erofs: {}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
}
