//! Attention around a ring of context ranks. In step s a rank has the keys and values of the rank s
//! places before it; while it attends them the next block is on its way. Outcomes are merged in the
//! order of steps, so a run has the same bits each time.

use super::Context;
use crate::{Array, Pending};
use kernels::attention::{
    Given, Heads, Mask, Operands, Seen, Shape, backward_part, forward_part, merge, row_sums,
};
use kernels::gemm::{Mat, MatMut};
use kernels::{block, elementwise};
use tensor::{AttentionShape, DType, Fault, Tape, Tensor, Var};

pub(super) const MOMENT: &str = "attention_ring";

/// Queries, keys and values of the tokens here.
struct Here {
    context: Context,
    shape: AttentionShape,
    /// Of the queries here. [b * t]
    starts: Option<Vec<u32>>,
    /// After rotation. [M, (N+2K)H]
    qkv: Tensor,
}

/// `qkv` is rotated, and the moment told.
pub(super) fn attention(
    tape: &mut Tape<'_>,
    context: &Context,
    qkv: Var,
    shape: &AttentionShape,
) -> Result<Var, Fault> {
    let starts = shape.starts.as_ref().map(|starts| context.cut.take(starts, shape.b));
    let here = Here { context: context.clone(), shape: shape.clone(), starts, qkv: qkv.value.clone() };
    let (out, lse) = here.forward()?;
    let kept = out.clone();
    Ok(tape.outside(&[&qkv], out, move |tape, dout| {
        tape.moment(MOMENT, &[])?;
        here.backward((&kept, &lse), &dout).map(|dqkv| vec![Some(dqkv)])
    }))
}

impl Here {
    /// Of the queries here against one block of keys.
    fn sizes(&self) -> Shape {
        let AttentionShape { b, n, k, h, .. } = self.shape;
        let t = self.qkv.rows() / b.max(1);
        Shape { b, t, s: t, n, k, h }
    }

    /// The rank whose block we have in step `step`.
    fn owner(&self, step: usize) -> usize {
        let (ranks, own) = (self.context.group.size(), self.context.group.index());
        (own + ranks - step) % ranks
    }

    fn seen(&self, step: usize) -> Seen<'_> {
        let tokens = self.sizes().t * self.context.group.size();
        let mask = Mask { starts: self.starts.as_deref(), window: self.shape.window };
        let places = |rank| self.context.cut.places(rank, tokens);
        Seen { mask, queries: places(self.context.group.index()), keys: places(self.owner(step)) }
    }

    /// Our queries with our own keys and values, or with those of a block.
    fn operands<'a>(&'a self, block: Option<&'a Array>) -> Operands<'a> {
        let Shape { t, n, k, h, .. } = self.sizes();
        let ours = |head| self.shape.heads(self.qkv.view(), head, t);
        match block {
            None => (ours(0), ours(n), ours(n + k)),
            Some(block) => {
                let theirs = |col| Heads { data: block.view(), ld: 2 * k * h, col, rows_per_batch: t };
                (ours(0), theirs(0), theirs(k * h))
            }
        }
    }

    /// Our keys and values [M, 2KH], to travel.
    fn block(&self) -> Result<Array, Fault> {
        let Shape { n, k, h, .. } = self.sizes();
        let (m, ld, width) = (self.qkv.rows(), self.qkv.cols(), 2 * k * h);
        let mut block = Array::new(self.qkv.device(), self.qkv.dtype(), m * width)?;
        if m > 0 {
            let from = self.qkv.view().narrow(n * h, self.qkv.len() - n * h);
            block::copy(m, width, Mat::new(from, ld), MatMut { data: block.view_mut(), ld: width });
        }
        Ok(block)
    }

    /// out [M, N*H], and the log-sums [b, N, t] over all keys.
    fn forward(&self) -> Result<(Tensor, Tensor), Fault> {
        let (group, sizes, scale) = (&self.context.group, self.sizes(), self.shape.scale);
        let Shape { b, t, n, h, .. } = sizes;
        let (device, m) = (self.qkv.device(), self.qkv.rows());
        let mut arriving = Some(group.start_shift(self.block()?)?);
        let new = || -> Result<(Tensor, Tensor), Fault> {
            let stats = Tensor::new(device, DType::F32, &[b, n, t])?;
            Ok((Tensor::new(device, DType::F32, &[m, n * h])?, stats))
        };
        let ((mut sum, mut lse), (mut part, mut stats)) = (new()?, new()?);
        let to = (sum.view_mut(), lse.view_mut());
        forward_part(sizes, self.operands(None), self.seen(0), scale, to);
        for step in 1..group.size() {
            let block = arriving.take().expect("a block is on its way").finish()?;
            if step + 1 < group.size() {
                arriving = Some(group.start_shift(block.clone())?);
            }
            let to = (part.view_mut(), stats.view_mut());
            forward_part(sizes, self.operands(Some(&block)), self.seen(step), scale, to);
            merge(&sizes, (sum.view_mut(), lse.view_mut()), (part.view(), stats.view()));
        }
        if self.qkv.dtype() == DType::F32 {
            return Ok((sum, lse));
        }
        let mut out = Tensor::new(device, self.qkv.dtype(), &[m, n * h])?;
        elementwise::copy(out.view_mut(), sum.view());
        Ok((out, lse))
    }

    /// Blocks go around once more. Gradients of a block begin with the rank after its owner and
    /// follow it, each rank adding its own, until they come home.
    fn backward(&self, (out, lse): (&Tensor, &Tensor), dout: &Tensor) -> Result<Tensor, Fault> {
        let (group, sizes, scale) = (&self.context.group, self.sizes(), self.shape.scale);
        let Shape { k, h, .. } = sizes;
        let mut arriving = Some(group.start_shift(self.block()?)?);
        let mut sums = Tensor::new(dout.device(), DType::F32, lse.shape())?;
        row_sums(&sizes, out.view(), dout.view(), sums.view_mut());
        let given = Given { lse: lse.view(), sums: sums.view(), dout: dout.view() };
        let mut dq = Tensor::zeros(dout.device(), DType::F32, out.shape())?;
        let zeros = || -> Result<Array, Fault> {
            let mut zeros = Array::new(dout.device(), DType::F32, self.qkv.rows() * 2 * k * h)?;
            device::fill_zero(zeros.view_mut());
            Ok(zeros)
        };
        let mut own = zeros()?;
        let to = (dq.view_mut(), own.view_mut());
        backward_part(sizes, self.operands(None), self.seen(0), scale, given, to);
        let mut following = None;
        for step in 1..group.size() {
            let block = arriving.take().expect("a block is on its way").finish()?;
            if step + 1 < group.size() {
                arriving = Some(group.start_shift(block.clone())?);
            }
            let mut ours = zeros()?;
            let to = (dq.view_mut(), ours.view_mut());
            backward_part(sizes, self.operands(Some(&block)), self.seen(step), scale, given, to);
            following = Some(group.start_shift(joined(ours, following)?)?);
        }
        let own = joined(own, following)?;
        self.packed(&dq, &own)
    }

    /// dq and dk | dv as one matrix, turned back.
    fn packed(&self, dq: &Tensor, dkv: &Array) -> Result<Tensor, Fault> {
        let (m, ld) = (self.qkv.rows(), self.qkv.cols());
        let mut dqkv = Tensor::new(self.qkv.device(), self.qkv.dtype(), self.qkv.shape())?;
        let mut put = |col: usize, from: Mat<'_>| {
            let len = m * ld;
            let to = MatMut { data: dqkv.view_mut().narrow(col, len - col), ld };
            block::copy(m, from.ld, from, to);
        };
        if m > 0 {
            put(0, Mat::new(dq.view(), dq.cols()));
            put(dq.cols(), Mat::new(dkv.view(), ld - dq.cols()));
        }
        self.shape.rotate(&mut dqkv, true);
        Ok(dqkv)
    }
}

/// Ours with what comes from before added to it.
fn joined(mut ours: Array, before: Option<Pending>) -> Result<Array, Fault> {
    if let Some(before) = before {
        elementwise::add_assign(ours.view_mut(), before.finish()?.view());
    }
    Ok(ours)
}
