//! y = (silu(gate) * up) W^T + residual. The activation is computed again on the way back, so
//! only gate and up are kept.

use super::Op;
use crate::Fault;
use crate::tape::Grads;
use crate::{ParamRef, Tape, Tensor, Var};
use kernels::gemm::{Epilogue, Mat, MatMut, gemm};

pub(crate) struct Saved {
    gate_up: Tensor,
    weight: ParamRef,
}

impl Saved {
    pub(crate) fn kept(&mut self) -> Vec<&mut Tensor> {
        vec![&mut self.gate_up]
    }
}

impl Tape<'_> {
    /// gate_up [M, 2F] (gate first), weight [out, F], residual [M, out] -> [M, out].
    pub fn swiglu_linear(&mut self, gate_up: &Var, weight: ParamRef, residual: &Var) -> Result<Var, Fault> {
        self.moment("swiglu_linear", &[weight])?;
        let (m, f) = (gate_up.value.rows(), gate_up.value.cols() / 2);
        let n = self.params.spec(weight).shape[0];
        let (device, dtype) = (gate_up.value.device(), gate_up.value.dtype());
        let mut act = Tensor::new(device, dtype, &[m, f])?;
        kernels::swiglu::forward(gate_up.value.view(), f, act.view_mut());
        let mut y = Tensor::new(device, dtype, &[m, n])?;
        let epilogue = Epilogue { residual: Some(Mat::new(residual.value.view(), n)), ..Epilogue::default() };
        let w = Mat::new(self.params.weight(weight), f);
        let out = MatMut { data: y.view_mut(), ld: n };
        gemm(m, n, f, Mat::new(act.view(), f), w.t(), out, false, epilogue);
        let saved = gate_up.value.clone();
        let inputs = [gate_up.id, residual.id];
        Ok(self.push(&inputs, y, || Op::SwigluLinear(Saved { gate_up: saved, weight })))
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
        let weight = self.weight;
        tape.moment_back("swiglu_linear", &[weight])?;
        let (m, f) = (self.gate_up.rows(), self.gate_up.cols() / 2);
        let (device, dtype) = (dy.device(), dy.dtype());
        // dact first: the kernel that needs it also yields the activation dW wants.
        let mut dact = Tensor::new(device, dtype, &[m, f])?;
        let n = dy.cols();
        let w = Mat::new(tape.params.weight(weight), f);
        let out = MatMut { data: dact.view_mut(), ld: f };
        gemm(m, f, n, Mat::new(dy.view(), n), w, out, false, Epilogue::default());
        let mut act = Tensor::new(device, dtype, &[m, f])?;
        let mut dgate_up = Tensor::new(device, dtype, self.gate_up.shape())?;
        let (gate_up, dgate_up_out) = (self.gate_up.view(), dgate_up.view_mut());
        kernels::swiglu::backward(gate_up, f, dact.view(), dgate_up_out, Some(act.view_mut()));
        drop(dact);
        let dy_kept = dy.clone();
        tape.weight_gradient("swiglu_linear", &[weight], move |tape| {
            let (dy, act) = (Mat::new(dy_kept.view(), n), Mat::new(act.view(), f));
            let (dw, add) = tape.params.grad_mut(weight);
            gemm(n, f, m, dy.t(), act, MatMut { data: dw, ld: f }, add, Epilogue::default());
            Ok(())
        })?;
        grads.add(inputs[1], dy)?;
        grads.add(inputs[0], dgate_up)
    }
}
