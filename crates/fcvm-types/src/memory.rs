//! What the memory server counts for each clone.

use serde::{Deserialize, Serialize};

/// Buckets for each power of two.
const STEPS: u64 = 4;
/// Power of two below which everything is in the first bucket, in nanoseconds: 256.
const FIRST_POWER: u32 = 8;
/// Power of two from which on everything is in the last bucket, in nanoseconds: 17 s.
const LAST_POWER: u32 = 34;
const BUCKETS: usize = (LAST_POWER - FIRST_POWER) as usize * STEPS as usize + 2;

/// Durations by size: four buckets for each power of two, so that a quantile is at most a quarter too
/// large.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LatencyHistogram {
    counts: [u64; BUCKETS],
    max_ns: u64,
}

impl Default for LatencyHistogram {
    fn default() -> Self {
        Self {
            counts: [0; BUCKETS],
            max_ns: 0,
        }
    }
}

/// How a histogram is written: what users ask for, and the buckets that are not empty.
#[derive(Serialize, Deserialize)]
struct Written {
    p50_ns: u64,
    p99_ns: u64,
    max_ns: u64,
    /// Upper end in nanoseconds, and how many.
    buckets: Vec<(u64, u64)>,
}

impl LatencyHistogram {
    /// Counts a duration.
    pub fn record(&mut self, nanoseconds: u64) {
        self.counts[bucket(nanoseconds)] += 1;
        self.max_ns = self.max_ns.max(nanoseconds);
    }

    /// How many were counted.
    pub fn count(&self) -> u64 {
        self.counts
            .iter()
            .fold(0, |sum, count| sum.saturating_add(*count))
    }

    /// The longest, in nanoseconds.
    pub fn max_ns(&self) -> u64 {
        self.max_ns
    }

    /// The duration that a share of all (0 to 1) does not exceed, in nanoseconds: the end of its
    /// bucket. 0 where nothing was counted.
    pub fn quantile_ns(&self, share: f64) -> u64 {
        let wanted = (self.count() as f64 * share).ceil().max(1.0) as u64;
        let mut seen: u64 = 0;
        for (index, count) in self.counts.iter().enumerate() {
            seen = seen.saturating_add(*count);
            if seen >= wanted {
                return upper_ns(index).min(self.max_ns);
            }
        }
        0
    }

    /// Adds what another one counted.
    pub fn merge(&mut self, other: &Self) {
        for (own, count) in self.counts.iter_mut().zip(&other.counts) {
            *own = own.saturating_add(*count);
        }
        self.max_ns = self.max_ns.max(other.max_ns);
    }
}

fn bucket(nanoseconds: u64) -> usize {
    let power = nanoseconds.max(1).ilog2();
    if power < FIRST_POWER {
        return 0;
    }
    if power >= LAST_POWER {
        return BUCKETS - 1;
    }
    let step = (nanoseconds >> (power - STEPS.ilog2())) & (STEPS - 1);
    (u64::from(power - FIRST_POWER) * STEPS + step) as usize + 1
}

/// The largest number of a bucket.
fn upper_ns(index: usize) -> u64 {
    match index {
        0 => (1 << FIRST_POWER) - 1,
        _ if index >= BUCKETS - 1 => u64::MAX,
        _ => {
            let index = index as u64 - 1;
            let power = FIRST_POWER + (index / STEPS) as u32;
            let width = 1_u64 << (power - STEPS.ilog2());
            (1 << power) + (index % STEPS + 1) * width - 1
        }
    }
}

impl Serialize for LatencyHistogram {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let filled = self
            .counts
            .iter()
            .enumerate()
            .filter(|(_, count)| **count > 0);
        Written {
            p50_ns: self.quantile_ns(0.5),
            p99_ns: self.quantile_ns(0.99),
            max_ns: self.max_ns,
            buckets: filled
                .map(|(index, count)| (upper_ns(index), *count))
                .collect(),
        }
        .serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for LatencyHistogram {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let written = Written::deserialize(deserializer)?;
        let mut own = Self::default();
        for (upper, count) in written.buckets {
            let count_of = &mut own.counts[bucket(upper)];
            *count_of = count_of.saturating_add(count);
        }
        own.max_ns = written.max_ns;
        Ok(own)
    }
}

/// What the memory server has done for one clone, or for several together.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PageServiceStatistics {
    /// Faults that were answered.
    pub faults: u64,
    /// Those of them whose page was zero, in the snapshot or since it was given back.
    pub zero_faults: u64,
    /// Those of them whose page had come meanwhile, by another processor's fault or the prefetch.
    pub repeated_faults: u64,
    /// Bytes that were copied to answer faults.
    pub fault_bytes: u64,
    /// Pages (of 4096 bytes) that were brought ahead of a fault.
    pub prefetched_pages: u64,
    /// Pages that were to be brought ahead, and whose fault was faster.
    pub prefetch_late_pages: u64,
    /// How long bringing them took, in microseconds.
    pub prefetch_us: u64,
    /// Pages that the clone has given back, by a balloon for instance.
    pub removed_pages: u64,
    /// Times that a page had to wait until such a notice was read.
    pub retries: u64,
    /// From reading of a fault to its answer.
    pub latency: LatencyHistogram,
}

impl PageServiceStatistics {
    /// Adds those of another clone.
    pub fn merge(&mut self, other: &Self) {
        self.faults += other.faults;
        self.zero_faults += other.zero_faults;
        self.repeated_faults += other.repeated_faults;
        self.fault_bytes += other.fault_bytes;
        self.prefetched_pages += other.prefetched_pages;
        self.prefetch_late_pages += other.prefetch_late_pages;
        self.prefetch_us += other.prefetch_us;
        self.removed_pages += other.removed_pages;
        self.retries += other.retries;
        self.latency.merge(&other.latency);
    }
}

impl std::fmt::Display for PageServiceStatistics {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            formatter,
            "{} faults ({} zero, {} repeated), {} bytes, p50 {} ns, p99 {} ns; {} pages prefetched in \
             {} us, {} late; {} pages given back",
            self.faults,
            self.zero_faults,
            self.repeated_faults,
            self.fault_bytes,
            self.latency.quantile_ns(0.5),
            self.latency.quantile_ns(0.99),
            self.prefetched_pages,
            self.prefetch_us,
            self.prefetch_late_pages,
            self.removed_pages,
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_duration_is_in_the_bucket_that_ends_next_above_it() {
        for power in 0..64 {
            for near in [-1_i128, 0, 1] {
                let Ok(number) = u64::try_from((1_i128 << power) + near) else {
                    continue;
                };
                let index = bucket(number);
                assert!(number <= upper_ns(index), "{number}");
                assert!(index == 0 || number > upper_ns(index - 1), "{number}");
            }
        }
        assert!((0..BUCKETS).all(|index| bucket(upper_ns(index)) == index));
    }

    #[test]
    fn quantiles_are_a_quarter_too_large_at_most() {
        let mut histogram = LatencyHistogram::default();
        assert_eq!(histogram.quantile_ns(0.5), 0);
        (1..=1000).for_each(|number| histogram.record(number * 1000));
        for (share, exact) in [(0.5, 500_000), (0.99, 990_000), (1.0, 1_000_000)] {
            let found = histogram.quantile_ns(share);
            assert!((exact..=exact * 5 / 4).contains(&found), "{found}");
        }
        assert_eq!(histogram.max_ns(), 1_000_000);
    }

    #[test]
    fn statistics_come_back_from_their_text_and_add_up() {
        let mut statistics = PageServiceStatistics {
            faults: 3,
            ..Default::default()
        };
        [100, 5_000, u64::MAX]
            .iter()
            .for_each(|ns| statistics.latency.record(*ns));
        let text = serde_json::to_string(&statistics).unwrap();
        let again: PageServiceStatistics = serde_json::from_str(&text).unwrap();
        assert_eq!(again, statistics);
        statistics.merge(&again);
        assert_eq!((statistics.faults, statistics.latency.count()), (6, 6));
    }
}
