//! RMSNorm: y = x * inv_rms * w, inv_rms = 1 / sqrt(mean(x^2) + eps) (Zhang and Sennrich 2019).

mod cpu;
mod cuda;
#[cfg(test)]
mod tests;

use device::{Device, View, ViewMut};

/// x [M, D], w [D] -> y [M, D] and inv_rms [M] f32. y has x's type; w may be f32 or x's type.
pub fn forward(x: View<'_>, w: View<'_>, eps: f32, y: ViewMut<'_>, inv_rms: ViewMut<'_>) {
    assert_eq!(x.len(), inv_rms.len() * w.len(), "x is [{}, {}]", inv_rms.len(), w.len());
    assert_eq!(x.len(), y.len(), "y");
    match x.device() {
        Device::Cpu => cpu::forward(x, w, eps, y, inv_rms),
        Device::Cuda => cuda::forward(x, w, eps, y, inv_rms),
    }
}

/// dx [M, D] = `carried` + the norm's way back; dw [D] f32 is added to.
/// `carried` is the gradient of the residual stream that forked before the norm.
pub fn backward(
    x: View<'_>,
    w: View<'_>,
    inv_rms: View<'_>,
    dy: View<'_>,
    carried: Option<View<'_>>,
    dx: ViewMut<'_>,
    dw: ViewMut<'_>,
) {
    assert_eq!(x.len(), inv_rms.len() * w.len(), "x is [{}, {}]", inv_rms.len(), w.len());
    assert!(x.len() == dy.len() && x.len() == dx.len() && dw.len() == w.len(), "gradients");
    match x.device() {
        Device::Cpu => cpu::backward(x, w, inv_rms, dy, carried, dx, dw),
        Device::Cuda => cuda::backward(x, w, inv_rms, dy, carried, dx, dw),
    }
}
