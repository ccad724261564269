//! What products reach on this machine: the measure of a training step's utilisation.

use crate::adamw::{Hyper, Master};
use crate::gemm::{Epilogue, Mat, MatMut, gemm};
use device::{DType, View, ViewMut};
use half::bf16;
use std::time::Instant;

/// Sides of the product: its operands stay in cache, and each element serves a thousand times.
const SIDE: usize = 1024;
const RUNS: usize = 8;

/// f32 GFLOP/s of our own product in the pool the caller runs in, best of several short runs.
pub fn gflops_f32() -> f64 {
    let (a, b) = (vec![0.5f32; SIDE * SIDE], vec![0.25f32; SIDE * SIDE]);
    best(View::of_f32(&a), View::of_f32(&b), DType::F32)
}

/// The same of bf16 operands and results (f32 accumulation).
pub fn gflops_bf16() -> f64 {
    let (a, b) = (vec![bf16::ONE; SIDE * SIDE], vec![bf16::ONE; SIDE * SIDE]);
    best(View::of_bf16(&a), View::of_bf16(&b), DType::Bf16)
}

/// What the product [m, k] x [n, k]^T reaches, in GFLOP/s: a layer's own shape.
pub fn gflops_of(dtype: DType, m: usize, k: usize, n: usize) -> f64 {
    match dtype {
        DType::F32 => {
            let (a, b) = (vec![0.5f32; m * k], vec![0.25f32; n * k]);
            best_of(View::of_f32(&a), View::of_f32(&b), dtype, (m, k, n))
        }
        _ => {
            let (a, b) = (vec![bf16::ONE; m * k], vec![bf16::ONE; n * k]);
            best_of(View::of_bf16(&a), View::of_bf16(&b), dtype, (m, k, n))
        }
    }
}

/// Seconds AdamW takes for a parameter with bf16 weights and f32 moments that lie in no cache: bound by
/// the memory.
pub fn update_seconds() -> f64 {
    const LEN: usize = 3 << 20;
    let (mut high, mut low) = (vec![bf16::ONE; LEN], vec![0u16; LEN]);
    let (grad, mut m, mut v) = (vec![0.5f32; LEN], vec![0f32; LEN], vec![0f32; LEN]);
    let (beta1, beta2, eps, weight_decay, grad_scale) = (0.9, 0.95, 1e-8, 0.1, 1.0);
    let mut seconds = f64::INFINITY;
    for step in 1..=4 {
        let master = Master::Split { high: ViewMut::of_bf16(&mut high), low: ViewMut::of_u16(&mut low) };
        let hyper = Hyper { lr: 1e-3, beta1, beta2, eps, weight_decay, step, grad_scale };
        let started = Instant::now();
        let (m, v) = (ViewMut::of_f32(&mut m), ViewMut::of_f32(&mut v));
        crate::adamw::update(master, View::of_f32(&grad), m, v, &hyper);
        seconds = seconds.min(started.elapsed().as_secs_f64());
    }
    seconds / LEN as f64
}

fn best(a: View<'_>, b: View<'_>, out: DType) -> f64 {
    best_of(a, b, out, (SIDE, SIDE, SIDE))
}

fn best_of(a: View<'_>, b: View<'_>, out: DType, (m, k, n): (usize, usize, usize)) -> f64 {
    let (mut f32s, mut bf16s) = (Vec::new(), Vec::new());
    match out {
        DType::F32 => f32s.resize(m * n, 0f32),
        _ => bf16s.resize(m * n, bf16::ZERO),
    }
    let mut seconds = f64::INFINITY;
    for _ in 0..RUNS {
        let data = match out {
            DType::F32 => ViewMut::of_f32(&mut f32s),
            _ => ViewMut::of_bf16(&mut bf16s),
        };
        let started = Instant::now();
        let (a, b) = (Mat::new(a, k), Mat::new(b, k).t());
        gemm(m, n, k, a, b, MatMut { data, ld: n }, false, Epilogue::default());
        seconds = seconds.min(started.elapsed().as_secs_f64());
    }
    2.0 * (m * k * n) as f64 / seconds / 1e9
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn products_of_any_shape_are_measured() {
        for dtype in [DType::F32, DType::Bf16] {
            assert!(gflops_of(dtype, 96, 64, 160) > 0.0);
        }
    }
}
