//! y = x W^T (+ bias) (+ residual), or gelu of it: one GEMM with its epilogue.

use super::Op;
use crate::Fault;
use crate::tape::Grads;
use crate::{ParamRef, Tape, Tensor, Var};
use device::DType;
use kernels::gelu::GeluKind;
use kernels::gemm::{Epilogue, Mat, MatMut, gemm};

pub(crate) struct Saved {
    x: Tensor,
    weight: ParamRef,
    bias: Option<ParamRef>,
    gelu: Option<(GeluKind, Tensor)>,
    residual: bool,
}

impl Saved {
    pub(crate) fn kept(&mut self) -> Vec<&mut Tensor> {
        let act = self.gelu.as_mut().map(|(_, act)| act);
        std::iter::once(&mut self.x).chain(act).collect()
    }
}

impl Tape<'_> {
    /// x [M, in], weight [out, in], bias [out], residual [M, out] -> [M, out].
    pub fn linear(
        &mut self,
        x: &Var,
        weight: ParamRef,
        bias: Option<ParamRef>,
        residual: Option<&Var>,
    ) -> Result<Var, Fault> {
        self.run_linear("linear", x, weight, bias, residual, None)
    }

    /// gelu(x W^T + bias): x [M, in] -> [M, out].
    pub fn linear_gelu(
        &mut self,
        x: &Var,
        weight: ParamRef,
        bias: Option<ParamRef>,
        kind: GeluKind,
    ) -> Result<Var, Fault> {
        self.run_linear("linear_gelu", x, weight, bias, None, Some(kind))
    }

    fn run_linear(
        &mut self,
        name: &'static str,
        x: &Var,
        weight: ParamRef,
        bias: Option<ParamRef>,
        residual: Option<&Var>,
        gelu: Option<GeluKind>,
    ) -> Result<Var, Fault> {
        let used = [weight, bias.unwrap_or(weight)];
        self.moment(name, &used[..1 + bias.is_some() as usize])?;
        let (m, k) = (x.value.rows(), x.value.cols());
        let n = self.params.spec(weight).shape[0];
        let (device, dtype) = (x.value.device(), x.value.dtype());
        let mut y = Tensor::new(device, dtype, &[m, n])?;
        let mut pre = match gelu {
            Some(_) => Some(Tensor::new(device, dtype, &[m, n])?),
            None => None,
        };
        let epilogue = Epilogue {
            bias: bias.map(|b| self.params.weight(b)),
            residual: residual.map(|r| Mat::new(r.value.view(), n)),
            gelu: gelu.zip(pre.as_mut().map(Tensor::view_mut)),
        };
        let w = Mat::new(self.params.weight(weight), k);
        let out = MatMut { data: y.view_mut(), ld: n };
        gemm(m, n, k, Mat::new(x.value.view(), k), w.t(), out, false, epilogue);
        let inputs = [x.id, residual.map_or(x.id, |r| r.id)];
        let (x, residual) = (x.value.clone(), residual.is_some());
        Ok(self.push(&inputs, y, || Op::Linear(Saved { x, weight, bias, gelu: gelu.zip(pre), residual })))
    }

    /// x [M, in] times weight [out, in] transposed, as f32 logits [M, out]; leaves no node.
    pub fn logits(&mut self, x: &Tensor, weight: ParamRef) -> Result<Tensor, Fault> {
        self.moment("logits", &[weight])?;
        let (m, k) = (x.rows(), x.cols());
        let n = self.params.spec(weight).shape[0];
        let mut y = Tensor::new(x.device(), DType::F32, &[m, n])?;
        let w = Mat::new(self.params.weight(weight), k);
        let out = MatMut { data: y.view_mut(), ld: n };
        gemm(m, n, k, Mat::new(x.view(), k), w.t(), out, false, Epilogue::default());
        Ok(y)
    }
}

/// W.grad += dy^T x; bias.grad += column sums of dy: x [M, in], dy [M, out].
fn add_gradients(tape: &mut Tape<'_>, x: &Tensor, weight: ParamRef, bias: Option<ParamRef>, dy: &Tensor) {
    let (m, k, n) = (x.rows(), x.cols(), dy.cols());
    let (dw, add) = tape.params.grad_mut(weight);
    let out = MatMut { data: dw, ld: k };
    gemm(n, k, m, Mat::new(dy.view(), n).t(), Mat::new(x.view(), k), out, add, Epilogue::default());
    if let Some(bias) = bias {
        let db = tape.params.added_grad(bias);
        kernels::elementwise::column_sums(dy.view(), n, db);
    }
}

impl Saved {
    pub(crate) fn backward(
        self,
        tape: &mut Tape<'_>,
        inputs: &[usize],
        dy: Tensor,
        grads: &mut Grads,
    ) -> Result<(), Fault> {
        let Saved { x, weight, bias, gelu, residual } = self;
        let used = [weight, bias.unwrap_or(weight)];
        let used = &used[..1 + bias.is_some() as usize];
        let name = if gelu.is_some() { "linear_gelu" } else { "linear" };
        tape.moment_back(name, used)?;
        let dy = match gelu {
            None => dy,
            Some((kind, pre)) => {
                let mut dpre = Tensor::new(dy.device(), dy.dtype(), dy.shape())?;
                kernels::gelu::backward(kind, pre.view(), dy.view(), dpre.view_mut());
                dpre
            }
        };
        // dx [M, in] = dy [M, out] W [out, in]
        let (m, k, n) = (x.rows(), x.cols(), dy.cols());
        let mut dx = Tensor::new(x.device(), x.dtype(), &[m, k])?;
        let w = Mat::new(tape.params.weight(weight), k);
        let out = MatMut { data: dx.view_mut(), ld: k };
        gemm(m, k, n, Mat::new(dy.view(), n), w, out, false, Epilogue::default());
        let dy_kept = dy.clone();
        tape.weight_gradient(name, used, move |tape| {
            add_gradients(tape, &x, weight, bias, &dy_kept);
            Ok(())
        })?;
        if residual {
            grads.add(inputs[1], dy)?;
        }
        grads.add(inputs[0], dx)
    }
}
