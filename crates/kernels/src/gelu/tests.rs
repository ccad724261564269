use super::*;
use crate::testkit::*;
use device::DType;

/// erf by its Taylor series in f64: exact enough for |x| < 4.
fn erf_series(x: f64) -> f64 {
    let (mut term, mut sum) = (x, x);
    for n in 1..200 {
        term *= -x * x / n as f64;
        sum += term / (2 * n + 1) as f64;
    }
    sum * 2.0 / std::f64::consts::PI.sqrt()
}

fn reference(kind: GeluKind, x: f64) -> f64 {
    match kind {
        GeluKind::Tanh => {
            0.5 * x * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x.powi(3))).tanh())
        }
        GeluKind::Erf => 0.5 * x * (1.0 + erf_series(x / 2f64.sqrt())),
    }
}

#[test]
fn both_kinds_agree_with_f64_and_finite_differences() {
    for kind in [GeluKind::Tanh, GeluKind::Erf] {
        for dtype in [DType::F32, DType::Bf16] {
            let x: Vec<f32> = random(1001, 1).iter().map(|x| 4.0 * x).collect();
            let (x, dy) = (Floats::new(&x, dtype), Floats::new(&random(1001, 2), dtype));
            let (mut y, mut dx) = (x.clone(), x.clone());
            forward(kind, x.view(), y.view_mut());
            backward(kind, x.view(), dy.view(), dx.view_mut());
            let of = |x: &[f64]| x.iter().map(|x| reference(kind, *x)).collect::<Vec<_>>();
            let (x, dy) = (x.to_f64(), dy.to_f64());
            assert_close("y", &y.to_f64(), &of(&x), tolerance(dtype));
            let h = 1e-5;
            let want: Vec<f64> = x
                .iter()
                .zip(&dy)
                .map(|(x, dy)| dy * (reference(kind, x + h) - reference(kind, x - h)) / (2.0 * h))
                .collect();
            assert_close("dx", &dx.to_f64(), &want, tolerance(dtype).max(1e-5));
        }
    }
}
