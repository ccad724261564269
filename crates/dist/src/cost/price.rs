//! What one plan costs: seconds by cause, bytes by axis, memory by what it holds.

use super::cluster::Cluster;
use super::memory::{
    ACTIVATION_BYTES, Fullest, Memory, RankParams, STATE_BYTES, memory, pairs, tokens, weight_cut,
};
use super::plan::{Offload, Plan, PlanError, Zero};
use super::seconds::{LayerCost, Phase, Phases, Seconds, context_flows};
use super::volume::Flow;
use super::{Batch, ExpertFlow, ExpertFlows, ModelShape, experts, pool_flows};
use crate::pipeline::{Pipeline, Schedule, Times};
use crate::{Axis, Scheme};
use memory::Stripes;

/// Bytes of a parameter the optimizer reads and writes: gradient, weight, master, two moments.
const OPTIMIZER_TRAFFIC: f64 = 28.0;

/// What a rank of the fullest stage exchanges over one axis in a step.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct AxisTraffic {
    /// Bytes received; as many are sent.
    pub bytes: f64,
    /// Collectives, or messages between stages.
    pub calls: f64,
    /// Distinct ranks.
    pub peers: usize,
}

/// What one plan costs. Predicted.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Price {
    /// Which.
    pub plan: Plan,
    /// The step by cause.
    pub seconds: Seconds,
    /// Bytes of the fullest rank.
    pub memory: Memory,
    /// Traffic over each axis, in the order of `Axis::ALL`.
    pub traffic: [AxisTraffic; Axis::ALL.len()],
    /// Microbatches of a step.
    pub microbatches: usize,
}

impl Price {
    /// Whether it stays within a device and its share of the host.
    pub fn fits(&self, cluster: &Cluster) -> bool {
        self.memory.fits(cluster)
    }

    /// Seconds of the step.
    pub fn step(&self) -> f64 {
        self.seconds.total()
    }

    /// All ranks this rank exchanges data with.
    pub fn peers(&self) -> usize {
        self.traffic.iter().map(|traffic| traffic.peers).sum()
    }
}

/// Price a plan.
pub fn price(model: &ModelShape, batch: Batch, cluster: &Cluster, plan: &Plan) -> Result<Price, PlanError> {
    let pipeline = plan.check(model, batch)?;
    let layer = LayerCost::new(model, batch, cluster, plan);
    let run = Run::new((model, batch, cluster), *plan, pipeline, &layer);
    Ok(run.price(plan.zero, plan.offload))
}

/// Phases of one chunk for one microbatch.
struct Chunks {
    /// Of the stage that has most to do.
    longest: Phases,
    /// Of all stages.
    mean: Phases,
}

/// A checked plan, priced as far as it costs the same whatever its shards share and whatever waits on the host.
pub(super) struct Run<'a> {
    model: &'a ModelShape,
    batch: Batch,
    cluster: &'a Cluster,
    plan: Plan,
    pipeline: Pipeline,
    fullest: Fullest,
    /// Of a chunk on the stage that has most to do.
    times: Times,
    /// The rest only adds to it.
    seconds: Seconds,
    traffic: [AxisTraffic; Axis::ALL.len()],
}

impl<'a> Run<'a> {
    pub fn new(
        (model, batch, cluster): (&'a ModelShape, Batch, &'a Cluster),
        plan: Plan,
        pipeline: Pipeline,
        layer: &LayerCost,
    ) -> Run<'a> {
        let fullest = Fullest::of(model, batch, &plan);
        let (times, seconds, traffic) = Default::default();
        let mut run = Run { model, batch, cluster, plan, pipeline, fullest, times, seconds, traffic };
        let chunks = run.chunks(layer);
        run.times = chunks.longest.times();
        run.seconds = run.pipeline_seconds(&chunks);
        run.traffic = run.tensor_traffic(layer);
        run.pass_messages();
        run
    }

    /// The step is no shorter, whatever is shared and whatever waits.
    pub fn least(&self) -> f64 {
        self.seconds.total()
    }

    pub fn memory(&self, zero: Zero, offload: Offload) -> Memory {
        memory(self.model, self.batch, &Plan { zero, offload, ..self.plan }, &self.fullest)
    }

    pub fn price(&self, zero: Zero, offload: Offload) -> Price {
        let plan = Plan { zero, offload, ..self.plan };
        let (mut seconds, mut traffic) = (self.seconds, self.traffic);
        self.reduce_gradients(zero, &mut seconds, &mut traffic);
        self.update(offload, &mut seconds);
        self.offload_activations(offload, &mut seconds);
        for axis in Axis::ALL {
            let size = plan.mesh.size(axis);
            traffic[axis as usize].peers = if axis == Axis::Pp { (size - 1).min(2) } else { size - 1 };
        }
        let microbatches = self.pipeline.microbatches();
        Price { plan, seconds, memory: self.memory(zero, offload), traffic, microbatches }
    }

    /// One chunk for one microbatch: of the stage that has most to do, and the mean of all.
    fn chunks(&self, cost: &LayerCost) -> Chunks {
        let (p, v) = (self.pipeline.stages() as f64, self.pipeline.chunks() as f64);
        // The last slice has the head, and fewer layers for it.
        let (layers, last) = self.fullest.slice;
        let mut layer = cost.layer;
        if self.model.mixture.is_some() {
            layer.forward.experts += experts::seconds(self.cluster, &self.plan.mesh, &self.pooled());
        }
        let part = |layers: f64, head: f64| {
            let mut sum = Phases::default();
            sum.add(layer, layers);
            sum.add(cost.head, head);
            if self.plan.recompute {
                sum.input.add(layer.forward, layers);
            }
            sum
        };
        let (inner, end) = (part(layers as f64, 0.0), part(last as f64, 1.0));
        // Of the last stage one chunk has the head.
        let mut with_head = Phases::default();
        with_head.add(inner, 1.0 - 1.0 / v);
        with_head.add(end, 1.0 / v);
        let longest = if end.total() > inner.total() { with_head } else { inner };
        let mean = part(self.model.layers as f64 / (p * v), 1.0 / (p * v));
        Chunks { longest, mean }
    }

    /// What the balance of a layer's experts makes a rank receive; it asks more axes than those that layers
    /// are priced for.
    fn pooled(&self) -> [ExpertFlow; Axis::ALL.len()] {
        let words = |words| ExpertFlow { rows: Flow::default(), words };
        let flows = |mixture| pool_flows(&mixture, self.plan.scheme, &self.plan.mesh);
        self.model.mixture.map(flows).unwrap_or_default().map(words)
    }

    /// A step is as long as its longest chain of work that waits for other work. Where ranks share processors,
    /// those at work have the processors of those that wait: that is played on a clock.
    fn pipeline_seconds(&self, chunks: &Chunks) -> Seconds {
        let runs = (self.pipeline.microbatches() * self.pipeline.chunks()) as f64;
        let mut sum = Phase::default();
        for phase in [chunks.mean.forward, chunks.mean.input, chunks.mean.weight] {
            sum.add(phase, runs);
        }
        let (mean, longest) = (chunks.mean.times(), chunks.longest.times());
        let sharing = self.cluster.pace.sharing;
        let whole = match sharing > 1.0 && self.pipeline.stages() > 1 {
            true => self.pipeline.makespan_of_sharing(mean, longest, sharing),
            false => self.pipeline.makespan_of_uneven(mean, longest) / sharing,
        };
        Seconds {
            compute: sum.compute,
            tensor: sum.tensor,
            context: sum.context,
            experts: sum.experts,
            bubble: (whole - sum.total()).max(0.0),
            ..Seconds::default()
        }
    }

    fn tensor_traffic(&self, cost: &LayerCost) -> [AxisTraffic; Axis::ALL.len()] {
        let mut traffic = [AxisTraffic::default(); Axis::ALL.len()];
        let microbatches = self.pipeline.microbatches() as f64;
        let layers = microbatches * self.fullest.layers as f64;
        let forwards = if self.plan.recompute { 2.0 } else { 1.0 };
        for (i, axis) in [Axis::X, Axis::Y, Axis::Z].into_iter().enumerate() {
            let flows = [(cost.flows.0[i], forwards * layers), (cost.flows.1[i], layers)];
            for (flow, times) in flows.into_iter().chain([(cost.head_flows[i], microbatches)]) {
                traffic[axis as usize].add(flow, ACTIVATION_BYTES, times);
            }
        }
        if self.plan.mesh.size(Axis::Cp) > 1 {
            let flows = context_flows(self.model, &self.plan, tokens(self.batch, &self.plan));
            let context = &mut traffic[Axis::Cp as usize];
            context.add(flows.forward, ACTIVATION_BYTES, forwards * layers);
            context.add(flows.backward, ACTIVATION_BYTES, layers);
        }
        if self.model.mixture.is_some() {
            self.expert_traffic(&cost.expert_flows, &mut traffic, (forwards * layers, layers));
        }
        traffic
    }

    /// Of experts: layers that go there and those that go back.
    fn expert_traffic(
        &self,
        flows: &ExpertFlows,
        traffic: &mut [AxisTraffic; Axis::ALL.len()],
        (there, back): (f64, f64),
    ) {
        for (way, times) in [(flows.forward, there), (self.pooled(), there), (flows.backward, back)] {
            for (traffic, ExpertFlow { rows, words }) in traffic.iter_mut().zip(way) {
                traffic.add(rows, ACTIVATION_BYTES, times);
                traffic.add(words, experts::WORD_BYTES, times);
            }
        }
    }

    /// Activations and gradients between stages. Sends do not wait, so what shows is the way of the
    /// first microbatch down and of the last gradient up, and a link that is slower than a chunk.
    fn pass_messages(&mut self) {
        if self.pipeline.stages() == 1 {
            return;
        }
        let grid = self.plan.mesh.grid().size() as f64;
        let elements = tokens(self.batch, &self.plan) * self.model.width as f64 / grid;
        let flow = Flow { elements, calls: 1.0, hops: 1.0 };
        let each = self.cluster.link(&self.plan.mesh, Axis::Pp).seconds(flow, ACTIVATION_BYTES);
        let (slices, runs) = (
            self.pipeline.stages() * self.pipeline.chunks(),
            (self.pipeline.microbatches() * self.pipeline.chunks()) as f64,
        );
        let times = self.times;
        let behind =
            (each - times.forward).max(0.0) + (each - times.backward_input - times.backward_weight).max(0.0);
        // Whoever waits for a message leaves its processor to others.
        self.seconds.messages =
            (2.0 * (slices as f64 - 1.0) * each + runs * behind) / self.cluster.pace.sharing;
        self.traffic[Axis::Pp as usize].add(flow, ACTIVATION_BYTES, 2.0 * runs);
    }

    /// Sum gradients over everything that holds copies: the shards scatter the sum, then each is summed
    /// over the other axes, once a step; gather sharded weights.
    fn reduce_gradients(
        &self,
        zero: Zero,
        seconds: &mut Seconds,
        traffic: &mut [AxisTraffic; Axis::ALL.len()],
    ) {
        let (mesh, times, held) = (&self.plan.mesh, self.times, &self.fullest.params);
        let params = held.all();
        let microbatches = self.pipeline.microbatches() as f64;
        let shards = mesh.size(Axis::Fsdp) as f64;
        let mut once = self.sum_copies(traffic);
        let link = self.cluster.link(mesh, Axis::Fsdp);
        let twice = if zero == Zero::One { 0.0 } else { self.scattered_twice(held) };
        let (scatter, gather) = (Flow::ring(shards, params + twice), Flow::ring(shards, params));
        let scattered = link.seconds(scatter, STATE_BYTES.grad) + self.added(scatter);
        let gathered = link.seconds(gather, STATE_BYTES.weight);
        let chunks = self.pipeline.chunks() as f64;
        // Where messages take the cores that compute, nothing hides them.
        let hiding = if self.cluster.pace.beside { chunks } else { 0.0 };
        let (forward, backward) =
            (hiding * times.forward, hiding * (times.backward_input + times.backward_weight));
        let fsdp = &mut traffic[Axis::Fsdp as usize];
        let layers = self.fullest.layers as f64;
        if shards > 1.0 {
            let scatters = if zero == Zero::One { 1.0 } else { microbatches };
            // Forward and backward; where one follows the other, the head and the last layer are still there.
            let turns = match self.plan.schedule {
                Schedule::OneFOneB | Schedule::ZeroBubble => true,
                Schedule::GPipe | Schedule::Interleaved { .. } => self.pipeline.stages() == 1,
            };
            let turn = if turns { (held.layers() / layers + held.tables) / params } else { 0.0 };
            let gathers = if zero == Zero::Three { (2.0 - turn) * microbatches } else { 1.0 };
            fsdp.add(scatter, STATE_BYTES.grad, scatters);
            fsdp.add(gather, STATE_BYTES.weight, gathers);
            // What shows makes a microbatch longer on every stage: a step is as many as walk one after the other.
            let microbatches = microbatches + (self.pipeline.stages() as f64 - 1.0) / chunks;
            // Memory of what belongs to others comes and goes with every microbatch.
            let fresh = match zero {
                Zero::One => 0.0,
                Zero::Two => STATE_BYTES.grad,
                Zero::Three => STATE_BYTES.grad + (2.0 - turn) * STATE_BYTES.weight,
            };
            seconds.gradients += microbatches * fresh * gather.elements / self.cluster.pace.fresh_bytes_per_s;
            seconds.gradients += match zero {
                Zero::One => gathered,
                Zero::Two => gathered + (microbatches - 1.0) * (scattered - backward).max(0.0),
                Zero::Three => {
                    // The first layer's weights have nothing to hide behind.
                    let down = (gathered / layers + (gathered - forward).max(0.0)).min(gathered);
                    let up = (gathered + scattered - backward).max(0.0);
                    microbatches * down + (microbatches - 1.0) * up + gathered
                }
            };
            once += scattered;
            if zero > Zero::One && self.model.tied && self.pipeline.stages() > 1 {
                // The table's gradient is whole once more, for the sum of both ends.
                let whole = Flow::ring(shards, held.tables);
                fsdp.add(whole, STATE_BYTES.grad, 1.0);
                once += link.seconds(whole, STATE_BYTES.grad);
            }
        }
        // Buckets go while the last microbatch's backward still runs, but for its last layer.
        let hides = backward * (layers - 1.0) / layers;
        seconds.gradients += (once - hides).max(once / layers);
        seconds.gradients *= self.evened();
    }

    /// Sums of a rank's shard over everything else that holds copies of it.
    fn sum_copies(&self, traffic: &mut [AxisTraffic; Axis::ALL.len()]) -> f64 {
        let (mesh, held) = (&self.plan.mesh, &self.fullest.params);
        let shards = mesh.size(Axis::Fsdp) as f64;
        let mut seconds = 0.0;
        for axis in [Axis::Dp, Axis::Ep, Axis::Cp, Axis::X, Axis::Y, Axis::Z] {
            let mut flow = Flow::ring(mesh.size(axis) as f64, self.summed(held, axis) / shards);
            if flow.elements == 0.0 {
                continue;
            }
            seconds += self.added(flow);
            flow.add(flow);
            seconds += self.cluster.link(mesh, axis).seconds(flow, STATE_BYTES.grad);
            traffic[axis as usize].add(flow, STATE_BYTES.grad, 1.0);
        }
        seconds
    }

    /// Seconds of gradients that come to be added, beside their way.
    fn added(&self, flow: Flow) -> f64 {
        STATE_BYTES.grad * flow.elements / self.cluster.pace.summed_bytes_per_s
    }

    /// Parameters of a rank whose gradients are scattered twice a microbatch: where gradients of weights
    /// wait, those of norms do not, and take the rest of their stripe along.
    fn scattered_twice(&self, held: &RankParams) -> f64 {
        if self.plan.schedule != Schedule::ZeroBubble || self.pipeline.stages() == 1 {
            return 0.0;
        }
        let stripes = Stripes::new(held.all() as usize, self.plan.mesh.size(Axis::Fsdp), 0);
        let norms = 2 * self.fullest.layers;
        held.layers().min((norms * stripes.stripe()) as f64)
    }

    /// What counts of the seconds that the rank with most parameters spends on them: where ranks share
    /// processors it has more of them when the others are done.
    fn evened(&self) -> f64 {
        let stages = self.pipeline.stages() as f64;
        if stages == 1.0 {
            return 1.0;
        }
        let (held, fullest) = (&self.fullest.params, self.fullest.layers as f64);
        let layers = (held.all() - held.tables) * self.model.layers as f64 / (fullest * stages);
        let tables = 2.0 * self.model.table_params() / weight_cut(&self.plan, self.plan.scheme) / stages;
        ((layers + tables) / held.all()).max(1.0 / self.cluster.pace.sharing)
    }

    /// Parameters of a rank whose gradients are summed over `axis`: those it holds copies of while its ranks
    /// see other tokens.
    fn summed(&self, held: &RankParams, axis: Axis) -> f64 {
        let part = |held: f64, summed: bool| if summed { held } else { 0.0 };
        // Other schemes sum their weights' gradients within products.
        let deep = |scheme| axis == Axis::Z && scheme == Scheme::TwoPointFiveD;
        let plain = match axis {
            Axis::Dp | Axis::Ep | Axis::Cp => held.plain + held.tables,
            _ => {
                let layers = self.fullest.layers as f64;
                let plain = pairs(self.model, &self.plan, |pair| deep(self.plan.scheme_of(pair)));
                layers * plain + part(held.tables, deep(self.plan.scheme))
            }
        };
        if self.model.mixture.is_none() {
            return plain;
        }
        let (experts, routers) = experts::summed(&self.plan, axis);
        plain + part(held.experts, experts) + part(held.routers, routers)
    }

    /// The optimizer over a rank's shard, on the device or, chunk by chunk, on the host.
    fn update(&self, offload: Offload, seconds: &mut Seconds) {
        let shard = self.fullest.params.all() / self.plan.mesh.size(Axis::Fsdp) as f64;
        let traffic = shard * OPTIMIZER_TRAFFIC;
        seconds.optimizer = match offload.optimizer {
            false => self.evened() * traffic / self.cluster.pace.update_bytes_per_s,
            true => {
                // Gradients down, the update and weights up run beside each other.
                let link = self.cluster.host_link.bytes_per_s;
                let (down, up) = (shard * STATE_BYTES.grad / link, shard * STATE_BYTES.weight / link);
                (traffic / self.cluster.host_bytes_per_s).max(down).max(up)
            }
        };
    }

    fn offload_activations(&self, offload: Offload, seconds: &mut Seconds) {
        if !offload.activations {
            return;
        }
        let times = self.times;
        let each = self.fullest.chunk_kept_bytes() / self.cluster.host_link.bytes_per_s;
        let runs = (self.pipeline.microbatches() * self.pipeline.chunks()) as f64;
        let back = times.backward_input + times.backward_weight;
        seconds.offload = runs * ((each - times.forward).max(0.0) + (each - back).max(0.0));
    }
}

impl AxisTraffic {
    fn add(&mut self, flow: Flow, element_bytes: f64, times: f64) {
        self.bytes += times * flow.elements * element_bytes;
        self.calls += times * flow.calls;
    }
}
