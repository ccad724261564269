//! The norm of a gradient of which every rank has its granules.

use super::Shards;
use crate::step::NORM;
use crate::{ranks, stages};
use device::View;
use dist::Axis;
use memory::Need;
use memory::trace::Access;
use model::Spread;
use tensor::{Fault, ParamRef, ParamStore};

impl Shards {
    /// Squared norm of the whole gradient. Summed granule by granule in their order, so that it has
    /// the same bits on any number of ranks that share them.
    pub fn squared_norm(&self, store: &mut ParamStore, spreads: &[Spread]) -> Result<f64, Fault> {
        let (mesh, stripes) = (&self.common.mesh, self.common.stripes);
        let count = stripes.count(store.flat_len());
        let own: Vec<f64> =
            (0..count).map(|stripe| self.squares_of(stripe, store, spreads)).collect::<Result<_, Fault>>()?;
        let all = ranks::gather_all(mesh, Axis::Fsdp, &own)?;
        let granules =
            (0..count).flat_map(|stripe| (0..stripes.ranks).map(move |rank| rank * count + stripe));
        let squares = granules.map(|at| all[at]).sum();
        let squares = stages::over_stages(mesh, &[squares])?.into_iter().flatten().sum();
        let others = Axis::ALL.into_iter().filter(|axis| ![Axis::Fsdp, Axis::Pp].contains(axis));
        ranks::sum_over(mesh, &others.collect::<Vec<_>>(), squares)
    }

    /// Of our granule of a stripe: what we are the first to hold.
    fn squares_of(&self, stripe: usize, store: &mut ParamStore, spreads: &[Spread]) -> Result<f64, Fault> {
        let own = self.common.own(store, stripe);
        let class = store.final_class();
        let need = Need { class, elements: own.clone(), access: Access::Read };
        store.bring(NORM, &[need])?;
        let first =
            |param: &ParamRef| ranks::is_first_but(&self.common.mesh, &spreads[param.index()], Axis::Fsdp);
        let grads = store.params_in(&own).filter(first).map(|param| {
            let range = store.range(param);
            let (start, end) = (range.start.max(own.start), range.end.min(own.end));
            store.arrays().view(class, start..end.max(start))
        });
        // All of them are here: a GPU is waited for once.
        let grads: Vec<View<'_>> = grads.collect();
        Ok(kernels::global_norm::sums_of_squares(&grads).into_iter().sum())
    }
}
