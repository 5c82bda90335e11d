//! Working sets: the pages that a clone asked for in its first seconds, kept to be brought to the next
//! ones ahead ("record and prefetch", Ustiugov et al., Benchmarking, Analysis, and Optimization of
//! Serverless Function Snapshots, ASPLOS 2021). The bytes are described in docs/format/snapshot.md.

use std::time::Instant;

use super::pages::PageSet;
use crate::error::MemoryError;
use crate::{PAGE_BYTES, PageRun};

const MAGIC: [u8; 8] = *b"FCVMWSET";
const VERSION: u32 = 1;
const HEADER_BYTES: usize = 48;
/// Where the checksum is, which covers what is before it and all entries.
const CHECKSUM_AT: usize = 44;
const ENTRY_BYTES: usize = 12;
const COMPLETE: u32 = 1;
/// Most runs of a set.
const RUNS_MAX: usize = 1 << 20;
/// Longest set in bytes.
pub const WORKING_SET_BYTES_MAX: usize = HEADER_BYTES + RUNS_MAX * ENTRY_BYTES;
/// Pages that are brought in the order of their addresses; such portions are in the order in which they
/// were asked for. 16 MiB.
const PORTION_PAGES: u64 = 4096;

/// Pages in the order in which they were asked for; none is there twice.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WorkingSet {
    runs: Vec<PageRun>,
    is_complete: bool,
}

impl WorkingSet {
    /// The pages, neighbours that were asked for one after the other in one run.
    pub fn runs(&self) -> &[PageRun] {
        &self.runs
    }

    /// How many pages it has.
    pub fn page_count(&self) -> u64 {
        self.runs.iter().map(|run| run.count).sum()
    }

    /// Whether it was recorded to its end. To one that was not, the next clone adds.
    pub fn is_complete(&self) -> bool {
        self.is_complete
    }

    /// Its bytes, bound to the snapshot of this id and its memory.
    pub fn encode(&self, memory_bytes: u64, snapshot: &[u8; 16]) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(HEADER_BYTES + self.runs.len() * ENTRY_BYTES);
        bytes.extend(MAGIC);
        bytes.extend(VERSION.to_le_bytes());
        let flags = if self.is_complete { COMPLETE } else { 0 };
        bytes.extend(flags.to_le_bytes());
        bytes.extend(memory_bytes.to_le_bytes());
        bytes.extend(snapshot);
        bytes.extend((self.runs.len() as u32).to_le_bytes());
        bytes.extend([0; 4]);
        for run in &self.runs {
            bytes.extend(run.first.to_le_bytes());
            bytes.extend((run.count as u32).to_le_bytes());
        }
        let checksum = checksum(&bytes);
        bytes[CHECKSUM_AT..HEADER_BYTES].copy_from_slice(&checksum.to_le_bytes());
        bytes
    }

    /// Reads and checks the bytes of a set of this snapshot.
    ///
    /// # Errors
    ///
    /// They are damaged, of a later version or of another snapshot.
    pub fn decode(
        bytes: &[u8],
        memory_bytes: u64,
        snapshot: &[u8; 16],
    ) -> Result<Self, MemoryError> {
        let damaged = |reason: &str| MemoryError::damaged(format!("its working set {reason}"));
        if bytes.len() < HEADER_BYTES || bytes[..8] != MAGIC {
            return Err(damaged("does not begin as one"));
        }
        let number32 = |at: usize| {
            u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
        };
        let number64 = |at: usize| u64::from(number32(at)) | u64::from(number32(at + 4)) << 32;
        let found = number32(8);
        if found != VERSION {
            return Err(MemoryError::Version {
                found,
                known: VERSION,
            });
        }
        let count = number32(40) as usize;
        if count > RUNS_MAX || bytes.len() != HEADER_BYTES + count * ENTRY_BYTES {
            return Err(damaged("has another length than it tells"));
        }
        if checksum(bytes) != number32(CHECKSUM_AT) {
            return Err(damaged("has a wrong checksum"));
        }
        if number64(16) != memory_bytes || bytes[24..40] != *snapshot {
            return Err(damaged("is of another snapshot"));
        }
        let flags = number32(12);
        if flags & !COMPLETE != 0 {
            return Err(damaged("has unknown flags"));
        }
        let runs = decode_runs(&bytes[HEADER_BYTES..], memory_bytes / PAGE_BYTES)
            .ok_or_else(|| damaged("names pages twice, or such as are not there"))?;
        Ok(Self {
            runs,
            is_complete: flags & COMPLETE != 0,
        })
    }

    /// The pages in the order in which they are brought: portions of those that were asked for at about
    /// the same time, within which neighbours are together.
    pub(super) fn in_portions(&self) -> Vec<PageRun> {
        let mut ordered: Vec<PageRun> = Vec::with_capacity(self.runs.len());
        let mut start = 0;
        let mut pages = 0;
        for (index, run) in self.runs.iter().enumerate() {
            pages += run.count;
            if pages >= PORTION_PAGES || index + 1 == self.runs.len() {
                let mut portion = self.runs[start..=index].to_vec();
                portion.sort_unstable_by_key(|run| run.first);
                let from = ordered.len();
                for run in portion {
                    push_joined(&mut ordered, from, run);
                }
                (start, pages) = (index + 1, 0);
            }
        }
        ordered
    }
}

fn checksum(bytes: &[u8]) -> u32 {
    crc32c::crc32c_append(
        crc32c::crc32c(&bytes[..CHECKSUM_AT]),
        &bytes[HEADER_BYTES..],
    )
}

fn decode_runs(bytes: &[u8], page_count: u64) -> Option<Vec<PageRun>> {
    let mut seen = PageSet::new(page_count);
    let mut runs = Vec::with_capacity(bytes.len() / ENTRY_BYTES);
    for entry in bytes.as_chunks::<ENTRY_BYTES>().0 {
        let (first, count) = entry.split_at(8);
        let run = PageRun {
            first: u64::from_le_bytes(first.try_into().ok()?),
            count: u64::from(u32::from_le_bytes(count.try_into().ok()?)),
        };
        let fits = run.count > 0 && run.first.checked_add(run.count)? <= page_count;
        if !fits || seen.uniform(run) != (false, run.count) {
            return None;
        }
        seen.insert(run);
        runs.push(run);
    }
    Some(runs)
}

/// Adds a run to the last one, if it follows that and that is not before `from`.
fn push_joined(runs: &mut Vec<PageRun>, from: usize, run: PageRun) {
    let may_join = runs.len() > from;
    match runs.last_mut() {
        Some(last) if may_join && last.first + last.count == run.first => last.count += run.count,
        _ => runs.push(run),
    }
}

/// Records the pages that one clone asks for.
#[derive(Debug)]
pub(super) struct Recorder {
    runs: Vec<PageRun>,
    seen: PageSet,
    pub(super) until: Instant,
}

impl Recorder {
    /// Records until an instant, in addition to what was recorded before.
    pub(super) fn new(page_count: u64, before: Option<&WorkingSet>, until: Instant) -> Self {
        let mut seen = PageSet::new(page_count);
        let runs = before.map_or_else(Vec::new, |set| set.runs.clone());
        runs.iter().for_each(|run| seen.insert(*run));
        Self { runs, seen, until }
    }

    /// Notes a page, or the pages of a hugepage.
    pub(super) fn note(&mut self, run: PageRun) {
        if self.seen.contains(run.first) || self.runs.len() >= RUNS_MAX {
            return;
        }
        // A part may be there from pages of another size.
        let mut page = run.first;
        while page < run.first + run.count {
            let rest = PageRun {
                first: page,
                count: run.first + run.count - page,
            };
            let (is_seen, count) = self.seen.uniform(rest);
            if !is_seen && self.runs.len() < RUNS_MAX {
                push_joined(&mut self.runs, 0, PageRun { first: page, count });
            }
            page += count;
        }
        self.seen.insert(run);
    }

    /// What was recorded; `None` where that is nothing.
    pub(super) fn finish(self, is_complete: bool) -> Option<WorkingSet> {
        let runs = self.runs;
        (!runs.is_empty()).then_some(WorkingSet { runs, is_complete })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const ID: [u8; 16] = [7; 16];
    const PAGES: u64 = 20_000;

    fn recorded(pages: &[u64]) -> WorkingSet {
        let mut recorder = Recorder::new(PAGES, None, Instant::now());
        for page in pages {
            recorder.note(PageRun {
                first: *page,
                count: 1,
            });
        }
        recorder.finish(true).unwrap()
    }

    fn pages(runs: &[PageRun]) -> Vec<u64> {
        runs.iter()
            .flat_map(|run| run.first..run.first + run.count)
            .collect()
    }

    proptest! {
        #[test]
        fn sets_come_back_in_their_order(asked in prop::collection::vec(0..PAGES, 1..400)) {
            let set = recorded(&asked);
            let mut unique = asked.clone();
            let mut seen = std::collections::BTreeSet::new();
            unique.retain(|page| seen.insert(*page));
            prop_assert_eq!(pages(set.runs()), unique);
            let bytes = set.encode(PAGES * PAGE_BYTES, &ID);
            prop_assert!(bytes.len() <= WORKING_SET_BYTES_MAX);
            let again = WorkingSet::decode(&bytes, PAGES * PAGE_BYTES, &ID).unwrap();
            prop_assert_eq!(&again, &set);
            // One portion: in order of addresses, each page once.
            let ordered = set.in_portions();
            prop_assert_eq!(pages(&ordered), seen.into_iter().collect::<Vec<_>>());
            prop_assert!(ordered.windows(2).all(|two| two[0].first + two[0].count < two[1].first));
        }

        #[test]
        fn damage_is_found(asked in prop::collection::vec(0..PAGES, 1..50), at: usize, bit in 0..8_u8) {
            let mut bytes = recorded(&asked).encode(PAGES * PAGE_BYTES, &ID);
            let at = at % bytes.len();
            bytes[at] ^= 1_u8 << bit;
            prop_assert!(WorkingSet::decode(&bytes, PAGES * PAGE_BYTES, &ID).is_err());
        }
    }

    #[test]
    fn portions_keep_the_order_of_time() {
        let late: Vec<u64> = (0..10).collect();
        let early: Vec<u64> = (10_000..10_000 + PORTION_PAGES).rev().collect();
        let set = recorded(&[early, late].concat());
        let expected = [(10_000, PORTION_PAGES), (0, 10)];
        let expected = expected.map(|(first, count)| PageRun { first, count });
        assert_eq!(set.in_portions(), expected);
    }

    #[test]
    fn sets_of_other_snapshots_and_impossible_pages_are_refused() {
        let bytes = recorded(&[1, 2, 5]).encode(PAGES * PAGE_BYTES, &ID);
        let refused = |bytes: &[u8], memory, id| {
            WorkingSet::decode(bytes, memory, id)
                .unwrap_err()
                .to_string()
        };
        assert!(refused(&bytes, PAGES * PAGE_BYTES, &[8; 16]).contains("another snapshot"));
        assert!(refused(&bytes, PAGE_BYTES, &ID).contains("another snapshot"));
        assert!(refused(&bytes[..bytes.len() - 1], PAGES * PAGE_BYTES, &ID).contains("length"));
        let twice = WorkingSet {
            runs: vec![
                PageRun { first: 1, count: 2 },
                PageRun { first: 2, count: 1 },
            ],
            is_complete: true,
        };
        let outside = WorkingSet {
            runs: vec![PageRun {
                first: PAGES - 1,
                count: 2,
            }],
            is_complete: true,
        };
        for set in [twice, outside] {
            let bytes = set.encode(PAGES * PAGE_BYTES, &ID);
            assert!(refused(&bytes, PAGES * PAGE_BYTES, &ID).contains("twice"));
        }
        let mut later = bytes;
        later[8] = 2;
        assert!(refused(&later, PAGES * PAGE_BYTES, &ID).contains("version 2"));
    }

    #[test]
    fn a_record_that_was_cut_short_is_added_to() {
        let mut recorder = Recorder::new(PAGES, None, Instant::now());
        recorder.note(PageRun {
            first: 513,
            count: 1,
        });
        let short = recorder.finish(false).unwrap();
        let mut recorder = Recorder::new(PAGES, Some(&short), Instant::now());
        // A hugepage around it.
        recorder.note(PageRun {
            first: 512,
            count: 512,
        });
        let whole = recorder.finish(true).unwrap();
        let runs = [(513, 1), (512, 1), (514, 510)];
        assert_eq!(
            whole.runs(),
            runs.map(|(first, count)| PageRun { first, count })
        );
        let bytes = whole.encode(PAGES * PAGE_BYTES, &ID);
        assert_eq!(
            WorkingSet::decode(&bytes, PAGES * PAGE_BYTES, &ID).unwrap(),
            whole
        );
    }
}
