//! Where targets write files: in memory where there is such a file system, for the disk is not what is
//! tested.

use std::path::Path;

/// A directory that is removed when the process ends in order.
pub fn directory() -> tempfile::TempDir {
    let parent = Path::new("/dev/shm");
    let parent = if parent.is_dir() { parent.to_owned() } else { std::env::temp_dir() };
    tempfile::tempdir_in(parent).expect("a directory for files")
}
