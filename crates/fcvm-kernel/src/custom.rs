//! A kernel that the user gives as a file, in place of the one that setup fetched.

use std::borrow::Cow;
use std::path::Path;

use crate::manifest::GuestKernel;
use crate::vmlinux::{self, IMAGE_SIZE_MAX_BYTES};
use crate::{KernelError, Result, files};

/// Unpacked kernels that are kept; the longest unused go first.
const KEPT_COUNT: usize = 4;

/// A user's own kernel: an uncompressed kernel is used where it is; out of a compressed one the
/// kernel is extracted into `directory` (created where missing), once per content.
///
/// It is booted without modules, so everything a guest needs must be built in.
///
/// # Errors
/// [`KernelError::File`] or [`KernelError::Image`].
pub fn from_file(directory: &Path, path: &Path) -> Result<GuestKernel> {
    let file = files::read_bounded(path, IMAGE_SIZE_MAX_BYTES)?;
    let image = vmlinux::extract(&file).map_err(|source| KernelError::Image {
        path: path.to_owned(),
        source,
    })?;
    let vmlinux = if matches!(image.bytes, Cow::Borrowed(_)) {
        std::path::absolute(path).map_err(KernelError::file("find", path))?
    } else {
        let parent = directory.join("extracted");
        let name = format!("vmlinux-{}", files::sha256_hex(&image.bytes));
        let size_bytes = image.bytes.len() as u64;
        files::cached(&parent, &name, size_bytes, KEPT_COUNT, || Ok(&image.bytes))?
    };
    Ok(GuestKernel {
        zfs: None,
        version: image.release().unwrap_or_else(|| "unknown".to_owned()),
        package: None,
        architecture: image.architecture,
        vmlinux,
        modules: Vec::new(),
    })
}
