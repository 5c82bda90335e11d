//! The reader of layers: tar with the extensions of GNU, PAX and SCHILY.

#![no_main]

#[path = "../src/tar_input.rs"]
mod tar_input;

use std::io::BufReader;

use fcvm_image::rootfs::Limits;
use fcvm_image::rootfs::layer::{LayerError, LayerReader};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: &[u8]| {
    let Some((&buffer_bytes, bytes)) = input.split_first() else { return };
    let bytes = tar_input::with_valid_checksums(bytes);
    let limits = Limits { max_xattr_bytes: 4096, max_sparse_segments: 64, ..Limits::default() };
    // Small buffers, so that headers and data are cut at every place.
    let source = BufReader::with_capacity(usize::from(buffer_bytes) + 1, bytes.as_slice());
    let mut reader = LayerReader::new(source, &limits);
    let mut data_bytes = 0;
    while let Ok(Some(member)) = reader.next_member() {
        let xattr_bytes: usize =
            member.xattrs.iter().map(|xattr| xattr.name.len() + xattr.value.len()).sum();
        assert!(xattr_bytes <= limits.max_xattr_bytes);
        let read = reader.read_data(|piece| {
            data_bytes += piece.len();
            Ok::<(), LayerError>(())
        });
        if read.is_err() {
            break;
        }
    }
    assert!(data_bytes <= bytes.len());
});
