//! The library computes c = a b + bias + added in one launch where types allow. Anything else has its sums in
//! the workspace, in f32, and a kernel finishes them as the CPU does, rounding once.

use super::{Epilogue, Mat, MatMut};
use crate::cuda::{launch, matmul, workspace};
use crate::gelu::{self, GeluKind};
use device::cuda::{Address, Matmul, Matrix};
use device::{DType, View};

/// Columns of a row for each block of our kernels, and its threads.
const COLUMNS: usize = 1024;
const THREADS: usize = 256;

/// Rows in the workspace begin where 16 bytes can be loaded at once; so must a bias that the library adds.
const ALIGN_BYTES: usize = 16;
const ALIGN_FLOATS: usize = ALIGN_BYTES / size_of::<f32>();

pub(super) fn gemm(
    (m, n, k): (usize, usize, usize),
    a: Mat<'_>,
    b: Mat<'_>,
    c: MatMut<'_>,
    accumulate: bool,
    epilogue: Epilogue<'_>,
) {
    if m == 0 || n == 0 {
        return;
    }
    let Epilogue { bias, residual, gelu } = &epilogue;
    let into = Matrix { at: c.data.address(), dtype: c.data.dtype(), ld: c.ld, transposed: false };
    let sum = match gelu {
        Some((_, pre)) => Matrix { at: pre.address(), dtype: pre.dtype(), ld: n, transposed: false },
        None => into,
    };
    let factor = if a.data.dtype() == b.data.dtype() { a.data.dtype() } else { DType::F32 };
    let fits = |dtype: DType| dtype == sum.dtype;
    let bias_fits = |bias: View<'_>| fits(bias.dtype()) && bias.address().is_multiple_of(ALIGN_BYTES as u64);
    let added = [accumulate.then_some(into), residual.map(matrix)];
    let in_one_launch = k > 0
        && (factor == DType::Bf16 || sum.dtype == DType::F32)
        && bias.is_none_or(bias_fits)
        && added.iter().flatten().count() <= 1
        && added.iter().flatten().all(|added| fits(added.dtype))
        // The op that takes the GELU knows no rows.
        && (gelu.is_none() || fits(into.dtype) && into.ld == n);

    let ld = n.next_multiple_of(ALIGN_FLOATS);
    let sums_bytes = if in_one_launch || k == 0 { 0 } else { m * ld * size_of::<f32>() };
    let (a, b) = (Operand::new(a, (m, k), factor), Operand::new(b, (k, n), factor));
    let sums = workspace(sums_bytes + a.bytes() + b.bytes());
    let a_at = sums + sums_bytes as u64;
    let (a, b) = (a.ready(a_at), b.ready(a_at + a.bytes() as u64));
    if in_one_launch {
        let (bias, added) = (bias.map(|bias| bias.address()), added.into_iter().flatten().next());
        matmul(&Matmul { m, n, k, a, b, c: sum, bias, added });
        if let Some((kind, pre)) = gelu {
            gelu::forward(*kind, pre.as_view().narrow(0, m * n), c.data.narrow(0, m * n));
        }
        return;
    }
    let sums = Matrix { at: sums, dtype: DType::F32, ld, transposed: false };
    if k > 0 {
        matmul(&Matmul { m, n, k, a, b, c: sums, bias: None, added: None });
    }
    finish((m, n), (k > 0).then_some(sums), c, accumulate, epilogue);
}

/// c [m, n] = epilogue(sums + (c when `accumulate`)).
fn finish(
    (m, n): (usize, usize),
    sums: Option<Matrix>,
    c: MatMut<'_>,
    accumulate: bool,
    epilogue: Epilogue<'_>,
) {
    let Epilogue { bias, residual, gelu } = &epilogue;
    let is_f32 = |dtype: DType| usize::from(dtype == DType::F32);
    let (pre, kind) = gelu.as_ref().map_or((None, GeluKind::Erf), |(kind, pre)| (Some(pre), *kind));
    launch("gemm_finish")
        .grid(m * n.div_ceil(COLUMNS))
        .threads(THREADS)
        .address(sums.map_or(0, |sums| sums.at))
        .u64(sums.map_or(0, |sums| sums.ld))
        .optional(*bias)
        .u32(bias.map_or(0, |bias| is_f32(bias.dtype())))
        .optional(residual.map(|residual| residual.data))
        .u32(residual.map_or(0, |residual| is_f32(residual.data.dtype())))
        .u64(residual.map_or(0, |residual| residual.ld))
        .optional_write(pre)
        .u32(pre.map_or(0, |pre| is_f32(pre.dtype())))
        .u32(usize::from(kind == GeluKind::Tanh))
        .write(&c.data)
        .u32(is_f32(c.data.dtype()))
        .u64(c.ld)
        .u32(usize::from(accumulate))
        .u32(n)
        .run();
}

fn matrix(x: Mat<'_>) -> Matrix {
    Matrix { at: x.data.address(), dtype: x.data.dtype(), ld: x.ld, transposed: x.transposed }
}

/// A factor, and how it is made f32 where the other one is.
struct Operand<'a> {
    x: Mat<'a>,
    /// Rows and columns as stored, and the length of a widened row.
    widened: Option<(usize, usize, usize)>,
}

impl<'a> Operand<'a> {
    fn new(x: Mat<'a>, (rows, cols): (usize, usize), dtype: DType) -> Operand<'a> {
        let (rows, cols) = if x.transposed { (cols, rows) } else { (rows, cols) };
        let widened = (x.data.dtype() != dtype).then(|| (rows, cols, cols.next_multiple_of(ALIGN_FLOATS)));
        Operand { x, widened }
    }

    /// Of the workspace.
    fn bytes(&self) -> usize {
        self.widened.map_or(0, |(rows, _, ld)| rows * ld * size_of::<f32>())
    }

    /// The matrix, widened to `at` where need be.
    fn ready(&self, at: Address) -> Matrix {
        let Some((rows, cols, ld)) = self.widened else { return matrix(self.x) };
        launch("gemm_widen")
            .grid(rows * cols.div_ceil(COLUMNS))
            .threads(THREADS)
            .read(self.x.data)
            .u64(self.x.ld)
            .address(at)
            .u64(ld)
            .u32(cols)
            .run();
        Matrix { at, dtype: DType::F32, ld, transposed: self.x.transposed }
    }
}
