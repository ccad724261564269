//! Random data and checks shared by the tests of ops.

use device::{DType, View, ViewMut};
use half::bf16;

/// Reproducible values in (-1, 1).
pub(crate) fn random(len: usize, seed: u32) -> Vec<f32> {
    let mut state = seed.wrapping_mul(2_654_435_761) | 1;
    (0..len)
        .map(|_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 23) as f32 - 1.0
        })
        .collect()
}

/// A float array of either type.
#[derive(Clone)]
pub(crate) enum Floats {
    F32(Vec<f32>),
    Bf16(Vec<bf16>),
}

impl Floats {
    pub(crate) fn new(values: &[f32], dtype: DType) -> Floats {
        match dtype {
            DType::F32 => Floats::F32(values.to_vec()),
            _ => Floats::Bf16(values.iter().map(|x| bf16::from_f32(*x)).collect()),
        }
    }

    pub(crate) fn view(&self) -> View<'_> {
        match self {
            Floats::F32(data) => View::of_f32(data),
            Floats::Bf16(data) => View::of_bf16(data),
        }
    }

    pub(crate) fn view_mut(&mut self) -> ViewMut<'_> {
        match self {
            Floats::F32(data) => ViewMut::of_f32(data),
            Floats::Bf16(data) => ViewMut::of_bf16(data),
        }
    }

    pub(crate) fn to_f64(&self) -> Vec<f64> {
        match self {
            Floats::F32(data) => data.iter().map(|x| *x as f64).collect(),
            Floats::Bf16(data) => data.iter().map(|x| x.to_f64()).collect(),
        }
    }
}

/// Every element within `tol` of the largest wanted magnitude (plus bf16's rounding, if any).
pub(crate) fn assert_close(what: &str, got: &[f64], want: &[f64], tol: f64) {
    assert_eq!(got.len(), want.len(), "{what}");
    let size = want.iter().fold(1e-3f64, |m, x| m.max(x.abs()));
    for (i, (got, want)) in got.iter().zip(want).enumerate() {
        assert!((got - want).abs() <= tol * size, "{what}[{i}]: {got} for {want} (scale {size})");
    }
}

/// Relative tolerance of one rounding to the type, on top of f32 arithmetic.
pub(crate) fn tolerance(dtype: DType) -> f64 {
    match dtype {
        DType::F32 => 2e-6,
        _ => 1.0 / 128.0,
    }
}

/// d loss / d x by central differences, in f64, where loss = sum(f(x) * dy).
pub(crate) fn numeric_gradient(x: &[f64], dy: &[f64], f: impl Fn(&[f64]) -> Vec<f64>) -> Vec<f64> {
    let h = 1e-5;
    let loss = |x: &[f64]| f(x).iter().zip(dy).map(|(y, d)| y * d).sum::<f64>();
    let mut x = x.to_vec();
    (0..x.len())
        .map(|i| {
            let keep = x[i];
            x[i] = keep + h;
            let up = loss(&x);
            x[i] = keep - h;
            let down = loss(&x);
            x[i] = keep;
            (up - down) / (2.0 * h)
        })
        .collect()
}
