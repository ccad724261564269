//! Which tokens of a row a context rank has. Later tokens see more keys, so a row is cut into twice
//! as many runs as there are ranks and rank r takes run r and run r of those counted from the end:
//! then every rank has the same pairs of queries and keys.

use crate::{Axis, Mesh};
use kernels::attention::Places;
use std::ops::Range;

/// The zig-zag cut of rows among the ranks of the context axis.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ZigZag {
    ranks: usize,
    rank: usize,
}

impl ZigZag {
    /// As the rank of `mesh` sees it.
    pub fn of(mesh: &Mesh) -> ZigZag {
        ZigZag { ranks: mesh.size(Axis::Cp), rank: mesh.coord(Axis::Cp) }
    }

    /// Ranks.
    pub fn ranks(self) -> usize {
        self.ranks
    }

    /// Tokens a row of `tokens` is padded to, so that all runs are equally long.
    pub fn padded(self, tokens: usize) -> usize {
        if self.ranks == 1 { tokens } else { tokens.next_multiple_of(2 * self.ranks) }
    }

    /// The places of `rank`'s early and late run in padded rows of `tokens`.
    fn runs(self, rank: usize, tokens: usize) -> [Range<usize>; 2] {
        if self.ranks == 1 {
            return [0..tokens, tokens..tokens];
        }
        let each = tokens / (2 * self.ranks);
        [rank, 2 * self.ranks - 1 - rank].map(|run| run * each..(run + 1) * each)
    }

    /// Where this rank's part of a padded row holds tokens of the `tokens` there are; the rest of it is
    /// padding.
    pub fn real(self, tokens: usize) -> [Range<usize>; 2] {
        let mut at = 0;
        self.runs(self.rank, self.padded(tokens)).map(|run| {
            let from = at;
            at += run.len();
            from..from + run.end.min(tokens).saturating_sub(run.start)
        })
    }

    /// The same for kernels.
    pub(crate) fn places(self, rank: usize, tokens: usize) -> Places {
        let [early, late] = self.runs(rank, tokens);
        Places::runs((early.start, early.len()), (late.start, late.len()))
    }

    /// This rank's tokens of `b` padded rows.
    pub fn take<T: Copy>(self, x: &[T], b: usize) -> Vec<T> {
        if self.ranks == 1 {
            return x.to_vec();
        }
        let tokens = x.len() / b.max(1);
        let runs = self.runs(self.rank, tokens);
        (0..b)
            .flat_map(|row| runs.iter().flat_map(move |run| &x[row * tokens + run.start..][..run.len()]))
            .copied()
            .collect()
    }

    /// `b` rows, each made as long as the cut wants it, with `fill` behind its end.
    pub fn pad<T: Copy>(self, x: &[T], b: usize, fill: T) -> Vec<T> {
        let tokens = x.len() / b.max(1);
        let more = self.padded(tokens) - tokens;
        let row = |row: usize| x[row * tokens..][..tokens].iter().copied();
        (0..b).flat_map(|i| row(i).chain(std::iter::repeat_n(fill, more))).collect()
    }

    /// Copies between what all ranks have, one after the other, and whole rows: `b` padded rows of
    /// `tokens`, each a run of `len` elements as (where it lies with the ranks, where in rows, len).
    pub(crate) fn copies(
        self,
        (b, tokens, width): (usize, usize, usize),
    ) -> impl Iterator<Item = (usize, usize, usize)> {
        let here = tokens / self.ranks;
        (0..self.ranks).flat_map(move |rank| {
            let runs = self.runs(rank, tokens);
            (0..b).flat_map(move |row| {
                let mut at = (rank * b + row) * here;
                runs.clone().map(|run| {
                    let from = at * width;
                    at += run.len();
                    (from, (row * tokens + run.start) * width, run.len() * width)
                })
            })
        })
    }

    /// What every rank has of `b` rows, one rank after the other, as rows of `tokens` tokens without
    /// their padding.
    pub fn whole<T: Copy + Default>(self, pieces: &[T], b: usize, tokens: usize) -> Vec<T> {
        let padded = self.padded(tokens);
        let mut rows = vec![T::default(); b * padded];
        for (from, to, len) in self.copies((b, padded, 1)) {
            rows[to..to + len].copy_from_slice(&pieces[from..from + len]);
        }
        rows.chunks_exact(padded.max(1)).flat_map(|row| &row[..tokens]).copied().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_rank_has_the_same_work_and_every_token_once() {
        for ranks in 1..=7 {
            for tokens in [1, 5, 14, 64] {
                let cut = |rank| ZigZag { ranks, rank };
                let padded = cut(0).padded(tokens);
                assert!(padded >= tokens && padded < tokens + 2 * ranks);
                let rows: Vec<u32> = (0..2 * tokens as u32).collect();
                let long = cut(0).pad(&rows, 2, u32::MAX);
                let pieces: Vec<Vec<u32>> = (0..ranks).map(|rank| cut(rank).take(&long, 2)).collect();
                assert!(pieces.iter().all(|piece| piece.len() == 2 * padded / ranks));
                for (rank, piece) in pieces.iter().enumerate() {
                    let real: Vec<usize> = cut(rank).real(tokens).into_iter().flatten().collect();
                    let found = (0..padded / ranks).filter(|i| piece[*i] != u32::MAX);
                    assert_eq!(
                        real,
                        found.collect::<Vec<_>>(),
                        "{ranks} ranks, {tokens} tokens, rank {rank}"
                    );
                }
                assert_eq!(cut(0).whole(&pieces.concat(), 2, tokens), rows, "{ranks} ranks, {tokens} tokens");
                let pairs = |rank| -> usize {
                    cut(rank).runs(rank, padded).into_iter().flatten().map(|q| q + 1).sum()
                };
                assert!((0..ranks).all(|rank| pairs(rank) == pairs(0)), "{ranks} ranks, {tokens} tokens");
            }
        }
    }
}
