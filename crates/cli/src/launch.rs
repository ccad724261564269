//! How the ranks of a run come to be (threads of this process, processes it looks after, or what `mpirun`
//! started), and how a run goes on that has lost one. Knows nothing of what a rank does.

use crate::auto::Ranking;
use crate::train::{cook, rank};
use crate::{EXIT_AGAIN, EXIT_LOST};
use ::train::{Begin, Predicted, Recipe, Settings, Start, TrainError};
use anyhow::{Context, Result, anyhow};
use device::Device;
use dist::{Axis, CommError, Communicator, Ends, Failure, Mesh, MeshShape, Nccl, Process, Supervision};
use std::cell::Cell;
use std::os::unix::process::CommandExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::time::Duration;
use tensor::Fault;

/// Processes meet within this time, however short the deadline of their calls: a busy machine may
/// take its time to start them.
const MEETING: Duration = Duration::from_secs(30);
/// How long a rank that computes may take to notice that its run has failed, before it is ended.
const COURTESY: Duration = Duration::from_millis(1500);
/// What the first rank tells its supervisor when the run is set up.
const BEGAN: &str = "began";

/// A run as it was asked for.
pub struct Run {
    file: PathBuf,
    sets: Vec<String>,
    pub settings: Settings,
    pub recipe: Recipe,
    pub start: Start,
    restarts: usize,
    /// What it goes on with after a loss, if with something else.
    fallback: Option<(MeshShape, Settings, Recipe)>,
    /// Where the mesh was chosen by it.
    predicted: Option<Predicted>,
}

impl Run {
    /// The recipe in `file` with `--set` options on top.
    pub fn new(file: &Path, sets: &[String], start: Start) -> Result<Run> {
        let mut settings = Settings::read(file)?;
        sets.iter().try_for_each(|argument| settings.set(argument))?;
        let recipe = settings.recipe()?;
        let (file, sets) = (file.to_path_buf(), sets.to_vec());
        Ok(Run { file, sets, settings, recipe, start, restarts: 0, fallback: None, predicted: None })
    }

    /// The same on a mesh for `ranks` ranks of this machine where the recipe leaves it open; says what was
    /// chosen and why.
    pub fn chosen(mut self, ranks: Option<usize>, way: &Way) -> Result<Run> {
        if !self.recipe.mesh.auto {
            return Ok(self);
        }
        if matches!(way, Way::Rank(_) | Way::Mpi(..)) {
            return Err(anyhow!(
                "mesh = \"auto\" is chosen before ranks start; choose with `trilith plan RECIPE --here --ranks N` \
                 and pass its --set options"
            ));
        }
        let ranks = ranks.unwrap_or(self.recipe.cluster.devices);
        let ranking = Ranking::new(&self.settings, &self.recipe, ranks)?;
        eprintln!("{}", ranking.summary());
        let best = ranking.best();
        best.sets.iter().try_for_each(|set| self.settings.set(set))?;
        self.recipe = self.settings.recipe()?;
        self.sets.extend(best.sets.iter().cloned());
        let memory_bytes = (best.price.memory.device() * ranks as f64) as u64;
        self.predicted = Some(Predicted { step_s: best.price.step(), memory_bytes, links: Vec::new() });
        Ok(self)
    }

    /// The same, started again after a loss at most `restarts` times, on `fallback` if one is given.
    pub fn restarted(mut self, restarts: usize, fallback: Option<MeshShape>) -> Result<Run> {
        self.restarts = restarts;
        if let Some(shape) = fallback {
            let mut settings = self.settings.clone();
            mesh_keys(shape).try_for_each(|argument| settings.set(&argument))?;
            let recipe = settings.recipe().with_context(|| format!("--fallback {shape}"))?;
            self.fallback = Some((shape, settings, recipe));
        }
        Ok(self)
    }

    fn attempt(&self, attempt: usize) -> (&Settings, &Recipe) {
        match &self.fallback {
            Some((_, settings, recipe)) if attempt > 0 => (settings, recipe),
            _ => (&self.settings, &self.recipe),
        }
    }

    /// What a rank of an attempt is started with. Until a run has begun, nothing in its folder is its own.
    fn command(&self, attempt: usize, began: bool) -> Command {
        let program = match cfg!(target_os = "linux") {
            // Also when the file was replaced while the run went on.
            true => PathBuf::from("/proc/self/exe"),
            false => std::env::current_exe().unwrap_or_else(|_| "trilith".into()),
        };
        let mut command = Command::new(program);
        // Ctrl-C is for the supervisor, which passes it on.
        command.arg0("trilith").process_group(0).arg("train").arg(&self.file);
        for argument in &self.sets {
            command.args(["--set", argument]);
        }
        if let Some((shape, ..)) = self.fallback.as_ref().filter(|_| attempt > 0) {
            mesh_keys(*shape).for_each(|argument| {
                command.args(["--set", &argument]);
            });
        }
        match self.start {
            _ if began => command.arg("--resume"),
            Start::Resume => command.arg("--resume"),
            Start::Overwrite => command.arg("--overwrite"),
            Start::New => &mut command,
        };
        command
    }

    /// Whether to go on after `why`; says so.
    fn goes_on(&self, attempt: usize, why: &str) -> bool {
        if attempt >= self.restarts {
            return false;
        }
        let mesh = self.attempt(attempt + 1).1.mesh.shape;
        let (number, restarts) = (attempt + 1, self.restarts);
        eprintln!("lost: {why}\nrestart {number} of {restarts} from the newest state, on mesh `{mesh}`");
        true
    }

    fn given_up(&self, why: &str) -> anyhow::Error {
        match self.restarts {
            0 => anyhow!("{why}; run again with --resume to go on, or let --restart do it"),
            restarts => anyhow!("{why}; gave up after {restarts} restarts, raise --restart to go on"),
        }
    }
}

/// `[mesh]` of a shape, as `--set` takes it.
fn mesh_keys(shape: MeshShape) -> impl Iterator<Item = String> {
    Axis::ALL.into_iter().map(move |axis| format!("mesh.{}={}", axis.name(), shape.size(axis)))
}

/// What this process is to a run.
pub enum Way {
    /// All ranks of it.
    Threads,
    /// Their supervisor.
    Processes,
    /// One rank, started by a supervisor.
    Rank(dist::Start),
    /// One rank, started by `mpirun` among so many on its host: (which, of how many).
    Mpi(usize, usize),
}

impl Way {
    pub fn find(processes: bool) -> Result<Way> {
        if let Some(start) =
            dist::Start::of_this_process(|name| std::env::var_os(name)).map_err(|what| anyhow!(what))?
        {
            return Ok(Way::Rank(start));
        }
        let number =
            |names: [&str; 2]| names.iter().find_map(|name| std::env::var(name).ok()?.parse::<usize>().ok());
        let ranks = number(["OMPI_COMM_WORLD_SIZE", "PMI_SIZE"]).filter(|ranks| *ranks > 1);
        let Some(ranks) = ranks else {
            return Ok(if processes { Way::Processes } else { Way::Threads });
        };
        if !cfg!(feature = "mpi") {
            return Err(anyhow!(
                "mpirun started {ranks} ranks, but this trilith was built without MPI; build it with \
                 `cargo build --release -p trilith --features mpi`, or use --processes on one machine"
            ));
        }
        let local = number(["OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID"]).unwrap_or(0);
        let locals = number(["OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS"]).unwrap_or(1);
        Ok(Way::Mpi(local.min(locals.max(1) - 1), locals.max(1)))
    }

    /// Let this process have a GPU to itself where there are enough: before anything asks for one.
    pub fn choose_card(&self) {
        match self {
            Way::Rank(dist::Start { rank: seat, .. }) | Way::Mpi(seat, _) => device::cuda::choose(*seat),
            // Ranks that are threads share a GPU; a supervisor needs none.
            Way::Threads | Way::Processes => {}
        }
    }
}

/// Which rank prepares a run, and how its ranks are carried.
pub struct Seat {
    pub rank: usize,
    /// Processes that share the work, each with such a pool.
    pub ranks: usize,
    pub carrier: &'static str,
    /// Ranks that compute on our GPU, where ranks do; none: all of them.
    on_card: Option<usize>,
}

impl Seat {
    /// The process that has all ranks.
    pub fn alone() -> Seat {
        Seat { rank: 0, ranks: 1, carrier: "threads", on_card: None }
    }

    /// Ranks of a recipe that compute on our GPU.
    pub fn on_card(&self, recipe: &Recipe) -> usize {
        self.on_card.unwrap_or(recipe.mesh.shape.world_size())
    }
}

fn ended(complete: bool) -> ExitCode {
    if complete {
        return ExitCode::SUCCESS;
    }
    eprintln!("stopped: the state is saved; run the same command with --resume to go on");
    ExitCode::from(EXIT_AGAIN)
}

/// Ranks as threads: the loop on one rank, in `pool`, or on every rank of the mesh, each with its share
/// of the cores. A rank that hangs cannot be ended here; one that fails or panics is.
pub fn threads(pool: &device::Threads, run: &Run, begin: Begin, stop: &AtomicBool) -> Result<ExitCode> {
    let began = AtomicBool::new(false);
    let mut attempt = 0;
    loop {
        let (settings, recipe) = run.attempt(attempt);
        let start = if began.load(SeqCst) { Start::Resume } else { begin.start };
        let (recipe, resolved) = (recipe.clone(), settings.resolved());
        let begin = Begin { recipe, resolved, start, ..begin.clone() };
        let predicted = run.predicted.clone().filter(|_| attempt == 0);
        let error = match attempt_threads(pool, begin, predicted, (stop, &began)) {
            Ok(complete) => return Ok(ended(complete)),
            Err(error) => error,
        };
        // What is refused before the first step is refused again.
        let lost = began.load(SeqCst) || is_of_ranks(&error);
        if !lost || stop.load(SeqCst) || !run.goes_on(attempt, &format!("{error:#}")) {
            return Err(if lost { run.given_up(&format!("{error:#}")) } else { error });
        }
        attempt += 1;
    }
}

fn attempt_threads(
    pool: &device::Threads,
    begin: Begin,
    predicted: Option<Predicted>,
    (stop, began): (&AtomicBool, &AtomicBool),
) -> Result<bool> {
    let (shape, deadline) = (begin.recipe.mesh.shape, begin.recipe.mesh.deadline);
    let began = || began.store(true, SeqCst);
    if shape.world_size() == 1 {
        let work = || pool.run(|| rank(&Mesh::solo(), begin, predicted, (stop, &began)));
        return catch_unwind(AssertUnwindSafe(work))
            .unwrap_or_else(|panic| Err(anyhow!("rank 0 panicked: {}", words_of(panic.as_ref()))));
    }
    let ends = dist::launch(&shape, &dist::Options { deadline }, |mesh| {
        rank(mesh, begin.clone(), predicted.clone(), (stop, &began))
    });
    match ends {
        Ok(ends) => Ok(ends.contains(&true)),
        Err(Failure::Rank { error, .. }) => Err(error),
        Err(failure) => Err(anyhow!("{failure:#}")),
    }
}

/// Whether it is about who answered whom, not about what was asked for.
fn is_of_ranks(error: &anyhow::Error) -> bool {
    let of_ranks = |fault: &Fault| matches!(fault, Fault::Outside(inner) if inner.is::<CommError>());
    matches!(error.downcast_ref::<TrainError>(), Some(TrainError::Fault(fault)) if of_ranks(fault))
}

fn words_of(panic: &(dyn std::any::Any + Send)) -> String {
    let words = panic.downcast_ref::<&str>().map(|s| s.to_string());
    words.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_else(|| "no words".to_string())
}

/// Ranks as processes of this machine: starts them, passes signals on, and says what went wrong once.
pub fn processes(run: &Run, stop: &AtomicBool) -> Result<ExitCode> {
    let began = Cell::new(false);
    let ranks = |attempt: usize| run.attempt(attempt).1.mesh.shape.world_size();
    let supervision = Supervision {
        ranks: ranks(0),
        patience: run.recipe.mesh.deadline + COURTESY,
        well: &[0, i32::from(EXIT_AGAIN)],
        stop,
    };
    let command = |start: &dist::Start| run.command(start.attempt, began.get());
    let ends = dist::supervise(&std::env::temp_dir(), &supervision, command, |attempt, ends| {
        began.set(began.get() || ends.ranks[0].words.starts_with(BEGAN));
        let loss = Loss::of(ends).filter(|loss| began.get() || !loss.refused)?;
        if stop.load(SeqCst) {
            return None;
        }
        run.goes_on(attempt, &loss.words).then(|| ranks(attempt + 1))
    })?;
    match Loss::of(&ends) {
        None => Ok(ended(ends.ranks[0].status.success())),
        Some(loss) if loss.refused && !began.get() => Err(anyhow!(loss.words)),
        Some(loss) if stop.load(SeqCst) => {
            eprintln!("stopped: {}; run with --resume to go on from the newest state", loss.words);
            Ok(ExitCode::from(EXIT_AGAIN))
        }
        Some(loss) => Err(run.given_up(&loss.words)),
    }
}

/// Why an attempt ended, in one message of all its ranks.
struct Loss {
    words: String,
    /// Its attempt had not begun; where none had before, the reason will not go away.
    refused: bool,
}

impl Loss {
    fn of(ends: &Ends) -> Option<Loss> {
        let first = ends.first?;
        let said = |end: &dist::End| end.words.strip_prefix(BEGAN).unwrap_or(&end.words).trim().to_string();
        if let Some(refused) = ends.ranks.iter().find(|end| end.status.code() == Some(1)) {
            return Some(Loss { words: said(refused), refused: true });
        }
        let silent = || format!("rank {first} {}", ends.ranks[first].how());
        // Ranks that heard why all say the same.
        let words = ends.ranks.iter().map(said).find(|words| !words.is_empty()).unwrap_or_else(silent);
        Some(Loss { words, refused: false })
    }
}

/// How the run of one rank ended.
enum Outcome {
    Ended { complete: bool },
    Refused(String),
    Lost(String),
}

/// This process as one rank of several, with its share of the cores of its machine.
pub fn one_rank(run: &Run, way: Way, stop: &AtomicBool) -> Result<ExitCode> {
    let deadline = run.recipe.mesh.deadline;
    let over_mpi = matches!(way, Way::Mpi(..));
    let (process, local, locals) = match way {
        Way::Rank(start) => {
            let (rank, ranks, wait) = (start.rank, start.ranks, deadline.max(MEETING));
            match Process::join(&start.meet, rank, ranks, wait) {
                Ok(process) => (process.with_deadline(deadline), rank, ranks),
                Err(error) => return say(over_mpi, rank, Outcome::Lost(error.to_string())),
            }
        }
        Way::Mpi(local, locals) => (over_mpi_process(deadline)?, local, locals),
        Way::Threads | Way::Processes => return Err(anyhow!("this process is no single rank")),
    };
    let rank = Communicator::Processes(process.clone()).rank();
    let communicator = match linked(&process, run.recipe.train.device) {
        Ok(communicator) => communicator,
        Err(error) => return say(over_mpi, rank, finish(&process, Err(anyhow!(error)), false)),
    };
    let on_card = match run.recipe.train.device {
        Device::Cpu => None,
        Device::Cuda => Some(locals.div_ceil(device::cuda::gpu().map_or(1, |gpu| gpu.card().shown.max(1)))),
    };
    let carrier = carrier(over_mpi, &communicator);
    let seat = Seat { rank, ranks: communicator.world_size(), carrier, on_card };
    let mesh = match Mesh::new(run.recipe.mesh.shape, communicator) {
        Ok(mesh) => mesh,
        Err(error) => return say(over_mpi, rank, finish(&process, Err(anyhow!(error)), false)),
    };
    let over = Arc::new(AtomicBool::new(false));
    watch(process.clone(), over.clone(), move |why| drop(say(over_mpi, rank, Outcome::Lost(why))));
    let began = AtomicBool::new(false);
    let told = || {
        began.store(true, SeqCst);
        if !over_mpi {
            println!("{BEGAN}");
        }
    };
    let work = || -> Result<bool> {
        let pool = device::Threads::share(local, locals)?;
        pool.run(|| {
            crate::train::rank(
                &mesh,
                cook(&run.recipe, &run.settings, run.start, &seat)?,
                None,
                (stop, &told),
            )
        })
    };
    let result = catch_unwind(AssertUnwindSafe(work))
        .unwrap_or_else(|panic| Err(anyhow!("it panicked: {}", words_of(panic.as_ref()))));
    let outcome = finish(&process, result, began.load(SeqCst));
    if over.swap(true, SeqCst) {
        // The watch is already saying it, and ends the process.
        std::thread::sleep(2 * COURTESY);
    }
    say(over_mpi, rank, outcome)
}

/// Who carries between processes: NCCL what lies on GPUs, where every rank has one of its own and the library.
/// Why not, if not, is said once.
fn linked(process: &Process, device: Device) -> Result<Communicator, CommError> {
    let through_host = Communicator::Processes(process.clone());
    if device == Device::Cpu || through_host.world_size() == 1 {
        return Ok(through_host);
    }
    match Nccl::agree(process)? {
        Ok(nccl) => Ok(Communicator::Nccl(nccl)),
        Err(why) => {
            if through_host.rank() == 0 {
                eprintln!("what ranks exchange passes through the host: {why}");
            }
            Ok(through_host)
        }
    }
}

fn carrier(over_mpi: bool, communicator: &Communicator) -> &'static str {
    match (communicator, over_mpi) {
        (Communicator::Nccl(_), true) => "MPI processes, from GPU to GPU over NCCL",
        (Communicator::Nccl(_), false) => "processes, from GPU to GPU over NCCL",
        (_, true) => "MPI processes",
        (_, false) => "processes",
    }
}

#[cfg(feature = "mpi")]
fn over_mpi_process(deadline: Duration) -> Result<Process> {
    Ok(Process::over_mpi(deadline)?)
}

#[cfg(not(feature = "mpi"))]
fn over_mpi_process(_: Duration) -> Result<Process> {
    Err(anyhow!("built without MPI"))
}

/// Tells the others how our work ended and hears how theirs did.
fn finish(process: &Process, result: Result<bool>, began: bool) -> Outcome {
    let own = process.failure_within(Duration::ZERO).is_none();
    let reason = result.as_ref().err().map(|error| format!("{error:#}"));
    match (process.end(reason.clone()), reason) {
        (_, Some(reason)) if own && !began => Outcome::Refused(reason),
        (Err(first), _) => Outcome::Lost(first.to_string()),
        (Ok(()), Some(reason)) => Outcome::Lost(reason),
        (Ok(()), None) => Outcome::Ended { complete: result.is_ok_and(|complete| complete) },
    }
}

/// Ends this process when the run has failed elsewhere and the rank goes on computing, or hangs.
fn watch(process: Process, over: Arc<AtomicBool>, say: impl Fn(String) + Send + 'static) {
    std::thread::spawn(move || {
        while !over.load(SeqCst) {
            let Some(why) = process.failure_within(Duration::from_millis(200)) else { continue };
            std::thread::sleep(COURTESY);
            if !over.swap(true, SeqCst) {
                say(why.to_string());
                std::process::exit(i32::from(EXIT_LOST));
            }
        }
    });
}

/// Says how it ended, to the supervisor or, over MPI, as one of the ranks to whoever reads the screen.
fn say(over_mpi: bool, rank: usize, outcome: Outcome) -> Result<ExitCode> {
    let (words, code) = match outcome {
        Outcome::Ended { complete } if over_mpi && rank == 0 => return Ok(ended(complete)),
        // The launcher takes any other code for a failure, and the first rank gives it.
        Outcome::Ended { .. } if over_mpi => return Ok(ExitCode::SUCCESS),
        Outcome::Ended { complete: true } => return Ok(ExitCode::SUCCESS),
        Outcome::Ended { complete: false } => return Ok(ExitCode::from(EXIT_AGAIN)),
        Outcome::Refused(words) => (words, 1),
        Outcome::Lost(words) => (words, EXIT_LOST),
    };
    // The first rank speaks, or the second when it is the first that was lost.
    let speaker = usize::from(words.starts_with("rank 0 is dead: its process"));
    if !over_mpi {
        println!("{words}");
    } else if rank == speaker {
        eprintln!("error: {words}");
    } else {
        // The launcher ends all ranks as soon as one has failed; the message comes first.
        std::thread::sleep(COURTESY);
    }
    Ok(ExitCode::from(code))
}
