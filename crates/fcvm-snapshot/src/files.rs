//! Files and folders of a snapshot: opened so that nothing outside is reached, and locked.

use std::fs::File;
use std::io;
use std::path::Path;

use rustix::fs::{CWD, FlockOperation, Mode, OFlags, RenameFlags};
use rustix::io::Errno;

/// What a snapshot is.
pub(crate) const MANIFEST: &str = "manifest.json";
/// Its memory, a page file.
pub(crate) const MEMORY: &str = "memory.pages";
/// The state of its devices.
pub(crate) const STATE: &str = "state.bin";
/// The pages that its clones ask for first; added to a snapshot that is there.
pub(crate) const WORKING_SET: &str = "working-set.bin";
/// How the names of those files of its disk begin that are in a pool; only where there are any.
pub(crate) const POOL: &str = "disk.pool";
/// How the files of its disk begin.
pub(crate) const DISK: &str = "disk";

/// A new file that the user alone can read: the memory of a VM has its secrets.
pub(crate) fn create(path: &Path) -> io::Result<File> {
    let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    Ok(rustix::fs::open(path, flags, Mode::RUSR | Mode::WUSR)?.into())
}

/// A regular file, for reading. A pipe in its place keeps nobody waiting, nor does a link lead
/// elsewhere.
pub(crate) fn open(path: &Path) -> io::Result<File> {
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW | OFlags::NONBLOCK;
    let file = File::from(rustix::fs::open(path, flags, Mode::empty())?);
    if !file.metadata()?.is_file() {
        return Err(io::Error::other("it is not a regular file"));
    }
    Ok(file)
}

/// A folder, no link to one.
pub(crate) fn open_folder(path: &Path) -> io::Result<File> {
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW | OFlags::DIRECTORY;
    Ok(rustix::fs::open(path, flags, Mode::empty())?.into())
}

/// Waits until no other process has the lock. It ends with the descriptor.
pub(crate) fn lock(file: &File) -> io::Result<()> {
    let lock = || rustix::fs::flock(file, FlockOperation::LockExclusive);
    Ok(rustix::io::retry_on_intr(lock)?)
}

/// Takes the lock where nobody has it.
pub(crate) fn try_lock(file: &File) -> io::Result<bool> {
    match rustix::fs::flock(file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(true),
        Err(Errno::WOULDBLOCK) => Ok(false),
        Err(errno) => Err(errno.into()),
    }
}

/// Renames without replacing anything. The caller has the store's lock.
pub(crate) fn rename(from: &Path, to: &Path) -> io::Result<()> {
    match rustix::fs::renameat_with(CWD, from, CWD, to, RenameFlags::NOREPLACE) {
        Ok(()) => Ok(()),
        // A file system that cannot: then the lock has to do.
        Err(Errno::INVAL | Errno::NOSYS) => match to.symlink_metadata() {
            Ok(_) => Err(Errno::EXIST.into()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => std::fs::rename(from, to),
            Err(error) => Err(error),
        },
        Err(errno) => Err(errno.into()),
    }
}

/// Removes a folder and all in it. One that is gone is no failure.
pub(crate) fn remove_folder(path: &Path) -> io::Result<()> {
    match std::fs::remove_dir_all(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// 128 random bits in hexadecimal.
pub(crate) fn random_hex() -> io::Result<String> {
    use std::fmt::Write;
    let mut bits = [0_u8; 16];
    let mut filled = 0;
    while filled < bits.len() {
        let flags = rustix::rand::GetRandomFlags::empty();
        filled +=
            rustix::io::retry_on_intr(|| rustix::rand::getrandom(&mut bits[filled..], flags))?;
    }
    let mut text = String::new();
    for byte in bits {
        // Writing to a String cannot fail.
        let _ = write!(text, "{byte:02x}");
    }
    Ok(text)
}
