//! Gets every implementation ready to run: builds ours and the Rust peers, finds or makes a Python with torch.
//!
//! A peer that cannot be made ready is a failure to report, never a reason to stop.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use indicatif::{ProgressBar, ProgressStyle};

use super::{Args, Failure, Family};

/// The torch that bench/.venv holds.
pub const TORCH: &str = "2.15.0";

/// First steps of a run that the slowest starter drops.
pub const LONGEST_WARM_UP: usize = 2;

/// Number format of the matrix products.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Precision {
    /// 32-bit floats throughout.
    F32,
    /// bfloat16 products, f32 master weights.
    Bf16,
}

/// One implementation in one mode: a line of the table.
pub struct Program {
    /// Its name in tables and results.
    pub name: String,
    pub family: Family,
    pub precision: Precision,
    /// The program and its first arguments; config, mode, steps and threads follow.
    pub argv: Vec<OsString>,
    /// Value of `--mode`.
    pub mode: &'static str,
    /// First steps of a run that do not count.
    pub warm_up: usize,
}

/// Everything that can be measured, ours first, and what could not be made ready.
pub fn prepare(root: &Path, args: &Args) -> Result<(Vec<Program>, Vec<Failure>)> {
    let mut programs = Vec::new();
    let mut failures = Vec::new();
    let mut families = vec![Family::Trilith];
    families.extend(&args.peers);
    for family in families {
        let spinner = ProgressBar::new_spinner();
        spinner.set_style(ProgressStyle::with_template("{spinner} {msg} {elapsed}")?);
        spinner.set_message(format!("preparing {family} (the first time takes minutes)"));
        spinner.enable_steady_tick(Duration::from_millis(200));
        let made = match family {
            Family::Trilith => trilith(root, args),
            Family::Torch => torch(root, args),
            _ if args.device != "cpu" => Err(anyhow!("runs on the CPU only")),
            Family::Candle => rust_peer(root, family, "candle-f32"),
            Family::Burn => rust_peer(root, family, "burn-flex-f32"),
        };
        spinner.finish_and_clear();
        match made {
            Ok(made) => programs.extend(made),
            Err(error) => failures.push(Failure { name: family.to_string(), reason: format!("{error:#}") }),
        }
    }
    Ok((programs, failures))
}

/// What `args` ask of ours and of torch beside size, mode and steps.
fn asked(args: &Args) -> Vec<OsString> {
    let mut asked = vec!["--device".into(), args.device.clone().into()];
    if let Some(batch) = args.batch {
        asked.extend(["--batch".into(), batch.to_string().into()]);
    }
    asked
}

fn trilith(root: &Path, args: &Args) -> Result<Vec<Program>> {
    let binary = match &args.binary {
        Some(binary) => binary.clone(),
        None => cargo_build(root, &["--package", "trilith"], "trilith")?,
    };
    let program = |mode, precision| Program {
        name: format!("trilith-{mode}"),
        family: Family::Trilith,
        precision,
        argv: [vec![binary.clone().into(), "bench-step".into()], asked(args)].concat(),
        mode,
        warm_up: 1,
    };
    Ok(vec![program("bf16", Precision::Bf16), program("f32", Precision::F32)])
}

fn rust_peer(root: &Path, family: Family, name: &str) -> Result<Vec<Program>> {
    // Run from its folder, where bench/.cargo/config.toml sets flags and target folder.
    let folder = root.join("bench").join(family.to_string());
    let binary = cargo_build(&folder, &["--locked"], &format!("bench-{family}"))?;
    Ok(vec![Program {
        name: name.to_string(),
        family,
        precision: Precision::F32,
        argv: vec![binary.into()],
        mode: "f32",
        warm_up: 1,
    }])
}

fn torch(root: &Path, args: &Args) -> Result<Vec<Program>> {
    let python = match &args.python {
        Some(python) => python.clone(),
        None => venv(root)?,
    };
    torch_version(&python)?;
    let program = |mode, precision, warm_up| Program {
        name: format!("torch-{mode}"),
        family: Family::Torch,
        precision,
        argv: [vec![python.clone().into(), root.join("bench/torch_step.py").into()], asked(args)].concat(),
        mode,
        warm_up,
    };
    Ok(vec![
        program("eager-f32", Precision::F32, 1),
        program("eager-bf16", Precision::Bf16, 1),
        program("compiled-f32", Precision::F32, LONGEST_WARM_UP),
        program("compiled-bf16", Precision::Bf16, LONGEST_WARM_UP),
    ])
}

/// The interpreter of bench/.venv.
pub fn venv_python(root: &Path) -> PathBuf {
    root.join("bench/.venv/bin/python")
}

/// Makes bench/.venv with the pinned torch unless it is there.
fn venv(root: &Path) -> Result<PathBuf> {
    let python = venv_python(root);
    if torch_version(&python).is_ok_and(|version| version.split('+').next() == Some(TORCH)) {
        return Ok(python);
    }
    let folder = root.join("bench/.venv");
    capture(Command::new("python3").args(["-m", "venv"]).arg(folder)).context("making bench/.venv")?;
    let wanted = format!("torch=={TORCH}");
    let mut pip = Command::new(&python);
    pip.args(["-m", "pip", "install", "--disable-pip-version-check", &wanted]);
    capture(&mut pip).with_context(|| format!("pip install {wanted}"))?;
    Ok(python)
}

/// The version of torch that an interpreter imports.
pub fn torch_version(python: &Path) -> Result<String> {
    let mut command = Command::new(python);
    command.args(["-c", "import torch; print(torch.__version__)"]);
    let printed =
        capture(&mut command).with_context(|| format!("importing torch in {}", python.display()))?;
    Ok(printed.trim().to_string())
}

/// Builds in release mode and returns the executable of `target`, wherever cargo put it.
pub fn cargo_build(folder: &Path, extra: &[&str], target: &str) -> Result<PathBuf> {
    let mut cargo = Command::new("cargo");
    cargo.args(["build", "--release", "--message-format=json-render-diagnostics"]).args(extra);
    let messages = capture(cargo.current_dir(folder)).with_context(|| format!("building {target}"))?;
    let executable = messages.lines().rev().find_map(|line| {
        let message: serde_json::Value = serde_json::from_str(line).ok()?;
        let is_it = message["target"]["name"] == target;
        is_it.then(|| message["executable"].as_str().map(PathBuf::from)).flatten()
    });
    executable.with_context(|| format!("cargo built no executable named {target}"))
}

/// Runs to the end and returns stdout; an error holds the end of stderr.
pub fn capture(command: &mut Command) -> Result<String> {
    let program = command.get_program().to_string_lossy().into_owned();
    let output = command.output().with_context(|| format!("starting {program}"))?;
    if !output.status.success() {
        bail!("{}\n{}", output.status, tail(&String::from_utf8_lossy(&output.stderr)));
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// The last lines of a log, enough to hold an error and its cause.
fn tail(text: &str) -> String {
    const LINES: usize = 12;
    let lines: Vec<&str> = text.lines().filter(|line| !line.trim().is_empty()).collect();
    lines[lines.len().saturating_sub(LINES)..].join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failed_program_tells_its_last_words() {
        let mut failing = Command::new("sh");
        failing.args(["-c", "seq 1 20 >&2; echo the cause >&2; exit 3"]);
        let error = format!("{:#}", capture(&mut failing).expect_err("exit 3"));
        assert!(error.starts_with("exit status: 3\n10\n11\n"), "{error}");
        assert!(error.ends_with("20\nthe cause"), "{error}");
    }
}
