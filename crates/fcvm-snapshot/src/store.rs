//! The directory of snapshots: making, finding and removing them.

use std::fs::{DirBuilder, File};
use std::io::{self, Read};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use fcvm_storage::Shelf;
use fcvm_types::SnapshotTag;
use fcvm_types::record::SnapshotReference;

use crate::draft::Draft;
use crate::error::SnapshotError;
use crate::files::{self, MANIFEST, POOL};
use crate::manifest::{Manifest, ParentRef, loose_parent};
use crate::snapshot::{Snapshot, read_manifest};

/// How the folder of a snapshot is called while it is written. No tag begins so.
const DRAFT_PREFIX: &str = ".new-";
/// How a folder is called while it is deleted.
const REMOVED_PREFIX: &str = ".removed-";
/// What is locked while names change.
const LOCK: &str = ".lock";

/// A directory with a folder for each snapshot.
#[derive(Debug, Clone)]
pub struct SnapshotStore {
    directory: PathBuf,
    pool: Option<PathBuf>,
}

/// Where the disk of a snapshot is.
#[derive(Debug)]
pub(crate) struct DiskPlace {
    directory: PathBuf,
    /// A directory in a mounted pool, and how names in it begin.
    pool: Option<(PathBuf, String)>,
}

impl DiskPlace {
    /// As the folder of the snapshot says.
    pub(crate) fn of(store: &SnapshotStore, folder: &Path) -> io::Result<Self> {
        let pool = match pool_prefix(folder)? {
            None => None,
            Some(prefix) => {
                let mounted = store.pool().ok_or_else(|| {
                    io::Error::other("its disk is in the pool, which is not mounted")
                })?;
                Some((mounted.to_owned(), prefix))
            }
        };
        Ok(Self {
            directory: folder.to_owned(),
            pool,
        })
    }

    pub(crate) fn shelf(&self) -> Shelf<'_> {
        let pool = self.pool.as_ref();
        Shelf {
            directory: &self.directory,
            pool: pool.map(|(directory, prefix)| (&**directory, &**prefix)),
        }
    }

    /// Files in the pool.
    fn pool_files(&self) -> io::Result<Vec<PathBuf>> {
        let Some((directory, prefix)) = &self.pool else {
            return Ok(Vec::new());
        };
        let mut paths = Vec::new();
        for entry in std::fs::read_dir(directory)? {
            let entry = entry?;
            if entry.file_name().to_string_lossy().starts_with(prefix) {
                paths.push(entry.path());
            }
        }
        Ok(paths)
    }
}

/// How the names of a snapshot's files in the pool begin: 32 hexadecimal characters.
fn pool_prefix(folder: &Path) -> io::Result<Option<String>> {
    let mut prefix = String::new();
    match files::open(&folder.join(POOL)) {
        Ok(file) => file.take(100).read_to_string(&mut prefix)?,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    match prefix.len() == 32 && prefix.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        true => Ok(Some(prefix)),
        // A crash may leave it before it was written, and then no file has such a name.
        false if prefix.is_empty() => Ok(None),
        false => Err(io::Error::other(format!("{POOL} is not what was written"))),
    }
}

/// A snapshot in a list: one that is damaged does not hide the others.
#[derive(Debug)]
pub struct Listed {
    /// Its tag.
    pub tag: SnapshotTag,
    /// The snapshot, or why it cannot be used.
    pub snapshot: Result<Snapshot, SnapshotError>,
}

/// What was removed.
#[derive(Debug, Default)]
pub struct Removed {
    /// The snapshots, children before their parents.
    pub tags: Vec<SnapshotTag>,
    /// Space that is free now, as far as no other snapshot or VM shares it.
    pub freed_bytes: u64,
}

/// What was swept.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Swept {
    /// Folders of processes that ended before they were done.
    pub folder_count: usize,
    /// Space that is free now.
    pub freed_bytes: u64,
}

impl SnapshotStore {
    /// A store in `directory`, which is made with the first snapshot.
    pub fn new(directory: PathBuf) -> Self {
        Self {
            directory,
            pool: None,
        }
    }

    /// The store that leaves disks which are in a mounted pool there: in `directory`, which is in it.
    #[must_use]
    pub fn with_pool(self, directory: PathBuf) -> Self {
        Self {
            pool: Some(directory),
            ..self
        }
    }

    /// Whether the disk of any snapshot, or of what is left of one, is in the pool.
    ///
    /// # Errors
    ///
    /// The directory cannot be read.
    pub fn needs_pool(&self) -> io::Result<bool> {
        let names = match self.names() {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
            names => names?,
        };
        let has_disk_there = |name: &String| self.directory.join(name).join(POOL).exists();
        Ok(names.iter().any(has_disk_there))
    }

    pub(crate) fn pool(&self) -> Option<&Path> {
        self.pool.as_deref()
    }

    /// Removes a folder, and before it what of it is in the pool: a crash in between is swept. Tells how much of that was
    /// nobody else's.
    pub(crate) fn remove_folder(&self, path: &Path) -> io::Result<u64> {
        let place = match DiskPlace::of(self, path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(0),
            place => place?,
        };
        let mut freed_bytes = 0;
        for file in place.pool_files()? {
            freed_bytes += fcvm_storage::pool_file_bytes(&file);
            match std::fs::remove_file(&file) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
        }
        files::remove_folder(path)?;
        Ok(freed_bytes)
    }

    /// Where it is.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Takes a tag for a new snapshot, which becomes visible with [`Draft::finish`].
    ///
    /// # Errors
    ///
    /// The tag is taken, or another process is using it just now; or the directory cannot be
    /// written to.
    pub fn begin(&self, tag: &SnapshotTag) -> Result<Draft, SnapshotError> {
        let failed = SnapshotError::io("create a snapshot", &self.directory);
        let mut builder = DirBuilder::new();
        builder.recursive(true).mode(0o700);
        builder.create(&self.directory).map_err(&failed)?;
        let _lock = self.lock().map_err(&failed)?;
        if self.folder(tag).symlink_metadata().is_ok() {
            return Err(SnapshotError::Exists(tag.clone()));
        }
        let path = self.directory.join(format!("{DRAFT_PREFIX}{tag}"));
        match files::open_folder(&path) {
            Ok(folder) if !files::try_lock(&folder).map_err(&failed)? => {
                return Err(SnapshotError::Busy(tag.clone()));
            }
            // Its creator has ended.
            Ok(_) => drop(self.remove_folder(&path).map_err(&failed)?),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(failed(error)),
        }
        builder.recursive(false).create(&path).map_err(&failed)?;
        let open = || {
            let folder = files::open_folder(&path)?;
            if files::try_lock(&folder)? {
                return Ok(folder);
            }
            Err(io::Error::other("its folder is locked by another process"))
        };
        let folder = open().map_err(|error| {
            // Whatever failed, nothing is left.
            let _ = files::remove_folder(&path);
            failed(error)
        })?;
        Ok(Draft::new(self.clone(), tag.clone(), path, folder))
    }

    /// Opens a snapshot: its manifest is checked, and all files are there with their sizes. Of what they
    /// hold only indexes are read, see [`Snapshot::verify`].
    ///
    /// # Errors
    ///
    /// There is none, it is damaged, or of a later version.
    pub fn open(&self, tag: &SnapshotTag) -> Result<Snapshot, SnapshotError> {
        Snapshot::open(self, tag)
    }

    /// Opens a snapshot that something was begun from; nothing where it is gone or cannot be used, or where another
    /// has its tag.
    pub fn referenced(&self, reference: &SnapshotReference) -> Option<Snapshot> {
        let tag: SnapshotTag = reference.tag.parse().ok()?;
        let found = self.open(&tag).ok()?;
        (found.manifest().id.as_str() == reference.id).then_some(found)
    }

    /// All snapshots, in the order of their tags.
    ///
    /// # Errors
    ///
    /// The directory cannot be read.
    pub fn list(&self) -> Result<Vec<Listed>, SnapshotError> {
        let mut listed = Vec::new();
        for tag in self.tags()? {
            match self.open(&tag) {
                // Removed meanwhile.
                Err(SnapshotError::NotFound(_)) => {}
                snapshot => listed.push(Listed { tag, snapshot }),
            }
        }
        Ok(listed)
    }

    /// Snapshots whose memory is a difference to this one's, in the order of their tags. Those that
    /// are damaged are among them as far as their manifests still tell.
    ///
    /// # Errors
    ///
    /// The directory cannot be read.
    pub fn children(&self, tag: &SnapshotTag) -> Result<Vec<SnapshotTag>, SnapshotError> {
        let mut children = Vec::new();
        for other in self.tags()? {
            if self
                .parent_of(&other)
                .is_some_and(|parent| parent.tag == *tag)
            {
                children.push(other);
            }
        }
        Ok(children)
    }

    /// Removes a snapshot, damaged or not. Clones that run are not disturbed where they have its memory
    /// and its disk open: what they use goes with them.
    ///
    /// # Errors
    ///
    /// There is none; others are differences to it, and `prune_children` is not set, which
    /// removes them too; or its folder cannot be deleted.
    pub fn remove(
        &self,
        tag: &SnapshotTag,
        prune_children: bool,
    ) -> Result<Removed, SnapshotError> {
        let failed = SnapshotError::io("remove a snapshot", &self.directory);
        let lock = match self.lock() {
            Ok(lock) => lock,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Err(SnapshotError::NotFound(tag.clone()));
            }
            Err(error) => return Err(failed(error)),
        };
        if !self.folder(tag).is_dir() {
            return Err(SnapshotError::NotFound(tag.clone()));
        }
        let children = self.children(tag)?;
        if !children.is_empty() && !prune_children {
            return Err(SnapshotError::Needed {
                tag: tag.clone(),
                children,
            });
        }
        let mut tags = vec![tag.clone()];
        let mut next = 0;
        while next < tags.len() {
            for child in self.children(&tags[next])? {
                // Damaged manifests may name each other in a circle.
                if !tags.contains(&child) {
                    tags.push(child);
                }
            }
            next += 1;
        }
        tags.reverse();
        let mut away = Vec::new();
        for tag in &tags {
            let name = format!("{REMOVED_PREFIX}{}", files::random_hex().map_err(&failed)?);
            let path = self.directory.join(name);
            files::rename(&self.folder(tag), &path).map_err(&failed)?;
            away.push(path);
        }
        self.sync().map_err(&failed)?;
        // Deleting takes time, and nobody sees it.
        drop(lock);
        let mut freed_bytes = 0;
        for path in away {
            freed_bytes += unshared_bytes(&path);
            freed_bytes += self.remove_folder(&path).map_err(&failed)?;
        }
        Ok(Removed { tags, freed_bytes })
    }

    /// Deletes what processes left that ended while they were creating or removing a snapshot. Those that
    /// still run are left alone.
    ///
    /// # Errors
    ///
    /// The directory cannot be read, or a folder not be deleted.
    pub fn sweep(&self) -> Result<Swept, SnapshotError> {
        let failed = SnapshotError::io("clean up", &self.directory);
        let mut swept = Swept::default();
        let _lock = match self.lock() {
            Ok(lock) => lock,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(swept),
            Err(error) => return Err(failed(error)),
        };
        for name in self.names().map_err(&failed)? {
            let path = self.directory.join(&name);
            if name.starts_with(DRAFT_PREFIX) {
                match files::open_folder(&path) {
                    Ok(folder) if !files::try_lock(&folder).map_err(&failed)? => continue,
                    Ok(_) => {}
                    Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                    Err(error) => return Err(failed(error)),
                }
            } else if !name.starts_with(REMOVED_PREFIX) {
                continue;
            }
            swept.freed_bytes += unshared_bytes(&path);
            swept.freed_bytes += self.remove_folder(&path).map_err(&failed)?;
            swept.folder_count += 1;
        }
        Ok(swept)
    }

    pub(crate) fn folder(&self, tag: &SnapshotTag) -> PathBuf {
        self.directory.join(tag.as_str())
    }

    /// Takes the lock under which names change.
    pub(crate) fn lock(&self) -> io::Result<File> {
        let lock = File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(self.directory.join(LOCK))?;
        files::lock(&lock)?;
        Ok(lock)
    }

    /// Makes the names in the directory durable.
    pub(crate) fn sync(&self) -> io::Result<()> {
        files::open_folder(&self.directory)?.sync_all()
    }

    fn names(&self) -> io::Result<Vec<String>> {
        let mut names = Vec::new();
        for entry in std::fs::read_dir(&self.directory)? {
            // What is no text is none of ours.
            names.extend(entry?.file_name().into_string());
        }
        names.sort();
        Ok(names)
    }

    fn tags(&self) -> Result<Vec<SnapshotTag>, SnapshotError> {
        let names = match self.names() {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
            names => names.map_err(SnapshotError::io("list snapshots", &self.directory))?,
        };
        let tags = names.iter().filter_map(|name| name.parse().ok());
        Ok(tags.filter(|tag| self.folder(tag).is_dir()).collect())
    }

    fn parent_of(&self, tag: &SnapshotTag) -> Option<ParentRef> {
        let bytes = read_manifest(&self.folder(tag).join(MANIFEST)).ok()?;
        match Manifest::parse(tag, &bytes) {
            Ok(manifest) => manifest.parent,
            Err(_) => loose_parent(&bytes),
        }
    }
}

/// Space of the files in a folder that have no other name.
fn unshared_bytes(path: &Path) -> u64 {
    let Ok(entries) = std::fs::read_dir(path) else {
        return 0;
    };
    let metadata = entries.filter_map(|entry| entry.ok()?.metadata().ok());
    let own = metadata.filter(|metadata| metadata.is_file() && metadata.nlink() == 1);
    own.map(|metadata| metadata.blocks() * 512).sum()
}
