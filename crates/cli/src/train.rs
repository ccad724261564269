//! `trilith train`: the bar, the samples, the signals around the loop.

use crate::budget;
use crate::launch::{self, Run, Seat, Way};
use crate::outcome::Outcome;
use crate::show;
use crate::stages;
use crate::traffic::Traffic;
use ::train::{
    Begin, BudgetChange, Lost, MOST_RECOVERIES, Prepared, Progress, Recipe, Recovery, Settings, Stage, Start,
};
use ::train::{Predicted, StepMetrics, TrainError, Trainer};
use anyhow::{Context, Result, anyhow};
use device::Device;
use dist::Parts;
use indicatif::ProgressBar;
use infer::{Generation, Sampling, Session};
use memory::Tier;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// Where standard error is no terminal, a line is written at most this often.
const LINE_EVERY: Duration = Duration::from_secs(10);

#[derive(clap::Args)]
#[command(
    after_help = "Examples:\n  trilith train recipes/shakespeare.toml\n  trilith train recipes/shakespeare.toml --dry-run\n  trilith train recipes/shakespeare.toml --set train.steps=50 --set run.dir=runs/try\n  trilith train recipes/shakespeare.toml --resume\n  trilith train recipes/shakespeare.toml --set mesh.x=2 --processes --restart 3\n\nSIGTERM or Ctrl-C saves the state and exits with code 75: run the same command with --resume."
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
    /// Ranks to start, as threads of this process; they are the places of the recipe's mesh. With mesh = "auto"
    /// the mesh is chosen for them (absent: cluster.devices)
    #[arg(long, value_name = "N")]
    ranks: Option<usize>,
    /// Start the ranks as processes of this machine and look after them
    #[arg(long)]
    processes: bool,
    /// When a rank dies, hangs or fails, go on from the newest state, at most so many times
    #[arg(long, value_name = "TIMES", default_value_t = 0)]
    restart: usize,
    /// Mesh to go on with after a rank was lost, as in --fallback dp=1,x=2
    #[arg(long, value_name = "MESH", requires = "restart")]
    fallback: Option<dist::MeshShape>,
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
    let start = match (args.resume, args.overwrite) {
        (true, _) => Start::Resume,
        (_, true) => Start::Overwrite,
        _ => Start::New,
    };
    let way = Way::find(args.processes)?;
    way.choose_card();
    let run = Run::new(path, &args.set, start)?.chosen(args.ranks, &way)?;
    let run = run.restarted(args.restart, args.fallback)?;
    if let Some(ranks) = args.ranks.filter(|ranks| *ranks != run.recipe.mesh.shape.world_size()) {
        let (mesh, places) = (run.recipe.mesh.shape, run.recipe.mesh.shape.world_size());
        return Err(anyhow!(
            "--ranks {ranks}: mesh `{mesh}` has {places} places; change --ranks or the mesh"
        ));
    }
    let stop = stop_flag().context("cannot listen for signals")?;
    match way {
        way if args.dry_run || matches!(way, Way::Threads) => threads(&run, args.dry_run, &stop),
        Way::Processes => launch::processes(&run, &stop),
        way => launch::one_rank(&run, way, &stop),
    }
}

/// All ranks in this process.
fn threads(run: &Run, dry_run: bool, stop: &AtomicBool) -> Result<ExitCode> {
    let recipe = &run.recipe;
    let threads = if recipe.run.threads == 0 { device::cores() } else { recipe.run.threads };
    let pool = device::Threads::new(threads).map_err(|_| ::train::TrainError::Threads { count: threads })?;
    // The loop that feeds the kernels runs inside the pool.
    if dry_run {
        pool.run(|| -> Result<()> {
            let (prepared, peak) = (prepare(recipe, run.start == Start::Resume)?, peak(recipe));
            print!("{}", plan(recipe, &prepared, &Seat::alone(), peak));
            Ok(())
        })?;
        return Ok(ExitCode::SUCCESS);
    }
    let begin = pool.run(|| cook(recipe, &run.settings, run.start, &Seat::alone()))?;
    launch::threads(&pool, run, begin, stop)
}

/// Set by SIGTERM or SIGINT, and by SIGUSR1, which launchers of MPI pass on; a second one ends the
/// process at once.
fn stop_flag() -> Result<Arc<AtomicBool>> {
    use signal_hook::consts::{SIGINT, SIGTERM, SIGUSR1};
    let flag = Arc::new(AtomicBool::new(false));
    for signal in [SIGTERM, SIGINT, SIGUSR1] {
        signal_hook::flag::register_conditional_shutdown(signal, 128 + signal, flag.clone())?;
        signal_hook::flag::register(signal, flag.clone())?;
    }
    Ok(flag)
}

/// Everything up to the first step, on the rank that `seat` is.
pub fn cook(recipe: &Recipe, settings: &Settings, start: Start, seat: &Seat) -> Result<Begin> {
    let resume = start == Start::Resume;
    let (resolved, recipe) = (settings.resolved(), recipe.clone());
    if seat.rank > 0 {
        let prepared = Arc::new(Prepared::new(&recipe, resume, &mut |_| {})?);
        return Ok(Begin { recipe, resolved, prepared, start, peak_gflops: 1.0 });
    }
    let prepared = prepare(&recipe, resume)?;
    prepared.check_memory(&recipe, seat.on_card(&recipe))?;
    // Ranks that are processes have equal shares of their machines.
    let sharing = if recipe.train.device == Device::Cuda { seat.on_card(&recipe).min(seat.ranks) } else { 1 };
    let peak_gflops = peak(&recipe) * seat.ranks as f64 / sharing as f64;
    eprint!("{}", headline(&recipe, &prepared, seat, peak_gflops));
    Ok(Begin { recipe, resolved, prepared: Arc::new(prepared), start, peak_gflops })
}

/// Measured, of the pool this runs in.
fn peak(recipe: &Recipe) -> f64 {
    kernels::peak::gflops(recipe.train.device, recipe.train.dtype)
}

/// One rank's run; the first one has the screen. `began` is told when the run is set up. Whether
/// every step is done. `predicted`: where the mesh was chosen by it.
pub fn rank(
    mesh: &dist::Mesh,
    begin: Begin,
    predicted: Option<Predicted>,
    (stop, began): (&AtomicBool, &dyn Fn()),
) -> Result<bool> {
    let mut outcome = predicted.or_else(|| predict(&begin)).map(Outcome::of);
    let mut trainer = Trainer::on(mesh, begin.clone())?;
    if mesh.rank() > 0 {
        while let Some(progress) = trainer.advance()? {
            if let Progress::Ended { complete, .. } = progress {
                return Ok(complete);
            }
        }
        return Err(anyhow!("the run ended without saying so"));
    }
    began();
    if let Some(outcome) = &outcome {
        trainer.foretell(&outcome.predicted)?;
    }
    let mut recovery = Recovery::default();
    loop {
        for (path, why) in &trainer.skipped_states {
            eprintln!("warning: passed over {}: {why}", path.display());
        }
        if trainer.step() > 0 {
            eprintln!("  resumed at step {}\n", trainer.step());
        }
        let error = match drive(&mut trainer, stop, outcome.as_mut()) {
            Ok(complete) => return Ok(complete),
            Err(error) => error.downcast::<TrainError>()?,
        };
        let lost = recovery.after(error, &trainer)?;
        eprintln!("{}", says(&lost));
        // The offload file and the lock of the folder go before they are taken again.
        drop(trainer);
        trainer = Trainer::on(mesh, Begin { start: Start::Resume, ..begin.clone() })?;
    }
}

fn says(lost: &Lost) -> String {
    format!(
        "warning: {lost}: setting up again from the newest state ({} of at most {MOST_RECOVERIES} times in a row)",
        lost.nth
    )
}

fn prepare(recipe: &Recipe, resume: bool) -> Result<Prepared> {
    let bar = show::bar(0, "{msg} {bar:30} {bytes}/{total_bytes}");
    if recipe.train.device == Device::Cuda {
        bar.set_message("compiling the kernels for this GPU (the first time)");
        kernels::cuda::load().map_err(anyhow::Error::msg)?;
    }
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
fn drive(trainer: &mut Trainer, stop: &AtomicBool, outcome: Option<&mut Outcome>) -> Result<bool> {
    let steps = trainer.recipe().train.steps;
    let bar = show::bar(steps, "{bar:14} {pos}/{len} {msg} {eta} left");
    bar.set_position(trainer.step());
    bar.reset_eta();
    let (started, first, device) = (Instant::now(), trainer.step(), trainer.recipe().train.device);
    let mut screen =
        Screen { bar, steps, started, first, said: None, traffic: Traffic::default(), device, outcome };
    let mut told = false;
    while let Some(progress) = trainer.advance()? {
        match progress {
            Progress::Step(metrics) => screen.step(&metrics),
            Progress::Validated { step, loss, .. } => screen
                .line(&format!("step {step:>6}  validation loss {loss:.4}  perplexity {:.2}", loss.exp())),
            Progress::SampleDue { step } => {
                let text = sample(trainer).unwrap_or_else(|error| format!("no sample: {error}"));
                screen.line(&format!("step {step:>6}  it says:\n{}\n", indent(&text)));
            }
            Progress::Budget { step, change } => screen.budget(step, &change),
            Progress::Saved { .. } => {}
            Progress::Ended { step, complete } => {
                screen.bar.finish_and_clear();
                if let Some(outcome) = &screen.outcome {
                    eprint!("{outcome}");
                }
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
        if !told && stop.load(Ordering::Relaxed) {
            screen.line("saving before the end");
            trainer.stop();
            told = true;
        }
    }
    Err(anyhow!("the run ended without saying so"))
}

/// What is predicted of the steps to come; measures before the run takes its memory. Ranks that share
/// the cores get no prediction.
fn predict(begin: &Begin) -> Option<Predicted> {
    let Begin { recipe, prepared, peak_gflops, .. } = begin;
    (recipe.mesh.shape.world_size() == 1).then(|| prepared.predict(recipe, *peak_gflops))
}

struct Screen<'a> {
    bar: ProgressBar,
    steps: u64,
    started: Instant,
    first: u64,
    said: Option<Instant>,
    traffic: Traffic,
    /// Where ops compute.
    device: Device,
    outcome: Option<&'a mut Outcome>,
}

impl Screen<'_> {
    fn step(&mut self, m: &StepMetrics) {
        self.traffic.add(m);
        if let Some(outcome) = &mut self.outcome {
            outcome.add(m);
        }
        let memory = match self.device {
            Device::Cpu => device::resident_bytes().map_or(0, |(now, _)| now),
            Device::Cuda => device::memory_use_of(Device::Cuda).live_bytes,
        };
        let memory = show::bytes(memory as u64);
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

    fn budget(&mut self, step: u64, BudgetChange { budgets, refused }: &BudgetChange) {
        if let Some(why) = refused {
            return self.line(&format!("warning: step {step}: {why}"));
        }
        self.line(&format!("step {step:>6}  from here on {}", budget::named(budgets, self.device)));
        if let Some(outcome) = &mut self.outcome {
            outcome.may_hold([budgets.hbm, budgets.dram].into_iter().flatten().sum());
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
    let mut session = Session::new(&config, store, context)?;
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

/// Where ops run.
fn computes_on(recipe: &Recipe, seat: &Seat, threads: usize) -> String {
    let threads = format!("{threads} threads");
    if recipe.train.device == Device::Cpu {
        return threads;
    }
    let ranks = match seat.on_card(recipe) {
        1 => String::new(),
        ranks => format!(", {ranks} ranks on one GPU"),
    };
    device::cuda::gpu().map_or(threads.clone(), |gpu| format!("{} beside {threads}{ranks}", gpu.card().name))
}

fn headline(recipe: &Recipe, prepared: &Prepared, seat: &Seat, peak: f64) -> String {
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
    let threads = device::num_threads() * seat.ranks;
    let epochs = (train.steps * estimate.step_tokens as u64) as f64 / tokens as f64;
    let rerun = prepared.rerun.as_ref().map_or(String::new(), |rerun| format!("; {rerun}"));
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
        ("machine", format!("{}, {peak:.0} GFLOP/s measured peak", computes_on(recipe, seat, threads))),
        ("mesh", mesh_line(&recipe.mesh, seat)),
        ("memory", memory(recipe, prepared) + &rerun),
    ]) + "\n"
}

/// The mesh and how products are spread over it.
fn mesh_line(mesh: &::train::recipe::MeshRecipe, seat: &Seat) -> String {
    let ranks = mesh.shape.world_size();
    if ranks == 1 {
        return "one rank".into();
    }
    let scheme = match (mesh.scheme, mesh.parts == Parts::default()) {
        (None, true) => "by the axes".to_string(),
        _ => mesh.parts.named(mesh.scheme()),
    };
    let staged = mesh.shape.size(dist::Axis::Pp) > 1;
    let stages = if staged { format!(", stages {}", mesh.schedule) } else { String::new() };
    format!("{}: {ranks} ranks as {}, products {scheme}{stages}", mesh.shape, seat.carrier)
}

fn memory(recipe: &Recipe, prepared: &Prepared) -> String {
    let predicted = show::bytes(prepared.estimate(recipe).total_bytes());
    match prepared.tiers(recipe) {
        None => format!("{predicted} predicted"),
        Some(tiers) => {
            let budget =
                |tier| tiers.budgets.of(tier).map(|bytes| format!("{} of {tier}", show::bytes(bytes)));
            let within: Vec<_> = [Tier::Hbm, Tier::Dram].into_iter().filter_map(budget).collect();
            let rest = tiers.budgets.nvme.map(|_| format!("; the rest in {}", tiers.dir.display()));
            format!("{predicted} predicted, within {}{}", within.join(" and "), rest.unwrap_or_default())
        }
    }
}

/// The answer to --dry-run.
fn plan(recipe: &Recipe, prepared: &Prepared, seat: &Seat, peak: f64) -> String {
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
    let verdict = match prepared.check_memory(recipe, seat.on_card(recipe)) {
        Ok(()) => "It fits.".to_string(),
        Err(error) => format!("It does not fit: {error}"),
    };
    let stages = stages::timeline(recipe);
    format!("{table}\n\n{}{stages}{facts}\n{verdict}\n", headline(recipe, prepared, seat, peak))
}
