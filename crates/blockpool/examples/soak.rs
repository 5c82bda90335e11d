//! Tries random steps, faults and crashes for a while: `make soak-pool MINUTES=30`.
//!
//!     cargo run --release -p blockpool --example soak -- MINUTES [SEED]
//!
//! With a seed, only that round is done: it is what a failure prints.

#[path = "../tests/support/mod.rs"]
mod support;

use std::process::ExitCode;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use support::rounds::{Tried, round};

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
    let end = Instant::now() + Duration::from_secs(60 * minutes);
    let mut tried = Tried::default();
    let clock = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_nanos() as u64);
    let mut seed = only.unwrap_or(clock);
    let mut next_line = Instant::now() + Duration::from_secs(60);
    loop {
        let mut now = tried;
        // The panic has told what is wrong already.
        if std::panic::catch_unwind(move || {
            round(seed, &mut now);
            now
        })
        .map(|now| tried = now)
        .is_err()
        {
            eprintln!("soak: failed with seed {seed} after {tried:?}; again: soak 0 {seed}");
            return ExitCode::FAILURE;
        }
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
