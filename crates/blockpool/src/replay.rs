//! After a crash: does again what the log has and the checkpoint has not.

use crate::disk::Disk;
use crate::error::{PoolError, Result};
use crate::layout::{BLOCK, BLOCK_BYTES, Superblock};
use crate::log::{self, LogRecord};
use crate::operation::Operation;
use crate::pool::Pool;

impl Pool {
    /// Replays the log that follows `superblock`. Only a checkpoint may come next.
    pub(crate) fn replay(&self, superblock: &Superblock) -> Result<()> {
        self.replay_all(superblock, None::<fn(u64) -> Vec<Operation>>)
    }

    /// The same, where the system went on: `missing` tells what was done beyond so many log records, and all data
    /// that was written is there.
    pub(crate) fn replay_all(
        &self,
        superblock: &Superblock,
        missing: Option<impl FnOnce(u64) -> Vec<Operation>>,
    ) -> Result<()> {
        let mut state = self.inner.state();
        let metadata = &mut state.metadata;
        let mut records = read_log(&*self.inner.disk, superblock)?;
        if let Some(missing) = missing {
            let operations = missing(records.len() as u64);
            records.push(LogRecord {
                operations,
                data: Vec::new(),
            });
        }
        let Some(last) = records.last() else {
            return Ok(());
        };
        // What the log gave out must not be given to pages while it is done again.
        for operation in records.iter().flat_map(|record| &record.operations) {
            if let Operation::Slot { slot, .. } = operation
                && !slot
                    .extents()
                    .all(|extent| metadata.allocator.reserve_named(extent))
            {
                return Err(damaged("it names records that the pool has not"));
            }
        }
        metadata.is_replaying = true;
        for operation in records.iter().flat_map(|record| &record.operations) {
            metadata.apply(operation).map_err(|error| match error {
                PoolError::Io { .. } | PoolError::Damaged { .. } => error,
                other => damaged(&format!("it cannot be done again: {other}")),
            })?;
        }
        metadata.is_replaying = false;
        // The last record may have become durable without the data beside it.
        for (block, content) in &last.data {
            let is_data =
                metadata.allocator.contains_block(*block) && metadata.allocator.is_busy(*block);
            if !is_data {
                return Err(damaged("it has data for blocks that hold none"));
            }
            metadata
                .disk
                .write_at(content, block * BLOCK_BYTES)
                .map_err(PoolError::io("write data of the log to its place"))?;
        }
        Ok(())
    }
}

/// All valid records of the log after a checkpoint.
fn read_log(disk: &dyn Disk, superblock: &Superblock) -> Result<Vec<LogRecord>> {
    let read = |length: usize, offset_bytes: u64| -> Result<Vec<u8>> {
        let mut bytes = vec![0; length];
        disk.read_at(&mut bytes, offset_bytes)
            .map_err(PoolError::io("read the log"))?;
        Ok(bytes)
    };
    let mut offset_bytes = superblock.log_offset_bytes(superblock.txg);
    let end_bytes = offset_bytes + superblock.log_bytes();
    let mut records = Vec::new();
    while offset_bytes < end_bytes {
        let first = read(BLOCK, offset_bytes)?;
        let index = records.len() as u64;
        let length = log::peek(&first, superblock.txg, index)
            .filter(|length| *length as u64 <= end_bytes - offset_bytes);
        let Some(length) = length else {
            break;
        };
        let Some(record) = log::decode(&read(length, offset_bytes)?) else {
            break;
        };
        records.push(record);
        offset_bytes += length as u64;
    }
    Ok(records)
}

fn damaged(what: &str) -> PoolError {
    PoolError::Damaged {
        what: format!("the log is wrong: {what}"),
    }
}

/// What bytes hold as a log; for fuzzing.
///
/// Returns how many operations were understood when `bytes` are the log area after checkpoint `txg`.
#[must_use]
pub fn parse_log(bytes: &[u8], txg: u64) -> usize {
    let mut rest = bytes;
    let mut index = 0;
    let mut operation_count = 0;
    while let Some(length) = log::peek(rest, txg, index).filter(|length| *length <= rest.len()) {
        let Some(record) = log::decode(&rest[..length]) else {
            break;
        };
        operation_count += record.operations.len();
        rest = &rest[length..];
        index += 1;
    }
    operation_count
}
