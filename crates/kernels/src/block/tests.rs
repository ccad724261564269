use super::*;
use crate::testkit::{Floats, random};
use device::DType;

const TYPES: [DType; 2] = [DType::F32, DType::Bf16];

#[test]
fn blocks_are_copied_added_and_finished_in_every_mix_of_types() {
    let (rows, cols, lda, ldc) = (131, 37, 50, 41);
    for (ct, at) in TYPES.into_iter().flat_map(|c| TYPES.map(|a| (c, a))) {
        let a = Floats::new(&random(rows * lda, 1), at);
        let c = Floats::new(&random(rows * ldc, 2), ct);
        let bias = Floats::new(&random(cols, 3), at);
        let round = |x: f64| Floats::new(&[x as f32], ct).to_f64()[0];
        let (was, from, b) = (c.to_f64(), a.to_f64(), bias.to_f64());
        let check = |got: &Floats, want: &dyn Fn(usize, usize) -> f64| {
            for (i, got) in got.to_f64().iter().enumerate() {
                let (row, col) = (i / ldc, i % ldc);
                let want = if col < cols { round(want(row, col)) } else { was[i] };
                assert!((got - want).abs() <= 1e-2 * want.abs().max(1.0), "{row} {col}: {got} {want}");
            }
        };
        let mut out = c.clone();
        copy(rows, cols, Mat::new(a.view(), lda), MatMut { data: out.view_mut(), ld: ldc });
        check(&out, &|r, j| from[r * lda + j]);
        let mut out = c.clone();
        add(rows, cols, Mat::new(a.view(), lda), MatMut { data: out.view_mut(), ld: ldc });
        check(&out, &|r, j| was[r * ldc + j] + from[r * lda + j]);
        let mut out = c.clone();
        let (from_a, to_c) = (Mat::new(a.view(), lda), MatMut { data: out.view_mut(), ld: ldc });
        finish(rows, cols, from_a, Some(bias.view()), Some(Mat::new(c.view(), ldc)), to_c);
        check(&out, &|r, j| from[r * lda + j] + b[j] + was[r * ldc + j]);
        let mut out = c.clone();
        let (from_a, to_c) = (Mat::new(a.view(), lda), MatMut { data: out.view_mut(), ld: ldc });
        finish(rows, cols, from_a, Some(bias.view()), None, to_c);
        check(&out, &|r, j| from[r * lda + j] + b[j]);
    }
}
