//! What a pool promises, one promise a test.

mod support;

use std::sync::Arc;

use blockpool::{
    BLOCK_BYTES, Compression, CrashChoice, DatasetOptions, Disk, Event, FileDisk, Name, Object,
    Pool, PoolError, RECORD_BYTES, SimulatedDisk,
};
use support::Numbers;
use support::machine::verify_accounting;

const SIZE: u64 = 16 << 20;

fn name(text: &str) -> Name {
    text.parse().unwrap()
}

fn pool_on(disk: &SimulatedDisk) -> Pool {
    let pool = Pool::create(Arc::new(disk.clone()), disk.size_bytes().unwrap(), [9; 16]).unwrap();
    pool.create_dataset(&name("d")).unwrap();
    pool
}

fn pool() -> (SimulatedDisk, Pool) {
    let disk = SimulatedDisk::new(SIZE);
    let pool = pool_on(&disk);
    (disk, pool)
}

fn bytes_of(object: &Object) -> Vec<u8> {
    let mut bytes = vec![0xee; object.size_bytes().unwrap() as usize];
    object.read_at(&mut bytes, 0).unwrap();
    bytes
}

fn written(disk: &SimulatedDisk) -> (usize, usize) {
    let writes = disk.events().into_iter().filter_map(|event| match event {
        Event::Write { bytes, .. } => Some(bytes.len()),
        _ => None,
    });
    writes.fold((0, 0), |(count, bytes), length| (count + 1, bytes + length))
}

#[test]
fn a_clone_writes_one_block_whatever_its_size() {
    let (disk, pool) = pool();
    let base = pool.create_object(&name("d/base"), 4 << 20).unwrap();
    base.write_at(&vec![7; 4 << 20], 0).unwrap();
    pool.checkpoint().unwrap();
    disk.start_recording();
    let clone = pool
        .clone_object(&name("d/base"), &name("d/clone"))
        .unwrap();
    pool.flush().unwrap();
    assert_eq!(written(&disk), (1, 4096));
    assert_eq!(bytes_of(&clone), bytes_of(&base));
    verify_accounting(&pool);
}

#[test]
fn a_copy_over_another_object_shares_the_root_and_writes_one_block() {
    let (disk, pool) = pool();
    let base = pool.create_object(&name("d/base"), 9 << 30).unwrap();
    for index in 0..60 {
        base.write_at(&[7; 4096], index * 150_000_000 / 4096 * 4096)
            .unwrap();
    }
    let copy = pool.create_object(&name("d/copy"), 9 << 30).unwrap();
    copy.write_at(&[8; 4096], 4096).unwrap();
    pool.checkpoint().unwrap();
    let before = pool.space();
    disk.start_recording();
    pool.clone_range(&base, 0, &copy, 0, 9 << 30).unwrap();
    pool.flush().unwrap();
    assert_eq!(written(&disk), (1, 4096));
    let after = pool.space();
    assert_eq!(after.counted_pages, before.counted_pages + 1);
    assert_eq!(after.counted_records, 0);
    for object in [&base, &copy] {
        object
            .write_at(&[9; 4096], 150_000_000 / 4096 * 4096)
            .unwrap();
    }
    verify_accounting(&pool);
}

/// Every block that one of the points is in.
fn at_points(object: &Object, points: &[u64]) -> Vec<u8> {
    let mut byte = [0];
    let read = |point: &u64| {
        object.read_at(&mut byte, *point).unwrap();
        byte[0]
    };
    points.iter().map(read).collect()
}

#[test]
fn ranges_at_the_same_place_share_pages_whatever_the_heights_of_the_maps() {
    let mut numbers = Numbers(11);
    let points: Vec<u64> = (0..40)
        .map(|index| match index % 3 {
            0 => numbers.below(12 << 30),
            1 => numbers.below(1 << 30),
            _ => numbers.below(40 << 20),
        })
        .collect();
    for round in 0..60 {
        let pool = pool_on(&SimulatedDisk::new(64 << 20));
        let sizes = [12 << 30, 12 << 30, 3 << 30, 20 << 20];
        let objects = ["d/a", "d/b"].map(|text| {
            let size = sizes[numbers.below(4) as usize];
            pool.create_object(&name(text), size).unwrap()
        });
        let size = |index: usize| objects[index].size_bytes().unwrap();
        for (object, value) in objects.iter().zip([1, 2]) {
            for point in &points {
                if numbers.below(3) > 0 && *point < object.size_bytes().unwrap() {
                    object.write_at(&[value], *point).unwrap();
                }
            }
        }
        let common = size(0).min(size(1)) / RECORD_BYTES;
        let first = [0, 127, numbers.below(common)][numbers.below(3) as usize] % common;
        let left = common - first;
        let count = [left, numbers.below(left + 1)][numbers.below(2) as usize];
        let (offset, length) = (first * RECORD_BYTES, count * RECORD_BYTES);
        let inside: Vec<u64> = points
            .iter()
            .copied()
            .filter(|point| *point < common * RECORD_BYTES)
            .collect();
        let before = [0, 1].map(|index| at_points(&objects[index], &inside));
        pool.clone_range(&objects[0], offset, &objects[1], offset, length)
            .unwrap();
        verify_accounting(&pool);
        let is_cloned = |point: &u64| (offset..offset + length).contains(point);
        let expected: Vec<u8> = (0..inside.len())
            .map(|index| before[usize::from(!is_cloned(&inside[index]))][index])
            .collect();
        assert_eq!(at_points(&objects[0], &inside), before[0], "round {round}");
        assert_eq!(at_points(&objects[1], &inside), expected, "round {round}");
        // Neither sees what is written to the other.
        for point in &inside {
            objects[0].write_at(&[3], *point).unwrap();
        }
        assert_eq!(at_points(&objects[1], &inside), expected, "round {round}");
        verify_accounting(&pool);
    }
}

#[test]
fn a_small_write_after_a_clone_copies_nothing_and_the_next_one_goes_in_place() {
    let (disk, pool) = pool();
    let base = pool.create_object(&name("d/base"), 1 << 20).unwrap();
    base.write_at(&vec![7; 1 << 20], 0).unwrap();
    let clone = pool
        .clone_object(&name("d/base"), &name("d/clone"))
        .unwrap();
    pool.checkpoint().unwrap();
    for (value, log_bytes) in [(1, 8192), (2, 4096), (3, 0)] {
        disk.start_recording();
        clone.write_at(&[value; 4096], 5 * 4096).unwrap();
        assert_eq!(written(&disk), (1, 4096), "write {value}");
        // The first flush has the operation and its data, the second ends what the first began, the third is the disk's own.
        clone.flush().unwrap();
        let (_, bytes) = written(&disk);
        assert_eq!(bytes - 4096, log_bytes, "write {value}");
    }
    assert!(bytes_of(&base).iter().all(|byte| *byte == 7));
    verify_accounting(&pool);
}

#[test]
fn a_write_in_place_is_not_undone_by_the_log_that_has_the_first_one() {
    let (disk, pool) = pool();
    let object = pool.create_object(&name("d/o"), 1 << 20).unwrap();
    pool.checkpoint().unwrap();
    disk.start_recording();
    for value in 1..5 {
        object.write_at(&[value; 4096], 8192).unwrap();
        object.flush().unwrap();
        let left = disk.after_crash(usize::MAX, |_| CrashChoice::Lose);
        let again = Pool::open(Arc::new(left)).unwrap();
        let found = bytes_of(&again.open_object(&name("d/o")).unwrap());
        assert_eq!(found[8192], value);
    }
}

#[test]
fn snapshots_keep_what_was_and_give_it_back() {
    let (disk, pool) = pool();
    let objects: Vec<Object> = ["d/a", "d/b"]
        .map(|full| pool.create_object(&name(full), 300_000).unwrap())
        .into();
    for object in &objects {
        object.write_at(&[1; 200_000], 50_000).unwrap();
    }
    assert_eq!(pool.snapshot(&name("d@monday")).unwrap(), 2);
    objects[0].write_at(&[2; 100_000], 0).unwrap();
    objects[1].set_size(10).unwrap();
    let snapshot = pool.open_object(&name("d/a@monday")).unwrap();
    assert_eq!(bytes_of(&snapshot)[50_000..250_000], [1; 200_000]);
    assert!(matches!(
        snapshot.write_at(&[1], 0),
        Err(PoolError::ReadOnly { .. })
    ));
    assert!(matches!(
        pool.snapshot(&name("d/a@monday")),
        Err(PoolError::Exists { .. })
    ));
    pool.flush().unwrap();
    drop((pool, objects, snapshot));
    let pool = Pool::open(Arc::new(disk)).unwrap();
    assert_eq!(pool.rollback(&name("d@monday")).unwrap(), 2);
    for full in ["d/a", "d/b"] {
        let found = bytes_of(&pool.open_object(&name(full)).unwrap());
        assert_eq!(found[50_000..250_000], [1; 200_000]);
        assert!(found[..50_000].iter().all(|byte| *byte == 0));
    }
    assert!(matches!(
        pool.destroy(&name("d/a"), false),
        Err(PoolError::HasDependents { .. })
    ));
    assert_eq!(pool.destroy(&name("d@monday"), false).unwrap(), 2);
    assert_eq!(pool.destroy(&name("d"), true).unwrap(), 3);
    assert!(pool.list(None).unwrap().is_empty());
    pool.checkpoint().unwrap();
    verify_accounting(&pool);
    assert_eq!(pool.space().data_bytes, 0);
}

#[test]
fn space_adds_up_and_exclusive_bytes_are_what_a_removal_frees() {
    let (_, pool) = pool();
    let base = pool.create_object(&name("d/base"), 2 << 20).unwrap();
    base.write_at(&vec![7; 2 << 20], 0).unwrap();
    let clone = pool
        .clone_object(&name("d/base"), &name("d/clone"))
        .unwrap();
    clone.write_at(&[1; 4096], 0).unwrap();
    let part = pool.create_object(&name("d/part"), 2 << 20).unwrap();
    pool.clone_range(&base, 0, &part, 1 << 20, 1 << 20).unwrap();
    let ids = [base.id(), clone.id(), part.id()];
    let spaces = pool.object_space(&ids).unwrap();
    assert_eq!(
        spaces
            .iter()
            .map(|space| space.referenced_bytes)
            .collect::<Vec<_>>(),
        [2 << 20, (2 << 20) + RECORD_BYTES, 1 << 20]
    );
    assert_eq!(
        spaces
            .iter()
            .map(|space| space.exclusive_bytes)
            .collect::<Vec<_>>(),
        [0, RECORD_BYTES, 0]
    );
    let before = pool.space();
    assert_eq!(before.data_bytes, (2 << 20) + RECORD_BYTES);
    pool.destroy(&name("d/clone"), false).unwrap();
    pool.checkpoint().unwrap();
    assert_eq!(before.data_bytes - pool.space().data_bytes, RECORD_BYTES);
    verify_accounting(&pool);
}

#[test]
fn ranges_that_cannot_be_are_refused() {
    let (_, pool) = pool();
    let a = pool.create_object(&name("d/a"), 1 << 20).unwrap();
    let b = pool.create_object(&name("d/b"), (1 << 20) - 5).unwrap();
    a.write_at(&[1; 4096], 0).unwrap();
    let huge = [
        1 << 63,
        (1 << 63) - 1,
        u64::MAX,
        u64::MAX - 4095,
        1 << 44,
        (1 << 20) - 1,
    ];
    for offset in huge {
        assert!(
            matches!(
                a.write_at(&[1; 2], offset),
                Err(PoolError::OutOfRange { .. })
            ),
            "{offset}"
        );
        assert!(
            matches!(
                a.read_at(&mut [1; 2], offset),
                Err(PoolError::OutOfRange { .. })
            ),
            "{offset}"
        );
        assert!(
            matches!(a.punch_hole(offset, 2), Err(PoolError::OutOfRange { .. })),
            "{offset}"
        );
        assert!(a.punch_hole(0, offset.max(1 << 21)).is_err());
        assert!(pool.clone_range(&a, offset, &b, 0, RECORD_BYTES).is_err());
        assert!(pool.clone_range(&a, 0, &b, offset, RECORD_BYTES).is_err());
        assert!(pool.clone_range(&a, 0, &b, 0, offset).is_err(), "{offset}");
    }
    for size in [(1 << 44) + 1, 1 << 63, u64::MAX] {
        assert!(matches!(a.set_size(size), Err(PoolError::Size { .. })));
        assert!(matches!(
            pool.create_object(&name("d/c"), size),
            Err(PoolError::Size { .. })
        ));
    }
    for (from, to, length) in [
        (4096, 0, RECORD_BYTES),
        (0, 1, RECORD_BYTES),
        (0, 0, 5000),
        (0, RECORD_BYTES, 2 * RECORD_BYTES),
        (0, 0, RECORD_BYTES),
    ] {
        let result = pool.clone_range(&a, from, &a, to, length);
        assert!(
            matches!(result, Err(PoolError::Range { .. })),
            "{from} {to} {length}: {result:?}"
        );
    }
    // A tail is shared where both end.
    b.set_size(2 * RECORD_BYTES - 7).unwrap();
    let c = pool.create_object(&name("d/c"), RECORD_BYTES - 7).unwrap();
    pool.clone_range(&b, RECORD_BYTES, &c, 0, RECORD_BYTES - 7)
        .unwrap();
    verify_accounting(&pool);
}

#[test]
fn a_full_pool_refuses_and_can_be_emptied() {
    let disk = SimulatedDisk::new(4 << 20);
    let pool = pool_on(&disk);
    let object = pool.create_object(&name("d/a"), 1 << 40).unwrap();
    let mut written = 0;
    let error = loop {
        match object.write_at(&vec![1; 1 << 16], written << 16) {
            Ok(()) => written += 1,
            Err(error) => break error,
        }
    };
    assert!(matches!(error, PoolError::Full), "{error}");
    assert!(written > 8, "{written}");
    pool.flush().unwrap();
    verify_accounting(&pool);
    object.punch_hole(0, written << 16).unwrap();
    object.write_at(&vec![2; 1 << 18], 5 << 30).unwrap();
    pool.destroy(&name("d/a"), false).unwrap();
    pool.checkpoint().unwrap();
    verify_accounting(&pool);
    pool.grow(8 << 20).unwrap();
    let object = pool.create_object(&name("d/b"), 1 << 40).unwrap();
    object.write_at(&vec![3; 3 << 20], 0).unwrap();
    drop((pool, object));
    let pool = Pool::open(Arc::new(disk)).unwrap();
    assert_eq!(pool.space().size_bytes, 8 << 20);
    verify_accounting(&pool);
}

#[test]
fn what_is_no_pool_is_told_apart() {
    for length in [0, 100, 4096, 1 << 20] {
        let error = Pool::open(Arc::new(SimulatedDisk::new(length))).unwrap_err();
        assert!(
            matches!(error, PoolError::NotAPool { .. }),
            "{length}: {error}"
        );
    }
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("pool");
    let disk = Arc::new(FileDisk::create(&path, SIZE).unwrap());
    let pool = Pool::create(disk, SIZE, [1; 16]).unwrap();
    let error = FileDisk::open(&path).unwrap_err();
    assert!(matches!(error, PoolError::InUse { .. }), "{error}");
    drop(pool);
    let file = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
    file.set_len(SIZE / 2).unwrap();
    let error = Pool::open(Arc::new(FileDisk::open(&path).unwrap())).unwrap_err();
    assert!(error.to_string().contains("are there"), "{error}");
}

/// A pool with a bit of everything, all of it in place.
fn varied_pool() -> SimulatedDisk {
    let (disk, pool) = pool();
    let mut numbers = Numbers(5);
    for number in 0..4 {
        let object = pool
            .create_object(&name(&format!("d/o{number}")), 9 << 20)
            .unwrap();
        for _ in 0..10 {
            let offset = numbers.below(2200) * BLOCK_BYTES;
            object
                .write_at(&[numbers.next() as u8 | 1; 8192], offset)
                .unwrap();
        }
    }
    pool.snapshot(&name("d@s")).unwrap();
    for number in 0..4 {
        let object = pool.open_object(&name(&format!("d/o{number}"))).unwrap();
        object
            .write_at(&[200; 4096], numbers.below(2200) * BLOCK_BYTES)
            .unwrap();
    }
    pool.checkpoint().unwrap();
    // And something in the log.
    pool.open_object(&name("d/o1"))
        .unwrap()
        .write_at(&[100; 4096], 4096)
        .unwrap();
    pool.flush().unwrap();
    disk
}

fn contents(pool: &Pool) -> Vec<(String, Result<Vec<u8>, PoolError>)> {
    let listed = pool.list(Some(&name("d"))).unwrap();
    let things = listed.into_iter().filter(|entry| entry.name != "d");
    let read = |full: &str| {
        let object = pool.open_object(&name(full))?;
        let mut bytes = Vec::new();
        // Holes are most of it: where what is no hole begins says what they are.
        let mut at = 0;
        while let Some((begin, end)) = object.next_data(at)? {
            bytes.extend_from_slice(&begin.to_le_bytes());
            let from = bytes.len();
            bytes.resize(from + (end - begin) as usize, 0);
            object.read_at(&mut bytes[from..], begin)?;
            at = end;
        }
        Ok(bytes)
    };
    things
        .map(|entry| (entry.name.clone(), read(&entry.name)))
        .collect()
}

#[test]
fn no_flipped_bit_changes_more_than_itself_or_makes_a_panic() {
    let disk = varied_pool();
    let whole = contents(&Pool::open(Arc::new(disk.copy())).unwrap());
    let mut numbers = Numbers(11);
    let (mut refused, mut opened) = (0, 0);
    for piece in disk.written_pieces() {
        for _ in 0..24 {
            let offset = piece + numbers.below(RECORD_BYTES);
            let damaged = disk.copy();
            damaged.flip_bit(offset, numbers.next() as u8);
            let Ok(pool) = Pool::open(Arc::new(damaged)) else {
                refused += 1;
                continue;
            };
            opened += 1;
            pool.scrub(|_| ()).unwrap();
            pool.check().unwrap();
            let found = contents(&pool);
            assert_eq!(found.len(), whole.len());
            for ((full, bytes), (_, expected)) in found.iter().zip(&whole) {
                let (Ok(bytes), Ok(expected)) = (bytes, expected) else {
                    continue;
                };
                let differing = bytes.iter().zip(expected).filter(|(a, b)| a != b).count();
                // One byte of data, or the one write that was only in the log.
                let is_known = differing <= 1 && bytes.len() == expected.len() || full == "d/o1";
                assert!(
                    is_known,
                    "'{full}' differs in {differing} bytes after a flip at {offset}"
                );
            }
        }
    }
    // Only what is kept once, the accounting, can keep a pool from being opened.
    assert!(refused > 0 && opened > 10 * refused, "{refused} {opened}");
}

/// Offsets of the pages of a kind: byte 8 behind their magic number.
fn pages(disk: &SimulatedDisk, kind: u8) -> Vec<u64> {
    let blocks = disk
        .written_pieces()
        .into_iter()
        .flat_map(|piece| (0..16).map(move |block| piece + block * BLOCK_BYTES));
    let is_wanted = |offset: &u64| {
        let mut header = [0; 32];
        disk.read_at(&mut header, *offset).unwrap();
        header[4..8] == *b"BPPG" && header[8] == kind
    };
    blocks.filter(is_wanted).collect()
}

#[test]
fn a_damaged_copy_is_repaired_and_two_are_named() {
    let disk = varied_pool();
    drop(Pool::open(Arc::new(disk.clone())).unwrap());
    let whole = contents(&Pool::open(Arc::new(disk.clone())).unwrap());
    let is_first = |disk: &SimulatedDisk, offset: u64| {
        let mut address = [0; 8];
        disk.read_at(&mut address, offset + 16).unwrap();
        u64::from_le_bytes(address) * BLOCK_BYTES == offset
    };
    let maps = pages(&disk, 2);
    assert!(maps.len() > 8);
    for offset in maps.iter().filter(|offset| is_first(&disk, **offset)) {
        disk.flip_bit(offset + 1000, 3);
    }
    let pool = Pool::open(Arc::new(disk.clone())).unwrap();
    for ((_, found), (_, expected)) in contents(&pool).iter().zip(&whole) {
        assert_eq!(found.as_ref().unwrap(), expected.as_ref().unwrap());
    }
    assert!(pool.scrub(|_| ()).unwrap().repaired_copies > 0);
    let report = pool.scrub(|_| ()).unwrap();
    assert_eq!(
        (report.repaired_copies, report.lost, report.problems),
        (0, vec![], vec![])
    );
    drop(pool);
    for offset in pages(&disk, 2) {
        disk.flip_bit(offset + 1000, 3);
    }
    let pool = Pool::open(Arc::new(disk)).unwrap();
    let lost = pool.scrub(|_| ()).unwrap().lost;
    for number in 0..4 {
        assert!(
            lost.iter().any(|lost| lost.name == format!("d/o{number}")),
            "{lost:?}"
        );
    }
    let object = pool.open_object(&name("d/o0")).unwrap();
    let error = object
        .read_at(&mut [0; 10], lost[0].offset_bytes)
        .unwrap_err();
    assert!(matches!(error, PoolError::Damaged { .. }), "{error}");
    // What is lost can be removed, and a recount finds the space again.
    pool.destroy(&name("d"), true).unwrap();
    pool.checkpoint().unwrap();
}

#[test]
fn a_recount_replaces_what_is_kept_once() {
    let disk = varied_pool();
    let whole = contents(&Pool::open(Arc::new(disk.clone())).unwrap());
    for kind in [4, 5, 6] {
        for offset in pages(&disk, kind) {
            disk.flip_bit(offset + 40, 1);
        }
    }
    let error = Pool::open(Arc::new(disk.clone())).unwrap_err();
    assert!(
        matches!(error, PoolError::DamagedAccounting { .. }),
        "{error}"
    );
    let pool = Pool::open_and_recount(Arc::new(disk.clone())).unwrap();
    verify_accounting(&pool);
    drop(pool);
    let pool = Pool::open(Arc::new(disk)).unwrap();
    verify_accounting(&pool);
    for ((_, found), (_, expected)) in contents(&pool).iter().zip(&whole) {
        assert_eq!(found.as_ref().unwrap(), expected.as_ref().unwrap());
    }
}

#[test]
fn threads_write_clone_and_flush_at_once() {
    for compression in [Compression::Off, Compression::Lz4] {
        write_clone_and_flush_at_once(compression);
    }
}

fn write_clone_and_flush_at_once(compression: Compression) {
    let disk = SimulatedDisk::new(64 << 20);
    let pool = pool_on(&disk);
    let options = DatasetOptions {
        compression,
        ..DatasetOptions::default()
    };
    pool.set_options(&name("d"), options).unwrap();
    let base = pool.create_object(&name("d/base"), 1 << 20).unwrap();
    let shared = pool.create_object(&name("d/shared"), 4 << 20).unwrap();
    std::thread::scope(|scope| {
        for thread in 0..4_u64 {
            let (pool, base, shared) = (&pool, &base, &shared);
            scope.spawn(move || {
                let mut numbers = Numbers(thread);
                for round in 0..60_u8 {
                    // Each thread has every fourth block of one object, down to parts of a record.
                    let block = numbers.below(256) * 4 + thread;
                    shared
                        .write_at(&[thread as u8 + 1; 4096], block * BLOCK_BYTES)
                        .unwrap();
                    base.write_at(&[round; 100], numbers.below(10_000)).unwrap();
                    let own = name(&format!("d/t{thread}"));
                    let clone = pool.clone_object(&name("d/base"), &own).unwrap();
                    let before = bytes_of(&clone);
                    base.write_at(&[round + 1; 4096], 0).unwrap();
                    assert_eq!(bytes_of(&clone), before);
                    clone.write_at(&[99; 5000], 3000).unwrap();
                    if round % 4 == 0 {
                        pool.flush().unwrap();
                    }
                    if round % 16 == thread as u8 {
                        pool.checkpoint().unwrap();
                    }
                    assert_eq!(bytes_of(&clone)[3000..8000], [99; 5000]);
                    pool.destroy(&own, false).unwrap();
                }
            });
        }
    });
    for (number, block) in bytes_of(&shared).chunks(4096).enumerate() {
        let owner = number as u8 % 4 + 1;
        assert!(block.iter().all(|byte| *byte == block[0]) && [0, owner].contains(&block[0]));
    }
    verify_accounting(&pool);
    pool.flush().unwrap();
    let expected = bytes_of(&shared);
    drop((pool, base, shared));
    let pool = Pool::open(Arc::new(disk)).unwrap();
    assert_eq!(
        bytes_of(&pool.open_object(&name("d/shared")).unwrap()),
        expected
    );
    verify_accounting(&pool);
}

#[test]
fn what_is_removed_is_given_back_to_the_host() {
    use std::os::unix::fs::MetadataExt;
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("pool");
    let disk = FileDisk::create(&path, 64 << 20).unwrap();
    let pool = Pool::create(Arc::new(disk), 64 << 20, [1; 16]).unwrap();
    pool.create_dataset(&name("d")).unwrap();
    let taken = || std::fs::metadata(&path).unwrap().blocks() * 512;
    let before = taken();
    let object = pool.create_object(&name("d/o"), 32 << 20).unwrap();
    object.write_at(&vec![1; 32 << 20], 0).unwrap();
    pool.checkpoint().unwrap();
    assert!(taken() >= before + (32 << 20));
    pool.destroy(&name("d/o"), false).unwrap();
    pool.checkpoint().unwrap();
    let left = taken();
    if left >= before + (32 << 20) {
        println!(
            "skipped: the file system of {} cannot punch holes",
            path.display()
        );
        return;
    }
    assert!(left < before + (1 << 20), "{before} {left}");

    // Two that were written in turns, so that each has every other record, and go one after the other.
    let objects = ["d/a", "d/b"].map(|text| pool.create_object(&name(text), 8 << 20).unwrap());
    for at in (0..8 << 20).step_by(RECORD_BYTES as usize) {
        for object in &objects {
            object
                .write_at(&vec![2; RECORD_BYTES as usize], at)
                .unwrap();
        }
    }
    pool.checkpoint().unwrap();
    assert!(taken() >= before + (16 << 20));
    drop(objects);
    for text in ["d/a", "d/b"] {
        pool.destroy(&name(text), false).unwrap();
        pool.checkpoint().unwrap();
    }
    let left = taken();
    assert!(left < before + (1 << 20), "{before} {left}");
    verify_accounting(&pool);
}
