//! Samples: rows of T tokens cut from the stream, with documents kept apart.

use crate::{CorpusError, TokenizedCorpus};
use std::sync::Arc;

/// A target that does not count.
pub const IGNORE: u32 = u32::MAX;

/// Rows of tokens, ready for a model. Arrays are [b, t], row-major.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Batch {
    /// Rows.
    pub b: usize,
    /// Tokens per row.
    pub t: usize,
    /// Token ids.
    pub ids: Vec<u32>,
    /// The token that follows, or `IGNORE`.
    pub targets: Vec<u32>,
    /// Position of each token in its document (or since the row began, when that is later).
    pub positions: Vec<u32>,
    /// Where in the row each token's document begins.
    pub starts: Vec<u32>,
    /// Targets that count.
    pub learned: usize,
    /// Which samples these are, to name a batch.
    pub samples: Vec<u64>,
}

/// Sample i is tokens [i t, (i + 1) t) of the stream, each with the token after it as its target.
#[derive(Clone, Debug)]
pub struct Samples {
    corpus: Arc<TokenizedCorpus>,
    t: usize,
}

impl Samples {
    /// Rows of `t` tokens.
    pub fn new(corpus: Arc<TokenizedCorpus>, t: usize) -> Result<Samples, CorpusError> {
        match corpus.len() {
            tokens @ (0 | 1) => Err(CorpusError::Empty { tokens }),
            _ => Ok(Samples { corpus, t: t.max(1) }),
        }
    }

    /// Number of samples; the last may be padded.
    pub fn len(&self) -> u64 {
        // The very last token has no successor to predict.
        (self.corpus.len() - 1).div_ceil(self.t) as u64
    }

    /// Never: a corpus has at least two tokens.
    pub fn is_empty(&self) -> bool {
        false
    }

    /// Tokens per row.
    pub fn t(&self) -> usize {
        self.t
    }

    /// The rows of `samples`.
    pub fn batch(&self, samples: &[u64]) -> Batch {
        let len = samples.len() * self.t;
        let mut batch = Batch { b: samples.len(), t: self.t, samples: samples.to_vec(), ..Batch::default() };
        for list in [&mut batch.ids, &mut batch.targets, &mut batch.positions, &mut batch.starts] {
            list.reserve_exact(len);
        }
        samples.iter().for_each(|sample| self.push_row(*sample, &mut batch));
        batch
    }

    fn push_row(&self, sample: u64, batch: &mut Batch) {
        let tokens = self.corpus.tokens();
        let first = sample as usize * self.t;
        let last = (first + self.t).min(tokens.len() - 1);
        let mut start = self.corpus.document_start(first).max(first);
        for at in first..last {
            let next_start = self.corpus.document_start(at + 1);
            batch.ids.push(tokens[at]);
            batch.positions.push((at - start) as u32);
            batch.starts.push((start - first) as u32);
            // What follows the end of a document belongs to another one.
            let counts = next_start != at + 1 && self.corpus.is_learned(at + 1);
            batch.targets.push(if counts { tokens[at + 1] } else { IGNORE });
            batch.learned += counts as usize;
            if next_start == at + 1 {
                start = at + 1;
            }
        }
        for pad in last..first + self.t {
            batch.ids.push(tokens[last]);
            batch.positions.push(0);
            batch.starts.push((pad - first) as u32);
            batch.targets.push(IGNORE);
        }
    }

    /// All samples in order, `b` rows at a time; the last batch may have fewer.
    pub fn sequential(&self, b: usize) -> impl Iterator<Item = Batch> + '_ {
        let (b, count) = (b.max(1) as u64, self.len());
        (0..count.div_ceil(b)).map(move |i| {
            let rows: Vec<u64> = (i * b..((i + 1) * b).min(count)).collect();
            self.batch(&rows)
        })
    }
}
