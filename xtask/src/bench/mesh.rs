//! `cargo xtask bench mesh`: what the cost model predicts of steps on meshes of this machine, then the
//! same steps measured.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use comfy_table::{CellAlignment, Table, presets};
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::peers::{self, capture};
use super::runs::median;
use super::{machine, report};

/// Options of `bench mesh`.
#[derive(clap::Args)]
pub struct Args {
    /// Numbers of ranks.
    #[arg(long, value_delimiter = ',', default_values_t = [1, 2, 4])]
    ranks: Vec<usize>,
    /// Meshes of each number of ranks, spread over all from the best to the worst.
    #[arg(long, default_value_t = 5)]
    meshes: usize,
    /// Steps of one run that count.
    #[arg(long, default_value_t = 5)]
    steps: usize,
    /// Times everything is predicted and measured, in turn. Of all predictions and of all steps the least
    /// counts: what disturbs a machine only ever adds.
    #[arg(long, default_value_t = 8)]
    rounds: usize,
    /// What runs [default: bench/mesh/recipe.toml].
    #[arg(long, value_name = "PATH")]
    recipe: Option<PathBuf>,
}

/// Steps before those that count.
const WARM_UP: usize = 2;

/// One plan as `trilith plan --here --json` prints it.
#[derive(Clone, Deserialize, Serialize)]
struct Plan {
    mesh: String,
    ranks: usize,
    sets: Vec<String>,
    step_s: f64,
    parts_s: serde_json::Map<String, serde_json::Value>,
}

/// A plan, its step as it was predicted in each round, and all steps that count.
#[derive(Serialize)]
struct Row {
    plan: Plan,
    predicted_s: Vec<f64>,
    measured_s: Vec<f64>,
}

impl Row {
    fn predicted(&self) -> f64 {
        least(&self.predicted_s)
    }

    fn measured(&self) -> f64 {
        least(&self.measured_s)
    }
}

fn least(seconds: &[f64]) -> f64 {
    seconds.iter().copied().fold(f64::INFINITY, f64::min)
}

/// Predicts every mesh, then measures each; prints the table and keeps it.
pub fn run(root: &Path, args: &Args) -> Result<()> {
    ensure!(
        args.steps >= 1 && args.meshes >= 1 && args.rounds >= 1,
        "--steps, --meshes and --rounds are at least 1"
    );
    let trilith = peers::cargo_build(root, &["--package", "trilith"], "trilith")?;
    let facts = machine::facts(root, None);
    let recipe = args.recipe.clone().unwrap_or_else(|| root.join("bench/mesh/recipe.toml"));
    let mut rows: Vec<Row> = Vec::new();
    for round in 0..args.rounds {
        for ranks in &args.ranks {
            let all = predict((root, &trilith), &recipe, *ranks)?;
            match round {
                0 => rows.extend(spread(all, args.meshes).into_iter().map(|plan| Row {
                    predicted_s: vec![plan.step_s],
                    measured_s: Vec::new(),
                    plan,
                })),
                _ => rows.iter_mut().for_each(|row| {
                    let again =
                        all.iter().filter(|plan| plan.ranks == row.plan.ranks && plan.mesh == row.plan.mesh);
                    row.predicted_s.extend(again.map(|plan| plan.step_s));
                }),
            }
        }
        for row in &mut rows {
            let steps_s = measure((root, &trilith), &recipe, &row.plan, args.steps)
                .with_context(|| format!("measuring {} on {} ranks", row.plan.mesh, row.plan.ranks))?;
            row.measured_s.extend(steps_s);
        }
    }
    println!("{}\n{}", table(&rows), verdict(&rows));
    let name = recipe.file_name().map(|name| name.to_string_lossy());
    let path =
        report::save(root, json!({ "bench": "mesh", "recipe": name, "machine": facts, "rows": rows }))?;
    println!("wrote {}", path.display());
    Ok(())
}

fn predict((root, trilith): (&Path, &Path), recipe: &Path, ranks: usize) -> Result<Vec<Plan>> {
    let mut command = Command::new(trilith);
    command.current_dir(root).arg("plan").arg(recipe);
    let printed = capture(command.args(["--here", "--json", "--ranks", &ranks.to_string()]))?;
    printed
        .lines()
        .map(|line| serde_json::from_str(line).with_context(|| format!("not a plan: {line}")))
        .collect()
}

/// At most `count` of `plans`, the first and the last among them.
fn spread(plans: Vec<Plan>, count: usize) -> Vec<Plan> {
    let all = plans.len();
    let taken = count.min(all);
    (0..taken).map(|i| plans[i * (all - 1) / (taken - 1).max(1)].clone()).collect()
}

fn measure((root, trilith): (&Path, &Path), recipe: &Path, plan: &Plan, steps: usize) -> Result<Vec<f64>> {
    let dir = root.join("target/bench-mesh/run");
    let mut command = Command::new(trilith);
    command.current_dir(root).arg("train").arg(recipe).arg("--overwrite");
    for set in &plan.sets {
        command.args(["--set", set]);
    }
    command.args(["--set", &format!("train.steps={}", steps + WARM_UP)]);
    command.args(["--set", &format!("run.dir={}", dir.display())]);
    capture(&mut command)?;
    let path = dir.join("metrics.jsonl");
    let log = std::fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
    let lines = log.lines().filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok());
    let seconds = lines.filter(|line| line["kind"] == "step").filter_map(|line| line["seconds"].as_f64());
    let seconds: Vec<f64> = seconds.skip(WARM_UP).collect();
    ensure!(!seconds.is_empty(), "the run logged no steps");
    Ok(seconds)
}

fn table(rows: &[Row]) -> Table {
    let mut table = Table::new();
    table.load_style(presets::ASCII_MARKDOWN);
    table.set_header(["ranks", "mesh", "predicted", "measured", "median", "predicted / measured"]);
    let ms = |seconds: f64| format!("{:.0} ms", seconds * 1e3);
    for row in rows {
        let (predicted, measured) = (row.predicted(), row.measured());
        let middle = median(row.measured_s.iter().copied()).unwrap_or(measured);
        let ratio = format!("{:.2}", predicted / measured);
        let ranks = row.plan.ranks.to_string();
        table.add_row([ranks, row.plan.mesh.clone(), ms(predicted), ms(measured), ms(middle), ratio]);
    }
    table.column_iter_mut().skip(2).for_each(|column| column.set_cell_alignment(CellAlignment::Right));
    table
}

/// How many are within a quarter, and how many pairs that differ are ordered rightly.
fn verdict(rows: &[Row]) -> String {
    let near = rows.iter().filter(|row| (row.predicted() / row.measured() - 1.0).abs() <= 0.25).count();
    let pairs = || rows.iter().enumerate().flat_map(|(i, a)| rows[..i].iter().map(move |b| (a, b)));
    let differ = |a: &Row, b: &Row| (a.measured() / b.measured()).max(b.measured() / a.measured()) > 1.15;
    let right = |a: &Row, b: &Row| (a.measured() < b.measured()) == (a.predicted() < b.predicted());
    let apart = pairs().filter(|(a, b)| differ(a, b)).count();
    let ordered = pairs().filter(|(a, b)| differ(a, b) && right(a, b)).count();
    format!(
        "{near} of {} within 25 %; of {apart} pairs whose measured steps differ by more than 15 %, {ordered} are \
         ordered rightly",
        rows.len()
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(step_s: f64, measured_s: f64) -> Row {
        let plan =
            Plan { mesh: "x = 2".into(), ranks: 2, sets: Vec::new(), step_s, parts_s: Default::default() };
        Row { plan, predicted_s: vec![step_s], measured_s: vec![measured_s, 2.0 * measured_s] }
    }

    #[test]
    fn the_verdict_counts_what_is_near_and_what_is_in_order() {
        // 2 and 3 are close in truth; 1 and 2 are told apart wrongly.
        let rows = [row(2.0, 1.0), row(1.9, 2.0), row(2.2, 2.1)];
        let said = verdict(&rows);
        assert!(said.starts_with("2 of 3 within 25 %; of 2 pairs") && said.contains("15 %, 1 are"), "{said}");
    }

    #[test]
    fn plans_are_taken_from_end_to_end() {
        let plans: Vec<Plan> = (0..10).map(|i| row(f64::from(i), 1.0).plan).collect();
        let steps = |count| spread(plans.clone(), count).iter().map(|plan| plan.step_s).collect::<Vec<_>>();
        assert_eq!(steps(4), [0.0, 3.0, 6.0, 9.0]);
        assert_eq!(steps(1), [0.0]);
        assert_eq!(steps(20).len(), 10);
    }
}
