use super::*;
use crate::testkit::*;
use device::{DType, Threads};

fn reference(x: &[f64], w: &[f64], eps: f64) -> Vec<f64> {
    x.chunks(w.len())
        .flat_map(|x| {
            let inv = 1.0 / (x.iter().map(|x| x * x).sum::<f64>() / w.len() as f64 + eps).sqrt();
            x.iter().zip(w).map(move |(x, w)| x * inv * w).collect::<Vec<_>>()
        })
        .collect()
}

#[test]
fn forward_and_backward_agree_with_the_reference_and_finite_differences() {
    for (m, d) in [(1, 1), (3, 7), (5, 32), (2, 65), (4, 130)] {
        for dtype in [DType::F32, DType::Bf16] {
            let x = Floats::new(&random(m * d, 1), dtype);
            let w = Floats::new(&random(d, 2), dtype);
            let dy = Floats::new(&random(m * d, 3), dtype);
            let carried = Floats::new(&random(m * d, 4), dtype);
            let (mut y, mut dx) = (x.clone(), x.clone());
            let (mut inv, mut dw) = (vec![0f32; m], vec![1f32; d]);
            forward(x.view(), w.view(), 1e-5, y.view_mut(), ViewMut::of_f32(&mut inv));
            let (inv, dw_view) = (View::of_f32(&inv), ViewMut::of_f32(&mut dw));
            backward(x.view(), w.view(), inv, dy.view(), Some(carried.view()), dx.view_mut(), dw_view);
            let (x, w, dy) = (x.to_f64(), w.to_f64(), dy.to_f64());
            let tol = tolerance(dtype);
            assert_close("y", &y.to_f64(), &reference(&x, &w, 1e-5), tol);
            let mut want = numeric_gradient(&x, &dy, |x| reference(x, &w, 1e-5));
            want.iter_mut().zip(carried.to_f64()).for_each(|(g, c)| *g += c);
            assert_close("dx", &dx.to_f64(), &want, tol.max(1e-5));
            let want = numeric_gradient(&w, &dy, |w| reference(&x, w, 1e-5));
            let want: Vec<f64> = want.iter().map(|g| g + 1.0).collect();
            assert_close("dw", &dw.iter().map(|x| *x as f64).collect::<Vec<_>>(), &want, 1e-5);
        }
    }
}

#[test]
fn weight_gradients_have_the_same_bits_on_any_number_of_threads() {
    let (m, d) = (3001, 48);
    let (x, dy, w) = (random(m * d, 1), random(m * d, 2), random(d, 3));
    let on = |threads| {
        Threads::new(threads).unwrap().run(|| {
            let (mut dx, mut dw, inv) = (vec![0f32; m * d], vec![0f32; d], vec![0.7f32; m]);
            let view = View::of_f32;
            let (dx_view, dw_view) = (ViewMut::of_f32(&mut dx), ViewMut::of_f32(&mut dw));
            backward(view(&x), view(&w), view(&inv), view(&dy), None, dx_view, dw_view);
            (dx, dw)
        })
    };
    assert!(on(1) == on(2) && on(1) == on(3));
}
