//! Kernels that users name: bzImage, zboot, compressed Image, ELF.

#![no_main]

use fcvm_kernel::vmlinux;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: &[u8]| {
    if let Ok(image) = vmlinux::extract(input) {
        assert!(image.bytes.len() <= vmlinux::IMAGE_SIZE_MAX_BYTES);
        if let Some(release) = image.release() {
            assert!(!release.contains(['/', '\n', ' ']));
        }
    }
});
