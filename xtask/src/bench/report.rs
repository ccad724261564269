//! Tables, the headline and the results file. Pure but for `write`.

use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result};
use comfy_table::{CellAlignment, Table, presets};
use serde_json::{Value, json};

use super::peers::{Precision, Program};
use super::runs::{Measured, Run, median};
use super::{Failure, Family, Plan};

const GIB: f64 = 1024.0 * 1024.0 * 1024.0;

/// One line a program; ratios are of tokens/s to our faster mode of the same round.
pub fn table(config: &str, programs: &[Program], measured: &Measured) -> Table {
    let mut table = Table::new();
    table.load_style(presets::UTF8_FULL_CONDENSED);
    let headers = ["tokens/s (min..max)", "GFLOP/s", "% of our GEMM peak", "peak memory", "speed, ours = 1"];
    table.set_header(std::iter::once(format!("config {config}")).chain(headers.map(String::from)));
    for (index, program) in programs.iter().enumerate() {
        table.add_row(row(index, program, programs, measured));
    }
    table.column_iter_mut().skip(1).for_each(|column| column.set_cell_alignment(CellAlignment::Right));
    table
}

fn row(index: usize, program: &Program, programs: &[Program], measured: &Measured) -> Vec<String> {
    let speeds: Vec<f64> = measured.of(index).map(|run| run.tokens_per_s).collect();
    let Some(speed) = median(speeds.iter().copied()) else {
        return vec![program.name.clone(), "failed".to_string()];
    };
    let (slowest, fastest) = speeds.iter().fold((f64::MAX, 0f64), |(lo, hi), v| (lo.min(*v), hi.max(*v)));
    let gflops = median(measured.of(index).map(|run| run.gflops)).unwrap_or_default();
    let memory = median(measured.of(index).map(|run| run.peak_bytes)).unwrap_or_default();
    let share = measured.peak(program.precision).map(|peak| format!("{:.0} %", 100.0 * gflops / peak));
    let ratio = over_rounds(measured, |round| {
        let ours = best(programs, measured, round, |p| p.family == Family::Trilith)?;
        Some(measured.get(index, round)?.tokens_per_s / ours.tokens_per_s)
    });
    vec![
        program.name.clone(),
        format!("{speed:.0} ({slowest:.0}..{fastest:.0})"),
        format!("{gflops:.0}"),
        share.unwrap_or_else(|| "-".to_string()),
        format!("{:.2} GiB", memory / GIB),
        ratio.map_or_else(|| "-".to_string(), |ratio| format!("{ratio:.2}")),
    ]
}

/// The fastest run of a round among the programs that `is_meant` picks.
fn best<'a>(
    programs: &[Program],
    measured: &'a Measured,
    round: usize,
    is_meant: impl Fn(&Program) -> bool,
) -> Option<&'a Run> {
    let meant = programs.iter().enumerate().filter(|(_, program)| is_meant(program));
    let runs = meant.filter_map(|(index, _)| measured.get(index, round));
    runs.max_by(|a, b| a.tokens_per_s.total_cmp(&b.tokens_per_s))
}

/// The median of a value over the rounds that have it.
fn over_rounds(measured: &Measured, value: impl Fn(usize) -> Option<f64>) -> Option<f64> {
    median((0..measured.rounds()).filter_map(value))
}

/// The three numbers a reader takes away; each the median over rounds of a ratio within a round.
struct Ratios {
    /// Our tokens/s to torch's, the faster mode of each.
    speed: Option<f64>,
    /// The same among f32 modes.
    speed_f32: Option<f64>,
    /// Our peak memory to torch's, of the same runs as `speed`.
    memory: Option<f64>,
}

impl Ratios {
    fn new(programs: &[Program], measured: &Measured) -> Ratios {
        let pair = |round, f32_only: bool| {
            let meant = |p: &Program| !f32_only || p.precision == Precision::F32;
            let ours = best(programs, measured, round, |p| p.family == Family::Trilith && meant(p))?;
            let torch = best(programs, measured, round, |p| p.family == Family::Torch && meant(p))?;
            Some((ours, torch))
        };
        let speed = |f32_only| {
            over_rounds(measured, |round| {
                pair(round, f32_only).map(|(ours, torch)| ours.tokens_per_s / torch.tokens_per_s)
            })
        };
        let memory = over_rounds(measured, |round| {
            pair(round, false).map(|(ours, torch)| ours.peak_bytes / torch.peak_bytes)
        });
        Ratios { speed: speed(false), speed_f32: speed(true), memory }
    }
}

/// The sentence under a table.
pub fn headline(programs: &[Program], measured: &Measured) -> String {
    let ratios = Ratios::new(programs, measured);
    let show = |ratio: Option<f64>| ratio.map_or_else(|| "not measured".to_string(), |r| format!("{r:.2}x"));
    format!(
        "ours / best torch of the round, median of {} rounds: tokens/s {}, f32 only {}, peak memory {}",
        measured.rounds(),
        show(ratios.speed),
        show(ratios.speed_f32),
        show(ratios.memory)
    )
}

/// Names of what failed, each with its reason indented below.
pub fn failures(failures: &[Failure]) -> String {
    let one = |failure: &Failure| format!("  {}: {}", failure.name, failure.reason.replace('\n', "\n    "));
    failures.iter().map(one).collect::<Vec<_>>().join("\n")
}

/// Writes bench/results/<date-time>.json and returns its path.
pub fn write(
    root: &Path,
    plan: &Plan,
    machine: Value,
    programs: &[Program],
    results: &[(&str, Measured)],
    failures: &[Failure],
) -> Result<PathBuf> {
    let configs = results.iter().map(|(config, measured)| config_json(config, programs, measured));
    let failed = failures.iter().map(|failure| json!({ "name": failure.name, "reason": failure.reason }));
    let document = json!({
        "bench": "train",
        "rounds": plan.rounds,
        "steps": plan.steps,
        "threads": plan.threads,
        "machine": machine,
        "configs": configs.collect::<Vec<_>>(),
        "failures": failed.collect::<Vec<_>>(),
    });
    save(root, document)
}

/// Writes bench/results/<date-time>.json, dated, and returns its path.
pub fn save(root: &Path, mut document: Value) -> Result<PathBuf> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    document["at"] = json!(date_time(now));
    let folder = root.join("bench/results");
    let path = folder.join(format!("{}.json", date_time(now).replace(':', "-")));
    std::fs::create_dir_all(&folder).with_context(|| format!("making {}", folder.display()))?;
    let text = serde_json::to_string_pretty(&document)? + "\n";
    std::fs::write(&path, text).with_context(|| format!("writing {}", path.display()))?;
    Ok(path)
}

fn config_json(config: &str, programs: &[Program], measured: &Measured) -> Value {
    let ratios = Ratios::new(programs, measured);
    let implementations = programs.iter().enumerate().map(|(index, program)| {
        let runs: Vec<_> = (0..measured.rounds()).map(|round| measured.get(index, round)).collect();
        json!({ "name": program.name, "warm_up_steps": program.warm_up, "runs_by_round": runs })
    });
    json!({
        "config": config,
        "ours_to_best_torch": {
            "tokens_per_s": ratios.speed,
            "tokens_per_s_f32": ratios.speed_f32,
            "peak_memory": ratios.memory,
        },
        "gemm_peak_gflops": {
            "f32": measured.peak(Precision::F32),
            "bf16": measured.peak(Precision::Bf16),
        },
        "implementations": implementations.collect::<Vec<_>>(),
    })
}

/// UTC as `2026-01-31T23:59:59Z`; the days by Howard Hinnant's civil_from_days.
fn date_time(since_epoch: Duration) -> String {
    let seconds = since_epoch.as_secs();
    let day = seconds / 86_400 + 719_468;
    let (era, day) = (day / 146_097, day % 146_097);
    let year = (day - day / 1460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    // Months counted from March, so that the leap day comes last.
    let month = (5 * day + 2) / 153;
    let (day, month) = (day - (153 * month + 2) / 5 + 1, if month < 10 { month + 3 } else { month - 9 });
    let year = era * 400 + year + u64::from(month <= 2);
    let (h, m, s) = (seconds / 3600 % 24, seconds / 60 % 60, seconds % 60);
    format!("{year:04}-{month:02}-{day:02}T{h:02}:{m:02}:{s:02}Z")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn program(name: &str, family: Family, precision: Precision) -> Program {
        Program { name: name.to_string(), family, precision, argv: Vec::new(), mode: "", warm_up: 1 }
    }

    fn run(tokens_per_s: f64, peak_bytes: f64) -> Run {
        Run { tokens_per_s, gflops: tokens_per_s / 10.0, peak_bytes, steps: Vec::new(), peak: None }
    }

    /// Ours at twice torch's bf16 in each round, though rounds differ threefold.
    fn example() -> (Vec<Program>, Measured) {
        let programs = vec![
            program("ours-bf16", Family::Trilith, Precision::Bf16),
            program("ours-f32", Family::Trilith, Precision::F32),
            program("torch-bf16", Family::Torch, Precision::Bf16),
            program("torch-f32", Family::Torch, Precision::F32),
            program("burn", Family::Burn, Precision::F32),
        ];
        let mut measured = Measured::default();
        for (round, slowdown) in [1.0, 3.0, 2.0].into_iter().enumerate() {
            for (index, (speed, memory)) in
                [(1200.0, GIB), (600.0, GIB), (600.0, 2.0 * GIB), (400.0, GIB)].into_iter().enumerate()
            {
                measured.add(index, round, run(speed / slowdown, memory));
            }
        }
        (programs, measured)
    }

    #[test]
    fn ratios_are_taken_within_rounds() {
        let (programs, measured) = example();
        let expected = "ours / best torch of the round, median of 3 rounds: \
                        tokens/s 2.00x, f32 only 1.50x, peak memory 0.50x";
        assert_eq!(headline(&programs, &measured), expected);
        assert!(headline(&programs, &Measured::default()).contains("tokens/s not measured"));
    }

    #[test]
    fn rows_show_the_median_and_the_spread() {
        let (programs, measured) = example();
        let torch = row(2, &programs[2], &programs, &measured);
        assert_eq!(torch, ["torch-bf16", "300 (200..600)", "30", "-", "2.00 GiB", "0.50"]);
        assert_eq!(row(4, &programs[4], &programs, &measured), ["burn", "failed"]);
        assert!(table("S", &programs, &measured).to_string().contains("config S"));
    }

    #[test]
    fn dates() {
        let at = |seconds| date_time(Duration::from_secs(seconds));
        assert_eq!(at(0), "1970-01-01T00:00:00Z");
        assert_eq!(at(951_782_400), "2000-02-29T00:00:00Z");
        assert_eq!(at(1_767_225_599), "2025-12-31T23:59:59Z");
    }
}
