//! Measures the pool beside a plain file in the same directory, in turns: `make bench-pool`.
//!
//!     cargo run --release -p blockpool --example bench -- DIRECTORY [ROUNDS]
//!
//! Median of the rounds. What each figure means is in docs/design/block-cloning.md.

#[path = "../tests/support/mod.rs"]
mod support;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Instant;

use blockpool::{Compression, DatasetOptions, FileDisk, Name, Object, Pool, PoolError};
use support::Numbers;

const OBJECT_BYTES: u64 = 1 << 30;
const POOL_BYTES: u64 = 8 << 30;
const REWRITES: u64 = 65_536;
const FLUSHES: u64 = 200;
const BLOCK: u64 = 4096;
/// What is written to see how it is compressed.
const PACKED_MIB: u64 = 64;

/// Figures by name, one of each round.
#[derive(Default)]
struct Figures(Vec<(&'static str, Vec<f64>)>);

impl Figures {
    fn add(&mut self, name: &'static str, value: f64) {
        match self.0.iter_mut().find(|(known, _)| *known == name) {
            Some((_, values)) => values.push(value),
            None => self.0.push((name, vec![value])),
        }
    }
}

fn seconds<T>(work: impl FnOnce() -> T) -> (f64, T) {
    let start = Instant::now();
    let result = work();
    (start.elapsed().as_secs_f64(), result)
}

fn name(text: &str) -> Name {
    text.parse().expect("a good name")
}

/// Different blocks of an object in a random order.
fn offsets(seed: u64) -> Vec<u64> {
    let mut offsets: Vec<u64> = (0..OBJECT_BYTES / BLOCK)
        .map(|block| block * BLOCK)
        .collect();
    let mut numbers = Numbers(seed);
    for index in (1..offsets.len()).rev() {
        offsets.swap(index, numbers.below(index as u64 + 1) as usize);
    }
    offsets.truncate(REWRITES as usize);
    offsets
}

fn fill(object: &Object) -> Result<(), PoolError> {
    let bytes = vec![0x5a; 1 << 20];
    (0..OBJECT_BYTES >> 20).try_for_each(|mebibyte| object.write_at(&bytes, mebibyte << 20))
}

fn rewrite(object: &Object, offsets: &[u64]) -> Result<(), PoolError> {
    offsets
        .iter()
        .try_for_each(|offset| object.write_at(&[0xa5; BLOCK as usize], *offset))
}

fn measure_clones(
    pool: &Pool,
    raw: &File,
    round: u64,
    figures: &mut Figures,
) -> Result<(), PoolError> {
    let offsets = offsets(round);
    let (contiguous_s, clone) = seconds(|| pool.clone_object(&name("d/base"), &name("d/clone")));
    let clone = clone?;
    let (flush_s, flushed) = seconds(|| pool.flush());
    flushed?;
    figures.add("clone of 1 GiB, contiguous: ms", contiguous_s * 1e3);
    figures.add("its flush: ms", flush_s * 1e3);
    let per_second = |seconds: f64| REWRITES as f64 / seconds / 1e3;
    let (first_s, written) = seconds(|| rewrite(&clone, &offsets));
    written?;
    let (second_s, written) = seconds(|| rewrite(&clone, &offsets));
    written?;
    let (raw_s, written) = seconds(|| {
        offsets
            .iter()
            .try_for_each(|offset| raw.write_all_at(&[0xa5; BLOCK as usize], *offset))
    });
    written.expect("a plain file can be written");
    figures.add(
        "first write after a clone, 4 KiB random: thousands a second",
        per_second(first_s),
    );
    figures.add("second write: thousands a second", per_second(second_s));
    figures.add("plain file: thousands a second", per_second(raw_s));
    let (fragmented_s, again) = seconds(|| pool.clone_object(&name("d/clone"), &name("d/again")));
    figures.add(
        "clone of 1 GiB after 65,536 rewrites: ms",
        fragmented_s * 1e3,
    );
    rewrite(&again?, &offsets[..1000])?;
    pool.destroy(&name("d/again"), false)?;
    let copy = pool.create_object(&name("d/again"), OBJECT_BYTES)?;
    let (copy_s, copied) = seconds(|| pool.clone_range(&clone, 0, &copy, 0, OBJECT_BYTES));
    copied?;
    figures.add(
        "copy of it over an object of that size (cp): ms",
        copy_s * 1e3,
    );
    pool.destroy(&name("d/again"), false)?;
    pool.checkpoint()?;
    let referenced = pool.object_space(&[clone.id()])?[0].referenced_bytes;
    let (destroy_s, destroyed) = seconds(|| pool.destroy(&name("d/clone"), false));
    destroyed?;
    figures.add(
        "removal of a diverged clone: thousand 4 KiB blocks a second",
        referenced as f64 / 4096.0 / destroy_s / 1e3,
    );
    pool.checkpoint()
}

fn measure_flushes(
    pool: &Pool,
    raw: &File,
    round: u64,
    figures: &mut Figures,
) -> Result<(), PoolError> {
    let offsets = &offsets(round + 1000)[..FLUSHES as usize];
    let fresh = pool.clone_object(&name("d/base"), &name("d/fresh"))?;
    let per_second = |seconds: f64| FLUSHES as f64 / seconds;
    let flush_each = |object: &Object| -> Result<(), PoolError> {
        for offset in offsets {
            object.write_at(&[1; BLOCK as usize], *offset)?;
            object.flush()?;
        }
        Ok(())
    };
    let (first_s, done) = seconds(|| flush_each(&fresh));
    done?;
    let (second_s, done) = seconds(|| flush_each(&fresh));
    done?;
    raw.sync_all().expect("a plain file can be flushed");
    let flush_raw = || {
        offsets.iter().try_for_each(|offset| {
            raw.write_all_at(&[1; BLOCK as usize], *offset)?;
            raw.sync_data()
        })
    };
    let (raw_s, done) = seconds(flush_raw);
    done.expect("a plain file can be flushed");
    figures.add("first write and flush: a second", per_second(first_s));
    figures.add("second write and flush: a second", per_second(second_s));
    let (again_s, done) = seconds(flush_raw);
    done.expect("a plain file can be flushed");
    figures.add(
        "plain file, second write and flush: a second",
        per_second(again_s),
    );
    figures.add("plain file, write and flush: a second", per_second(raw_s));
    pool.destroy(&name("d/fresh"), false)?;
    pool.checkpoint()
}

/// Lines of 64 bytes, of which a quarter is noise.
fn lines(seed: u64) -> Vec<u8> {
    let mut numbers = Numbers(seed);
    let mut bytes: Vec<u8> = (0..1 << 20).map(|_| numbers.next() as u8).collect();
    for line in bytes.chunks_mut(64) {
        line[16..].fill(b'a');
    }
    bytes
}

/// Names of the figures of one method: written, rewritten, read, ratio.
const PACKED: [(Compression, [&str; 4]); 3] = [
    (
        Compression::Off,
        [
            "not compressed, written: MiB a second",
            "not compressed, 4 KiB rewritten at random: thousands a second",
            "not compressed, read: MiB a second",
            "not compressed, bytes held by each of space",
        ],
    ),
    (
        Compression::Lz4,
        [
            "lz4, written: MiB a second",
            "lz4, 4 KiB rewritten at random: thousands a second",
            "lz4, read: MiB a second",
            "lz4, bytes held by each of space",
        ],
    ),
    (
        Compression::Zstd,
        [
            "zstd, written: MiB a second",
            "zstd, 4 KiB rewritten at random: thousands a second",
            "zstd, read: MiB a second",
            "zstd, bytes held by each of space",
        ],
    ),
];

fn measure_compression(pool: &Pool, figures: &mut Figures) -> Result<(), PoolError> {
    let contents: Vec<Vec<u8>> = (0..8).map(lines).collect();
    let content = |mebibyte: u64| &contents[mebibyte as usize % contents.len()];
    let mut numbers = Numbers(9);
    for (compression, [written, rewritten, read, ratio]) in PACKED {
        let options = DatasetOptions {
            compression,
            ..DatasetOptions::default()
        };
        pool.set_options(&name("d"), options)?;
        let object = pool.create_object(&name("d/packed"), PACKED_MIB << 20)?;
        let (write_s, done) =
            seconds(|| (0..PACKED_MIB).try_for_each(|at| object.write_at(content(at), at << 20)));
        done?;
        figures.add(written, PACKED_MIB as f64 / write_s);
        let held = pool.object_space(&[object.id()])?[0].ratio();
        figures.add(ratio, held.unwrap_or_default());
        let mut buffer = vec![0; 1 << 20];
        let (read_s, done) =
            seconds(|| (0..PACKED_MIB).try_for_each(|at| object.read_at(&mut buffer, at << 20)));
        done?;
        figures.add(read, PACKED_MIB as f64 / read_s);
        let (rewrite_s, done) = seconds(|| {
            (0..4000).try_for_each(|_| {
                let block = numbers.below((PACKED_MIB << 20) / BLOCK);
                object.write_at(&content(block)[..BLOCK as usize], block * BLOCK)
            })
        });
        done?;
        figures.add(rewritten, 4.0 / rewrite_s);
        pool.destroy(&name("d/packed"), false)?;
        pool.set_options(&name("d"), DatasetOptions::default())?;
        pool.checkpoint()?;
    }
    Ok(())
}

fn measure_open(path: &Path, figures: &mut Figures) -> Result<(), PoolError> {
    let pool = Pool::open(Arc::new(FileDisk::open(path)?))?;
    let clone = pool.clone_object(&name("d/base"), &name("d/open"))?;
    rewrite(&clone, &offsets(77)[..10_000])?;
    pool.flush()?;
    // Without a checkpoint: what a crash leaves.
    drop((pool, clone));
    let (open_s, pool) =
        seconds(|| FileDisk::open(path).and_then(|disk| Pool::open(Arc::new(disk))));
    figures.add(
        "opening with 10,000 operations in the log: ms",
        open_s * 1e3,
    );
    let pool = pool?;
    pool.destroy(&name("d/open"), false)?;
    pool.checkpoint()
}

fn run(directory: &Path, rounds: u64) -> Result<Figures, PoolError> {
    let path = directory.join("bench.pool");
    let raw_path = directory.join("bench.raw");
    let mut figures = Figures::default();
    let pool = Pool::create(
        Arc::new(FileDisk::create(&path, POOL_BYTES)?),
        POOL_BYTES,
        [1; 16],
    )?;
    pool.create_dataset(&name("d"))?;
    fill(&pool.create_object(&name("d/base"), OBJECT_BYTES)?)?;
    pool.checkpoint()?;
    let raw = File::options()
        .create(true)
        .truncate(true)
        .read(true)
        .write(true)
        .open(&raw_path)
        .expect("a plain file");
    for mebibyte in 0..OBJECT_BYTES >> 20 {
        raw.write_all_at(&vec![0x5a; 1 << 20], mebibyte << 20)
            .expect("a plain file can be written");
    }
    // What waits to be written must not be paid for by what is measured.
    raw.sync_all().expect("a plain file can be flushed");
    for round in 0..rounds {
        measure_clones(&pool, &raw, round, &mut figures)?;
        measure_flushes(&pool, &raw, round, &mut figures)?;
        measure_compression(&pool, &mut figures)?;
    }
    drop(pool);
    for _ in 0..rounds {
        measure_open(&path, &mut figures)?;
    }
    // The directory is the caller's; what was put there is not left.
    let _ = std::fs::remove_file(&path);
    let _ = std::fs::remove_file(&raw_path);
    Ok(figures)
}

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let Some(directory) = arguments.first() else {
        eprintln!("Usage: bench DIRECTORY [ROUNDS]");
        return ExitCode::FAILURE;
    };
    let rounds = arguments
        .get(1)
        .and_then(|text| text.parse().ok())
        .unwrap_or(5);
    match run(Path::new(directory), rounds) {
        Ok(figures) => {
            for (name, mut values) in figures.0 {
                values.sort_by(f64::total_cmp);
                let (least, most) = (values[0], values[values.len() - 1]);
                println!(
                    "{name:<66} {:>10.3}   ({least:.3} to {most:.3})",
                    values[values.len() / 2]
                );
            }
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("bench: {error}");
            ExitCode::FAILURE
        }
    }
}
