//! Cross-entropy fused with the LM head, in slices of tokens: the logits of the whole batch are
//! never held. The gradient is linear in the known factor of the loss, so a recording tape forms
//! it slice by slice in the forward pass, while the logits are at hand.

use super::Op;
use crate::Fault;
use crate::tape::Grads;
use crate::{ParamRef, Tape, Tensor, Var};
use device::{Buffer, DType, Device, ViewMut};
use kernels::cross_entropy;
use kernels::gemm::{Epilogue, Mat, MatMut, gemm};

/// Tokens whose logits are held at a time: as many as keep them near 64 MiB, for every slice reads
/// the head's weights and adds to its gradient; at least 256, to amortise packing. A GPU wants four times as
/// many, to have work for all of it.
pub fn loss_slice_tokens(device: Device, vocab: usize) -> usize {
    const LOGIT_BYTES: usize = 64 << 20;
    let times = match device {
        Device::Cpu => 1,
        Device::Cuda => 4,
    };
    (times * LOGIT_BYTES / (4 * vocab.max(1))).clamp(256, 1024 * times).next_multiple_of(256)
}

/// What the model should have said.
#[derive(Clone, Copy)]
pub struct Targets<'a> {
    /// Token to predict at each position, or `kernels::cross_entropy::IGNORE`. [M]
    pub ids: &'a [u32],
    /// Factor of the summed loss in the gradient: 1 / targets of the global batch for a mean.
    pub scale: f32,
}

pub(crate) struct Saved {
    dx: Tensor,
}

impl Tape<'_> {
    /// Losses of every position in nats, 0 where ignored. x [M, D], head [V, D] -> [M] f32.
    /// On a recording tape this is also where the backward pass will begin.
    pub fn head_loss(&mut self, x: &Var, head: ParamRef, targets: Targets<'_>) -> Result<Tensor, Fault> {
        self.moment_with_grads("head_loss", &[head], self.is_recording())?;
        let (m, d) = (x.value.rows(), x.value.cols());
        let v = self.params.spec(head).shape[0];
        let (device, dtype) = (x.value.device(), x.value.dtype());
        let mut losses = Tensor::new(device, DType::F32, &[m])?;
        let slice = loss_slice_tokens(device, v).min(m.max(1));
        let mut buffer = Buffer::new(device, slice * v * 4)?;
        let recording = self.is_recording();
        let mut dx = if recording { Some(Tensor::new(device, dtype, &[m, d])?) } else { None };
        for first in (0..m).step_by(slice) {
            let rows = slice.min(m - first);
            let x = Mat::new(x.value.view().narrow(first * d, rows * d), d);
            let ids = &targets.ids[first..first + rows];
            let mut logits = buffer.view_mut(DType::F32, 0, rows * v);
            let w = Mat::new(self.params.weight(head), d);
            let out = MatMut { data: logits.reborrow(), ld: v };
            gemm(rows, v, d, x, w.t(), out, false, Epilogue::default());
            let losses = losses.view_mut().narrow(first, rows);
            match &mut dx {
                None => cross_entropy::forward(logits.as_view(), ids, losses),
                Some(dx) => {
                    cross_entropy::forward_backward(logits, ids, targets.scale, losses, dtype);
                    let dx = dx.view_mut().narrow(first * d, rows * d);
                    // A row of gradients begins where its row of logits began.
                    let ld = v * (4 / dtype.size_bytes());
                    let dlogits = Mat::new(buffer.view(dtype, 0, rows * ld), ld);
                    self.head_backward(head, x, dlogits, (rows, v, d), dx);
                }
            }
        }
        if let Some(dx) = dx {
            self.seed(x, &losses, dx);
        }
        Ok(losses)
    }

    /// `losses` of `x` that an op of another room computed together with the gradient `dx` of x:
    /// where the backward pass will begin.
    pub fn seed(&mut self, x: &Var, losses: &Tensor, dx: Tensor) {
        self.push(&[x.id], losses.clone(), || Op::HeadLoss(Saved { dx }));
    }

    /// dx [rows, D] = dlogits [rows, V] head [V, D]; head.grad += dlogits^T x.
    fn head_backward(
        &mut self,
        head: ParamRef,
        x: Mat<'_>,
        dlogits: Mat<'_>,
        (rows, v, d): (usize, usize, usize),
        dx: ViewMut<'_>,
    ) {
        let (w, dw, add) = self.params.weight_and_grad(head);
        let out = MatMut { data: dx, ld: d };
        gemm(rows, d, v, dlogits, Mat::new(w, d), out, false, Epilogue::default());
        gemm(v, d, rows, dlogits.t(), x, MatMut { data: dw, ld: d }, add, Epilogue::default());
    }
}

impl Saved {
    pub(crate) fn backward(
        self,
        tape: &mut Tape<'_>,
        inputs: &[usize],
        grads: &mut Grads,
    ) -> Result<(), Fault> {
        tape.moment("head_loss", &[])?;
        grads.add(inputs[0], self.dx)
    }
}
