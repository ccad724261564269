//! `trilith train`: the bar, the samples, the signals around the loop.

use crate::traffic::Traffic;
use crate::{EXIT_AGAIN, show, stages};
use ::train::{Begin, Prepared, Progress, Recipe, Settings, Stage, Start, StepMetrics, Trainer};
use anyhow::{Context, Result, anyhow};
use indicatif::ProgressBar;
use infer::{Generation, Sampling, Session};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// Where standard error is no terminal, a line is written at most this often.
const LINE_EVERY: Duration = Duration::from_secs(10);

#[derive(clap::Args)]
#[command(
    after_help = "Examples:\n  trilith train recipes/shakespeare.toml\n  trilith train recipes/shakespeare.toml --dry-run\n  trilith train recipes/shakespeare.toml --set train.steps=50 --set run.dir=runs/try\n  trilith train recipes/shakespeare.toml --resume\n\nSIGTERM or Ctrl-C saves the state and exits with code 75: run the same command with --resume."
)]
pub struct Args {
    /// Recipe: a TOML file
    #[arg(required_unless_present = "keys")]
    recipe: Option<PathBuf>,
    /// Override a key of the recipe, as in --set train.lr=3e-4; may be repeated
    #[arg(long = "set", value_name = "KEY=VALUE")]
    set: Vec<String>,
    /// Go on with the newest whole state in run.dir; begin when there is none
    #[arg(long, conflicts_with = "overwrite")]
    resume: bool,
    /// Throw away the run that is in run.dir
    #[arg(long)]
    overwrite: bool,
    /// Ranks to start as threads of this process; they are the places of the recipe's mesh
    #[arg(long, value_name = "N")]
    ranks: Option<usize>,
    /// Show shapes, parameters, memory, FLOPs and predicted time without training
    #[arg(long)]
    dry_run: bool,
    /// List every key a recipe may hold, with unit, default and meaning
    #[arg(long)]
    keys: bool,
}

pub fn run(args: Args) -> Result<ExitCode> {
    let Some(path) = args.recipe.as_ref().filter(|_| !args.keys) else {
        print!("{}", ::train::recipe::keys::markdown());
        return Ok(ExitCode::SUCCESS);
    };
    let mut settings = Settings::read(path)?;
    for argument in &args.set {
        settings.set(argument)?;
    }
    let recipe = settings.recipe()?;
    if let Some(ranks) = args.ranks.filter(|ranks| *ranks != recipe.mesh.shape.world_size()) {
        let (mesh, places) = (recipe.mesh.shape, recipe.mesh.shape.world_size());
        return Err(anyhow!(
            "--ranks {ranks}: mesh `{mesh}` has {places} places; change --ranks or the mesh"
        ));
    }
    let threads = if recipe.run.threads == 0 { device::cores() } else { recipe.run.threads };
    let pool = device::Threads::new(threads).map_err(|_| ::train::TrainError::Threads { count: threads })?;
    let stop = stop_flag().context("cannot listen for signals")?;
    // The loop that feeds the kernels runs inside the pool.
    match pool.run(|| cook(&args, recipe, &settings, threads))? {
        None => Ok(ExitCode::SUCCESS),
        Some(begin) => start(&pool, begin, &stop),
    }
}

/// Set by SIGTERM or SIGINT; a second one ends the process at once.
fn stop_flag() -> Result<Arc<AtomicBool>> {
    let flag = Arc::new(AtomicBool::new(false));
    for signal in [signal_hook::consts::SIGTERM, signal_hook::consts::SIGINT] {
        signal_hook::flag::register_conditional_shutdown(signal, 128 + signal, flag.clone())?;
        signal_hook::flag::register(signal, flag.clone())?;
    }
    Ok(flag)
}

/// Everything up to the first step; nothing when only a plan was asked for.
fn cook(args: &Args, recipe: Recipe, settings: &Settings, threads: usize) -> Result<Option<Begin>> {
    let prepared = prepare(&recipe, args.resume)?;
    let peak = match recipe.train.dtype {
        device::DType::F32 => kernels::peak::gflops_f32(),
        _ => kernels::peak::gflops_bf16(),
    };
    if args.dry_run {
        print!("{}", plan(&recipe, &prepared, threads, peak));
        return Ok(None);
    }
    prepared.check_memory(&recipe)?;
    eprint!("{}", headline(&recipe, &prepared, threads, peak));
    let start = match (args.resume, args.overwrite) {
        (true, _) => Start::Resume,
        (_, true) => Start::Overwrite,
        _ => Start::New,
    };
    let (resolved, prepared, peak_gflops) = (settings.resolved(), Arc::new(prepared), peak);
    Ok(Some(Begin { recipe, resolved, prepared, start, peak_gflops }))
}

/// The loop on one rank, in `pool`, or on every rank of the mesh, each with its share of the cores.
fn start(pool: &device::Threads, begin: Begin, stop: &AtomicBool) -> Result<ExitCode> {
    let shape = begin.recipe.mesh.shape;
    let complete = match shape.world_size() {
        1 => pool.run(|| rank(&dist::Mesh::solo(), begin, stop))?,
        _ => {
            let options = dist::Options::default();
            let ends = dist::launch(&shape, &options, |mesh| rank(mesh, begin.clone(), stop));
            ends.map_err(|failure| anyhow!("{failure:#}"))?.contains(&true)
        }
    };
    if complete {
        return Ok(ExitCode::SUCCESS);
    }
    eprintln!("stopped: the state is saved; run the same command with --resume to go on");
    Ok(ExitCode::from(EXIT_AGAIN))
}

/// One rank's run; the first one has the screen. Whether every step is done.
fn rank(mesh: &dist::Mesh, begin: Begin, stop: &AtomicBool) -> Result<bool> {
    let mut trainer = Trainer::on(mesh, begin)?;
    if mesh.rank() > 0 {
        while let Some(progress) = trainer.advance()? {
            if let Progress::Ended { complete, .. } = progress {
                return Ok(complete);
            }
        }
        return Err(anyhow!("the run ended without saying so"));
    }
    for (path, why) in &trainer.skipped_states {
        eprintln!("warning: passed over {}: {why}", path.display());
    }
    if trainer.step() > 0 {
        eprintln!("  resumed at step {}\n", trainer.step());
    }
    drive(&mut trainer, stop)
}

fn prepare(recipe: &Recipe, resume: bool) -> Result<Prepared> {
    let bar = show::bar(0, "{msg} {bar:30} {bytes}/{total_bytes}");
    let prepared = Prepared::new(recipe, resume, &mut |stage| match stage {
        Stage::TrainTokenizer => bar.set_message("training a tokenizer"),
        Stage::Tokenize { done, total } => {
            bar.set_message("tokenizing");
            bar.set_length(total);
            bar.set_position(done);
        }
    });
    bar.finish_and_clear();
    Ok(prepared?)
}

/// Advance to the end or to a signal; whether every step is done.
fn drive(trainer: &mut Trainer, stop: &AtomicBool) -> Result<bool> {
    let steps = trainer.recipe().train.steps;
    let bar = show::bar(steps, "{bar:14} {pos}/{len} {msg} {eta} left");
    bar.set_position(trainer.step());
    bar.reset_eta();
    let (started, first) = (Instant::now(), trainer.step());
    let mut screen = Screen { bar, steps, started, first, said: None, traffic: Traffic::default() };
    while let Some(progress) = trainer.advance()? {
        match progress {
            Progress::Step(metrics) => screen.step(&metrics),
            Progress::Validated { step, loss, .. } => screen
                .line(&format!("step {step:>6}  validation loss {loss:.4}  perplexity {:.2}", loss.exp())),
            Progress::SampleDue { step } => {
                let text = sample(trainer).unwrap_or_else(|error| format!("no sample: {error}"));
                screen.line(&format!("step {step:>6}  it says:\n{}\n", indent(&text)));
            }
            Progress::Saved { .. } => {}
            Progress::Ended { step, complete } => {
                screen.bar.finish_and_clear();
                eprint!("{}", screen.traffic);
                let dir = trainer.folder().display();
                let took = show::duration(screen.started.elapsed().as_secs_f64());
                eprintln!("{step} steps in {took}; model, state and metrics are in {dir}");
                if complete {
                    eprintln!("talk to it: trilith chat {dir}");
                }
                return Ok(complete);
            }
        }
        if stop.load(Ordering::Relaxed) {
            screen.line("saving before the end");
            trainer.stop();
        }
    }
    Err(anyhow!("the run ended without saying so"))
}

struct Screen {
    bar: ProgressBar,
    steps: u64,
    started: Instant,
    first: u64,
    said: Option<Instant>,
    traffic: Traffic,
}

impl Screen {
    fn step(&mut self, m: &StepMetrics) {
        self.traffic.add(m);
        let memory = device::resident_bytes().map_or(String::new(), |(now, _)| show::bytes(now as u64));
        let experts = m.balance.map_or(String::new(), |balance| {
            format!("  balance {:.3}, fullest expert {:.2} x mean", balance.loss, balance.imbalance)
        });
        let message = format!(
            "loss {:.4}{experts}  {} tok/s  MFU {:.0} %  {memory} ",
            m.loss,
            show::count(m.tokens_per_s),
            100.0 * m.mfu
        );
        if !m.applied {
            self.line(&format!(
                "step {:>6}  skipped: loss {} and gradient norm {} must be finite; nothing was changed",
                m.step, m.loss, m.grad_norm
            ));
        }
        self.bar.set_position(m.step);
        self.bar.set_message(message.clone());
        let due = m.step == self.steps || self.said.is_none_or(|said| said.elapsed() >= LINE_EVERY);
        if self.bar.is_hidden() && due {
            self.said = Some(Instant::now());
            let done = (m.step - self.first).max(1) as f64;
            let left = self.started.elapsed().as_secs_f64() / done * (self.steps - m.step) as f64;
            eprintln!("step {:>6}/{}  {message} {} left", m.step, self.steps, show::duration(left));
        }
    }

    fn line(&self, text: &str) {
        if self.bar.is_hidden() {
            eprintln!("{text}");
        } else {
            self.bar.println(text);
        }
    }
}

/// What the model says now.
fn sample(trainer: &mut Trainer) -> Result<String> {
    let wanted = trainer.recipe().sample.clone();
    let context = trainer.recipe().train.context;
    let (config, tokenizer) = (trainer.prepared.config.clone(), trainer.prepared.tokenizer.clone());
    let mut prompt = tokenizer.encode_prompt(&wanted.prompt)?;
    if prompt.is_empty() {
        // Every document follows the end of another: that is how a model begins by itself.
        prompt.extend(tokenizer.end_of_text());
    }
    let sampling = Sampling {
        temperature: wanted.temperature,
        top_p: wanted.top_p,
        top_k: 0,
        seed: trainer.recipe().run.seed ^ trainer.step(),
    };
    let (model, store) = trainer.parts();
    let mut session = Session::new(&config, store.dtype(), context)?;
    let given = prompt.len();
    let stop = tokenizer.eos_ids();
    let mut generation =
        Generation::new((model, store, &mut session), &prompt, sampling, stop, wanted.tokens)?;
    while generation.next_token()?.is_some() {}
    let said = tokenizer.decode(&generation.ids()[given..], true)?;
    Ok(format!("{}{said}", wanted.prompt))
}

fn indent(text: &str) -> String {
    text.trim_end().lines().map(|line| format!("    {line}")).collect::<Vec<_>>().join("\n")
}

fn headline(recipe: &Recipe, prepared: &Prepared, threads: usize, peak: f64) -> String {
    let estimate = prepared.estimate(recipe);
    let (n, k, h) = prepared.config.heads();
    let active = match prepared.config.idle_params() {
        0 => String::new(),
        idle => format!(", {} of them for a token", show::count((estimate.params - idle) as f64)),
    };
    let shape = format!(
        "{} {} layers, width {}, {n} heads ({k} kv) of {h}, vocabulary {}: {} parameters{active}",
        prepared.config.family(),
        prepared.config.layers(),
        prepared.config.width(),
        prepared.config.vocab(),
        show::count(estimate.params as f64)
    );
    let train = &recipe.train;
    let tokens = prepared.train.len();
    let epochs = (train.steps * estimate.step_tokens as u64) as f64 / tokens as f64;
    show::facts(&[
        ("model", shape),
        (
            "data",
            format!(
                "{} tokens in {} documents; {epochs:.1} epochs",
                show::count(tokens as f64),
                prepared.train.documents()
            ),
        ),
        (
            "step",
            format!(
                "{} x {} rows of {} tokens, {}, {}",
                train.accumulate,
                train.batch,
                train.context,
                train.dtype,
                show::flops(estimate.step_flops)
            ),
        ),
        ("machine", format!("{threads} threads, {peak:.0} GFLOP/s measured peak")),
        ("mesh", mesh_line(&recipe.mesh)),
        ("memory", memory(recipe, prepared)),
    ]) + "\n"
}

/// The mesh and how products are spread over it.
fn mesh_line(mesh: &::train::recipe::MeshRecipe) -> String {
    let ranks = mesh.shape.world_size();
    if ranks == 1 {
        return "one rank".into();
    }
    let scheme = mesh.scheme.map_or("by the axes", |scheme| scheme.name());
    let staged = mesh.shape.size(dist::Axis::Pp) > 1;
    let stages = if staged { format!(", stages {}", mesh.schedule) } else { String::new() };
    format!("{}: {ranks} ranks as threads, products {scheme}{stages}", mesh.shape)
}

fn memory(recipe: &Recipe, prepared: &Prepared) -> String {
    let predicted = show::bytes(prepared.estimate(recipe).total_bytes());
    match prepared.tiers(recipe) {
        None => format!("{predicted} predicted"),
        Some(tiers) => format!(
            "{predicted} predicted, within {} of DRAM; the rest in {}",
            show::bytes(tiers.dram_bytes),
            tiers.dir.display()
        ),
    }
}

/// The answer to --dry-run.
fn plan(recipe: &Recipe, prepared: &Prepared, threads: usize, peak: f64) -> String {
    let estimate = prepared.estimate(recipe);
    let specs = prepared.params.specs();
    let rows = specs
        .iter()
        .filter(|spec| !spec.name.starts_with("layers.") || spec.name.starts_with("layers.0."))
        .map(|spec| {
            let each = if spec.name.starts_with("layers.0.") {
                format!("x {} layers", prepared.config.layers())
            } else {
                String::new()
            };
            let decay = if spec.decay { "yes" } else { "" };
            vec![
                spec.name.clone(),
                format!("{:?}", spec.shape),
                show::count(spec.len() as f64),
                each,
                decay.into(),
            ]
        })
        .collect();
    let table = show::table(&["parameter", "shape", "elements", "", "decay"], rows, &[2]);
    let seconds = estimate.step_seconds(peak);
    let available = device::available_bytes().map_or("unknown".into(), |free| show::bytes(free as u64));
    let facts = show::facts(&[
        ("weights, masters, gradients, moments", show::bytes(estimate.state_bytes)),
        ("activations and scratch", show::bytes(estimate.activation_bytes)),
        ("copy for background saves", show::bytes(estimate.snapshot_bytes)),
        ("memory, predicted", format!("{} of {available} available", show::bytes(estimate.total_bytes()))),
        ("time per step, predicted", show::duration(seconds)),
        ("whole run, predicted", show::duration(seconds * recipe.train.steps as f64)),
    ]);
    let verdict = match prepared.check_memory(recipe) {
        Ok(()) => "It fits.".to_string(),
        Err(error) => format!("It does not fit: {error}"),
    };
    let stages = stages::timeline(recipe);
    format!("{table}\n\n{}{stages}{facts}\n{verdict}\n", headline(recipe, prepared, threads, peak))
}
