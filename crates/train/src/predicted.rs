//! What is said of a run before it begins: seconds of a step, memory, bytes over each link.

use crate::estimate::Estimate;
use crate::outlook::{Speeds, transformer, updates};
use crate::prepare::Prepared;
use crate::recipe::{Recipe, TrainRecipe};
use crate::rerun::{MICROBATCHES, planned};
use device::Device;
use memory::Tier;
use memory::pager::Setup;
use memory::plan::{Budgets, Transformer};

/// Predictions of one run.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Predicted {
    /// Seconds of a step.
    pub step_s: f64,
    /// Most memory held, in bytes.
    pub memory_bytes: u64,
    /// By link, fastest first; none where the state stays in memory.
    pub links: Vec<PredictedLink>,
}

/// A link in one step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct PredictedLink {
    /// The faster end.
    pub upper: Tier,
    /// The slower end.
    pub lower: Tier,
    /// Bytes towards the faster tier.
    pub up_bytes: u64,
    /// Bytes towards the slower tier.
    pub down_bytes: u64,
    /// Seconds in which the computation waits.
    pub stall_s: f64,
}

impl Prepared {
    /// Predictions for a run of one rank, from what this machine reaches now on the model's widest
    /// product, on an update and (measured when the run was prepared) over its links. Over tiers the step
    /// is planned on a trace in which all layers are alike.
    pub fn predict(&self, recipe: &Recipe, peak_gflops: f64) -> Predicted {
        let estimate = self.estimate(recipe);
        let step_s = estimate.measured_step_seconds(&self.config, &recipe.train, peak_gflops);
        let in_memory = Predicted {
            step_s,
            memory_bytes: estimate.total_bytes() - estimate.snapshot_bytes,
            links: Vec::new(),
        };
        let Some(setup) = self.tiers(recipe) else { return in_memory };
        let Budgets { hbm, dram, .. } = setup.budgets;
        let memory_bytes = [hbm, dram].into_iter().flatten().sum();
        self.over_tiers(recipe, &setup, (&estimate, step_s))
            .map_or(Predicted { memory_bytes, ..in_memory }, |over| Predicted { memory_bytes, ..over })
    }

    fn over_tiers(
        &self,
        recipe: &Recipe,
        setup: &Setup,
        (estimate, step_s): (&Estimate, f64),
    ) -> Option<Predicted> {
        let links = self.links.as_ref()?;
        let train = TrainRecipe { recompute: self.recompute(recipe), ..recipe.train.clone() };
        let model = self.step_of(&train, (estimate, step_s));
        let update_s = model.update_s * estimate.params as f64;
        let plan = planned(model, estimate, (&setup.budgets, &links.rates))?;
        // Microbatches that were not planned compute, and move what one more pass moves: that is left out.
        let more = recipe.train.accumulate.saturating_sub(MICROBATCHES as usize) as f64;
        let more_s = more * (step_s - update_s) / recipe.train.accumulate as f64;
        let link = |link: &memory::plan::LinkReport| PredictedLink {
            upper: link.upper,
            lower: link.lower,
            up_bytes: link.up_bytes,
            down_bytes: link.down_bytes,
            stall_s: link.stall_s,
        };
        let links = plan.links.iter().map(link).collect();
        Some(Predicted { step_s: plan.step_s() + more_s, memory_bytes: 0, links })
    }

    /// The step with the seconds that were measured.
    fn step_of(&self, train: &TrainRecipe, (estimate, step_s): (&Estimate, f64)) -> Transformer {
        let unknown = Speeds { flops_per_s: 1.0, fastest_per_s: 1.0, host_per_s: None };
        let (count, when) = (estimate.params as u64, updates(1, train.clip));
        let model = transformer(&self.config, count, (train, when), &unknown);
        // Behind a GPU updates are made on the host, where the state lies.
        let update_s = kernels::peak::update_seconds(train.device);
        let host_update_s = match train.device {
            Device::Cpu => update_s,
            Device::Cuda => kernels::peak::update_seconds(Device::Cpu),
        };
        let passes_s = (step_s - update_s * estimate.params as f64).max(0.0);
        let of_layer = f64::from(model.layers) * train.accumulate as f64;
        Transformer {
            layer_forward_s: passes_s / 3.0 / of_layer,
            update_s,
            host_update_s: Some(host_update_s),
            ..model
        }
    }
}
