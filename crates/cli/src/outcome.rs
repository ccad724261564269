//! Predicted beside measured, at the end of a run.

use crate::show;
use std::fmt;
use train::{Predicted, StepMetrics};

/// What was predicted of a run, and its steps as they came.
pub struct Outcome {
    /// Before the run took its memory.
    pub predicted: Predicted,
    /// As measured.
    seconds: Vec<f64>,
    /// Of the newest step, by link: up and down.
    moved_bytes: Vec<(u64, u64)>,
}

impl Outcome {
    /// Nothing measured yet.
    pub fn of(predicted: Predicted) -> Outcome {
        Outcome { predicted, seconds: Vec::new(), moved_bytes: Vec::new() }
    }

    /// The run may hold this much from now on: the most it was ever allowed counts.
    pub fn may_hold(&mut self, bytes: u64) {
        let memory_bytes = &mut self.predicted.memory_bytes;
        *memory_bytes = bytes.max(*memory_bytes);
    }

    /// A step was done.
    pub fn add(&mut self, step: &StepMetrics) {
        self.seconds.push(step.seconds);
        let links = step.tiers.iter().flat_map(|tiers| &tiers.links);
        self.moved_bytes = links.map(|link| (link.up_bytes, link.down_bytes)).collect();
    }

    fn median_s(&self) -> Option<f64> {
        let mut seconds = self.seconds.clone();
        seconds.sort_by(f64::total_cmp);
        seconds.get(seconds.len() / 2).copied()
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Some(median) = self.median_s() else { return Ok(()) };
        let Predicted { step_s, memory_bytes, links } = &self.predicted;
        let off = 100.0 * (median / step_s - 1.0);
        let (step, took) = (show::short(*step_s), show::short(median));
        writeln!(f, "step: {step} predicted, {took} measured (median, {off:+.0} %)")?;
        let held = device::memory_use().peak_held_bytes as u64;
        let off = 100.0 * (held as f64 / (*memory_bytes).max(1) as f64 - 1.0);
        let (memory, held) = (show::bytes(*memory_bytes), show::bytes(held));
        writeln!(f, "memory: {memory} predicted, {held} measured (peak held, {off:+.0} %)")?;
        for (link, (up, down)) in links.iter().zip(&self.moved_bytes) {
            let [up, down, foreseen_up, foreseen_down] =
                [*up, *down, link.up_bytes, link.down_bytes].map(show::bytes);
            let name = format!("{}-{}", link.upper, link.lower);
            writeln!(
                f,
                "{name}: {foreseen_up} up and {foreseen_down} down a step predicted, {up} and {down} in the last"
            )?;
        }
        Ok(())
    }
}
