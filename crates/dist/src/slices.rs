//! What is cut into slices of a width (words of a table, neurons of experts), each of which serves
//! whole rows of tokens: the residual stream is put together to enter, and sums over the slices go
//! where it lies. The two are each other's way back.

use crate::moves::{gather, sum, sum_scatter};
use crate::{Cut, Flow, Mesh, Side};
use tensor::{Fault, Tensor};

/// How values [M, D] of one slice and the residual stream turn into each other.
#[derive(Clone, Debug)]
pub(crate) struct Slices {
    mesh: Mesh,
    /// The axes whose ranks have other slices and the same tokens.
    pub cut: Cut,
    /// The side of the residual stream that is cut along these axes; without one it is whole.
    side: Option<Side>,
}

impl Slices {
    pub fn new(flow: &Flow) -> Slices {
        let outer = flow.outer;
        let cut = if outer.cols.is_whole() { flow.inner.cols } else { outer.cols };
        let side = match cut.innermost() {
            Some(axis) if outer.rows.has(axis) => Some(Side::Rows),
            Some(_) if !outer.cols.is_whole() => Some(Side::Cols),
            _ => None,
        };
        Slices { mesh: flow.mesh.clone(), cut, side }
    }

    /// Whether the slices have other tokens of the residual stream.
    pub fn cut_tokens(&self) -> bool {
        self.side == Some(Side::Rows)
    }

    /// Summands of this rank's slice [M, D] to the residual stream.
    pub fn leave(&self, x: Tensor) -> Result<Tensor, Fault> {
        match self.side {
            None => sum(&self.mesh, self.cut, x),
            Some(side) => self.cut.axes().try_fold(x, |x, axis| sum_scatter(&self.mesh, axis, side, &x)),
        }
    }

    /// The residual stream to whole rows of the tokens this rank serves.
    pub fn enter(&self, x: &Tensor) -> Result<Tensor, Fault> {
        match self.side {
            None => Ok(x.clone()),
            Some(side) => {
                let axes = self.cut.axes().rev();
                axes.into_iter().try_fold(x.clone(), |x, axis| gather(&self.mesh, axis, side, &x))
            }
        }
    }
}
