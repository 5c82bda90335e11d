//! What the file system of a directory can do.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::path::Path;

use rustix::fs::{AtFlags, CWD, Mode, OFlags};
use rustix::io::Errno;

use crate::clone::reflink;
use crate::error::StorageError;

/// Whether files in `directory` can be cloned without copying their bytes: FICLONE, ioctl_ficlone(2).
/// Tried with two files that have no name.
///
/// # Errors
///
/// No file can be written there.
pub fn reflink_support(directory: &Path) -> Result<bool, StorageError> {
    let attempt = || {
        let mut source = nameless_file(directory)?;
        source.write_all(&[1; 4096])?;
        reflink(&source, &nameless_file(directory)?)
    };
    attempt().map_err(|source| StorageError::from_io("try to clone a file", directory, source))
}

/// Bytes that an ordinary user can still write on the file system of `directory`, statvfs(3).
///
/// # Errors
///
/// The directory is not there or can not be reached.
pub fn free_bytes(directory: &Path) -> Result<u64, StorageError> {
    let found = rustix::fs::statvfs(directory).map_err(|errno| {
        StorageError::from_io("ask for the free space", directory, errno.into())
    })?;
    Ok(found.f_bavail.saturating_mul(found.f_frsize))
}

/// Whether a file in `directory` that was made without a name can be given one later, as a jail needs it
/// for a disk: not with NFS and the older overlayfs. Tried with an empty file.
///
/// # Errors
///
/// No file can be written there.
pub fn naming_support(directory: &Path) -> Result<bool, StorageError> {
    let attempt = || {
        let file = nameless_file(directory)?;
        let name = directory.join(format!(".named-{}", std::process::id()));
        if name_file(&file, &name).is_err() {
            return Ok(false);
        }
        std::fs::remove_file(&name)?;
        Ok(true)
    };
    attempt().map_err(|source| StorageError::from_io("try to name a file", directory, source))
}

/// Gives a file another name, or the first where it was made without one; nothing is replaced. `NOENT` where
/// its file system cannot.
pub(crate) fn name_file(file: &File, path: &Path) -> Result<(), Errno> {
    // It is reached through this process's table of descriptors.
    let own = format!("/proc/self/fd/{}", file.as_raw_fd());
    rustix::fs::linkat(CWD, own, CWD, path, AtFlags::SYMLINK_FOLLOW)
}

/// An open file in `directory` that has no name and ends with its last descriptor.
///
/// # Errors
///
/// The directory is not there or can not be written to.
pub fn nameless_file(directory: &Path) -> io::Result<File> {
    let flags = OFlags::RDWR | OFlags::CLOEXEC | OFlags::TMPFILE;
    match rustix::fs::open(directory, flags, Mode::RUSR | Mode::WUSR) {
        Ok(file) => Ok(file.into()),
        // File systems without it: the older overlayfs, NFS. A kill in the moment before the name
        // is gone would leave an empty file.
        Err(Errno::OPNOTSUPP | Errno::ISDIR) => {
            let name = directory.join(format!(".unnamed-{}", std::process::id()));
            let flags = OFlags::RDWR | OFlags::CLOEXEC | OFlags::CREATE | OFlags::EXCL;
            let file = rustix::fs::open(&name, flags, Mode::RUSR | Mode::WUSR)?;
            rustix::fs::unlinkat(CWD, &name, AtFlags::empty())?;
            Ok(file.into())
        }
        Err(errno) => Err(errno.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_left_behind_and_space_is_told() {
        let directory = tempfile::tempdir().unwrap();
        reflink_support(directory.path()).unwrap();
        assert_eq!(directory.path().read_dir().unwrap().count(), 0);
        assert!(free_bytes(directory.path()).unwrap() > 0);
        naming_support(directory.path()).unwrap();
        assert_eq!(directory.path().read_dir().unwrap().count(), 0);
        let missing = directory.path().join("missing");
        let error = free_bytes(&missing).unwrap_err().to_string();
        assert!(error.contains("missing: the directory is gone"), "{error}");
    }
}
