//! Rows of scores into probabilities, in place.

use crate::simd::{LANES, exp, lane_sum};

/// Running state of one query's online softmax.
#[derive(Clone, Copy, Debug)]
pub(super) struct Running {
    /// Largest scaled score so far.
    pub(super) top: f32,
    /// Sum of exponentials relative to `top`.
    pub(super) sum: f32,
}

impl Running {
    pub(super) const NEW: Running = Running { top: f32::NEG_INFINITY, sum: 0.0 };

    /// log(sum of exponentials); -inf when nothing was seen.
    pub(super) fn lse(&self) -> f32 {
        self.top + self.sum.ln()
    }
}

multiversion! {
    /// Scores `[from, to)` of a block's row become exp(score * scale - top), the rest zero.
    /// Returns the new state and the factor for what was accumulated before.
    pub(super) fn advance(
        row: &mut [f32], from: usize, to: usize, scale: f32, state: Running,
    ) -> (Running, f32) {
        row[..from].fill(0.0);
        row[to..].fill(0.0);
        let seen = &mut row[from..to];
        if seen.is_empty() {
            return (state, 1.0);
        }
        let mut lanes = [f32::NEG_INFINITY; LANES];
        let (chunks, tail) = seen.as_chunks::<LANES>();
        for chunk in chunks {
            for (lane, x) in lanes.iter_mut().zip(chunk) {
                *lane = if *x > *lane { *x } else { *lane };
            }
        }
        for (lane, x) in lanes.iter_mut().zip(tail) {
            *lane = if *x > *lane { *x } else { *lane };
        }
        let top = state.top.max(lanes.into_iter().fold(f32::NEG_INFINITY, f32::max) * scale);
        for x in seen.iter_mut() {
            *x = exp(*x * scale - top);
        }
        let factor = exp(state.top - top);
        let sum = state.sum * factor + lane_sum(seen.len(), |i| seen[i]);
        (Running { top, sum }, factor)
    }
}

multiversion! {
    /// Scores `[from, to)` become exp(score * scale - lse), the rest zero; `dp` becomes the
    /// gradient of the scores, p * (dp - delta) * scale.
    pub(super) fn retreat(
        row: &mut [f32], dp: &mut [f32], from: usize, to: usize, terms: (f32, f32, f32),
    ) {
        let (scale, lse, delta) = terms;
        row[..from].fill(0.0);
        row[to..].fill(0.0);
        dp[..from].fill(0.0);
        dp[to..].fill(0.0);
        for (p, dp) in row[from..to].iter_mut().zip(&mut dp[from..to]) {
            *p = exp(*p * scale - lse);
            *dp = *p * (*dp - delta) * scale;
        }
    }
}

multiversion! {
    /// x *= factor.
    pub(super) fn rescale(x: &mut [f32], factor: f32) {
        for x in x.iter_mut() {
            *x *= factor;
        }
    }
}
