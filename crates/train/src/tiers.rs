//! From `[memory]` to what a pager may use, and whether a run can work within it. Pure but for what
//! the system has free.

use crate::TrainError;
use crate::bytes;
use crate::estimate::Estimate;
use crate::optimizer::AdamW;
use crate::recipe::Recipe;
use memory::pager::{Setup, chunk_elements, free_for_chunks};
use tensor::ParamList;

/// Activations are predicted a little low for some models: until a step has been seen this much
/// more is kept free for them.
const MARGIN: f64 = 1.25;

/// Of the drive.
const PAGE_BYTES: usize = 4096;

/// Part of what the system has free that `memory.dram = "auto"` takes.
const AUTO_PART: f64 = 0.9;

/// What the state may spread over; none when the recipe asks for no tiers, or memory holds it all.
pub(crate) fn setup(recipe: &Recipe, estimate: &Estimate) -> Option<Setup> {
    let memory = recipe.memory.as_ref()?;
    let auto = || device::available_bytes().map_or(u64::MAX, |free| (free as f64 * AUTO_PART) as u64);
    let dram_bytes = memory.dram_bytes.unwrap_or_else(auto);
    let other_bytes = (estimate.activation_bytes as f64 * MARGIN) as u64 + estimate.exponent_bytes;
    let needed = estimate.state_bytes + other_bytes;
    if needed <= free_for_chunks(dram_bytes, 0) && memory.policy.is_free_to_keep_all() {
        return None;
    }
    Some(Setup {
        dram_bytes,
        nvme_bytes: memory.nvme_bytes.unwrap_or(u64::MAX),
        dir: memory.dir.clone(),
        policy: memory.policy,
        other_bytes,
        // A chunk of 8-bit moments is whole pages, too.
        chunk_elements: chunk_elements(estimate.params, dram_bytes)
            .max(PAGE_BYTES / recipe.train.adamw.moments.dtype().size_bytes()),
    })
}

/// Refuse budgets no plan can work within.
pub(crate) fn check(
    recipe: &Recipe,
    params: &ParamList,
    estimate: &Estimate,
    setup: &Setup,
) -> Result<(), TrainError> {
    let available = device::available_bytes().map_or(u64::MAX, |free| free as u64);
    if setup.dram_bytes > available {
        return Err(TrainError::Budget {
            what: format!("memory.dram = {}, {} are available", bytes(setup.dram_bytes), bytes(available)),
            remedy: "lower memory.dram, or set it to \"auto\"".into(),
        });
    }
    if setup.nvme_bytes < estimate.state_bytes {
        return Err(TrainError::Budget {
            what: format!(
                "memory.nvme = {}, the state takes {}",
                bytes(setup.nvme_bytes),
                bytes(estimate.state_bytes)
            ),
            remedy: "raise memory.nvme to that".into(),
        });
    }
    let least = least_dram(recipe, params, setup);
    if least > setup.dram_bytes {
        return Err(TrainError::Budget {
            what: format!(
                "memory.dram = {} is too little: activations take about {}, and the widest op needs its weights and gradients at once",
                bytes(setup.dram_bytes),
                bytes(setup.other_bytes)
            ),
            remedy: format!(
                "raise memory.dram to {}, or lower train.batch or train.context, or set train.recompute = \"always\"",
                bytes(least)
            ),
        });
    }
    Ok(())
}

/// DRAM below which some moment cannot run: activations beside the widest parameter with its
/// gradient, or one chunk of everything.
fn least_dram(recipe: &Recipe, params: &ParamList, setup: &Setup) -> u64 {
    let chunk = setup.chunk_elements;
    let widest = params.specs().iter().map(|spec| spec.len()).max().unwrap_or(0);
    // Where a parameter begins and ends within chunks.
    let whole = (widest + 2 * chunk) * (recipe.train.dtype.size_bytes() + 4);
    let update = chunk * AdamW::bytes_per_param(recipe.train.dtype, recipe.train.adamw.moments);
    let chunks = whole.max(update) as u64 + setup.other_bytes;
    // What `free_for_chunks` takes off.
    chunks + chunks / 32
}
