//! The operations that change a pool's metadata, and their bytes in the log.
//!
//! There is no other way to change what an object holds: what is done and what is replayed is the same code, `apply`.

use crate::catalog::{EntryKind, NAME_MAX_BYTES, Origin};
use crate::layout::read_uint;
use crate::page::Slot;

/// See docs/format/pool.md, Log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Operation {
    Create {
        id: u64,
        kind: EntryKind,
        parent: u64,
        size_bytes: u64,
        unix_s: i64,
        name: String,
    },
    Resize {
        id: u64,
        size_bytes: u64,
    },
    Slot {
        id: u64,
        record_index: u64,
        slot: Slot,
    },
    Punch {
        id: u64,
        first_block: u64,
        block_count: u64,
    },
    CloneRange {
        source: u64,
        source_first: u64,
        target: u64,
        target_first: u64,
        record_count: u64,
    },
    Clone {
        source: u64,
        id: u64,
        kind: EntryKind,
        parent: u64,
        unix_s: i64,
        name: String,
    },
    Rollback {
        object: u64,
        snapshot: u64,
    },
    Remove {
        id: u64,
    },
    Rename {
        id: u64,
        parent: u64,
        name: String,
    },
    Options {
        id: u64,
        options: u8,
    },
    /// The sums of the blocks of `map`, in their order.
    Sums {
        record: u64,
        map: u16,
        sums: Vec<u32>,
    },
    Origin {
        id: u64,
        origin: Origin,
    },
    /// As [`Self::CloneRange`], to the same place of another object, and the epoch ends.
    CloneAligned {
        source: u64,
        target: u64,
        first: u64,
        record_count: u64,
    },
}

impl Operation {
    /// Appends its bytes.
    pub(crate) fn encode(&self, bytes: &mut Vec<u8>) {
        let mut writer = Writer(bytes);
        match self {
            Self::Create {
                id,
                kind,
                parent,
                size_bytes,
                unix_s,
                name,
            } => {
                writer.byte(1).number(*id).byte(*kind as u8).number(*parent);
                writer.number(*size_bytes).number(*unix_s as u64).name(name);
            }
            Self::Resize { id, size_bytes } => {
                writer.byte(2).number(*id).number(*size_bytes);
            }
            Self::Slot {
                id,
                record_index,
                slot,
            } => {
                writer.byte(3).number(*id).number(*record_index).slot(*slot);
            }
            Self::Punch {
                id,
                first_block,
                block_count,
            } => {
                writer
                    .byte(4)
                    .number(*id)
                    .number(*first_block)
                    .number(*block_count);
            }
            Self::CloneRange {
                source,
                source_first,
                target,
                target_first,
                record_count,
            } => {
                writer.byte(5).number(*source).number(*source_first);
                writer
                    .number(*target)
                    .number(*target_first)
                    .number(*record_count);
            }
            Self::Clone {
                source,
                id,
                kind,
                parent,
                unix_s,
                name,
            } => {
                writer.byte(6).number(*source).number(*id).byte(*kind as u8);
                writer.number(*parent).number(*unix_s as u64).name(name);
            }
            Self::Rollback { object, snapshot } => {
                writer.byte(7).number(*object).number(*snapshot);
            }
            _ => self.encode_rest(&mut writer),
        }
    }

    /// The operations that are encoded nowhere else.
    fn encode_rest(&self, writer: &mut Writer<'_>) {
        match self {
            Self::Remove { id } => {
                writer.byte(8).number(*id);
            }
            Self::Rename { id, parent, name } => {
                writer.byte(9).number(*id).number(*parent).name(name);
            }
            Self::Options { id, options } => {
                writer.byte(10).number(*id).byte(*options);
            }
            Self::Sums { record, map, sums } => {
                writer.byte(11).number(*record).bytes(&map.to_le_bytes());
                for sum in sums {
                    writer.bytes(&sum.to_le_bytes());
                }
            }
            Self::Origin { id, origin } => {
                let mut encoded = [0; Origin::BYTES];
                origin.encode(&mut encoded);
                writer.byte(12).number(*id).bytes(&encoded);
            }
            Self::CloneAligned {
                source,
                target,
                first,
                record_count,
            } => {
                writer.byte(13).number(*source).number(*target);
                writer.number(*first).number(*record_count);
            }
            _ => debug_assert!(false, "the others are encoded elsewhere"),
        }
    }

    /// Reads one operation from the front of `bytes`, which are shortened by it. None where there is none.
    pub(crate) fn decode(bytes: &mut &[u8]) -> Option<Self> {
        let mut reader = Reader(bytes);
        let tag = reader.byte()?;
        Some(match tag {
            1 => Self::Create {
                id: reader.number()?,
                kind: EntryKind::from_byte(reader.byte()?)?,
                parent: reader.number()?,
                size_bytes: reader.number()?,
                unix_s: reader.number()? as i64,
                name: reader.name()?,
            },
            2 => Self::Resize {
                id: reader.number()?,
                size_bytes: reader.number()?,
            },
            3 => Self::Slot {
                id: reader.number()?,
                record_index: reader.number()?,
                slot: Slot::decode(reader.take(Slot::BYTES)?)?,
            },
            4 => Self::Punch {
                id: reader.number()?,
                first_block: reader.number()?,
                block_count: reader.number()?,
            },
            5 => Self::CloneRange {
                source: reader.number()?,
                source_first: reader.number()?,
                target: reader.number()?,
                target_first: reader.number()?,
                record_count: reader.number()?,
            },
            6 => Self::Clone {
                source: reader.number()?,
                id: reader.number()?,
                kind: EntryKind::from_byte(reader.byte()?)?,
                parent: reader.number()?,
                unix_s: reader.number()? as i64,
                name: reader.name()?,
            },
            7 => Self::Rollback {
                object: reader.number()?,
                snapshot: reader.number()?,
            },
            _ => return Self::decode_rest(tag, reader),
        })
    }

    /// The operations that are decoded nowhere else.
    fn decode_rest(tag: u8, mut reader: Reader<'_, '_>) -> Option<Self> {
        Some(match tag {
            8 => Self::Remove {
                id: reader.number()?,
            },
            9 => Self::Rename {
                id: reader.number()?,
                parent: reader.number()?,
                name: reader.name()?,
            },
            10 => Self::Options {
                id: reader.number()?,
                options: reader.byte()?,
            },
            11 => {
                let record = reader.number()?;
                let map = read_uint(reader.take(2)?) as u16;
                let sums = reader.take(4 * map.count_ones() as usize)?;
                let sums = sums.chunks(4).map(|sum| read_uint(sum) as u32).collect();
                Self::Sums { record, map, sums }
            }
            12 => Self::Origin {
                id: reader.number()?,
                origin: Origin::decode(reader.take(Origin::BYTES)?),
            },
            13 => Self::CloneAligned {
                source: reader.number()?,
                target: reader.number()?,
                first: reader.number()?,
                record_count: reader.number()?,
            },
            _ => return None,
        })
    }
}

struct Writer<'a>(&'a mut Vec<u8>);

impl Writer<'_> {
    fn byte(&mut self, byte: u8) -> &mut Self {
        self.0.push(byte);
        self
    }

    fn bytes(&mut self, bytes: &[u8]) -> &mut Self {
        self.0.extend_from_slice(bytes);
        self
    }

    fn number(&mut self, number: u64) -> &mut Self {
        self.0.extend_from_slice(&number.to_le_bytes());
        self
    }

    fn name(&mut self, name: &str) -> &mut Self {
        debug_assert!(name.len() <= NAME_MAX_BYTES, "names were checked");
        self.0.push(name.len() as u8);
        self.0.extend_from_slice(name.as_bytes());
        self
    }

    fn slot(&mut self, slot: Slot) -> &mut Self {
        let at = self.0.len();
        self.0.resize(at + Slot::BYTES, 0);
        slot.encode(&mut self.0[at..]);
        self
    }
}

struct Reader<'a, 'b>(&'b mut &'a [u8]);

impl<'a> Reader<'a, '_> {
    fn take(&mut self, length: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(length)?;
        *self.0 = rest;
        Some(taken)
    }

    fn byte(&mut self) -> Option<u8> {
        self.take(1).map(|bytes| bytes[0])
    }

    fn number(&mut self) -> Option<u64> {
        self.take(8).map(read_uint)
    }

    fn name(&mut self) -> Option<String> {
        let length = self.byte()?;
        let bytes = self.take(usize::from(length))?;
        std::str::from_utf8(bytes).ok().map(ToOwned::to_owned)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::compression::Method;
    use crate::page::{Packed, RecordPointer};

    fn one_of_each() -> Vec<Operation> {
        let name = "ä name".to_owned();
        let front = RecordPointer {
            record: 77,
            map: 0x0ff0,
            is_shared: false,
            packed: None,
            birth: 1 << 40,
        };
        let back = RecordPointer {
            record: 78,
            map: 1,
            is_shared: true,
            packed: Some(Packed {
                method: Method::Zstd,
                first: 2,
                count: 14,
            }),
            birth: 3,
        };
        let (id, parent, unix_s) = (9, 8, -5);
        vec![
            Operation::Create {
                id,
                kind: EntryKind::Object,
                parent,
                size_bytes: 1 << 44,
                unix_s,
                name: name.clone(),
            },
            Operation::Resize { id, size_bytes: 5 },
            Operation::Slot {
                id,
                record_index: 6,
                slot: Slot { front, back },
            },
            Operation::Punch {
                id,
                first_block: 1,
                block_count: 2,
            },
            Operation::CloneRange {
                source: 1,
                source_first: 2,
                target: 3,
                target_first: 4,
                record_count: 5,
            },
            Operation::Clone {
                source: 1,
                id,
                kind: EntryKind::Snapshot,
                parent,
                unix_s,
                name: name.clone(),
            },
            Operation::Rollback {
                object: 1,
                snapshot: 2,
            },
            Operation::Remove { id },
            Operation::Rename { id, parent, name },
        ]
    }

    #[test]
    fn operations_survive_their_encoding_and_no_cut_is_taken_for_one() {
        let mut operations = one_of_each();
        let origin = Origin {
            pool_id: [6; 16],
            id: 3,
        };
        operations.extend([
            Operation::Options { id: 9, options: 1 },
            Operation::Sums {
                record: 7,
                map: 0b101,
                sums: vec![1, u32::MAX],
            },
            Operation::Origin { id: 9, origin },
            Operation::CloneAligned {
                source: 1,
                target: 9,
                first: 127,
                record_count: 1 << 28,
            },
        ]);
        let mut bytes = Vec::new();
        for operation in &operations {
            let at = bytes.len();
            operation.encode(&mut bytes);
            for end in at..bytes.len() {
                assert_eq!(
                    Operation::decode(&mut &bytes[at..end]),
                    None,
                    "{operation:?}"
                );
            }
        }
        let mut rest = &bytes[..];
        for operation in &operations {
            assert_eq!(Operation::decode(&mut rest).as_ref(), Some(operation));
        }
        assert!(rest.is_empty());
    }
}
