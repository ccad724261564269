//! `cargo xtask bench train`: one training step, ours against other implementations.
//!
//! This file owns the sequence: prepare, run in rounds, report. A round runs every implementation
//! once, so that a slow minute of the machine falls on all of them; ratios are taken within a round.

use std::path::{Path, PathBuf};

use anyhow::{Result, ensure};
use clap::ValueEnum;
use indicatif::{ProgressBar, ProgressStyle};

pub mod comm;
mod machine;
pub mod memory;
pub mod mesh;
mod peers;
mod report;
mod runs;

/// Options of `bench train`.
#[derive(clap::Args)]
pub struct Args {
    /// Model sizes to measure [default: all, or S with --quick].
    #[arg(long)]
    config: Option<Sizes>,
    /// Times every implementation runs [default: 5, or 1 with --quick].
    #[arg(long)]
    rounds: Option<usize>,
    /// Steps of one run, warm-up included [default: 4, or 3 with --quick].
    #[arg(long)]
    steps: Option<usize>,
    /// Whom to measure against.
    #[arg(long, value_delimiter = ',', default_values_t = [Family::Torch, Family::Candle, Family::Burn])]
    peers: Vec<Family>,
    /// Implementations to leave out, by name in the table: torch's bf16 takes a minute a step
    /// on a CPU without bf16 instructions.
    #[arg(long, value_delimiter = ',', value_name = "NAME")]
    skip: Vec<String>,
    /// Threads of every implementation.
    #[arg(long, default_value_t = 2)]
    threads: usize,
    /// Where ours and torch compute. On a GPU candle and burn are not measured.
    #[arg(long, value_parser = ["cpu", "cuda"], default_value = "cpu")]
    device: String,
    /// Rows of a batch instead of those of the model size; ours and torch only.
    #[arg(long)]
    batch: Option<usize>,
    /// A trilith that was built elsewhere, instead of building it.
    #[arg(long, value_name = "PATH")]
    binary: Option<PathBuf>,
    /// A glance instead of a measurement.
    #[arg(long)]
    quick: bool,
    /// A Python with torch installed, instead of making bench/.venv.
    #[arg(long, value_name = "PATH")]
    python: Option<PathBuf>,
}

/// Which model sizes a bench runs.
#[derive(Clone, Copy, ValueEnum)]
#[value(rename_all = "verbatim")]
enum Sizes {
    S,
    M,
    L,
    #[value(name = "all")]
    All,
}

impl Sizes {
    fn names(self) -> &'static [&'static str] {
        match self {
            Sizes::S => &["S"],
            Sizes::M => &["M"],
            Sizes::L => &["L"],
            Sizes::All => &["S", "M"],
        }
    }
}

/// Who wrote an implementation.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub enum Family {
    /// This repository.
    #[value(skip)]
    Trilith,
    /// PyTorch, eager and compiled.
    Torch,
    /// candle.
    Candle,
    /// burn, on its flex backend.
    Burn,
}

impl std::fmt::Display for Family {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Family::Trilith => "trilith",
            Family::Torch => "torch",
            Family::Candle => "candle",
            Family::Burn => "burn",
        })
    }
}

/// What a bench measures, with every default filled in.
struct Plan {
    configs: &'static [&'static str],
    rounds: usize,
    steps: usize,
    threads: usize,
}

impl Plan {
    fn new(args: &Args) -> Result<Plan> {
        let (sizes, rounds, steps) = if args.quick { (Sizes::S, 1, 3) } else { (Sizes::All, 5, 4) };
        let plan = Plan {
            configs: args.config.unwrap_or(sizes).names(),
            rounds: args.rounds.unwrap_or(rounds),
            steps: args.steps.unwrap_or(steps),
            threads: args.threads,
        };
        ensure!(plan.rounds >= 1, "--rounds {}: needs at least 1", plan.rounds);
        ensure!(
            plan.steps > peers::LONGEST_WARM_UP,
            "--steps {}: needs at least {}, as compiled programs drop the first {} as warm-up",
            plan.steps,
            peers::LONGEST_WARM_UP + 1,
            peers::LONGEST_WARM_UP
        );
        Ok(plan)
    }
}

/// An implementation that could not be measured, and why.
pub struct Failure {
    /// The implementation, or the peer that did not build.
    name: String,
    /// What was being done, then the end of what it wrote to stderr.
    reason: String,
}

/// Builds, measures, prints the tables and writes the results.
pub fn run(root: &Path, args: &Args) -> Result<()> {
    let plan = Plan::new(args)?;
    let (mut programs, mut failures) = peers::prepare(root, args)?;
    for name in &args.skip {
        let before = programs.len();
        programs.retain(|program| program.name != *name);
        ensure!(programs.len() < before, "--skip {name}: no such implementation was prepared");
        failures.push(Failure { name: name.clone(), reason: "left out with --skip".to_string() });
    }
    ensure!(!programs.is_empty(), "nothing could be built:\n{}", report::failures(&failures));
    let machine = machine::facts(root, args.python.as_deref());

    let mut results = Vec::new();
    for &config in plan.configs {
        let measured = measure(&plan, config, &programs, &mut failures);
        println!("\n{}", report::table(config, &programs, &measured));
        println!("{}", report::headline(&programs, &measured));
        results.push((config, measured));
    }
    if !failures.is_empty() {
        println!("\nnot measured:\n{}", report::failures(&failures));
    }
    let path = report::write(root, &plan, machine, &programs, &results, &failures)?;
    println!("\nwrote {}", path.display());
    Ok(())
}

/// Runs every program once a round, each round beginning with another one.
fn measure(
    plan: &Plan,
    config: &str,
    programs: &[peers::Program],
    failures: &mut Vec<Failure>,
) -> runs::Measured {
    let mut measured = runs::Measured::default();
    let mut given_up = vec![false; programs.len()];
    let bar = ProgressBar::new((plan.rounds * programs.len()) as u64);
    let style = ProgressStyle::with_template("{prefix} {bar:30} {pos}/{len} {elapsed} {msg}");
    bar.set_style(style.expect("a valid template"));
    bar.set_prefix(format!("config {config}"));
    for round in 0..plan.rounds {
        for turn in 0..programs.len() {
            let index = (turn + round) % programs.len();
            if !given_up[index] {
                let program = &programs[index];
                bar.set_message(format!("round {} {}", round + 1, program.name));
                match runs::run(program, config, plan.steps, plan.threads) {
                    Ok(run) => measured.add(index, round, run),
                    Err(error) => {
                        given_up[index] = true;
                        let name = format!("{} on {config}", program.name);
                        failures.push(Failure { name, reason: format!("{error:#}") });
                    }
                }
            }
            bar.inc(1);
        }
    }
    bar.finish_and_clear();
    measured
}
