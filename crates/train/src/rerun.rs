//! Which layers run again on the way back (`train.recompute = "auto"`): what was not kept costs time to
//! make again, what was kept takes room that the state then lacks. A pure function predicts the step
//! for a few numbers of layers and takes the fastest that fits.

use crate::TrainError;
use crate::estimate::Estimate;
use crate::outlook::{Speeds, transformer, updates};
use crate::recipe::{Recipe, TrainRecipe};
use dist::Mesh;
use memory::plan::{Budgets, LinkRate, Plan, Rates, Transformer, plan};
use model::{Config, Model, Recompute};
use std::fmt;

/// Layers that run again are tried in so many steps from none to all.
const TRIED: usize = 4;

/// Microbatches of a planned step at most.
pub(crate) const MICROBATCHES: u32 = 2;

/// A fraction of the fastest tier that the pager keeps free, and what it keeps free for activations.
const FREE: u64 = 64;
const MARGIN: f64 = 1.25;

/// Links nobody has measured yet: nominal figures, as `trilith plan` takes them.
pub const NOMINAL_RATES: Rates = Rates {
    host: LinkRate { up_per_s: 50e9, down_per_s: 50e9 },
    nvme: LinkRate { up_per_s: 6e9, down_per_s: 3e9 },
};

/// One number of layers that run again.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Candidate {
    /// How many, from the first.
    pub layers: usize,
    /// Predicted seconds of a step; none where it does not fit.
    pub step_s: Option<f64>,
}

/// What was weighed, and what came of it.
#[derive(Clone, Debug, PartialEq)]
pub struct Rerun {
    /// Fewest layers first.
    pub candidates: Vec<Candidate>,
    /// Layers that run again.
    pub layers: usize,
}

impl Rerun {
    /// The fastest that fits; of those equally fast the one with the fewest layers. Where nothing
    /// fits all layers, which takes the least.
    pub fn choose(
        config: &Config,
        recipe: &Recipe,
        speeds: &Speeds,
        (budgets, rates): (&Budgets, &Rates),
    ) -> Result<Rerun, TrainError> {
        let params = Model::build(config, recipe.train.context, &Mesh::solo())?.params;
        let count: u64 = params.specs().iter().map(|spec| spec.len() as u64).sum();
        let all = config.layers();
        let mut tried: Vec<usize> = (0..=TRIED).map(|part| (all * part).div_ceil(TRIED)).collect();
        tried.dedup();
        let snapshot = recipe.checkpoint.background && recipe.memory.is_none();
        let candidates = tried.into_iter().map(|layers| {
            let train = TrainRecipe { recompute: Recompute::First(layers), ..recipe.train.clone() };
            let estimate = Estimate::new(config, &params, &train, snapshot);
            let model = transformer(config, count, (&train, updates(1, train.clip)), speeds);
            let step_s = planned(model, &estimate, (budgets, rates)).map(|plan| plan.step_s());
            Candidate { layers, step_s }
        });
        let candidates: Vec<Candidate> = candidates.collect();
        let fits = candidates.iter().filter_map(|one| one.step_s.map(|step_s| (one.layers, step_s)));
        let best = fits.min_by(|(_, a), (_, b)| a.total_cmp(b));
        let layers = best.map_or(all, |(layers, _)| layers);
        Ok(Rerun { candidates, layers })
    }

    /// For the model.
    pub fn recompute(&self) -> Recompute {
        match self.layers {
            0 => Recompute::Never,
            layers => Recompute::First(layers),
        }
    }
}

/// The plan of a step as a run does it: what layers keep for the way back is filed, but for that of the
/// one at work. Of many microbatches two are taken.
pub(crate) fn planned(
    model: Transformer,
    estimate: &Estimate,
    (budgets, rates): (&Budgets, &Rates),
) -> Option<Plan> {
    let fastest = *budgets.tiers().first()?;
    let many = budgets.tiers().len() > 1;
    let budget = budgets.of(fastest)?;
    // Without tiers nothing is kept free, and a save copies the state.
    let budget = if many { budget - budget / FREE } else { budget.saturating_sub(estimate.snapshot_bytes) };
    let others = (estimate.activation_bytes - estimate.filed_bytes) as f64 * if many { MARGIN } else { 1.0 };
    let layers = f64::from(model.layers);
    let again = estimate.rerun_layers as f64 / layers;
    let model = Transformer {
        // Each layer as the mean of all: the way back takes twice as long as the way forth.
        layer_forward_s: model.layer_forward_s * (1.0 + again / 3.0),
        // Each layer keeps as much as the mean of all.
        input_bytes: 0,
        kept_bytes: estimate.filed_bytes / u64::from(model.layers),
        recompute: false,
        other_bytes: others as u64 + estimate.exponent_bytes,
        parts: model.parts.min(4),
        accumulate: model.accumulate.min(MICROBATCHES),
        ..model
    };
    let mut trace = model.trace();
    let chunks = &trace.chunks;
    trace.uses.retain(|used| chunks[used.chunk.0 as usize].bytes > 0);
    plan(&trace, &budgets.with(fastest, Some(budget)), rates).ok()
}

impl fmt::Display for Rerun {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let last = self.candidates.last().map_or(0, |one| one.layers);
        write!(f, "first {} of {last} layers run again; seconds of a step, predicted: ", self.layers)?;
        for (i, Candidate { layers, step_s }) in self.candidates.iter().enumerate() {
            let comma = if i > 0 { ", " } else { "" };
            match step_s {
                Some(step_s) => write!(f, "{comma}{layers}: {step_s:.3}")?,
                None => write!(f, "{comma}{layers}: does not fit")?,
            }
        }
        Ok(())
    }
}
