//! The product in f64, and the sum of absolute products its error is measured against.

use super::Mat;
use device::Slice;

fn at(x: &Mat<'_>, i: usize, j: usize) -> f64 {
    let index = if x.transposed { j * x.ld + i } else { i * x.ld + j };
    match x.data.floats() {
        Slice::F32(data) => data[index] as f64,
        Slice::Bf16(data) => data[index].to_f64(),
    }
}

/// (a b, |a| |b|), each [m, n].
pub(super) fn product((m, n, k): (usize, usize, usize), a: Mat<'_>, b: Mat<'_>) -> (Vec<f64>, Vec<f64>) {
    let cell = |i: usize, j: usize| {
        (0..k).map(|p| at(&a, i, p) * at(&b, p, j)).fold((0.0, 0.0), |s, x| (s.0 + x, s.1 + x.abs()))
    };
    (0..m).flat_map(|i| (0..n).map(move |j| (i, j))).map(|(i, j)| cell(i, j)).unzip()
}
