//! A model, its parameters and its optimizer: what one training step is made of.

use crate::optimizer::{AdamW, AdamWConfig, squared_grad_norm};
use data::Batch;
use device::{DType, Device, OutOfMemory};
use dist::Mesh;
use model::{Built, Config, ConfigError, Model, Recompute, StoredWeight, Tokens};
use std::time::Instant;
use tensor::{Fault, Moment, ParamList, ParamStore, Tape, Targets, Var};

/// A model that learns.
pub struct Learner {
    /// The layers.
    pub model: Model,
    /// Weights and gradients.
    pub store: ParamStore,
    /// Moments and low halves.
    pub optimizer: AdamW,
    /// What the parameters are.
    pub params: ParamList,
    /// Names of the weights in a Hugging Face folder.
    pub stored: Vec<StoredWeight>,
    recompute: Recompute,
}

/// Why a learner could not be made.
#[derive(Debug, thiserror::Error)]
pub enum LearnerError {
    /// The config describes no model.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// It does not fit.
    #[error(transparent)]
    Memory(#[from] OutOfMemory),
}

impl Learner {
    /// Zero weights for rows of at most `context` tokens; fill them with `initialise` or from files.
    pub fn new(
        config: &Config,
        context: usize,
        dtype: DType,
        adamw: AdamWConfig,
        recompute: Recompute,
    ) -> Result<Learner, LearnerError> {
        let Built { model, params, stored, .. } = Model::build(config, context, &Mesh::solo())?;
        let mut store = ParamStore::new(Device::Cpu, dtype, &params)?;
        store.enable_grads()?;
        let optimizer = AdamW::new(adamw, &store)?;
        Ok(Learner { model, store, optimizer, params, stored, recompute })
    }

    /// Random initial weights from `seed`.
    pub fn initialise(&mut self, seed: u64) {
        self.params.initial_values(seed, |param, first, values| {
            self.optimizer.set_weights(&mut self.store, param, first, values);
        });
    }

    /// Add the gradients of one microbatch, whose summed loss counts `scale`; returns the sum of
    /// the losses of its learned targets, in nats.
    pub fn accumulate(&mut self, batch: &Batch, scale: f32) -> Result<f64, Fault> {
        let tokens = tokens_of(batch);
        let mut tape = Tape::recording(&mut self.store);
        let hidden: Var = self.model.hidden(&mut tape, &tokens, self.recompute)?;
        let targets = Targets { ids: &batch.targets, scale };
        let losses = tape.head_loss(&hidden, self.model.head(), targets)?;
        drop(hidden);
        tape.backward()?;
        Ok(sum(losses.view().f32()))
    }

    /// Start a step: gradients count as zero.
    pub fn clear_grads(&mut self) {
        self.store.clear_grads();
    }

    /// Global norm of the gradients; the microbatches of the step are done.
    pub fn grad_norm(&mut self) -> f64 {
        self.store.settle_grads();
        squared_grad_norm(&self.store).sqrt()
    }

    /// Apply the gradients.
    pub fn apply(&mut self, lr: f32, grad_scale: f32) {
        self.optimizer.step(&mut self.store, lr, grad_scale);
    }

    /// Apply the gradients as they are.
    pub fn apply_settled(&mut self, lr: f32) {
        self.store.settle_grads();
        self.apply(lr, 1.0);
    }

    /// Seconds of one step by (phase, op), the optimizer included, from the moments of the tape.
    pub fn profile(&mut self, batch: &Batch) -> Result<Vec<(String, String, f64)>, Fault> {
        let mut rows: Vec<(String, String, f64)> = Vec::new();
        let mut add = |phase: String, op: String, seconds: f64| match rows
            .iter_mut()
            .find(|row| row.0 == phase && row.1 == op)
        {
            Some(row) => row.2 += seconds,
            None => rows.push((phase, op, seconds)),
        };
        let tokens = tokens_of(batch);
        self.store.clear_grads();
        // A moment is told before its op runs: the time up to the next one is its own.
        let mut running: Option<(String, String, Instant)> = None;
        let mut watch = |moment: &Moment<'_>| {
            if let Some((phase, op, since)) = running.take() {
                add(phase, op, since.elapsed().as_secs_f64());
            }
            running = Some((format!("{:?}", moment.phase), moment.op.to_string(), Instant::now()));
        };
        let mut tape = Tape::recording(&mut self.store).watched_by(&mut watch);
        let hidden = self.model.hidden(&mut tape, &tokens, self.recompute)?;
        let targets = Targets { ids: &batch.targets, scale: 1.0 / batch.learned.max(1) as f32 };
        tape.head_loss(&hidden, self.model.head(), targets)?;
        drop(hidden);
        tape.backward()?;
        drop(tape);
        if let Some((phase, op, since)) = running {
            add(phase, op, since.elapsed().as_secs_f64());
        }
        let started = Instant::now();
        self.apply_settled(0.0);
        add("Step".into(), "adamw".into(), started.elapsed().as_secs_f64());
        Ok(rows)
    }

    /// Sum of the losses of a batch without learning from it.
    pub fn evaluate(&mut self, batch: &Batch) -> Result<f64, Fault> {
        loss_of(&self.model, &mut self.store, batch)
    }
}

fn tokens_of(batch: &Batch) -> Tokens {
    let whole = batch.starts.iter().all(|start| *start == 0);
    Tokens {
        b: batch.b,
        ids: batch.ids.as_slice().into(),
        positions: batch.positions.as_slice().into(),
        starts: (!whole).then(|| batch.starts.as_slice().into()),
    }
}

/// Sum of the losses of the learned targets of `batch`, in nats.
pub fn loss_of(model: &Model, store: &mut ParamStore, batch: &Batch) -> Result<f64, Fault> {
    let tokens = tokens_of(batch);
    let mut tape = Tape::running(store);
    let hidden = model.hidden(&mut tape, &tokens, Recompute::Never)?;
    let losses = tape.head_loss(&hidden, model.head(), Targets { ids: &batch.targets, scale: 1.0 })?;
    Ok(sum(losses.view().f32()))
}

fn sum(losses: &[f32]) -> f64 {
    losses.iter().map(|loss| f64::from(*loss)).sum()
}
