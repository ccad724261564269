//! What a run will need, from shapes alone: predicted, before anything is reserved.

use crate::moments::Moments;
use crate::optimizer::AdamW;
use crate::recipe::{MeshRecipe, Recipe, TrainRecipe};
use device::DType;
use dist::Axis;
use dist::cost::Zero;
use dist::pipeline::{Pipeline, PipelineError};
use memory::Stripes;
use model::{Config, Recompute};
use tensor::ParamList;

/// Share of the measured GEMM peak a training step reaches, for predicted times: what the
/// bench configurations measure lies between 0.4 (AMX, bf16) and 0.8 (AVX2, f32).
pub(crate) const USUAL_UTILISATION: f64 = 0.6;

/// Predicted needs of a run.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Estimate {
    /// Parameters.
    pub params: usize,
    /// Weights, masters, gradients and moments.
    pub state_bytes: u64,
    /// Exponents of 8-bit moments, which stay in memory whatever the tiers.
    pub exponent_bytes: u64,
    /// Activations at their highest, scratch included.
    pub activation_bytes: u64,
    /// Of these what is filed in runs over tiers while one layer is at work: inputs of layers that run
    /// again, and all that the others keep.
    pub filed_bytes: u64,
    /// Layers that run again.
    pub rerun_layers: usize,
    /// Layers all of whose values are filed: those that do not run again.
    pub filed_layers: usize,
    /// Input of one layer in one microbatch.
    pub input_bytes: u64,
    /// What one layer that does not run again keeps of one microbatch.
    pub kept_bytes: u64,
    /// The copy that is written in the background.
    pub snapshot_bytes: u64,
    /// Counted FLOPs of a step.
    pub step_flops: f64,
    /// Tokens of a step.
    pub step_tokens: usize,
}

impl Estimate {
    /// For a model of `params` under `recipe`.
    pub fn new(config: &Config, params: &ParamList, recipe: &TrainRecipe, snapshot: bool) -> Estimate {
        let count: usize = params.specs().iter().map(|spec| spec.len()).sum();
        let moments = recipe.adamw.moments;
        let per_param = AdamW::bytes_per_param(recipe.dtype, moments);
        let step_tokens = recipe.batch * recipe.context * recipe.accumulate;
        // Gradients are not saved.
        let snapshot_bytes = if snapshot { count * AdamW::saved_per_param(moments) } else { 0 };
        let exponents = if moments == Moments::Bits8 { 2 * count.div_ceil(tensor::BLOCK) } else { 0 };
        let parts = Activations::new(config, recipe);
        let (full, inputs) = kept_layers(config, recipe.recompute);
        let rerun_layers = (0..config.layers()).filter(|layer| recipe.recompute.applies_to(*layer)).count();
        let filed_layers = config.layers() - rerun_layers;
        let kept_bytes = full as u64 * parts.kept_bytes;
        let others = if filed_layers > 0 { full as u64 - 1 } else { 0 };
        let filed_bytes =
            inputs as u64 * parts.input_bytes + others * (parts.kept_bytes - parts.staying_bytes);
        Estimate {
            params: count,
            state_bytes: (count * per_param) as u64,
            exponent_bytes: exponents as u64,
            activation_bytes: kept_bytes + inputs as u64 * parts.input_bytes + parts.scratch_bytes,
            filed_bytes,
            rerun_layers,
            filed_layers,
            input_bytes: parts.input_bytes,
            kept_bytes: parts.kept_bytes,
            snapshot_bytes: snapshot_bytes as u64,
            step_flops: config.flops().per_token(recipe.context) * step_tokens as f64,
            step_tokens,
        }
    }

    /// The same for all ranks of `mesh`, which are threads of one process: replicas each have a copy
    /// of what they do not share; ranks of `ep` share the experts. What is whole for a while counts with the
    /// activations. `tiers`: whether chunks come and go.
    pub fn over(self, config: &Config, mesh: &MeshRecipe, recipe: &TrainRecipe, tiers: bool) -> Estimate {
        let (dtype, moments) = (recipe.dtype, recipe.adamw.moments);
        let size = |axis| mesh.shape.size(axis);
        let experts = config.expert_params();
        let held = (self.params - experts) * size(Axis::Ep) + experts;
        let copies = size(Axis::Dp) * size(Axis::Cp);
        let kept = |stage: Zero| if mesh.sharding.zero >= stage { 1 } else { size(Axis::Fsdp) };
        let (weight, grad) = (dtype.size_bytes(), DType::F32.size_bytes());
        let optimizer = AdamW::bytes_per_param(dtype, moments) - weight - grad;
        let each = weight * kept(Zero::Three) + grad * kept(Zero::Two) + optimizer * kept(Zero::One);
        let passing_bytes = (copies * passing_bytes(config, mesh, self.params, recipe)) as u64;
        // Those that share gradients keep the sums of the microbatches before beside them, once; in tiers
        // within them.
        let shares = size(Axis::Fsdp) > 1 && mesh.sharding.zero >= Zero::Two && !tiers;
        let several = size(Axis::Pp) > 1 || recipe.accumulate > 1;
        let each = each + if shares && several { grad } else { 0 };
        Estimate {
            state_bytes: (held * copies * each) as u64,
            activation_bytes: self.activation_bytes + passing_bytes,
            ..self
        }
    }

    /// The same for all stages of a pipeline, which are threads of one process: each holds the microbatches
    /// that its schedule promises, and a tied embedding is on both ends.
    pub(crate) fn on_stages(self, config: &Config, recipe: &Recipe) -> Result<Estimate, PipelineError> {
        let stages = recipe.mesh.shape.size(Axis::Pp);
        if stages == 1 {
            return Ok(self);
        }
        let pipeline = Pipeline::new(stages, recipe.train.accumulate, recipe.mesh.schedule)?;
        let held: usize = (0..stages).map(|stage| pipeline.peak_live(stage)).sum();
        let slices = stages * pipeline.chunks();
        let table = if config.tied() { config.vocab() * config.width() } else { 0 };
        Ok(Estimate {
            activation_bytes: (self.activation_bytes * held as u64).div_ceil(slices as u64),
            state_bytes: self.state_bytes + self.state_bytes / self.params.max(1) as u64 * table as u64,
            ..self
        })
    }

    /// All of it.
    pub fn total_bytes(&self) -> u64 {
        self.state_bytes + self.exponent_bytes + self.activation_bytes + self.snapshot_bytes
    }

    /// Predicted seconds of a step on a machine of `peak_gflops`.
    pub fn step_seconds(&self, peak_gflops: f64) -> f64 {
        self.step_flops / (peak_gflops * 1e9 * USUAL_UTILISATION)
    }
}

/// What ranks that share the state hold of each other's while a layer, or a table of words, is at work: its
/// weights and those of the next, and its gradients until they are added up, in whole stripes; gradients
/// of a tied table from the head to the embedding. Of several microbatches also the sums so far of what
/// is being written.
fn passing_bytes(config: &Config, mesh: &MeshRecipe, params: usize, recipe: &TrainRecipe) -> usize {
    let others = mesh.shape.size(Axis::Fsdp) - 1;
    let table = config.vocab() * config.width();
    let tables = if config.tied() { table } else { 2 * table };
    let layer = params.saturating_sub(tables).div_ceil(config.layers().max(1));
    // Where a run of parameters begins and ends within stripes, of every piece of the model.
    let pieces: usize = [Axis::X, Axis::Y, Axis::Z].into_iter().map(|axis| mesh.shape.size(axis)).product();
    let edges = 2 * pieces * Stripes::new(params / pieces, 1, 0).granule;
    let weights = if mesh.sharding.zero >= Zero::Three { layer + layer.max(table) + edges } else { 0 };
    let waiting = if config.tied() { table } else { 0 };
    let written = if mesh.sharding.zero >= Zero::Two { layer.max(table) + edges } else { 0 };
    let grads = written + if mesh.sharding.zero >= Zero::Two { waiting } else { 0 };
    let sums = if others > 0 && recipe.accumulate > 1 { written } else { 0 };
    others * (weights * recipe.dtype.size_bytes() + grads * DType::F32.size_bytes())
        + sums * DType::F32.size_bytes()
}

/// Seconds one measured product may take, about.
const PRODUCT_S: f64 = 0.03;

impl Estimate {
    /// Predicted seconds of a step on this machine, from what it reaches on a layer's widest product
    /// and on the optimizer's update, both measured now (less than a second). Norms, softmax and other
    /// passes over activations are not in it, so steps of narrow models take longer than it says.
    pub fn measured_step_seconds(&self, config: &Config, recipe: &TrainRecipe, peak_gflops: f64) -> f64 {
        let (k, n) = (config.width(), config.ffn());
        let rows = (PRODUCT_S * peak_gflops * 1e9 / (2 * k * n) as f64) as usize;
        let m = (recipe.batch * recipe.context).min(rows.max(64));
        let gflops = kernels::peak::gflops_of(recipe.device, recipe.dtype, [m, k, n]);
        self.step_flops / (gflops * 1e9) + self.params as f64 * kernels::peak::update_seconds(recipe.device)
    }
}

/// Bytes of one microbatch, by cause.
pub(crate) struct Activations {
    /// What one layer keeps from its forward to its backward pass, beside its input.
    pub(crate) kept_bytes: u64,
    /// Of these the single values per token, head and expert, which are not filed over tiers.
    pub(crate) staying_bytes: u64,
    /// The input of one layer.
    pub(crate) input_bytes: u64,
    /// The largest scratch beside them.
    pub(crate) scratch_bytes: u64,
}

impl Activations {
    pub(crate) fn new(config: &Config, recipe: &TrainRecipe) -> Activations {
        let (n, k, h) = config.heads();
        let (d, f, v) = (config.width(), config.ffn(), config.vocab());
        let size = match recipe.dtype {
            DType::F32 => 4,
            _ => 2,
        };
        let m = recipe.batch * recipe.context;
        let gates = if config.gated() { 2 * f } else { f };
        // Kept per token and layer: two inputs of norms, two outputs of norms, q|k|v and the attended
        // heads, the feed-forward's inner values (GELU keeps its output beside its input).
        let inner = if config.gated() { gates } else { 2 * f };
        let before_norm = if config.qk_norm() { (n + 2 * k) * h } else { 0 };
        let kept = 4 * d + (n + 2 * k) * h + before_norm + n * h + inner;
        // Of experts also the rows that go to them and come back; of the one all tokens share its inner
        // values, too.
        let (routed, choices) = config.moe().map_or((0, 0), |moe| {
            let shared = moe.shared_ffn.map_or(0, |ffn| 2 * ffn + 2 * d);
            (2 * moe.choices * d + shared, moe.choices)
        });
        let kept = kept + routed;
        // In f32: a sum per head, the router's probabilities and weights, a gate before and behind its sigmoid.
        let routes = config.moe().map_or(0, |moe| moe.experts + moe.choices + 2);
        let staying = (m * (n + routes) * 4) as u64;
        // The head: a slice of logits and its packed copy; the layers' scratch: gradients of the
        // inner values, the packed operand of the widest product.
        let slice = tensor::loss_slice_tokens(recipe.device, v).min(m);
        let head = 2 * slice * v * 4 + 2 * m * d * size;
        let scratch = m * (gates + f + (2 + 2 * choices) * d) * size + m * gates * 4;
        Activations {
            kept_bytes: (m * kept * size) as u64 + staying,
            staying_bytes: staying,
            input_bytes: (m * d * size) as u64,
            scratch_bytes: (head.max(scratch) + 2 * m * d * size) as u64,
        }
    }
}

/// Layers that keep every value at once, and those of which only the input is kept beside them.
fn kept_layers(config: &Config, recompute: Recompute) -> (usize, usize) {
    let layers = config.layers();
    let full = match recompute {
        Recompute::Never => layers,
        // While a layer runs again it keeps everything.
        Recompute::First(count) => layers.saturating_sub(count).max(1),
        Recompute::Always => 1,
    };
    (full, layers - full.min(layers))
}
