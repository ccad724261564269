//! Chores of the repository: `cargo xtask tidy`, `cargo xtask bench`.
//!
//! Works on files and processes only; knows nothing of what the crates compute.

#![forbid(unsafe_code)]

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Parser, Subcommand};

mod bench;
mod tidy;

/// Chores of the Trilith repository.
#[derive(Parser)]
#[command(name = "cargo xtask")]
struct Cli {
    #[command(subcommand)]
    chore: Chore,
}

#[derive(Subcommand)]
enum Chore {
    /// Check the rules that no compiler checks: crate levels, sizes, links.
    Tidy(tidy::Args),
    /// Measure against other implementations on this machine.
    Bench {
        #[command(subcommand)]
        bench: Bench,
    },
}

#[derive(Subcommand)]
enum Bench {
    /// One training step, ours against PyTorch, candle and burn.
    Train(bench::Args),
    /// Steps on meshes of ranks of this machine, predicted and then measured.
    Mesh(bench::mesh::Args),
    /// Collectives of ranks on one machine, ours against OpenMPI, MPICH and gloo.
    Comm(bench::comm::Args),
    /// Training over tiers, by plan and rule, and PyTorch under the same limit.
    Memory(bench::memory::Args),
}

fn main() -> ExitCode {
    let done = match Cli::parse().chore {
        Chore::Tidy(args) => tidy::run(&root(), &args),
        Chore::Bench { bench: Bench::Train(args) } => bench::run(&root(), &args).map(|()| true),
        Chore::Bench { bench: Bench::Mesh(args) } => bench::mesh::run(&root(), &args).map(|()| true),
        Chore::Bench { bench: Bench::Comm(args) } => bench::comm::run(&root(), &args).map(|()| true),
        Chore::Bench { bench: Bench::Memory(args) } => bench::memory::run(&root(), &args).map(|()| true),
    };
    match done {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// The repository's folder.
fn root() -> PathBuf {
    // Where it was built; elsewhere, the folder it is run in.
    let built = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("xtask lies in the repository");
    if built.is_dir() { built.to_path_buf() } else { PathBuf::from(".") }
}
