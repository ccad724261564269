//! The distributed matmul: one entry; forward, dX and dW are the same routine with the operands'
//! roles exchanged. Sums run in an order fixed by the mesh, so a run has the same bits each time.

mod gathered;
mod panels;

use crate::{Algorithm, Product};
use kernels::gemm::{Epilogue, Mat, MatMut, gemm};
use tensor::{DType, Fault, ParamRef, Tape, Tensor, Var};

/// Parameters of a linear layer: weight [N, K] and bias [N], as the ranks hold them.
pub type Weights = (ParamRef, Option<ParamRef>);

/// y = x W^T (+ bias) (+ residual) for x [M, K], W [N, K], laid out as `product` says; a residual
/// lies as y does. On a mesh of one that is the plain product.
pub fn matmul(
    tape: &mut Tape<'_>,
    product: &Product,
    x: &Var,
    weights: Weights,
    residual: Option<&Var>,
) -> Result<Var, Fault> {
    if product.is_local() {
        return tape.linear(x, weights.0, weights.1, residual);
    }
    let residual_value = residual.map(|residual| &residual.value);
    let name = product.moment_name();
    tape.moment(name, &used(&weights))?;
    let (y, saved) = match product.algorithm {
        Algorithm::Gather { .. } => gathered::forward(tape, product, &x.value, weights, residual_value)?,
        Algorithm::Panels => (panels::forward(tape, product, &x.value, weights, residual_value)?, None),
    };
    let (product, x_value, residual_given) = (product.clone(), x.value.clone(), residual.is_some());
    let back = move |tape: &mut Tape<'_>, dy: Tensor| {
        tape.moment_back(name, &used(&weights))?;
        let dx = match product.algorithm {
            Algorithm::Gather { .. } => gathered::backward(tape, &product, (x_value, saved), weights, &dy)?,
            Algorithm::Panels => panels::backward(tape, &product, x_value, weights, &dy)?,
        };
        Ok(vec![Some(dx), residual_given.then_some(dy)])
    };
    Ok(match residual {
        Some(residual) => tape.outside(&[x, residual], y, back),
        None => {
            tape.outside(&[x], y, move |tape, dy| back(tape, dy).map(|mut grads| vec![grads.swap_remove(0)]))
        }
    })
}

impl Product {
    fn moment_name(&self) -> &'static str {
        match self.algorithm {
            Algorithm::Gather { .. } => "matmul_gather",
            Algorithm::Panels => "matmul_panels",
        }
    }
}

/// Handles of a layer's parameters.
fn used(weights: &Weights) -> Vec<ParamRef> {
    std::iter::once(weights.0).chain(weights.1).collect()
}

/// bias.grad += column sums of dy [M, N].
fn add_bias_gradient(tape: &mut Tape<'_>, bias: Option<ParamRef>, dy: &Tensor) {
    if let Some(bias) = bias {
        let db = tape.params.added_grad(bias);
        kernels::elementwise::column_sums(dy.view(), dy.cols(), db);
    }
}

/// a [m, k] b [k, n] as a new matrix of `dtype`.
fn local(sizes: (usize, usize, usize), a: Mat<'_>, b: Mat<'_>, dtype: DType) -> Result<Tensor, Fault> {
    let (m, n, k) = sizes;
    let mut c = Tensor::new(a.data.device(), dtype, &[m, n])?;
    gemm(m, n, k, a, b, MatMut { data: c.view_mut(), ld: n }, false, Epilogue::default());
    Ok(c)
}

/// sum (+ bias) (+ residual) in `dtype`, from a sum that was taken over ranks or panels.
pub(crate) fn finish(
    tape: &Tape<'_>,
    sum: Tensor,
    bias: Option<ParamRef>,
    residual: Option<&Tensor>,
    dtype: DType,
) -> Result<Tensor, Fault> {
    if bias.is_none() && residual.is_none() && sum.dtype() == dtype {
        return Ok(sum);
    }
    let (m, n) = (sum.rows(), sum.cols());
    let mut y = Tensor::new(sum.device(), dtype, &[m, n])?;
    let bias = bias.map(|bias| tape.params.weight(bias));
    let residual = residual.map(|residual| Mat::new(residual.view(), n));
    let out = MatMut { data: y.view_mut(), ld: n };
    kernels::block::finish(m, n, Mat::new(sum.view(), n), bias, residual, out);
    Ok(y)
}
