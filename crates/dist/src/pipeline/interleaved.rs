//! Interleaved 1F1B: v chunks a stage, microbatches in groups of p. The k-th forward of a stage is
//! microbatch (k / pv) p + k mod p on chunk (k mod pv) / p; backwards take chunks from the last.

use super::{Pipeline, Unit, Work};

pub(super) fn order(pipeline: &Pipeline, stage: usize) -> Vec<Unit> {
    let total = pipeline.microbatches * pipeline.chunks();
    let ahead = peak_live(pipeline, stage);
    let mut order: Vec<Unit> = (0..ahead).map(|k| unit(pipeline, Work::Forward, k)).collect();
    for k in 0..total {
        order.push(unit(pipeline, Work::Backward, k));
        if k + ahead < total {
            order.push(unit(pipeline, Work::Forward, k + ahead));
        }
    }
    order
}

fn unit(pipeline: &Pipeline, work: Work, k: usize) -> Unit {
    let (p, v) = (pipeline.stages, pipeline.chunks());
    let microbatch = k / (p * v) * p + k % p;
    let chunk = k % (p * v) / p;
    Unit::new(work, microbatch, if work == Work::Forward { chunk } else { v - 1 - chunk })
}

/// Forwards until the first backward reaches stage s. The last chunk of the first microbatch is
/// unit (v - 1) p of a stage; from stage s it has p - 1 - s stages to go, and its gradient as many
/// to come back: (v - 1) p + 2 (p - 1 - s) units more, and the one that is running.
pub(super) fn peak_live(pipeline: &Pipeline, stage: usize) -> usize {
    let (p, v) = (pipeline.stages, pipeline.chunks());
    (pipeline.microbatches * v).min((v - 1) * p + 2 * (p - 1 - stage) + 1)
}
