use super::*;
use crate::testkit::*;
use device::DType;

fn reference(x: &[f64], f: usize) -> Vec<f64> {
    x.chunks(2 * f).flat_map(|x| (0..f).map(|j| x[j] / (1.0 + (-x[j]).exp()) * x[f + j])).collect()
}

#[test]
fn forward_and_backward_agree_with_the_reference_and_finite_differences() {
    for (m, f) in [(1, 1), (3, 17), (2, 64)] {
        for dtype in [DType::F32, DType::Bf16] {
            let x: Vec<f32> = random(m * 2 * f, 1).iter().map(|x| 5.0 * x).collect();
            let (x, dy) = (Floats::new(&x, dtype), Floats::new(&random(m * f, 2), dtype));
            let (mut y, mut act, mut dx) = (dy.clone(), dy.clone(), x.clone());
            forward(x.view(), f, y.view_mut());
            backward(x.view(), f, dy.view(), dx.view_mut(), Some(act.view_mut()));
            assert_eq!(y.to_f64(), act.to_f64());
            let (x, dy) = (x.to_f64(), dy.to_f64());
            assert_close("y", &y.to_f64(), &reference(&x, f), tolerance(dtype));
            let want = numeric_gradient(&x, &dy, |x| reference(x, f));
            assert_close("dx", &dx.to_f64(), &want, tolerance(dtype).max(1e-5));
        }
    }
}
