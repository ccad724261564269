//! The order in which samples are seen, without state: position in, sample out.
//!
//! A run that stops at position p and goes on at p, on any number of ranks, sees exactly what it
//! would have seen: each sample once an epoch.

use crate::{Batch, Samples};

/// Serves batches by position.
#[derive(Clone, Debug)]
pub struct Loader {
    samples: Samples,
    seed: u64,
    shuffle: bool,
}

impl Loader {
    /// Shuffled anew each epoch from `seed`, or in order.
    pub fn new(samples: Samples, seed: u64, shuffle: bool) -> Loader {
        Loader { samples, seed, shuffle }
    }

    /// Samples of an epoch.
    pub fn len(&self) -> u64 {
        self.samples.len()
    }

    /// Never: a corpus has at least one sample.
    pub fn is_empty(&self) -> bool {
        false
    }

    /// Rank `rank`'s `b` rows of the global batch of `b` x `ranks` rows that begins at `position`,
    /// counted in samples since the first epoch began.
    pub fn batch(&self, position: u64, b: usize, rank: usize, ranks: usize) -> Batch {
        debug_assert!(rank < ranks);
        let first = position + (rank * b) as u64;
        let rows: Vec<u64> = (first..first + b as u64).map(|at| self.sample(at)).collect();
        self.samples.batch(&rows)
    }

    fn sample(&self, at: u64) -> u64 {
        let n = self.samples.len();
        if self.shuffle { order(self.seed, at / n, n, at % n) } else { at % n }
    }
}

/// The `index`-th of `n` samples in an epoch: a bijection of 0..n drawn from seed and epoch.
///
/// A Feistel network over the next even number of bits; a value that falls outside 0..n goes
/// through again until it falls inside (cycle walking, Black and Rogaway 2002).
pub fn order(seed: u64, epoch: u64, n: u64, index: u64) -> u64 {
    assert!(index < n, "sample {index} of {n}");
    let half = (64 - n.saturating_sub(1).leading_zeros()).div_ceil(2).max(1);
    let mask = (1u64 << half) - 1;
    let key = mix(seed ^ mix(epoch.wrapping_add(0x9e37_79b9_7f4a_7c15)));
    let mut at = index;
    loop {
        let (mut left, mut right) = (at >> half, at & mask);
        for round in 0..6 {
            let f = mix(key ^ mix(right | round << 56)) & mask;
            (left, right) = (right, left ^ f);
        }
        at = left << half | right;
        if at < n {
            return at;
        }
    }
}

/// The finaliser of SplitMix64.
fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}
