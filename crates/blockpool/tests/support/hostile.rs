//! Pools with wrong values under right checksums: what somebody made on purpose.

use std::sync::Arc;

use blockpool::{Disk, Pool, SimulatedDisk};

const BLOCK: usize = 4096;

/// The bytes of a block or log record that its checksum covers, from the fourth on; none where it has none.
fn checked_length(bytes: &[u8]) -> Option<usize> {
    let number = |at: usize| {
        u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]) as usize
    };
    match &bytes[4..8] {
        b"BPPG" | b"BLKP" => Some(BLOCK),
        b"BPLG" => {
            let (operations, blocks) = (number(24), number(28));
            let head = operations.checked_add(32 + 8 * blocks.min(1 << 16))?;
            let length = head.next_multiple_of(BLOCK) + blocks.min(1 << 16) * BLOCK;
            (length < 1 << 20).then_some(length)
        }
        _ => None,
    }
}

/// Offsets of all blocks with a checksum.
pub(crate) fn targets(disk: &SimulatedDisk) -> Vec<u64> {
    let blocks = disk
        .written_pieces()
        .into_iter()
        .flat_map(|piece| (0..16).map(move |block| piece + block * BLOCK as u64));
    let has_checksum = |offset: &u64| {
        let mut bytes = vec![0; BLOCK];
        disk.read_at(&mut bytes, *offset).is_ok() && checked_length(&bytes).is_some()
    };
    blocks.filter(has_checksum).collect()
}

/// Changes bytes of one of the targets and makes its checksum right.
pub(crate) fn patch(disk: &SimulatedDisk, target: u64, at: usize, value: &[u8]) {
    let mut bytes = vec![0; BLOCK];
    let Ok(()) = disk.read_at(&mut bytes, target) else {
        return;
    };
    let at = at % (BLOCK - value.len());
    bytes[at..at + value.len()].copy_from_slice(value);
    disk.write_at(&bytes, target).expect("it was read");
    let Some(length) = checked_length(&bytes) else {
        return;
    };
    bytes.resize(length, 0);
    let Ok(()) = disk.read_at(&mut bytes, target) else {
        return;
    };
    let checksum = crc32c::crc32c(&bytes[4..]);
    disk.write_at(&checksum.to_le_bytes(), target)
        .expect("it was read");
}

/// Does everything to a pool that may be anything; true where it opens.
pub(crate) fn use_pool(disk: &SimulatedDisk) -> bool {
    let opened = [
        Pool::open(Arc::new(disk.copy())),
        Pool::open_and_recount(Arc::new(disk.copy())),
    ];
    let is_open = opened[0].is_ok();
    for pool in opened.into_iter().flatten() {
        // Any of them may fail; none may panic or run for ever.
        let listed = pool.list(None).unwrap_or_default();
        let _ = pool.check();
        let _ = pool.scrub(|_| ());
        let ids: Vec<_> = listed.iter().map(|entry| entry.id).collect();
        let _ = pool.object_space(&ids);
        for entry in &listed {
            let Ok(name) = entry.name.parse() else {
                continue;
            };
            if let Ok(object) = pool.open_object(&name) {
                let mut bytes = [0; 10_000];
                let data = object.next_data(0).ok().flatten();
                let begin = data.map_or(0, |(begin, _)| begin);
                let _ = object.read_at(&mut bytes, begin);
                let _ = object.write_at(&bytes, begin);
                let _ = object.set_size(5000);
            }
            let copy = "d/copy".parse().expect("a good name");
            let _ = pool.clone_object(&name, &copy);
            let _ = pool.flush();
            let _ = pool.destroy(&name, true);
        }
        let _ = pool.checkpoint();
        let _ = pool.check();
    }
    is_open
}
