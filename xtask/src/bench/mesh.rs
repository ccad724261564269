//! `cargo xtask bench mesh`: what the cost model predicts of steps on meshes of this machine, beside the
//! same steps measured.
//!
//! A machine that others use too changes its speed every few seconds. So all runs are started once and stopped,
//! and go on in turn for a few steps each: what is compared was measured in the same seconds. A mesh's step is its
//! part of a round, the median of all rounds; predictions are taken in the same way. How high both are is compared
//! where they lie next to each other, between two predictions.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use comfy_table::{CellAlignment, Table, presets};
use indicatif::{ProgressBar, ProgressStyle};
use rustix::process::{Pid, Signal, kill_process};
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
    /// Steps of a turn that count.
    #[arg(long, default_value_t = 2)]
    steps: usize,
    /// Turns of every mesh.
    #[arg(long, default_value_t = 40)]
    rounds: usize,
    /// Times everything is predicted, spread over the rounds.
    #[arg(long, default_value_t = 8)]
    predictions: usize,
    /// Prints the table of results that were kept, and runs nothing.
    #[arg(long, value_name = "PATH")]
    kept: Option<PathBuf>,
    /// What runs [default: bench/mesh/recipe.toml].
    #[arg(long, value_name = "PATH")]
    recipe: Option<PathBuf>,
}

/// Steps before those that count.
const WARM_UP: usize = 3;
/// A step that takes longer has failed.
const PATIENCE: Duration = Duration::from_secs(300);
/// Draws of rounds that say how sure a difference is, and of how many of a hundred of them it must hold.
const RESAMPLES: usize = 500;
const SURE_PERCENT: usize = 95;
/// How often the log of a run is looked at.
const LOOK: Duration = Duration::from_millis(5);

/// One plan as `trilith plan --here --json` prints it.
#[derive(Clone, Deserialize, Serialize)]
struct Plan {
    mesh: String,
    ranks: usize,
    sets: Vec<String>,
    step_s: f64,
    parts_s: serde_json::Map<String, serde_json::Value>,
}

/// A plan, its step as it was predicted each time, and the steps of every turn.
#[derive(Deserialize, Serialize)]
struct Row {
    plan: Plan,
    predicted_s: Vec<f64>,
    turns_s: Vec<Vec<f64>>,
}

/// Results as they are kept.
#[derive(Deserialize)]
struct Kept {
    rows: Vec<Row>,
}

fn least(seconds: impl Iterator<Item = f64>) -> f64 {
    seconds.fold(f64::INFINITY, f64::min)
}

/// exp of the mean logarithm.
fn middle(seconds: impl ExactSizeIterator<Item = f64>) -> f64 {
    let count = seconds.len() as f64;
    (seconds.map(f64::ln).sum::<f64>() / count).exp()
}

/// Every mesh's part of a round, by the median of all rounds: its seconds over the middle of all meshes. What
/// slows a machine down slows what runs in the same seconds.
fn parts(rounds: &[Vec<f64>]) -> Vec<f64> {
    let count = rounds.iter().map(Vec::len).min().unwrap_or(0);
    let levels: Vec<f64> = (0..count).map(|round| middle(rounds.iter().map(|mesh| mesh[round]))).collect();
    let part = |mesh: &Vec<f64>| median(mesh.iter().zip(&levels).map(|(seconds, level)| seconds / level));
    rounds.iter().map(|mesh| part(mesh).unwrap_or(1.0)).collect()
}

/// The same from rounds drawn again and again from those there are: what their chance can explain.
fn resampled(rounds: &[Vec<f64>]) -> Vec<Vec<f64>> {
    let count = rounds.iter().map(Vec::len).min().unwrap_or(0);
    // Knuth's MMIX generator: the same draws every time.
    let mut state = 1u64;
    let mut draw = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as usize % count
    };
    let mut again = || -> Vec<Vec<f64>> {
        let drawn: Vec<usize> = (0..count).map(|_| draw()).collect();
        rounds.iter().map(|mesh| drawn.iter().map(|round| mesh[*round]).collect()).collect()
    };
    (0..RESAMPLES).map(|_| parts(&again())).collect()
}

/// By mesh, the least step of every turn.
fn turns(rows: &[Row]) -> Vec<Vec<f64>> {
    let turn = |steps: &Vec<f64>| least(steps.iter().copied());
    rows.iter().map(|row| row.turns_s.iter().map(turn).collect()).collect()
}

/// (predicted, measured) seconds of a step of every mesh. A prediction takes the least of what it times; it is
/// held against the least steps of as many rounds as lie between two predictions.
fn both(rows: &[Row]) -> Vec<(f64, f64)> {
    let predicted: Vec<Vec<f64>> = rows.iter().map(|row| row.predicted_s.clone()).collect();
    let turns = turns(rows);
    let count = |rounds: &[Vec<f64>]| rounds.iter().map(Vec::len).min().unwrap_or(0);
    let block = count(&turns).div_ceil(count(&predicted).max(1)).max(1);
    let blocks: Vec<Vec<f64>> = turns
        .iter()
        .map(|mesh| mesh.chunks(block).map(|rounds| least(rounds.iter().copied())).collect())
        .collect();
    let at_level = |rounds: &[Vec<f64>], parts: Vec<f64>| -> Vec<f64> {
        let levels = (0..count(rounds)).map(|round| middle(rounds.iter().map(|mesh| mesh[round])));
        let level = median(levels).unwrap_or(f64::NAN);
        parts.into_iter().map(|part| level * part).collect()
    };
    let predicted = at_level(&predicted, parts(&predicted));
    predicted.into_iter().zip(at_level(&blocks, parts(&turns))).collect()
}

/// Predicts and measures every mesh in turn; prints the table and keeps it.
pub fn run(root: &Path, args: &Args) -> Result<()> {
    ensure!(
        args.steps >= 1 && args.meshes >= 1 && args.rounds >= 1 && args.predictions >= 1,
        "--steps, --meshes, --rounds and --predictions are at least 1"
    );
    if let Some(path) = &args.kept {
        let text = std::fs::read_to_string(path).with_context(|| format!("reading {}", path.display()))?;
        let kept: Kept = serde_json::from_str(&text)
            .with_context(|| format!("{} is not of this bench; name what it wrote", path.display()))?;
        println!("{}\n{}", table(&kept.rows), verdict(&kept.rows));
        return Ok(());
    }
    let trilith = peers::cargo_build(root, &["--package", "trilith"], "trilith")?;
    let facts = machine::facts(root, None);
    let recipe = args.recipe.clone().unwrap_or_else(|| root.join("bench/mesh/recipe.toml"));
    let here = (root, trilith.as_path());
    let mut rows: Vec<Row> = Vec::new();
    for ranks in &args.ranks {
        let plans = spread(predict(here, &recipe, *ranks)?, args.meshes);
        rows.extend(plans.into_iter().map(|plan| Row {
            predicted_s: vec![plan.step_s],
            turns_s: Vec::new(),
            plan,
        }));
    }
    let bar = ProgressBar::new((rows.len() * (1 + args.rounds)) as u64);
    bar.set_style(ProgressStyle::with_template("{bar:30} {pos}/{len} {msg} {elapsed}")?);
    let mut runs = Vec::new();
    for (nth, row) in rows.iter().enumerate() {
        bar.set_message(format!("starting {}", row.plan.mesh));
        let run = Paused::start(here, &recipe, &row.plan, nth);
        runs.push(run.with_context(|| format!("{} on {} ranks", row.plan.mesh, row.plan.ranks))?);
        bar.inc(1);
    }
    let every = args.rounds.div_ceil(args.predictions);
    for round in 0..args.rounds {
        if round > 0 && round.is_multiple_of(every) {
            bar.set_message("predicting");
            predict_again(here, &recipe, &args.ranks, &mut rows)?;
        }
        for (run, row) in runs.iter_mut().zip(&mut rows) {
            bar.set_message(row.plan.mesh.clone());
            row.turns_s.push(run.turn(args.steps)?);
            bar.inc(1);
        }
    }
    bar.finish_and_clear();
    drop(runs);
    println!("{}\n{}", table(&rows), verdict(&rows));
    let name = recipe.file_name().map(|name| name.to_string_lossy());
    let path =
        report::save(root, json!({ "bench": "mesh", "recipe": name, "machine": facts, "rows": rows }))?;
    println!("wrote {}", path.display());
    Ok(())
}

/// Predicts everything once more. What one prediction leaves out counts for no mesh.
fn predict_again(here: (&Path, &Path), recipe: &Path, ranks: &[usize], rows: &mut [Row]) -> Result<()> {
    let mut all = Vec::new();
    for ranks in ranks {
        all.extend(predict(here, recipe, *ranks)?);
    }
    let again = |row: &Row| {
        let same = |plan: &&Plan| plan.ranks == row.plan.ranks && plan.mesh == row.plan.mesh;
        all.iter().find(same).map(|plan| plan.step_s)
    };
    if let Some(steps_s) = rows.iter().map(again).collect::<Option<Vec<f64>>>() {
        rows.iter_mut().zip(steps_s).for_each(|(row, step_s)| row.predicted_s.push(step_s));
    }
    Ok(())
}

/// A training run that stands still but for its turns. Killed when dropped.
struct Paused {
    child: Child,
    dir: PathBuf,
    log: PathBuf,
}

impl Drop for Paused {
    fn drop(&mut self) {
        // A run that is gone already is as good.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Paused {
    /// Starts it, and stops it behind its first steps.
    fn start((root, trilith): (&Path, &Path), recipe: &Path, plan: &Plan, nth: usize) -> Result<Paused> {
        let dir = root.join(format!("target/bench-mesh/run-{nth}"));
        if dir.exists() {
            std::fs::remove_dir_all(&dir).with_context(|| format!("clearing {}", dir.display()))?;
        }
        std::fs::create_dir_all(dir.with_file_name("logs"))?;
        let log = dir.with_file_name(format!("logs/run-{nth}.log"));
        // A run that stands still does not see an interrupt: it would outlive us.
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL"]).arg(trilith).current_dir(root);
        command.arg("train").arg(recipe).arg("--overwrite");
        for set in &plan.sets {
            command.args(["--set", set]);
        }
        // It never comes to its end.
        command.args(["--set", "train.steps=1000000", "--set", &format!("run.dir={}", dir.display())]);
        let out = File::create(&log).with_context(|| format!("creating {}", log.display()))?;
        let child = command
            .stdout(out.try_clone()?)
            .stderr(out)
            .spawn()
            .context("starting setpriv (util-linux) with trilith")?;
        let mut run = Paused { child, dir, log };
        run.wait_for(WARM_UP)?;
        run.signal(Signal::STOP)?;
        Ok(run)
    }

    /// Seconds of its next `steps` steps, behind the one that was stopped.
    fn turn(&mut self, steps: usize) -> Result<Vec<f64>> {
        let before = self.steps()?.len();
        self.signal(Signal::CONT)?;
        let all = self.wait_for(before + 1 + steps)?;
        self.signal(Signal::STOP)?;
        Ok(all[before + 1..before + 1 + steps].to_vec())
    }

    fn signal(&self, signal: Signal) -> Result<()> {
        kill_process(Pid::from_child(&self.child), signal).context("signalling a run")
    }

    /// Seconds of its steps when there are `count`.
    fn wait_for(&mut self, count: usize) -> Result<Vec<f64>> {
        let started = Instant::now();
        loop {
            let steps = self.steps()?;
            if steps.len() >= count {
                return Ok(steps);
            }
            let ended = self.child.try_wait()?.map(|status| format!("{status}"));
            let late = (started.elapsed() > PATIENCE).then(|| format!("no step in {PATIENCE:?}"));
            if let Some(what) = ended.or(late) {
                let said = std::fs::read_to_string(&self.log).unwrap_or_default();
                bail!("a run ended: {what}\n{}", said.trim_end());
            }
            std::thread::sleep(LOOK);
        }
    }

    /// Seconds of its steps so far. A line that is still being written does not count.
    fn steps(&self) -> Result<Vec<f64>> {
        let path = self.dir.join("metrics.jsonl");
        let log = match std::fs::read_to_string(&path) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
            log => log.with_context(|| format!("reading {}", path.display()))?,
        };
        let lines = log.lines().filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok());
        Ok(lines.filter(|line| line["kind"] == "step").filter_map(|line| line["seconds"].as_f64()).collect())
    }
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

fn table(rows: &[Row]) -> Table {
    let mut table = Table::new();
    table.load_style(presets::ASCII_MARKDOWN);
    table.set_header(["ranks", "mesh", "predicted", "measured", "least", "median", "predicted / measured"]);
    let ms = |seconds: f64| format!("{:.0} ms", seconds * 1e3);
    for (row, (predicted, measured)) in rows.iter().zip(both(rows)) {
        let steps = || row.turns_s.iter().flatten().copied();
        let [least, median] = [least(steps()), median(steps()).unwrap_or(measured)].map(ms);
        let ratio = format!("{:.2}", predicted / measured);
        let (ranks, mesh) = (row.plan.ranks.to_string(), row.plan.mesh.clone());
        table.add_row([ranks, mesh, ms(predicted), ms(measured), least, median, ratio]);
    }
    table.column_iter_mut().skip(2).for_each(|column| column.set_cell_alignment(CellAlignment::Right));
    table
}

/// How many are within a quarter, and how many pairs that differ are ordered rightly: of all that do, and of
/// those that do so beyond chance.
fn verdict(rows: &[Row]) -> String {
    let (predicted, measured): (Vec<f64>, Vec<f64>) = both(rows).into_iter().unzip();
    let samples = resampled(&turns(rows));
    let near = predicted.iter().zip(&measured).filter(|(p, m)| (*p / *m - 1.0).abs() <= 0.25).count();
    let slower = |(i, j): (usize, usize), steps: &[f64]| steps[i] / steps[j] > 1.15;
    let surely = |pair: (usize, usize)| {
        let often = samples.iter().filter(|steps| slower(pair, steps)).count();
        often * 100 >= SURE_PERCENT * RESAMPLES
    };
    let pairs = (0..rows.len()).flat_map(|i| (0..rows.len()).map(move |j| (i, j)));
    let apart: Vec<(usize, usize)> = pairs.filter(|pair| slower(*pair, &measured)).collect();
    let sure: Vec<(usize, usize)> = apart.iter().copied().filter(|pair| surely(*pair)).collect();
    let right =
        |pairs: &[(usize, usize)]| pairs.iter().filter(|(i, j)| predicted[*i] > predicted[*j]).count();
    format!(
        "{near} of {} within 25 %; of {} pairs whose measured steps differ by more than 15 %, {} are ordered \
         rightly; of {} that do so in {SURE_PERCENT} of 100 resamples of the rounds, {}",
        rows.len(),
        apart.len(),
        right(&apart),
        sure.len(),
        right(&sure)
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(step_s: f64, measured_s: f64) -> Row {
        let plan =
            Plan { mesh: "x = 2".into(), ranks: 2, sets: Vec::new(), step_s, parts_s: Default::default() };
        // The second round is half as fast, for all of them.
        let turns_s = [1.0, 2.0].map(|times| vec![times * measured_s; 2]);
        Row { plan, predicted_s: vec![step_s, 2.0 * step_s], turns_s: turns_s.to_vec() }
    }

    #[test]
    fn the_verdict_counts_what_is_near_and_what_is_in_order() {
        // 2 and 3 are close in truth; 1 and 2 are told apart wrongly.
        let rows = [row(2.0, 1.0), row(1.9, 2.0), row(2.2, 2.1)];
        let said = verdict(&rows);
        assert!(said.starts_with("2 of 3 within 25 %; of 2 pairs") && said.contains("15 %, 1 are"), "{said}");
        assert!(said.ends_with("of 2 that do so in 95 of 100 resamples of the rounds, 1"), "{said}");
    }

    #[test]
    fn a_difference_that_hangs_on_few_rounds_is_not_sure() {
        let (mut slow, quick) = (row(2.0, 1.1), row(1.0, 1.0));
        let step = |times: f64| vec![times * 1.1; 2];
        slow.turns_s = [1.0, 1.2, 1.0, 1.2, 1.2, 1.0, 1.2].map(step).to_vec();
        let quick = Row { turns_s: vec![vec![1.0; 2]; 7], ..quick };
        let said = verdict(&[slow, quick]);
        assert!(
            said.contains("of 1 pairs")
                && said.ends_with("of 0 that do so in 95 of 100 resamples of the rounds, 0"),
            "{said}"
        );
    }

    #[test]
    fn what_slows_a_round_or_one_step_changes_no_proportion() {
        let rounds = |third: &[f64]| {
            let quiet = [vec![1.0, 2.0, 7.0, 1.0, 5.0], vec![2.0, 4.0, 14.0, 2.0, 10.0]];
            quiet.into_iter().chain([third.to_vec()]).collect::<Vec<_>>()
        };
        let near = |got: Vec<f64>| {
            let close = got.iter().zip([0.5, 1.0, 2.0]).all(|(got, want)| (got - want).abs() < 1e-9);
            assert!(close, "{got:?}");
        };
        near(parts(&rounds(&[4.0, 8.0, 28.0, 4.0, 20.0])));
        near(parts(&rounds(&[4.0, 8.0, 28.0, 12.0, 20.0])));
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
