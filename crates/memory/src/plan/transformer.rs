//! Traces of transformers that nobody has to hold: one training step from sizes alone.
//!
//! For tests, and for plans of models larger than the machine. Seconds are whatever the caller
//! predicts; a real run records its own trace.

use crate::Class;
use crate::trace::{Access, ChunkId, Moment, Phase, Runs, Trace};

/// Bytes of each class per parameter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StateLayout {
    /// Weights in the compute type.
    pub param: u64,
    /// Gradients, as they are summed.
    pub grad: u64,
    /// What the last microbatch rounds them to, for updates to read; 0: updates read the sums.
    pub grad16: u64,
    /// Beside the weights: f32 masters (4), what bf16 weights lack of them (2), or nothing (0).
    pub master: u64,
    /// First moments.
    pub m: u64,
    /// Second moments.
    pub v: u64,
    /// The optimizer makes the weights from the masters alone, without reading them.
    pub recast: bool,
}

impl StateLayout {
    /// 16-bit weights and gradients, f32 masters and moments: 16 bytes, the usual mixed precision.
    pub const MIXED: StateLayout =
        StateLayout { param: 2, grad: 2, grad16: 0, master: 4, m: 4, v: 4, recast: true };
    /// The same with 8-bit moments.
    pub const MIXED_8BIT: StateLayout = StateLayout { m: 1, v: 1, ..StateLayout::MIXED };
    /// Trilith's: bf16 weights, the low halves of their masters, f32 gradients and moments.
    pub const SPLIT: StateLayout =
        StateLayout { param: 2, grad: 4, grad16: 0, master: 2, m: 4, v: 4, recast: false };
    /// Everything f32.
    pub const F32: StateLayout =
        StateLayout { param: 4, grad: 4, grad16: 0, master: 0, m: 4, v: 4, recast: false };

    /// Bytes of a class per parameter.
    pub const fn of(&self, class: Class) -> u64 {
        match class {
            Class::Param => self.param,
            Class::Grad => self.grad,
            Class::Grad16 => self.grad16,
            Class::Master => self.master,
            Class::M => self.m,
            Class::V => self.v,
            Class::Activation => 0,
        }
    }

    /// All of them.
    pub const fn per_param(&self) -> u64 {
        self.param + self.grad + self.grad16 + self.master + self.m + self.v
    }
}

/// When the optimizer updates a layer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Updates {
    /// When the whole backward pass is over: the state streams by while nothing else computes. So do
    /// runs of several ranks.
    #[default]
    AfterBackward,
    /// As soon as the layer's gradient is whole. Clipping by the global norm is not possible.
    InBackward,
    /// Just before the layer's next forward pass: the norm is known by then, and the state streams by
    /// beside the forward pass. Gradients are kept until then.
    BeforeForward,
}

/// Sizes and predicted seconds of a training step.
#[derive(Clone, Debug, PartialEq)]
pub struct Transformer {
    /// Layers.
    pub layers: u32,
    /// Parameters of a layer.
    pub layer_params: u64,
    /// Parameters of the embedding.
    pub embed_params: u64,
    /// Parameters of the head; 0 where it is tied to the embedding.
    pub head_params: u64,
    /// Bytes per parameter.
    pub state: StateLayout,
    /// Ops a layer is cut into, each with a chunk of every class.
    pub parts: u32,
    /// Microbatches of a step.
    pub accumulate: u32,
    /// When parameters are updated.
    pub updates: Updates,
    /// Bytes a layer keeps for the way back, per microbatch, beside its input.
    pub kept_bytes: u64,
    /// Bytes of a layer's input, per microbatch.
    pub input_bytes: u64,
    /// Whether what a layer keeps can be made again from its input.
    pub recompute: bool,
    /// Bytes in use at any moment that are no chunk.
    pub other_bytes: u64,
    /// Seconds of a layer's forward pass; its backward pass takes twice as long.
    pub layer_forward_s: f64,
    /// Seconds to update a parameter on the fastest tier.
    pub update_s: f64,
    /// Seconds to update a parameter on the host; none: updates run on the fastest tier only.
    pub host_update_s: Option<f64>,
}

/// Chunks of one op's parameters, by class.
struct Group {
    params: u64,
    layer: u32,
    param: ChunkId,
    grad: ChunkId,
    grad16: Option<ChunkId>,
    state: Vec<ChunkId>,
}

/// Embedding, layers, head.
type Model<'a> = (&'a [Group], &'a [Vec<Group>], &'a [Group]);

impl Transformer {
    /// Parameters of the model.
    pub const fn params(&self) -> u64 {
        self.layers as u64 * self.layer_params + self.embed_params + self.head_params
    }

    /// One step.
    pub fn trace(&self) -> Trace {
        let mut trace = Trace::default();
        let embed = self.groups(&mut trace, 0, self.embed_params);
        let layers: Vec<Vec<Group>> =
            (0..self.layers).map(|layer| self.groups(&mut trace, layer, self.layer_params)).collect();
        let head = self.groups(&mut trace, self.layers, self.head_params);
        for microbatch in 0..self.accumulate.max(1) {
            self.microbatch(&mut trace, microbatch, (&embed, &layers, &head));
        }
        if self.updates == Updates::AfterBackward {
            let all = embed.iter().chain(layers.iter().flatten()).chain(&head);
            all.for_each(|group| self.update(&mut trace, group));
        }
        trace
    }

    /// Chunks of `params` parameters, cut in parts.
    fn groups(&self, trace: &mut Trace, layer: u32, params: u64) -> Vec<Group> {
        let parts = u64::from(self.parts.max(1));
        let cut = |part: u64| params / parts + u64::from(part < params % parts);
        let mut groups = Vec::new();
        for params in (0..parts).map(cut).filter(|params| *params > 0) {
            let mut add = |class: Class| trace.add_chunk(class, params * self.state.of(class));
            let (param, grad) = (add(Class::Param), add(Class::Grad));
            let grad16 = (self.state.grad16 > 0).then(|| add(Class::Grad16));
            let state =
                [Class::Master, Class::M, Class::V].into_iter().filter(|class| self.state.of(*class) > 0);
            let state = state.map(add).collect();
            groups.push(Group { params, layer, param, grad, grad16, state });
        }
        groups
    }

    fn microbatch(&self, trace: &mut Trace, nth: u32, (embed, layers, head): Model<'_>) {
        let first = nth == 0;
        let before = first && self.updates == Updates::BeforeForward;
        let last = nth + 1 == self.accumulate.max(1);
        let within = last && self.updates == Updates::InBackward;
        let update = |trace: &mut Trace, now: bool, groups: &[Group]| {
            groups.iter().filter(|_| now).for_each(|group| self.update(trace, group));
        };
        let slice = self.layer_forward_s / f64::from(self.parts.max(1));
        let inputs: Vec<ChunkId> =
            (0..=self.layers).map(|_| trace.add_chunk(Class::Activation, self.input_bytes)).collect();
        update(trace, before, embed);
        self.moment(trace, (Phase::Forward, "embed", 0), 0.0);
        use_params(trace, embed);
        trace.add_use(inputs[0], Access::Write);
        let mut kept: Vec<Vec<ChunkId>> = Vec::new();
        for (layer, groups) in layers.iter().enumerate() {
            let mut chunks = Vec::new();
            for group in groups {
                update(trace, before, std::slice::from_ref(group));
                chunks.push(self.forward(trace, group, inputs[layer], groups.len() as u64));
            }
            trace.add_use(inputs[layer + 1], Access::Write);
            kept.push(chunks);
        }
        update(trace, before, head);
        let tied = head.is_empty();
        self.moment(trace, (Phase::Forward, "head", self.layers), 0.0);
        trace.add_use(inputs[layers.len()], Access::ReadWrite);
        use_params(trace, if tied { embed } else { head });
        use_grads(trace, if tied { embed } else { head }, first);
        round_grads(trace, head, last);
        update(trace, within, head);
        for (layer, groups) in layers.iter().enumerate().rev() {
            for (group, chunk) in groups.iter().zip(&kept[layer]).rev() {
                self.moment(trace, (Phase::Backward, "layer", group.layer), 2.0 * slice);
                use_params(trace, std::slice::from_ref(group));
                use_grads(trace, std::slice::from_ref(group), first);
                round_grads(trace, std::slice::from_ref(group), last);
                trace.add_use(inputs[layer], Access::Read);
                trace.add_use(*chunk, Access::Read);
                update(trace, within, std::slice::from_ref(group));
            }
        }
        self.moment(trace, (Phase::Backward, "embed", 0), 0.0);
        use_grads(trace, embed, first && !tied);
        round_grads(trace, embed, last);
        update(trace, within, embed);
    }

    /// A part of a layer's forward pass: what it keeps.
    fn forward(&self, trace: &mut Trace, group: &Group, input: ChunkId, parts: u64) -> ChunkId {
        let slice = self.layer_forward_s / f64::from(self.parts.max(1));
        let chunk = trace.add_chunk(Class::Activation, self.kept_bytes / parts.max(1));
        trace.chunks[chunk.0 as usize].recompute_s = self.recompute.then_some(slice);
        self.moment(trace, (Phase::Forward, "layer", group.layer), slice);
        use_params(trace, std::slice::from_ref(group));
        trace.add_use(input, Access::Read);
        trace.add_use(chunk, Access::Write);
        chunk
    }

    fn update(&self, trace: &mut Trace, group: &Group) {
        let params = group.params as f64;
        self.moment(trace, (Phase::Optimizer, "adamw", group.layer), params * self.update_s);
        if let (Some(last), Some(host)) = (trace.moments.last_mut(), self.host_update_s) {
            last.runs = Runs::Either { host_s: params * host };
        }
        trace.add_use(group.grad16.unwrap_or(group.grad), Access::Read);
        group.state.iter().for_each(|chunk| trace.add_use(*chunk, Access::ReadWrite));
        trace.add_use(group.param, if self.state.recast { Access::Write } else { Access::ReadWrite });
    }

    fn moment(&self, trace: &mut Trace, (phase, op, layer): (Phase, &str, u32), seconds: f64) {
        let (op, other_bytes) = (op.to_owned(), self.other_bytes);
        trace.add_moment(Moment { phase, op, layer, seconds, other_bytes, runs: Runs::Fastest });
    }
}

fn use_params(trace: &mut Trace, groups: &[Group]) {
    groups.iter().for_each(|group| trace.add_use(group.param, Access::Read));
}

/// The first gradient of a step replaces what was there, later ones add.
fn use_grads(trace: &mut Trace, groups: &[Group], first: bool) {
    let access = if first { Access::Write } else { Access::ReadWrite };
    groups.iter().for_each(|group| trace.add_use(group.grad, access));
}

/// The sums of a whole step are rounded where they are: nothing needs them afterwards.
fn round_grads(trace: &mut Trace, groups: &[Group], whole: bool) {
    let rounded = groups.iter().filter(|_| whole).filter_map(|group| group.grad16);
    rounded.for_each(|chunk| trace.add_use(chunk, Access::Write));
}
