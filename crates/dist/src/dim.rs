//! Which elements of a dim a piece holds. Pieces are equally long: what a dim lacks to a multiple is
//! padding behind its end, zeros that no product sees.

use crate::{Cut, Mesh};
use std::ops::Range;
use tensor::{Piece, Run};

/// A dim of a weight: parts side by side (q, k and v of a fused matrix), each a number of units that
/// are never torn (heads).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Dim {
    parts: Vec<(usize, usize)>,
}

impl Dim {
    /// `len` elements that may be cut anywhere.
    pub fn plain(len: usize) -> Dim {
        Dim { parts: vec![(len, 1)] }
    }

    /// Parts of (units, elements of a unit); every piece holds its share of each part.
    pub fn of_parts(parts: &[(usize, usize)]) -> Dim {
        Dim { parts: parts.to_vec() }
    }

    /// Elements in all.
    pub fn len(&self) -> usize {
        self.parts.iter().map(|(units, unit)| units * unit).sum()
    }

    /// Whether it has none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Elements of one of `pieces` pieces, padding included.
    pub fn piece_len(&self, pieces: usize) -> usize {
        self.parts.iter().map(|(units, unit)| units.div_ceil(pieces) * unit).sum()
    }

    /// Where the elements of pieces `range` of `pieces`, laid one behind the other, come from.
    fn runs(&self, pieces: usize, range: Range<usize>) -> Vec<Run> {
        let (mut runs, mut at) = (Vec::new(), 0);
        for piece in range {
            let mut part_from = 0;
            for (units, unit) in &self.parts {
                let share = units.div_ceil(pieces);
                let first = (piece * share).min(*units);
                let held = share.min(units - first);
                if held > 0 {
                    runs.push(Run { at, from: part_from + first * unit, len: held * unit });
                }
                at += share * unit;
                part_from += units * unit;
            }
        }
        merged(runs)
    }
}

/// Runs that continue each other become one.
pub(crate) fn merged(runs: Vec<Run>) -> Vec<Run> {
    let mut out: Vec<Run> = Vec::with_capacity(runs.len());
    for run in runs {
        match out.last_mut() {
            Some(last) if last.at + last.len == run.at && last.from + last.len == run.from => {
                last.len += run.len;
            }
            _ => out.push(run),
        }
    }
    out
}

/// How one dim of a parameter is held.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Held {
    /// The dim.
    pub dim: Dim,
    /// The finest cut of the dim: the order in which its pieces lie.
    pub order: Cut,
    /// The cut a product sees; its axes are the first of `order`.
    pub cut: Cut,
    /// Axes that cut the storage further; a product gathers over them.
    pub stored: Cut,
}

impl Held {
    /// Cut and stored alike.
    pub fn plainly(dim: Dim, cut: Cut) -> Held {
        Held { dim, order: cut, cut, stored: Cut::WHOLE }
    }

    /// Elements a product sees on one rank.
    pub fn local_len(&self, mesh: &Mesh) -> usize {
        let pieces = self.order.pieces(mesh);
        self.dim.piece_len(pieces) * (pieces / self.cut.pieces(mesh))
    }

    /// Elements one rank stores.
    pub fn stored_len(&self, mesh: &Mesh) -> usize {
        self.local_len(mesh).div_ceil(self.stored.pieces(mesh))
    }

    /// The elements this rank stores.
    pub fn runs(&self, mesh: &Mesh) -> Vec<Run> {
        let pieces = self.order.pieces(mesh);
        let each = pieces / self.cut.pieces(mesh);
        let first = self.cut.index(mesh) * each;
        let len = self.stored_len(mesh);
        let start = self.stored.index(mesh) * len;
        let clip = |run: &Run| {
            let (from, to) = (run.at.max(start), (run.at + run.len).min(start + len));
            (from < to).then(|| Run { at: from - start, from: run.from + from - run.at, len: to - from })
        };
        self.dim.runs(pieces, first..first + each).iter().filter_map(clip).collect()
    }
}

/// What this rank stores of a matrix.
pub fn crossing(mesh: &Mesh, rows: &Held, cols: &Held) -> Piece {
    Piece { whole: [rows.dim.len(), cols.dim.len()], rows: rows.runs(mesh), cols: cols.runs(mesh) }
}
