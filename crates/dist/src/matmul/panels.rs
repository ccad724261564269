//! SUMMA on a rectangle of ranks: x [M@r, K@c], w [N@c, K@r], y [M@r, N@c] for an axis r that cuts
//! tokens and an axis c that cuts widths. K is walked in panels; a panel of x has one owner in each
//! row of ranks (over c) and a panel of w one in each column (over r).
//!
//! | what | x panel | w panel | y |
//! |---|---|---|---|
//! | y = x w^T (NT) | broadcast | broadcast | added up in place, in f32 |
//! | dx = dy w (NN) | summed at its owner | broadcast | dy, in place |
//! | dw = dy^T x (TN) | broadcast | summed at its owner | dy, in place |
//!
//! Panels end where a piece of x or of w ends, so neither the sizes nor the two axes need divide
//! each other; what a last piece lacks is never walked. On a box the copies of w along z see the
//! tokens of their own layer: their gradients are added up at the end of a step (2.5D).

use super::{Weights, add_bias_gradient, finish, local, used};
use crate::{Array, Axis, Mesh, Pending, Product};
use device::{View, ViewMut};
use kernels::block;
use kernels::gemm::{Epilogue, Mat, MatMut, gemm};
use std::ops::Range;
use tensor::{DType, Fault, ParamRef, Tape, Tensor};

/// One operand whose columns are cut into pieces over an axis and walked in panels.
struct Side<'a> {
    mesh: &'a Mesh,
    /// `None` where every rank has all columns.
    axis: Option<Axis>,
    rows: usize,
    /// Columns of a piece.
    piece: usize,
}

/// A panel on its way: the product before it runs meanwhile.
enum Coming<'a> {
    Here(Mat<'a>),
    Under(Pending, usize, usize),
}

/// A panel where it lies, or as it came.
enum Panel<'a> {
    Here(Mat<'a>),
    Came(Tensor),
}

impl<'a> Coming<'a> {
    fn finish(self) -> Result<Panel<'a>, Fault> {
        match self {
            Coming::Here(mat) => Ok(Panel::Here(mat)),
            Coming::Under(pending, rows, cols) => {
                let Array { buffer, dtype, .. } = pending.finish()?;
                Ok(Panel::Came(Tensor::from_buffer(buffer, dtype, &[rows, cols])))
            }
        }
    }
}

impl Panel<'_> {
    fn mat(&self) -> Mat<'_> {
        match self {
            Panel::Here(mat) => *mat,
            Panel::Came(panel) => Mat::new(panel.view(), panel.cols()),
        }
    }
}

impl Side<'_> {
    /// (owner, first column within its piece).
    fn find(&self, panel: &Range<usize>) -> (usize, usize) {
        (panel.start / self.piece, panel.start % self.piece)
    }

    fn is_ours(&self, owner: usize) -> bool {
        self.axis.is_none_or(|axis| self.mesh.coord(axis) == owner)
    }

    /// Ask for the panel of the operand whose own piece is `own`, or give it, being its owner.
    fn start<'a>(&self, own: View<'a>, panel: &Range<usize>) -> Result<Coming<'a>, Fault> {
        let (owner, col) = self.find(panel);
        let mine = |own: View<'a>| Mat::new(own.narrow(col, own.len() - col), self.piece);
        let Some(axis) = self.axis else { return Ok(Coming::Here(mine(own))) };
        let (width, device, dtype) = (panel.len(), own.device(), own.dtype());
        let mut data = None;
        if self.is_ours(owner) {
            let mut panel = Array::new(device, dtype, self.rows * width)?;
            let to = MatMut { data: panel.view_mut(), ld: width };
            block::copy(self.rows, width, mine(own), to);
            data = Some(panel);
        }
        let what = (device, dtype, self.rows * width);
        let pending = self.mesh.group(axis).start_broadcast(data, what, owner)?;
        Ok(Coming::Under(pending, self.rows, width))
    }

    /// `body(which panel, panel)` for all of `panels`, each asked for while the one before is used.
    fn walk<'a>(
        &self,
        own: View<'a>,
        panels: &[Range<usize>],
        mut body: impl FnMut(&Range<usize>, Panel<'a>) -> Result<(), Fault>,
    ) -> Result<(), Fault> {
        let mut next = Some(self.start(own, &panels[0])?);
        for (i, panel) in panels.iter().enumerate() {
            let Some(coming) = next.take() else { unreachable!("a panel is asked for before it is used") };
            let here = coming.finish()?;
            next = panels.get(i + 1).map(|panel| self.start(own, panel)).transpose()?;
            body(panel, here)?;
        }
        Ok(())
    }

    /// The sum over ranks of `part` becomes its columns of the owner's piece `own`, or is added to them.
    fn deliver(
        &self,
        mut part: Tensor,
        (own, add): (ViewMut<'_>, bool),
        panel: &Range<usize>,
    ) -> Result<(), Fault> {
        let (owner, col) = self.find(panel);
        if let Some(axis) = self.axis {
            self.mesh.group(axis).reduce_sum(part.view_mut(), owner)?;
        }
        if self.is_ours(owner) {
            let len = own.len();
            let to = MatMut { data: own.narrow(col, len - col), ld: self.piece };
            let put = if add { block::add } else { block::copy };
            put(self.rows, panel.len(), Mat::new(part.view(), panel.len()), to);
        }
        Ok(())
    }

    /// Whether no panel of `all` columns reaches some of our piece's.
    fn is_padded(&self, all: usize) -> bool {
        let own = self.axis.map_or(0, |axis| self.mesh.coord(axis));
        (own + 1) * self.piece > all
    }
}

/// Both operands and the panels they are walked in.
struct Walk<'a> {
    x: Side<'a>,
    w: Side<'a>,
    panels: Vec<Range<usize>>,
}

impl<'a> Walk<'a> {
    fn new(product: &'a Product, x: &Tensor, w_len: usize) -> Walk<'a> {
        let mesh = &product.mesh;
        let kw = product.inputs_here;
        let side = |axis, rows, piece| Side { mesh, axis, rows, piece };
        Walk {
            x: side(product.x.cols.innermost(), x.rows(), x.cols()),
            w: side(product.w.cols.innermost(), w_len / kw, kw),
            panels: panels(product.inputs, x.cols(), kw),
        }
    }
}

/// `k` columns cut where a piece of `a` or of `b` columns ends.
fn panels(k: usize, a: usize, b: usize) -> Vec<Range<usize>> {
    let mut ends: Vec<usize> = (1..).map(|i| i * a).take_while(|end| *end < k).collect();
    ends.extend((1..).map(|i| i * b).take_while(|end| *end < k));
    ends.push(k);
    ends.sort_unstable();
    ends.dedup();
    std::iter::once(0)
        .chain(ends.iter().copied())
        .zip(ends.iter().copied())
        .map(|(from, to)| from..to)
        .collect()
}

pub(super) fn forward(
    tape: &Tape<'_>,
    product: &Product,
    x: &Tensor,
    (weight, bias): Weights,
    residual: Option<&Tensor>,
) -> Result<Tensor, Fault> {
    let w = tape.params.weight(weight);
    let walk = Walk::new(product, x, w.len());
    let (m, n) = (walk.x.rows, walk.w.rows);
    let mut sum = Tensor::new(x.device(), DType::F32, &[m, n])?;
    // The panel of w that goes with the first panel of x is asked for before x is waited for.
    let panels = &walk.panels;
    let mut next = Some(walk.w.start(w, &panels[0])?);
    let mut done = 0;
    walk.x.walk(x.view(), panels, |panel, a| {
        let Some(coming) = next.take() else { unreachable!("a panel is asked for before it is used") };
        let b = coming.finish()?;
        next = panels.get(done + 1).map(|panel| walk.w.start(w, panel)).transpose()?;
        let out = MatMut { data: sum.view_mut(), ld: n };
        gemm(m, n, panel.len(), a.mat(), b.mat().t(), out, done > 0, Epilogue::default());
        done += 1;
        Ok(())
    })?;
    finish(tape, sum, bias, residual, x.dtype())
}

pub(super) fn backward(
    tape: &mut Tape<'_>,
    product: &Product,
    x: Tensor,
    weights: Weights,
    dy: &Tensor,
) -> Result<Tensor, Fault> {
    let weight = weights.0;
    let mut dx = Tensor::new(x.device(), x.dtype(), x.shape())?;
    {
        let walk = Walk::new(product, &x, tape.params.spec(weight).len());
        if walk.x.is_padded(product.inputs) {
            device::fill_zero(dx.view_mut());
        }
        let (m, n) = (walk.x.rows, walk.w.rows);
        let w = tape.params.weight(weight);
        walk.w.walk(w, &walk.panels, |panel, b| {
            let part = local((m, panel.len(), n), Mat::new(dy.view(), n), b.mat(), x.dtype())?;
            walk.x.deliver(part, (dx.view_mut(), false), panel)
        })?;
    }
    let (there, dy) = (product.clone(), dy.clone());
    tape.weight_gradient(product.moment_name(), &used(&weights), move |tape| {
        add_bias_gradient(tape, weights.1, &dy);
        add_weight_gradient(tape, &there, (&x, &dy), weight)
    })?;
    Ok(dx)
}

/// dw = dy^T x, panel by panel, each summed at its owner.
fn add_weight_gradient(
    tape: &mut Tape<'_>,
    product: &Product,
    (x, dy): (&Tensor, &Tensor),
    weight: ParamRef,
) -> Result<(), Fault> {
    let walk = Walk::new(product, x, tape.params.spec(weight).len());
    let (m, n) = (walk.x.rows, walk.w.rows);
    let (mut dw, add) = tape.params.grad_mut(weight);
    if !add && walk.w.is_padded(product.inputs) {
        device::fill_zero(dw.reborrow());
    }
    walk.x.walk(x.view(), &walk.panels, |panel, b| {
        let part = local((n, panel.len(), m), Mat::new(dy.view(), n).t(), b.mat(), DType::F32)?;
        walk.w.deliver(part, (dw.reborrow(), add), panel)
    })
}

#[cfg(test)]
mod tests {
    use super::panels;

    #[test]
    fn panels_end_where_either_piece_ends_and_stop_before_the_padding() {
        assert_eq!(panels(12, 4, 6), [0..4, 4..6, 6..8, 8..12]);
        assert_eq!(panels(10, 4, 5), [0..4, 4..5, 5..8, 8..10]);
        assert_eq!(panels(8, 8, 8), vec![0..8]);
        assert_eq!(panels(8, 9, 3), [0..3, 3..6, 6..8]);
    }
}
