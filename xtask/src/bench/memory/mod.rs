//! `cargo xtask bench memory`: runs larger than their memory, by the dynamic plan and by rules; what
//! `[memory]` costs where everything fits; PyTorch with its state in mapped files under the same limit.
//!
//! A round measures the drive, then runs every case once, each round beginning with another one. A run
//! is ended as soon as its last step is in its log: what it would save afterwards is not measured and
//! would keep the drive busy. Ratios are taken within a round.

use std::path::{Path, PathBuf};

use anyhow::{Result, ensure};
use clap::ValueEnum;
use serde_json::json;

use super::Failure;
use super::{machine, peers, report};
use cases::{Case, Part};
use run::Run;

mod cases;
mod run;
mod table;

/// Options of `bench memory`.
#[derive(clap::Args)]
pub struct Args {
    /// What to measure; each part has its own reference without limits.
    #[arg(long, value_delimiter = ',', default_values_t = [Part::Plans, Part::Whole, Part::Torch])]
    parts: Vec<Part>,
    /// Clipping by the global norm in the runs over tiers.
    #[arg(long, default_value = "both")]
    clip: Clip,
    /// Times every case runs.
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// Steps of one run of ours; the first four (two recorded, two until the plan has settled) do not count.
    #[arg(long, default_value_t = 7)]
    steps: usize,
    /// Steps of one run of torch; the first does not count.
    #[arg(long, default_value_t = 3)]
    torch_steps: usize,
    /// Rows of a step of ours, in one microbatch: more make more compute for the same bytes.
    #[arg(long, default_value_t = 4)]
    batch: usize,
    /// memory.dram of the runs over tiers; their state is 1.75 GB.
    #[arg(long, default_value = "440MiB", value_name = "BYTES")]
    dram: String,
    /// Limit of the control group of part `torch`, in MiB.
    #[arg(long, default_value_t = 640, value_name = "MIB")]
    limit: u64,
    /// Seconds after which a run is ended and counts as failed.
    #[arg(long, default_value_t = 120, value_name = "SECONDS")]
    patience: u64,
    /// Cases to leave out, by name in the table.
    #[arg(long, value_delimiter = ',', value_name = "NAME")]
    skip: Vec<String>,
    /// A Python with torch installed [default: bench/.venv].
    #[arg(long, value_name = "PATH")]
    python: Option<PathBuf>,
}

/// Which runs of part `plans` there are.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Clip {
    On,
    Off,
    Both,
}

/// Bytes a second of the drive, as `trilith doctor` measures them with the disk engine.
#[derive(Clone, Copy, serde::Serialize)]
struct Drive {
    read_per_s: f64,
    write_per_s: f64,
    /// Read and written together, half and half.
    both_per_s: f64,
}

/// One round of a part: its runs in the order of its cases.
struct Round {
    drive: Drive,
    runs: Vec<Option<Run>>,
}

/// What all runs need.
struct Place {
    trilith: PathBuf,
    python: PathBuf,
    script: PathBuf,
    /// What is trained on.
    text: PathBuf,
    /// Where runs and offload files lie.
    folder: PathBuf,
    recipe: PathBuf,
}

/// Builds, measures, prints the tables and writes the results.
pub fn run(root: &Path, args: &Args) -> Result<()> {
    ensure!(args.rounds >= 1, "--rounds {}: needs at least 1", args.rounds);
    let least = run::WARM_UP + 1;
    ensure!(args.steps >= least, "--steps {}: needs at least {least}", args.steps);
    ensure!(args.torch_steps >= 2, "--torch-steps {}: needs at least 2", args.torch_steps);
    let place = prepare(root, args)?;
    let machine = machine::facts(root, Some(&place.python));
    let mut failures = Vec::new();
    let mut documents = Vec::new();
    for (title, cases) in args.parts.iter().flat_map(|part| cases::of(*part, args)) {
        let cases: Vec<Case> = cases.into_iter().filter(|case| !args.skip.contains(&case.name)).collect();
        let rounds = measure(&place, &cases, args, &mut failures)?;
        println!("\n{}", table::table(&title, &cases, &rounds));
        println!("{}", table::drive_line(&rounds));
        println!("{}", table::losses_line(&cases, &rounds));
        documents.push(table::document(&title, &cases, &rounds));
    }
    if !failures.is_empty() {
        println!("\nnot measured:\n{}", report::failures(&failures));
    }
    let failed = failures.iter().map(|failure| json!({ "name": failure.name, "reason": failure.reason }));
    let path = report::save(
        root,
        json!({
            "bench": "memory", "rounds": args.rounds, "steps": args.steps, "warm_up_steps": run::WARM_UP,
            "dram": args.dram, "batch": args.batch, "limit_mib": args.limit, "recipe": cases::RECIPE, "machine": machine,
            "parts": documents, "failures": failed.collect::<Vec<_>>(),
        }),
    )?;
    println!("\nwrote {}", path.display());
    std::fs::remove_dir_all(&place.folder).ok();
    Ok(())
}

fn prepare(root: &Path, args: &Args) -> Result<Place> {
    let trilith = peers::cargo_build(root, &["--package", "trilith"], "trilith")?;
    let folder = root.join("target/bench-memory");
    std::fs::create_dir_all(&folder)?;
    let recipe = folder.join("recipe.toml");
    std::fs::write(&recipe, cases::RECIPE)?;
    Ok(Place {
        trilith,
        python: args.python.clone().unwrap_or_else(|| peers::venv_python(root)),
        script: root.join("bench/torch_step.py"),
        text: root.join("data/shakespeare/train.txt"),
        folder,
        recipe,
    })
}

fn measure(place: &Place, cases: &[Case], args: &Args, failures: &mut Vec<Failure>) -> Result<Vec<Round>> {
    let mut rounds = Vec::new();
    let mut given_up = vec![false; cases.len()];
    for round in 0..args.rounds {
        let drive = run::drive(place)?;
        let mut runs: Vec<Option<Run>> = cases.iter().map(|_| None).collect();
        for turn in 0..cases.len() {
            let index = (turn + round) % cases.len();
            let case = &cases[index];
            if given_up[index] {
                continue;
            }
            match run::run(place, case, args) {
                Ok(run) => {
                    eprintln!("round {}, {}: {:.2} s a step", round + 1, case.name, run.step_s());
                    runs[index] = Some(run);
                }
                Err(error) => {
                    given_up[index] = true;
                    eprintln!("round {}, {}: {error:#}", round + 1, case.name);
                    failures.push(Failure { name: case.name.clone(), reason: format!("{error:#}") });
                }
            }
        }
        rounds.push(Round { drive, runs });
    }
    Ok(rounds)
}
