//! RMSNorm and LayerNorm over the width, and RMSNorm over each head of q and k.

use super::Op;
use crate::Fault;
use crate::tape::Grads;
use crate::{ParamRef, Tape, Tensor, Var};
use device::DType;
use kernels::head_norm::Heads;
use kernels::{head_norm, layer_norm, rms_norm};

/// Which norm, with its parameters.
#[derive(Clone, Copy, Debug)]
pub enum Norm {
    /// x / rms(x) * weight.
    Rms {
        /// [D]
        weight: ParamRef,
        /// Added to the mean square.
        eps: f32,
    },
    /// (x - mean) / std * weight + bias.
    Layer {
        /// [D]
        weight: ParamRef,
        /// [D]
        bias: ParamRef,
        /// Added to the variance.
        eps: f32,
    },
}

pub(crate) struct Saved {
    norm: Norm,
    x: Tensor,
    /// RMS: inverse root mean square. Layer: inverse standard deviation. [M]
    inv: Tensor,
    /// Layer: mean. [M]
    mean: Option<Tensor>,
}

impl Saved {
    pub(crate) fn kept(&mut self) -> Vec<&mut Tensor> {
        vec![&mut self.x]
    }
}

impl Tape<'_> {
    /// x [M, D] -> [M, D].
    pub fn norm(&mut self, x: &Var, norm: Norm) -> Result<Var, Fault> {
        let (device, m) = (x.value.device(), x.value.rows());
        let mut y = Tensor::new(device, x.value.dtype(), x.value.shape())?;
        let mut inv = Tensor::new(device, DType::F32, &[m])?;
        let mut mean = None;
        match norm {
            Norm::Rms { weight, eps } => {
                self.moment("rms_norm", &[weight])?;
                let w = self.params.weight(weight);
                rms_norm::forward(x.value.view(), w, eps, y.view_mut(), inv.view_mut());
            }
            Norm::Layer { weight, bias, eps } => {
                self.moment("layer_norm", &[weight, bias])?;
                let (w, b) = (self.params.weight(weight), self.params.weight(bias));
                let mut means = Tensor::new(device, DType::F32, &[m])?;
                let x = x.value.view();
                layer_norm::forward(x, w, b, eps, y.view_mut(), means.view_mut(), inv.view_mut());
                mean = Some(means);
            }
        }
        let saved = x.value.clone();
        Ok(self.push(&[x.id], y, || Op::Norm(Saved { norm, x: saved, inv, mean })))
    }

    /// RMSNorm of every q head by `wq` [H] and every k head by `wk` [H] in qkv [M, (N+2K)H].
    pub fn head_norm(
        &mut self,
        qkv: &Var,
        (wq, wk): (ParamRef, ParamRef),
        (n, k, h): (usize, usize, usize),
        eps: f32,
    ) -> Result<Var, Fault> {
        self.moment("head_norm", &[wq, wk])?;
        let (device, m) = (qkv.value.device(), qkv.value.rows());
        let mut y = Tensor::new(device, qkv.value.dtype(), qkv.value.shape())?;
        let mut inv = Tensor::new(device, DType::F32, &[m, n + k])?;
        let (q_weight, k_weight) = (self.params.weight(wq), self.params.weight(wk));
        let heads = Heads { n, k, h };
        let (x, out) = (qkv.value.view(), y.view_mut());
        head_norm::forward(x, q_weight, k_weight, heads, eps, out, inv.view_mut());
        let saved = qkv.value.clone();
        Ok(self.push(&[qkv.id], y, || Op::HeadNorm(SavedHeads { qkv: saved, inv, wq, wk, heads: (n, k, h) })))
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
        let mut dx = Tensor::new(dy.device(), dy.dtype(), dy.shape())?;
        // What the residual stream carries back is added here: one pass instead of two.
        let carried = grads.take(inputs[0]);
        let carried = carried.as_ref().map(Tensor::view);
        let (x, inv) = (self.x.view(), self.inv.view());
        match self.norm {
            Norm::Rms { weight, .. } => {
                tape.moment("rms_norm", &[weight])?;
                let (w, dw) = tape.params.weight_and_added_grad(weight);
                rms_norm::backward(x, w, inv, dy.view(), carried, dx.view_mut(), dw);
            }
            Norm::Layer { weight, bias, .. } => {
                tape.moment("layer_norm", &[weight, bias])?;
                let Some(mean) = &self.mean else { unreachable!("layer norm saves its mean") };
                // Two parameters at once would borrow the store twice: the bias's gradient is
                // formed in scratch and added.
                let d = dy.cols();
                let mut db = Tensor::zeros(dy.device(), DType::F32, &[d])?;
                let (w, dw) = tape.params.weight_and_added_grad(weight);
                let (mean, dx_out) = (mean.view(), dx.view_mut());
                layer_norm::backward(x, w, mean, inv, dy.view(), carried, dx_out, dw, db.view_mut());
                let bias_grad = tape.params.added_grad(bias);
                kernels::elementwise::add_assign(bias_grad, db.view());
            }
        }
        grads.add(inputs[0], dx)
    }
}

pub(crate) struct SavedHeads {
    qkv: Tensor,
    inv: Tensor,
    wq: ParamRef,
    wk: ParamRef,
    heads: (usize, usize, usize),
}

impl SavedHeads {
    pub(crate) fn kept(&mut self) -> Vec<&mut Tensor> {
        vec![&mut self.qkv]
    }
}

impl SavedHeads {
    pub(crate) fn backward(
        self,
        tape: &mut Tape<'_>,
        inputs: &[usize],
        dy: Tensor,
        grads: &mut Grads,
    ) -> Result<(), Fault> {
        tape.moment("head_norm", &[self.wq, self.wk])?;
        let (n, k, h) = self.heads;
        let mut dqkv = Tensor::new(dy.device(), dy.dtype(), dy.shape())?;
        let mut dwq = Tensor::zeros(dy.device(), DType::F32, &[h])?;
        let mut dwk = Tensor::zeros(dy.device(), DType::F32, &[h])?;
        let (wq, wk) = (tape.params.weight(self.wq), tape.params.weight(self.wk));
        head_norm::backward(
            self.qkv.view(),
            wq,
            wk,
            self.inv.view(),
            Heads { n, k, h },
            dy.view(),
            dqkv.view_mut(),
            dwq.view_mut(),
            dwk.view_mut(),
        );
        for (param, grad) in [(self.wq, dwq), (self.wk, dwk)] {
            let out = tape.params.added_grad(param);
            kernels::elementwise::add_assign(out, grad.view());
        }
        grads.add(inputs[0], dqkv)
    }
}
