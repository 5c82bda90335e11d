//! Sets of pages of a guest's memory.

use crate::PageRun;

const WORD_BITS: u64 = u64::BITS as u64;

/// A set of pages, a bit each.
#[derive(Debug, Clone)]
pub(super) struct PageSet {
    words: Vec<u64>,
}

impl PageSet {
    /// None of so many pages.
    pub(super) fn new(page_count: u64) -> Self {
        let words = usize::try_from(page_count.div_ceil(WORD_BITS)).unwrap_or(0);
        Self {
            words: vec![0; words],
        }
    }

    /// Adds pages; those that cannot be are none.
    pub(super) fn insert(&mut self, run: PageRun) {
        let end = (run.first + run.count).min(self.words.len() as u64 * WORD_BITS);
        let mut page = run.first;
        while page < end {
            let bit = page % WORD_BITS;
            let count = (WORD_BITS - bit).min(end - page);
            let mask = (u64::MAX >> (WORD_BITS - count)) << bit;
            self.words[(page / WORD_BITS) as usize] |= mask;
            page += count;
        }
    }

    pub(super) fn contains(&self, page: u64) -> bool {
        let word = usize::try_from(page / WORD_BITS).ok();
        word.and_then(|word| self.words.get(word))
            .is_some_and(|word| word >> (page % WORD_BITS) & 1 == 1)
    }

    /// Whether the first page of a run is in the set, and how many after it are as it is, at most all.
    pub(super) fn uniform(&self, run: PageRun) -> (bool, u64) {
        let is_in = self.contains(run.first);
        let mut page = run.first + 1;
        let end = run.first + run.count;
        while page < end {
            let word = self.words.get((page / WORD_BITS) as usize).copied();
            let word = if is_in { word } else { word.map(|word| !word) };
            let rest = word.unwrap_or(0) >> (page % WORD_BITS);
            let same = u64::from(rest.trailing_ones()).min(WORD_BITS - page % WORD_BITS);
            if same == 0 {
                break;
            }
            page += same;
        }
        (is_in, page.min(end) - run.first)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_set_is_as_a_list_of_flags(
            runs in prop::collection::vec((0..300_u64, 1..200_u64), 0..6),
            asked in (0..300_u64, 1..300_u64),
        ) {
            let mut set = PageSet::new(300);
            let mut flags = vec![false; 1000];
            for (first, count) in runs {
                set.insert(PageRun { first, count });
                // The set has room for whole words.
                (first..(first + count).min(320)).for_each(|page| flags[page as usize] = true);
            }
            for page in 0..400 {
                prop_assert_eq!(set.contains(page), flags[page as usize]);
            }
            let (first, count) = asked;
            let (is_in, length) = set.uniform(PageRun { first, count });
            prop_assert_eq!(is_in, flags[first as usize]);
            let expected = (first..first + count)
                .take_while(|page| flags[*page as usize] == is_in)
                .count() as u64;
            // What the set has no bits for ends a run of absent ones.
            let expected = if is_in { expected } else { expected.min(320 - first) };
            prop_assert_eq!(length, expected);
        }
    }
}
