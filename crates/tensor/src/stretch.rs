//! Passes of several microbatches under way at once, as a pipeline has them: what a forward pass
//! recorded is set aside from the parameters it ran on and walked back when its gradient has come.
//! Gradients of weights may wait still longer: ops that know how hand them over as sums to be
//! formed later, with the operands those need.

use crate::tape::{Grads, Node, Phase};
use crate::{Fault, ParamRef, Tape, Tensor, Var};

/// What was recorded between two values.
pub struct Recorded {
    nodes: Vec<Node>,
    input: Option<usize>,
    output: Option<usize>,
}

/// Gradients of weights that are still to be formed, in the order the way back met them.
#[derive(Default)]
pub struct Later {
    sums: Vec<Sum>,
}

type Form = Box<dyn FnOnce(&mut Tape<'_>) -> Result<(), Fault>>;

/// Adds to the gradients of some parameters of one op.
struct Sum {
    op: &'static str,
    layer: usize,
    params: Vec<ParamRef>,
    form: Form,
}

impl Later {
    /// Sums still to be formed.
    pub fn len(&self) -> usize {
        self.sums.len()
    }

    /// Whether nothing waits.
    pub fn is_empty(&self) -> bool {
        self.sums.is_empty()
    }
}

impl Tape<'_> {
    /// Set aside what was recorded since the last time, which led from `input` to `output`: without an
    /// input it began with parameters alone, without an output it ended in a loss. Values recorded so
    /// far are none of this tape's any more.
    pub fn set_aside(&mut self, input: Option<&Var>, output: Option<&Var>) -> Recorded {
        let id = |var: &Var| var.id;
        Recorded { nodes: self.begin_anew(), input: input.map(id), output: output.map(id) }
    }

    /// Walk back what was set aside, from the gradient of its output, or from its loss, to the gradient
    /// of its input; gradients of parameters accumulate in the store.
    pub fn walk_back(&mut self, recorded: Recorded, grad: Option<Tensor>) -> Result<Option<Tensor>, Fault> {
        assert_eq!(recorded.output.is_some(), grad.is_some(), "an output has a gradient, a loss is one");
        let mut grads = Grads::default();
        if let Some((output, grad)) = recorded.output.zip(grad) {
            grads.add(output, grad)?;
        }
        self.in_phase(Phase::Backward, |tape| tape.walk_nodes(recorded.nodes, &mut grads))?;
        Ok(recorded.input.and_then(|input| grads.take(input)))
    }

    /// The same for gradients of values alone: those of weights that can wait are returned as sums
    /// still to be formed. The bits are those of `walk_back` when each parameter's sums are formed in
    /// the order of the walks.
    pub fn walk_back_inputs(
        &mut self,
        recorded: Recorded,
        grad: Option<Tensor>,
    ) -> Result<(Option<Tensor>, Later), Fault> {
        self.later = Some(Later::default());
        let dx = self.walk_back(recorded, grad);
        let later = self.later.take().unwrap_or_default();
        Ok((dx?, later))
    }

    /// Form the gradients of weights that waited.
    pub fn form(&mut self, later: Later) -> Result<(), Fault> {
        self.in_phase(Phase::Backward, |tape| {
            later.sums.into_iter().try_for_each(|sum| {
                tape.set_layer(sum.layer);
                // Products of what it keeps.
                tape.tell(sum.op, &sum.params, (false, true))?;
                (sum.form)(tape)
            })
        })
    }

    /// Tell of an op on the way back whose gradients of `params` go through `weight_gradient`.
    pub fn moment_back(&mut self, op: &'static str, params: &[ParamRef]) -> Result<(), Fault> {
        self.moment_with_grads(op, params, self.later.is_none())
    }

    /// Add to the gradients of `params`, which is what `form` does: at once, or when the pass that is
    /// under way says so.
    pub fn weight_gradient(
        &mut self,
        op: &'static str,
        params: &[ParamRef],
        form: impl FnOnce(&mut Tape<'_>) -> Result<(), Fault> + 'static,
    ) -> Result<(), Fault> {
        let layer = self.layer();
        match &mut self.later {
            None => form(self),
            Some(later) => {
                later.sums.push(Sum { op, layer, params: params.to_vec(), form: Box::new(form) });
                Ok(())
            }
        }
    }
}
