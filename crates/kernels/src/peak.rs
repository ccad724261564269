//! What products reach on this machine: the measure of a training step's utilisation.

use crate::adamw::{Hyper, Master};
use crate::gemm::{Epilogue, Mat, MatMut, gemm};
use device::{Buffer, DType, Device, OutOfMemory, View};
use half::bf16;
use std::time::Instant;

/// Sides of the product: each element serves a thousand times. On a CPU its operands stay in cache, on a GPU there
/// is work for all of it.
const fn side(device: Device) -> usize {
    match device {
        Device::Cpu => 1024,
        Device::Cuda => 8192,
    }
}

/// Shortest of so many runs, of so many calls each: on a GPU waiting for one costs as much as a small product.
const RUNS: usize = 8;
const fn calls(device: Device) -> usize {
    match device {
        Device::Cpu => 1,
        Device::Cuda => 8,
    }
}

/// GFLOP/s of our product on a device, with operands and results of `dtype` (f32 accumulation); on the CPU in the
/// pool the caller runs in. Best of several short runs; 0 where there is no memory for it.
pub fn gflops(device: Device, dtype: DType) -> f64 {
    gflops_of(device, dtype, [side(device); 3])
}

/// What the product [m, k] x [n, k]^T reaches, in GFLOP/s: a layer's own shape.
pub fn gflops_of(device: Device, dtype: DType, [m, k, n]: [usize; 3]) -> f64 {
    let seconds = || -> Result<f64, OutOfMemory> {
        let (a, b) = (values(device, dtype, m * k)?, values(device, dtype, n * k)?);
        let mut c = Buffer::new(device, m * n * dtype.size_bytes())?;
        Ok(shortest(device, || {
            let (a, b) = (Mat::new(a.view(dtype, 0, m * k), k), Mat::new(b.view(dtype, 0, n * k), k).t());
            let c = MatMut { data: c.view_mut(dtype, 0, m * n), ld: n };
            gemm(m, n, k, a, b, c, false, Epilogue::default());
        }))
    };
    let seconds = seconds();
    forget();
    seconds.map_or(0.0, |seconds| 2.0 * (m * k * n) as f64 / seconds / 1e9)
}

/// Seconds AdamW takes for a parameter with bf16 weights and f32 moments that lie in no cache: bound by
/// the memory.
pub fn update_seconds(device: Device) -> f64 {
    let len = match device {
        Device::Cpu => 3 << 20,
        Device::Cuda => 64 << 20,
    };
    let seconds = || -> Result<f64, OutOfMemory> {
        let [mut high, mut m, mut v] =
            [DType::Bf16, DType::F32, DType::F32].map(|dtype| values(device, dtype, len));
        let (high, m, v) = (high.as_mut(), m.as_mut(), v.as_mut());
        let (Ok(high), Ok(m), Ok(v)) = (high, m, v) else {
            return Err(OutOfMemory { bytes: 10 * len, device });
        };
        let (grad, mut low) = (values(device, DType::F32, len)?, Buffer::zeroed(device, 2 * len)?);
        let (beta1, beta2, eps, weight_decay, grad_scale) = (0.9, 0.95, 1e-8, 0.1, 1.0);
        let mut step = 0;
        Ok(shortest(device, || {
            step += 1;
            let (high, low) = (high.view_mut(DType::Bf16, 0, len), low.view_mut(DType::U16, 0, len));
            let hyper = Hyper { lr: 1e-3, beta1, beta2, eps, weight_decay, step, grad_scale };
            let (m, v) = (m.view_mut(DType::F32, 0, len), v.view_mut(DType::F32, 0, len));
            crate::adamw::update(Master::Split { high, low }, grad.view(DType::F32, 0, len), m, v, &hyper);
        }))
    };
    let seconds = seconds();
    forget();
    seconds.map_or(f64::INFINITY, |seconds| seconds / len as f64)
}

/// The memory a measurement took is no part of the run that follows.
fn forget() {
    device::release_cached();
    device::reset_peak();
}

/// Seconds of one call.
fn shortest(device: Device, mut call: impl FnMut()) -> f64 {
    let mut seconds = f64::INFINITY;
    for _ in 0..RUNS {
        let started = Instant::now();
        (0..calls(device)).for_each(|_| call());
        if device == Device::Cuda {
            device::cuda::synchronise();
        }
        seconds = seconds.min(started.elapsed().as_secs_f64());
    }
    seconds / calls(device) as f64
}

/// Values of all magnitudes about one: products of zeros draw less power, and so run faster than others.
fn values(device: Device, dtype: DType, len: usize) -> Result<Buffer, OutOfMemory> {
    let value = |i: usize| ((i.wrapping_mul(0x9e37_79b1) >> 8) & 0xffff) as f32 / 65_536.0 - 0.5;
    let mut buffer = Buffer::new(device, len * dtype.size_bytes())?;
    match dtype {
        DType::F32 => {
            let values: Vec<f32> = (0..len).map(value).collect();
            device::copy(buffer.view_mut(dtype, 0, len), View::of_f32(&values));
        }
        _ => {
            let values: Vec<bf16> = (0..len).map(|i| bf16::from_f32(value(i))).collect();
            device::copy(buffer.view_mut(dtype, 0, len), View::of_bf16(&values));
        }
    }
    Ok(buffer)
}
