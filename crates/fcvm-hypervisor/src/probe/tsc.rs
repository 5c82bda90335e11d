//! The frequency of the time stamp counter.
//!
//! It is measured against CLOCK_MONOTONIC_RAW, which the host's kernel derives from the counter by
//! the frequency it has calibrated itself. The processor's own word for it (CPUID 15h, 16h and the
//! hypervisors' 40000010h) is missing on half of the hosts and rounded on many others.

/// Frequency in kHz, measured in 10 ms; `None` where the counter does not count evenly, or on an
/// architecture without one.
#[cfg(not(target_arch = "x86_64"))]
pub fn measure_tsc_khz() -> Option<u32> {
    None
}

/// Frequency in kHz, measured in 10 ms; `None` where the counter does not count evenly, or on an
/// architecture without one.
#[cfg(target_arch = "x86_64")]
pub fn measure_tsc_khz() -> Option<u32> {
    use std::time::Duration;

    const WINDOW: Duration = Duration::from_millis(10);
    if !x86::counts_evenly() {
        return None;
    }
    let start = x86::sample();
    std::thread::sleep(WINDOW);
    let end = x86::sample();
    let cycles = end.cycles.checked_sub(start.cycles)?;
    let elapsed_ns = end.time_ns.checked_sub(start.time_ns)?;
    let khz = u128::from(cycles) * 1_000_000 / u128::from(elapsed_ns.max(1));
    u32::try_from(khz).ok().filter(|&khz| khz > 0)
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::{__cpuid, _rdtsc};

    use rustix::time::{ClockId, clock_gettime};

    /// The counter and the clock at one moment.
    pub(super) struct Sample {
        pub(super) cycles: u64,
        pub(super) time_ns: u64,
    }

    /// Of several readings the one whose clock was read in the fewest cycles: no interruption came
    /// between the two.
    pub(super) fn sample() -> Sample {
        const READINGS: usize = 16;
        let mut best: Option<(u64, Sample)> = None;
        for _ in 0..READINGS {
            let before = cycles();
            let now = clock_gettime(ClockId::MonotonicRaw);
            let taken = cycles().wrapping_sub(before);
            if best.as_ref().is_none_or(|(least, _)| taken < *least) {
                let time_ns = now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64;
                let cycles = before + taken / 2;
                best = Some((taken, Sample { cycles, time_ns }));
            }
        }
        best.map(|(_, sample)| sample).unwrap_or(Sample {
            cycles: 0,
            time_ns: 0,
        })
    }

    fn cycles() -> u64 {
        // SAFETY: every x86-64 processor has the instruction; Linux leaves it to user programs
        // unless a process asked to be killed for it (PR_SET_TSC), which nothing here does.
        unsafe { _rdtsc() }
    }

    /// Invariant TSC, CPUID 80000007h EDX bit 8.
    pub(super) fn counts_evenly() -> bool {
        const POWER_LEAF: u32 = 0x8000_0007;
        __cpuid(0x8000_0000).eax >= POWER_LEAF && __cpuid(POWER_LEAF).edx & (1 << 8) != 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_measurements_agree() {
        let Some(first) = measure_tsc_khz() else {
            println!("skipped: no time stamp counter that counts evenly");
            return;
        };
        let second = measure_tsc_khz().unwrap();
        assert!(first.abs_diff(second) < first / 1000, "{first} {second}");
        assert!((200_000..20_000_000).contains(&first), "{first}");
    }
}
