//! GELU and SwiGLU on their own, for where the product that follows is not a local one.

use crate::Fault;
use crate::{Tape, Tensor, Var};
use kernels::gelu::{self, GeluKind};
use kernels::swiglu;

impl Tape<'_> {
    /// gelu(x), elementwise.
    pub fn gelu(&mut self, x: &Var, kind: GeluKind) -> Result<Var, Fault> {
        self.moment("gelu", &[])?;
        let mut y = Tensor::new(x.value.device(), x.value.dtype(), x.value.shape())?;
        gelu::forward(kind, x.value.view(), y.view_mut());
        let saved = x.value.clone();
        Ok(self.outside(&[x], y, move |tape, dy| {
            tape.moment("gelu", &[])?;
            let mut dx = Tensor::new(dy.device(), dy.dtype(), dy.shape())?;
            gelu::backward(kind, saved.view(), dy.view(), dx.view_mut());
            Ok(vec![Some(dx)])
        }))
    }

    /// silu(gate) * up: gate_up [M, 2F] (gate first) -> [M, F].
    pub fn swiglu(&mut self, gate_up: &Var) -> Result<Var, Fault> {
        self.moment("swiglu", &[])?;
        let (m, f) = (gate_up.value.rows(), gate_up.value.cols() / 2);
        let mut act = Tensor::new(gate_up.value.device(), gate_up.value.dtype(), &[m, f])?;
        swiglu::forward(gate_up.value.view(), f, act.view_mut());
        let saved = gate_up.value.clone();
        Ok(self.outside(&[gate_up], act, move |tape, dact| {
            tape.moment("swiglu", &[])?;
            let mut dgate_up = Tensor::new(dact.device(), dact.dtype(), saved.shape())?;
            swiglu::backward(saved.view(), f, dact.view(), dgate_up.view_mut(), None);
            Ok(vec![Some(dgate_up)])
        }))
    }
}
