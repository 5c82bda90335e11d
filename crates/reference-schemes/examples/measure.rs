//! Measures the three schemes side by side: `make bench-references`.
//!
//!     cargo run --release -p reference-schemes --example measure -- [BLOCKS]
//!
//! Nanoseconds for each block, least of three rounds in which the schemes take turns, and pages of the table that a checkpoint
//! writes for each thousand blocks. *Sequential*: neighbouring blocks in their order. *Random*: one block of 64, in no
//! order. Blocks are flat here, one reference each: what the pool does for a whole file at once is not in it.

use std::time::Instant;

use reference_schemes::Scheme;
use reference_schemes::brt::Brt;
use reference_schemes::dedup::Dedup;
use reference_schemes::in_pointer::{InPointer, Told};
use reference_schemes::scheme::{BLOCK_BYTES, Placed, Pointer};

const ROUNDS: usize = 3;

/// What is measured of one scheme in one round, for each block.
#[derive(Clone, Copy, Default)]
struct Costs {
    clone_ns: f64,
    first_write_ns: f64,
    second_write_ns: f64,
    free_ns: f64,
    pages_per_thousand: f64,
    memory_bytes: f64,
    disk_bytes: f64,
}

/// Blocks in the order in which they are used.
struct Blocks {
    addresses: Vec<u64>,
    order: Vec<usize>,
}

impl Blocks {
    fn new(count: usize, is_random: bool) -> Self {
        let step = if is_random { 64 } else { 1 };
        let mut order: Vec<usize> = (0..count).collect();
        let mut number: u64 = 0x2545_f491_4f6c_dd1d;
        for index in (1..count).rev().filter(|_| is_random) {
            number ^= number << 13;
            number ^= number >> 7;
            number ^= number << 17;
            order.swap(index, (number % (index as u64 + 1)) as usize);
        }
        let addresses = (0..count as u64).map(|block| block * step).collect();
        Self { addresses, order }
    }
}

/// Different content for each number.
fn content(buffer: &mut [u8], number: u64) -> &[u8] {
    buffer[..8].copy_from_slice(&number.to_le_bytes());
    buffer
}

fn pointer<P>(placed: Placed<P>) -> P {
    match placed {
        Placed::New(pointer) | Placed::Known(pointer) => pointer,
    }
}

fn measure<S: Scheme>(mut scheme: S, blocks: &Blocks, reference_count: usize) -> Costs {
    let count = blocks.order.len();
    let mut buffer = vec![0x5a; BLOCK_BYTES];
    let mut map: Vec<S::Pointer> = Vec::with_capacity(count);
    for (number, address) in blocks.addresses.iter().enumerate() {
        let content = content(&mut buffer, number as u64);
        map.push(pointer(scheme.place(content, &mut || *address)));
    }
    for _ in 1..reference_count {
        for pointer in &mut map {
            scheme.share(pointer);
        }
    }
    scheme.take_dirty_pages();
    let mut costs = Costs::default();
    let mut clone = map.clone();
    let per_block = |begin: Instant| begin.elapsed().as_nanos() as f64 / count as f64;
    let begin = Instant::now();
    for at in &blocks.order {
        clone[*at] = scheme.share(&mut map[*at]);
    }
    costs.clone_ns = per_block(begin);
    costs.pages_per_thousand = scheme.take_dirty_pages() as f64 * 1e3 / count as f64;
    costs.memory_bytes = scheme.memory_bytes() as f64 / count as f64;
    costs.disk_bytes = scheme.disk_bytes() as f64 / count as f64;
    // New blocks are where no old one is.
    let mut next = count as u64 * 64;
    for round in 1..=2 {
        let begin = Instant::now();
        for (number, at) in blocks.order.iter().enumerate() {
            if round == 2 && scheme.writes_in_place() {
                // Nothing is asked.
                continue;
            }
            let content = content(&mut buffer, (round * count + number) as u64);
            let new = pointer(scheme.place(content, &mut || {
                next += 1;
                next
            }));
            scheme.drop_one(&clone[*at], Vec::new());
            clone[*at] = new;
        }
        let spent_ns = per_block(begin);
        match round {
            1 => costs.first_write_ns = spent_ns,
            _ => costs.second_write_ns = spent_ns,
        }
    }
    let mut freed = Vec::with_capacity(count);
    let begin = Instant::now();
    for at in &blocks.order {
        if scheme.drop_one(&map[*at], Vec::new()) {
            freed.push(map[*at].address());
        }
    }
    costs.free_ns = per_block(begin);
    costs
}

/// What else the machine does only ever adds.
fn least(rounds: &[Costs], of: impl Fn(&Costs) -> f64) -> f64 {
    rounds.iter().map(of).fold(f64::INFINITY, f64::min)
}

fn show_row(order: &str, reference_count: usize, name: &str, pointer_bytes: u64, rounds: &[Costs]) {
    // What pointers have for the scheme, one for each reference; the clone's is among them.
    let in_maps = (pointer_bytes - Brt::POINTER_BYTES) as f64 * (reference_count + 1) as f64;
    println!(
        "{order:<11}{reference_count:>5}  {name:<18}{:>8.1}{:>13.1}{:>14.1}{:>8.1}{:>13.2}{:>9.1}{:>9.1}",
        least(rounds, |costs| costs.clone_ns),
        least(rounds, |costs| costs.first_write_ns),
        least(rounds, |costs| costs.second_write_ns),
        least(rounds, |costs| costs.free_ns),
        least(rounds, |costs| costs.pages_per_thousand),
        least(rounds, |costs| costs.memory_bytes),
        least(rounds, |costs| costs.disk_bytes) + in_maps,
    );
}

fn main() {
    let count = std::env::args().nth(1).and_then(|text| text.parse().ok());
    let count = count.unwrap_or(1 << 18);
    println!("{count} blocks of 4 KiB; ns for each block; bytes for each shared block\n");
    println!(
        "{:<11}{:>5}  {:<18}{:>8}{:>13}{:>14}{:>8}{:>13}{:>9}{:>9}",
        "ORDER",
        "REFS",
        "SCHEME",
        "CLONE",
        "FIRST WRITE",
        "SECOND WRITE",
        "FREE",
        "PAGES/1000",
        "MEMORY",
        "DISK"
    );
    for (order, is_random) in [("sequential", false), ("random", true)] {
        let blocks = Blocks::new(count, is_random);
        for reference_count in [1, 2, 100] {
            let mut rounds: [Vec<Costs>; 3] = Default::default();
            for _ in 0..ROUNDS {
                let told = Told::Both;
                rounds[0].push(measure(Brt::default(), &blocks, reference_count));
                rounds[1].push(measure(Dedup::default(), &blocks, reference_count));
                rounds[2].push(measure(InPointer { told }, &blocks, reference_count));
            }
            let schemes = [
                ("reference table", Brt::POINTER_BYTES),
                ("dedup table", Dedup::POINTER_BYTES),
                ("count in pointer", InPointer::POINTER_BYTES),
            ];
            for ((name, pointer_bytes), rounds) in schemes.iter().zip(&rounds) {
                show_row(order, reference_count, name, *pointer_bytes, rounds);
            }
        }
    }
}
