//! What each way of attention moves, as pure formulas, and which heads a rank of the exchange has.

use super::ContextAttention;
use std::ops::Range;

/// Heads that a rank attends over whole rows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HeadShare {
    /// Query heads.
    pub queries: Range<usize>,
    /// The kv heads that serve them; ranks whose queries share one hold copies.
    pub kv: Range<usize>,
}

impl HeadShare {
    /// Of `rank` of `ranks`, of n query heads on k kv heads. Shares are equally many query heads:
    /// whole groups, or a part of one, so that each rank's heads are groups again; what is left over
    /// at the end has none.
    pub fn of(ranks: usize, rank: usize, (n, k): (usize, usize)) -> HeadShare {
        let each = HeadShare::each(ranks, (n, k));
        let group = n / k;
        let queries = (rank * each).min(n)..((rank + 1) * each).min(n);
        HeadShare { kv: queries.start / group..queries.end.div_ceil(group), queries }.or_none()
    }

    fn or_none(self) -> HeadShare {
        if self.queries.is_empty() { HeadShare { queries: 0..0, kv: 0..0 } } else { self }
    }

    /// Query heads of a rank.
    fn each(ranks: usize, (n, k): (usize, usize)) -> usize {
        let group = n / k;
        let fits = |each: &usize| each.is_multiple_of(group) || group.is_multiple_of(*each);
        (n.div_ceil(ranks)..=n).find(fits).unwrap_or(n)
    }
}

/// Elements of a token's heads (in units of H) that attention makes a rank receive, per token of its
/// own, if all ranks have equal shares of the heads.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Moved {
    /// On the way there, of the type of activations.
    pub forward: f64,
    /// On the way back, of the type of activations.
    pub backward: f64,
    /// On the way back, f32: gradients that are still being added up.
    pub backward_f32: f64,
}

impl Moved {
    /// The ring: k and v of all others; again on the way back, and their gradients.
    pub fn ring(ranks: usize, k: usize) -> Moved {
        let others = (ranks - 1) as f64 * 2.0 * k as f64;
        Moved { forward: others, backward: others, backward_f32: others }
    }

    /// The exchange: q, k and v of a share of the heads from everybody, the output of the other
    /// heads back; the way back mirrors it.
    pub fn all_to_all(ranks: usize, heads: (usize, usize)) -> Moved {
        let each = HeadShare::each(ranks, heads) as f64;
        let group = heads.0 as f64 / heads.1 as f64;
        let kv = (each / group).max(1.0);
        let pass = (ranks - 1) as f64 * (2.0 * each + 2.0 * kv);
        Moved { forward: pass, backward: pass, backward_f32: 0.0 }
    }

    /// Bytes of both ways with activations of two.
    fn bytes(self) -> f64 {
        2.0 * (self.forward + self.backward) + 4.0 * self.backward_f32
    }

    /// The exchange where the heads divide and it moves less, else the ring.
    pub(super) fn auto(ranks: usize, heads: (usize, usize)) -> ContextAttention {
        let divides = HeadShare::each(ranks, heads) * ranks == heads.0;
        let less = Moved::all_to_all(ranks, heads).bytes() < Moved::ring(ranks, heads.1).bytes();
        if divides && less { ContextAttention::AllToAll } else { ContextAttention::Ring }
    }
}
