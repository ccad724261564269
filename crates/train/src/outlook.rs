//! A training step nobody has run: from a recipe and a machine that may both be on paper to the trace
//! the memory planner works on. Reads no data and reserves nothing.

use crate::TrainError;
use crate::estimate::{Activations, USUAL_UTILISATION};
use crate::recipe::{Recipe, TrainRecipe};
use device::DType;
use dist::Mesh;
use memory::plan::{StateLayout, Transformer, Updates};
use model::{Config, Model, Recompute};

/// A part of a layer holds at most this many bytes of gradients, so that parts move one by one.
const PART_BYTES: u64 = 256 << 20;

/// Microbatches of a trace: those between the first and the last are all alike.
const MOST_MICROBATCHES: u32 = 4;

/// Moments of a trace, about: more would take minutes to plan.
const MOST_MOMENTS: u64 = 20_000;

/// Speeds of one rank's machine.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Speeds {
    /// Peak of the processor that runs the layers, in the recipe's precision.
    pub flops_per_s: f64,
    /// Memory of the fastest tier, in bytes.
    pub fastest_per_s: f64,
    /// Memory of the host, in bytes; none: it is the fastest tier.
    pub host_per_s: Option<f64>,
}

/// Sizes of the step that `recipe` describes, and its predicted seconds at `speeds`.
///
/// Of many
/// microbatches four are taken. Errors: files that cannot be read, sizes that make no model.
pub fn outlook(config: &Config, recipe: &Recipe, speeds: &Speeds) -> Result<Transformer, TrainError> {
    let params = Model::build(config, recipe.train.context, &Mesh::solo())?.params;
    let count: u64 = params.specs().iter().map(|spec| spec.len() as u64).sum();
    let updates = updates(recipe.mesh.shape.world_size(), recipe.train.clip);
    Ok(transformer(config, count, (&recipe.train, updates), speeds))
}

/// When a run makes its updates. Ranks do when the way back is over. On one, clipping
/// waits for the norm of all gradients, and updates then wait for the next step.
pub(crate) fn updates(ranks: usize, clip: f64) -> Updates {
    match ranks {
        1 if clip.is_finite() => Updates::BeforeForward,
        1 => Updates::InBackward,
        _ => Updates::AfterBackward,
    }
}

pub(crate) fn transformer(
    config: &Config,
    params: u64,
    (recipe, updates): (&TrainRecipe, Updates),
    speeds: &Speeds,
) -> Transformer {
    let layers = config.layers() as u64;
    let matrix = (config.vocab() * config.width()) as u64;
    let head_params = if config.tied() { 0 } else { matrix };
    // What is in no layer: embedding, head, positions and the last norm.
    let layer_params = (params - head_params - matrix) / layers;
    let embed_params = params - head_params - layers * layer_params;
    let state = match recipe.dtype {
        DType::F32 => StateLayout::F32,
        _ => StateLayout::SPLIT,
    };
    let moment = recipe.adamw.moments.dtype().size_bytes() as u64;
    let grad16 = if recipe.adamw.gradients == DType::Bf16 { 2 } else { 0 };
    let state = StateLayout { m: moment, v: moment, grad16, ..state };
    // An update reads the gradient, reads and writes the rest.
    let (kept, read) =
        (state.param + state.master + 2 * moment, if grad16 > 0 { grad16 } else { state.grad });
    let update_bytes = (2 * kept + read) as f64;
    let activations = Activations::new(config, recipe);
    let tokens = (recipe.batch * recipe.context) as f64;
    let flops = config.flops().per_token(recipe.context) * tokens;
    let update = |per_s: f64| update_bytes / per_s;
    let accumulate = (recipe.accumulate as u64).clamp(1, u64::from(MOST_MICROBATCHES));
    // Forward and backward of each microbatch, and the update.
    let most_parts = (MOST_MOMENTS / (layers * (2 * accumulate + 1))).clamp(1, 64);
    Transformer {
        layers: layers as u32,
        layer_params,
        embed_params,
        head_params,
        state,
        parts: (layer_params * state.grad).div_ceil(PART_BYTES).clamp(1, most_parts) as u32,
        updates,
        accumulate: accumulate as u32,
        kept_bytes: activations.kept_bytes,
        input_bytes: activations.input_bytes,
        recompute: recipe.recompute != Recompute::Never,
        other_bytes: activations.scratch_bytes,
        // A third of the FLOPs are the way forth.
        layer_forward_s: flops / 3.0 / layers as f64 / (speeds.flops_per_s * USUAL_UTILISATION),
        update_s: update(speeds.fastest_per_s),
        host_update_s: speeds.host_per_s.map(update),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn updates_are_made_when_a_run_makes_them() {
        assert_eq!(updates(1, 1.0), Updates::BeforeForward);
        assert_eq!(updates(1, f64::INFINITY), Updates::InBackward);
        assert_eq!(updates(2, 1.0), Updates::AfterBackward);
        assert_eq!(updates(2, f64::INFINITY), Updates::AfterBackward);
    }
}
