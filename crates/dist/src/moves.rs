//! Collectives over matrices: rows and columns are gathered, sums are scattered by rows or columns.
//! Flat arrays are what travels; a cut along columns is laid out piece by piece first.

use crate::{Axis, Cut, Mesh, Side};
use kernels::block;
use kernels::gemm::{Mat, MatMut};
use tensor::{DType, Fault, Tensor};

/// The pieces of every rank of `axis`, side by side.
pub(crate) fn gather(mesh: &Mesh, axis: Axis, side: Side, x: &Tensor) -> Result<Tensor, Fault> {
    let ranks = mesh.size(axis);
    let (m, k) = (x.rows(), x.cols());
    let pieces = mesh.group(axis).all_gather_shared(x.view())?;
    let pieces = Tensor::from_buffer(pieces.buffer, x.dtype(), &[ranks * m, k]);
    match side {
        Side::Rows => Ok(pieces),
        Side::Cols => {
            let mut out = Tensor::new(x.device(), x.dtype(), &[m, ranks * k])?;
            for rank in 0..ranks {
                let piece = pieces.view().narrow(rank * m * k, m * k);
                copy_into(&mut out, rank * k, (m, k), Mat::new(piece, k));
            }
            Ok(out)
        }
    }
}

/// The same over every axis of `cut`, innermost first.
pub(crate) fn gather_all(mesh: &Mesh, cut: Cut, side: Side, x: &Tensor) -> Result<Tensor, Fault> {
    cut.axes().rev().try_fold(x.clone(), |x, axis| gather(mesh, axis, side, &x))
}

/// This rank's piece of the sum over `axis`.
pub(crate) fn sum_scatter(mesh: &Mesh, axis: Axis, side: Side, x: &Tensor) -> Result<Tensor, Fault> {
    let ranks = mesh.size(axis);
    let (m, n) = (x.rows(), x.cols());
    match side {
        Side::Rows => {
            assert!(m.is_multiple_of(ranks), "{m} rows over {ranks} ranks");
            let mut out = Tensor::new(x.device(), x.dtype(), &[m / ranks, n])?;
            mesh.group(axis).reduce_scatter_sum(x.view(), out.view_mut())?;
            Ok(out)
        }
        Side::Cols => {
            let pieces = column_pieces(x, ranks)?;
            let mut out = Tensor::new(x.device(), x.dtype(), &[m, n / ranks])?;
            mesh.group(axis).reduce_scatter_sum(pieces.view(), out.view_mut())?;
            Ok(out)
        }
    }
}

/// x [m, n] -> [ranks m, n / ranks]: the columns of each rank as rows, one rank after the other.
pub(crate) fn column_pieces(x: &Tensor, ranks: usize) -> Result<Tensor, Fault> {
    let (m, n) = (x.rows(), x.cols());
    assert!(n.is_multiple_of(ranks), "{n} columns over {ranks} ranks");
    let width = n / ranks;
    let mut pieces = Tensor::new(x.device(), x.dtype(), &[ranks * m, width])?;
    for rank in 0..ranks {
        let from = Mat::new(x.view().narrow(rank * width, x.len() - rank * width), n);
        let to = pieces.view_mut().narrow(rank * m * width, m * width);
        block::copy(m, width, from, MatMut { data: to, ld: width });
    }
    Ok(pieces)
}

/// The same over every axis of `cut`, outermost first.
pub(crate) fn sum_scatter_all(mesh: &Mesh, cut: Cut, side: Side, x: &Tensor) -> Result<Tensor, Fault> {
    cut.axes().try_fold(x.clone(), |x, axis| sum_scatter(mesh, axis, side, &x))
}

/// The sum over every axis of `cut`, on every rank.
pub(crate) fn sum(mesh: &Mesh, cut: Cut, mut x: Tensor) -> Result<Tensor, Fault> {
    if !cut.is_whole() && !x.is_unique() {
        x = x.duplicate()?;
    }
    for axis in cut.axes() {
        mesh.group(axis).all_reduce_sum(x.view_mut())?;
    }
    Ok(x)
}

/// The largest of every element over every axis of `cut`, on every rank. x is f32.
pub(crate) fn max(mesh: &Mesh, cut: Cut, mut x: Tensor) -> Result<Tensor, Fault> {
    for axis in cut.axes() {
        let ranks = mesh.size(axis);
        let len = x.len();
        let mut all = Tensor::new(x.device(), DType::F32, &[ranks, len])?;
        mesh.group(axis).all_gather(x.view(), all.view_mut())?;
        let mut top = Tensor::new(x.device(), DType::F32, x.shape())?;
        device::copy(top.view_mut(), all.view().narrow(0, len));
        for rank in 1..ranks {
            kernels::elementwise::max_assign(top.view_mut(), all.view().narrow(rank * len, len));
        }
        x = top;
    }
    Ok(x)
}

/// Columns `[col, col + cols)` of `out` become a [rows, cols].
pub(crate) fn copy_into(out: &mut Tensor, col: usize, (rows, cols): (usize, usize), a: Mat<'_>) {
    let (ld, len) = (out.cols(), out.len());
    let to = MatMut { data: out.view_mut().narrow(col, len - col), ld };
    block::copy(rows, cols, a, to);
}
