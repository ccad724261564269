//! LayerNorm: y = (x - mean) * inv_std * w + b (Ba et al. 2016).

mod cpu;
mod cuda;
#[cfg(test)]
mod tests;

use device::{Device, View, ViewMut};

/// x [M, D], w and b [D] -> y [M, D], mean and inv_std [M] f32.
pub fn forward(
    x: View<'_>,
    w: View<'_>,
    b: View<'_>,
    eps: f32,
    y: ViewMut<'_>,
    mean: ViewMut<'_>,
    inv_std: ViewMut<'_>,
) {
    assert_eq!(x.len(), inv_std.len() * w.len(), "x is [{}, {}]", inv_std.len(), w.len());
    assert!(x.len() == y.len() && mean.len() == inv_std.len() && b.len() == w.len());
    match x.device() {
        Device::Cpu => cpu::forward(x, w, b, eps, y, mean, inv_std),
        Device::Cuda => cuda::forward(x, w, b, eps, y, mean, inv_std),
    }
}

/// dx [M, D] = `carried` + the norm's way back; dw and db [D] f32 are added to.
pub fn backward(
    x: View<'_>,
    w: View<'_>,
    mean: View<'_>,
    inv_std: View<'_>,
    dy: View<'_>,
    carried: Option<View<'_>>,
    dx: ViewMut<'_>,
    dw: ViewMut<'_>,
    db: ViewMut<'_>,
) {
    assert_eq!(x.len(), inv_std.len() * w.len(), "x is [{}, {}]", inv_std.len(), w.len());
    assert!(x.len() == dy.len() && x.len() == dx.len() && dw.len() == w.len() && db.len() == w.len());
    match x.device() {
        Device::Cpu => cpu::backward(x, w, mean, inv_std, dy, carried, dx, dw, db),
        Device::Cuda => cuda::backward(x, w, mean, inv_std, dy, carried, dx, dw, db),
    }
}
