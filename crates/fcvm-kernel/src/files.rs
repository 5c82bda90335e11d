//! Files that are there whole or not at all, and their checksums.

use std::fs::{self, File, TryLockError};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use sha2::{Digest, Sha256};
use tempfile::TempDir;

use crate::progress::{Progress, SetupEvent, SetupStage};
use crate::{KernelError, Result};

/// Names that begin so are unfinished work: whoever holds the lock may remove them.
pub(crate) const PARTIAL_PREFIX: &str = ".partial-";
/// The file that [`lock`] locks.
const LOCK_NAME: &str = "lock";

/// Creates a directory with its parents.
pub(crate) fn create_dir(path: &Path) -> Result<()> {
    fs::create_dir_all(path).map_err(KernelError::file("create the directory", path))
}

/// Takes the lock of a kernel directory; it is held until the file is dropped or its holder dies.
pub(crate) fn lock(directory: &Path, progress: Progress<'_>) -> Result<File> {
    let path = directory.join(LOCK_NAME);
    let file = File::options()
        .create(true)
        .truncate(false)
        .read(true)
        .write(true)
        .open(&path)
        .map_err(KernelError::file("open", &path))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => {
            progress(SetupEvent::start(SetupStage::Waiting, ""));
            file.lock().map_err(KernelError::file("lock", &path))?;
            Ok(file)
        }
        Err(TryLockError::Error(error)) => Err(KernelError::file("lock", &path)(error)),
    }
}

/// A directory for work that is not finished, removed when dropped.
pub(crate) fn partial_dir(parent: &Path) -> Result<TempDir> {
    tempfile::Builder::new()
        .prefix(PARTIAL_PREFIX)
        .tempdir_in(parent)
        .map_err(KernelError::file("create a directory in", parent))
}

/// Removes what killed predecessors left. The caller holds the lock.
pub(crate) fn remove_partial(parent: &Path) -> Result<()> {
    for entry in fs::read_dir(parent).map_err(KernelError::file("read", parent))? {
        let entry = entry.map_err(KernelError::file("read", parent))?;
        if entry
            .file_name()
            .as_encoded_bytes()
            .starts_with(PARTIAL_PREFIX.as_bytes())
        {
            remove(&entry.path())?;
        }
    }
    Ok(())
}

/// Removes a file or a whole directory; one that is not there is fine.
pub(crate) fn remove(path: &Path) -> Result<()> {
    let removed = match fs::symlink_metadata(path) {
        Ok(metadata) if metadata.is_dir() => fs::remove_dir_all(path),
        Ok(_) => fs::remove_file(path),
        Err(error) => Err(error),
    };
    match removed {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(KernelError::file("remove", path)(error))
        }
        _ => Ok(()),
    }
}

/// Writes a new file and waits until it is on the disk.
pub(crate) fn write_synced(path: &Path, bytes: &[u8]) -> Result<()> {
    let write = || {
        let mut file = File::options().write(true).create_new(true).open(path)?;
        file.write_all(bytes)?;
        file.sync_all()
    };
    write().map_err(KernelError::file("write", path))
}

/// Gives a file its name only when it is whole and on the disk.
pub(crate) fn write_atomically(path: &Path, bytes: &[u8]) -> Result<()> {
    let parent = path.parent().unwrap_or(Path::new("."));
    let fill = || -> io::Result<()> {
        let mut file = tempfile::Builder::new()
            .prefix(PARTIAL_PREFIX)
            .tempfile_in(parent)?;
        file.write_all(bytes)?;
        file.as_file().sync_all()?;
        file.persist(path)
            .map(|_| ())
            .map_err(|failed| failed.error)
    };
    fill().map_err(KernelError::file("write", path))?;
    sync_dir(parent)
}

/// Copies a file; the copy has its name only when it is whole and on the disk.
pub(crate) fn copy_atomically(source: &Path, path: &Path) -> Result<()> {
    let parent = path.parent().unwrap_or(Path::new("."));
    let fill = || -> io::Result<()> {
        let mut file = tempfile::Builder::new()
            .prefix(PARTIAL_PREFIX)
            .tempfile_in(parent)?;
        io::copy(&mut File::open(source)?, file.as_file_mut())?;
        file.as_file().sync_all()?;
        file.persist(path)
            .map(|_| ())
            .map_err(|failed| failed.error)
    };
    fill().map_err(KernelError::file("write", path))?;
    sync_dir(parent)
}

/// Lets everybody read a file that was made as a private temporary one.
pub(crate) fn make_readable(path: &Path) -> Result<()> {
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o644);
    match fs::set_permissions(path, mode) {
        // File systems of firmware have no modes.
        Err(error) if error.kind() != io::ErrorKind::PermissionDenied => {
            Err(KernelError::file("set the mode of", path)(error))
        }
        _ => Ok(()),
    }
}

/// The file `name` in `parent` (created where missing), made by `content` where it is not there or has
/// another size. `kept_count` files stay in `parent`, those that were asked for last.
pub(crate) fn cached<B: AsRef<[u8]>>(
    parent: &Path,
    name: &str,
    size_bytes: u64,
    kept_count: usize,
    content: impl FnOnce() -> Result<B>,
) -> Result<PathBuf> {
    let path = parent.join(name);
    if is_whole(&path, size_bytes) {
        return Ok(path);
    }
    create_dir(parent)?;
    let _lock = lock(parent, &mut |_| {})?;
    remove_partial(parent)?;
    // Another process may have made it while this one waited for the lock.
    if !is_whole(&path, size_bytes) {
        write_atomically(&path, content()?.as_ref())?;
        remove_longest_unused(parent, kept_count)?;
    }
    Ok(path)
}

/// True for a file of this size, whose time of use it sets. A directory that cannot be written to
/// is no obstacle.
fn is_whole(path: &Path, size_bytes: u64) -> bool {
    let whole =
        fs::metadata(path).is_ok_and(|metadata| metadata.is_file() && metadata.len() == size_bytes);
    if whole {
        let _ = File::options()
            .append(true)
            .open(path)
            .and_then(|file| file.set_modified(SystemTime::now()));
    }
    whole
}

fn remove_longest_unused(parent: &Path, kept_count: usize) -> Result<()> {
    let mut files: Vec<(SystemTime, PathBuf)> = entries(parent)?
        .into_iter()
        .filter(|path| path.file_name().is_some_and(|name| name != LOCK_NAME))
        .filter_map(|path| Some((fs::metadata(&path).ok()?.modified().ok()?, path)))
        .collect();
    files.sort();
    let surplus = files.len().saturating_sub(kept_count);
    files
        .iter()
        .take(surplus)
        .try_for_each(|(_, path)| remove(path))
}

/// Waits until the names in a directory are on the disk.
pub(crate) fn sync_dir(path: &Path) -> Result<()> {
    File::open(path)
        .and_then(|directory| directory.sync_all())
        .map_err(KernelError::file("write", path))
}

/// Reads a whole file, at most `limit_bytes` of it.
pub(crate) fn read_bounded(path: &Path, limit_bytes: usize) -> Result<Vec<u8>> {
    let read = || {
        let file = File::open(path)?;
        if !file.metadata()?.is_file() {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "it is not a regular file",
            ));
        }
        let mut bytes = Vec::new();
        file.take(limit_bytes as u64 + 1).read_to_end(&mut bytes)?;
        if bytes.len() > limit_bytes {
            return Err(io::Error::new(
                io::ErrorKind::FileTooLarge,
                format!("it is larger than {limit_bytes} bytes"),
            ));
        }
        Ok(bytes)
    };
    read().map_err(KernelError::file("read", path))
}

/// SHA-256 of bytes, in hexadecimal.
pub(crate) fn sha256_hex(bytes: &[u8]) -> String {
    hexadecimal(&Sha256::digest(bytes))
}

/// Lower-case hexadecimal digits of bytes.
pub(crate) fn hexadecimal(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The paths of the entries of a directory; none where the directory is not there.
pub(crate) fn entries(directory: &Path) -> Result<Vec<PathBuf>> {
    match fs::read_dir(directory) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(KernelError::file("read", directory)(error)),
        Ok(entries) => entries
            .map(|entry| entry.map(|entry| entry.path()))
            .collect::<io::Result<_>>()
            .map_err(KernelError::file("read", directory)),
    }
}
