//! Tables [V, D] by token: the embedding, and the head with its loss, on any mesh.
//!
//! The rows of a table are cut over the axes that cut widths (`slices`), and in storage once more
//! over the axes that cut tokens (`stored`), so that no element lies on two ranks of a mesh of
//! tensor axes. A rank looks up its tokens in its slice; the summands of a token are added up where
//! its columns belong. The head multiplies a token by each slice, and the ranks of a token share the
//! maxima and sums of its softmax.

use crate::moves::{gather_all, max, sum, sum_scatter_all};
use crate::slices::Slices;
use crate::{Axis, Cut, Dim, Flow, Held, Mesh, Side};
use kernels::cross_entropy::{self, IGNORE, cut};
use kernels::embedding;
use kernels::gemm::{Epilogue, Mat, MatMut, gemm};
use std::sync::Arc;
use tensor::{DType, Fault, ParamRef, Tape, Targets, Tensor, Var};

/// Tokens whose logits are held at a time, as in the local loss.
const SLICE_TOKENS: usize = 256;

/// How a table lies, and where the tokens are that it serves.
#[derive(Clone, Debug)]
pub struct Table {
    mesh: Mesh,
    /// What a product sees of the rows, and how they are stored.
    pub rows: Held,
    /// Columns, whole, padded to the pieces of the residual stream.
    pub cols: Held,
    /// What becomes of the summands of a token.
    slices: Slices,
}

impl Table {
    /// A table of `rows` rows for the residual stream of `flow`, which is `width` wide.
    pub fn new(flow: &Flow, rows: usize, width: usize) -> Table {
        let outer = flow.outer;
        let slices = Slices::new(flow);
        let token_axes: Vec<Axis> = outer.rows.axes().filter(|axis| !slices.cut.has(*axis)).collect();
        let stored = Cut::over(&flow.mesh, &token_axes);
        let rows = Held { dim: Dim::plain(rows), order: slices.cut, cut: slices.cut, stored };
        let cols = Held { dim: Dim::plain(width), order: outer.cols, cut: Cut::WHOLE, stored: Cut::WHOLE };
        Table { mesh: flow.mesh.clone(), rows, cols, slices }
    }

    /// Tokens of whose rows this rank looks up its slice, and of which it computes logits.
    pub fn tokens(&self) -> Cut {
        self.rows.stored
    }

    fn is_local(&self) -> bool {
        self.rows.cut.is_whole() && self.rows.stored.is_whole()
    }

    /// (first row, rows) of this rank's slice, without padding.
    fn slice(&self) -> (usize, usize) {
        let (each, v) = (self.rows.local_len(&self.mesh), self.rows.dim.len());
        let first = (self.rows.cut.index(&self.mesh) * each).min(v);
        (first, each.min(v - first))
    }

    /// `ids` as rows of this rank's slice.
    fn local_ids(&self, ids: &[u32], keep: Option<u32>, elsewhere: u32) -> Vec<u32> {
        let (first, valid) = self.slice();
        let here = first as u32..(first + valid) as u32;
        let local = |id: &u32| match *id {
            id if Some(id) == keep => id,
            id if here.contains(&id) => id - here.start,
            _ => elsewhere,
        };
        ids.iter().map(local).collect()
    }

    /// This rank's slice [V', D], gathered from where it is stored.
    fn gathered(&self, tape: &Tape<'_>, param: ParamRef) -> Result<Tensor, Fault> {
        let mut piece =
            Tensor::new(tape.params.device(), tape.params.dtype(), &tape.params.spec(param).shape)?;
        kernels::elementwise::copy(piece.view_mut(), tape.params.weight(param));
        let whole = gather_all(&self.mesh, self.rows.stored, Side::Rows, &piece)?;
        Ok(whole.narrow_rows(0, self.rows.local_len(&self.mesh)))
    }

    /// Rows of gradients of a slice as it is gathered, padding of the storage included.
    fn gathered_rows(&self) -> usize {
        self.rows.stored_len(&self.mesh) * self.rows.stored.pieces(&self.mesh)
    }

    fn add_to_grad(&self, tape: &mut Tape<'_>, param: ParamRef, slice: &Tensor) -> Result<(), Fault> {
        let piece = sum_scatter_all(&self.mesh, self.rows.stored, Side::Rows, slice)?;
        let grad = tape.params.added_grad(param);
        kernels::elementwise::add_assign(grad, piece.view());
        Ok(())
    }
}

/// Sum over `lookups` of table[ids]: ids of the tokens `Table::tokens` leaves to this rank, and the
/// output as the residual stream lies.
pub fn embed(tape: &mut Tape<'_>, lookups: &[(Arc<[u32]>, ParamRef, &Table)]) -> Result<Var, Fault> {
    let (ids, _, table) = &lookups[0];
    if lookups.iter().all(|(_, _, table)| table.is_local()) {
        let plain: Vec<_> = lookups.iter().map(|(ids, param, _)| (ids.clone(), *param)).collect();
        return tape.embedding(&plain);
    }
    let params: Vec<ParamRef> = lookups.iter().map(|(_, param, _)| *param).collect();
    tape.moment("embed_cut", &params)?;
    let d = table.cols.local_len(&table.mesh);
    let mut x = Tensor::new(tape.params.device(), tape.params.dtype(), &[ids.len(), d])?;
    let mut saved = Vec::with_capacity(lookups.len());
    for (i, (ids, param, table)) in lookups.iter().enumerate() {
        let local = table.local_ids(ids, None, embedding::ELSEWHERE);
        embedding::forward(&local, table.gathered(tape, *param)?.view(), d, x.view_mut(), i > 0);
        saved.push((local, *param, (*table).clone()));
    }
    let x = table.slices.leave(x)?;
    Ok(tape.outside(&[], x, move |tape, dy| {
        tape.moment("embed_cut", &params)?;
        let dy = saved[0].2.slices.enter(&dy)?;
        for (local, param, table) in &saved {
            let mut slice = Tensor::zeros(dy.device(), DType::F32, &[table.gathered_rows(), dy.cols()])?;
            embedding::backward(local, dy.view(), dy.cols(), slice.view_mut());
            table.add_to_grad(tape, *param, &slice)?;
        }
        Ok(Vec::new())
    }))
}

/// Losses in nats of all tokens of the tensor axes, in their order: x is the residual stream,
/// targets are of the tokens `Table::tokens` leaves to this rank. [M] f32. On a recording tape this
/// is also where the backward pass will begin.
pub fn head_loss(
    tape: &mut Tape<'_>,
    table: &Table,
    x: &Var,
    head: ParamRef,
    targets: Targets<'_>,
) -> Result<Tensor, Fault> {
    if table.is_local() {
        return tape.head_loss(x, head, targets);
    }
    tape.moment_with_grads("head_loss_cut", &[head], tape.is_recording())?;
    let rows = table.slices.enter(&x.value)?;
    let w = table.gathered(tape, head)?;
    let mut slice = HeadSlice::new(table, rows, w, tape.is_recording())?;
    slice.run(targets)?;
    if let (Some(dx), Some(dw)) = (slice.dx.take(), slice.dw.take()) {
        table.add_to_grad(tape, head, &dw)?;
        let dx = table.slices.leave(dx)?;
        tape.seed(x, &slice.losses, dx);
    }
    gather_all(&table.mesh, table.tokens(), Side::Rows, &slice.losses)
}

/// The head's work on this rank's slice of the vocabulary, some tokens at a time.
struct HeadSlice<'a> {
    table: &'a Table,
    /// [M, D]
    x: Tensor,
    /// [V', D]
    w: Tensor,
    /// [M, 1]
    losses: Tensor,
    /// Summands of the gradient of x. [M, D]
    dx: Option<Tensor>,
    /// [V', D] f32, with the padding of the storage
    dw: Option<Tensor>,
}

impl<'a> HeadSlice<'a> {
    fn new(table: &'a Table, x: Tensor, w: Tensor, learns: bool) -> Result<HeadSlice<'a>, Fault> {
        let losses = Tensor::new(x.device(), DType::F32, &[x.rows(), 1])?;
        let (mut dx, mut dw) = (None, None);
        if learns {
            dx = Some(Tensor::new(x.device(), x.dtype(), x.shape())?);
            dw = Some(Tensor::zeros(x.device(), DType::F32, &[table.gathered_rows(), x.cols()])?);
        }
        Ok(HeadSlice { table, x, w, losses, dx, dw })
    }

    fn run(&mut self, targets: Targets<'_>) -> Result<(), Fault> {
        let m = self.x.rows();
        for first in (0..m).step_by(SLICE_TOKENS) {
            let rows = SLICE_TOKENS.min(m - first);
            let logits = self.logits(first, rows)?;
            let ids = &targets.ids[first..first + rows];
            match self.table.rows.cut.is_whole() {
                true => self.whole(logits, first, ids, targets.scale)?,
                false => self.cut(logits, first, ids, targets.scale)?,
            }
        }
        Ok(())
    }

    fn logits(&self, first: usize, rows: usize) -> Result<Tensor, Fault> {
        let (d, v) = (self.x.cols(), self.w.rows());
        let mut logits = Tensor::new(self.x.device(), DType::F32, &[rows, v])?;
        let x = Mat::new(self.x.view().narrow(first * d, rows * d), d);
        let out = MatMut { data: logits.view_mut(), ld: v };
        gemm(rows, v, d, x, Mat::new(self.w.view(), d).t(), out, false, Epilogue::default());
        Ok(logits)
    }

    /// Every column is here: the local kernel, and with it its bits.
    fn whole(&mut self, mut logits: Tensor, first: usize, ids: &[u32], scale: f32) -> Result<(), Fault> {
        let losses = self.losses.view_mut().narrow(first, ids.len());
        if self.dx.is_none() {
            cross_entropy::forward(logits.view(), ids, losses);
            return Ok(());
        }
        cross_entropy::forward_backward(logits.view_mut(), ids, scale, losses, self.x.dtype());
        self.learn(logits, first);
        Ok(())
    }

    fn cut(&mut self, mut logits: Tensor, first: usize, ids: &[u32], scale: f32) -> Result<(), Fault> {
        let (table, rows) = (self.table, ids.len());
        let local = table.local_ids(ids, Some(IGNORE), cross_entropy::ELSEWHERE);
        let slice = cut::Slice { targets: &local, valid: table.slice().1 };
        let mut tops = Tensor::new(logits.device(), DType::F32, &[rows])?;
        cut::tops(logits.view(), slice, tops.view_mut());
        let tops = max(&table.mesh, table.rows.cut, tops)?;
        let mut sums = Tensor::new(logits.device(), DType::F32, &[rows, 2])?;
        cut::sums(logits.view(), slice, tops.view(), sums.view_mut());
        let sums = sum(&table.mesh, table.rows.cut, sums)?;
        cut::losses(sums.view(), ids, self.losses.view_mut().narrow(first, rows));
        if self.dx.is_some() {
            let stats = (tops.view(), sums.view());
            cut::gradient(logits.view_mut(), slice, stats, scale, self.x.dtype());
            self.learn(logits, first);
        }
        Ok(())
    }

    /// dx = dlogits w and dw += dlogits^T x, where logits have become their gradient in place: a row
    /// of gradients begins where its row of logits began.
    fn learn(&mut self, logits: Tensor, first: usize) {
        let (rows, v, d, dtype) = (logits.rows(), logits.cols(), self.x.cols(), self.x.dtype());
        let (Some(dx), Some(dw)) = (&mut self.dx, &mut self.dw) else { return };
        let ld = v * (4 / dtype.size_bytes());
        let gradient = logits.as_type(dtype);
        let dlogits = Mat::new(gradient.view(), ld);
        let x = Mat::new(self.x.view().narrow(first * d, rows * d), d);
        let out = MatMut { data: dx.view_mut().narrow(first * d, rows * d), ld: d };
        gemm(rows, d, v, dlogits, Mat::new(self.w.view(), d), out, false, Epilogue::default());
        let dw = dw.view_mut().narrow(0, v * d);
        gemm(v, d, rows, dlogits.t(), x, MatMut { data: dw, ld: d }, true, Epilogue::default());
    }
}
