//! The norm of a gradient of which every rank has its granules.

use super::Shards;
use crate::{ranks, stages};
use dist::Axis;
use memory::Class;
use model::Spread;
use tensor::{Fault, ParamStore};

impl Shards {
    /// Squared norm of the whole gradient. Summed granule by granule in their order, so that it has
    /// the same bits on any number of ranks that share them.
    pub fn squared_norm(&self, store: &ParamStore, spreads: &[Spread]) -> Result<f64, Fault> {
        let (mesh, stripes) = (&self.common.mesh, self.common.stripes);
        let count = stripes.count(store.flat_len());
        let own: Vec<f64> = (0..count)
            .map(|stripe| {
                let own = stripes.own(stripe);
                let params = store.params_in(&own);
                let counted =
                    params.filter(|param| ranks::is_first_but(mesh, &spreads[param.index()], Axis::Fsdp));
                let squares = counted.map(|param| {
                    let range = store.range(param);
                    let (start, end) = (range.start.max(own.start), range.end.min(own.end));
                    let grad = store.arrays().view(Class::Grad, start..end.max(start));
                    kernels::global_norm::sum_of_squares(grad)
                });
                squares.sum()
            })
            .collect();
        let all = ranks::gather_all(mesh, Axis::Fsdp, &own)?;
        let granules =
            (0..count).flat_map(|stripe| (0..stripes.ranks).map(move |rank| rank * count + stripe));
        let squares = granules.map(|at| all[at]).sum();
        let squares = stages::over_stages(mesh, &[squares])?.into_iter().flatten().sum();
        let others = Axis::ALL.into_iter().filter(|axis| ![Axis::Fsdp, Axis::Pp].contains(axis));
        ranks::sum_over(mesh, &others.collect::<Vec<_>>(), squares)
    }
}
