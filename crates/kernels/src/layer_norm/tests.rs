use super::*;
use crate::testkit::*;
use device::DType;

fn reference(x: &[f64], w: &[f64], b: &[f64], eps: f64) -> Vec<f64> {
    let d = w.len();
    x.chunks(d)
        .flat_map(|x| {
            let mean = x.iter().sum::<f64>() / d as f64;
            let var = x.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / d as f64;
            (0..d).map(|j| (x[j] - mean) / (var + eps).sqrt() * w[j] + b[j]).collect::<Vec<_>>()
        })
        .collect()
}

#[test]
fn forward_and_backward_agree_with_the_reference_and_finite_differences() {
    for (m, d) in [(3, 7), (5, 32), (2, 65)] {
        for dtype in [DType::F32, DType::Bf16] {
            for with_carried in [false, true] {
                let new = |len, seed| Floats::new(&random(len, seed), dtype);
                let (x, w, b, dy) = (new(m * d, 1), new(d, 2), new(d, 3), new(m * d, 4));
                let carried = new(m * d, 5);
                let (mut y, mut dx) = (x.clone(), x.clone());
                let (mut mean, mut inv) = (vec![0f32; m], vec![0f32; m]);
                let (mut dw, mut db) = (vec![0f32; d], vec![0f32; d]);
                let stats = (ViewMut::of_f32(&mut mean), ViewMut::of_f32(&mut inv));
                forward(x.view(), w.view(), b.view(), 1e-5, y.view_mut(), stats.0, stats.1);
                backward(
                    x.view(),
                    w.view(),
                    View::of_f32(&mean),
                    View::of_f32(&inv),
                    dy.view(),
                    with_carried.then(|| carried.view()),
                    dx.view_mut(),
                    ViewMut::of_f32(&mut dw),
                    ViewMut::of_f32(&mut db),
                );
                let (x, w, b, dy) = (x.to_f64(), w.to_f64(), b.to_f64(), dy.to_f64());
                let tol = tolerance(dtype);
                assert_close("y", &y.to_f64(), &reference(&x, &w, &b, 1e-5), tol);
                let mut want = numeric_gradient(&x, &dy, |x| reference(x, &w, &b, 1e-5));
                if with_carried {
                    want.iter_mut().zip(carried.to_f64()).for_each(|(g, c)| *g += c);
                }
                assert_close("dx", &dx.to_f64(), &want, tol.max(1e-5));
                let f64s = |x: &[f32]| x.iter().map(|x| *x as f64).collect::<Vec<_>>();
                let want = numeric_gradient(&w, &dy, |w| reference(&x, w, &b, 1e-5));
                assert_close("dw", &f64s(&dw), &want, 1e-5);
                let want = numeric_gradient(&b, &dy, |b| reference(&x, &w, b, 1e-5));
                assert_close("db", &f64s(&db), &want, 1e-5);
            }
        }
    }
}
