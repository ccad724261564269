//! `cargo xtask bench comm`: collectives of ranks on one machine, our threads against OpenMPI, MPICH and
//! gloo. A round runs every implementation once; ratios are taken within a round.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use comfy_table::{CellAlignment, Table, presets};
use serde::Deserialize;

use super::Failure;
use super::peers::{self, capture};
use super::report;
use super::runs::median;

/// Options of `bench comm`.
#[derive(clap::Args)]
pub struct Args {
    /// Numbers of ranks.
    #[arg(long, value_delimiter = ',', default_values_t = [2, 4])]
    ranks: Vec<usize>,
    /// Bytes of the whole array.
    #[arg(long, value_delimiter = ',', default_values_t = [1 << 10, 64 << 10, 1 << 20, 8 << 20, 64 << 20])]
    bytes: Vec<usize>,
    /// Times every implementation runs.
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// Calls of each op in one run.
    #[arg(long, default_value_t = 9)]
    iterations: usize,
    /// A Python with torch installed [default: bench/.venv].
    #[arg(long, value_name = "PATH")]
    python: Option<PathBuf>,
}

/// Ops in the order of the table, and what peers call them. The shared ones are what training calls where it
/// only reads what comes: members of a process get handles of one array.
const OPS: [(&str, &str); 6] = [
    ("all_reduce", "all_reduce"),
    ("reduce_scatter", "reduce_scatter"),
    ("all_gather", "all_gather"),
    ("all_gather_shared", "all_gather"),
    ("broadcast", "broadcast"),
    ("broadcast_shared", "broadcast"),
];

/// One implementation: its command for (ranks, bytes, iterations).
struct Program {
    name: &'static str,
    command: Box<dyn Fn(usize, usize, usize) -> Command>,
}

/// One op of one run, as every implementation prints it.
#[derive(Deserialize)]
struct Line {
    op: String,
    seconds: f64,
}

/// Seconds by (program, round, op).
type Times = BTreeMap<(usize, usize, String), f64>;

/// Builds, measures and prints a table for each number of ranks.
pub fn run(root: &Path, args: &Args) -> Result<()> {
    ensure!(args.rounds >= 1 && args.iterations >= 1, "--rounds and --iterations are at least 1");
    let (programs, failures) = prepare(root, args)?;
    for &ranks in &args.ranks {
        let mut table = Table::new();
        table.load_style(presets::UTF8_FULL_CONDENSED);
        let peers = programs[1..].iter().map(|program| format!("{} / ours", program.name));
        let names = [format!("{ranks} ranks"), "bytes".to_string(), "ours".to_string()];
        table.set_header(names.into_iter().chain(peers));
        for &bytes in &args.bytes {
            let times = measure(&programs, (ranks, bytes), args);
            for op in OPS {
                table.add_row(row(&programs, op, bytes, (&times, args.rounds)));
            }
        }
        table.column_iter_mut().skip(1).for_each(|column| column.set_cell_alignment(CellAlignment::Right));
        println!("\n{table}");
    }
    println!("medians of {} rounds; a ratio of 3 means that ours takes a third of the time", args.rounds);
    if !failures.is_empty() {
        println!("\nnot measured:\n{}", report::failures(&failures));
    }
    Ok(())
}

/// Ours first. A peer that cannot be made ready is reported, never a reason to stop.
fn prepare(root: &Path, args: &Args) -> Result<(Vec<Program>, Vec<Failure>)> {
    let ours = peers::cargo_build(root, &["--package", "dist", "--example", "comm_bench"], "comm_bench")?;
    let mut programs = vec![Program {
        name: "threads",
        command: Box::new(move |ranks, bytes, iterations| {
            let mut command = Command::new(&ours);
            command.args([ranks, bytes, iterations].map(|n| n.to_string()));
            command
        }),
    }];
    let python = args.python.clone().unwrap_or_else(|| peers::venv_python(root));
    let made =
        [mpi(root, "openmpi", "--oversubscribe"), mpi(root, "mpich", "-bind-to=none"), gloo(root, python)];
    let mut failures = Vec::new();
    for (name, made) in ["openmpi", "mpich", "gloo"].into_iter().zip(made) {
        match made {
            Ok(program) => programs.push(program),
            Err(error) => failures.push(Failure { name: name.to_string(), reason: format!("{error:#}") }),
        }
    }
    Ok((programs, failures))
}

fn mpi(root: &Path, name: &'static str, option: &'static str) -> Result<Program> {
    let folder = root.join("target/bench-comm");
    std::fs::create_dir_all(&folder).with_context(|| format!("making {}", folder.display()))?;
    let binary = folder.join(name);
    let mut compile = Command::new(format!("mpicc.{name}"));
    compile.arg("-O3").arg(root.join("bench/comm/collectives.c")).arg("-o").arg(&binary);
    capture(&mut compile).with_context(|| format!("compiling with mpicc.{name}"))?;
    let command = move |ranks: usize, bytes: usize, iterations: usize| {
        let mut command = Command::new(format!("mpirun.{name}"));
        command.envs([("OMPI_ALLOW_RUN_AS_ROOT", "1"), ("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1")]);
        command.args([option, "-n", &ranks.to_string()]).arg(&binary);
        command.args([bytes, iterations].map(|n| n.to_string()));
        command
    };
    Ok(Program { name, command: Box::new(command) })
}

fn gloo(root: &Path, python: PathBuf) -> Result<Program> {
    peers::torch_version(&python)?;
    let script = root.join("bench/comm/gloo.py");
    let command = move |ranks: usize, bytes: usize, iterations: usize| {
        let mut command = Command::new(&python);
        command.arg(&script).args([ranks, bytes, iterations].map(|n| n.to_string()));
        command
    };
    Ok(Program { name: "gloo", command: Box::new(command) })
}

/// Every program once a round, each round beginning with another one. What fails has no times.
fn measure(programs: &[Program], (ranks, bytes): (usize, usize), args: &Args) -> Times {
    let mut times = Times::new();
    for round in 0..args.rounds {
        for turn in 0..programs.len() {
            let index = (turn + round) % programs.len();
            let program = &programs[index];
            match capture(&mut (program.command)(ranks, bytes, args.iterations)) {
                Ok(printed) => {
                    let lines = printed.lines().filter_map(|line| serde_json::from_str::<Line>(line).ok());
                    times.extend(lines.map(|line| ((index, round, line.op), line.seconds)));
                }
                Err(error) => eprintln!("{} on {ranks} ranks, {bytes} bytes: {error:#}", program.name),
            }
        }
    }
    times
}

fn row(
    programs: &[Program],
    (op, theirs): (&str, &str),
    bytes: usize,
    (times, rounds): (&Times, usize),
) -> Vec<String> {
    let of = |program: usize, round: usize| {
        let op = if program == 0 { op } else { theirs };
        times.get(&(program, round, op.to_string())).copied()
    };
    let ours = median((0..rounds).filter_map(|round| of(0, round)));
    let ratio = |program: usize| {
        let ratios = (0..rounds).filter_map(|round| Some(of(program, round)? / of(0, round)?));
        median(ratios).map_or_else(|| "-".to_string(), |ratio| format!("{ratio:.1}"))
    };
    let ours = ours.map_or_else(|| "failed".to_string(), |s| format!("{:.1} us", s * 1e6));
    [op.to_string(), bytes.to_string(), ours].into_iter().chain((1..programs.len()).map(ratio)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn program(name: &'static str) -> Program {
        Program { name, command: Box::new(|_, _, _| Command::new("true")) }
    }

    #[test]
    fn ratios_are_taken_within_rounds() {
        let programs = [program("threads"), program("openmpi"), program("gloo")];
        let mut times = Times::new();
        for (round, slowdown) in [1.0, 5.0, 2.0].into_iter().enumerate() {
            times.insert((0, round, "broadcast".to_string()), 1e-3 * slowdown);
            times.insert((1, round, "broadcast".to_string()), 4e-3 * slowdown);
        }
        let row = row(&programs, ("broadcast", "broadcast"), 1024, (&times, 3));
        assert_eq!(row, ["broadcast", "1024", "2000.0 us", "4.0", "-"]);
    }
}
