//! The training loop as a machine that is advanced: each call does one thing and says what it was.
//! Whoever advances it shows progress, draws samples and decides when to stop.

use crate::learner::Learner;
use crate::metrics::{Metrics, StepMetrics};
use crate::prepare::Prepared;
use crate::recipe::Recipe;
use crate::run_folder::{Identity, RunFolder, StateMeta, meta_of};
use crate::step::{StepDone, StepPlan};
use crate::{TrainError, export};
use checkpoint::{Saver, StateDir, StateError};
use data::{Batch, Loader, Samples};
use std::collections::VecDeque;
use std::path::PathBuf;
use std::time::Instant;

/// What an advance did.
#[derive(Clone, Debug, PartialEq)]
pub enum Progress {
    /// One step.
    Step(StepMetrics),
    /// A pass over the validation data: mean loss in nats over `targets` tokens.
    Validated {
        /// After this step.
        step: u64,
        /// Mean loss.
        loss: f64,
        /// Tokens it is a mean of.
        targets: u64,
    },
    /// A sample is wanted now: `Trainer::parts` has the model.
    SampleDue {
        /// After this step.
        step: u64,
    },
    /// The state was handed to be saved.
    Saved {
        /// Of this step.
        step: u64,
    },
    /// The run is at its end, or was stopped; the model folder is written.
    Ended {
        /// Steps done.
        step: u64,
        /// Whether every step of the recipe is done.
        complete: bool,
    },
}

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

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Due {
    Validate,
    Sample,
    Save,
    End,
}

/// A run.
pub struct Trainer {
    recipe: Recipe,
    /// What the run is made of.
    pub prepared: Prepared,
    learner: Learner,
    loader: Loader,
    valid: Option<Samples>,
    folder: RunFolder,
    metrics: Metrics,
    saver: Writer,
    identity: Identity,
    peak_gflops: f64,
    step: u64,
    meta: StateMeta,
    due: VecDeque<Due>,
    stopping: bool,
    ended: bool,
    /// States newer than the one resumed from that were damaged, and how.
    pub skipped_states: Vec<(PathBuf, String)>,
}

/// Who writes states.
enum Writer {
    Background(Saver),
    Inline(StateDir),
}

impl Trainer {
    /// Set a run up: reserve memory, load or draw weights, restore a state. `peak_gflops` is the
    /// machine's, for utilisation.
    pub fn new(
        recipe: Recipe,
        resolved: &str,
        prepared: Prepared,
        start: Start,
        peak_gflops: f64,
    ) -> Result<Trainer, TrainError> {
        let folder = RunFolder::open(&recipe.run.dir)?;
        let states = folder.states(recipe.checkpoint.keep_last)?;
        if start == Start::Overwrite {
            folder.clear()?;
        }
        let newest = states.newest()?;
        let identity = identity(&recipe, &prepared);
        let begun = begin(&recipe, &prepared, start, &folder, (newest, &identity))?;
        let Begun { learner, step, meta, skipped_states } = begun;
        let metrics = Metrics::open(folder.path(), meta.metrics_bytes, step, recipe.tensorboard)?;
        folder.write(&[("recipe.toml".into(), resolved.as_bytes().to_vec())])?;
        folder.write(&prepared.tokenizer.files()?)?;
        let samples = Samples::new(prepared.train.clone(), recipe.train.context)?;
        let loader = Loader::new(samples, recipe.run.seed, recipe.data.shuffle);
        let valid =
            prepared.valid.clone().map(|corpus| Samples::new(corpus, recipe.train.context)).transpose()?;
        let saver = match recipe.checkpoint.background && !learner.store.arrays().is_paged() {
            true => Writer::Background(Saver::start(states)?),
            false => Writer::Inline(states),
        };
        let mut trainer = Trainer {
            recipe,
            prepared,
            learner,
            loader,
            valid,
            folder,
            metrics,
            saver,
            identity,
            peak_gflops,
            step,
            meta,
            due: VecDeque::new(),
            stopping: false,
            ended: false,
            skipped_states,
        };
        // A run told to stop leaves its validation to the next process.
        if trainer.step > 0 && trainer.validation_is_due() && trainer.meta.validated != trainer.step {
            trainer.due.push_back(Due::Validate);
        }
        if trainer.step >= trainer.recipe.train.steps {
            trainer.due.push_back(Due::End);
        }
        Ok(trainer)
    }

    /// Steps done.
    pub fn step(&self) -> u64 {
        self.step
    }

    /// The recipe of the run.
    pub fn recipe(&self) -> &Recipe {
        &self.recipe
    }

    /// The folder of the run.
    pub fn folder(&self) -> &std::path::Path {
        self.folder.path()
    }

    /// Model and parameters, to draw samples.
    pub fn parts(&mut self) -> (&model::Model, &mut tensor::ParamStore) {
        (&self.learner.model, &mut self.learner.store)
    }

    /// Save and end after the step at hand.
    pub fn stop(&mut self) {
        self.stopping = true;
    }

    /// Do the next thing; `None` after the end.
    pub fn advance(&mut self) -> Result<Option<Progress>, TrainError> {
        if self.ended {
            return Ok(None);
        }
        if self.stopping && !self.due.contains(&Due::End) {
            // What can wait for the next process waits; the state cannot.
            self.due.retain(|due| *due == Due::Save);
            if !self.due.contains(&Due::Save) {
                self.due.push_back(Due::Save);
            }
            self.due.push_back(Due::End);
        }
        match self.due.pop_front() {
            None => self.run_step().map(Some),
            Some(Due::Validate) => self.validate().map(Some),
            Some(Due::Sample) => Ok(Some(Progress::SampleDue { step: self.step })),
            Some(Due::Save) => self.save().map(Some),
            Some(Due::End) => self.end().map(Some),
        }
    }

    fn run_step(&mut self) -> Result<Progress, TrainError> {
        let started = Instant::now();
        let train = &self.recipe.train;
        let step = self.step + 1;
        let batches: Vec<Batch> = (0..train.accumulate)
            .map(|i| self.loader.batch(self.meta.samples + (i * train.batch) as u64, train.batch, 0, 1))
            .collect();
        let lr = train.schedule.at(step);
        let plan = StepPlan { lr: lr as f32, clip: train.clip };
        // What was moved between steps (validation, saves) is not the step's.
        self.learner.store.arrays_mut().report();
        let StepDone { loss, grad_norm, applied } = self.learner.step(&batches, plan)?;
        self.meta.skipped_in_row = if applied { 0 } else { self.meta.skipped_in_row + 1 };
        self.step = step;
        let rows = (train.batch * train.accumulate) as u64;
        let tokens = rows * train.context as u64;
        self.meta.samples += rows;
        self.meta.tokens += tokens;
        self.meta.applied = self.learner.optimizer.steps;
        let seconds = started.elapsed().as_secs_f64();
        let gflops = self.prepared.config.flops().per_token(train.context) * tokens as f64 / seconds / 1e9;
        let metrics = StepMetrics {
            step,
            loss,
            lr,
            grad_norm,
            applied,
            tokens: self.meta.tokens,
            epoch: self.meta.samples as f64 / self.loader.len().max(1) as f64,
            seconds,
            tokens_per_s: tokens as f64 / seconds,
            gflops,
            mfu: gflops / self.peak_gflops,
            tiers: self.learner.store.arrays_mut().report(),
        };
        self.metrics.step(&metrics)?;
        if self.meta.skipped_in_row > train.max_skipped {
            let samples = batches.iter().flat_map(|batch| batch.samples.iter().copied()).collect();
            return Err(TrainError::NotFinite { count: self.meta.skipped_in_row, step, samples });
        }
        self.plan();
        Ok(Progress::Step(metrics))
    }

    /// What is due after the step just done.
    fn plan(&mut self) {
        let last = self.step >= self.recipe.train.steps;
        let due = |every: u64| every > 0 && self.step.is_multiple_of(every);
        if self.validation_is_due() {
            self.due.push_back(Due::Validate);
        }
        if self.recipe.sample.every > 0 && (last || due(self.recipe.sample.every)) {
            self.due.push_back(Due::Sample);
        }
        if last || due(self.recipe.checkpoint.every) {
            self.due.push_back(Due::Save);
        }
        if last {
            self.due.push_back(Due::End);
        }
    }

    fn validation_is_due(&self) -> bool {
        let every = self.recipe.eval.every;
        let regular = every > 0 && self.step.is_multiple_of(every);
        self.valid.is_some() && (regular || self.step >= self.recipe.train.steps)
    }

    fn validate(&mut self) -> Result<Progress, TrainError> {
        let (mut loss, mut targets) = (0.0, 0u64);
        let most = match self.recipe.eval.batches {
            0 => usize::MAX,
            batches => batches,
        };
        if let Some(valid) = &self.valid {
            for batch in valid.sequential(self.recipe.train.batch).take(most) {
                loss += self.learner.evaluate(&batch)?;
                targets += batch.learned as u64;
            }
        }
        let (step, loss) = (self.step, loss / targets.max(1) as f64);
        self.metrics.validation(step, loss, targets)?;
        self.meta.validated = step;
        Ok(Progress::Validated { step, loss, targets })
    }

    fn save(&mut self) -> Result<Progress, TrainError> {
        self.meta.metrics_bytes = self.metrics.sync()?;
        self.meta.identity = self.identity.clone();
        let step = self.step;
        let meta = serde_json::json!(self.meta);
        let Learner { optimizer, store, .. } = &mut self.learner;
        let arrays = optimizer.arrays(store);
        match &mut self.saver {
            Writer::Inline(states) => {
                let read = |array: usize, first: u64, out: &mut [u8]| {
                    let read = optimizer.read(store, arrays[array].0, first, out);
                    read.map_err(|error| StateError::Source { what: error.to_string() })
                };
                states.save_from(step, &meta, &arrays, read)?;
            }
            Writer::Background(saver) => {
                // The former save's failure must not wait for the next one.
                saver.poll()?;
                let mut buffers = saver.take_buffers();
                buffers.resize_with(arrays.len(), Default::default);
                for ((name, bytes), (array, length)) in buffers.iter_mut().zip(&arrays) {
                    *name = array.to_string();
                    bytes.resize(*length as usize, 0);
                    optimizer.read(store, array, 0, bytes)?;
                }
                saver.save(step, meta, buffers)?;
            }
        }
        Ok(Progress::Saved { step })
    }

    fn end(&mut self) -> Result<Progress, TrainError> {
        if let Writer::Background(saver) = &mut self.saver {
            // Waits for the state in flight: the run ends with it on disk.
            saver.take_buffers();
            saver.poll()?;
        }
        export::write(&self.folder, &self.recipe, &self.prepared, &mut self.learner, self.step)?;
        self.ended = true;
        let complete = self.step >= self.recipe.train.steps;
        Ok(Progress::Ended { step: self.step, complete })
    }
}

/// Where a run begins.
struct Begun {
    learner: Learner,
    step: u64,
    meta: StateMeta,
    skipped_states: Vec<(PathBuf, String)>,
}

/// A learner with the newest state, or a fresh one.
fn begin(
    recipe: &Recipe,
    prepared: &Prepared,
    start: Start,
    folder: &RunFolder,
    (newest, identity): (checkpoint::Newest, &Identity),
) -> Result<Begun, TrainError> {
    let skipped_states: Vec<(PathBuf, String)> =
        newest.skipped.iter().map(|(path, error)| (path.clone(), error.to_string())).collect();
    match (&newest.checkpoint, skipped_states.first(), start) {
        (Some(state), _, Start::New) => {
            return Err(TrainError::Exists { path: folder.path().to_path_buf(), step: state.step });
        }
        (None, Some((_, first)), _) => {
            let path = folder.path().to_path_buf();
            return Err(TrainError::NoWholeState { path, first: first.clone() });
        }
        _ => {}
    }
    let meta = newest.checkpoint.as_ref().map(|state| meta_of(state, identity)).transpose()?;
    let mut learner = prepared.learner(recipe)?;
    let step = match &newest.checkpoint {
        Some(state) => {
            let Learner { optimizer, store, .. } = &mut learner;
            for (name, bytes) in optimizer.arrays(store) {
                state.check_size(name, bytes)?;
                state.for_each_block(name, |first, bytes| {
                    optimizer.write(store, name, first, bytes).map_err(TrainError::from)
                })?;
            }
            optimizer.steps = meta.as_ref().map_or(0, |meta| meta.applied);
            state.step
        }
        None => {
            prepared.fill(recipe, &mut learner)?;
            0
        }
    };
    let meta = meta.unwrap_or(StateMeta {
        samples: 0,
        tokens: 0,
        applied: 0,
        skipped_in_row: 0,
        validated: 0,
        metrics_bytes: 0,
        identity: identity.clone(),
    });
    Ok(Begun { learner, step, meta, skipped_states })
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
