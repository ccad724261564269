use super::*;
use crate::testkit::*;
use device::DType;

fn reference(x: &[f64], wq: &[f64], wk: &[f64], heads: Heads) -> Vec<f64> {
    let mut y = x.to_vec();
    for row in y.chunks_mut(heads.width()) {
        for (i, head) in row.chunks_mut(heads.h).enumerate().take(heads.n + heads.k) {
            let inv = 1.0 / (head.iter().map(|x| x * x).sum::<f64>() / heads.h as f64 + 1e-6).sqrt();
            let w = if i < heads.n { wq } else { wk };
            head.iter_mut().zip(w).for_each(|(x, w)| *x *= inv * w);
        }
    }
    y
}

#[test]
fn forward_and_backward_agree_with_the_reference_and_finite_differences() {
    for (m, heads) in [(3, Heads { n: 4, k: 2, h: 10 }), (2, Heads { n: 1, k: 1, h: 33 })] {
        for dtype in [DType::F32, DType::Bf16] {
            let new = |len, seed| Floats::new(&random(len, seed), dtype);
            let len = m * heads.width();
            let (x, wq, wk, dy) = (new(len, 1), new(heads.h, 2), new(heads.h, 3), new(len, 4));
            let (mut y, mut dx) = (x.clone(), x.clone());
            let mut inv = vec![0f32; m * (heads.n + heads.k)];
            let (mut dwq, mut dwk) = (vec![0f32; heads.h], vec![0f32; heads.h]);
            let inv_out = ViewMut::of_f32(&mut inv);
            forward(x.view(), wq.view(), wk.view(), heads, 1e-6, y.view_mut(), inv_out);
            let (dwq_out, dwk_out) = (ViewMut::of_f32(&mut dwq), ViewMut::of_f32(&mut dwk));
            let inv = View::of_f32(&inv);
            backward(x.view(), wq.view(), wk.view(), inv, heads, dy.view(), dx.view_mut(), dwq_out, dwk_out);
            let (x, wq, wk, dy) = (x.to_f64(), wq.to_f64(), wk.to_f64(), dy.to_f64());
            let tol = tolerance(dtype);
            assert_close("y", &y.to_f64(), &reference(&x, &wq, &wk, heads), tol);
            let want = numeric_gradient(&x, &dy, |x| reference(x, &wq, &wk, heads));
            assert_close("dx", &dx.to_f64(), &want, tol.max(1e-5));
            let f64s = |x: &[f32]| x.iter().map(|x| *x as f64).collect::<Vec<_>>();
            let want = numeric_gradient(&wq, &dy, |wq| reference(&x, wq, &wk, heads));
            assert_close("dwq", &f64s(&dwq), &want, 1e-5);
            let want = numeric_gradient(&wk, &dy, |wk| reference(&x, &wq, wk, heads));
            assert_close("dwk", &f64s(&dwk), &want, 1e-5);
        }
    }
}
