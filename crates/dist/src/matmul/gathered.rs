//! Operands are gathered, multiplied where they meet, and the outcome is summed over ranks.
//!
//! | scheme, product | x is gathered | w is gathered | y is summed |
//! |---|---|---|---|
//! | 1D opening | (rows over x with a cut residual stream) | | |
//! | 1D closing | | | over x: whole, or cut by rows |
//! | weight-stationary opening | columns over y | | columns over x |
//! | weight-stationary closing | columns over x | | columns over y |
//! | 3D opening | rows over y | rows over x | rows over z |
//! | 3D closing | rows over z | rows over x | rows over y |
//!
//! On the way back dy is gathered where y was summed, dx is summed where x was gathered (or was
//! whole while w was cut), and dw is summed where w was gathered.

use super::{Weights, add_bias_gradient, finish, local, used};
use crate::moves::{gather, gather_all, sum, sum_scatter, sum_scatter_all};
use crate::{Algorithm, Keep, Leave, Product, Side};
use kernels::gemm::{Epilogue, Mat, MatMut, gemm};
use tensor::{DType, Fault, ParamRef, Tape, Tensor};

/// What was gathered in the forward pass and is kept: x, and w where it is cut in storage.
pub(super) type Saved = Option<(Tensor, Option<Tensor>)>;

pub(super) fn forward(
    tape: &Tape<'_>,
    product: &Product,
    x: &Tensor,
    (weight, bias): Weights,
    residual: Option<&Tensor>,
) -> Result<(Tensor, Saved), Fault> {
    let x = enter(product, x)?;
    let w = whole_weight(tape, product, weight)?;
    let k = x.cols();
    let view = w.as_ref().map_or_else(|| tape.params.weight(weight), Tensor::view);
    let n = view.len() / k;
    let m = x.rows();
    let y = match (product.w.cols.innermost(), leave(product)) {
        (None, _) => {
            let mut y = Tensor::new(x.device(), x.dtype(), &[m, n])?;
            let epilogue = Epilogue {
                bias: bias.map(|bias| tape.params.weight(bias)),
                residual: residual.map(|residual| Mat::new(residual.view(), n)),
                ..Epilogue::default()
            };
            let out = MatMut { data: y.view_mut(), ld: n };
            gemm(m, n, k, Mat::new(x.view(), k), Mat::new(view, k).t(), out, false, epilogue);
            y
        }
        (Some(axis), leave) => {
            let part = local((m, n, k), Mat::new(x.view(), k), Mat::new(view, k).t(), x.dtype())?;
            let total = match leave {
                Leave::Whole => sum(&product.mesh, product.w.cols, part)?,
                Leave::Cut(side) => sum_scatter(&product.mesh, axis, side, &part)?,
            };
            let dtype = total.dtype();
            finish(tape, total, bias, residual, dtype)?
        }
    };
    let saved = (keep(product) == Keep::Gathered).then_some((x, w));
    Ok((y, saved))
}

pub(super) fn backward(
    tape: &mut Tape<'_>,
    product: &Product,
    (x, saved): (Tensor, Saved),
    weights: Weights,
    dy: &Tensor,
) -> Result<Tensor, Fault> {
    let (mesh, weight) = (&product.mesh, weights.0);
    let (x, w) = match saved {
        Some(saved) => saved,
        None => (enter(product, &x)?, whole_weight(tape, product, weight)?),
    };
    let own = dy.clone();
    let dy = match (product.w.cols.innermost(), leave(product)) {
        (Some(axis), Leave::Cut(side)) => gather(mesh, axis, side, dy)?,
        _ => own.clone(),
    };
    let (m, n, k) = (x.rows(), dy.cols(), x.cols());
    let view = w.as_ref().map_or_else(|| tape.params.weight(weight), Tensor::view);
    let dx = local((m, k, n), Mat::new(dy.view(), n), Mat::new(view, k), x.dtype())?;
    drop(w);
    let there = product.clone();
    tape.weight_gradient(product.moment_name(), &used(&weights), move |tape| {
        add_bias_gradient(tape, weights.1, &own);
        add_weight_gradient(tape, &there, (&x, &dy), weight)
    })?;
    match (product.w.rows.innermost(), product.algorithm) {
        (Some(axis), Algorithm::Gather { enter: Some(side), .. }) => sum_scatter(mesh, axis, side, &dx),
        _ => sum(mesh, product.w.rows, dx),
    }
}

/// dw = dy^T x where they meet, summed to where w is stored.
fn add_weight_gradient(
    tape: &mut Tape<'_>,
    product: &Product,
    (x, dy): (&Tensor, &Tensor),
    weight: ParamRef,
) -> Result<(), Fault> {
    let (m, n, k) = (x.rows(), dy.cols(), x.cols());
    let (a, b) = (Mat::new(dy.view(), n).t(), Mat::new(x.view(), k));
    if product.stored.is_whole() {
        let (dw, add) = tape.params.grad_mut(weight);
        gemm(n, k, m, a, b, MatMut { data: dw, ld: k }, add, Epilogue::default());
        return Ok(());
    }
    let mesh = &product.mesh;
    let padded = tape.params.spec(weight).shape[0] * product.stored.pieces(mesh);
    let mut whole = Tensor::zeros(x.device(), DType::F32, &[padded, k])?;
    gemm(n, k, m, a, b, MatMut { data: whole.view_mut(), ld: k }, false, Epilogue::default());
    add_to_grad(tape, weight, &sum_scatter_all(mesh, product.stored, Side::Rows, &whole)?);
    Ok(())
}

pub(super) fn add_to_grad(tape: &mut Tape<'_>, param: ParamRef, more: &Tensor) {
    let (grad, add) = tape.params.grad_mut(param);
    match add {
        true => kernels::elementwise::add_assign(grad, more.view()),
        false => kernels::elementwise::copy(grad, more.view()),
    }
}

fn leave(product: &Product) -> Leave {
    match product.algorithm {
        Algorithm::Gather { leave, .. } => leave,
        Algorithm::Panels => Leave::Whole,
    }
}

fn keep(product: &Product) -> Keep {
    match product.algorithm {
        Algorithm::Gather { keep, .. } => keep,
        Algorithm::Panels => Keep::Pieces,
    }
}

fn enter(product: &Product, x: &Tensor) -> Result<Tensor, Fault> {
    match (product.w.rows.innermost(), product.algorithm) {
        (Some(axis), Algorithm::Gather { enter: Some(side), .. }) => gather(&product.mesh, axis, side, x),
        _ => Ok(x.clone()),
    }
}

/// The weight's rows gathered from where they are stored; none where they lie as they are used.
fn whole_weight(tape: &Tape<'_>, product: &Product, weight: ParamRef) -> Result<Option<Tensor>, Fault> {
    if product.stored.is_whole() {
        return Ok(None);
    }
    let shape = &tape.params.spec(weight).shape;
    let mut piece = Tensor::new(tape.params.device(), tape.params.dtype(), shape)?;
    kernels::elementwise::copy(piece.view_mut(), tape.params.weight(weight));
    let whole = gather_all(&product.mesh, product.stored, Side::Rows, &piece)?;
    Ok(Some(whole.narrow_rows(0, product.outputs_here)))
}
