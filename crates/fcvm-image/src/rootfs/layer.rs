//! Reads one uncompressed layer: tar members with their metadata, one after the other.
//!
//! The tar syntax (headers, GNU and PAX extensions, sparse maps) is read by `tar-core`; what is
//! added here is buffering over any [`BufRead`], the data of members, and the rules of container
//! layers for what a member may be. Nothing here knows the image that is built.

use std::io::{self, BufRead};

use tar_core::parse::{Limits as TarLimits, ParseEvent, ParsedEntry, Parser};
use tar_core::{EntryType, PaxExtensions, SparseEntry};

use super::Limits;
use super::error::Refusal;

/// A point in time with nanoseconds, as Linux keeps it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Hash)]
pub struct Timestamp {
    /// Seconds since 1970, negative before it.
    pub seconds: i64,
    /// Nanoseconds after `seconds`, below 1,000,000,000.
    pub nanoseconds: u32,
}

/// One extended attribute: full name (`user.x`) and binary value.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Xattr {
    /// Full name including its namespace.
    pub name: Box<[u8]>,
    /// The value, any bytes.
    pub value: Box<[u8]>,
}

/// What the member is, with what only that kind has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum MemberKind {
    /// A regular file. Its data follows and is read with [`LayerReader::read_data`].
    File {
        /// Length of the data.
        size_bytes: u64,
    },
    /// A regular file with holes. The data of its segments follows, without gaps.
    Sparse {
        /// Length of the file with its holes.
        size_bytes: u64,
        /// Ordered, non-overlapping, non-empty ranges that hold data.
        segments: Vec<Segment>,
    },
    /// Another name of an existing file; the target is a path from the root of the image.
    HardLink {
        /// Path as the layer gives it.
        target: Vec<u8>,
    },
    /// A symbolic link.
    Symlink {
        /// The text of the link.
        target: Vec<u8>,
    },
    /// A directory.
    Directory,
    /// A character device.
    CharDevice {
        /// Major number.
        major: u32,
        /// Minor number.
        minor: u32,
    },
    /// A block device.
    BlockDevice {
        /// Major number.
        major: u32,
        /// Minor number.
        minor: u32,
    },
    /// A named pipe.
    Fifo,
}

/// A range of a sparse file that holds data.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Segment {
    /// Where it starts in the file.
    pub offset_bytes: u64,
    /// How long it is, never 0.
    pub length_bytes: u64,
}

/// One member of a layer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Member {
    /// Path as the layer gives it: unchecked bytes.
    pub path: Vec<u8>,
    /// What it is.
    pub kind: MemberKind,
    /// Permission bits with set-user-id, set-group-id and sticky: at most `0o7777`.
    pub mode: u16,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Time of last modification.
    pub mtime: Timestamp,
    /// Extended attributes in the order of the layer; a later one of the same name counts.
    pub xattrs: Vec<Xattr>,
}

/// Why a layer cannot be read on.
#[derive(Debug)]
pub enum LayerError {
    /// The source of the bytes failed.
    Io(io::Error),
    /// The bytes are not a valid tar archive.
    Tar(String),
    /// A member is refused; its path is the one given.
    Member {
        /// Path of the member.
        path: Vec<u8>,
        /// Why it is refused.
        reason: Refusal,
    },
}

/// Reads the members of one layer in order. The data of a member that is not read is skipped.
#[derive(Debug)]
pub struct LayerReader<R> {
    source: R,
    parser: Parser,
    /// Bytes taken from `source` for the header parser; `staging[staged_at..]` is not consumed yet.
    staging: Vec<u8>,
    staged_at: usize,
    data_left_bytes: u64,
    padding_left_bytes: u64,
    max_staged_bytes: usize,
    max_xattr_bytes: usize,
}

const BLOCK_BYTES: u64 = 512;
/// Extension headers of one member, each with its block and padding.
const EXTENSIONS_MAX_COUNT: usize = 16;
/// A range of a sparse map: two numbers of 64 bits in decimal, each on its line.
const SEGMENT_MAX_BYTES: usize = 2 * 21;

impl<R: BufRead> LayerReader<R> {
    /// Starts at the beginning of an uncompressed tar stream.
    pub fn new(source: R, limits: &Limits) -> Self {
        let mut parser = Parser::new(TarLimits {
            max_metadata_size: limits.max_header_bytes,
            // Paths are checked by the merge, which knows the caller's limit and the member.
            max_path_len: None,
            max_pending_entries: EXTENSIONS_MAX_COUNT,
            max_sparse_entries: limits.max_sparse_segments,
        });
        // tar-core knows neither negative nor fractional times; `PaxNumbers` reads every number
        // again and refuses what is malformed.
        parser.set_ignore_pax_errors(true);
        Self {
            source,
            parser,
            staging: Vec::with_capacity(4096),
            staged_at: 0,
            data_left_bytes: 0,
            padding_left_bytes: 0,
            max_staged_bytes: limits.max_header_bytes as usize
                + limits.max_sparse_segments * SEGMENT_MAX_BYTES
                + (EXTENSIONS_MAX_COUNT + 2) * 2 * BLOCK_BYTES as usize,
            max_xattr_bytes: limits.max_xattr_bytes,
        }
    }

    /// The next member, or `None` at the end of the archive.
    pub fn next_member(&mut self) -> Result<Option<Member>, LayerError> {
        self.read_data(|_| Ok::<(), LayerError>(()))?;
        self.skip_padding()?;
        let mut at_end = false;
        loop {
            let staged = &self.staging[self.staged_at..];
            let event = self.parser.parse(staged);
            let (consumed, member) = match event.map_err(|e| LayerError::Tar(e.to_string()))? {
                ParseEvent::NeedData { .. } if at_end => return end_of_input(staged),
                // A sparse map has no length: nothing else bounds one without a line's end.
                ParseEvent::NeedData { .. } if staged.len() > self.max_staged_bytes => {
                    return Err(LayerError::Tar("a member's headers are too long".into()));
                }
                ParseEvent::NeedData { min_bytes } => {
                    // Doubling keeps the repeated parsing of long extension headers linear.
                    let wanted_bytes = min_bytes.max(staged.len() * 2).max(BLOCK_BYTES as usize);
                    at_end = self.stage(wanted_bytes)?;
                    continue;
                }
                ParseEvent::GlobalExtensions { consumed, .. } => (consumed, None),
                ParseEvent::End { .. } => return Ok(None),
                ParseEvent::Entry { consumed, entry } => {
                    (consumed, Some(convert(&entry, None, self.max_xattr_bytes)?))
                }
                ParseEvent::SparseEntry {
                    consumed,
                    entry,
                    sparse_map,
                    real_size,
                } => {
                    let sparse = Some((sparse_map, real_size));
                    (
                        consumed,
                        Some(convert(&entry, sparse, self.max_xattr_bytes)?),
                    )
                }
            };
            self.staged_at += consumed;
            if let Some((member, data_bytes)) = member {
                self.data_left_bytes = data_bytes;
                self.padding_left_bytes = data_bytes.wrapping_neg() % BLOCK_BYTES;
                return Ok(Some(member));
            }
        }
    }

    /// Hands the rest of the current member's data to `sink`, in pieces of any size.
    pub fn read_data<E: From<LayerError>>(
        &mut self,
        mut sink: impl FnMut(&[u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        while self.data_left_bytes > 0 {
            let left_bytes = self.data_left_bytes;
            let piece = self.pending()?;
            let length = clamp(piece.len(), left_bytes);
            sink(&piece[..length])?;
            self.consume(length);
            self.data_left_bytes -= length as u64;
        }
        Ok(())
    }

    /// Gives the source back, for what follows the end of the archive.
    pub fn into_source(self) -> R {
        self.source
    }

    fn skip_padding(&mut self) -> Result<(), LayerError> {
        while self.padding_left_bytes > 0 {
            let length = clamp(self.pending()?.len(), self.padding_left_bytes);
            self.consume(length);
            self.padding_left_bytes -= length as u64;
        }
        Ok(())
    }

    /// The next bytes, at least one.
    fn pending(&mut self) -> Result<&[u8], LayerError> {
        if self.staged_at < self.staging.len() {
            return Ok(&self.staging[self.staged_at..]);
        }
        let bytes = self.source.fill_buf().map_err(LayerError::Io)?;
        if bytes.is_empty() {
            return Err(LayerError::Tar("it ends in the middle of a member".into()));
        }
        Ok(bytes)
    }

    fn consume(&mut self, length: usize) {
        if self.staged_at < self.staging.len() {
            self.staged_at += length;
        } else {
            self.source.consume(length);
        }
    }

    /// Extends the staged bytes to `wanted_bytes`; true when the input has ended: the parser may ask
    /// for less than is staged already, so what it asked for does not tell.
    fn stage(&mut self, wanted_bytes: usize) -> Result<bool, LayerError> {
        self.staging.drain(..self.staged_at);
        self.staged_at = 0;
        while self.staging.len() < wanted_bytes {
            let bytes = self.source.fill_buf().map_err(LayerError::Io)?;
            if bytes.is_empty() {
                return Ok(true);
            }
            let length = bytes.len().min(wanted_bytes - self.staging.len());
            self.staging.extend_from_slice(&bytes[..length]);
            self.source.consume(length);
        }
        Ok(false)
    }
}

fn clamp(available: usize, left_bytes: u64) -> usize {
    usize::try_from(left_bytes).map_or(available, |left| available.min(left))
}

/// Go's and GNU's tar accept an archive without its two closing zero blocks, and so do we: that
/// nothing was cut off is what the layer's digest proves.
fn end_of_input(rest: &[u8]) -> Result<Option<Member>, LayerError> {
    if rest.iter().all(|&byte| byte == 0) {
        Ok(None)
    } else {
        Err(LayerError::Tar("it ends in the middle of a header".into()))
    }
}

/// Makes a [`Member`] and tells how many bytes of data follow it.
fn convert(
    entry: &ParsedEntry<'_>,
    sparse: Option<(Vec<SparseEntry>, u64)>,
    max_xattr_bytes: usize,
) -> Result<(Member, u64), LayerError> {
    member_of(entry, sparse, max_xattr_bytes).map_err(|reason| LayerError::Member {
        path: entry.path.to_vec(),
        reason,
    })
}

fn member_of(
    entry: &ParsedEntry<'_>,
    sparse: Option<(Vec<SparseEntry>, u64)>,
    max_xattr_bytes: usize,
) -> Result<(Member, u64), Refusal> {
    let pax = PaxNumbers::read(entry.pax.unwrap_or_default())?;
    let (kind, data_bytes) = kind_of(entry, sparse, &pax)?;
    let member = Member {
        path: entry.path.to_vec(),
        kind,
        mode: (entry.mode & 0o7777) as u16,
        uid: u32::try_from(entry.uid).map_err(|_| Refusal::OwnerTooLarge(entry.uid))?,
        gid: u32::try_from(entry.gid).map_err(|_| Refusal::OwnerTooLarge(entry.gid))?,
        mtime: pax.mtime.unwrap_or(Timestamp {
            // Base-256 header fields hold two's complement: the low 64 bits of a negative time.
            seconds: entry.mtime as i64,
            nanoseconds: 0,
        }),
        xattrs: xattrs_of(entry, max_xattr_bytes)?,
    };
    Ok((member, data_bytes))
}

fn kind_of(
    entry: &ParsedEntry<'_>,
    sparse: Option<(Vec<SparseEntry>, u64)>,
    pax: &PaxNumbers,
) -> Result<(MemberKind, u64), Refusal> {
    let target = || entry.link_target.as_deref().unwrap_or_default().to_vec();
    let device = || {
        let major = entry.dev_major.unwrap_or(0);
        let minor = entry.dev_minor.unwrap_or(0);
        if major > 0xfff || minor > 0xf_ffff {
            return Err(Refusal::DeviceNumber { major, minor });
        }
        Ok((major, minor))
    };
    let kind = match entry.entry_type {
        // Old archives mark directories by a trailing slash only.
        EntryType::Regular if entry.size == 0 && entry.path.ends_with(b"/") => {
            MemberKind::Directory
        }
        EntryType::Regular | EntryType::Continuous | EntryType::GnuSparse => {
            return match sparse {
                Some((map, size_bytes)) => sparse_kind(entry, map, size_bytes, pax),
                None => Ok((
                    MemberKind::File {
                        size_bytes: entry.size,
                    },
                    entry.size,
                )),
            };
        }
        EntryType::Link => MemberKind::HardLink { target: target() },
        EntryType::Symlink => MemberKind::Symlink { target: target() },
        EntryType::Directory => MemberKind::Directory,
        EntryType::Char => {
            let (major, minor) = device()?;
            MemberKind::CharDevice { major, minor }
        }
        EntryType::Block => {
            let (major, minor) = device()?;
            MemberKind::BlockDevice { major, minor }
        }
        EntryType::Fifo => MemberKind::Fifo,
        other => return Err(Refusal::UnsupportedType(other.to_byte())),
    };
    // These kinds carry no data whatever their size field says: the reading of Go's archive/tar,
    // which wrote and reads most container layers.
    Ok((kind, 0))
}

fn sparse_kind(
    entry: &ParsedEntry<'_>,
    map: Vec<SparseEntry>,
    size_bytes: u64,
    pax: &PaxNumbers,
) -> Result<(MemberKind, u64), Refusal> {
    let mut segments = Vec::with_capacity(map.len());
    let mut end_bytes = 0u64;
    let mut data_bytes = 0u64;
    for SparseEntry { offset, length } in map {
        if offset < end_bytes {
            return Err(Refusal::SparseMap);
        }
        end_bytes = offset.checked_add(length).ok_or(Refusal::SparseMap)?;
        data_bytes += length;
        if length > 0 {
            segments.push(Segment {
                offset_bytes: offset,
                length_bytes: length,
            });
        }
    }
    // A PAX `size` record counts the map of format 1.0 as well, which was consumed already.
    let stored_matches = entry.size == data_bytes || (pax.has_size && entry.size > data_bytes);
    if end_bytes > size_bytes || !stored_matches {
        return Err(Refusal::SparseMap);
    }
    Ok((
        MemberKind::Sparse {
            size_bytes,
            segments,
        },
        data_bytes,
    ))
}

fn xattrs_of(entry: &ParsedEntry<'_>, max_bytes: usize) -> Result<Vec<Xattr>, Refusal> {
    let mut total_bytes = 0usize;
    let mut xattrs: Vec<Xattr> = Vec::with_capacity(entry.xattrs.len());
    for (name, value) in &entry.xattrs {
        total_bytes = total_bytes
            .saturating_add(name.len())
            .saturating_add(value.len());
        if total_bytes > max_bytes {
            return Err(Refusal::XattrsTooLarge {
                size_bytes: total_bytes,
                limit_bytes: max_bytes,
            });
        }
        xattrs.push(Xattr {
            name: name.as_ref().into(),
            value: value.as_ref().into(),
        });
    }
    Ok(xattrs)
}

/// What is read from the PAX records beyond what `tar-core` gives.
struct PaxNumbers {
    mtime: Option<Timestamp>,
    has_size: bool,
}

impl PaxNumbers {
    fn read(pax: &[u8]) -> Result<Self, Refusal> {
        let mut numbers = Self {
            mtime: None,
            has_size: false,
        };
        for record in PaxExtensions::new(pax) {
            let record = record.map_err(|_| Refusal::PaxRecord("length"))?;
            let value = record.value_bytes();
            match record.key_bytes() {
                b"mtime" => {
                    let time = parse_time(value).ok_or(Refusal::PaxRecord("mtime"))?;
                    numbers.mtime = Some(time);
                }
                b"size" => {
                    parse_u64(value).ok_or(Refusal::PaxRecord("size"))?;
                    numbers.has_size = true;
                }
                b"uid" => drop(parse_u64(value).ok_or(Refusal::PaxRecord("uid"))?),
                b"gid" => drop(parse_u64(value).ok_or(Refusal::PaxRecord("gid"))?),
                _ => {}
            }
        }
        Ok(numbers)
    }
}

fn parse_u64(text: &[u8]) -> Option<u64> {
    std::str::from_utf8(text).ok()?.parse().ok()
}

/// Reads `[-]SECONDS[.FRACTION]`; digits beyond nanoseconds are cut off toward the past.
fn parse_time(text: &[u8]) -> Option<Timestamp> {
    let text = std::str::from_utf8(text).ok()?;
    let (negative, digits) = match text.strip_prefix('-') {
        Some(rest) => (true, rest),
        None => (false, text),
    };
    let (whole, fraction) = digits.split_once('.').unwrap_or((digits, ""));
    if !fraction.bytes().all(|byte| byte.is_ascii_digit()) || whole.starts_with(['+', '-']) {
        return None;
    }
    let seconds: i64 = whole.parse().ok()?;
    let mut nanoseconds = 0u32;
    for position in 0..9 {
        let digit = fraction
            .as_bytes()
            .get(position)
            .map_or(0, |byte| byte - b'0');
        nanoseconds = nanoseconds * 10 + u32::from(digit);
    }
    Some(match (negative, nanoseconds) {
        (false, _) => Timestamp {
            seconds,
            nanoseconds,
        },
        (true, 0) => Timestamp {
            seconds: -seconds,
            nanoseconds: 0,
        },
        (true, _) => Timestamp {
            seconds: -seconds - 1,
            nanoseconds: 1_000_000_000 - nanoseconds,
        },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn time(seconds: i64, nanoseconds: u32) -> Option<Timestamp> {
        Some(Timestamp {
            seconds,
            nanoseconds,
        })
    }

    #[test]
    fn times_keep_nanoseconds_and_sign() {
        assert_eq!(parse_time(b"1700000000"), time(1_700_000_000, 0));
        assert_eq!(parse_time(b"1.5"), time(1, 500_000_000));
        assert_eq!(parse_time(b"1.0000000019"), time(1, 1));
        assert_eq!(parse_time(b"-1"), time(-1, 0));
        assert_eq!(parse_time(b"-1.25"), time(-2, 750_000_000));
        assert_eq!(parse_time(b"-0.5"), time(-1, 500_000_000));
        for bad in ["", ".", "x", "1.x", "--1", "-+1", "99999999999999999999"] {
            assert_eq!(parse_time(bad.as_bytes()), None, "{bad}");
        }
    }

    /// A header of the type with a valid checksum.
    fn header(kind: u8, size_bytes: usize) -> Vec<u8> {
        let mut header = vec![0; 512];
        header[..4].copy_from_slice(b"name");
        header[100..108].copy_from_slice(b"0000644\0");
        header[124..136].copy_from_slice(format!("{size_bytes:011o}\0").as_bytes());
        header[148..156].fill(b' ');
        header[156] = kind;
        header[257..265].copy_from_slice(b"ustar\x0000");
        let sum: u32 = header.iter().map(|&byte| u32::from(byte)).sum();
        header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        header
    }

    /// A file whose sparse map (GNU, PAX format 1.0) is the bytes given.
    fn sparse_file(map: &[u8]) -> Vec<u8> {
        let extensions =
            b"22 GNU.sparse.major=1\n22 GNU.sparse.minor=0\n28 GNU.sparse.realsize=8192\n";
        let mut archive = header(b'x', extensions.len());
        archive.extend_from_slice(extensions);
        archive.resize(1024, 0);
        archive.extend(header(b'0', map.len()));
        archive.extend_from_slice(map);
        archive
    }

    fn refusal(archive: &[u8]) -> String {
        match LayerReader::new(archive, &Limits::default()).next_member() {
            Err(LayerError::Tar(reason)) => reason,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_sparse_map_without_an_end_is_refused() {
        let reason = refusal(&sparse_file(&[b'1'; 2048]));
        assert!(reason.contains("ends in the middle"), "{reason}");
        let reason = refusal(&sparse_file(&vec![b'1'; 64 << 20]));
        assert!(reason.contains("too long"), "{reason}");
    }

    #[test]
    fn arbitrary_bytes_never_panic() {
        use proptest::prelude::*;
        proptest!(|(bytes in proptest::collection::vec(any::<u8>(), 0..3000))| {
            let mut reader = LayerReader::new(bytes.as_slice(), &Limits::default());
            while let Ok(Some(_)) = reader.next_member() {}
        });
    }
}
