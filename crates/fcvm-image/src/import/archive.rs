//! Reads members of a tar archive where they lie.
//!
//! The archive is read once to learn where its members are. A compressed archive, or one that comes
//! through a pipe, is first decompressed into an unlinked file of the store.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, BufReader, Cursor, Read, Seek, SeekFrom};
use std::os::unix::fs::FileExt;
use std::path::{Component, Path, PathBuf};

use flate2::read::MultiGzDecoder;
use tar::EntryType;

use super::{ImportError, Ingest, Members};
use crate::progress::one_line;

const KIND: &str = "an image archive";
/// Members of the largest images are a few hundred.
const MAX_MEMBERS: usize = 65_536;
/// The sum of all layers, uncompressed.
const MAX_UNCOMPRESSED_BYTES: u64 = 256 << 30;
/// Links in docker archives lead to another layer directly.
const MAX_LINKS: usize = 8;
/// Largest window of zstd, as a power of two: what `zstd -d` allows by default.
const ZSTD_MAX_WINDOW_LOG: u32 = 27;

/// An archive whose members are known.
pub(super) struct Archive {
    file: File,
    members: HashMap<PathBuf, Member>,
}

enum Member {
    File {
        offset_bytes: u64,
        size_bytes: u64,
    },
    /// Another member, by its name.
    Link(PathBuf),
}

impl Archive {
    pub(super) fn open(path: &Path, ingest: &Ingest) -> Result<Self, ImportError> {
        let read_error = |source| ImportError::Read {
            path: path.to_owned(),
            source,
        };
        let file = File::open(path).map_err(read_error)?;
        let metadata = file.metadata().map_err(read_error)?;
        if metadata.is_dir() {
            return Err(unusable(path, "it is a directory"));
        }
        let file = plain(file, metadata.is_file(), path, ingest)?;
        let members = scan(&file).map_err(|reason| unusable(path, &reason))?;
        Ok(Self { file, members })
    }
}

fn unusable(path: &Path, reason: &str) -> ImportError {
    ImportError::Unusable {
        path: path.to_owned(),
        kind: KIND,
        reason: one_line(reason, 200),
    }
}

/// The archive as an uncompressed file that can be read at any place.
fn plain(
    mut file: File,
    is_regular: bool,
    path: &Path,
    ingest: &Ingest,
) -> Result<File, ImportError> {
    let read_error = |source| ImportError::Read {
        path: path.to_owned(),
        source,
    };
    let mut start = [0; 6];
    let mut start_bytes = 0;
    while start_bytes < start.len() {
        match file.read(&mut start[start_bytes..]).map_err(read_error)? {
            0 => break,
            count => start_bytes += count,
        }
    }
    let start = &start[..start_bytes];
    let whole = Cursor::new(start.to_vec()).chain(&file);
    let decoder: Box<dyn Read + '_> = match start {
        [0x1f, 0x8b, ..] => Box::new(MultiGzDecoder::new(BufReader::new(whole))),
        [0x28, 0xb5, 0x2f, 0xfd, ..] => {
            let mut decoder = zstd::Decoder::new(whole).map_err(read_error)?;
            decoder
                .window_log_max(ZSTD_MAX_WINDOW_LOG)
                .map_err(read_error)?;
            Box::new(decoder)
        }
        b"\xfd7zXZ\0" => return Err(unusable(path, "xz is not supported; use 'xz -d' first")),
        [b'B', b'Z', b'h', ..] => {
            return Err(unusable(
                path,
                "bzip2 is not supported; use 'bzip2 -d' first",
            ));
        }
        _ if is_regular => {
            file.seek(SeekFrom::Start(0)).map_err(read_error)?;
            return Ok(file);
        }
        _ => Box::new(whole),
    };
    let mut output = ingest.scratch_file()?;
    // `io::copy` mixes both sides' errors; the store's disk being full is the likelier one, and
    // the operating system's words tell which it was.
    let copied = io::copy(&mut decoder.take(MAX_UNCOMPRESSED_BYTES + 1), &mut output);
    if copied.map_err(read_error)? > MAX_UNCOMPRESSED_BYTES {
        return Err(unusable(
            path,
            "it is larger than 256 GiB when decompressed",
        ));
    }
    output.seek(SeekFrom::Start(0)).map_err(read_error)?;
    Ok(output)
}

/// Reads all headers.
fn scan(file: &File) -> Result<HashMap<PathBuf, Member>, String> {
    let shown = |error: io::Error| format!("it is not a valid tar archive: {error}");
    let mut archive = tar::Archive::new(BufReader::new(file));
    let mut members = HashMap::new();
    let file_bytes = file.metadata().map_err(shown)?.len();
    for entry in archive.entries_with_seek().map_err(shown)? {
        let entry = entry.map_err(shown)?;
        let name = clean(&entry.path().map_err(shown)?)?;
        let member = match entry.header().entry_type() {
            EntryType::Regular | EntryType::Continuous => {
                let (offset_bytes, size_bytes) = (entry.raw_file_position(), entry.size());
                let end = offset_bytes.checked_add(size_bytes);
                if end.is_none_or(|end| end > file_bytes) {
                    return Err(format!("it ends in the middle of '{}'", name.display()));
                }
                Member::File {
                    offset_bytes,
                    size_bytes,
                }
            }
            kind @ (EntryType::Symlink | EntryType::Link) => {
                let target = entry.link_name().map_err(shown)?;
                let target = target.ok_or_else(|| format!("'{}' links nowhere", name.display()))?;
                // A symbolic link starts at its own directory, a hard link at the archive's root.
                let from = match name.parent() {
                    Some(parent) if kind == EntryType::Symlink => parent,
                    _ => Path::new(""),
                };
                Member::Link(resolve(from, &target)?)
            }
            EntryType::Directory => continue,
            _ => return Err(format!("'{}' is neither a file nor a link", name.display())),
        };
        if members.len() == MAX_MEMBERS {
            return Err(format!("it has more than {MAX_MEMBERS} members"));
        }
        // As when it is unpacked, a later member of the same name replaces the earlier one.
        members.insert(name, member);
    }
    Ok(members)
}

/// A member's name without `./`.
fn clean(path: &Path) -> Result<PathBuf, String> {
    let mut cleaned = PathBuf::new();
    for component in path.components() {
        match component {
            Component::Normal(name) => cleaned.push(name),
            Component::CurDir => {}
            _ => {
                return Err(format!(
                    "the path of its member '{}' leaves it",
                    path.display()
                ));
            }
        }
    }
    Ok(cleaned)
}

/// The member that a link leads to.
fn resolve(from: &Path, target: &Path) -> Result<PathBuf, String> {
    let leaves = || format!("its link to '{}' leaves it", target.display());
    let mut resolved = from.to_owned();
    for component in target.components() {
        match component {
            Component::Normal(name) => resolved.push(name),
            Component::CurDir => {}
            Component::ParentDir if resolved.pop() => {}
            _ => return Err(leaves()),
        }
    }
    Ok(resolved)
}

impl Members for Archive {
    fn open(&self, name: &Path) -> Result<(Box<dyn Read + '_>, u64), io::Error> {
        let missing = || io::Error::new(io::ErrorKind::NotFound, "the archive has no such member");
        let mut name = name;
        for _ in 0..MAX_LINKS {
            match self.members.get(name) {
                None => return Err(missing()),
                Some(Member::Link(target)) => name = target,
                Some(&Member::File {
                    offset_bytes,
                    size_bytes,
                }) => {
                    let reader = Section {
                        file: &self.file,
                        offset_bytes,
                        end_bytes: offset_bytes + size_bytes,
                    };
                    return Ok((Box::new(reader), size_bytes));
                }
            }
        }
        Err(io::Error::new(
            io::ErrorKind::InvalidData,
            "too many links lead on",
        ))
    }
}

/// A range of the archive.
struct Section<'a> {
    file: &'a File,
    offset_bytes: u64,
    end_bytes: u64,
}

impl Read for Section<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let left = usize::try_from(self.end_bytes - self.offset_bytes).unwrap_or(usize::MAX);
        let wanted = left.min(buffer.len());
        let count = self
            .file
            .read_at(&mut buffer[..wanted], self.offset_bytes)?;
        if count == 0 && wanted > 0 {
            return Err(io::Error::new(
                io::ErrorKind::UnexpectedEof,
                "the archive is cut short",
            ));
        }
        self.offset_bytes += count as u64;
        Ok(count)
    }
}
