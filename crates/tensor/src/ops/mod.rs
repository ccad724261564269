//! The ops of the tape, one file each: a method on `Tape` that runs it, and its way back.

mod activation;
mod attention;
mod embedding;
mod experts;
mod linear;
mod loss;
mod norm;
mod route;
mod swiglu_linear;

pub use attention::{AttentionShape, KvCache, WIDEST_ON_GPU};
pub use experts::Order;
pub use loss::{Targets, loss_slice_tokens};
pub use norm::Norm;
pub use route::{Load, Pool, Real, Router};

use crate::Fault;
use crate::filed::{PutAway, Saved};
use crate::tape::{Grads, Replay, WayBack};
use crate::{Tape, Tensor};

/// A recorded op with what it kept for the way back.
pub(crate) enum Op {
    Attention(attention::Saved),
    Embedding(embedding::Saved),
    HeadLoss(loss::Saved),
    HeadNorm(norm::SavedHeads),
    Linear(linear::Saved),
    Norm(norm::Saved),
    Outside {
        kept: Vec<Tensor>,
        back: WayBack,
    },
    /// Values of the nodes before it are filed from here on.
    PutAway(PutAway),
    Recompute {
        input: Saved,
        body: Replay,
    },
    SwigluLinear(swiglu_linear::Saved),
}

impl Op {
    /// Whether the op starts the backward pass by itself.
    pub(crate) fn seeds_itself(&self) -> bool {
        matches!(self, Op::HeadLoss(_))
    }

    /// Values it keeps for its way back that may be filed meanwhile, always in the same order.
    pub(crate) fn kept(&mut self) -> Vec<&mut Tensor> {
        match self {
            Op::Attention(saved) => saved.kept(),
            Op::HeadNorm(saved) => saved.kept(),
            Op::Linear(saved) => saved.kept(),
            Op::Norm(saved) => saved.kept(),
            Op::SwigluLinear(saved) => saved.kept(),
            Op::Outside { kept, .. } => kept.iter_mut().collect(),
            Op::Embedding(_) | Op::HeadLoss(_) | Op::PutAway(_) | Op::Recompute { .. } => Vec::new(),
        }
    }

    /// Pass `arrived`, the gradient of the output, on to the inputs and the parameters.
    pub(crate) fn backward(
        self,
        tape: &mut Tape<'_>,
        inputs: &[usize],
        arrived: Option<Tensor>,
        grads: &mut Grads,
    ) -> Result<(), Fault> {
        if let Op::HeadLoss(saved) = self {
            return saved.backward(tape, inputs, grads);
        }
        let Some(dy) = arrived else { return Ok(()) };
        match self {
            Op::HeadLoss(_) | Op::PutAway(_) => Ok(()),
            Op::Attention(saved) => saved.backward(tape, inputs, dy, grads),
            Op::Embedding(saved) => saved.backward(tape, dy),
            Op::HeadNorm(saved) => saved.backward(tape, inputs, dy, grads),
            Op::Linear(saved) => saved.backward(tape, inputs, dy, grads),
            Op::Norm(saved) => saved.backward(tape, inputs, dy, grads),
            Op::SwigluLinear(saved) => saved.backward(tape, inputs, dy, grads),
            Op::Outside { kept, back } => {
                for (input, dx) in inputs.iter().zip(back(tape, kept, dy)?) {
                    if let Some(dx) = dx {
                        grads.add(*input, dx)?;
                    }
                }
                Ok(())
            }
            Op::Recompute { input, body } => {
                let input = tape.take_back(input)?;
                match tape.replay(&body, input, dy)? {
                    Some(dx) => grads.add(inputs[0], dx),
                    None => Ok(()),
                }
            }
        }
    }
}
