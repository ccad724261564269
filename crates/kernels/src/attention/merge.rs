//! What joins attention over parts of the keys: outputs by their log-sums on the way there, and the
//! sums over each query's output that every part's way back subtracts.

use super::{Shape, cuda};
use crate::raw::RawFloats;
use crate::simd::{Float, Open, exp, lane_sum};
use device::{DType, Device, View, ViewMut};

/// (out [b*t, n*h], lse [b, n, t]), both f32, become what they are with the keys of `part` added.
/// A part of which a query saw nothing leaves its bits.
pub fn merge(shape: &Shape, (out, lse): (ViewMut<'_>, ViewMut<'_>), part: (View<'_>, View<'_>)) {
    let Shape { b, t, n, h, .. } = *shape;
    assert!(out.len() == b * t * n * h && lse.len() == b * n * t, "{shape:?}");
    assert!(part.0.len() == out.len() && part.1.len() == lse.len(), "{shape:?}");
    assert!(out.dtype() == DType::F32, "parts are merged in f32");
    match out.device() {
        Device::Cpu => {
            let (out, lse) = (RawFloats::of(out), RawFloats::of(lse));
            let (part_out, part_lse) = (part.0.f32(), part.1.f32());
            device::for_each_index(b * t, |token| {
                let (row, q) = (token / t, token % t);
                let mut sums = vec![0f32; h];
                for head in 0..n {
                    let (at, stat) = ((token * n + head) * h, (row * n + head) * t + q);
                    let more = part_lse[stat];
                    if more == f32::NEG_INFINITY {
                        continue;
                    }
                    let mut known = [0f32];
                    // SAFETY: every head of this token belongs to this task alone.
                    unsafe {
                        lse.read(stat, &mut known);
                        out.read(at, &mut sums);
                        let joined = join(&mut sums, known[0], &part_out[at..at + h], more);
                        out.write(at, &sums);
                        lse.write(stat, &[joined]);
                    }
                }
            });
        }
        Device::Cuda => cuda::merge(shape, (out, lse), part),
    }
}

multiversion! {
    /// out (of log-sum `known`) with `part` (of log-sum `more`) joined to it; returns their log-sum.
    fn join(out: &mut [f32], known: f32, part: &[f32], more: f32) -> f32 {
        let top = known.max(more);
        let (ours, theirs) = (exp(known - top), exp(more - top));
        let sum = ours + theirs;
        let (ours, theirs) = (ours / sum, theirs / sum);
        for (out, part) in out.iter_mut().zip(part) {
            *out = *out * ours + *part * theirs;
        }
        top + sum.ln()
    }
}

/// sums [b, n, t] f32: over the head, out * dout of each query. out and dout are [b*t, n*h].
pub fn row_sums(shape: &Shape, out: View<'_>, dout: View<'_>, sums: ViewMut<'_>) {
    let Shape { b, t, n, h, .. } = *shape;
    assert!(out.len() == b * t * n * h && dout.len() == out.len() && sums.len() == b * n * t, "{shape:?}");
    match sums.device() {
        Device::Cpu => {
            let sums = RawFloats::of(sums);
            by_dtype!(out, T => by_dtype!(dout, D => {
                let (out, dout) = (T::open(out), D::open(dout));
                device::for_each_index(b * n, |task| {
                    let (row, head) = (task / n, task % n);
                    let own: Vec<f32> = (0..t)
                        .map(|q| {
                            let at = ((row * t + q) * n + head) * h;
                            dot(&out[at..at + h], &dout[at..at + h])
                        })
                        .collect();
                    // SAFETY: the queries of this head of this row belong to this task alone.
                    unsafe { sums.write(task * t, &own) };
                });
            }));
        }
        Device::Cuda => cuda::row_sums(shape, out, dout, sums),
    }
}

multiversion! {
    fn dot<T: Float, D: Float>(x: &[T], y: &[D]) -> f32 {
        let y = &y[..x.len()];
        lane_sum(x.len(), |i| x[i].to_f32() * y[i].to_f32())
    }
}
