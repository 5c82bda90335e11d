//! Streams that somebody made on purpose: bytes as they come, and wrong values in frames under right checksums.

#![no_main]

#[path = "../../crates/blockpool/tests/support/restream.rs"]
mod restream;

use std::sync::{Arc, LazyLock};

use blockpool::{Name, Pool, SimulatedDisk};
use libfuzzer_sys::fuzz_target;

fn name(text: &str) -> Name {
    text.parse().expect("a good name")
}

fn pool(id: u8) -> (SimulatedDisk, Pool) {
    let disk = SimulatedDisk::new(8 << 20);
    let pool = Pool::create(Arc::new(disk.clone()), 8 << 20, [id; 16]).expect("an empty pool");
    (disk, pool)
}

/// A pool that has the first of two snapshots, a stream with both objects, and one with what changed then.
static STREAMS: LazyLock<(SimulatedDisk, [Vec<u8>; 2])> = LazyLock::new(|| {
    let (_, from) = pool(1);
    from.create_dataset(&name("d")).expect("a dataset");
    let a = from.create_object(&name("d/a"), 600_000).expect("an object");
    a.write_at(&[5; 9000], 100_000).expect("a write");
    let b = from.clone_object(&name("d/a"), &name("d/b")).expect("a clone");
    b.write_at(&[6; 5000], 300_000).expect("a write");
    from.clone_range(&a, 65_536, &b, 393_216, 65_536).expect("a cloned range");
    from.snapshot(&name("d@1")).expect("a snapshot");
    b.punch_hole(100_000, 5000).expect("a hole");
    a.write_at(&[7; 5000], 500_000).expect("a write");
    from.snapshot(&name("d@2")).expect("a snapshot");
    let mut streams = [Vec::new(), Vec::new()];
    from.send(&name("d@1"), None, None, &mut streams[0], |_| ()).expect("a stream");
    from.send(&name("d@2"), Some("1"), None, &mut streams[1], |_| ()).expect("a stream");
    let (disk, to) = pool(2);
    to.receive(None, false, &mut &streams[0][..], |_| ()).expect("the first stream");
    to.checkpoint().expect("a checkpoint");
    (disk, streams)
});

fuzz_target!(|input: &[u8]| {
    let (disk, streams) = &*STREAMS;
    let Some((first, rest)) = input.split_first() else {
        return;
    };
    let stream = match first % 4 {
        0 => rest.to_vec(),
        which => {
            let (id, mut frames) = restream::split(&streams[usize::from(which % 2)]);
            for how in rest.chunks_exact(12).take(16) {
                restream::change(&mut frames, how);
            }
            restream::join(id, &frames)
        }
    };
    let pool = Pool::open(Arc::new(disk.copy())).expect("a good pool");
    let target = (first % 8 > 3).then(|| name("e"));
    let _ = pool.receive(target.as_ref(), first % 16 > 7, &mut &stream[..], |_| ());
    let report = pool.check().expect("the pool runs");
    assert!(report.problems.is_empty(), "{:?}", report.problems);
    for partial in pool.partial_receives().expect("a list") {
        pool.destroy(&name(&partial.dataset), true).expect("what is left can be removed");
    }
});
