//! Frames of a stream: their bytes.

use std::io::{Read, Write};

use super::Position;
use crate::catalog::{Origin, are_options, check_name};
use crate::error::{PoolError, Result};
use crate::layout::{BLOCK, BLOCK_BYTES, OBJECT_MAX_BYTES, RECORD_BYTES, read_uint};

const MAGIC: [u8; 8] = *b"BLKSTRM\0";
const VERSION: u32 = 2;
/// The oldest version that is read: it has no options.
const VERSION_MIN: u32 = 1;
const CONTENT_MAX_BYTES: u32 = 69_632;
const THINGS_MAX: u32 = 1_000_000;
/// Records of one reference: what is done while others wait.
pub(crate) const REFERENCE_MAX_RECORDS: u64 = 65_536;

/// What an object holds before its frames.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Start {
    Zeros,
    /// The base of that number, of the same object.
    OwnBase(u32),
    OtherBase(u32),
    Object(u32),
}

/// Where records are that are there already.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Place {
    Base(u32),
    Object(u32),
}

/// See docs/format/pool-stream.md.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Frame {
    Begin {
        position: Position,
        object_count: u32,
        base_count: u32,
        dataset: String,
        snapshot: String,
        from: String,
        /// Those of the dataset, as its entry has them.
        options: u8,
    },
    Base {
        origin: Origin,
        name: String,
    },
    Object {
        start: Start,
        size_bytes: u64,
        unix_s: i64,
        origin: Origin,
        name: String,
    },
    Data {
        record: u64,
        map: u16,
        blocks: Vec<u8>,
    },
    Hole {
        first_block: u64,
        block_count: u64,
    },
    Reference {
        first: u64,
        count: u64,
        place: Place,
        place_first: u64,
    },
    ObjectEnd,
    End {
        data_blocks: u64,
    },
}

fn put_number(bytes: &mut Vec<u8>, number: u64) {
    bytes.extend_from_slice(&number.to_le_bytes());
}

fn put_name(bytes: &mut Vec<u8>, name: &str) {
    bytes.push(name.len() as u8);
    bytes.extend_from_slice(name.as_bytes());
}

fn put_origin(bytes: &mut Vec<u8>, origin: Origin) {
    let at = bytes.len();
    bytes.resize(at + Origin::BYTES, 0);
    origin.encode(&mut bytes[at..]);
}

impl Frame {
    fn encode(&self) -> (u32, Vec<u8>) {
        let mut bytes = Vec::new();
        let kind = match self {
            Self::Begin { .. } | Self::Base { .. } | Self::Object { .. } => {
                self.encode_thing(&mut bytes)
            }
            _ => self.encode_change(&mut bytes),
        };
        (kind, bytes)
    }

    /// What tells of the stream and of objects.
    fn encode_thing(&self, bytes: &mut Vec<u8>) -> u32 {
        match self {
            Self::Begin {
                position,
                object_count,
                base_count,
                dataset,
                snapshot,
                from,
                options,
            } => {
                bytes.extend_from_slice(&position.0.to_le_bytes());
                put_number(bytes, position.1);
                bytes.extend_from_slice(&object_count.to_le_bytes());
                bytes.extend_from_slice(&base_count.to_le_bytes());
                for name in [dataset, snapshot, from] {
                    put_name(bytes, name);
                }
                bytes.push(*options);
                1
            }
            Self::Base { origin, name } => {
                put_origin(bytes, *origin);
                put_name(bytes, name);
                2
            }
            Self::Object {
                start,
                size_bytes,
                unix_s,
                origin,
                name,
            } => {
                let (tag, of) = match *start {
                    Start::Zeros => (0, 0),
                    Start::OwnBase(of) => (1, of),
                    Start::OtherBase(of) => (2, of),
                    Start::Object(of) => (3, of),
                };
                bytes.push(tag);
                bytes.extend_from_slice(&of.to_le_bytes());
                put_number(bytes, *size_bytes);
                put_number(bytes, *unix_s as u64);
                put_origin(bytes, *origin);
                put_name(bytes, name);
                3
            }
            _ => self.encode_change(bytes),
        }
    }

    /// What changes an object, and ends.
    fn encode_change(&self, bytes: &mut Vec<u8>) -> u32 {
        match self {
            Self::Data {
                record,
                map,
                blocks,
            } => {
                put_number(bytes, *record);
                bytes.extend_from_slice(&map.to_le_bytes());
                bytes.extend_from_slice(blocks);
                4
            }
            Self::Hole {
                first_block,
                block_count,
            } => {
                put_number(bytes, *first_block);
                put_number(bytes, *block_count);
                5
            }
            Self::Reference {
                first,
                count,
                place,
                place_first,
            } => {
                put_number(bytes, *first);
                put_number(bytes, *count);
                let (tag, of) = match *place {
                    Place::Base(of) => (1, of),
                    Place::Object(of) => (2, of),
                };
                bytes.push(tag);
                bytes.extend_from_slice(&of.to_le_bytes());
                put_number(bytes, *place_first);
                6
            }
            Self::ObjectEnd => 7,
            Self::End { data_blocks } => {
                put_number(bytes, *data_blocks);
                8
            }
            _ => 0,
        }
    }

    /// None where the content is not one of that type.
    fn decode(version: u32, kind: u32, content: &[u8]) -> Option<Self> {
        let mut reader = Reader(content);
        let frame = match kind {
            1 => Self::Begin {
                position: (reader.small()?, reader.number()?),
                object_count: reader.small().filter(|count| *count <= THINGS_MAX)?,
                base_count: reader.small().filter(|count| *count <= THINGS_MAX)?,
                dataset: reader.name()?,
                snapshot: reader.name()?,
                from: reader.name_or_none()?,
                options: match version {
                    VERSION_MIN => 0,
                    _ => reader.byte().filter(|options| are_options(*options))?,
                },
            },
            2 => Self::Base {
                origin: reader.origin()?,
                name: reader.name()?,
            },
            3 => Self::Object {
                start: match (reader.byte()?, reader.small()?) {
                    (0, 0) => Start::Zeros,
                    (1, of) => Start::OwnBase(of),
                    (2, of) => Start::OtherBase(of),
                    (3, of) => Start::Object(of),
                    _ => return None,
                },
                size_bytes: reader.number().filter(|size| *size <= OBJECT_MAX_BYTES)?,
                unix_s: reader.number()? as i64,
                origin: reader.origin()?,
                name: reader.name()?,
            },
            4 => {
                let record = reader.number()?;
                let map = read_uint(reader.take(2)?) as u16;
                let blocks = reader.take(map.count_ones() as usize * BLOCK)?.to_vec();
                Self::Data {
                    record,
                    map,
                    blocks,
                }
            }
            5 => Self::Hole {
                first_block: reader.below(OBJECT_MAX_BYTES / BLOCK_BYTES)?,
                block_count: reader.below(OBJECT_MAX_BYTES / BLOCK_BYTES)?,
            },
            6 => Self::Reference {
                first: reader.below(OBJECT_MAX_BYTES / RECORD_BYTES)?,
                count: reader.below(REFERENCE_MAX_RECORDS)?,
                place: match (reader.byte()?, reader.small()?) {
                    (1, of) => Place::Base(of),
                    (2, of) => Place::Object(of),
                    _ => return None,
                },
                place_first: reader.below(OBJECT_MAX_BYTES / RECORD_BYTES)?,
            },
            7 => Self::ObjectEnd,
            8 => Self::End {
                data_blocks: reader.number()?,
            },
            _ => return None,
        };
        reader.0.is_empty().then_some(frame)
    }
}

struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn take(&mut self, length: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(length)?;
        self.0 = rest;
        Some(taken)
    }

    fn byte(&mut self) -> Option<u8> {
        self.take(1).map(|bytes| bytes[0])
    }

    fn small(&mut self) -> Option<u32> {
        self.take(4).map(|bytes| read_uint(bytes) as u32)
    }

    fn number(&mut self) -> Option<u64> {
        self.take(8).map(read_uint)
    }

    fn below(&mut self, most: u64) -> Option<u64> {
        self.number().filter(|number| *number <= most)
    }

    fn origin(&mut self) -> Option<Origin> {
        self.take(Origin::BYTES).map(Origin::decode)
    }

    fn name_or_none(&mut self) -> Option<String> {
        let length = self.byte()?;
        let name = std::str::from_utf8(self.take(usize::from(length))?).ok()?;
        (name.is_empty() || check_name(name).is_ok()).then(|| name.to_owned())
    }

    fn name(&mut self) -> Option<String> {
        self.name_or_none().filter(|name| !name.is_empty())
    }
}

fn checksum(stream_id: u64, index: u64, bytes: &[u8]) -> u32 {
    let seed = crc32c::crc32c(&stream_id.to_le_bytes());
    let seed = crc32c::crc32c_append(seed, &index.to_le_bytes());
    crc32c::crc32c_append(seed, bytes)
}

/// Writes a stream.
pub(crate) struct Output<'a> {
    output: &'a mut dyn Write,
    stream_id: u64,
    index: u64,
    pub(crate) byte_count: u64,
}

impl<'a> Output<'a> {
    pub(crate) fn begin(output: &'a mut dyn Write, stream_id: u64) -> Result<Self> {
        let mut bytes = Vec::from(MAGIC);
        bytes.extend_from_slice(&VERSION.to_le_bytes());
        bytes.extend_from_slice(&stream_id.to_le_bytes());
        let checksum = crc32c::crc32c(&bytes);
        bytes.splice(12..12, checksum.to_le_bytes());
        let mut begun = Self {
            output,
            stream_id,
            index: 0,
            byte_count: 0,
        };
        begun.put(&bytes)?;
        Ok(begun)
    }

    fn put(&mut self, bytes: &[u8]) -> Result<()> {
        self.byte_count += bytes.len() as u64;
        let written = self.output.write_all(bytes);
        written.map_err(PoolError::io("write the stream"))
    }

    pub(crate) fn write(&mut self, frame: &Frame) -> Result<()> {
        let (kind, content) = frame.encode();
        let mut bytes = vec![0; 4];
        bytes.extend_from_slice(&kind.to_le_bytes());
        bytes.extend_from_slice(&(content.len() as u32).to_le_bytes());
        bytes.extend_from_slice(&content);
        let checksum = checksum(self.stream_id, self.index, &bytes[4..]);
        bytes[..4].copy_from_slice(&checksum.to_le_bytes());
        self.index += 1;
        self.put(&bytes)
    }

    pub(crate) fn finish(&mut self) -> Result<()> {
        let flushed = self.output.flush();
        flushed.map_err(PoolError::io("write the stream"))
    }
}

/// Reads a stream.
pub(crate) struct Input<'a> {
    input: &'a mut dyn Read,
    version: u32,
    pub(crate) stream_id: u64,
    index: u64,
    pub(crate) byte_count: u64,
}

pub(crate) fn wrong(what: &str) -> PoolError {
    PoolError::Stream {
        what: what.to_owned(),
    }
}

impl<'a> Input<'a> {
    pub(crate) fn begin(input: &'a mut dyn Read) -> Result<Self> {
        let mut begun = Self {
            input,
            version: VERSION,
            stream_id: 0,
            index: 0,
            byte_count: 0,
        };
        let mut bytes = [0; 24];
        begun.take(&mut bytes)?;
        if bytes[..8] != MAGIC {
            return Err(wrong("it does not begin as a stream of 'fcvm pool send'"));
        }
        let (front, rest) = (&bytes[..12], &bytes[16..]);
        let expected = crc32c::crc32c_append(crc32c::crc32c(front), rest);
        if read_uint(&bytes[12..16]) != u64::from(expected) {
            return Err(wrong("the checksum of its beginning is wrong"));
        }
        let version = read_uint(&bytes[8..12]) as u32;
        if !(VERSION_MIN..=VERSION).contains(&version) {
            return Err(PoolError::StreamVersion {
                found: version,
                known: VERSION,
            });
        }
        begun.version = version;
        begun.stream_id = read_uint(rest);
        Ok(begun)
    }

    fn take(&mut self, bytes: &mut [u8]) -> Result<()> {
        match self.input.read_exact(bytes) {
            Ok(()) => {
                self.byte_count += bytes.len() as u64;
                Ok(())
            }
            Err(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => {
                Err(wrong("it ends too early"))
            }
            Err(error) => Err(PoolError::io("read the stream")(error)),
        }
    }

    pub(crate) fn read(&mut self) -> Result<Frame> {
        let mut head = [0; 12];
        self.take(&mut head)?;
        let length = read_uint(&head[8..12]) as u32;
        if length > CONTENT_MAX_BYTES {
            return Err(wrong("a part of it is longer than any can be"));
        }
        let mut bytes = vec![0; 8 + length as usize];
        bytes[..8].copy_from_slice(&head[4..]);
        self.take(&mut bytes[8..])?;
        if read_uint(&head[..4]) != u64::from(checksum(self.stream_id, self.index, &bytes)) {
            return Err(wrong("the checksum of a part of it is wrong"));
        }
        self.index += 1;
        Frame::decode(self.version, read_uint(&head[4..8]) as u32, &bytes[8..])
            .ok_or_else(|| wrong("a part of it is none that a stream has"))
    }
}
