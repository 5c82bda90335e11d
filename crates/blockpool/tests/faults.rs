//! A disk that fails at each read, write and flush of each operation: an error that says so, never a panic, never a loss of
//! what was there, and a pool that goes on or says that it does not.

mod support;

use std::sync::Arc;

use blockpool::{
    Compression, CrashChoice, DatasetOptions, Fault, Name, Pool, PoolError, RECORD_BYTES,
    SimulatedDisk,
};
use support::Numbers;
use support::machine::verify_accounting;

const SIZE_BYTES: u64 = 8 << 20;
/// More reads, writes or flushes no operation does here.
const CALLS_MAX: usize = 2000;

fn name(text: &str) -> Name {
    text.parse().unwrap()
}

fn noise(seed: u64, length: usize) -> Vec<u8> {
    let mut numbers = Numbers(seed);
    (0..length).map(|_| numbers.next() as u8 | 1).collect()
}

/// What no operation touches, and shares blocks with what they do.
const KEPT: [&str; 4] = ["d/keep", "d/keep@s", "d/o@s", "z/keep"];

/// A pool with clones, snapshots and compressed data, some of it in the log alone.
fn prepared() -> SimulatedDisk {
    let disk = SimulatedDisk::new(SIZE_BYTES);
    let pool = Pool::create(Arc::new(disk.clone()), SIZE_BYTES, [4; 16]).unwrap();
    for dataset in ["d", "z"] {
        pool.create_dataset(&name(dataset)).unwrap();
    }
    let compressed = DatasetOptions {
        compression: Compression::Lz4,
        ..DatasetOptions::default()
    };
    pool.set_options(&name("z"), compressed).unwrap();
    let keep = pool.create_object(&name("d/keep"), 300_000).unwrap();
    keep.write_at(&noise(1, 300_000), 0).unwrap();
    let packed = pool.create_object(&name("z/keep"), 300_000).unwrap();
    packed.write_at(&[7; 250_000], 0).unwrap();
    let object = pool.clone_object(&name("d/keep"), &name("d/o")).unwrap();
    object.write_at(&noise(2, 70_000), 60_000).unwrap();
    pool.clone_object(&name("z/keep"), &name("z/o")).unwrap();
    pool.snapshot(&name("d@s")).unwrap();
    pool.create_object(&name("d/other"), 300_000).unwrap();
    pool.checkpoint().unwrap();
    object.write_at(&noise(3, 5000), 130_000).unwrap();
    pool.clone_object(&name("d/o"), &name("d/clone")).unwrap();
    pool.flush().unwrap();
    disk
}

fn contents(pool: &Pool) -> Result<Vec<Vec<u8>>, PoolError> {
    let read = |text: &&str| {
        let object = pool.open_object(&name(text))?;
        let mut bytes = vec![0; object.size_bytes()? as usize];
        object.read_at(&mut bytes, 0)?;
        Ok(bytes)
    };
    KEPT.iter().map(read).collect()
}

type Operation = fn(&Pool, &[u8]) -> Result<(), PoolError>;

fn open(pool: &Pool, text: &str) -> Result<blockpool::Object, PoolError> {
    pool.open_object(&name(text))
}

/// Each of what a pool does; the bytes are a stream.
const OPERATIONS: [(&str, Operation); 26] = [
    ("create a dataset", |pool, _| {
        pool.create_dataset(&name("new")).map(drop)
    }),
    ("create an object", |pool, _| {
        pool.create_object(&name("d/new"), 9 << 20).map(drop)
    }),
    ("write in place", |pool, _| {
        open(pool, "d/clone")?.write_at(&[9; 5000], 131_000)
    }),
    ("write what is shared", |pool, _| {
        open(pool, "d/o")?.write_at(&[9; 100_000], 3000)
    }),
    ("write a hole", |pool, _| {
        open(pool, "d/other")?.write_at(&[9; 100_000], 100)
    }),
    ("write what is compressed", |pool, _| {
        open(pool, "z/o")?.write_at(&[9; 5000], 64_000)
    }),
    ("punch", |pool, _| {
        open(pool, "d/o")?.punch_hole(5000, 200_000)
    }),
    ("truncate", |pool, _| open(pool, "d/o")?.set_size(70_001)),
    ("extend", |pool, _| open(pool, "d/o")?.set_size(30 << 20)),
    ("read", |pool, _| {
        let mut bytes = vec![0; 300_000];
        open(pool, "d/o")?.read_at(&mut bytes, 0)
    }),
    ("find data", |pool, _| {
        open(pool, "d/other")?.next_data(0).map(drop)
    }),
    ("clone", |pool, _| {
        pool.clone_object(&name("d/o"), &name("d/new")).map(drop)
    }),
    ("clone a range", |pool, _| {
        pool.clone_range(
            &open(pool, "d/o")?,
            0,
            &open(pool, "d/other")?,
            RECORD_BYTES,
            2 * RECORD_BYTES,
        )
    }),
    ("copy over", |pool, _| {
        pool.clone_range(&open(pool, "d/o")?, 0, &open(pool, "d/other")?, 0, 300_000)
    }),
    ("clone from what is compressed", |pool, _| {
        pool.clone_range(
            &open(pool, "z/o")?,
            0,
            &open(pool, "d/other")?,
            RECORD_BYTES,
            RECORD_BYTES,
        )
    }),
    ("snapshot", |pool, _| pool.snapshot(&name("d@t")).map(drop)),
    ("roll back", |pool, _| {
        pool.rollback(&name("d/o@s")).map(drop)
    }),
    ("remove", |pool, _| {
        pool.destroy(&name("d/clone"), true).map(drop)
    }),
    ("rename", |pool, _| {
        pool.rename_object(&name("d/clone"), &name("z/new"))
    }),
    ("set options", |pool, _| {
        let options = DatasetOptions {
            checksum: true,
            compression: Compression::Zstd,
        };
        pool.set_options(&name("d"), options)
    }),
    ("checkpoint", |pool, _| pool.checkpoint()),
    ("scrub", |pool, _| pool.scrub(|_| ()).map(drop)),
    ("check", |pool, _| pool.check().map(drop)),
    ("grow", |pool, _| pool.grow(2 * SIZE_BYTES)),
    ("send", |pool, _| {
        pool.send(&name("d@s"), None, None, &mut Vec::new(), |_| ())
            .map(drop)
    }),
    ("receive", |pool, stream| {
        pool.receive(Some(&name("r")), false, &mut &stream[..], |_| ())
            .map(drop)
    }),
];

const FAULTS: [fn(usize) -> Fault; 5] = [
    Fault::Read,
    Fault::Write,
    Fault::ShortWrite,
    Fault::Full,
    Fault::Flush,
];

fn assert_told(what: &str, error: &PoolError) {
    let reason = error.reason();
    let is_told = matches!(
        reason,
        PoolError::Io { .. }
            | PoolError::Full
            | PoolError::Stopped { .. }
            | PoolError::Damaged { .. }
    );
    assert!(is_told, "{what}: {error:?}");
}

/// Opens what a crash leaves now, and looks at all of it.
fn verify_left(disk: &SimulatedDisk, kept: &[Vec<u8>], choice: CrashChoice) {
    let left = disk.after_crash(usize::MAX, |_| choice);
    let pool = Pool::open(Arc::new(left)).unwrap();
    assert!(contents(&pool).unwrap() == kept);
    verify_accounting(&pool);
    pool.checkpoint().unwrap();
}

/// Whether the fault has come.
fn fail(
    operation: Operation,
    what: &str,
    fault: Fault,
    base: &SimulatedDisk,
    kept: &[Vec<u8>],
    stream: &[u8],
) -> bool {
    let disk = base.copy();
    disk.start_recording();
    let pool = Pool::open(Arc::new(disk.clone())).unwrap();
    disk.set_fault(Some(fault));
    let result = operation(&pool, stream)
        .and_then(|()| pool.flush())
        .and_then(|()| pool.checkpoint());
    disk.set_fault(None);
    let has_come = disk.failure_count() > 0;
    if let Err(error) = &result {
        assert!(has_come, "{what}: {error}");
        assert_told(what, error);
    }
    match pool.flush() {
        // It goes on: all is as it was, and more can be done.
        Ok(()) => {
            assert!(contents(&pool).unwrap() == kept, "{what}");
            verify_accounting(&pool);
            open(&pool, "d/other")
                .unwrap()
                .write_at(&[5; 9000], 1000)
                .unwrap();
            pool.checkpoint().unwrap();
        }
        Err(error) => assert!(
            matches!(error, PoolError::Stopped { .. }),
            "{what}: {error}"
        ),
    }
    drop(pool);
    for choice in [CrashChoice::Keep, CrashChoice::Lose] {
        verify_left(&disk, kept, choice);
    }
    has_come
}

#[test]
fn each_operation_survives_a_failure_of_each_call_to_the_disk() {
    let base = prepared();
    let pool = Pool::open(Arc::new(base.copy())).unwrap();
    let kept = contents(&pool).unwrap();
    let mut stream = Vec::new();
    pool.send(&name("d@s"), None, None, &mut stream, |_| ())
        .unwrap();
    let mut count = 0;
    for (what, operation) in OPERATIONS {
        for fault in FAULTS {
            let came = (0..CALLS_MAX).take_while(|after| {
                let fault = fault(*after);
                let what = format!("{what}, {fault:?}");
                fail(operation, &what, fault, &base, &kept, &stream)
            });
            count += came.count();
        }
    }
    println!("{count} failures");
    assert!(count > OPERATIONS.len() * FAULTS.len());
}

#[test]
fn opening_survives_a_failure_of_each_call_to_the_disk() {
    let base = prepared();
    let kept = contents(&Pool::open(Arc::new(base.copy())).unwrap()).unwrap();
    for fault in FAULTS {
        for after in 0..CALLS_MAX {
            let disk = base.copy();
            disk.start_recording();
            disk.set_fault(Some(fault(after)));
            let result = Pool::open(Arc::new(disk.clone()));
            disk.set_fault(None);
            let has_come = disk.failure_count() > 0;
            if let Err(error) = &result {
                assert_told(&format!("open, {:?}", fault(after)), error);
            }
            drop(result);
            verify_left(&disk, &kept, CrashChoice::Keep);
            verify_left(&disk, &kept, CrashChoice::Lose);
            if !has_come {
                break;
            }
        }
    }
}

#[test]
fn a_pool_that_cannot_be_made_is_none() {
    for fault in FAULTS {
        for after in 0..CALLS_MAX {
            let disk = SimulatedDisk::new(SIZE_BYTES);
            disk.set_fault(Some(fault(after)));
            let result = Pool::create(Arc::new(disk.clone()), SIZE_BYTES, [4; 16]);
            if disk.failure_count() == 0 {
                result.unwrap();
                break;
            }
            let what = format!("create, {:?}", fault(after));
            let error = result.err();
            assert_told(
                &what,
                &error.unwrap_or_else(|| panic!("{what}: it is not told")),
            );
        }
    }
}
