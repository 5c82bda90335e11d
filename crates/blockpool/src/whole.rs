//! Writing to an object of a dataset that compresses: a record is made anew as a whole.
//!
//! What it was is read, what is written is put into it, and the result goes, compressed if that saves enough, to blocks that nothing
//! names yet. So what is damaged is found before it gets a right checksum, and a crash leaves the old record or the new one.

use crate::compression::Method;
use crate::error::Result;
use crate::layout::{BLOCK, BLOCK_BYTES, Extent, RECORD, RECORD_BLOCKS};
use crate::object::Plan;
use crate::operation::Operation;
use crate::page::{RecordPointer, Slot};
use crate::pool::Inner;
use crate::sums::{Row, put_sums};

/// Bits of the blocks of a record that hold anything but zeros.
fn filled(record: &[u8]) -> u16 {
    let blocks = record.chunks(BLOCK).enumerate();
    blocks
        .filter(|(_, block)| block.iter().any(|byte| *byte != 0))
        .fold(0, |bits, (block, _)| bits | 1 << block)
}

/// Rows of bits that are set: first and count.
fn runs(bits: u16) -> impl Iterator<Item = (u64, u64)> {
    let mut block = 0;
    std::iter::from_fn(move || {
        let rest = bits.checked_shr(block).filter(|rest| *rest != 0)?;
        block += rest.trailing_zeros();
        let count = (bits >> block).trailing_ones();
        let run = (u64::from(block), u64::from(count));
        block += count;
        Some(run)
    })
}

impl Inner {
    /// Writes inside one record; true when a checkpoint is due. The caller holds the gate of the object, `io_gate` and the
    /// stripe of the place: id, number of the record, stripe.
    pub(crate) fn write_whole(
        &self,
        (id, record_index, stripe): (u64, u64, usize),
        at: usize,
        bytes: &[u8],
        (old, method): (Slot, Method),
    ) -> Result<bool> {
        let mut record = vec![0; RECORD];
        let end = at + bytes.len();
        let replaced = crate::map::block_bits(at.div_ceil(BLOCK) as u64, (end / BLOCK) as u64);
        self.read_old(old, !replaced, &mut record)?;
        record[at..end].copy_from_slice(bytes);
        let map = filled(&record);
        if map == 0 {
            return self.commit_hole(id, record_index, old);
        }
        let (packed, method) = match method.pack(&record) {
            Some(packed) => (Some(packed), Some(method)),
            None => (None, None),
        };
        let block_count = match &packed {
            Some(packed) => (packed.len() / BLOCK) as u64,
            None => RECORD_BLOCKS,
        };
        let plan = {
            let metadata = &mut self.state().metadata;
            let target = metadata.reserve(block_count)?;
            let front = RecordPointer {
                birth: metadata.epoch,
                ..RecordPointer::to(target, map, true, method)
            };
            Plan {
                target,
                is_new: true,
                old,
                new: Slot {
                    front,
                    back: RecordPointer::default(),
                },
                copied: 0,
                is_checked: true,
            }
        };
        let mut row = Row::default();
        let done = match packed {
            Some(packed) => self.write_run(plan.target, 0, &packed, &mut row),
            None => runs(map).try_for_each(|(first, count)| {
                let range =
                    (first * BLOCK_BYTES) as usize..((first + count) * BLOCK_BYTES) as usize;
                self.write_run(plan.target, first, &record[range], &mut row)
            }),
        };
        let done = done.and_then(|()| self.commit_write(id, record_index, &plan, &row, stripe));
        if done.is_err() {
            self.give_up(&plan);
        }
        done
    }

    /// Writes blocks of an extent, from one of its blocks on.
    fn write_run(&self, target: Extent, first: u64, bytes: &[u8], row: &mut Row) -> Result<()> {
        let in_record = target.first_block % RECORD_BLOCKS + first;
        put_sums(row, in_record as usize, bytes);
        self.write_data(bytes, target, (first * BLOCK_BYTES) as usize)
    }

    /// The record became nothing but zeros.
    fn commit_hole(&self, id: u64, record_index: u64, old: Slot) -> Result<bool> {
        if old.is_null() {
            return Ok(false);
        }
        let mut state = self.state();
        state.commit(&Operation::Slot {
            id,
            record_index,
            slot: Slot::default(),
        })?;
        Ok(state.is_checkpoint_due())
    }

    /// Reads blocks of what a record was.
    fn read_old(&self, old: Slot, wanted: u16, record: &mut [u8]) -> Result<()> {
        for pointer in [old.front, old.back] {
            let wanted = pointer.map & wanted;
            if wanted == 0 {
                continue;
            }
            // What is compressed is unpacked once, the rest is read row by row.
            let pieces: Vec<(u64, u64)> = match pointer.packed {
                Some(_) => vec![(0, RECORD_BLOCKS)],
                None => runs(wanted).collect(),
            };
            for (first, count) in pieces {
                let piece = self.state().metadata.old_piece(pointer, first, count)?;
                let mut bytes = vec![0; (count * BLOCK_BYTES) as usize];
                self.read_piece(&mut bytes, &piece)?;
                for (block, content) in (first..).zip(bytes.chunks(BLOCK)) {
                    if wanted >> block & 1 != 0 {
                        let at = block as usize * BLOCK;
                        record[at..at + BLOCK].copy_from_slice(content);
                    }
                }
            }
        }
        Ok(())
    }
}
