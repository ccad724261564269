//! RMSNorm and LayerNorm of rows whose columns are cut among ranks, in two halves: sums over the
//! columns at hand, which the ranks then add up, and what follows from the sums of whole rows.
//!
//! y = (x - mean) * inv * w + b; RMSNorm has no mean and no b. Columns from `valid` on are padding.

mod cpu;
mod cuda;
#[cfg(test)]
mod tests;

use device::{Device, View, ViewMut};

/// What of a row is summed.
#[derive(Clone, Copy)]
pub enum Sum<'a> {
    /// x
    Values,
    /// x^2
    Squares,
    /// (x - mean)^2 for the means [M] of the rows.
    Deviations(View<'a>),
}

/// A norm of rows of D columns, of which `valid` are there.
#[derive(Clone, Copy)]
pub struct Rows<'a> {
    /// [M, D]
    pub x: View<'a>,
    /// [D]
    pub w: View<'a>,
    /// Mean of each row, of LayerNorm. [M] f32
    pub mean: Option<View<'a>>,
    /// Inverse root mean square, or inverse standard deviation. [M] f32
    pub inv: View<'a>,
    /// Columns that are not padding.
    pub valid: usize,
}

impl Rows<'_> {
    fn check(&self) {
        let (m, d) = (self.inv.len(), self.w.len());
        assert_eq!(self.x.len(), m * d, "x is [{m}, {d}]");
        assert!(self.valid <= d && self.mean.is_none_or(|mean| mean.len() == m), "statistics");
    }
}

/// out [M] f32 = sums over the first `valid` of D columns of each row of x [M, D].
pub fn sums(x: View<'_>, sum: Sum<'_>, valid: usize, out: ViewMut<'_>) {
    if out.is_empty() {
        return;
    }
    let d = x.len() / out.len();
    assert!(x.len() == d * out.len() && valid <= d, "x is [{}, {d}]", out.len());
    match x.device() {
        Device::Cpu => cpu::sums(x, sum, valid, out),
        Device::Cuda => cuda::sums(x, sum, valid, out),
    }
}

/// x f32 = 1 / sqrt(x + eps): means of squares become inverse roots.
pub fn invert(x: ViewMut<'_>, eps: f32) {
    match x.device() {
        Device::Cpu => x.f32().iter_mut().for_each(|x| *x = 1.0 / (*x + eps).sqrt()),
        Device::Cuda => cuda::invert(x, eps),
    }
}

/// y [M, D] of x by the statistics of whole rows; b [D] of LayerNorm.
pub fn apply(rows: Rows<'_>, b: Option<View<'_>>, y: ViewMut<'_>) {
    rows.check();
    assert_eq!(rows.x.len(), y.len(), "y");
    match rows.x.device() {
        Device::Cpu => cpu::apply(rows, b, y),
        Device::Cuda => cuda::apply(rows, b, y),
    }
}

/// out [M, 2] f32 = sums over the columns of dy * w and of dy * w * normed, normed being
/// (x - mean) * inv.
pub fn backward_sums(rows: Rows<'_>, dy: View<'_>, out: ViewMut<'_>) {
    rows.check();
    assert!(rows.x.len() == dy.len() && out.len() == 2 * rows.inv.len(), "sums");
    match rows.x.device() {
        Device::Cpu => cpu::backward_sums(rows, dy, out),
        Device::Cuda => cuda::backward_sums(rows, dy, out),
    }
}

/// dx [M, D] = `carried` + (dy w - s0 - normed s1) inv, where [s0, s1] are the sums of whole rows
/// [M, 2] over their width; without a mean s0 counts as 0. dw and db [D] f32 are added to.
pub fn backward(
    rows: Rows<'_>,
    sums: View<'_>,
    dy: View<'_>,
    carried: Option<View<'_>>,
    dx: ViewMut<'_>,
    dw: ViewMut<'_>,
    db: Option<ViewMut<'_>>,
) {
    rows.check();
    assert!(rows.x.len() == dy.len() && dx.len() == dy.len() && sums.len() == 2 * rows.inv.len());
    assert!(dw.len() == rows.w.len() && db.as_ref().is_none_or(|db| db.len() == dw.len()), "gradients");
    match rows.x.device() {
        Device::Cpu => cpu::backward(rows, sums, (dy, carried), dx, dw, db),
        Device::Cuda => cuda::backward(rows, sums, (dy, carried), dx, dw, db),
    }
}
