//! The tape: ops run at once and, while recording, leave a node each; `backward` walks the nodes
//! from the last to the first.
//!
//! A node holds its op with the handles it saved, the values it read and the one it wrote.
//! Parameters appear as `ParamRef`, so their bytes may leave and come back between the two passes.

use crate::Fault;
use crate::ops::{Load, Op};
use crate::stretch::Later;
use crate::{ParamRef, ParamStore, Tensor};
use memory::pager::About;
use memory::trace;
use std::rc::Rc;

/// A value on the tape.
#[derive(Clone)]
pub struct Var {
    pub(crate) id: usize,
    /// The bytes.
    pub value: Tensor,
}

/// Which way the tape is being walked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Phase {
    /// Ops run.
    Forward,
    /// Gradients flow back.
    Backward,
    /// Ops run a second time because their values were not kept.
    Recompute,
}

impl From<Phase> for trace::Phase {
    fn from(phase: Phase) -> trace::Phase {
        match phase {
            Phase::Forward => trace::Phase::Forward,
            Phase::Backward => trace::Phase::Backward,
            Phase::Recompute => trace::Phase::Recompute,
        }
    }
}

/// One op about to run: what memory tiers, profilers and traces are told.
#[derive(Clone, Debug, PartialEq)]
pub struct Moment<'a> {
    /// Count since the tape began; the clock of a step.
    pub index: u64,
    /// Which way.
    pub phase: Phase,
    /// Name of the op.
    pub op: &'static str,
    /// Layer the op belongs to, as `Tape::set_layer` was told.
    pub layer: usize,
    /// Parameters it uses.
    pub params: &'a [ParamRef],
    /// Whether it reads their weights.
    pub reads_weights: bool,
    /// Whether it writes their gradients.
    pub writes_grads: bool,
}

impl Moment<'_> {
    /// What tiers are told of `op`, which is run here.
    pub fn about(&self, op: &'static str) -> About {
        About { phase: self.phase.into(), op, layer: self.layer as u32 }
    }
}

/// Whoever is told of every moment before it runs, and may use the parameters in between.
pub type Watch<'a> = &'a mut dyn FnMut(&Moment<'_>, &mut ParamStore) -> Result<(), Fault>;

/// The way back of an op of another room: gradient of its output to those of its inputs.
pub(crate) type WayBack =
    Box<dyn FnOnce(&mut Tape<'_>, Vec<Tensor>, Tensor) -> Result<Vec<Option<Tensor>>, Fault>>;

/// A stretch of ops that can be run again.
pub(crate) type Replay = Rc<dyn Fn(&mut Tape<'_>, &Var) -> Result<Var, Fault>>;

pub(crate) struct Node {
    pub(crate) op: Op,
    pub(crate) inputs: Vec<usize>,
    pub(crate) output: usize,
    pub(crate) layer: usize,
}

/// Runs ops on the parameters of a store.
pub struct Tape<'a> {
    /// Where parameters are looked up, by handle.
    pub params: &'a mut ParamStore,
    recording: bool,
    learns: bool,
    phase: Phase,
    layer: usize,
    clock: u64,
    next_id: usize,
    pub(crate) nodes: Vec<Node>,
    /// Elements that are filed now.
    pub(crate) filed_elements: usize,
    watch: Option<Watch<'a>>,
    share: f32,
    /// Where gradients of weights go that are to wait; none: they are formed at once.
    pub(crate) later: Option<Later>,
    /// Load-balancing losses of the forward pass, each times its factor and the tape's share.
    pub balance_loss: f64,
    /// What fell on the experts of each layer that has some, in the order of the forward pass.
    pub loads: Vec<Load>,
}

/// Gradients of the values of a tape, by id.
#[derive(Default)]
pub(crate) struct Grads {
    by_id: Vec<Option<Tensor>>,
}

impl Grads {
    /// Take what has arrived for a value.
    pub(crate) fn take(&mut self, id: usize) -> Option<Tensor> {
        self.by_id.get_mut(id).and_then(Option::take)
    }

    /// Add `grad` to what has arrived for a value.
    pub(crate) fn add(&mut self, id: usize, grad: Tensor) -> Result<(), Fault> {
        if self.by_id.len() <= id {
            self.by_id.resize_with(id + 1, || None);
        }
        self.by_id[id] = Some(match self.by_id[id].take() {
            None => grad,
            Some(mut sum) => {
                if !sum.is_unique() {
                    sum = sum.duplicate()?;
                }
                kernels::elementwise::add_assign(sum.view_mut(), grad.view());
                sum
            }
        });
        Ok(())
    }
}

impl<'a> Tape<'a> {
    /// A tape that records, for training.
    pub fn recording(params: &'a mut ParamStore) -> Tape<'a> {
        Self::with_recording(params, true)
    }

    /// A tape that only runs, for evaluation and inference.
    pub fn running(params: &'a mut ParamStore) -> Tape<'a> {
        Self::with_recording(params, false)
    }

    fn with_recording(params: &'a mut ParamStore, recording: bool) -> Tape<'a> {
        let phase = Phase::Forward;
        let (nodes, watch, share) = (Vec::new(), None, 1.0);
        Tape {
            params,
            recording,
            learns: recording,
            phase,
            layer: 0,
            clock: 0,
            next_id: 0,
            nodes,
            filed_elements: 0,
            watch,
            share,
            later: None,
            balance_loss: 0.0,
            loads: Vec::new(),
        }
    }

    /// Tell `watch` of every moment from now on.
    pub fn watched_by(mut self, watch: Watch<'a>) -> Tape<'a> {
        self.watch = Some(watch);
        self
    }

    /// Say which part of the step's targets this pass has: losses that are means over tokens, as the
    /// load-balancing loss, count that much.
    pub fn set_share(&mut self, share: f32) {
        self.share = share;
    }

    /// Whether a backward pass will follow, layers that run again included.
    pub(crate) fn learns(&self) -> bool {
        self.learns
    }

    pub(crate) fn layer(&self) -> usize {
        self.layer
    }

    pub(crate) fn share(&self) -> f32 {
        self.share
    }

    pub(crate) fn phase(&self) -> Phase {
        self.phase
    }

    /// Name the layer the following ops belong to.
    pub fn set_layer(&mut self, layer: usize) {
        self.layer = layer;
    }

    /// Whether ops leave nodes.
    pub fn is_recording(&self) -> bool {
        self.recording
    }

    /// A value that comes from outside the tape.
    pub fn input(&mut self, value: Tensor) -> Var {
        self.next_id += 1;
        Var { id: self.next_id - 1, value }
    }

    /// Tell of an op before it runs. What it reads is at hand afterwards, and on the way back the
    /// gradients it writes, or this fails.
    pub fn moment(&mut self, op: &'static str, params: &[ParamRef]) -> Result<(), Fault> {
        self.moment_with_grads(op, params, self.phase == Phase::Backward)
    }

    /// The same for an op that may write gradients of its parameters on the way forward.
    pub fn moment_with_grads(
        &mut self,
        op: &'static str,
        params: &[ParamRef],
        writes_grads: bool,
    ) -> Result<(), Fault> {
        self.tell(op, params, (true, writes_grads))
    }

    /// Tell of an op that reads weights, writes gradients, or both.
    pub(crate) fn tell(
        &mut self,
        op: &'static str,
        params: &[ParamRef],
        (reads_weights, writes_grads): (bool, bool),
    ) -> Result<(), Fault> {
        let (phase, layer) = (self.phase, self.layer);
        let moment = Moment { index: self.clock, phase, op, layer, params, reads_weights, writes_grads };
        self.clock += 1;
        if let Some(watch) = &mut self.watch {
            watch(&moment, self.params)?;
        }
        self.params.visit(&moment)
    }

    /// The output of an op that lives outside this room (a collective, a distributed product).
    /// `back` turns the gradient of the output into those of `inputs`, in their order, and adds to
    /// the gradients of parameters itself; it tells its own moments.
    pub fn outside(
        &mut self,
        inputs: &[&Var],
        value: Tensor,
        back: impl FnOnce(&mut Tape<'_>, Tensor) -> Result<Vec<Option<Tensor>>, Fault> + 'static,
    ) -> Var {
        self.outside_keeping(inputs, value, Vec::new(), |tape, _, dy| back(tape, dy))
    }

    /// The same of an op that keeps values for `back`: they are handed to it, and may be filed meanwhile.
    pub(crate) fn outside_keeping(
        &mut self,
        inputs: &[&Var],
        value: Tensor,
        kept: Vec<Tensor>,
        back: impl FnOnce(&mut Tape<'_>, Vec<Tensor>, Tensor) -> Result<Vec<Option<Tensor>>, Fault> + 'static,
    ) -> Var {
        let ids: Vec<usize> = inputs.iter().map(|input| input.id).collect();
        self.push(&ids, value, || Op::Outside { kept, back: Box::new(back) })
    }

    /// Put the output of an op on the tape; `op` is built only while recording.
    pub(crate) fn push(&mut self, inputs: &[usize], value: Tensor, op: impl FnOnce() -> Op) -> Var {
        let output = self.input(value);
        if self.recording {
            let (inputs, layer) = (inputs.to_vec(), self.layer);
            self.nodes.push(Node { op: op(), inputs, output: output.id, layer });
        }
        output
    }

    /// Run `body` on `input` keeping nothing but the input; the backward pass runs it again.
    /// Same bits as running it plainly, less memory, more time.
    pub fn recompute(
        &mut self,
        input: &Var,
        body: impl Fn(&mut Tape<'_>, &Var) -> Result<Var, Fault> + 'static,
    ) -> Result<Var, Fault> {
        if !self.recording {
            return body(self, input);
        }
        let saved = self.file(&input.value)?;
        self.recording = false;
        let output = body(self, input);
        self.recording = true;
        let value = output?.value;
        Ok(self.push(&[input.id], value, || Op::Recompute { input: saved, body: Rc::new(body) }))
    }

    /// Walk back from a scalar loss whose op already seeded its input's gradient; gradients of
    /// parameters accumulate in the store. Consumes the recorded nodes.
    pub fn backward(&mut self) -> Result<(), Fault> {
        let recorded = self.set_aside(None, None);
        self.walk_back(recorded, None).map(drop)
    }

    /// Hand over the nodes recorded so far; ids count from 0 again.
    pub(crate) fn begin_anew(&mut self) -> Vec<Node> {
        self.next_id = 0;
        std::mem::take(&mut self.nodes)
    }

    pub(crate) fn in_phase<R>(&mut self, phase: Phase, body: impl FnOnce(&mut Self) -> R) -> R {
        let before = std::mem::replace(&mut self.phase, phase);
        let done = body(self);
        self.phase = before;
        done
    }

    pub(crate) fn walk_nodes(&mut self, mut nodes: Vec<Node>, grads: &mut Grads) -> Result<(), Fault> {
        while let Some(node) = nodes.pop() {
            self.layer = node.layer;
            let op = match node.op {
                Op::PutAway(put_away) => {
                    self.take_up(put_away, &mut nodes)?;
                    continue;
                }
                op => op,
            };
            // The loss seeds itself; any other value nobody used has no gradient to pass on.
            let arrived = grads.take(node.output);
            if arrived.is_some() || op.seeds_itself() {
                op.backward(self, &node.inputs, arrived, grads)?;
            }
        }
        Ok(())
    }

    /// Run a stretch again, this time recording, and walk back through it.
    pub(crate) fn replay(
        &mut self,
        body: &Replay,
        input: Tensor,
        grad: Tensor,
    ) -> Result<Option<Tensor>, Fault> {
        let outer = std::mem::take(&mut self.nodes);
        let input = self.input(input);
        self.phase = Phase::Recompute;
        let output = body(self, &input);
        self.phase = Phase::Backward;
        let inner = std::mem::replace(&mut self.nodes, outer);
        let mut grads = Grads::default();
        grads.add(output?.id, grad)?;
        self.walk_nodes(inner, &mut grads)?;
        Ok(grads.take(input.id))
    }
}
