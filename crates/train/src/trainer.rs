//! The training loop as a machine that is advanced: each call does one thing and says what it was.
//! Whoever advances it shows progress, draws samples and decides when to stop.

use crate::TrainError;
use crate::begin::{self, Begin, Begun, Start};
use crate::budget::{BudgetChange, LiveBudgets};
use crate::export::{self, Weights};
use crate::files::{Files, Source};
use crate::learner::Learner;
use crate::metrics::{Messages, StepMetrics};
use crate::predicted::Predicted;
use crate::prepare::Prepared;
use crate::ranks::{self, first_says};
use crate::recipe::Recipe;
use crate::run_folder::StateMeta;
use crate::step::{StepDone, StepPlan};
use crate::whole::{Assembled, Whole};
use data::{Batch, Loader, Samples};
use dist::{Flow, Mesh};
use std::collections::VecDeque;
use std::path::PathBuf;
use std::sync::Arc;
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
    /// Other budgets were asked for while the run goes on.
    Budget {
        /// After this step.
        step: u64,
        /// What came of it.
        change: BudgetChange,
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

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Due {
    Validate,
    Sample,
    Save,
    End,
}

/// A run, as one of its ranks sees it: all ranks advance together.
pub struct Trainer {
    recipe: Recipe,
    /// What the run is made of.
    pub prepared: Arc<Prepared>,
    learner: Learner,
    flow: Flow,
    loader: Loader,
    valid: Option<Samples>,
    /// On rank 0.
    files: Option<Files>,
    /// Of a run with tiers.
    budgets: Option<LiveBudgets>,
    /// Puts the pieces of ranks together; none on a mesh of one.
    whole: Option<Whole>,
    /// The model as one rank would hold it, on rank 0 while a sample is due.
    assembled: Option<Assembled>,
    peak_gflops: f64,
    step: u64,
    meta: StateMeta,
    due: VecDeque<Due>,
    stopping: bool,
    ended: bool,
    /// States newer than the one resumed from that were damaged, and how.
    pub skipped_states: Vec<(PathBuf, String)>,
}

impl Trainer {
    /// The learner, between two steps.
    pub fn learner_mut(&mut self) -> &mut Learner {
        &mut self.learner
    }

    /// Set a run up: reserve memory, load or draw weights, restore a state. `peak_gflops` is the
    /// machine's, for utilisation.
    pub fn new(
        recipe: Recipe,
        resolved: &str,
        prepared: impl Into<Arc<Prepared>>,
        start: Start,
        peak_gflops: f64,
    ) -> Result<Trainer, TrainError> {
        let (resolved, prepared) = (resolved.to_string(), prepared.into());
        Trainer::on(&Mesh::solo(), Begin { recipe, resolved, prepared, start, peak_gflops })
    }

    /// Write down what was predicted of the run, once: of a run that goes on it stands in the log.
    pub fn foretell(&mut self, predicted: &Predicted) -> Result<(), TrainError> {
        match &mut self.files {
            Some(files) if self.step == 0 => Ok(files.metrics.predicted(predicted)?),
            _ => Ok(()),
        }
    }

    /// The same as one rank of `mesh`. A state of any mesh is gone on with on any other.
    pub fn on(mesh: &Mesh, begin: Begin) -> Result<Trainer, TrainError> {
        let flow = begin.recipe.mesh.flow(mesh)?;
        let whole = match mesh.world_size() {
            1 => None,
            _ => Some(Whole::new(&begin.prepared.config, begin.recipe.train.context)?),
        };
        let begun = begin::begin(&begin, &flow, whole.as_ref())?;
        let Begun { learner, step, meta, files, budgets, skipped_states } = begun;
        let Begin { recipe, prepared, peak_gflops, .. } = begin;
        let samples = Samples::new(prepared.train.clone(), recipe.train.context)?;
        let loader = Loader::new(samples, recipe.run.seed, recipe.data.shuffle);
        let valid =
            prepared.valid.clone().map(|corpus| Samples::new(corpus, recipe.train.context)).transpose()?;
        let mut trainer = Trainer {
            recipe,
            prepared,
            learner,
            flow,
            loader,
            valid,
            files,
            budgets,
            whole,
            assembled: None,
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
        &self.recipe.run.dir
    }

    /// Model and parameters, to draw samples; of several ranks on rank 0 alone, when one is due.
    pub fn parts(&mut self) -> (&model::Model, &mut tensor::ParamStore) {
        match &mut self.assembled {
            Some(assembled) => (&assembled.model, &mut assembled.store),
            None => (&self.learner.model, &mut self.learner.store),
        }
    }

    /// Parameters with elements in a place of the offload file.
    pub(crate) fn params_at(&self, place: &memory::disk::Place) -> Vec<String> {
        let store = &self.learner.store;
        let class = memory::Class::STATE.into_iter().find(|class| class.to_string() == place.region);
        let Some(class) = class.filter(|class| store.arrays().has(*class)) else { return Vec::new() };
        let size = store.arrays().dtype(class).size_bytes() as u64;
        let elements = (place.offset / size) as usize..(place.offset + place.len).div_ceil(size) as usize;
        store.params_in(&elements).map(|param| store.spec(param).name.clone()).collect()
    }

    /// Save and end after the step at hand. Of several ranks the first one decides.
    pub fn stop(&mut self) {
        self.stopping = true;
    }

    /// Do the next thing; `None` after the end.
    pub fn advance(&mut self) -> Result<Option<Progress>, TrainError> {
        if self.ended {
            return Ok(None);
        }
        self.assembled = None;
        self.flow.mesh.set_place(self.step + 1, None);
        if self.whole.is_some() {
            let mut words = [u16::from(self.stopping)];
            first_says(&self.flow.mesh, &mut words)?;
            self.stopping = words[0] != 0;
        }
        if self.stopping && !self.due.contains(&Due::End) {
            // What can wait for the next process waits; the state cannot.
            self.due.retain(|due| *due == Due::Save);
            if !self.due.contains(&Due::Save) {
                self.due.push_back(Due::Save);
            }
            self.due.push_back(Due::End);
        }
        if !self.due.is_empty() {
            // Whatever is due looks at weights or state.
            self.learner.finish_updates()?;
        }
        match self.due.pop_front() {
            None => match self.look_at_budgets()? {
                Some(progress) => Ok(Some(progress)),
                None => self.run_step().map(Some),
            },
            Some(Due::Validate) => self.validate().map(Some),
            Some(Due::Sample) => self.sample().map(Some),
            Some(Due::Save) => self.save().map(Some),
            Some(Due::End) => self.end().map(Some),
        }
    }

    /// Other budgets count from the next step on.
    fn look_at_budgets(&mut self) -> Result<Option<Progress>, TrainError> {
        let Some(budgets) = &mut self.budgets else { return Ok(None) };
        let Some(change) = budgets.look(&mut self.learner)? else { return Ok(None) };
        if let Some(files) = &mut self.files {
            files.metrics.budget(self.step, &change)?;
        }
        Ok(Some(Progress::Budget { step: self.step, change }))
    }

    fn run_step(&mut self) -> Result<Progress, TrainError> {
        let started = Instant::now();
        let train = &self.recipe.train;
        let step = self.step + 1;
        let mesh = &self.flow.mesh;
        let (replica, replicas) = ranks::replica(mesh);
        let (first, each) = (self.meta.samples, train.batch / replicas);
        let batches: Vec<Batch> = (0..train.accumulate)
            .map(|i| self.loader.batch(first + (i * train.batch) as u64, each, replica, replicas))
            .collect();
        let lr = train.schedule.at(step);
        let plan = StepPlan { lr: lr as f32, clip: train.clip };
        // What was moved between steps (validation, saves) is not the step's.
        self.learner.store.arrays_mut().report();
        let before = mesh.counts();
        let StepDone { loss, grad_norm, applied } = self.learner.step(&batches, plan)?;
        let messages = Messages::between(&before, &mesh.counts());
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
            messages,
            balance: self.learner.balance(),
        };
        if let Some(files) = &mut self.files {
            files.metrics.step(&metrics)?;
        }
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
        let mesh = self.flow.mesh.clone();
        let (replica, replicas) = ranks::replica(&mesh);
        if let Some(valid) = &self.valid {
            // Replicas take turns; their sums are added in the order of the batches.
            let batches: Vec<Batch> = valid.sequential(self.recipe.train.batch).take(most).collect();
            let rounds: Vec<&[Batch]> = batches.chunks(replicas).collect();
            // Who shares experts takes part in every turn; a turn too many counts nothing.
            let ours: Vec<&Batch> =
                rounds.iter().map(|round| round.get(replica).unwrap_or(&round[0])).collect();
            for (round, ours) in rounds.into_iter().zip(self.learner.evaluate(&ours)?) {
                for sum in ranks::gather_replicas(&mesh, ours)?.into_iter().take(round.len()) {
                    loss += sum;
                }
                targets += round.iter().map(|batch| batch.learned as u64).sum::<u64>();
            }
        }
        let (step, loss) = (self.step, loss / targets.max(1) as f64);
        if let Some(files) = &mut self.files {
            files.metrics.validation(step, loss, targets)?;
        }
        self.meta.validated = step;
        Ok(Progress::Validated { step, loss, targets })
    }

    fn sample(&mut self) -> Result<Progress, TrainError> {
        if let Some(whole) = &self.whole {
            self.assembled = whole.assemble(&mut self.learner, &self.flow)?;
        }
        Ok(Progress::SampleDue { step: self.step })
    }

    fn save(&mut self) -> Result<Progress, TrainError> {
        let Trainer { step, learner, files, meta, .. } = self;
        match (&self.whole, files) {
            (None, Some(files)) => files.save(*step, meta, Source::One(learner))?,
            (None, None) => {}
            (Some(whole), files) => {
                whole.read_by(learner, &self.flow, |reader| match files {
                    Some(files) => files.save(*step, meta, Source::Ranks(reader)),
                    None => Ok(()),
                })?;
            }
        }
        Ok(Progress::Saved { step: self.step })
    }

    fn end(&mut self) -> Result<Progress, TrainError> {
        if let Some(files) = &mut self.files {
            files.finish()?;
        }
        let Trainer { recipe, prepared, learner, files, step, .. } = self;
        match (&self.whole, files) {
            (None, Some(files)) => {
                let weights = Weights::One(&mut learner.store, &learner.stored);
                export::write(&files.folder, recipe, prepared, weights, *step)?;
            }
            (None, None) => {}
            (Some(whole), files) => {
                whole.read_by(learner, &self.flow, |reader| match files {
                    Some(files) => {
                        export::write(&files.folder, recipe, prepared, Weights::Ranks(reader), *step)
                    }
                    None => Ok(()),
                })?;
            }
        }
        self.ended = true;
        let complete = self.step >= self.recipe.train.steps;
        Ok(Progress::Ended { step: self.step, complete })
    }
}
