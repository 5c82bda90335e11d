//! `fcvm pool create`, and the pool of the data directory that the first VM makes.

use std::os::unix::fs::DirBuilderExt;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context as _, bail};
use blockpool::{FileDisk, Pool, PoolError};
use rustix::fs::{CWD, RenameFlags};
use rustix::io::Errno;

/// Makes a pool in a new file, or on an empty block device.
pub(crate) fn create(path: &Path, size_bytes: u64) -> anyhow::Result<()> {
    if path.exists() && !path.is_file() {
        return on_device(path, size_bytes);
    }
    if path.exists() {
        bail!(already_exists(path));
    }
    if let Some(directory) = path.parent() {
        let made = std::fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(directory);
        made.with_context(|| format!("cannot make {}", directory.display()))?;
    }
    in_file(path, size_bytes)
}

/// What is on a device is nobody's to guess: a file is made new, a device has to be empty.
fn on_device(path: &Path, size_bytes: u64) -> anyhow::Result<()> {
    let disk = FileDisk::open(path)?;
    let mut start = vec![0; 1 << 16];
    blockpool::Disk::read_at(&disk, &mut start, 0)
        .with_context(|| format!("cannot read {}", path.display()))?;
    if start.iter().any(|byte| *byte != 0) {
        bail!(
            "{} is not empty; clear its beginning with 'wipefs --all' or 'blkdiscard' if nothing on it is needed",
            path.display()
        );
    }
    Pool::create(Arc::new(disk), size_bytes, new_id()?)?;
    Ok(())
}

/// A pool that is made half is none: it gets its name when it is whole.
fn in_file(path: &Path, size_bytes: u64) -> anyhow::Result<()> {
    let failed = || format!("cannot make the pool {}", path.display());
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let unfinished = &path.with_file_name(format!(".{name}.fcvm-unfinished"));
    match FileDisk::open(unfinished) {
        // Somebody is at it.
        Err(error @ PoolError::InUse { .. }) => return Err(error.into()),
        // Whoever was has been killed.
        Ok(_) => std::fs::remove_file(unfinished).with_context(failed)?,
        // There is none; what else is wrong shows now.
        Err(_) => {}
    }
    let disk = FileDisk::create(unfinished, size_bytes)?;
    let made = new_id()
        .and_then(|id| Ok(Pool::create(Arc::new(disk), size_bytes, id)?))
        .and_then(|_| name_it(unfinished, path));
    if made.is_err() {
        // The failure is what counts.
        let _ = std::fs::remove_file(unfinished);
    }
    made
}

fn name_it(unfinished: &Path, path: &Path) -> anyhow::Result<()> {
    let renamed = rustix::fs::renameat_with(CWD, unfinished, CWD, path, RenameFlags::NOREPLACE);
    let renamed = match renamed {
        Err(Errno::EXIST) => bail!(already_exists(path)),
        // A file system that cannot refuse to replace: there was nothing when this began.
        Err(Errno::INVAL | Errno::NOSYS) => std::fs::rename(unfinished, path),
        other => other.map_err(std::io::Error::from),
    };
    renamed.with_context(|| format!("cannot make the pool {}", path.display()))
}

fn already_exists(path: &Path) -> String {
    format!(
        "{} already exists: use it, remove it, or choose another file with --pool",
        path.display()
    )
}

fn new_id() -> anyhow::Result<[u8; 16]> {
    let mut id = [0; 16];
    getrandom::fill(&mut id)
        .map_err(|error| anyhow::anyhow!("cannot get random bytes: {error}"))?;
    Ok(id)
}
