//! Reads members of a tar archive where they lie.
//!
//! The archive is read once to learn where its members are. A compressed archive, or one that comes
//! through a pipe, is first decompressed into an unlinked file of the store.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, BufReader, Cursor, Read, Seek, SeekFrom};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::path::{Component, Path, PathBuf};

use flate2::read::MultiGzDecoder;
use tar_core::EntryType;
use tar_core::parse::{Limits, ParseEvent, ParsedEntry, Parser};

use super::{ImportError, Ingest, Members};
use crate::progress::one_line;

const KIND: &str = "an image archive";
/// Members of the largest images are a few hundred.
const MAX_MEMBERS: usize = 65_536;
/// Extension headers of one member: names, mostly.
const HEADER_MAX_BYTES: u32 = 64 << 10;
const PATH_MAX_BYTES: u32 = 4096;
const BLOCK_BYTES: usize = 512;
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

/// Bytes that can be read at any place.
trait ReadAt {
    /// Reads as many bytes as there are, up to the length of `buffer`.
    fn read_some_at(&self, buffer: &mut [u8], offset_bytes: u64) -> io::Result<usize>;

    fn size_bytes(&self) -> io::Result<u64>;
}

impl ReadAt for File {
    fn read_some_at(&self, buffer: &mut [u8], offset_bytes: u64) -> io::Result<usize> {
        self.read_at(buffer, offset_bytes)
    }

    fn size_bytes(&self) -> io::Result<u64> {
        Ok(self.metadata()?.len())
    }
}

impl ReadAt for [u8] {
    fn read_some_at(&self, buffer: &mut [u8], offset_bytes: u64) -> io::Result<usize> {
        let start = usize::try_from(offset_bytes).map_or(self.len(), |at| at.min(self.len()));
        (&self[start..]).read(buffer)
    }

    fn size_bytes(&self) -> io::Result<u64> {
        Ok(self.len() as u64)
    }
}

/// Reads the headers of an uncompressed archive as [`import`](super::import) does, and tells how many
/// members it has; for fuzzing.
pub fn count_archive_members(bytes: &[u8]) -> Result<usize, String> {
    scan(bytes).map(|members| members.len())
}

/// Reads all headers, and no data.
fn scan<S: ReadAt + ?Sized>(source: &S) -> Result<HashMap<PathBuf, Member>, String> {
    let mut parser = Parser::new(Limits {
        max_metadata_size: HEADER_MAX_BYTES,
        max_path_len: Some(PATH_MAX_BYTES),
        max_pending_entries: 16,
        max_sparse_entries: 1,
    });
    let shown = |error: io::Error| format!("it cannot be read: {error}");
    let source_bytes = source.size_bytes().map_err(shown)?;
    let mut members = HashMap::new();
    let mut headers_count = 0;
    let mut at_bytes = 0;
    let mut window = Vec::new();
    let mut wanted_bytes = BLOCK_BYTES;
    loop {
        let is_at_end = !fill(source, &mut window, at_bytes, wanted_bytes).map_err(shown)?;
        let event = parser.parse(&window);
        let consumed = match event
            .map_err(|error| format!("it is not a valid tar archive: {error}"))?
        {
            ParseEvent::NeedData { .. } if is_at_end => {
                if window.iter().all(|byte| *byte == 0) {
                    return Ok(members);
                }
                return Err("it is not a valid tar archive: it ends in a header".into());
            }
            ParseEvent::NeedData { min_bytes } => {
                wanted_bytes = min_bytes.max(window.len() * 2);
                if wanted_bytes > 4 * HEADER_MAX_BYTES as usize {
                    return Err("it is not a valid tar archive: its headers are too long".into());
                }
                continue;
            }
            ParseEvent::GlobalExtensions { consumed, .. } => consumed as u64,
            ParseEvent::End { .. } => return Ok(members),
            ParseEvent::SparseEntry { entry, .. } => {
                return Err(format!(
                    "'{}' is neither a file nor a link",
                    entry.path_lossy()
                ));
            }
            ParseEvent::Entry { consumed, entry } => {
                let offset_bytes = at_bytes + consumed as u64;
                let end_bytes = offset_bytes.checked_add(entry.padded_size());
                if offset_bytes.saturating_add(entry.size) > source_bytes {
                    return Err(format!("it ends in the middle of '{}'", entry.path_lossy()));
                }
                if let Some((name, member)) = member(&entry, offset_bytes)? {
                    // As when it is unpacked, a later member of the same name replaces the earlier.
                    members.insert(name, member);
                }
                end_bytes.unwrap_or(source_bytes) - at_bytes
            }
        };
        // Directories and members of the same name count too: each costs a read.
        headers_count += 1;
        if headers_count > MAX_MEMBERS {
            return Err(format!("it has more than {MAX_MEMBERS} members"));
        }
        at_bytes += consumed;
        window.clear();
        wanted_bytes = BLOCK_BYTES;
    }
}

/// Reads on until `window` has `wanted_bytes` from `at_bytes`; false where the source ends before.
fn fill<S: ReadAt + ?Sized>(
    source: &S,
    window: &mut Vec<u8>,
    at_bytes: u64,
    wanted_bytes: usize,
) -> io::Result<bool> {
    let mut filled = window.len();
    window.resize(wanted_bytes.max(filled), 0);
    while filled < window.len() {
        match source.read_some_at(&mut window[filled..], at_bytes + filled as u64)? {
            0 => {
                window.truncate(filled);
                return Ok(false);
            }
            count => filled += count,
        }
    }
    Ok(true)
}

/// Name and place of a member; none for a directory.
fn member(entry: &ParsedEntry<'_>, offset_bytes: u64) -> Result<Option<(PathBuf, Member)>, String> {
    let name = clean(Path::new(OsStr::from_bytes(&entry.path)))?;
    let link = || {
        let target = entry.link_target.as_deref().unwrap_or_default();
        if target.is_empty() {
            return Err(format!("'{}' links nowhere", entry.path_lossy()));
        }
        Ok(Path::new(OsStr::from_bytes(target)))
    };
    let member = match entry.entry_type {
        EntryType::Regular | EntryType::Continuous => Member::File {
            offset_bytes,
            size_bytes: entry.size,
        },
        // A symbolic link starts at its own directory, a hard link at the archive's root.
        EntryType::Symlink => {
            Member::Link(resolve(name.parent().unwrap_or(Path::new("")), link()?)?)
        }
        EntryType::Link => Member::Link(resolve(Path::new(""), link()?)?),
        EntryType::Directory => return Ok(None),
        _ => {
            return Err(format!(
                "'{}' is neither a file nor a link",
                entry.path_lossy()
            ));
        }
    };
    Ok(Some((name, member)))
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

#[cfg(test)]
mod tests {
    use super::*;

    fn archive() -> Vec<u8> {
        let mut builder = tar::Builder::new(Vec::new());
        let mut header = tar::Header::new_gnu();
        header.set_size(3);
        let long = "long/".repeat(40) + "name";
        builder
            .append_data(&mut header, &long, &b"abc"[..])
            .unwrap();
        header.set_size(0);
        header.set_entry_type(tar::EntryType::Symlink);
        builder.append_link(&mut header, "link", &long).unwrap();
        builder.into_inner().unwrap()
    }

    #[test]
    fn long_names_and_links_are_read() {
        let members = scan(archive().as_slice()).unwrap();
        assert_eq!(members.len(), 2);
        let Member::Link(target) = &members[Path::new("link")] else {
            panic!("it is a link");
        };
        assert!(matches!(
            members[target],
            Member::File { size_bytes: 3, .. }
        ));
    }

    #[test]
    fn endless_headers_are_refused() {
        let mut builder = tar::Builder::new(Vec::new());
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(tar::EntryType::GNULongName);
        header.set_size(64 << 20);
        header.set_cksum();
        builder
            .append(&header, std::io::repeat(b'a').take(64 << 20))
            .unwrap();
        let error = scan(builder.into_inner().unwrap().as_slice())
            .err()
            .unwrap();
        assert!(error.contains("not a valid tar archive"), "{error}");
    }

    proptest::proptest! {
        #[test]
        fn no_bytes_make_it_panic(bytes: Vec<u8>, changes: Vec<(u16, u8)>) {
            let _ = scan(bytes.as_slice());
            let mut archive = archive();
            let length = archive.len();
            for (at, byte) in changes {
                archive[usize::from(at) % length] = byte;
            }
            let _ = scan(archive.as_slice());
        }
    }
}
