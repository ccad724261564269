//! Few rows times a matrix stored [n, k], as in decoding: B is read once, in order, unpacked.

use super::Mat;
use super::cpu::Finish;
use crate::simd::{Float, lane_sum};
use device::{Slice, View};

/// Columns per task: enough to amortise the task, few enough to share.
const COLUMNS: usize = 32;

pub(super) fn gemv((m, n, k): (usize, usize, usize), a: Mat<'_>, b: Mat<'_>, finish: &Finish<'_>) {
    let rows = widen_rows(a, m, k);
    device::for_each_chunk(n, COLUMNS, |range| {
        let mut sums = [0f32; 8 * COLUMNS];
        let width = range.len();
        for (j, column) in range.clone().enumerate() {
            let weights = b.data.narrow(column * b.ld, k);
            for i in 0..m {
                sums[i * width + j] = dot(&rows[i * k..(i + 1) * k], weights);
            }
        }
        finish.rows(0..m, range.start, width, &mut sums[..m * width]);
    });
}

fn widen_rows(a: Mat<'_>, m: usize, k: usize) -> Vec<f32> {
    let at = |i: usize, j: usize| if a.transposed { j * a.ld + i } else { i * a.ld + j };
    let index = (0..m).flat_map(|i| (0..k).map(move |j| (i, j)));
    match a.data.floats() {
        Slice::F32(data) => index.map(|(i, j)| data[at(i, j)]).collect(),
        Slice::Bf16(data) => index.map(|(i, j)| data[at(i, j)].to_f32()).collect(),
    }
}

fn dot(x: &[f32], w: View<'_>) -> f32 {
    match w.floats() {
        Slice::F32(w) => dot_as(x, w),
        Slice::Bf16(w) => dot_as(x, w),
    }
}

multiversion! {
    fn dot_as<T: Float>(x: &[f32], w: &[T]) -> f32 {
        let w = &w[..x.len()];
        lane_sum(x.len(), |i| x[i] * w[i].to_f32())
    }
}
