//! A few queries against many keys, as in generation: keys and values are read once, in place.

use super::softmax::{Running, advance, rescale};
use super::{Heads, Operands, Seen, Shape};
use crate::raw::RawFloats;
use crate::simd::{Float, Open, lane_sum};
use device::ViewMut;

/// Queries a row up to which packing would cost more than it saves.
pub(super) const QUERIES: usize = 4;

pub(super) fn forward(
    shape: Shape,
    (q, k, v): Operands<'_>,
    seen: Seen<'_>,
    scale: f32,
    out: ViewMut<'_>,
    lse: ViewMut<'_>,
) {
    let Shape { b, t, n, k: kv_heads, h, .. } = shape;
    let (out, lse) = (RawFloats::of(out), RawFloats::of(lse));
    device::for_each_index(b * t * n, |task| {
        let (row, rest) = (task / (t * n), task % (t * n));
        let (query, head) = (rest / n, rest % n);
        let (from, to) = seen.visible(row, query);
        let at = |heads: &Heads<'_>, token: usize, head: usize| {
            (row * heads.rows_per_batch + token) * heads.ld + heads.col + head * h
        };
        let kv_head = head / (n / kv_heads);
        let (mut scores, mut sums) = (vec![0f32; to - from], vec![0f32; h]);
        by_dtype!(q.data, T => {
            let (queries, keys, values) = (T::open(q.data), T::open(k.data), T::open(v.data));
            let asked = &queries[at(&q, query, head)..][..h];
            for (i, score) in scores.iter_mut().enumerate() {
                *score = dot(asked, &keys[at(&k, from + i, kv_head)..][..h]);
            }
            let count = scores.len();
            let (state, _) = advance(&mut scores, 0, count, scale, Running::NEW);
            for (i, p) in scores.iter().enumerate() {
                add_scaled(&mut sums, &values[at(&v, from + i, kv_head)..][..h], *p);
            }
            rescale(&mut sums, if state.sum > 0.0 { 1.0 / state.sum } else { 0.0 });
            // SAFETY: this head of this query belongs to this task alone.
            unsafe {
                out.write(((row * t + query) * n + head) * h, &sums);
                lse.write((row * n + head) * t + query, &[state.lse()]);
            }
        });
    });
}

multiversion! {
    fn dot<T: Float>(x: &[T], y: &[T]) -> f32 {
        let y = &y[..x.len()];
        lane_sum(x.len(), |i| x[i].to_f32() * y[i].to_f32())
    }
}

multiversion! {
    fn add_scaled<T: Float>(sums: &mut [f32], x: &[T], factor: f32) {
        for (sum, x) in sums.iter_mut().zip(x) {
            *sum += factor * x.to_f32();
        }
    }
}
