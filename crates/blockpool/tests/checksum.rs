//! Data that is not written in place any more: no flipped bit in it is overlooked, and exactly what it touches is named.

mod support;

use std::sync::Arc;

use blockpool::{
    BLOCK_BYTES, Compression, CrashChoice, DatasetOptions, Disk, Name, Object, Pool, PoolError,
    SimulatedDisk,
};
use support::Numbers;
use support::machine::verify_accounting;

const SIZE: u64 = 16 << 20;
const BLOCK: usize = BLOCK_BYTES as usize;

fn name(text: &str) -> Name {
    text.parse().unwrap()
}

fn pool() -> (SimulatedDisk, Pool) {
    let disk = SimulatedDisk::new(SIZE);
    let pool = Pool::create(Arc::new(disk.clone()), SIZE, [9; 16]).unwrap();
    pool.create_dataset(&name("d")).unwrap();
    (disk, pool)
}

fn reopen(disk: &SimulatedDisk) -> Pool {
    Pool::open(Arc::new(disk.clone())).unwrap()
}

/// Where a block with this content is on the disk.
fn find(disk: &SimulatedDisk, content: &[u8]) -> Vec<u64> {
    let mut bytes = vec![0; BLOCK];
    let mut found = Vec::new();
    for piece in disk.written_pieces() {
        for offset in (piece..piece + 65_536).step_by(BLOCK) {
            disk.read_at(&mut bytes, offset).unwrap();
            if bytes == content {
                found.push(offset);
            }
        }
    }
    found
}

fn block(seed: u64) -> Vec<u8> {
    let mut numbers = Numbers(seed);
    (0..BLOCK).map(|_| numbers.next() as u8).collect()
}

fn is_damaged(result: Result<(), PoolError>) -> bool {
    matches!(result, Err(PoolError::Damaged { .. }))
}

fn lost(pool: &Pool) -> Vec<(String, u64, u64)> {
    let report = pool.scrub(|_| ()).unwrap();
    let lost = report.lost.into_iter();
    lost.map(|lost| (lost.name, lost.offset_bytes, lost.length_bytes))
        .collect()
}

#[test]
fn shared_data_is_verified_once_it_was_read_or_scrubbed() {
    for by_scrub in [false, true] {
        let (disk, pool) = pool();
        let base = pool.create_object(&name("d/base"), 1 << 20).unwrap();
        for index in 0..40 {
            base.write_at(&block(index), index * BLOCK_BYTES).unwrap();
        }
        pool.snapshot(&name("d/base@s")).unwrap();
        let clone = pool
            .clone_object(&name("d/base@s"), &name("d/clone"))
            .unwrap();
        clone.write_at(&block(100), 5 * BLOCK_BYTES).unwrap();
        if by_scrub {
            let report = pool.scrub(|_| ()).unwrap();
            assert_eq!((report.data_blocks, report.new_sums), (40, 40));
            assert_eq!(pool.scrub(|_| ()).unwrap().new_sums, 0);
        } else {
            base.read_at(&mut vec![0; 1 << 20], 0).unwrap();
            pool.checkpoint().unwrap();
        }
        for (victim, names) in [
            (5, vec!["d/base", "d/base@s"]),
            (6, vec!["d/base", "d/base@s", "d/clone"]),
        ] {
            let damaged = disk.copy();
            damaged.flip_bit(find(&disk, &block(victim))[0] + 77, 3);
            let pool = reopen(&damaged);
            let mut bytes = vec![0; BLOCK];
            for name_text in ["d/base", "d/base@s", "d/clone"] {
                let object = pool.open_object(&name(name_text)).unwrap();
                for index in 0..40 {
                    let result = object.read_at(&mut bytes, index * BLOCK_BYTES);
                    let expected = index == victim && names.contains(&name_text);
                    assert_eq!(is_damaged(result), expected, "{name_text} {index}");
                    // Also where only a part is read.
                    let result = object.read_at(&mut bytes[..9], index * BLOCK_BYTES + 4000);
                    assert_eq!(is_damaged(result), expected, "{name_text} {index}");
                }
            }
            let expected: Vec<_> = names
                .iter()
                .map(|name| ((*name).to_owned(), victim * BLOCK_BYTES, BLOCK_BYTES))
                .collect();
            assert_eq!(lost(&pool), expected);
            // A part of a damaged block is not written: the rest would get a right checksum.
            let object = pool.open_object(&name("d/base")).unwrap();
            assert!(is_damaged(object.write_at(&[1; 9], victim * BLOCK_BYTES)));
            // All of it is: afterwards it is whole.
            object.write_at(&block(7), victim * BLOCK_BYTES).unwrap();
            object.read_at(&mut bytes, victim * BLOCK_BYTES).unwrap();
            assert_eq!(bytes, block(7));
        }
    }
}

fn checked_pool() -> (SimulatedDisk, Pool, Object) {
    let (disk, pool) = pool();
    let options = DatasetOptions {
        checksum: true,
        ..DatasetOptions::default()
    };
    pool.set_options(&name("d"), options).unwrap();
    assert_eq!(pool.list(None).unwrap()[0].options, options);
    let object = pool.create_object(&name("d/o"), 1 << 20).unwrap();
    (disk, pool, object)
}

#[test]
fn a_checked_dataset_verifies_what_nobody_shares_also_after_a_crash() {
    for by_log in [false, true] {
        let (disk, pool, object) = checked_pool();
        pool.checkpoint().unwrap();
        disk.start_recording();
        object.write_at(&[block(1), block(2)].concat(), 0).unwrap();
        object.write_at(&block(3), 0).unwrap();
        object.write_at(&block(4)[..100], BLOCK_BYTES + 50).unwrap();
        if by_log {
            pool.flush().unwrap();
        } else {
            pool.checkpoint().unwrap();
        }
        let left = disk.after_crash(disk.events().len(), |_| CrashChoice::Lose);
        drop(pool);
        let mut second = block(2);
        second[50..150].copy_from_slice(&block(4)[..100]);
        let pool = reopen(&left);
        let mut bytes = vec![0; 2 * BLOCK];
        let object = pool.open_object(&name("d/o")).unwrap();
        object.read_at(&mut bytes, 0).unwrap();
        assert_eq!(bytes, [block(3), second.clone()].concat());
        verify_accounting(&pool);
        for (index, content) in [block(3), second].into_iter().enumerate() {
            for place in find(&left, &content) {
                left.flip_bit(place + 1000, 0);
            }
            assert!(is_damaged(object.read_at(&mut bytes, 0)));
            assert_eq!(lost(&pool).len(), 1, "ranges that touch are one: {index}");
        }
    }
}

#[test]
fn a_checked_dataset_never_writes_in_place_and_another_does_again() {
    let (_, pool, object) = checked_pool();
    object.write_at(&block(1), 0).unwrap();
    let is_kept = |object: &Object| {
        pool.checkpoint().unwrap();
        let before = pool.space().data_bytes + pool.space().freeing_bytes;
        object.write_at(&block(2), 0).unwrap();
        pool.space().data_bytes + pool.space().freeing_bytes == before
    };
    assert!(!is_kept(&object));
    assert!(!is_kept(&object));
    pool.set_options(&name("d"), DatasetOptions::default())
        .unwrap();
    // The last place has a checksum: it is left once more.
    assert!(!is_kept(&object));
    assert!(is_kept(&object));
    verify_accounting(&pool);
}

#[test]
fn a_place_that_is_used_again_forgets_its_checksums() {
    let (_, pool) = pool();
    for round in 0..30 {
        let object = pool.create_object(&name("d/o"), 2 << 20).unwrap();
        object.write_at(&vec![round; 2 << 20], 0).unwrap();
        pool.snapshot(&name("d/o@s")).unwrap();
        let report = pool.scrub(|_| ()).unwrap();
        assert_eq!((report.new_sums, report.lost), (512, Vec::new()));
        let mut bytes = vec![0; 2 << 20];
        object.read_at(&mut bytes, 0).unwrap();
        assert!(bytes.iter().all(|byte| *byte == round));
        pool.destroy(&name("d/o"), true).unwrap();
    }
    verify_accounting(&pool);
}

/// A pool in which nothing can be written in place any more.
fn frozen_pool(compression: Compression) -> (SimulatedDisk, Vec<(String, Vec<u8>)>) {
    let (disk, pool) = pool();
    let options = DatasetOptions {
        compression,
        ..DatasetOptions::default()
    };
    pool.set_options(&name("d"), options).unwrap();
    let mut counter = 0;
    for text in ["d/a", "d/b"] {
        let object = pool.create_object(&name(text), 300_001).unwrap();
        for index in [0, 1, 2, 17, 40, 41] {
            counter += 1;
            object
                .write_at(&block(counter), index * BLOCK_BYTES)
                .unwrap();
        }
        pool.snapshot(&name(&format!("{text}@s"))).unwrap();
        object.write_at(&block(counter + 50), BLOCK_BYTES).unwrap();
    }
    let a = pool.open_object(&name("d/a")).unwrap();
    let b = pool.open_object(&name("d/b")).unwrap();
    pool.clone_range(&a, 0, &b, 196_608, 65_536).unwrap();
    pool.snapshot(&name("d@t")).unwrap();
    pool.scrub(|_| ()).unwrap();
    pool.checkpoint().unwrap();
    let listed = pool.list(None).unwrap().into_iter();
    let contents = listed
        .filter(|entry| entry.name != "d")
        .map(|entry| {
            let object = pool.open_object(&name(&entry.name)).unwrap();
            let mut bytes = vec![0; entry.size_bytes as usize];
            object.read_at(&mut bytes, 0).unwrap();
            (entry.name, bytes)
        })
        .collect();
    (disk, contents)
}

/// Blocks that cannot be read, by what a reader sees; what can be read is right.
fn unreadable(pool: &Pool, contents: &[(String, Vec<u8>)]) -> Vec<(String, u64)> {
    let mut found = Vec::new();
    for (text, expected) in contents {
        let object = pool.open_object(&name(text)).unwrap();
        for (index, expected) in expected.chunks(BLOCK).enumerate() {
            let mut bytes = vec![0; expected.len()];
            let offset = index as u64 * BLOCK_BYTES;
            match object.read_at(&mut bytes, offset) {
                Ok(()) => assert!(bytes == expected, "'{text}' at {offset} is silently wrong"),
                Err(PoolError::Damaged { .. }) => found.push((text.clone(), offset)),
                Err(error) => panic!("{error}"),
            }
        }
    }
    found
}

fn blocks_of(lost: Vec<(String, u64, u64)>) -> Vec<(String, u64)> {
    lost.into_iter()
        .flat_map(|(name, offset, length)| {
            let blocks = (offset..offset + length).step_by(BLOCK);
            blocks.map(move |offset| (name.clone(), offset))
        })
        .collect()
}

#[test]
fn every_flipped_bit_is_repaired_named_or_of_no_use() {
    for compression in [Compression::Off, Compression::Lz4, Compression::Zstd] {
        flip_every_block(compression);
    }
}

fn flip_every_block(compression: Compression) {
    let (disk, contents) = frozen_pool(compression);
    let mut numbers = Numbers(5);
    let mut contents = contents;
    contents.sort();
    let (mut repaired, mut named, mut refused) = (0, 0, 0);
    for piece in disk.written_pieces() {
        for offset in (piece..piece + 65_536).step_by(BLOCK) {
            let mut bytes = vec![0; BLOCK];
            disk.read_at(&mut bytes, offset).unwrap();
            if bytes.iter().all(|byte| *byte == 0) {
                continue;
            }
            let damaged = disk.copy();
            damaged.flip_bit(offset + numbers.below(BLOCK_BYTES), numbers.below(8) as u8);
            let pool = match Pool::open(Arc::new(damaged.copy())) {
                Ok(pool) => pool,
                Err(PoolError::DamagedAccounting { .. }) => {
                    refused += 1;
                    Pool::open_and_recount(Arc::new(damaged.copy())).unwrap()
                }
                Err(error) => panic!("{error}"),
            };
            let report = pool.scrub(|_| ()).unwrap();
            repaired += u32::from(report.repaired_copies > 0);
            let lost: Vec<_> = report
                .lost
                .into_iter()
                .map(|lost| (lost.name, lost.offset_bytes, lost.length_bytes))
                .collect();
            named += u32::from(!lost.is_empty());
            assert_eq!(report.problems, Vec::<String>::new());
            let mut told = blocks_of(lost);
            told.sort();
            assert_eq!(told, unreadable(&pool, &contents), "at {offset}");
        }
    }
    println!("{repaired} repaired, {named} named, {refused} refused and recounted");
    assert!(repaired > 10 && named > 10, "{repaired} {named}");
}

#[test]
fn lost_checksums_take_no_data_with_them() {
    for compression in [Compression::Off, Compression::Lz4] {
        lose_checksums(compression);
    }
}

fn lose_checksums(compression: Compression) {
    let (disk, contents) = frozen_pool(compression);
    let mut sums = Vec::new();
    for piece in disk.written_pieces() {
        for offset in (piece..piece + 65_536).step_by(BLOCK) {
            let mut bytes = vec![0; BLOCK];
            disk.read_at(&mut bytes, offset).unwrap();
            if &bytes[4..8] == b"BPPG" && bytes[8] == 7 {
                sums.push(offset);
            }
        }
    }
    assert!(sums.len() >= 2, "two copies");
    for offset in sums {
        disk.flip_bit(offset + 50, 1);
    }
    assert_eq!(unreadable(&reopen(&disk.copy()), &contents), []);
    let pool = reopen(&disk);
    let report = pool.scrub(|_| ()).unwrap();
    // One for each leaf of checksums.
    assert!((1..=2).contains(&report.problems.len()));
    assert_eq!(report.lost, Vec::new());
    assert!(report.new_sums > 0);
    let report = pool.scrub(|_| ()).unwrap();
    assert_eq!((report.problems, report.new_sums), (Vec::new(), 0));
    verify_accounting(&pool);
    assert_eq!(unreadable(&pool, &contents), []);
}

#[test]
fn a_pool_of_version_1_is_read_and_becomes_one_of_this_version() {
    let (disk, pool) = pool();
    pool.create_object(&name("d/o"), 1 << 20)
        .unwrap()
        .write_at(&block(1), 0)
        .unwrap();
    pool.checkpoint().unwrap();
    drop(pool);
    for offset in [0, 4, 8, 12].map(|block| block * BLOCK_BYTES) {
        support::hostile::patch(&disk, offset, 12, &[1]);
        // Records were counted then.
        support::hostile::patch(&disk, offset, 72, &[1]);
    }
    let pool = reopen(&disk);
    let mut bytes = vec![0; BLOCK];
    pool.open_object(&name("d/o"))
        .unwrap()
        .read_at(&mut bytes, 0)
        .unwrap();
    assert_eq!(bytes, block(1));
    pool.checkpoint().unwrap();
    disk.read_at(&mut bytes, 0).unwrap();
    assert_eq!(u32::from(bytes[12]), blockpool::VERSION);
    verify_accounting(&pool);
}
