//! C = A B with fused epilogues: the product everything else waits for.
//!
//! Accumulation is in f32 whatever the operands; a partial sum is never rounded to bf16. Operands
//! are f32 or bf16 in any mix; two bf16 operands use bf16 dot products where the machine has them.
//! The work is cut by shape alone, so the bits do not depend on the number of threads.

#[cfg(target_arch = "x86_64")]
mod amx;
mod cpu;
mod cuda;
mod gemv;
mod micro;
pub(crate) mod pack;
#[cfg(test)]
mod reference;
#[cfg(test)]
mod tests;
pub(crate) mod tile;

use crate::gelu::GeluKind;
use device::{Device, View, ViewMut};

/// A matrix in row-major storage with leading dimension `ld`: element (i, j) is `data[i*ld + j]`,
/// or `data[j*ld + i]` when `transposed`.
#[derive(Clone, Copy)]
pub struct Mat<'a> {
    /// The elements.
    pub data: View<'a>,
    /// Elements from one stored row to the next.
    pub ld: usize,
    /// Whether the logical matrix is the transpose of the stored one.
    pub transposed: bool,
}

impl<'a> Mat<'a> {
    /// A stored matrix as it lies.
    pub fn new(data: View<'a>, ld: usize) -> Mat<'a> {
        Mat { data, ld, transposed: false }
    }

    /// Its transpose; nothing moves.
    pub fn t(self) -> Mat<'a> {
        Mat { transposed: !self.transposed, ..self }
    }

    fn check(&self, what: &str, rows: usize, cols: usize) {
        let (outer, inner) = if self.transposed { (cols, rows) } else { (rows, cols) };
        assert!(inner <= self.ld, "{what}: {inner} columns in rows of {}", self.ld);
        let need = if outer == 0 { 0 } else { (outer - 1) * self.ld + inner };
        assert!(need <= self.data.len(), "{what}: needs {need} elements of {}", self.data.len());
    }
}

/// A matrix to write, row-major with leading dimension `ld`.
pub struct MatMut<'a> {
    /// The elements.
    pub data: ViewMut<'a>,
    /// Elements from one row to the next.
    pub ld: usize,
}

/// What happens to a tile of the product while it is still in cache.
#[derive(Default)]
pub struct Epilogue<'a> {
    /// Added to every row. [n]
    pub bias: Option<View<'a>>,
    /// Added after the bias. [m, n]
    pub residual: Option<Mat<'a>>,
    /// The sum so far is stored here [m, n] and the GELU of what is stored is the output.
    pub gelu: Option<(GeluKind, ViewMut<'a>)>,
}

impl Epilogue<'_> {
    fn is_empty(&self) -> bool {
        self.bias.is_none() && self.residual.is_none() && self.gelu.is_none()
    }
}

/// c [m, n] = epilogue(a [m, k] b [k, n] + (c when `accumulate`)).
pub fn gemm(
    m: usize,
    n: usize,
    k: usize,
    a: Mat<'_>,
    b: Mat<'_>,
    c: MatMut<'_>,
    accumulate: bool,
    epilogue: Epilogue<'_>,
) {
    a.check("a", m, k);
    b.check("b", k, n);
    assert!(n <= c.ld && (m == 0 || (m - 1) * c.ld + n <= c.data.len()), "c [{m}, {n}] does not fit");
    if let Some(bias) = &epilogue.bias {
        assert_eq!(bias.len(), n, "bias");
    }
    if let Some(residual) = &epilogue.residual {
        assert!(!residual.transposed, "a residual lies as the output does");
        residual.check("residual", m, n);
    }
    if let Some((_, pre)) = &epilogue.gelu {
        assert!(pre.len() >= m * n, "pre-activation");
    }
    match c.data.device() {
        Device::Cpu => cpu::gemm(device::Isa::active(), (m, n, k), a, b, c, accumulate, epilogue),
        Device::Cuda => cuda::gemm((m, n, k), a, b, c, accumulate, epilogue),
    }
}
