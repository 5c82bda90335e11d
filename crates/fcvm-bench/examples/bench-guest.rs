//! What the fork benches run inside the guest: it holds memory, writes to it at a rate, and watches its
//! own clocks. It is built statically at bench time (`forks/guest.rs`).
//!
//! `bench-guest hold MIB` fills memory with noise, says `ready` and answers every line with `here`.
//! `bench-guest clock MIB RATE` says `ready`, then writes to RATE megabytes (10^6) of pages a second in a
//! ring of MIB, reading the monotonic clock every millisecond; it answers every line with `gap STEP RATE
//! NOW`: the largest step between two reads since the last answer, in microseconds, the rate reached, and
//! the realtime clock, in microseconds since 1970.

#![forbid(unsafe_code)]

use std::io::{BufRead, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

const PAGE_BYTES: usize = 4096;

/// Between two reads of the clocks.
const STEP: Duration = Duration::from_millis(1);

/// What is owed at most: a guest that stood still does not write everything at once.
const OWED_MAX: Duration = Duration::from_millis(20);

#[derive(Default)]
struct Seen {
    monotonic_us: AtomicU64,
    pages: AtomicU64,
}

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let number = |index: usize| -> u64 {
        arguments
            .get(index)
            .and_then(|text| text.parse().ok())
            .unwrap_or(0)
    };
    let mut memory = filled(usize::try_from(number(1)).unwrap_or(0) << 20);
    say("ready");
    match arguments.first().map(String::as_str) {
        Some("clock") => {
            let seen = Arc::new(Seen::default());
            let answering = Arc::clone(&seen);
            std::thread::spawn(move || answer(&answering));
            watch(&mut memory, number(2), &seen);
        }
        _ => {
            for _ in std::io::stdin().lock().lines() {
                say("here");
            }
            // Held until the last moment.
            drop(memory);
        }
    }
}

fn say(line: &str) {
    let mut output = std::io::stdout().lock();
    // Nobody is there to be told of an error.
    let _ = writeln!(output, "{line}");
    let _ = output.flush();
}

/// Memory that no two pages of are equal, nor zero (xorshift).
fn filled(bytes: usize) -> Vec<u8> {
    let mut memory = vec![0; bytes];
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    for word in memory.chunks_exact_mut(64) {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        word[..8].copy_from_slice(&state.to_le_bytes());
    }
    memory
}

fn answer(seen: &Seen) {
    let mut since = Instant::now();
    for _ in std::io::stdin().lock().lines() {
        let bytes = seen.pages.swap(0, Ordering::Relaxed) * PAGE_BYTES as u64;
        let seconds = since.elapsed().as_secs_f64();
        since = Instant::now();
        let monotonic = seen.monotonic_us.swap(0, Ordering::Relaxed);
        say(&format!(
            "gap {monotonic} {:.1} {}",
            bytes as f64 / 1e6 / seconds,
            realtime_now().as_micros()
        ));
    }
    std::process::exit(0);
}

fn realtime_now() -> Duration {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default()
}

fn watch(memory: &mut [u8], rate: u64, seen: &Seen) {
    let pages_per_second = rate as f64 * 1e6 / PAGE_BYTES as f64;
    let pages = memory.len() / PAGE_BYTES;
    let mut last = Instant::now();
    let (mut owed, mut next) = (0.0_f64, 0_usize);
    loop {
        std::thread::sleep(STEP);
        let now = Instant::now();
        let step = now - last;
        let micros = |time: Duration| u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
        seen.monotonic_us.fetch_max(micros(step), Ordering::Relaxed);
        last = now;
        if pages == 0 {
            continue;
        }
        owed += step.min(OWED_MAX).as_secs_f64() * pages_per_second;
        let due = owed.floor();
        owed -= due;
        for _ in 0..due as usize {
            let byte = &mut memory[next * PAGE_BYTES];
            *byte = byte.wrapping_add(1);
            next = (next + 1) % pages;
        }
        seen.pages.fetch_add(due as u64, Ordering::Relaxed);
    }
}
