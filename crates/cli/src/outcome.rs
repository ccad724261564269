//! Predicted beside measured, at the end of a run.

use crate::show;
use std::fmt;
use train::StepMetrics;

/// What was predicted of a run, and its steps as they came.
pub struct Outcome {
    /// Seconds of a step, from what this machine reached on the model's shapes when the run began.
    pub step_s: f64,
    /// Most memory held, in bytes.
    pub memory_bytes: u64,
    /// As measured.
    seconds: Vec<f64>,
}

impl Outcome {
    /// Nothing measured yet.
    pub fn predicted(step_s: f64, memory_bytes: u64) -> Outcome {
        Outcome { step_s, memory_bytes, seconds: Vec::new() }
    }

    /// The run may hold this much from now on: the most it was ever allowed counts.
    pub fn may_hold(&mut self, bytes: u64) {
        self.memory_bytes = self.memory_bytes.max(bytes);
    }

    /// A step was done.
    pub fn add(&mut self, step: &StepMetrics) {
        self.seconds.push(step.seconds);
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
        let off = 100.0 * (median / self.step_s - 1.0);
        let (step, took) = (show::short(self.step_s), show::short(median));
        writeln!(f, "step: {step} predicted, {took} measured (median, {off:+.0} %)")?;
        let held = device::memory_use().peak_held_bytes as u64;
        let off = 100.0 * (held as f64 / self.memory_bytes.max(1) as f64 - 1.0);
        let (memory, held) = (show::bytes(self.memory_bytes), show::bytes(held));
        writeln!(f, "memory: {memory} predicted, {held} measured (peak held, {off:+.0} %)")
    }
}
