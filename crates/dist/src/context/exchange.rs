//! Heads against tokens: an all-to-all gives every rank whole rows for its share of the heads,
//! another one its tokens of all heads back. Between them attention is what it is on one rank, bit
//! for bit.

use super::{Context, HeadShare};
use kernels::attention::{Heads, Mask, Operands, Shape, backward, forward};
use kernels::gemm::{Mat, MatMut};
use kernels::{block, elementwise};
use std::ops::Range;
use tensor::{AttentionShape, DType, Fault, Tape, Tensor, Var};

pub(super) const MOMENT: &str = "attention_all_to_all";

/// Columns of a matrix [M, ld] that each rank gets.
struct Columns {
    ld: usize,
    /// By rank.
    of: Vec<Vec<Range<usize>>>,
}

impl Columns {
    fn width(&self, rank: usize) -> usize {
        self.of[rank].iter().map(Range::len).sum()
    }

    /// Whether some column goes to several ranks.
    fn has_copies(&self) -> bool {
        (0..self.of.len()).map(|rank| self.width(rank)).sum::<usize>() > self.ld
    }
}

/// What the way back needs.
struct Saved {
    context: Context,
    shape: AttentionShape,
    /// Rotated q | k | v of our heads, whole rows. [b*T, (n+2k)H]
    qkv: Tensor,
    out: Tensor,
    lse: Tensor,
}

/// `qkv` is rotated, and the moment told.
pub(super) fn attention(
    tape: &mut Tape<'_>,
    context: &Context,
    mut qkv: Var,
    shape: &AttentionShape,
) -> Result<Var, Fault> {
    let (context, shape) = (context.clone(), shape.clone());
    let rows = context.to_heads(&context.columns_qkv(&shape), &qkv.value, shape.b)?;
    let saved = Saved::forward(context, shape, rows)?;
    let columns = saved.context.columns_out(&saved.shape);
    let out = saved.context.to_tokens(&columns, &saved.out, saved.shape.b)?;
    qkv.value = out.clone();
    Ok(tape.outside(&[&qkv], out, move |tape, dout| {
        tape.moment(MOMENT, &[])?;
        let dout = saved.context.to_heads(&columns, &dout, saved.shape.b)?;
        saved.backward(&dout).map(|dqkv| vec![Some(dqkv)])
    }))
}

impl Context {
    fn share(&self, rank: usize, shape: &AttentionShape) -> HeadShare {
        HeadShare::of(self.group.size(), rank, (shape.n, shape.k))
    }

    fn columns(&self, ld: usize, of: impl Fn(usize) -> Vec<Range<usize>>) -> Columns {
        Columns { ld, of: (0..self.group.size()).map(of).collect() }
    }

    fn columns_qkv(&self, shape: &AttentionShape) -> Columns {
        let AttentionShape { n, k, h, .. } = *shape;
        self.columns((n + 2 * k) * h, |rank| {
            let HeadShare { queries, kv } = self.share(rank, shape);
            let from =
                |first: usize, heads: &Range<usize>| (first + heads.start) * h..(first + heads.end) * h;
            vec![from(0, &queries), from(n, &kv), from(n + k, &kv)]
        })
    }

    fn columns_out(&self, shape: &AttentionShape) -> Columns {
        self.columns(shape.n * shape.h, |rank| {
            let queries = self.share(rank, shape).queries;
            let columns = queries.start * shape.h..queries.end * shape.h;
            vec![columns]
        })
    }

    /// Our tokens of all heads [M, ld] -> whole rows of our heads [b*T, width].
    fn to_heads(&self, columns: &Columns, x: &Tensor, b: usize) -> Result<Tensor, Fault> {
        let (m, ranks, own) = (x.rows(), self.group.size(), self.group.index());
        let widths: Vec<usize> = (0..ranks).map(|rank| columns.width(rank)).collect();
        let mut mine = Tensor::new(x.device(), x.dtype(), &[m * widths.iter().sum::<usize>()])?;
        each_block(columns, m, |(at, width), cols| {
            let from = Mat::new(x.view().narrow(cols.start, x.len() - cols.start), columns.ld);
            let len = mine.len();
            let to = MatMut { data: mine.view_mut().narrow(at, len - at), ld: width };
            block::copy(m, cols.len(), from, to);
        });
        let send: Vec<usize> = widths.iter().map(|width| m * width).collect();
        let width = widths[own];
        let mut pieces = Tensor::new(x.device(), x.dtype(), &[ranks * m, width])?;
        let receive = vec![m * width; ranks];
        self.group.all_to_all((mine.view(), &send), (pieces.view_mut(), &receive))?;
        let mut rows = Tensor::new(x.device(), x.dtype(), &[ranks * m, width])?;
        for (from, to, len) in self.cut.copies((b, ranks * m / b.max(1), width)) {
            elementwise::copy(rows.view_mut().narrow(to, len), pieces.view().narrow(from, len));
        }
        Ok(rows)
    }

    /// Whole rows of our heads -> our tokens of all heads. What several ranks have copies of is the
    /// sum of theirs, in their order.
    fn to_tokens(&self, columns: &Columns, y: &Tensor, b: usize) -> Result<Tensor, Fault> {
        let (ranks, own) = (self.group.size(), self.group.index());
        let (m, width) = (y.rows() / ranks, columns.width(own));
        let mut mine = Tensor::new(y.device(), y.dtype(), &[ranks * m, width])?;
        for (to, from, len) in self.cut.copies((b, ranks * m / b.max(1), width)) {
            elementwise::copy(mine.view_mut().narrow(to, len), y.view().narrow(from, len));
        }
        let receive: Vec<usize> = (0..ranks).map(|rank| m * columns.width(rank)).collect();
        let mut pieces = Tensor::new(y.device(), y.dtype(), &[receive.iter().sum()])?;
        let send = vec![m * width; ranks];
        self.group.all_to_all((mine.view(), &send), (pieces.view_mut(), &receive))?;
        // Copies are added up in f32 and rounded once.
        let dtype = if columns.has_copies() { DType::F32 } else { y.dtype() };
        let mut x = Tensor::zeros(y.device(), dtype, &[m, columns.ld])?;
        each_block(columns, m, |(at, width), cols| {
            let from = Mat::new(pieces.view().narrow(at, pieces.len() - at), width);
            let len = x.len();
            let to = MatMut { data: x.view_mut().narrow(cols.start, len - cols.start), ld: columns.ld };
            block::add(m, cols.len(), from, to);
        });
        if dtype == y.dtype() {
            return Ok(x);
        }
        let mut rounded = Tensor::new(y.device(), y.dtype(), x.shape())?;
        elementwise::copy(rounded.view_mut(), x.view());
        Ok(rounded)
    }
}

/// Calls `each` for every run of columns of every rank, with where it begins in the runs of [m,
/// width] that the ranks get one after the other, and that width.
fn each_block(columns: &Columns, m: usize, mut each: impl FnMut((usize, usize), &Range<usize>)) {
    let mut run = 0;
    for (rank, ranges) in columns.of.iter().enumerate() {
        let (width, mut col) = (columns.width(rank), 0);
        for range in ranges.iter().filter(|range| m > 0 && !range.is_empty()) {
            each((run + col, width), range);
            col += range.len();
        }
        run += m * width;
    }
}

/// Our heads of whole rows.
fn own(context: &Context, shape: &AttentionShape) -> AttentionShape {
    let HeadShare { queries, kv } = context.share(context.group.index(), shape);
    AttentionShape { n: queries.len(), k: kv.len(), ..shape.clone() }
}

impl Saved {
    fn forward(context: Context, shape: AttentionShape, qkv: Tensor) -> Result<Saved, Fault> {
        let AttentionShape { b, n, h, .. } = own(&context, &shape);
        let out = Tensor::new(qkv.device(), qkv.dtype(), &[qkv.rows(), n * h])?;
        let lse = Tensor::new(qkv.device(), DType::F32, &[b, n, qkv.rows() / b.max(1)])?;
        let mut saved = Saved { context, shape, qkv, out, lse };
        let Some((sizes, scale)) = saved.sizes() else { return Ok(saved) };
        let (q, k, v) = operands(&saved.qkv, sizes);
        let mask = Mask { starts: saved.shape.starts.as_deref(), window: saved.shape.window };
        forward(sizes, q, k, v, mask, scale, saved.out.view_mut(), saved.lse.view_mut());
        Ok(saved)
    }

    /// None where the heads did not reach to this rank.
    fn sizes(&self) -> Option<(Shape, f32)> {
        let AttentionShape { b, n, k, h, scale, .. } = own(&self.context, &self.shape);
        let t = self.qkv.rows() / b.max(1);
        (n > 0).then_some((Shape { b, t, s: t, n, k, h }, scale))
    }

    /// dout of our heads of whole rows -> dqkv of our tokens.
    fn backward(self, dout: &Tensor) -> Result<Tensor, Fault> {
        let mut dqkv = Tensor::new(dout.device(), dout.dtype(), self.qkv.shape())?;
        if let Some((sizes, scale)) = self.sizes() {
            let (q, k, v) = operands(&self.qkv, sizes);
            let mask = Mask { starts: self.shape.starts.as_deref(), window: self.shape.window };
            let (out, lse) = (self.out.view(), self.lse.view());
            backward(sizes, q, k, v, mask, scale, out, lse, dout.view(), dqkv.view_mut());
        }
        let columns = self.context.columns_qkv(&self.shape);
        let mut dqkv = self.context.to_tokens(&columns, &dqkv, self.shape.b)?;
        self.shape.rotate(&mut dqkv, true);
        Ok(dqkv)
    }
}

fn operands(qkv: &Tensor, Shape { t, n, k, h, .. }: Shape) -> Operands<'_> {
    let heads = |first: usize| Heads { data: qkv.view(), ld: qkv.cols(), col: first * h, rows_per_batch: t };
    (heads(0), heads(n), heads(n + k))
}
