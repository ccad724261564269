//! GPipe: all forwards, then all backwards. Every stage holds every microbatch.

use super::{Pipeline, Unit, Work};

pub(super) fn order(pipeline: &Pipeline, _stage: usize) -> Vec<Unit> {
    let all = 0..pipeline.microbatches;
    let forwards = all.clone().map(|i| Unit::new(Work::Forward, i, 0));
    // Backwards in the same order: the last stage then needs nothing it has not had for longest.
    forwards.chain(all.map(|i| Unit::new(Work::Backward, i, 0))).collect()
}

pub(super) fn peak_live(pipeline: &Pipeline) -> usize {
    pipeline.microbatches
}
