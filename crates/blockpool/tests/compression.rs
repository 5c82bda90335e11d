//! Compressed datasets: what is written takes less space, reads as ever, and is shared, freed and sent like the rest.

mod support;

use std::sync::Arc;

use blockpool::{
    BLOCK_BYTES, Compression, CrashChoice, DatasetOptions, Name, Object, ObjectSpace, Pool,
    PoolError, RECORD_BYTES, SimulatedDisk,
};
use support::Numbers;
use support::machine::verify_accounting;

const BLOCK: usize = BLOCK_BYTES as usize;
const RECORD: usize = RECORD_BYTES as usize;
const METHODS: [Compression; 2] = [Compression::Lz4, Compression::Zstd];

fn name(text: &str) -> Name {
    text.parse().unwrap()
}

fn set(pool: &Pool, compression: Compression) {
    let options = DatasetOptions {
        compression,
        ..DatasetOptions::default()
    };
    pool.set_options(&name("d"), options).unwrap();
}

fn pool(compression: Compression) -> (SimulatedDisk, Pool) {
    let disk = SimulatedDisk::new(32 << 20);
    let pool = Pool::create(Arc::new(disk.clone()), 32 << 20, [9; 16]).unwrap();
    pool.create_dataset(&name("d")).unwrap();
    set(&pool, compression);
    (disk, pool)
}

fn bytes_of(object: &Object) -> Vec<u8> {
    let mut bytes = vec![0xee; object.size_bytes().unwrap() as usize];
    object.read_at(&mut bytes, 0).unwrap();
    bytes
}

fn space_of(pool: &Pool, object: &Object) -> ObjectSpace {
    pool.object_space(&[object.id()]).unwrap()[0]
}

fn noise(seed: u64, length: usize) -> Vec<u8> {
    let mut numbers = Numbers(seed);
    (0..length).map(|_| numbers.next() as u8).collect()
}

/// Lines of a log: a quarter of it is noise.
fn text(seed: u64, length: usize) -> Vec<u8> {
    let mut bytes = noise(seed, length);
    for line in bytes.chunks_mut(64) {
        let kept = line.len() / 4;
        line[kept..].fill(b'a');
    }
    bytes
}

#[test]
fn what_is_compressed_takes_less_and_reads_the_same_after_a_crash_too() {
    for method in METHODS {
        for by_log in [false, true] {
            let (disk, pool) = pool(method);
            pool.checkpoint().unwrap();
            disk.start_recording();
            let object = pool.create_object(&name("d/o"), 1 << 20).unwrap();
            let mut expected = text(1, 1 << 20);
            object.write_at(&expected, 0).unwrap();
            let space = space_of(&pool, &object);
            assert_eq!(space.written_bytes, 1 << 20);
            assert!(space.referenced_bytes <= 7 << 16, "{method:?} {space:?}");
            assert_eq!(pool.space().data_bytes, space.referenced_bytes);
            assert!(space.ratio().unwrap() > 2.0, "{space:?}");
            // Parts of blocks and of records, across their borders.
            for (seed, offset, length) in [(2, 5, 9), (3, 60_000, 9000), (4, 200_001, 150_000)] {
                let part = text(seed, length);
                object.write_at(&part, offset as u64).unwrap();
                expected[offset..offset + length].copy_from_slice(&part);
            }
            assert!(bytes_of(&object) == expected);
            let mut part = vec![0; 70_000];
            object.read_at(&mut part, 33_333).unwrap();
            assert!(part == expected[33_333..103_333]);
            match by_log {
                true => pool.flush().unwrap(),
                false => pool.checkpoint().unwrap(),
            }
            let left = disk.after_crash(disk.events().len(), |_| CrashChoice::Lose);
            let pool = Pool::open(Arc::new(left)).unwrap();
            let object = pool.open_object(&name("d/o")).unwrap();
            assert!(bytes_of(&object) == expected);
            verify_accounting(&pool);
        }
    }
}

#[test]
fn what_saves_nothing_is_stored_as_it_is_and_zeros_take_no_space() {
    let (_, pool) = pool(Compression::Zstd);
    let object = pool.create_object(&name("d/o"), 4 * RECORD_BYTES).unwrap();
    let mut expected = noise(1, RECORD);
    expected.resize(4 * RECORD, 0);
    expected[2 * RECORD + 3 * BLOCK] = 1;
    object.write_at(&expected, 0).unwrap();
    assert!(bytes_of(&object) == expected);
    let space = space_of(&pool, &object);
    assert_eq!(space.referenced_bytes, RECORD_BYTES + BLOCK_BYTES);
    assert_eq!(space.written_bytes, RECORD_BYTES + BLOCK_BYTES);
    let hole_end = 2 * RECORD_BYTES + 3 * BLOCK_BYTES;
    let data = object.next_data(RECORD_BYTES).unwrap();
    assert_eq!(data, Some((hole_end, hole_end + BLOCK_BYTES)));
    // A few blocks of noise take a block more than they have.
    object
        .write_at(&noise(2, 2 * BLOCK), 3 * RECORD_BYTES)
        .unwrap();
    let more = space_of(&pool, &object).referenced_bytes - space.referenced_bytes;
    assert_eq!(more, 3 * BLOCK_BYTES);
    object.write_at(&vec![0; 4 * RECORD], 0).unwrap();
    assert_eq!(space_of(&pool, &object), ObjectSpace::default());
    assert_eq!(pool.space().data_bytes, 0);
    verify_accounting(&pool);
}

#[test]
fn clones_share_extents_and_the_last_one_frees_them() {
    let (_, pool) = pool(Compression::Lz4);
    let base = pool.create_object(&name("d/base"), 1 << 20).unwrap();
    base.write_at(&text(1, 1 << 20), 0).unwrap();
    let whole = space_of(&pool, &base).referenced_bytes;
    let clone = pool
        .clone_object(&name("d/base"), &name("d/clone"))
        .unwrap();
    let range = pool.create_object(&name("d/range"), 1 << 20).unwrap();
    // At another place, so that each extent is counted.
    pool.clone_range(&base, 0, &range, 8 * RECORD_BYTES, 8 * RECORD_BYTES)
        .unwrap();
    assert_eq!(pool.space().data_bytes, whole);
    let (base_bytes, range_bytes) = (bytes_of(&base), bytes_of(&range));
    clone.write_at(&text(2, 5000), 100_000).unwrap();
    assert!(bytes_of(&base) == base_bytes && bytes_of(&range) == range_bytes);
    let expected: Vec<u8> = [
        &base_bytes[..100_000],
        &text(2, 5000),
        &base_bytes[105_000..],
    ]
    .concat();
    assert!(bytes_of(&clone) == expected);
    let spaces = [&base, &clone, &range].map(|object| space_of(&pool, object));
    // One record of the clone is its own, and one of the base is in nothing but the range.
    assert!(spaces[1].exclusive_bytes > 0 && spaces[1].exclusive_bytes < whole / 8);
    assert_eq!(spaces[2].exclusive_bytes, 0);
    verify_accounting(&pool);
    for (text, left) in [("d/base", 2), ("d/clone", 1), ("d/range", 0)] {
        pool.destroy(&name(text), false).unwrap();
        pool.checkpoint().unwrap();
        verify_accounting(&pool);
        assert_eq!(pool.space().data_bytes > 0, left > 0, "{text}");
    }
    assert!(pool.check().unwrap().record_count == 0);
}

#[test]
fn a_dataset_that_stops_compressing_reads_what_it_has_and_writes_in_place_again() {
    let (disk, pool) = pool(Compression::Zstd);
    let object = pool.create_object(&name("d/o"), 1 << 20).unwrap();
    let mut expected = text(1, 1 << 20);
    object.write_at(&expected, 0).unwrap();
    set(&pool, Compression::Off);
    for (seed, offset) in [(2, 3 * BLOCK), (3, 3 * BLOCK + 100), (4, 9 * BLOCK + 1)] {
        let part = noise(seed, 5000);
        object.write_at(&part, offset as u64).unwrap();
        expected[offset..offset + 5000].copy_from_slice(&part);
        assert!(bytes_of(&object) == expected);
    }
    disk.start_recording();
    object.write_at(&noise(5, BLOCK), 3 * BLOCK_BYTES).unwrap();
    expected[3 * BLOCK..4 * BLOCK].copy_from_slice(&noise(5, BLOCK));
    pool.flush().unwrap();
    pool.flush().unwrap();
    let data = space_of(&pool, &object);
    object.write_at(&noise(6, BLOCK), 3 * BLOCK_BYTES).unwrap();
    expected[3 * BLOCK..4 * BLOCK].copy_from_slice(&noise(6, BLOCK));
    assert_eq!(space_of(&pool, &object), data);
    // Two older places, of which one is compressed, and a third.
    pool.snapshot(&name("d/o@s")).unwrap();
    object.write_at(&noise(7, 100), 0).unwrap();
    expected[..100].copy_from_slice(&noise(7, 100));
    assert!(bytes_of(&object) == expected);
    // And back.
    set(&pool, Compression::Lz4);
    object.write_at(&noise(8, 100), 50_000).unwrap();
    expected[50_000..50_100].copy_from_slice(&noise(8, 100));
    assert!(bytes_of(&object) == expected);
    pool.checkpoint().unwrap();
    let pool = Pool::open(Arc::new(disk)).unwrap();
    let object = pool.open_object(&name("d/o")).unwrap();
    assert!(bytes_of(&object) == expected);
    verify_accounting(&pool);
    let report = pool.scrub(|_| ()).unwrap();
    assert_eq!((report.lost, report.problems), (Vec::new(), Vec::new()));
}

#[test]
fn freed_extents_are_used_again() {
    let (_, pool) = pool(Compression::Lz4);
    let object = pool.create_object(&name("d/o"), 8 << 20).unwrap();
    let mut numbers = Numbers(3);
    let mut expected = vec![0; 8 << 20];
    for round in 0..3000 {
        let record = numbers.below(128) as usize;
        let length = BLOCK + numbers.below(15) as usize * BLOCK;
        let bytes = [
            noise(round, length - BLOCK),
            vec![7; RECORD - length + BLOCK],
        ]
        .concat();
        object.write_at(&bytes, (record * RECORD) as u64).unwrap();
        expected[record * RECORD..][..RECORD].copy_from_slice(&bytes);
    }
    assert!(bytes_of(&object) == expected);
    verify_accounting(&pool);
}

#[test]
fn a_full_pool_refuses_and_can_be_emptied() {
    for method in METHODS {
        let (disk, pool) = pool(method);
        let mut written = 0;
        let error = loop {
            let object = pool
                .create_object(&name(&format!("d/o{written}")), 1 << 20)
                .and_then(|object| object.write_at(&text(written, 1 << 20), 0));
            match object {
                Ok(()) => written += 1,
                Err(error) => break error,
            }
        };
        assert!(matches!(error, PoolError::Full), "{error}");
        // More than the pool has space for as it is.
        assert!(written > 48, "{method:?} {written}");
        verify_accounting(&pool);
        drop(pool);
        let pool = Pool::open(Arc::new(disk)).unwrap();
        for number in 0..written {
            let object = pool.open_object(&name(&format!("d/o{number}"))).unwrap();
            assert!(bytes_of(&object) == text(number, 1 << 20), "{number}");
        }
        pool.destroy(&name("d"), true).unwrap();
        pool.checkpoint().unwrap();
        pool.checkpoint().unwrap();
        assert_eq!(pool.space().data_bytes, 0);
        verify_accounting(&pool);
    }
}

#[test]
fn a_stream_brings_the_option_along_unless_the_dataset_is_there() {
    for (is_there, compresses) in [(false, true), (true, false)] {
        let (_, from) = pool(Compression::Zstd);
        let object = from.create_object(&name("d/o"), 1 << 20).unwrap();
        object.write_at(&text(1, 1 << 20), 0).unwrap();
        let clone = from.clone_object(&name("d/o"), &name("d/clone")).unwrap();
        clone.write_at(&text(2, 5000), 100_000).unwrap();
        from.snapshot(&name("d@1")).unwrap();
        let mut stream = Vec::new();
        from.send(&name("d@1"), None, None, &mut stream, |_| ())
            .unwrap();
        let disk = SimulatedDisk::new(32 << 20);
        let to = Pool::create(Arc::new(disk), 32 << 20, [8; 16]).unwrap();
        let target = name("e");
        if is_there {
            to.create_dataset(&target).unwrap();
        }
        to.receive(Some(&target), false, &mut &stream[..], |_| ())
            .unwrap();
        let options = to.find(&target).unwrap().options;
        assert_eq!(options.compression == Compression::Zstd, compresses);
        for (here, there) in [("d/o", "e/o"), ("d/clone", "e/clone")] {
            let (here, there) = (name(here), name(there));
            let (here, there) = (from.open_object(&here), to.open_object(&there));
            assert!(bytes_of(&here.unwrap()) == bytes_of(&there.unwrap()));
        }
        let (sent, received) = (from.space().data_bytes, to.space().data_bytes);
        assert_eq!(received <= sent, compresses, "{sent} {received}");
        verify_accounting(&to);
    }
}
