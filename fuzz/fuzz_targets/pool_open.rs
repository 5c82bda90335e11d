//! Pools that somebody made on purpose: wrong values in superblocks, pages and log under right checksums.

#![no_main]

#[path = "../../crates/blockpool/tests/support/hostile.rs"]
mod hostile;

use std::sync::{Arc, LazyLock};

use blockpool::{Compression, DatasetOptions, Pool, SimulatedDisk};
use libfuzzer_sys::fuzz_target;

/// A pool with objects, a snapshot, a clone, compressed records and a log.
static POOL: LazyLock<(SimulatedDisk, Vec<u64>)> = LazyLock::new(|| {
    let disk = SimulatedDisk::new(8 << 20);
    let pool = Pool::create(Arc::new(disk.clone()), 8 << 20, [1; 16]).expect("an empty pool");
    let name = |text: &str| text.parse().expect("a good name");
    pool.create_dataset(&name("d")).expect("a dataset");
    let object = pool.create_object(&name("d/a"), 9 << 20).expect("an object");
    for offset in [0, 70_000, 200_000, 8_400_000] {
        object.write_at(&[5; 9000], offset).expect("a write");
    }
    pool.create_dataset(&name("z")).expect("a dataset");
    let options = |compression| DatasetOptions { compression, ..DatasetOptions::default() };
    pool.set_options(&name("z"), options(Compression::Lz4)).expect("options");
    let packed = pool.create_object(&name("z/a"), 1 << 20).expect("an object");
    packed.write_at(&[8; 150_000], 3000).expect("a write");
    pool.snapshot(&name("d/a@s")).expect("a snapshot");
    object.write_at(&[6; 5000], 1000).expect("a write");
    pool.clone_range(&object, 0, &object, 4 << 20, 1 << 18).expect("a cloned range");
    pool.checkpoint().expect("a checkpoint");
    pool.clone_object(&name("d/a"), &name("d/b")).expect("a clone");
    object.write_at(&[7; 5000], 300_000).expect("a write");
    pool.set_options(&name("z"), options(Compression::Zstd)).expect("options");
    packed.write_at(&[9; 70_000], 100_000).expect("a write");
    pool.clone_range(&packed, 0, &object, 1 << 20, 1 << 17).expect("a cloned range");
    object.write_at(&[1; 5000], 1 << 20).expect("a write");
    let copy = pool.create_object(&name("d/c"), 9 << 20).expect("an object");
    pool.clone_range(&object, 0, &copy, 0, 9 << 20).expect("a copy");
    object.punch_hole(0, 4096).expect("a hole");
    pool.flush().expect("a flush");
    let targets = hostile::targets(&disk);
    (disk, targets)
});

fuzz_target!(|input: &[u8]| {
    let (disk, targets) = &*POOL;
    let disk = disk.copy();
    for change in input.chunks_exact(12).take(16) {
        let number = |at: usize| usize::from(u16::from_le_bytes([change[at], change[at + 1]]));
        let length = 1 + usize::from(change[4] % 7);
        hostile::patch(&disk, targets[number(0) % targets.len()], 8 + number(2), &change[5..5 + length]);
    }
    hostile::use_pool(&disk);
});
