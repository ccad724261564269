//! Bytes of the fullest rank, by what they hold.

use super::cluster::Cluster;
use super::plan::{Plan, Zero};
use super::volume::{Half, Laid, block, overlaps};
use super::{Batch, ModelShape, Pair, experts};
use crate::Axis;
use crate::Scheme;

/// Bytes a parameter takes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StateBytes {
    /// The weight as products read it.
    pub weight: f64,
    /// Its gradient.
    pub grad: f64,
    /// What the optimizer keeps: the rest of the f32 master and two moments.
    pub optimizer: f64,
}

/// bf16 weights whose masters keep the 16 lower bits beside them, f32 gradients and moments.
pub const STATE_BYTES: StateBytes = StateBytes { weight: 2.0, grad: 4.0, optimizer: 10.0 };

/// Bytes of an activation.
pub(super) const ACTIVATION_BYTES: f64 = 2.0;

/// Tokens whose logits the fused loss holds at a time, f32, beside a copy packed for the product.
const LOSS_SLICE: f64 = 256.0;

/// Part of a device's memory a plan may fill: the rest is for the driver, the communicator's
/// buffers and fragments.
const USABLE: f64 = 0.92;

/// Bytes of the fullest rank.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Memory {
    /// Weights, gathered ones included.
    pub weights: f64,
    /// Gradients.
    pub grads: f64,
    /// Masters and moments on the device.
    pub optimizer: f64,
    /// Values kept from forward to backward, and scratch.
    pub activations: f64,
    /// What waits in the host's memory.
    pub host: f64,
}

impl Memory {
    /// Bytes on the device.
    pub fn device(&self) -> f64 {
        self.weights + self.grads + self.optimizer + self.activations
    }

    /// Whether it stays within a device and its share of the host.
    pub fn fits(&self, cluster: &Cluster) -> bool {
        self.device() <= cluster.device_bytes * USABLE && self.host <= cluster.host_bytes * USABLE
    }
}

/// Pieces a weight of `scheme` is cut into.
pub(super) fn weight_cut(plan: &Plan, scheme: Scheme) -> f64 {
    let grid = plan.mesh.grid();
    match scheme {
        Scheme::TwoPointFiveD => (grid.x * grid.y) as f64,
        _ => grid.size() as f64,
    }
}

/// What the fullest rank has, whatever shards share and whatever waits on the host: the same for many plans.
pub(super) struct Fullest {
    /// Layers of its longest slice, and of the last slice of all.
    pub slice: (usize, usize),
    /// Layers of its stage.
    pub layers: usize,
    pub params: RankParams,
    /// Elements kept of one layer that does not run again.
    layer_kept: f64,
    /// Bytes kept from forward to backward by the fullest stage, the first.
    kept: f64,
    /// Microbatches and chunks of them.
    live: usize,
}

impl Fullest {
    pub fn of(model: &ModelShape, batch: Batch, plan: &Plan) -> Fullest {
        let chunks = plan.schedule.chunks();
        let slice = model.slice_layers(batch.context, plan.mesh.size(Axis::Pp) * chunks);
        let (layers, m) = (slice.0 * chunks, tokens(batch, plan));
        let layer_kept = kept_elements(model, plan, m);
        let each = match plan.recompute {
            true => m * model.width as f64 / plan.mesh.grid().size() as f64,
            false => layer_kept,
        };
        let live = plan.pipeline(batch).map_or(0, |pipeline| pipeline.peak_live(0));
        let kept = live as f64 * slice.0 as f64 * each * ACTIVATION_BYTES;
        Fullest { slice, layers, params: RankParams::of(model, plan, layers), layer_kept, kept, live }
    }

    /// Bytes of one microbatch's kept values on one chunk.
    pub fn chunk_kept_bytes(&self) -> f64 {
        self.kept / self.live.max(1) as f64
    }
}

/// Matrix parameters of the fullest rank.
pub(super) struct RankParams {
    /// Of layers, as the scheme cuts them.
    pub plain: f64,
    /// Of experts.
    pub experts: f64,
    /// Of routers.
    pub routers: f64,
    /// Of embedding and head.
    pub tables: f64,
}

impl RankParams {
    fn of(model: &ModelShape, plan: &Plan, layers: usize) -> RankParams {
        // The first stage has the embedding, the last the head; alone, they share a tied one.
        let tables = if plan.mesh.size(Axis::Pp) == 1 && !model.tied { 2.0 } else { 1.0 };
        let layers = layers as f64;
        let (experts, routers) =
            model.mixture.map_or((0.0, 0.0), |mixture| experts::params(model, &mixture, plan));
        RankParams {
            plain: layers * pairs(model, plan, |_| true),
            experts: layers * experts,
            routers: layers * routers,
            tables: tables * model.table_params() / weight_cut(plan, plan.scheme),
        }
    }

    /// Of layers.
    pub fn layers(&self) -> f64 {
        self.plain + self.experts + self.routers
    }

    /// All of them.
    pub fn all(&self) -> f64 {
        self.layers() + self.tables
    }
}

/// Parameters a rank holds of those pairs of products of a layer that are `asked` for.
pub(super) fn pairs(model: &ModelShape, plan: &Plan, asked: impl Fn(Pair) -> bool) -> f64 {
    let asked = model.pairs().iter().filter(|pair| asked(**pair));
    asked.map(|pair| model.pair_params(*pair) / weight_cut(plan, plan.scheme_of(*pair))).sum()
}

/// Tokens of a microbatch in one context shard, padded to what attention cuts rows and tokens into.
pub(super) fn tokens(batch: Batch, plan: &Plan) -> f64 {
    let rows = plan.microbatch_rows.next_multiple_of(plan.token_cut());
    let ranks = plan.mesh.size(Axis::Cp);
    let context = if ranks == 1 { batch.context } else { batch.context.next_multiple_of(2 * ranks) };
    (rows * context) as f64 / ranks as f64
}

/// Bytes of what the way back around the ring holds at once beside kept values: a block of keys and
/// values at work and one arriving, gradients in f32 of both, of our own block and of the queries.
/// The exchange needs less: its matrices before and behind the all-to-all.
fn context_scratch(model: &ModelShape, plan: &Plan, m: f64) -> f64 {
    if plan.mesh.size(Axis::Cp) == 1 {
        return 0.0;
    }
    let each = m / plan.mesh.grid().size() as f64;
    let block = 2.0 * (model.kv_heads * model.head_dim) as f64;
    each * (block * (2.0 * ACTIVATION_BYTES + 3.0 * 4.0) + model.attended() * 4.0)
}

/// Elements a rank keeps of one layer for `m` tokens: the inputs of two norms, q|k|v, what the
/// first feed-forward product gives (both sides of a GELU), and the inputs of the four products as
/// their scheme needs them for the gradient of the weights: gathered where it gathers.
pub(super) fn kept_elements(model: &ModelShape, plan: &Plan, m: f64) -> f64 {
    let all = plan.mesh.grid().size() as f64;
    // Plain 1D keeps the residual stream whole on every rank.
    let stream = if plan.scheme == Scheme::OneD { 1.0 } else { all };
    let mut kept = m * 2.0 * model.width as f64 / stream + m * (model.qkv() + model.up()) / all;
    for pair in model.pairs() {
        let Laid { scheme, grid, .. } = plan.laid(*pair);
        for (half, product) in model.products(*pair, m) {
            let own = product.m * product.k / all;
            let block = block(scheme, grid, product, half);
            let whole = if overlaps(scheme) { own } else { block.m * block.k };
            // SwiGLU is computed again from its inputs, unless the product has gathered it.
            let again = model.gated && *pair == Pair::Mlp && half == Half::Return;
            kept += if again && whole <= own { 0.0 } else { whole };
        }
    }
    kept + model.mixture.map_or(0.0, |mixture| experts::kept(model, &mixture, plan, m))
}

/// Elements of one layer that pass through a rank's memory outside products, for `m` tokens: those of the
/// residual stream, into two norms and out of them, and the inner ones. What a product gathers passes
/// through none but it.
pub(super) fn passing_elements(model: &ModelShape, plan: &Plan, m: f64) -> (f64, f64) {
    let all = plan.mesh.grid().size() as f64;
    let stream = m * 4.0 * model.width as f64 / if plan.scheme == Scheme::OneD { 1.0 } else { all };
    let mut inner = m * (model.qkv() + model.up()) / all;
    for pair in model.pairs().iter().filter(|pair| !(model.gated && **pair == Pair::Mlp)) {
        let closing = model.products(*pair, m).into_iter().filter(|(half, _)| *half == Half::Return);
        inner += closing.map(|(_, product)| product.m * product.k / all).sum::<f64>();
    }
    (stream, inner + model.mixture.map_or(0.0, |mixture| experts::kept(model, &mixture, plan, m)))
}

/// Memory of the fullest rank, which has `fullest`.
pub(super) fn memory(model: &ModelShape, batch: Batch, plan: &Plan, fullest: &Fullest) -> Memory {
    let state = STATE_BYTES;
    let (mesh, m) = (&plan.mesh, tokens(batch, plan));
    let shards = mesh.size(Axis::Fsdp) as f64;
    let shared = |stage: Zero| if plan.zero >= stage { shards } else { 1.0 };
    let Fullest { layers, params: held, kept, .. } = fullest;
    let (params, layers, kept) = (held.all(), *layers as f64, *kept);
    let per_layer = held.layers() / layers;
    let one_table = model.table_params() / weight_cut(plan, plan.scheme);
    // Part of what is whole for a while that is not the rank's own.
    let others = 1.0 - 1.0 / shards;
    let mut weights = params * state.weight / shared(Zero::Three);
    if plan.zero == Zero::Three && shards > 1.0 {
        // The layer at work and the next one, gathered beside it; a table counts as one.
        weights += others * (per_layer + per_layer.max(one_table)) * state.weight;
    }
    for pair in model.pairs().iter().filter(|pair| plan.scheme_of(**pair) == Scheme::ThreeD) {
        // The formula of 3D keeps gathered weights from forward to backward.
        let held = layers * pairs(model, plan, |other| other == *pair);
        weights += held * (plan.laid(*pair).grid.x as f64 - 1.0) * state.weight;
    }
    let optimizer = params * state.optimizer / shared(Zero::One);
    let scratch = fullest.layer_kept * ACTIVATION_BYTES + context_scratch(model, plan, m);
    let head = 2.0 * LOSS_SLICE.min(m) * model.vocab as f64 * 4.0 / mesh.grid().size() as f64;
    // Offloaded activations: one layer leaves while the next is computed.
    let on_device = if plan.offload.activations { kept.min(2.0 * kept / layers) } else { kept };
    let mut grads = params * state.grad / shared(Zero::Two);
    if plan.zero >= Zero::Two && shards > 1.0 {
        // Whole are the gradients of the layer at work and of the one before, on their way; that of a
        // tied table from the head to the embedding, on stages once for the sum of both ends.
        let staged = mesh.size(Axis::Pp) > 1;
        let whole = match model.tied && !staged {
            true => 2.0 * per_layer + one_table,
            false => per_layer + per_layer.max(one_table),
        };
        grads += others * whole * state.grad;
        if staged || plan.microbatches(batch) > 1 {
            // Sums of the microbatches before, on stages of the units before.
            grads += params * state.grad / shards;
        }
    }
    let mut memory =
        Memory { weights, grads, optimizer, activations: on_device + scratch.max(head), host: 0.0 };
    if plan.offload.optimizer {
        memory.host += optimizer;
        memory.optimizer = 0.0;
    }
    if plan.offload.activations {
        memory.host += kept;
    }
    memory
}
