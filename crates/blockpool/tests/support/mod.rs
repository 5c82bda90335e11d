//! What the proofs share: a source of numbers, a model of what a pool has to hold, and a machine that does the same to both.

#![allow(dead_code, reason = "each proof uses a part")]

pub(crate) mod hostile;
pub(crate) mod machine;
pub(crate) mod model;
pub(crate) mod restream;
pub(crate) mod rounds;

/// Numbers from a seed: SplitMix64, Steele et al., OOPSLA 2014.
#[derive(Debug, Clone)]
pub(crate) struct Numbers(pub(crate) u64);

impl Numbers {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub(crate) fn below(&mut self, end: u64) -> u64 {
        self.next() % end.max(1)
    }

    pub(crate) fn step(&mut self) -> machine::Step {
        let number = |numbers: &mut Self| numbers.next() as u32;
        machine::Step {
            kind: number(self) as u8,
            a: number(self),
            b: number(self),
            c: number(self),
        }
    }
}
