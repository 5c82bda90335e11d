//! Converts layer files to a root image: `rootfs_build OUTPUT LAYER...`, the bottom layer first.
//!
//! For measuring and for looking at images by hand. The digests of the layers are computed first
//! unless they are given as `LAYER=SHA256`.

use std::error::Error;
use std::fs::File;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use fcvm_image::rootfs::{LayerInput, Limits, RootfsError, build};
use fcvm_image::{Digest, Silent};

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let cause = error
                .source()
                .map(|source| format!(": {source}"))
                .unwrap_or_default();
            eprintln!("rootfs_build: {error}{cause}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let output_path = arguments
        .next()
        .ok_or("usage: rootfs_build OUTPUT LAYER[=SHA256]...")?;
    let unknown = Digest::from_sha256([0; 32]);
    let mut layers = Vec::new();
    for argument in arguments {
        let (path, diff_id) = match argument.split_once('=') {
            Some((path, digest)) => (PathBuf::from(path), Digest::from_hex(digest)?),
            None => (PathBuf::from(&argument), unknown),
        };
        layers.push(LayerInput { path, diff_id });
    }
    let mut output = File::create(&output_path)?;
    let mut attempt =
        |layers: &[LayerInput]| build(layers, &mut output, &Limits::default(), &Silent);
    let mut started = Instant::now();
    let built = loop {
        match attempt(&layers) {
            Err(RootfsError::DiffIdMismatch { layer, actual }) if layer.diff_id == unknown => {
                layers[layer.index].diff_id = actual;
                started = Instant::now();
            }
            result => break result?,
        }
    };
    println!(
        "{} bytes, {} inodes, {} attributes skipped, {:.3} s",
        built.size_bytes,
        built.inode_count,
        built.skipped_xattr_count,
        started.elapsed().as_secs_f64()
    );
    Ok(())
}
