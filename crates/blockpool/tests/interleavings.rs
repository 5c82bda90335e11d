//! Orders in which threads of one pool can meet: writing against cloning, snapshots, flushes, checkpoints and removal. A scheduler
//! stands below every lock and tries thousands of orders, at random and with few preemptions; a failure prints the one that led to it.
//!
//!     cargo test -p blockpool --features shuttle --test interleavings

#![allow(missing_docs, reason = "a test program has no users")]

use std::io;
use std::sync::Arc;

use blockpool::{
    Compression, CrashChoice, DatasetOptions, Disk, Name, Object, POOL_MIN_BYTES, Pool,
    RECORD_BYTES, SimulatedDisk,
};
use shuttle::scheduler::{PctScheduler, RandomScheduler};
use shuttle::sync::Mutex;
use shuttle::{Config, Runner, thread};

const BLOCK: usize = 4096;
/// Two blocks, one in each of two records.
const AT: u64 = RECORD_BYTES - BLOCK as u64;

/// A disk that others overtake at every access, and again and again while it reads.
#[derive(Debug)]
struct Overtaken(SimulatedDisk, Mutex<()>);

/// Others may do so much while a read is on its way.
const READ_STEPS: usize = 200;

impl Overtaken {
    /// The scheduler may go on with another thread. Not `yield_now`, after which it would have to.
    fn let_others_go(&self) {
        drop(self.1.lock());
    }
}

impl Disk for Overtaken {
    fn read_at(&self, buffer: &mut [u8], offset_bytes: u64) -> io::Result<()> {
        (0..READ_STEPS).for_each(|_| self.let_others_go());
        self.0.read_at(buffer, offset_bytes)
    }

    fn write_at(&self, bytes: &[u8], offset_bytes: u64) -> io::Result<()> {
        self.let_others_go();
        self.0.write_at(bytes, offset_bytes)
    }

    fn flush(&self) -> io::Result<()> {
        self.let_others_go();
        self.0.flush()
    }

    fn size_bytes(&self) -> io::Result<u64> {
        self.0.size_bytes()
    }

    fn grow(&self, size_bytes: u64) -> io::Result<()> {
        self.0.grow(size_bytes)
    }

    fn punch(&self, offset_bytes: u64, length_bytes: u64) -> io::Result<()> {
        self.0.punch(offset_bytes, length_bytes)
    }
}

fn name(text: &str) -> Name {
    text.parse().unwrap()
}

/// What both blocks hold; a write that is seen by half fails.
fn value(object: &Object) -> u8 {
    let mut bytes = vec![0; 2 * BLOCK];
    object.read_at(&mut bytes, AT).unwrap();
    let value = bytes[0];
    assert!(bytes.iter().all(|byte| *byte == value), "a torn write");
    value
}

fn write(object: &Object, value: u8) {
    object.write_at(&[value; 2 * BLOCK], AT).unwrap();
}

/// A pool with the object `d/a`, which holds 1.
fn pool() -> (SimulatedDisk, Pool, Object) {
    let disk = SimulatedDisk::new(POOL_MIN_BYTES);
    let overtaken = Arc::new(Overtaken(disk.clone(), Mutex::new(())));
    let pool = Pool::create(overtaken, POOL_MIN_BYTES, [1; 16]).unwrap();
    pool.create_dataset(&name("d")).unwrap();
    let object = pool.create_object(&name("d/a"), 2 * RECORD_BYTES).unwrap();
    write(&object, 1);
    pool.flush().unwrap();
    (disk, pool, object)
}

fn assert_whole(pool: &Pool) {
    assert_eq!(pool.check().unwrap().problems, Vec::<String>::new());
}

/// A clone and a snapshot have one of the values that were written, whole, and keep it; a crash keeps what was flushed.
fn writes_against_clones() {
    write_against_clones(Compression::Off);
}

/// The same where each write makes its records anew.
fn packed_writes_against_clones() {
    write_against_clones(Compression::Lz4);
}

fn write_against_clones(compression: Compression) {
    let (disk, pool, object) = pool();
    let options = DatasetOptions {
        compression,
        ..DatasetOptions::default()
    };
    pool.set_options(&name("d"), options).unwrap();
    disk.start_recording();
    let writer = {
        let object = object.clone();
        thread::spawn(move || {
            write(&object, 2);
            object.flush().unwrap();
            write(&object, 3);
        })
    };
    let cloner = {
        let pool = pool.clone();
        thread::spawn(move || {
            let clone = pool.clone_object(&name("d/a"), &name("d/clone")).unwrap();
            let first = value(&clone);
            (first, clone)
        })
    };
    let keeper = {
        let pool = pool.clone();
        thread::spawn(move || {
            pool.snapshot(&name("d/a@kept")).unwrap();
            pool.checkpoint().unwrap();
            value(&pool.open_object(&name("d/a@kept")).unwrap())
        })
    };
    writer.join().unwrap();
    let (cloned, clone) = cloner.join().unwrap();
    let kept = keeper.join().unwrap();
    assert_eq!(value(&object), 3);
    write(&object, 4);
    assert_eq!(value(&clone), cloned);
    assert_eq!(value(&pool.open_object(&name("d/a@kept")).unwrap()), kept);
    assert!((1..=3).contains(&cloned) && (1..=3).contains(&kept));
    assert_whole(&pool);
    // 2 was flushed, and later writes may have arrived. A block at a time: what was not flushed can be torn.
    let crashed = disk.after_crash(disk.events().len(), |_| CrashChoice::Lose);
    let again = Pool::open(Arc::new(crashed)).unwrap();
    let mut bytes = [0];
    let object = again.open_object(&name("d/a")).unwrap();
    object.read_at(&mut bytes, AT).unwrap();
    assert!((2..=4).contains(&bytes[0]), "{} after a crash", bytes[0]);
    assert_whole(&again);
}

/// What is removed is given out again only when nobody reads it.
fn reads_against_reuse() {
    let (_, pool, object) = pool();
    let doomed = pool.clone_object(&name("d/a"), &name("d/doomed")).unwrap();
    write(&doomed, 7);
    // From here on in place: it needs no room where there may be none.
    write(&object, 4);
    pool.checkpoint().unwrap();
    let reader = thread::spawn(move || {
        let mut bytes = vec![0; 2 * BLOCK];
        match doomed.read_at(&mut bytes, AT) {
            Ok(()) => assert!(bytes.iter().all(|byte| *byte == 7), "another's bytes"),
            Err(error) => assert!(
                matches!(error, blockpool::PoolError::NotFound { .. }),
                "{error}"
            ),
        }
    });
    let remover = {
        let pool = pool.clone();
        thread::spawn(move || {
            pool.destroy(&name("d/doomed"), false).unwrap();
            pool.checkpoint().unwrap();
            pool.checkpoint().unwrap();
            // Some room is kept for metadata: only the second time all records come round.
            for target in [name("d/new"), name("d/newer")] {
                let new = pool.create_object(&target, POOL_MIN_BYTES).unwrap();
                let record = vec![9; RECORD_BYTES as usize];
                let is_full = (0..POOL_MIN_BYTES / RECORD_BYTES)
                    .any(|index| new.write_at(&record, index * RECORD_BYTES).is_err());
                assert!(is_full);
                pool.destroy(&target, false).unwrap();
                pool.checkpoint().unwrap();
                pool.checkpoint().unwrap();
            }
        })
    };
    let flusher = {
        let object = object.clone();
        thread::spawn(move || {
            write(&object, 5);
            object.flush().unwrap();
        })
    };
    reader.join().unwrap();
    remover.join().unwrap();
    flusher.join().unwrap();
    assert_eq!(value(&object), 5);
    assert_whole(&pool);
}

/// Two that clone ranges into each other's objects, beside a writer, end.
fn ranges_both_ways() {
    let (_, pool, a) = pool();
    let b = pool.create_object(&name("d/b"), 2 * RECORD_BYTES).unwrap();
    write(&b, 2);
    let copy = |from: &Object, to: &Object| {
        let (pool, from, to) = (pool.clone(), from.clone(), to.clone());
        thread::spawn(move || {
            pool.clone_range(&from, 0, &to, 0, 2 * RECORD_BYTES)
                .unwrap()
        })
    };
    let (there, back) = (copy(&a, &b), copy(&b, &a));
    let writer = {
        let a = a.clone();
        thread::spawn(move || write(&a, 3))
    };
    there.join().unwrap();
    back.join().unwrap();
    writer.join().unwrap();
    assert!((1..=3).contains(&value(&a)) && (1..=3).contains(&value(&b)));
    assert_whole(&pool);
}

/// Orders that are tried of each, of either kind.
const ORDERS: usize = 400;

fn try_orders(test: fn()) {
    let mut config = Config::new();
    // Metadata is read through blocks on the stack.
    config.stack_size = 1 << 20;
    Runner::new(RandomScheduler::new(ORDERS), config.clone()).run(test);
    Runner::new(PctScheduler::new(3, ORDERS), config).run(test);
}

#[test]
fn a_clone_has_a_write_whole_or_not_at_all() {
    try_orders(writes_against_clones);
}

#[test]
fn a_clone_has_a_compressed_write_whole_or_not_at_all() {
    try_orders(packed_writes_against_clones);
}

#[test]
fn what_is_read_is_not_given_out() {
    try_orders(reads_against_reuse);
}

#[test]
fn ranges_that_cross_end() {
    try_orders(ranges_both_ways);
}
