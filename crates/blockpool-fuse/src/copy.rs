//! Copying from file to file: what can be shared is, the rest is copied.

use blockpool::{Object, PoolError, RECORD_BYTES};
use rustix::io::Errno;

use crate::filesystem::{FileSystem, errno};
use crate::node::{Node, Target, lock};

/// Bytes that are copied for one request where they cannot be shared.
const COPY_BYTES_MAX: u64 = 4 << 20;

/// A place in a file.
#[derive(Clone, Copy)]
pub(crate) struct Place<'a> {
    pub(crate) node: &'a Node,
    pub(crate) offset_bytes: u64,
}

impl Place<'_> {
    fn object(&self) -> Result<&Object, Errno> {
        match &self.node.target {
            Target::File(object) => Ok(object),
            Target::Root | Target::Dataset(_) => Err(Errno::ISDIR),
        }
    }
}

/// What one request does.
#[derive(Debug, PartialEq, Eq)]
enum Step {
    Share(u64),
    Copy(u64),
}

/// How much of `length_bytes` is shared or copied at once: whoever asks for it goes on behind what was done.
///
/// Records are shared as a whole; the end of a file is one where it becomes the end of the other.
fn plan(source: u64, source_size: u64, target: u64, target_size: u64, length_bytes: u64) -> Step {
    let to_border = RECORD_BYTES - source % RECORD_BYTES;
    if source % RECORD_BYTES != target % RECORD_BYTES {
        return Step::Copy(length_bytes.min(COPY_BYTES_MAX));
    }
    if to_border != RECORD_BYTES {
        return Step::Copy(length_bytes.min(to_border));
    }
    let is_end = source + length_bytes == source_size && target + length_bytes >= target_size;
    if is_end {
        return Step::Share(length_bytes);
    }
    match length_bytes / RECORD_BYTES * RECORD_BYTES {
        0 => Step::Copy(length_bytes),
        whole => Step::Share(whole),
    }
}

impl FileSystem {
    /// Copies up to `length_bytes`; returns how many were.
    pub(crate) fn copy_range(
        &self,
        source: Place<'_>,
        target: Place<'_>,
        length_bytes: u64,
    ) -> Result<u64, Errno> {
        let (from, to) = (source.object()?, target.object()?);
        if target.node.is_snapshot {
            return Err(Errno::PERM);
        }
        let source_size = from.size_bytes().map_err(errno)?;
        let left = source_size.saturating_sub(source.offset_bytes);
        let length_bytes = length_bytes.min(left);
        if length_bytes == 0 {
            return Ok(0);
        }
        let target_size = to.size_bytes().map_err(errno)?;
        let (at, into) = (source.offset_bytes, target.offset_bytes);
        if into
            .checked_add(length_bytes)
            .is_none_or(|end| end > blockpool::OBJECT_MAX_BYTES)
        {
            return Err(Errno::FBIG);
        }
        let done = match plan(at, source_size, into, target_size, length_bytes) {
            Step::Share(length) => {
                self.grow(target.node, to, into + length)?;
                match self.pool.clone_range(from, at, to, into, length) {
                    Ok(()) => Ok(length),
                    // Another changed the size meanwhile, or a block has too many references.
                    Err(PoolError::Range { .. } | PoolError::TooManyReferences) => {
                        copy_bytes(from, at, to, into, length.min(COPY_BYTES_MAX))
                    }
                    Err(error) => Err(error),
                }
            }
            Step::Copy(length) => {
                self.grow(target.node, to, into + length)?;
                copy_bytes(from, at, to, into, length)
            }
        };
        target.node.touch();
        done.map_err(errno)
    }

    /// Makes a file at least that long.
    pub(crate) fn grow(&self, node: &Node, object: &Object, size_bytes: u64) -> Result<(), Errno> {
        if size_bytes > blockpool::OBJECT_MAX_BYTES {
            return Err(Errno::FBIG);
        }
        if object.size_bytes().map_err(errno)? >= size_bytes {
            return Ok(());
        }
        let _growth = lock(&node.growth);
        if object.size_bytes().map_err(errno)? < size_bytes {
            object.set_size(size_bytes).map_err(errno)?;
        }
        Ok(())
    }
}

fn copy_bytes(
    from: &Object,
    at: u64,
    to: &Object,
    into: u64,
    length: u64,
) -> Result<u64, PoolError> {
    let mut buffer = vec![0; length.min(1 << 20) as usize];
    let mut done = 0;
    while done < length {
        let piece = (length - done).min(buffer.len() as u64) as usize;
        from.read_at(&mut buffer[..piece], at + done)?;
        to.write_at(&buffer[..piece], into + done)?;
        done += piece as u64;
    }
    Ok(done)
}

#[cfg(test)]
mod tests {
    use super::*;

    const R: u64 = RECORD_BYTES;

    #[test]
    fn records_are_shared_and_odd_ends_too_where_they_are_ends() {
        // The kernel's largest request is no multiple of a record.
        let cap = 4_294_963_200;
        assert_eq!(plan(0, 8 << 30, 0, 0, cap), Step::Share(cap / R * R));
        assert_eq!(
            plan(0, 10 * R + 5, 0, 0, 10 * R + 5),
            Step::Share(10 * R + 5)
        );
        assert_eq!(
            plan(0, 10 * R + 5, 0, 20 * R, 10 * R + 5),
            Step::Share(10 * R)
        );
        assert_eq!(plan(0, 10 * R, R, 0, 5), Step::Copy(5));
        assert_eq!(plan(7, 10 * R, R + 7, 0, 3 * R), Step::Copy(R - 7));
        assert_eq!(plan(7, 10 * R, R, 0, 3 * R), Step::Copy(3 * R));
        assert_eq!(plan(7, 1 << 40, R, 0, 1 << 40), Step::Copy(COPY_BYTES_MAX));
    }
}
