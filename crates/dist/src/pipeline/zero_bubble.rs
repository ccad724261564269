//! ZB-H1: as 1F1B, but the backward is two units. Gradients of inputs go on at once; those of
//! weights wait s microbatches on stage s, so that every stage holds p microbatches, as many as
//! 1F1B's first, and the end of the step has something to do.

use super::{Pipeline, Times, Unit, Work};

pub(super) fn order(pipeline: &Pipeline, stage: usize) -> Vec<Unit> {
    let m = pipeline.microbatches;
    let ahead = m.min(pipeline.stages - stage);
    let mut order: Vec<Unit> = (0..ahead).map(|i| Unit::new(Work::Forward, i, 0)).collect();
    for i in 0..m {
        order.push(Unit::new(Work::BackwardInput, i, 0));
        if i >= stage {
            order.push(Unit::new(Work::BackwardWeight, i - stage, 0));
        }
        if i + ahead < m {
            order.push(Unit::new(Work::Forward, i + ahead, 0));
        }
    }
    let left = m.saturating_sub(stage);
    order.extend((left..m).map(|i| Unit::new(Work::BackwardWeight, i, 0)));
    order
}

/// p - s forwards ahead and s weight gradients behind.
pub(super) fn peak_live(pipeline: &Pipeline) -> usize {
    pipeline.microbatches.min(pipeline.stages)
}

/// The longest of three waits, for m >= p, beside the m (f + i + w) every stage works:
/// - the last stage waits (p - 1) f for its first forward;
/// - stage 0 waits (p - 1) i between its p forwards ahead and its first input gradient;
/// - the last stage ends its last input gradient at (p - 1) f + m (f + i) + (m - p) w, as p weight
///   gradients are still put off then; p - 1 input gradients and the last weight gradient of
///   stage 0 follow: (p - 1)(f + i - w) beside the work.
///
/// With fewer microbatches either stage 0 is last, which begins its m backwards after p forwards
/// and p - 1 input gradients, or the chain of the last input gradients from the last stage, followed
/// by the weight gradients put off: one on stage 0, all m from stage m - 1 on. That these bounds are reached is tested on the clock.
pub(super) fn makespan(pipeline: &Pipeline, times: Times) -> f64 {
    let (m, p) = (pipeline.microbatches as f64, pipeline.stages as f64);
    let Times { forward: f, backward_input: i, backward_weight: w } = times;
    if m < p {
        let first = p * f + (p - 1.0) * i + m * (i + w);
        let chain = (p - 1.0) * f + m * (f + i) + ((p - 1.0) * i + w).max((p - m) * i + m * w);
        return first.max(chain);
    }
    m * (f + i + w) + (p - 1.0) * f.max(i).max(f + i - w)
}
