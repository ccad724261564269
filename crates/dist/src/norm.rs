//! Norms of rows whose columns are cut over axes: sums of squares (and of values) at hand are added
//! up over the axes, one or two numbers a token, and the rest is local.

use crate::moves::sum;
use crate::{Cut, Mesh};
use kernels::cut_norm::{self, Rows, Sum};
use tensor::{DType, Fault, Norm, ParamRef, Tape, Tensor, Var};

/// How the columns of a row lie.
#[derive(Clone, Debug)]
pub struct Width {
    mesh: Mesh,
    cut: Cut,
    /// Columns of a whole row.
    whole: usize,
    /// Columns here that are not padding.
    valid: usize,
}

impl Width {
    /// `whole` columns cut over `cut` into equal pieces.
    pub fn new(mesh: &Mesh, cut: Cut, whole: usize) -> Width {
        let each = whole.div_ceil(cut.pieces(mesh));
        let valid = whole.saturating_sub(cut.index(mesh) * each).min(each);
        Width { mesh: mesh.clone(), cut, whole, valid }
    }

    fn mean(&self, sums: Tensor) -> Result<Tensor, Fault> {
        let mut mean = sum(&self.mesh, self.cut, sums)?;
        kernels::elementwise::scale(mean.view_mut(), 1.0 / self.whole as f32);
        Ok(mean)
    }

    fn mean_of(&self, x: &Tensor, what: Sum<'_>) -> Result<Tensor, Fault> {
        let mut sums = Tensor::new(x.device(), DType::F32, &[x.rows()])?;
        cut_norm::sums(x.view(), what, self.valid, sums.view_mut());
        self.mean(sums)
    }
}

/// x [M, D] -> [M, D], both cut as `width` says; so are the norm's parameters.
pub fn norm(tape: &mut Tape<'_>, width: &Width, x: &Var, norm: Norm) -> Result<Var, Fault> {
    if width.cut.is_whole() {
        return tape.norm(x, norm);
    }
    let (weight, bias, eps) = match norm {
        Norm::Rms { weight, eps } => (weight, None, eps),
        Norm::Layer { weight, bias, eps } => (weight, Some(bias), eps),
    };
    let params = [weight, bias.unwrap_or(weight)];
    let used = 1 + bias.is_some() as usize;
    tape.moment("norm_cut", &params[..used])?;
    let value = &x.value;
    let mean = bias.map(|_| width.mean_of(value, Sum::Values)).transpose()?;
    let what = mean.as_ref().map_or(Sum::Squares, |mean| Sum::Deviations(mean.view()));
    let mut inv = width.mean_of(value, what)?;
    cut_norm::invert(inv.view_mut(), eps);
    let mut y = Tensor::new(value.device(), value.dtype(), value.shape())?;
    let saved = Saved { width: width.clone(), x: value.clone(), mean, inv, weight, bias };
    let bias_weight = bias.map(|bias| tape.params.weight(bias));
    cut_norm::apply(saved.rows(tape), bias_weight, y.view_mut());
    Ok(tape.outside(&[x], y, move |tape, dy| {
        tape.moment("norm_cut", &params[..used])?;
        saved.backward(tape, &dy).map(|dx| vec![Some(dx)])
    }))
}

struct Saved {
    width: Width,
    x: Tensor,
    mean: Option<Tensor>,
    inv: Tensor,
    weight: ParamRef,
    bias: Option<ParamRef>,
}

impl Saved {
    fn rows<'a>(&'a self, tape: &'a Tape<'_>) -> Rows<'a> {
        Rows {
            x: self.x.view(),
            w: tape.params.weight(self.weight),
            mean: self.mean.as_ref().map(Tensor::view),
            inv: self.inv.view(),
            valid: self.width.valid,
        }
    }

    fn backward(&self, tape: &mut Tape<'_>, dy: &Tensor) -> Result<Tensor, Fault> {
        let (m, d) = (dy.rows(), dy.cols());
        let mut sums = Tensor::new(dy.device(), DType::F32, &[m, 2])?;
        cut_norm::backward_sums(self.rows(tape), dy.view(), sums.view_mut());
        let sums = self.width.mean(sums)?;
        let mut dx = Tensor::new(dy.device(), dy.dtype(), dy.shape())?;
        // Weight and gradients cannot be borrowed at once for two parameters: gradients are formed
        // aside and added.
        let [mut dw, mut db] =
            [Tensor::zeros(dy.device(), DType::F32, &[d])?, Tensor::zeros(dy.device(), DType::F32, &[d])?];
        let db_out = self.bias.map(|_| db.view_mut());
        let rows = self.rows(tape);
        cut_norm::backward(rows, sums.view(), dy.view(), None, dx.view_mut(), dw.view_mut(), db_out);
        for (param, grad) in [(Some(self.weight), &dw), (self.bias, &db)] {
            if let Some(param) = param {
                let out = tape.params.added_grad(param);
                kernels::elementwise::add_assign(out, grad.view());
            }
        }
        Ok(dx)
    }
}
