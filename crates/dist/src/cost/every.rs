//! Every plan for a few ranks, cheapest first: where ranks are threads or processes of the machines at
//! hand, a run takes the first that training accepts.

use super::choices::{mixed, variants};
use super::plan::{Offload, Plan, Zero};
use super::price::{Price, price};
use super::volume::Grid;
use super::{Batch, Cluster, ModelShape};
use crate::pipeline::Schedule;
use crate::{Axis, MeshShape, Parts, Scheme};

/// All plans that fit on `ranks` ranks and split the rows of a step into equal microbatches of whole
/// rows, by step time; ties keep one order. Thousands for dozens of ranks; for more use `search`.
pub fn every(model: &ModelShape, batch: Batch, cluster: &Cluster, ranks: usize) -> Vec<Price> {
    let mut prices = Vec::new();
    let experts = model.mixture.map_or(1, |mixture| mixture.experts);
    for mesh in meshes(ranks, experts) {
        let replicas = mesh.replicas();
        if !batch.rows.is_multiple_of(replicas) {
            continue;
        }
        let rows = batch.rows / replicas;
        for microbatch_rows in (1..=rows).filter(|each| rows.is_multiple_of(*each)) {
            for (scheme, parts) in spreads(model, mesh.grid()) {
                let plan = Plan {
                    mesh,
                    scheme,
                    parts,
                    zero: Zero::One,
                    schedule: Schedule::OneFOneB,
                    microbatch_rows,
                    recompute: false,
                    offload: Offload::default(),
                };
                let plans = variants(&plan, model, batch, false);
                prices.extend(plans.iter().filter_map(|plan| price(model, batch, cluster, plan).ok()));
            }
        }
    }
    prices.retain(|price| price.fits(cluster));
    prices.sort_by(|a, b| a.step().total_cmp(&b.step()));
    prices
}

/// All ways to cut `ranks` into axes, y and z last; at most `experts` ranks share experts.
fn meshes(ranks: usize, experts: usize) -> Vec<MeshShape> {
    let mut found = vec![(MeshShape::SOLO, ranks)];
    for axis in Axis::ALL {
        let most = if axis == Axis::Ep { experts } else { ranks };
        let cut = |(mesh, rest): (MeshShape, usize)| {
            let sizes = (1..=rest.min(most)).filter(move |size| rest.is_multiple_of(*size));
            sizes.map(move |size| (mesh.with(axis, size), rest / size))
        };
        found = found.into_iter().flat_map(cut).collect();
    }
    found.into_iter().filter(|(_, rest)| *rest == 1).map(|(mesh, _)| mesh).collect()
}

/// What products may follow on a grid: one scheme, or on a plane one for each part.
fn spreads(model: &ModelShape, grid: Grid) -> Vec<(Scheme, Parts)> {
    let one = schemes(grid).iter().map(|scheme| (*scheme, Parts::default()));
    // Without a feed-forward part all tokens share, there is one part.
    let mixed = mixed(grid).into_iter().filter(|(_, parts)| parts.ffn.is_none() || model.ffn > 0);
    one.chain(mixed).collect()
}

/// Schemes of a grid; lines lie on x, planes on x and y.
fn schemes(grid: Grid) -> &'static [Scheme] {
    match grid {
        Grid { x: 1, y: 1, z: 1 } => &[Scheme::OneD],
        Grid { y: 1, z: 1, .. } => &[Scheme::OneD, Scheme::OneDSequence],
        Grid { x: 1, .. } | Grid { y: 1, .. } => &[],
        Grid { z: 1, .. } => &[Scheme::Summa, Scheme::WeightStationary],
        _ => &[Scheme::TwoPointFiveD, Scheme::ThreeD],
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{cluster, small};
    use super::*;

    #[test]
    fn every_mesh_stands_once_and_the_cheapest_first() {
        assert_eq!(meshes(1, 8), [MeshShape::SOLO]);
        // One way an axis, and two axes of two: 7 + 21, with ep 8 + 28; two experts go to two ranks.
        assert_eq!([1, 8, 2].map(|experts| meshes(4, experts).len()), [28, 36, 35]);
        let (model, batch) = small();
        let prices = every(&model, batch, &cluster(), 4);
        assert!(prices.is_sorted_by(|a, b| a.step() <= b.step()));
        assert_eq!(prices, every(&model, batch, &cluster(), 4), "the same question, the same answer");
        for scheme in Scheme::ALL.into_iter().filter(|s| !matches!(s, Scheme::TwoPointFiveD | Scheme::ThreeD))
        {
            assert!(prices.iter().any(|price| price.plan.scheme == scheme), "{scheme}");
        }
        for price in &prices {
            let plan = &price.plan;
            assert_eq!(plan.microbatch_rows * plan.mesh.replicas() * price.microbatches, batch.rows);
        }
    }

    /// Where the cores that compute carry the messages, nothing hides them.
    #[test]
    fn messages_that_take_cores_show() {
        // One key head: a ring goes around the context ranks.
        let (model, batch) = (ModelShape { kv_heads: 1, ..small().0 }, small().1);
        let mut cores = cluster();
        cores.pace.beside = false;
        let shown = |cluster: &Cluster| {
            let prices = every(&model, batch, cluster, 4);
            let of = |axis| prices.iter().find(|p| p.plan.mesh.size(axis) == 4).unwrap().seconds;
            (of(Axis::Dp).gradients, of(Axis::Cp).context)
        };
        let (beside, taken) = (shown(&cluster()), shown(&cores));
        assert!(beside.0 < taken.0 && beside.1 < taken.1, "{beside:?} {taken:?}");
    }
}
