//! Where a run begins: the newest state or fresh weights, on one rank or on many. Rank 0 looks into
//! the folder and says what it found; every rank then takes its pieces.

use crate::TrainError;
use crate::budget::{BudgetFile, LiveBudgets};
use crate::files::Files;
use crate::learner::Learner;
use crate::metrics::Metrics;
use crate::moments;
use crate::prepare::Prepared;
use crate::ranks::{first_says, numbers_of, words_of};
use crate::recipe::Recipe;
use crate::run_folder::{Identity, RunFolder, StateMeta, meta_of};
use crate::whole::Whole;
use checkpoint::{Checkpoint, StateDir};
use device::Device;
use dist::Flow;
use std::path::PathBuf;
use std::sync::Arc;

/// How to treat a run that is already in the folder.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Start {
    /// Refuse.
    New,
    /// Go on with its newest whole state; begin when there is none.
    Resume,
    /// Throw it away.
    Overwrite,
}

/// What a run is set up from; every rank gets the same.
#[derive(Clone)]
pub struct Begin {
    /// What is wanted.
    pub recipe: Recipe,
    /// The recipe with every default written out.
    pub resolved: String,
    /// What the run is made of.
    pub prepared: Arc<Prepared>,
    /// How to treat a run that is already there.
    pub start: Start,
    /// Of the machine, for utilisation.
    pub peak_gflops: f64,
}

/// A run about to go on.
pub(crate) struct Begun {
    pub learner: Learner,
    pub step: u64,
    pub meta: StateMeta,
    /// On rank 0.
    pub files: Option<Files>,
    /// Of a run with tiers.
    pub budgets: Option<LiveBudgets>,
    pub skipped_states: Vec<(PathBuf, String)>,
}

/// What rank 0 found.
struct Found {
    folder: RunFolder,
    states: StateDir,
    state: Option<Checkpoint>,
    skipped: Vec<(PathBuf, String)>,
}

pub(crate) fn begin(begin: &Begin, flow: &Flow, whole: Option<&Whole>) -> Result<Begun, TrainError> {
    let Begin { recipe, resolved, prepared, start, .. } = begin;
    let identity = identity(recipe, prepared);
    same_run(flow, recipe, resolved, &identity)?;
    let mut found = match flow.mesh.rank() {
        0 => Some(look(recipe, *start)?),
        _ => None,
    };
    let state = agree(recipe, flow, found.as_mut())?;
    let meta = state.as_ref().map(|state| meta_of(state, &identity)).transpose()?;
    let mut learner = prepared.learner(recipe, flow)?;
    // Before the first weight: loading keeps to it, too.
    let paged = learner.store.arrays().is_paged();
    let folder = found.as_ref().map(|found| found.folder.path());
    let budgets = paged.then(|| LiveBudgets::begin(folder, &mut learner)).transpose()?;
    match (&state, whole) {
        (Some(state), None) => restore(&mut learner, state)?,
        (Some(state), Some(whole)) => whole.restore(&mut learner, state)?,
        (None, _) => prepared.fill(recipe, &mut learner)?,
    }
    let step = state.map_or(0, |state| state.step);
    let (samples, tokens, applied, skipped_in_row, validated, metrics_bytes) = (0, 0, 0, 0, 0, 0);
    let fresh = || StateMeta {
        samples,
        tokens,
        applied,
        skipped_in_row,
        validated,
        metrics_bytes,
        identity: identity.clone(),
    };
    let meta = meta.unwrap_or_else(fresh);
    learner.optimizer.steps = meta.applied;
    let Some(Found { folder, states, skipped: skipped_states, .. }) = found else {
        return Ok(Begun { learner, step, meta, files: None, budgets, skipped_states: Vec::new() });
    };
    let metrics = Metrics::open(folder.path(), meta.metrics_bytes, step, recipe.tensorboard)?;
    folder.write(&[("recipe.toml".into(), resolved.as_bytes().to_vec())])?;
    folder.write(&prepared.tokenizer.files()?)?;
    // Within a budget there is no room for a copy: a save streams from where things lie.
    let background = recipe.checkpoint.background && recipe.memory.is_none();
    let files = Files::new(folder, metrics, states, background, identity)?;
    Ok(Begun { learner, step, meta, files: Some(files), budgets, skipped_states })
}

/// Open the folder and find the newest whole state.
fn look(recipe: &Recipe, start: Start) -> Result<Found, TrainError> {
    let folder = RunFolder::open(&recipe.run.dir)?;
    let states = folder.states(recipe.checkpoint.keep_last)?;
    if start == Start::Overwrite {
        folder.clear()?;
    }
    let newest = states.newest()?;
    let skipped: Vec<(PathBuf, String)> =
        newest.skipped.iter().map(|(path, error)| (path.clone(), error.to_string())).collect();
    let path = || folder.path().to_path_buf();
    match (newest.checkpoint, skipped.first(), start) {
        (Some(state), _, Start::New) => Err(TrainError::Exists { path: path(), step: state.step }),
        (None, Some((_, first)), _) => Err(TrainError::NoWholeState { path: path(), first: first.clone() }),
        (state, ..) => {
            if start != Start::Resume {
                BudgetFile::default().write(folder.path())?;
            }
            Ok(Found { folder, states, state, skipped })
        }
    }
}

/// Refuse to train with ranks that would train something else: processes read recipe and data by
/// themselves, on hosts of their own, and copies of weights would drift apart without a word.
fn same_run(flow: &Flow, recipe: &Recipe, resolved: &str, identity: &Identity) -> Result<(), TrainError> {
    let isa = device::Isa::active().name();
    // What "auto" came to.
    let device = match recipe.train.device {
        Device::Cpu => "the CPU".to_string(),
        Device::Cuda => device::cuda::gpu().map_or(String::new(), |gpu| gpu.card().name.clone()),
    };
    let model = identity.model.to_string();
    let data = identity.data.to_string();
    let ours = [
        ("recipe", resolved),
        ("model", &model),
        ("training data", &data),
        ("instruction set", isa),
        ("device", &device),
    ];
    // FNV-1a, the same in every process.
    let hash = |text: &str| {
        let step = |hash: u64, byte| (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3);
        text.bytes().fold(0xcbf2_9ce4_8422_2325, step)
    };
    let own: [u64; 5] = ours.map(|(_, text)| hash(text));
    let mut words = words_of(&own);
    let mine = words.clone();
    first_says(&flow.mesh, &mut words)?;
    let Some(at) = (0..20).find(|i| words[*i] != mine[*i]) else { return Ok(()) };
    let (rank, (name, here)) = (flow.mesh.rank(), ours[at / 4]);
    let is_short = ["instruction set", "device"].contains(&name);
    let hint = if is_short { format!(" (here it is {here})") } else { String::new() };
    Err(TrainError::Mesh {
        what: format!(
            "rank {rank} has another {name} than rank 0{hint}; every rank needs the same recipe, options, files \
             and kind of processor"
        ),
    })
}

/// The state every rank goes on from.
fn agree(recipe: &Recipe, flow: &Flow, found: Option<&mut Found>) -> Result<Option<Checkpoint>, TrainError> {
    let state = found.and_then(|found| found.state.take());
    if flow.mesh.world_size() == 1 {
        return Ok(state);
    }
    let step = state.as_ref().map_or(u64::MAX, |state| state.step);
    let mut words = words_of(&[step]);
    first_says(&flow.mesh, &mut words)?;
    let step = numbers_of(&words)[0];
    match (state, step) {
        (_, u64::MAX) => Ok(None),
        (Some(state), _) => Ok(Some(state)),
        (None, step) => {
            let states = StateDir::new(&recipe.run.dir.join("state"), recipe.checkpoint.keep_last)?;
            Ok(Some(states.open(step)?))
        }
    }
}

fn restore(learner: &mut Learner, state: &Checkpoint) -> Result<(), TrainError> {
    let Learner { optimizer, store, .. } = learner;
    for (name, bytes) in optimizer.arrays(store) {
        let elements = store.flat_len().max(1) as u64;
        let ours = (bytes / elements) as usize;
        let saved = saved_size(state, name, elements, ours)?;
        state.for_each_block(name, |first, bytes| {
            let first = first / saved as u64 * ours as u64;
            let bytes = moments::resize(bytes, saved, ours);
            optimizer.write(store, name, first, &bytes).map_err(TrainError::from)
        })?;
    }
    Ok(())
}

/// Bytes of an element of a saved array of `elements`, of which this run has `ours`. Moments may have
/// been saved by a run with the other kind.
pub(crate) fn saved_size(
    state: &Checkpoint,
    name: &str,
    elements: u64,
    ours: usize,
) -> Result<usize, TrainError> {
    let other = match ours {
        2 => 4,
        _ => 2,
    };
    let is_moment = matches!(name, "m" | "v");
    if is_moment && state.array(name)?.bytes == elements * other as u64 {
        return Ok(other);
    }
    state.check_size(name, elements * ours as u64)?;
    Ok(ours)
}

fn identity(recipe: &Recipe, prepared: &Prepared) -> Identity {
    let precision = prepared.precision(recipe);
    Identity {
        model: prepared.config.to_json(precision),
        precision: precision.to_string(),
        context: recipe.train.context,
        data: prepared.train.fingerprint(),
        seed: recipe.run.seed,
        shuffle: recipe.data.shuffle,
    }
}
