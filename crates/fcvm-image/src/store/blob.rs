//! Adding content: blobs that get their final name once they are complete and verified.
//!
//! A blob is written to a temporary file, synced, and renamed to the name its digest gives it. An
//! interrupted download keeps its temporary file, under a name of its digest, for the next try.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, Read, Write};
use std::mem;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use oci_spec::image::MediaType;
use tempfile::NamedTempFile;

use super::{CONTENT_LOCK, Image, ImageStore, Lock, StoreError, index};
use crate::digest::{Digest, Hasher};
use crate::format;
use crate::reference::Reference;

const PARTIAL_PREFIX: &str = "partial-";
const COPY_BUFFER_BYTES: usize = 256 * 1024;

impl ImageStore {
    /// Begins to add an image. Nothing is removed from the store while the value lives. Dropped
    /// before [`Ingest::finish`], it takes away what it has added.
    pub(crate) fn begin(&self) -> Result<Ingest, StoreError> {
        let lock = Lock::shared(&self.dir.join(CONTENT_LOCK))?;
        Ok(Ingest {
            store: self.clone(),
            lock: Some(lock),
            added: Mutex::default(),
            keeps_content: false,
        })
    }

    /// As [`begin`](Self::begin), and what was added stays for the next try.
    pub(crate) fn begin_resumable(&self) -> Result<Ingest, StoreError> {
        let mut ingest = self.begin()?;
        ingest.keeps_content = true;
        Ok(ingest)
    }

    /// Opens what an earlier try left of this blob, or begins it. `None` while another process fetches
    /// the same blob; when it has finished, the blob may be here.
    ///
    /// Call it while an [`Ingest`] lives.
    pub(crate) fn try_partial(&self, digest: &Digest) -> Result<Option<Partial>, StoreError> {
        let path = self
            .temporary_dir()
            .join(format!("{PARTIAL_PREFIX}{}", digest.hex()));
        let file = open_named(&path)?;
        match file.try_lock() {
            Ok(()) if is_same_file(&file, &path) => {}
            Ok(()) | Err(TryLockError::WouldBlock) => return Ok(None),
            Err(TryLockError::Error(error)) => return Err(StoreError::io("lock", &path)(error)),
        }
        let (store, digest) = (self.clone(), *digest);
        let mut partial = Partial {
            store,
            digest,
            file,
            path,
            hasher: Hasher::default(),
        };
        partial.read_what_is_here()?;
        Ok(Some(partial))
    }
}

/// An image on its way into the store.
#[derive(Debug)]
pub(crate) struct Ingest {
    store: ImageStore,
    lock: Option<Lock>,
    /// Blobs that were not here before.
    added: Mutex<Vec<Digest>>,
    keeps_content: bool,
}

impl Drop for Ingest {
    fn drop(&mut self) {
        let added = mem::take(self.added.get_mut().unwrap_or_else(PoisonError::into_inner));
        // The lock of this process would keep it from the exclusive one.
        self.lock = None;
        if !self.keeps_content && !added.is_empty() {
            // Where others add images at this moment they may count on these blobs already; then
            // the next prune removes what nobody has come to need.
            let _ = self.store.free_blobs(&added);
        }
    }
}

impl Ingest {
    /// A complete blob of this digest and size is here. Its content was verified when it came and
    /// is verified again when it is used.
    pub(crate) fn has(&self, digest: &Digest, size_bytes: u64) -> bool {
        fs::metadata(self.store.blob_path(digest)).is_ok_and(|found| found.len() == size_bytes)
    }

    /// Begins a blob whose digest may be known only when it ends.
    pub(crate) fn writer(&self, limit_bytes: u64) -> Result<BlobWriter<'_>, StoreError> {
        let dir = self.store.temporary_dir();
        let file = tempfile::Builder::new().prefix("blob-").tempfile_in(&dir);
        let file = file.map_err(StoreError::io("make a file in", &dir))?;
        // Tells `prune` that somebody is writing it.
        file.as_file()
            .lock()
            .map_err(StoreError::io("lock", file.path()))?;
        Ok(BlobWriter {
            ingest: self,
            file,
            hasher: Hasher::default(),
            limit_bytes,
        })
    }

    /// An unnamed, unlinked file for data on its way, on the store's file system.
    pub(crate) fn scratch_file(&self) -> Result<File, StoreError> {
        let dir = self.store.temporary_dir();
        tempfile::tempfile_in(&dir).map_err(StoreError::io("make a file in", &dir))
    }

    /// Adds a small blob.
    pub(crate) fn put(&self, bytes: &[u8]) -> Result<Digest, StoreError> {
        let mut writer = self.writer(bytes.len() as u64)?;
        writer.append(bytes)?;
        Ok(writer.commit(None)?.0)
    }

    /// Adds a blob of known digest and size from a stream. `advance` hears of every piece.
    pub(crate) fn copy(
        &self,
        what: &str,
        source: &mut dyn Read,
        expected: &Digest,
        size_bytes: u64,
        advance: &dyn Fn(u64),
    ) -> Result<(), CopyError> {
        let mut writer = self.writer(size_bytes)?;
        writer.copy_from(source, advance)?;
        if writer.size_bytes() != size_bytes {
            let what = what.to_owned();
            return Err(StoreError::SizeMismatch {
                what,
                expected_bytes: size_bytes,
            }
            .into());
        }
        writer.commit(Some((what, expected)))?;
        Ok(())
    }

    /// Enters the image, all of whose blobs are here, and gives it these names.
    pub(crate) fn finish(
        mut self,
        manifest: &[u8],
        names: &[Reference],
    ) -> Result<Image, StoreError> {
        let parsed = format::parse_manifest(manifest)?;
        let digest = self.put(manifest)?;
        let media_type = parsed
            .media_type()
            .clone()
            .unwrap_or(MediaType::ImageManifest);
        let image = index::update(&self.store.dir, |index| {
            index.add(digest, media_type, manifest.len() as u64);
            for name in names {
                index.set_name(name, digest);
            }
            // Everything is read once more before the index promises it.
            self.store.load(index, digest)
        })?;
        self.keeps_content = true;
        Ok(image)
    }
}

/// Either side of a copy may fail.
#[derive(Debug)]
pub(crate) enum CopyError {
    Source(io::Error),
    Store(StoreError),
}

impl From<StoreError> for CopyError {
    fn from(error: StoreError) -> Self {
        Self::Store(error)
    }
}

/// A blob being written. Dropped, it leaves nothing.
#[derive(Debug)]
pub(crate) struct BlobWriter<'i> {
    ingest: &'i Ingest,
    file: NamedTempFile,
    hasher: Hasher,
    limit_bytes: u64,
}

impl BlobWriter<'_> {
    pub(crate) fn size_bytes(&self) -> u64 {
        self.hasher.size_bytes()
    }

    pub(crate) fn append(&mut self, bytes: &[u8]) -> Result<(), StoreError> {
        if bytes.len() as u64 > self.limit_bytes - self.size_bytes() {
            let what = "the content".to_owned();
            return Err(StoreError::SizeMismatch {
                what,
                expected_bytes: self.limit_bytes,
            });
        }
        let path = self.file.path().to_owned();
        self.file
            .as_file_mut()
            .write_all(bytes)
            .map_err(StoreError::io("write", &path))?;
        self.hasher.update(bytes);
        Ok(())
    }

    /// Appends a stream to its end.
    pub(crate) fn copy_from(
        &mut self,
        source: &mut dyn Read,
        advance: &dyn Fn(u64),
    ) -> Result<(), CopyError> {
        let mut buffer = vec![0; COPY_BUFFER_BYTES];
        loop {
            let count = match source.read(&mut buffer) {
                Ok(0) => return Ok(()),
                Ok(count) => count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(CopyError::Source(error)),
            };
            self.append(&buffer[..count])?;
            advance(count as u64);
        }
    }

    /// Gives the blob its name, if it is the one that was expected.
    pub(crate) fn commit(
        self,
        expected: Option<(&str, &Digest)>,
    ) -> Result<(Digest, u64), StoreError> {
        let size_bytes = self.hasher.size_bytes();
        let actual = self.hasher.finish();
        if let Some((what, expected)) = expected
            && actual != *expected
        {
            let (what, expected) = (what.to_owned(), *expected);
            return Err(StoreError::DigestMismatch {
                what,
                expected,
                actual,
            });
        }
        let (file, path) = self.file.into_parts();
        let blob = self.ingest.store.blob_path(&actual);
        if !blob.exists() {
            let mut added = self.ingest.added.lock();
            added
                .as_mut()
                .unwrap_or_else(|error| error.get_mut())
                .push(actual);
        }
        publish(&file, &path, &blob)?;
        // It has its final name: the guard must not remove the temporary one, which is gone.
        let _ = path.keep();
        Ok((actual, size_bytes))
    }
}

/// The beginning of a blob, kept between tries to download it.
#[derive(Debug)]
pub(crate) struct Partial {
    store: ImageStore,
    digest: Digest,
    file: File,
    path: PathBuf,
    hasher: Hasher,
}

impl Partial {
    /// Bytes that are here.
    pub(crate) fn size_bytes(&self) -> u64 {
        self.hasher.size_bytes()
    }

    /// What is here has the digest that the blob is to have.
    pub(crate) fn is_whole(&self) -> bool {
        self.hasher.clone().finish() == self.digest
    }

    fn read_what_is_here(&mut self) -> Result<(), StoreError> {
        let mut buffer = vec![0; COPY_BUFFER_BYTES];
        loop {
            let count = self
                .file
                .read(&mut buffer)
                .map_err(StoreError::io("read", &self.path))?;
            if count == 0 {
                return Ok(());
            }
            self.hasher.update(&buffer[..count]);
        }
    }

    /// Throws away what is here.
    pub(crate) fn discard(self) -> Result<(), StoreError> {
        fs::remove_file(&self.path).map_err(StoreError::io("remove", &self.path))
    }

    pub(crate) fn append(&mut self, bytes: &[u8]) -> Result<(), StoreError> {
        self.file
            .write_all(bytes)
            .map_err(StoreError::io("write", &self.path))?;
        self.hasher.update(bytes);
        Ok(())
    }

    /// Forgets what is here: it was wrong, or the registry sends it again from the beginning.
    pub(crate) fn restart(&mut self) -> Result<(), StoreError> {
        let restart = || {
            self.file.set_len(0)?;
            io::Seek::rewind(&mut &self.file)
        };
        restart().map_err(StoreError::io("write", &self.path))?;
        self.hasher = Hasher::default();
        Ok(())
    }

    /// Gives the blob its name. One with another digest is thrown away.
    pub(crate) fn commit(mut self, what: &str) -> Result<(), StoreError> {
        let actual = mem::take(&mut self.hasher).finish();
        if actual == self.digest {
            return publish(&self.file, &self.path, &self.store.blob_path(&actual));
        }
        fs::remove_file(&self.path).map_err(StoreError::io("remove", &self.path))?;
        let (what, expected) = (what.to_owned(), self.digest);
        Err(StoreError::DigestMismatch {
            what,
            expected,
            actual,
        })
    }
}

impl Drop for Partial {
    fn drop(&mut self) {
        // Nothing to resume. The lock is still held; after a commit the name is another's, or free.
        if self.size_bytes() == 0 && is_same_file(&self.file, &self.path) {
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// Makes a complete temporary file a blob that survives a power cut.
fn publish(file: &File, temporary: &Path, path: &Path) -> Result<(), StoreError> {
    file.sync_data()
        .map_err(StoreError::io("write", temporary))?;
    fs::rename(temporary, path).map_err(StoreError::io("write", path))?;
    let dir = path.parent().unwrap_or(path);
    let sync = || File::open(dir)?.sync_all();
    sync().map_err(StoreError::io("write", dir))
}

fn is_same_file(file: &File, path: &Path) -> bool {
    match (file.metadata(), fs::symlink_metadata(path)) {
        (Ok(open), Ok(named)) => open.dev() == named.dev() && open.ino() == named.ino(),
        _ => false,
    }
}

/// Opens and locks the file if nobody else holds it. `None`: it is in use, or gone.
pub(super) fn lock_if_free(path: &Path) -> Result<Option<File>, StoreError> {
    let file = match OpenOptions::new().write(true).open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(StoreError::io("open", path)(error)),
    };
    match file.try_lock() {
        Ok(()) if is_same_file(&file, path) => Ok(Some(file)),
        Ok(()) | Err(TryLockError::WouldBlock) => Ok(None),
        Err(TryLockError::Error(error)) => Err(StoreError::io("lock", path)(error)),
    }
}

/// Waits for the file to be free, makes it where it is missing, and locks it.
pub(super) fn lock_named(path: &Path) -> Result<File, StoreError> {
    loop {
        let file = open_named(path)?;
        file.lock().map_err(StoreError::io("lock", path))?;
        if is_same_file(&file, path) {
            return Ok(file);
        }
    }
}

fn open_named(path: &Path) -> Result<File, StoreError> {
    let mut options = OpenOptions::new();
    options
        .create(true)
        .truncate(false)
        .read(true)
        .write(true)
        .mode(0o600);
    options.open(path).map_err(StoreError::io("open", path))
}
