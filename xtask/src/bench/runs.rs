//! One run: a fresh process, its JSON lines, and the median of the steps that count.

use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize};

use super::peers::{self, Precision, Program};

/// One training step as an implementation reports it.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Step {
    pub seconds: f64,
    pub tokens_per_s: f64,
    pub gflops: f64,
    pub peak_rss_bytes: f64,
    /// Memory of the GPU held, where the step ran on one.
    #[serde(default)]
    pub peak_device_bytes: Option<f64>,
    pub loss: f64,
}

impl Step {
    /// Most held where it computes.
    pub fn peak_bytes(&self) -> f64 {
        self.peak_device_bytes.unwrap_or(self.peak_rss_bytes)
    }
}

/// The machine's matrix product ceiling, as our own program measures it before its steps.
#[derive(Clone, Copy, Debug, Deserialize, Serialize)]
pub struct Peak {
    #[serde(rename = "gemm_peak_gflops_f32")]
    pub f32: f64,
    #[serde(rename = "gemm_peak_gflops_bf16")]
    pub bf16: f64,
}

impl Peak {
    /// GFLOP/s of one number format.
    pub fn of(&self, precision: Precision) -> f64 {
        match precision {
            Precision::F32 => self.f32,
            Precision::Bf16 => self.bf16,
        }
    }
}

/// One process: medians over the steps that count.
#[derive(Clone, Debug, Serialize)]
pub struct Run {
    pub tokens_per_s: f64,
    pub gflops: f64,
    pub peak_bytes: f64,
    pub steps: Vec<Step>,
    pub peak: Option<Peak>,
}

/// All runs of one config: `(program, round, run)`.
#[derive(Default)]
pub struct Measured {
    runs: Vec<(usize, usize, Run)>,
}

impl Measured {
    pub fn add(&mut self, program: usize, round: usize, run: Run) {
        self.runs.push((program, round, run));
    }

    /// The run of a program in a round, unless it failed.
    pub fn get(&self, program: usize, round: usize) -> Option<&Run> {
        self.runs.iter().find(|(p, r, _)| (*p, *r) == (program, round)).map(|(_, _, run)| run)
    }

    /// The runs of a program in order of rounds.
    pub fn of(&self, program: usize) -> impl Iterator<Item = &Run> {
        self.runs.iter().filter(move |(p, _, _)| *p == program).map(|(_, _, run)| run)
    }

    /// How many rounds have any run.
    pub fn rounds(&self) -> usize {
        self.runs.iter().map(|(_, round, _)| round + 1).max().unwrap_or(0)
    }

    /// Our measured GEMM ceiling for a number format: the median over all our runs.
    pub fn peak(&self, precision: Precision) -> Option<f64> {
        median(self.runs.iter().filter_map(|(_, _, run)| run.peak.map(|peak| peak.of(precision))))
    }
}

/// Runs a program for `steps` steps in a fresh process.
pub fn run(program: &Program, config: &str, steps: usize, threads: usize) -> Result<Run> {
    let mut command = Command::new(&program.argv[0]);
    command.args(&program.argv[1..]).args(["--config", config, "--mode", program.mode]);
    command.args(["--steps", &steps.to_string(), "--threads", &threads.to_string()]);
    let printed = peers::capture(&mut command)?;
    let (peak, lines) = parse(&printed)?;
    ensure!(lines.len() == steps, "printed {} steps instead of {steps}", lines.len());
    check_losses(&lines, config)?;
    Ok(summary(peak, lines, program.warm_up))
}

/// Reads the JSON lines of a run; lines that are no JSON objects are chatter.
fn parse(printed: &str) -> Result<(Option<Peak>, Vec<Step>)> {
    let mut peak = None;
    let mut steps = Vec::new();
    for line in printed.lines().filter(|line| line.starts_with('{')) {
        if let Ok(step) = serde_json::from_str::<Step>(line) {
            steps.push(step);
        } else {
            let parsed = serde_json::from_str::<Peak>(line);
            peak = Some(parsed.with_context(|| format!("not a step: {line}"))?);
        }
    }
    Ok((peak, steps))
}

/// Refuses a run that did not train: fast and wrong is not a result.
fn check_losses(steps: &[Step], config: &str) -> Result<()> {
    let vocabulary: f64 = if config == "S" { 8192.0 } else { 32000.0 };
    let (first, last) = (steps[0].loss, steps[steps.len() - 1].loss);
    let expected = vocabulary.ln();
    if (first - expected).abs() > 0.5 {
        bail!("the first loss is {first}, random weights give about {expected:.2}: not the same model");
    }
    if last.is_nan() || (steps.len() > 1 && last >= first) {
        bail!("the loss went from {first} to {last} on a fixed batch: it does not learn");
    }
    Ok(())
}

fn summary(peak: Option<Peak>, steps: Vec<Step>, warm_up: usize) -> Run {
    let counted = &steps[warm_up.min(steps.len() - 1)..];
    let middle = |value: fn(&Step) -> f64| median(counted.iter().map(value)).expect("at least one step");
    Run {
        tokens_per_s: middle(|step| step.tokens_per_s),
        gflops: middle(|step| step.gflops),
        peak_bytes: steps.iter().map(Step::peak_bytes).fold(0.0, f64::max),
        steps,
        peak,
    }
}

/// The median; the mean of the middle two where their number is even; `None` of nothing.
pub fn median(values: impl IntoIterator<Item = f64>) -> Option<f64> {
    let mut values: Vec<f64> = values.into_iter().collect();
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    match values.len() {
        0 => None,
        odd if odd % 2 == 1 => Some(values[middle]),
        _ => Some((values[middle - 1] + values[middle]) / 2.0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LINES: &str = "some chatter\n\
        {\"gemm_peak_gflops_f32\": 200.0, \"gemm_peak_gflops_bf16\": 400.0}\n\
        {\"impl\":\"x\",\"step\":0,\"seconds\":9.0,\"tokens_per_s\":10.0,\"gflops\":1.0,\"peak_rss_bytes\":5,\"loss\":9.1}\n\
        {\"impl\":\"x\",\"step\":1,\"seconds\":2.0,\"tokens_per_s\":50.0,\"gflops\":5.0,\"peak_rss_bytes\":7,\"loss\":8.6}\n\
        {\"impl\":\"x\",\"step\":2,\"seconds\":1.0,\"tokens_per_s\":90.0,\"gflops\":9.0,\"peak_rss_bytes\":7,\"loss\":8.1}\n";

    #[test]
    fn a_run_is_the_median_after_warm_up() {
        let (peak, steps) = parse(LINES).expect("valid lines");
        check_losses(&steps, "S").expect("a falling loss");
        let run = summary(peak, steps, 1);
        assert_eq!((run.tokens_per_s, run.gflops, run.peak_bytes), (70.0, 7.0, 7.0));
        assert_eq!(run.peak.map(|peak| peak.of(Precision::Bf16)), Some(400.0));
    }

    #[test]
    fn broken_lines_and_broken_training_are_errors() {
        assert!(parse("{\"loss\": NaN}").is_err());
        let (_, mut steps) = parse(LINES).expect("valid lines");
        assert!(check_losses(&steps, "M").is_err());
        steps[2].loss = 9.2;
        assert!(check_losses(&steps, "S").is_err());
    }

    #[test]
    fn medians() {
        assert_eq!(median([]), None);
        assert_eq!(median([3.0, 1.0, 2.0]), Some(2.0));
        assert_eq!(median([4.0, 1.0, 2.0, 3.0]), Some(2.5));
    }
}
