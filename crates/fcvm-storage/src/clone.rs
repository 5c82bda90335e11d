//! Copying a file so that the copy shares what it can with the original.

use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};

use rustix::fs::SeekFrom;
use rustix::io::Errno;

/// Bytes copied at a time where the kernel can not copy by itself.
const COPY_BYTES: usize = 128 << 10;

/// How a clone was made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CloneMethod {
    /// It shares the original's blocks until one of the two is written.
    Reflink,
    /// The original's bytes were copied, its holes left out.
    Copy,
}

/// Makes the empty `target` a copy of `source`.
///
/// # Errors
///
/// The file system of `target` is full, or one of the two fails.
pub fn clone_file(source: &File, target: &File) -> io::Result<CloneMethod> {
    if reflink(source, target)? {
        return Ok(CloneMethod::Reflink);
    }
    if shares_when_copying(source, target)? {
        share_or_copy(source, target)?;
        return Ok(CloneMethod::Reflink);
    }
    sparse_copy(source, target)?;
    Ok(CloneMethod::Copy)
}

/// Shares all blocks of `source` with `target`, ioctl_ficlone(2); false where the file system can
/// not.
pub(crate) fn reflink(source: &File, target: &File) -> io::Result<bool> {
    match rustix::fs::ioctl_ficlone(target, source) {
        Ok(()) => Ok(true),
        Err(Errno::OPNOTSUPP | Errno::XDEV | Errno::INVAL | Errno::NOTTY | Errno::NOSYS) => {
            Ok(false)
        }
        Err(errno) => Err(errno.into()),
    }
}

/// Whether both are in one file system of a process, such as a mounted pool: holes are then for that process to keep.
fn shares_when_copying(source: &File, target: &File) -> io::Result<bool> {
    /// FUSE_SUPER_MAGIC, include/uapi/linux/magic.h.
    const FUSE: i64 = 0x6573_5546;
    let is_one = source.metadata()?.dev() == target.metadata()?.dev();
    Ok(is_one && rustix::fs::fstatfs(target)?.f_type as i64 == FUSE)
}

/// Copies everything at once, which is a clone in a mounted pool; part by part where that cannot be.
pub(crate) fn share_or_copy(source: &File, target: &File) -> io::Result<()> {
    if !shares_when_copying(source, target)? {
        return sparse_copy(source, target);
    }
    let length = source.metadata()?.len();
    target.set_len(length)?;
    copy_range(source, target, 0, length)
}

/// Copies the parts that are no holes.
pub(crate) fn sparse_copy(source: &File, target: &File) -> io::Result<()> {
    let length = source.metadata()?.len();
    target.set_len(length)?;
    for_each_extent(source, length, |start, end| {
        copy_range(source, target, start, end)
    })
}

/// Calls `visit` with begin and end of each part of a file of `length` bytes that is no hole.
pub(crate) fn for_each_extent(
    file: &File,
    length: u64,
    mut visit: impl FnMut(u64, u64) -> io::Result<()>,
) -> io::Result<()> {
    let mut offset = 0;
    while offset < length {
        let start = match rustix::fs::seek(file, SeekFrom::Data(offset)) {
            Ok(start) => start,
            // Only a hole is left.
            Err(Errno::NXIO) => break,
            Err(errno) => return Err(errno.into()),
        };
        let end = rustix::fs::seek(file, SeekFrom::Hole(start))?.min(length);
        visit(start, end)?;
        offset = end;
    }
    Ok(())
}

fn copy_range(source: &File, target: &File, start: u64, end: u64) -> io::Result<()> {
    let mut at = start;
    while at < end {
        let (mut from, mut to) = (at, at);
        let count = usize::try_from(end - at).unwrap_or(usize::MAX);
        let copied =
            rustix::fs::copy_file_range(source, Some(&mut from), target, Some(&mut to), count);
        match copied {
            Ok(copied) if copied > 0 => at += copied as u64,
            // The file became shorter, or this pair of file systems can not.
            Ok(_) | Err(Errno::XDEV | Errno::OPNOTSUPP | Errno::NOSYS | Errno::INVAL) => {
                return copy_bytes(source, target, at, end);
            }
            Err(errno) => return Err(errno.into()),
        }
    }
    Ok(())
}

fn copy_bytes(source: &File, target: &File, start: u64, end: u64) -> io::Result<()> {
    let mut buffer = vec![0; COPY_BYTES];
    let mut at = start;
    while at < end {
        let wanted = buffer
            .len()
            .min(usize::try_from(end - at).unwrap_or(usize::MAX));
        source.read_exact_at(&mut buffer[..wanted], at)?;
        target.write_all_at(&buffer[..wanted], at)?;
        at += wanted as u64;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn holes_stay_holes_and_bytes_arrive() {
        let source = tempfile::tempfile().unwrap();
        source.set_len(64 << 20).unwrap();
        source.write_all_at(&[7; 5000], 1 << 20).unwrap();
        source.write_all_at(&[9; 3], (64 << 20) - 3).unwrap();
        for copy in [sparse_copy, |source: &File, target: &File| {
            target.set_len(64 << 20)?;
            copy_bytes(source, target, 1 << 20, (1 << 20) + 5000)?;
            copy_bytes(source, target, (64 << 20) - 3, 64 << 20)
        }] {
            let target = tempfile::tempfile().unwrap();
            copy(&source, &target).unwrap();
            let data = target.metadata().unwrap();
            assert_eq!(data.len(), 64 << 20);
            assert!(data.blocks() * 512 < 1 << 20, "{} blocks", data.blocks());
            let mut bytes = [0; 5001];
            target.read_exact_at(&mut bytes, 1 << 20).unwrap();
            assert_eq!(bytes[..5000], [7; 5000]);
            assert_eq!(bytes[5000], 0);
            let mut end = [0; 3];
            target.read_exact_at(&mut end, (64 << 20) - 3).unwrap();
            assert_eq!(end, [9; 3]);
        }
    }
}
