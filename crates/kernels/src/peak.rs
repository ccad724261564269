//! What products reach on this machine: the measure of a training step's utilisation.

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

fn best(a: View<'_>, b: View<'_>, out: DType) -> f64 {
    let (mut f32s, mut bf16s) = (Vec::new(), Vec::new());
    match out {
        DType::F32 => f32s.resize(SIDE * SIDE, 0f32),
        _ => bf16s.resize(SIDE * SIDE, bf16::ZERO),
    }
    let mut seconds = f64::INFINITY;
    for _ in 0..RUNS {
        let data = match out {
            DType::F32 => ViewMut::of_f32(&mut f32s),
            _ => ViewMut::of_bf16(&mut bf16s),
        };
        let started = Instant::now();
        let (a, b) = (Mat::new(a, SIDE), Mat::new(b, SIDE).t());
        gemm(SIDE, SIDE, SIDE, a, b, MatMut { data, ld: SIDE }, false, Epilogue::default());
        seconds = seconds.min(started.elapsed().as_secs_f64());
    }
    2.0 * (SIDE * SIDE * SIDE) as f64 / seconds / 1e9
}
