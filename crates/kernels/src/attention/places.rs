//! Where queries and keys stand in their rows, and so which keys a query sees.

use super::Mask;

/// Where the tokens at hand of every row stand in it: one run, or two where a row was cut among
/// ranks so that each has an early and a late run of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Places {
    /// (first place, tokens), ascending.
    runs: [(usize, usize); 2],
}

impl Places {
    /// `len` tokens from place `first` on.
    pub const fn run(first: usize, len: usize) -> Places {
        Places { runs: [(first, len), (first + len, 0)] }
    }

    /// Two runs of (first place, tokens), the second behind the first.
    pub fn runs(early: (usize, usize), late: (usize, usize)) -> Places {
        assert!(early.0 + early.1 <= late.0, "runs {early:?} and {late:?} ascend");
        Places { runs: [early, late] }
    }

    /// (first place, tokens) of both runs, the second without tokens where there is but one.
    pub(super) const fn both(self) -> [(usize, usize); 2] {
        self.runs
    }

    /// Tokens.
    pub const fn len(self) -> usize {
        self.runs[0].1 + self.runs[1].1
    }

    /// Whether there are none.
    pub const fn is_empty(self) -> bool {
        self.len() == 0
    }

    /// Place of token `i` of those at hand.
    pub fn at(self, i: usize) -> usize {
        let [early, late] = self.runs;
        if i < early.1 { early.0 + i } else { late.0 + i - early.1 }
    }

    /// Tokens at hand that stand before `place`.
    pub fn before(self, place: usize) -> usize {
        self.runs.iter().map(|(first, len)| place.saturating_sub(*first).min(*len)).sum()
    }
}

/// Which of the keys at hand a query sees: those at its place and before, as the mask allows.
#[derive(Clone, Copy)]
pub struct Seen<'a> {
    /// Documents, as places in the row, and the window.
    pub mask: Mask<'a>,
    /// Where the t queries of every row stand.
    pub queries: Places,
    /// Where the s keys of every row stand.
    pub keys: Places,
}

impl<'a> Seen<'a> {
    /// All `s` keys of a row, of which the queries are the last `t`.
    pub fn last(mask: Mask<'a>, t: usize, s: usize) -> Seen<'a> {
        assert!(s >= t, "{t} queries at the end of {s} keys");
        Seen { mask, queries: Places::run(s - t, t), keys: Places::run(0, s) }
    }

    /// Keys `[from, to)` of those at hand that query `q` of row `row` sees. Both ends ascend with `q`.
    pub(super) fn visible(&self, row: usize, q: usize) -> (usize, usize) {
        let end = self.queries.at(q) + 1;
        let document = self.mask.starts.map_or(0, |starts| starts[row * self.queries.len() + q] as usize);
        let window = self.mask.window.map_or(0, |window| end.saturating_sub(window));
        let to = self.keys.before(end);
        (self.keys.before(document.max(window)).min(to), to)
    }
}
