//! Tries random steps, faults and crashes for a while: `make soak-pool MINUTES=30`.
//!
//!     cargo run -p blockpool --example soak -- MINUTES [SEED]
//!
//! With a seed, only that round is done: it is what a failure prints.

#[path = "../tests/support/mod.rs"]
mod support;

use std::process::ExitCode;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use support::rounds::{Tried, round};

/// Of the round that is being done.
static SEED: AtomicU64 = AtomicU64::new(0);

fn main() -> ExitCode {
    let arguments: Vec<u64> = std::env::args()
        .skip(1)
        .filter_map(|text| text.parse().ok())
        .collect();
    let (minutes, only) = match arguments[..] {
        [minutes] => (minutes, None),
        [minutes, seed] => (minutes, Some(seed)),
        _ => {
            eprintln!("Usage: soak MINUTES [SEED]");
            return ExitCode::FAILURE;
        }
    };
    // Told by the hook, as a build may abort where another one unwinds.
    let told = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        told(panic);
        let seed = SEED.load(Ordering::SeqCst);
        eprintln!("soak: failed with seed {seed}; again: soak 0 {seed}");
    }));
    let end = Instant::now() + Duration::from_secs(60 * minutes);
    let mut tried = Tried::default();
    let clock = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_nanos() as u64);
    let mut seed = only.unwrap_or(clock);
    let mut next_line = Instant::now() + Duration::from_secs(60);
    loop {
        let mut now = tried;
        SEED.store(seed, Ordering::SeqCst);
        round(seed, &mut now);
        tried = now;
        if only.is_some() || Instant::now() >= end {
            break;
        }
        if Instant::now() >= next_line {
            println!("soak: {tried:?}");
            next_line += Duration::from_secs(60);
        }
        seed = seed.wrapping_add(1);
    }
    println!("soak: passed {tried:?}");
    ExitCode::SUCCESS
}
