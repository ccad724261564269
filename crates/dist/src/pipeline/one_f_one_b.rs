//! 1F1B: stage s runs p - s forwards ahead, then one backward for each forward. The bubble is
//! GPipe's, but stage s holds p - s microbatches, however many a step has.

use super::{Pipeline, Unit, Work};

pub(super) fn order(pipeline: &Pipeline, stage: usize) -> Vec<Unit> {
    let m = pipeline.microbatches;
    let ahead = peak_live(pipeline, stage);
    let mut order: Vec<Unit> = (0..ahead).map(|i| Unit::new(Work::Forward, i, 0)).collect();
    for i in 0..m {
        order.push(Unit::new(Work::Backward, i, 0));
        if i + ahead < m {
            order.push(Unit::new(Work::Forward, i + ahead, 0));
        }
    }
    order
}

/// Stage s runs ahead until the first backward can reach it: p - s microbatches.
pub(super) fn peak_live(pipeline: &Pipeline, stage: usize) -> usize {
    pipeline.microbatches.min(pipeline.stages - stage)
}
