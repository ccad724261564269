//! Seconds of one layer on one rank: products beside the messages that feed them.

use super::cluster::Cluster;
use super::memory::{ACTIVATION_BYTES, passing_elements, tokens};
use super::plan::Plan;
use super::volume::{Flow, Grid, Half, Laid, Product, block, crossing, inner_cut, overlaps, panels};
use super::{Batch, ExpertFlows, MixtureShape, ModelShape, Pair, expert_flows, expert_products, experts};
use crate::pipeline::Times;
use crate::{Axis, ContextAttention, Moved, Scheme};

/// Times each kept value passes through memory outside products, forward: written, read by the next
/// op, and once more for residuals and norms.
const ELEMENT_PASSES: f64 = 3.0;

/// Times a copy passes through memory: read and written.
const COPIED: f64 = 2.0;

/// Times what is finished passes through memory: the sum, what is added to it, the outcome.
const FINISHED: f64 = 3.0;

/// A step by cause. Parts of messages that run beside products count nowhere.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Seconds {
    /// Products, attention, elementwise work; with recompute, its second forward.
    pub compute: f64,
    /// Messages of the tensor axes nothing hides.
    pub tensor: f64,
    /// Messages of the context axis attention does not hide.
    pub context: f64,
    /// Rows that go to experts and come back, and what routers need.
    pub experts: f64,
    /// Stages that wait for others.
    pub bubble: f64,
    /// Messages between stages.
    pub messages: f64,
    /// Gradients and weights of replicas and shards, what backward does not hide.
    pub gradients: f64,
    /// The optimizer.
    pub optimizer: f64,
    /// Activations to the host and back, what compute does not hide.
    pub offload: f64,
}

impl Seconds {
    /// (name, seconds) of every part.
    pub fn parts(&self) -> [(&'static str, f64); 9] {
        [
            ("compute", self.compute),
            ("tensor messages", self.tensor),
            ("context messages", self.context),
            ("expert messages", self.experts),
            ("pipeline bubble", self.bubble),
            ("pipeline messages", self.messages),
            ("gradients and shards", self.gradients),
            ("optimizer", self.optimizer),
            ("activation offload", self.offload),
        ]
    }

    /// The part that is most above that of `other`, and by how many seconds.
    pub fn most_over(&self, other: &Seconds) -> (&'static str, f64) {
        let parts = self.parts().into_iter().zip(other.parts());
        let more = parts.map(|((name, ours), (_, theirs))| (name, ours - theirs));
        more.max_by(|a, b| a.1.total_cmp(&b.1)).unwrap_or(("", 0.0))
    }

    /// The step.
    pub fn total(&self) -> f64 {
        self.parts().iter().map(|(_, seconds)| seconds).sum()
    }
}

const TENSOR: [Axis; 3] = [Axis::X, Axis::Y, Axis::Z];

/// One phase of one layer.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Phase {
    pub compute: f64,
    pub tensor: f64,
    pub context: f64,
    pub experts: f64,
}

impl Phase {
    pub fn total(&self) -> f64 {
        self.compute + self.tensor + self.context + self.experts
    }

    pub fn add(&mut self, other: Phase, times: f64) {
        self.compute += times * other.compute;
        self.tensor += times * other.tensor;
        self.context += times * other.context;
        self.experts += times * other.experts;
    }
}

/// Forward, gradients of inputs, gradients of weights.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Phases {
    pub forward: Phase,
    pub input: Phase,
    pub weight: Phase,
}

/// Everything the seconds and bytes of a layer depend on; the same for many plans.
pub(super) struct LayerCost {
    pub layer: Phases,
    pub head: Phases,
    /// Elements received over x, y, z by a layer: forward, backward.
    pub flows: ([Flow; 3], [Flow; 3]),
    /// The same of the head, both together.
    pub head_flows: [Flow; 3],
    /// Of a layer's experts, over all axes.
    pub expert_flows: ExpertFlows,
}

impl LayerCost {
    pub fn new(model: &ModelShape, batch: Batch, cluster: &Cluster, plan: &Plan) -> LayerCost {
        let mut cost = LayerCost::headless(model, batch, cluster, plan);
        (cost.head, cost.head_flows) = head_seconds(model, cluster, plan, tokens(batch, plan));
        cost
    }

    /// All but the head, for those who ask for layers only.
    pub fn headless(model: &ModelShape, batch: Batch, cluster: &Cluster, plan: &Plan) -> LayerCost {
        let m = tokens(batch, plan);
        let mut cost = LayerCost {
            layer: Phases::default(),
            head: Phases::default(),
            flows: Default::default(),
            head_flows: Default::default(),
            expert_flows: ExpertFlows::default(),
        };
        for pair in model.pairs() {
            for (half, product) in model.products(*pair, m) {
                let (phases, flows) = product_seconds(cluster, plan, plan.laid(*pair), (half, product));
                cost.layer.add(phases, 1.0);
                cost.receive(flows);
            }
            cost.cross(cluster, plan, *pair, m * model.width as f64);
        }
        if let Some(mixture) = &model.mixture {
            cost.add_experts((model, mixture), cluster, plan, m);
        }
        attention_seconds(&mut cost.layer, model, batch, cluster, plan);
        let (stream, inner) = passing_elements(model, plan, m);
        let each = stream / cluster.pace.norm_bytes_per_s + inner / cluster.pace.element_bytes_per_s;
        let seconds = ELEMENT_PASSES * ACTIVATION_BYTES * each;
        cost.layer.forward.compute += seconds;
        cost.layer.input.compute += 2.0 * seconds;
        cost
    }

    fn receive(&mut self, (forward, backward): ([Flow; 3], [Flow; 3])) {
        for axis in 0..3 {
            self.flows.0[axis].add(forward[axis]);
            self.flows.1[axis].add(backward[axis]);
        }
    }

    /// The way of a part's input from the residual stream and of its output back, and both gradients.
    fn cross(&mut self, cluster: &Cluster, plan: &Plan, pair: Pair, elements: f64) {
        // Too far apart is no plan: `Plan::check` says so.
        let flows = crossing(&plan.mesh, plan.scheme, plan.scheme_of(pair), elements).unwrap_or_default();
        let seconds = TENSOR.iter().zip(flows).map(|(axis, flow)| {
            let laid = COPIED * ACTIVATION_BYTES * flow.elements / cluster.pace.moved_bytes_per_s;
            cluster.link(&plan.mesh, *axis).seconds(flow, ACTIVATION_BYTES) + laid
        });
        let seconds: f64 = seconds.sum();
        self.layer.forward.tensor += seconds;
        self.layer.input.tensor += seconds;
        self.receive((flows, flows));
    }

    fn add_experts(
        &mut self,
        (model, mixture): (&ModelShape, &MixtureShape),
        cluster: &Cluster,
        plan: &Plan,
        m: f64,
    ) {
        let at = (plan.scheme, &plan.mesh);
        let flows = expert_flows(mixture, model.width, at, m);
        let seconds = |way| experts::seconds(cluster, &plan.mesh, way);
        self.layer.forward.experts += seconds(&flows.forward);
        self.layer.input.experts += seconds(&flows.backward);
        self.expert_flows = flows;
        for (times, product) in expert_products(mixture, model.width, at, m) {
            let Phases { forward, input, weight } = &mut self.layer;
            for (phase, turn) in [(forward, Turn::Forward), (input, Turn::Input), (weight, Turn::Weight)] {
                phase.compute += times * gemm_seconds(cluster, turn, product, 1.0);
            }
        }
    }
}

impl Phases {
    pub fn add(&mut self, other: Phases, times: f64) {
        self.forward.add(other.forward, times);
        self.input.add(other.input, times);
        self.weight.add(other.weight, times);
    }

    pub fn times(&self) -> Times {
        Times {
            forward: self.forward.total(),
            backward_input: self.input.total(),
            backward_weight: self.weight.total(),
        }
    }

    pub fn total(&self) -> f64 {
        self.times().total()
    }
}

/// A product and its gradients, and what arrives for them: forward, backward.
fn product_seconds(
    cluster: &Cluster,
    plan: &Plan,
    laid: Laid,
    (half, product): (Half, Product),
) -> (Phases, ([Flow; 3], [Flow; 3])) {
    let (scheme, grid) = (laid.scheme, laid.grid);
    let mut volume = laid.volume(product, half);
    if scheme == Scheme::TwoPointFiveD {
        // The sum over depth is taken once a step, with the other gradients.
        volume.backward_weight[2] = Flow::default();
    }
    let panels = panels(scheme, grid) as f64;
    let here = block(scheme, grid, product, half);
    let phase = |turn, flows: [Flow; 3]| {
        let compute = gemm_seconds(cluster, turn, here, panels);
        let each = TENSOR.iter().zip(flows);
        let added = summed(scheme, half, turn).map(|axis| laid.placed(axis));
        let messages = each.map(|(axis, flow)| {
            let copied = COPIED * laid_out(scheme, plan.mesh.size(*axis), flow);
            let added = if added == Some(*axis) { flow.elements } else { 0.0 };
            cluster.link(&plan.mesh, *axis).seconds(flow, ACTIVATION_BYTES)
                + ACTIVATION_BYTES * copied / cluster.pace.moved_bytes_per_s
                + ACTIVATION_BYTES * added / cluster.pace.summed_bytes_per_s
        });
        let messages: f64 = messages.sum();
        // Streaming panels, only the first and what is longer than the products show.
        let shown = match overlaps(scheme) && cluster.pace.beside {
            true => messages / panels + (messages - compute).max(0.0) * (1.0 - 1.0 / panels),
            false => messages,
        };
        Phase { compute, tensor: shown, ..Phase::default() }
    };
    let mut phases = Phases {
        forward: phase(Turn::Forward, volume.forward),
        input: phase(Turn::Input, volume.backward_input),
        weight: phase(Turn::Weight, volume.backward_weight),
    };
    phases.forward.compute +=
        FINISHED * ACTIVATION_BYTES * finished(scheme, half, grid, here) / cluster.pace.moved_bytes_per_s;
    let mut backward = volume.backward_input;
    for (sum, flow) in backward.iter_mut().zip(volume.backward_weight) {
        sum.add(flow);
    }
    (phases, (volume.forward, backward))
}

/// Elements of a block whose sum over ranks or panels is rounded or gets its residual once it is whole.
fn finished(scheme: Scheme, half: Half, grid: Grid, Product { m, n, .. }: Product) -> f64 {
    match (scheme, half) {
        (Scheme::OneD | Scheme::OneDSequence, Half::Leave) | (Scheme::ThreeD, _) => 0.0,
        (Scheme::OneD, Half::Return) | (Scheme::Summa | Scheme::TwoPointFiveD, _) => m * n,
        (Scheme::OneDSequence, Half::Return) | (Scheme::WeightStationary, Half::Leave) => {
            m * n / grid.x as f64
        }
        (Scheme::WeightStationary, Half::Return) => m * n / grid.y as f64,
    }
}

/// The axis of the scheme over which the outcome of a product is summed.
fn summed(scheme: Scheme, half: Half, turn: Turn) -> Option<Axis> {
    use {Half::*, Turn::*};
    match (scheme, half, turn) {
        (Scheme::OneD | Scheme::OneDSequence, Leave, Input) => Some(Axis::X),
        (Scheme::OneD | Scheme::OneDSequence, Return, Forward) => Some(Axis::X),
        (Scheme::WeightStationary, Leave, Forward) | (Scheme::WeightStationary, Return, Input) => {
            Some(Axis::X)
        }
        (Scheme::WeightStationary, Leave, Input) | (Scheme::WeightStationary, Return, Forward) => {
            Some(Axis::Y)
        }
        (Scheme::Summa | Scheme::TwoPointFiveD, _, Input) => Some(Axis::Y),
        (Scheme::Summa | Scheme::TwoPointFiveD | Scheme::ThreeD, _, Weight) => Some(Axis::X),
        (Scheme::ThreeD, Leave, Forward) | (Scheme::ThreeD, Return, Input) => Some(Axis::Z),
        (Scheme::ThreeD, Leave, Input) | (Scheme::ThreeD, Return, Forward) => Some(Axis::Y),
        _ => None,
    }
}

/// Elements that a rank of `n` copies for a flow of a product: columns are laid out piece by piece before they
/// travel, or side by side when they have come; the owner of a panel cuts it out or puts it back.
fn laid_out(scheme: Scheme, n: usize, flow: Flow) -> f64 {
    let (n, others) = (n as f64, (n as f64 - 1.0).max(1.0));
    match scheme {
        Scheme::WeightStationary => flow.elements * n / others,
        Scheme::Summa | Scheme::TwoPointFiveD => flow.elements / others,
        Scheme::OneD | Scheme::OneDSequence | Scheme::ThreeD => 0.0,
    }
}

/// Which product of a linear layer y [M, N] = x [M, K] wᵀ [K, N].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Turn {
    /// y = x wᵀ.
    Forward,
    /// dx = dy w.
    Input,
    /// dw += dyᵀ x, in f32.
    Weight,
}

/// What a product of a layer makes a device do.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Work {
    /// Multiplications and additions.
    pub flops: f64,
    /// Bytes of operands, each counted as often as it is packed.
    pub packed_bytes: f64,
    /// Bytes of the outcome that are written, and read to be added to.
    pub written_bytes: f64,
}

impl Work {
    /// Of m tokens, k inputs and n outputs, the inputs walked in `panels`.
    pub fn of(turn: Turn, Product { m, k, n }: Product, panels: f64) -> Work {
        // Of f32: written, or read as well to be added to.
        const WRITTEN: f64 = 4.0;
        const ADDED: f64 = 8.0;
        let (packed, written_bytes) = match turn {
            Turn::Forward if panels > 1.0 => (m * k + k * n, (WRITTEN + ADDED * (panels - 1.0)) * m * n),
            Turn::Forward => (m * k + k * n, ACTIVATION_BYTES * m * n),
            Turn::Input => (panels * m * n + k * n, ACTIVATION_BYTES * m * k),
            Turn::Weight => (panels * m * n + m * k, ADDED * k * n),
        };
        Work { flops: 2.0 * m * k * n, packed_bytes: ACTIVATION_BYTES * packed, written_bytes }
    }
}

/// Seconds of a block: its FLOPs or its bytes, whichever take longer, and what is packed and written. Panels
/// accumulate in f32.
fn gemm_seconds(cluster: &Cluster, turn: Turn, block: Product, panels: f64) -> f64 {
    let Product { m, k, n } = block;
    let Work { flops, packed_bytes, written_bytes } = Work::of(turn, block, panels);
    let written = if panels > 1.0 { 8.0 * panels * m * n } else { ACTIVATION_BYTES * m * n };
    let bytes = ACTIVATION_BYTES * (m * k + k * n) + written;
    (flops / cluster.flops_per_s).max(bytes / cluster.device_bytes_per_s)
        + packed_bytes / cluster.pace.packed_bytes_per_s
        + written_bytes / cluster.pace.written_bytes_per_s
}

fn attention_seconds(layer: &mut Phases, model: &ModelShape, batch: Batch, cluster: &Cluster, plan: &Plan) {
    let (m, cp) = (tokens(batch, plan), plan.mesh.size(Axis::Cp));
    let Laid { scheme, grid, .. } = plan.laid(Pair::Attention);
    let (_, head_cut) = inner_cut(scheme, grid);
    // Heads that do not divide leave some ranks with one more.
    let uneven = (model.heads.div_ceil(head_cut) * head_cut) as f64 / model.heads as f64;
    let flops = model.attention_flops(m, batch.context) * uneven / grid.size() as f64;
    let seconds = flops / cluster.pace.attention_flops_per_s;
    layer.forward.compute += seconds;
    layer.input.compute += 2.0 * seconds;
    if cp > 1 {
        let ContextFlows { forward, backward, hides, moved_bytes } = context_flows(model, plan, m);
        let link = cluster.link(&plan.mesh, Axis::Cp);
        // The ring runs beside attention, the exchange before and behind it.
        let shown = |flow: Flow, beside: f64| {
            (link.seconds(flow, ACTIVATION_BYTES) - if hides && cluster.pace.beside { beside } else { 0.0 })
                .max(0.0)
        };
        let [there, back] = moved_bytes.map(|bytes| bytes / cluster.pace.moved_bytes_per_s);
        layer.forward.context += shown(forward, seconds) + there;
        layer.input.context += shown(backward, 2.0 * seconds) + back;
    }
}

/// What attention on the context axis makes a rank receive for one layer, in elements of two bytes.
pub(super) struct ContextFlows {
    pub forward: Flow,
    pub backward: Flow,
    /// Whether it runs beside the computation.
    pub hides: bool,
    /// Read and written by a rank beside attention and messages: forward, backward.
    pub moved_bytes: [f64; 2],
}

/// A ring of keys and values, or the exchange of heads against tokens, as training would choose. `m`
/// are the tokens of a context shard.
pub(super) fn context_flows(model: &ModelShape, plan: &Plan, m: f64) -> ContextFlows {
    let ranks = plan.mesh.size(Axis::Cp);
    let Laid { scheme, grid, .. } = plan.laid(Pair::Attention);
    let (token_cut, head_cut) = inner_cut(scheme, grid);
    let k = model.kv_heads.div_ceil(head_cut);
    let heads = (k * (model.heads / model.kv_heads), k);
    let each = m / token_cut as f64 * model.head_dim as f64;
    let hides = ContextAttention::Auto.resolved(ranks, heads) == ContextAttention::Ring;
    let moved = if hides { Moved::ring(ranks, k) } else { Moved::all_to_all(ranks, heads) };
    let hops = ranks as f64 - 1.0;
    // A ring makes a call a hop; there are two exchanges a way, and two rings on the way back.
    let (calls, hops) =
        if hides { ([hops, 2.0 * hops], [hops, 2.0 * hops]) } else { ([2.0; 2], [2.0 * hops; 2]) };
    let wide = 4.0 / ACTIVATION_BYTES;
    let backward = moved.backward + wide * moved.backward_f32;
    let (q, kv) = (heads.0 as f64 * each, 2.0 * k as f64 * each);
    let moved_bytes = if hides {
        ring_bytes(q, kv, ranks as f64 - 1.0)
    } else {
        // Queries, keys, values and the outcome are cut for their ranks, and put together where they come.
        let copied = 2.0 * COPIED * ACTIVATION_BYTES * (2.0 * q + kv);
        [copied, copied]
    };
    ContextFlows {
        forward: Flow { elements: moved.forward * each, calls: calls[0], hops: hops[0] },
        backward: Flow { elements: backward * each, calls: calls[1], hops: hops[1] },
        hides,
        moved_bytes,
    }
}

/// Bytes a rank of a ring reads and writes for `q` elements of queries and `kv` of keys and values in `hops`
/// blocks of others: forward, backward.
fn ring_bytes(q: f64, kv: f64, hops: f64) -> [f64; 2] {
    const F32: f64 = 4.0;
    let cut_out = COPIED * ACTIVATION_BYTES * kv;
    let rounded = F32 + ACTIVATION_BYTES;
    // What a block adds is written, and merged into the sum: two read, one written.
    let forward = cut_out + hops * 4.0 * F32 * q + rounded * q;
    // Gradients begin as zeros, those of keys and values for every block, and are added along the ring.
    let zeros = F32 * (q + (hops + 1.0) * kv);
    let backward = cut_out + zeros + hops * 3.0 * F32 * kv + rounded * (q + kv);
    [forward, backward]
}

/// The head by the scheme that suits it: its output is never moved where that can be helped.
fn head_seconds(model: &ModelShape, cluster: &Cluster, plan: &Plan, m: f64) -> (Phases, [Flow; 3]) {
    let schemes: &[Scheme] = match plan.scheme {
        Scheme::WeightStationary => &[Scheme::WeightStationary, Scheme::Summa],
        _ => std::slice::from_ref(&plan.scheme),
    };
    let priced = schemes.iter().map(|scheme| {
        let (phases, (forward, backward)) = product_seconds(
            cluster,
            plan,
            Laid::new(&plan.mesh, *scheme, *scheme),
            (Half::Leave, model.head(m)),
        );
        let mut flows = forward;
        for (sum, flow) in flows.iter_mut().zip(backward) {
            sum.add(flow);
        }
        (phases, flows)
    });
    let (mut phases, flows) = priced.min_by(|a, b| a.0.total().total_cmp(&b.0.total())).unwrap_or_default();
    // Loss and gradient of a logit are computed together, on the way up.
    phases.forward.compute +=
        m * model.vocab as f64 / plan.mesh.grid().size() as f64 / cluster.pace.logits_per_s;
    (phases, flows)
}
