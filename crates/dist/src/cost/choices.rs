//! What may be chosen, choice by choice, in the one order in which a search tries it.

use super::family::Family;
use super::plan::{Offload, Plan, Zero};
use super::volume::Grid;
use super::{Batch, ModelShape};
use crate::pipeline::Schedule;
use crate::{Axis, MeshShape, Parts, Scheme};

/// Most slices of the model on one stage.
const MOST_CHUNKS: usize = 8;

/// Sizes of x, y, z with this product: 1D as (p, 1, 1); two axes both above 1; three all above 1 or
/// depth over a plane. Every grid once.
pub(super) fn grids(tensor: usize) -> Vec<Grid> {
    let mut grids = Vec::new();
    for z in divisors(tensor) {
        for y in divisors(tensor / z) {
            let x = tensor / z / y;
            // A line or a plane is spelled one way; z is for depth and cubes.
            let line = y == 1 && z == 1;
            if line || (x > 1 && y > 1) {
                grids.push(Grid { x, y, z });
            }
        }
    }
    grids
}

/// Families that run on a grid. Plain 1D is not tried: sequence-parallel 1D moves the same bytes and
/// keeps less.
pub(super) fn schemes(grid: Grid) -> Vec<(Family, Scheme)> {
    match grid {
        Grid { x: 1, y: 1, z: 1 } => vec![(Family::NoTensor, Scheme::OneD)],
        Grid { y: 1, z: 1, .. } => vec![(Family::OneD, Scheme::OneDSequence)],
        Grid { z: 1, .. } => {
            vec![(Family::Summa, Scheme::Summa), (Family::WeightStationary, Scheme::WeightStationary)]
        }
        _ => vec![(Family::TwoPointFiveD, Scheme::TwoPointFiveD), (Family::ThreeD, Scheme::ThreeD)],
    }
}

/// Schemes of the residual stream and of one part that has its own, on a plane.
pub(super) fn mixed(grid: Grid) -> Vec<(Scheme, Parts)> {
    if grid.x == 1 || grid.y == 1 || grid.z > 1 {
        return Vec::new();
    }
    let pairs = [(Scheme::Summa, Scheme::WeightStationary), (Scheme::WeightStationary, Scheme::Summa)];
    let parts = |(stream, other)| {
        let attention = Parts { attention: Some(other), ffn: None };
        [(stream, attention), (stream, Parts { attention: None, ffn: Some(other) })]
    };
    pairs.into_iter().flat_map(parts).collect()
}

/// Rows of a microbatch: divisors, and powers of two for rows that have few.
pub(super) fn microbatches(rows: usize) -> Vec<usize> {
    let powers = (0..usize::BITS).map(|bit| 1usize << bit).take_while(|power| *power <= rows);
    let mut all: Vec<usize> = divisors(rows).into_iter().chain(powers).collect();
    all.sort_unstable();
    all.dedup();
    all
}

/// Every choice that leaves mesh, schemes and microbatch alone.
pub(super) fn variants(plan: &Plan, model: &ModelShape, batch: Batch, offload: bool) -> Vec<Plan> {
    let mut all = Vec::new();
    for schedule in schedules(plan, model, batch) {
        for zero in zeros(&plan.mesh) {
            for recompute in [false, true] {
                for offload in offloads(offload) {
                    all.push(Plan { schedule, zero: *zero, recompute, offload: *offload, ..*plan });
                }
            }
        }
    }
    all
}

/// Orders of the pipeline. GPipe is not among them: it takes 1F1B's time and more memory.
pub(super) fn schedules(plan: &Plan, model: &ModelShape, batch: Batch) -> Vec<Schedule> {
    let pp = plan.mesh.size(Axis::Pp);
    let mut schedules = vec![Schedule::OneFOneB];
    if pp > 1 {
        schedules.push(Schedule::ZeroBubble);
        if plan.microbatches(batch).is_multiple_of(pp) {
            let chunks = (2..=MOST_CHUNKS).filter(|v| model.layers.is_multiple_of(pp * v));
            schedules.extend(chunks.map(|chunks| Schedule::Interleaved { chunks }));
        }
    }
    schedules
}

/// What shards may share.
pub(super) fn zeros(mesh: &MeshShape) -> &'static [Zero] {
    match mesh.size(Axis::Fsdp) {
        1 => &[Zero::One],
        _ => &[Zero::One, Zero::Two, Zero::Three],
    }
}

/// What may wait on the host.
pub(super) fn offloads(allowed: bool) -> &'static [Offload] {
    const fn waits(optimizer: bool, activations: bool) -> Offload {
        Offload { optimizer, activations }
    }
    const ALL: [Offload; 4] =
        [waits(false, false), waits(true, false), waits(false, true), waits(true, true)];
    &ALL[..if allowed { 4 } else { 1 }]
}

/// All divisors, ascending.
pub(super) fn divisors(n: usize) -> Vec<usize> {
    let low: Vec<usize> = (1..=n.isqrt()).filter(|d| n.is_multiple_of(*d)).collect();
    let high = low.iter().rev().map(|d| n / d).filter(|d| d * d > n);
    low.iter().copied().chain(high).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn divisors_and_grids_are_complete() {
        assert_eq!(divisors(36), [1, 2, 3, 4, 6, 9, 12, 18, 36]);
        assert_eq!(divisors(1), [1]);
        let named = grids(8).iter().map(|g| (g.x, g.y, g.z)).collect::<Vec<_>>();
        assert_eq!(named, [(8, 1, 1), (4, 2, 1), (2, 4, 1), (2, 2, 2)]);
        assert_eq!(microbatches(12), [1, 2, 3, 4, 6, 8, 12]);
    }
}
