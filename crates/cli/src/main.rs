//! The trilith command line: parse, validate, one `match`. The only place with exit codes.
#![forbid(unsafe_code)]

mod auto;
mod bench_step;
mod budget;
mod chat;
mod doctor;
mod eval;
mod inspect;
mod launch;
mod on;
mod outcome;
mod plan;
mod plan_memory;
mod show;
mod stages;
mod tokenizer;
mod traffic;
mod train;

use clap::{Parser, Subcommand};
use std::process::ExitCode;

/// Exit code of a run that saved its state because it was told to stop: start it again with
/// --resume. It is EX_TEMPFAIL of sysexits.h, which Slurm and systemd can be told to requeue on.
pub const EXIT_AGAIN: u8 = 75;

/// Exit code of a rank whose run ended because a rank was lost or failed on the way: whoever started
/// it may start the run again. It is EX_SOFTWARE of sysexits.h.
pub const EXIT_LOST: u8 = 70;

#[derive(Parser)]
#[command(
    name = "trilith",
    version,
    about = "Train, evaluate and talk to language models on the machine you have",
    after_help = "Begin here:\n  trilith train recipes/shakespeare.toml   train a small model on the plays, in minutes\n  trilith chat runs/shakespeare            let it speak\n  trilith doctor                           what this machine has and what is missing\n  trilith plan recipes/gpt3-175b.toml --devices 10000   what a run nobody here can start would take\n\nEvery command explains itself: trilith train --help"
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Train or fine-tune a model from a recipe
    Train(train::Args),
    /// Talk to a model, or let it continue one prompt
    Chat(chat::Args),
    /// Give a run other budgets of memory while it goes on
    Budget(budget::Args),
    /// Measure the perplexity of a model on a file
    Eval(eval::Args),
    /// Train a tokenizer, or see what one does with a text
    Tokenizer(tokenizer::Args),
    /// Say where every byte of a run would lie, who would talk to whom, and how long a step takes
    Plan(plan::Args),
    /// Show what a model folder, a weight file or a run holds
    Inspect(inspect::Args),
    /// Show what this machine has, what is missing and the remedy
    Doctor(doctor::Args),
    /// Time training steps of a bench configuration, one JSON line each
    #[command(hide = true)]
    BenchStep(bench_step::Args),
}

fn main() -> ExitCode {
    on::keep_kernels();
    let done = match Cli::parse().command {
        Command::Train(args) => train::run(args),
        Command::Chat(args) => chat::run(args),
        Command::Budget(args) => budget::run(args),
        Command::Eval(args) => eval::run(args),
        Command::Tokenizer(args) => tokenizer::run(args),
        Command::Plan(args) => plan::run(args),
        Command::Inspect(args) => inspect::run(args),
        Command::Doctor(args) => doctor::run(args),
        Command::BenchStep(args) => bench_step::run(args),
    };
    done.unwrap_or_else(|error| {
        // A reader that went away (`| head`) is no failure to tell anyone about.
        if show::is_broken_pipe(&error) {
            return ExitCode::SUCCESS;
        }
        eprintln!("error: {}", show::causes(&error));
        ExitCode::FAILURE
    })
}
