//! GELU (Hendrycks and Gimpel 2016), exact or by its tanh approximation.

mod cpu;
mod cuda;
#[cfg(test)]
mod tests;

use crate::simd::exp;
use device::{Device, View, ViewMut};

/// Which of the two functions called GELU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GeluKind {
    /// x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))): `gelu_new`, `gelu_pytorch_tanh`.
    Tanh,
    /// x/2 (1 + erf(x / sqrt 2)): `gelu`.
    Erf,
}

const SQRT_2_OVER_PI: f32 = 0.797_884_6;

#[inline(always)]
fn tanh(x: f32) -> f32 {
    1.0 - 2.0 / (exp(2.0 * x) + 1.0)
}

/// Abramowitz and Stegun 7.1.26 is too coarse for gradients checked to 1e-5; this is the rational
/// form of Numerical Recipes' erfc (relative error below 1.2e-7).
#[inline(always)]
fn erf(x: f32) -> f32 {
    let z = x.abs();
    let t = 1.0 / (1.0 + 0.5 * z);
    let p = 0.170_872_77f32;
    let p = p * t - 0.822_152_23;
    let p = p * t + 1.488_515_9;
    let p = p * t - 1.135_204;
    let p = p * t + 0.278_868_07;
    let p = p * t - 0.186_288_06;
    let p = p * t + 0.096_784_18;
    let p = p * t + 0.374_091_96;
    let p = p * t + 1.000_023_7;
    let p = p * t - 1.265_512_2;
    let erfc = t * exp(-z * z + p);
    if x < 0.0 { erfc - 1.0 } else { 1.0 - erfc }
}

/// gelu(x).
#[inline(always)]
pub(crate) fn gelu(kind: GeluKind, x: f32) -> f32 {
    match kind {
        GeluKind::Tanh => 0.5 * x * (1.0 + tanh(SQRT_2_OVER_PI * (x + 0.044_715 * x * x * x))),
        GeluKind::Erf => 0.5 * x * (1.0 + erf(x * std::f32::consts::FRAC_1_SQRT_2)),
    }
}

/// d gelu / dx.
#[inline(always)]
pub(crate) fn slope(kind: GeluKind, x: f32) -> f32 {
    match kind {
        GeluKind::Tanh => {
            let t = tanh(SQRT_2_OVER_PI * (x + 0.044_715 * x * x * x));
            let inner = SQRT_2_OVER_PI * (1.0 + 3.0 * 0.044_715 * x * x);
            0.5 * (1.0 + t) + 0.5 * x * (1.0 - t * t) * inner
        }
        GeluKind::Erf => {
            let density = 0.398_942_3 * exp(-0.5 * x * x);
            0.5 * (1.0 + erf(x * std::f32::consts::FRAC_1_SQRT_2)) + x * density
        }
    }
}

/// y = gelu(x), elementwise.
pub fn forward(kind: GeluKind, x: View<'_>, y: ViewMut<'_>) {
    assert_eq!(x.len(), y.len(), "y");
    match x.device() {
        Device::Cpu => cpu::forward(kind, x, y),
        Device::Cuda => cuda::forward(kind, x, y),
    }
}

/// dx = dy * gelu'(x), elementwise.
pub fn backward(kind: GeluKind, x: View<'_>, dy: View<'_>, dx: ViewMut<'_>) {
    assert!(x.len() == dy.len() && x.len() == dx.len(), "gradients");
    match x.device() {
        Device::Cpu => cpu::backward(kind, x, dy, dx),
        Device::Cuda => cuda::backward(kind, x, dy, dx),
    }
}
