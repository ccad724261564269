//! A model, its parameters and its optimizer: what one training step is made of.

use crate::balance::Balance;
use crate::optimizer::{AdamW, AdamWConfig};
use crate::pending::Pending;
use crate::ranks;
use crate::shards::{self, Sharding, Shards};
use crate::step::NORM;
use crate::tiers;
use data::Batch;
use device::{DType, Device, OutOfMemory};
use dist::pipeline::Schedule;
use dist::{Axis, Flow, Mesh};
use memory::pager::{PagerError, Setup};
use memory::plan::Budgets;
use model::{Built, Config, ConfigError, Model, Recompute, Spread, StoredWeight, Tokens};
use std::collections::HashMap;
use std::time::Instant;
use tensor::{Fault, Load, Moment, ParamList, ParamStore, Tape, Targets, Tensor, Var};

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
    /// The ranks this learner is one of.
    pub mesh: Mesh,
    /// How the parameters lie among them.
    pub spreads: Vec<Spread>,
    /// What fell on experts in the passes since `balance` was asked.
    pub loads: Vec<Load>,
    pub(crate) recompute: Recompute,
    pub(crate) pending: Pending,
    /// Our part in sharing the state; none on a mesh of one.
    pub(crate) shards: Option<Shards>,
    /// In which order the stages of a pipeline work.
    pub(crate) schedule: Schedule,
    /// Of each parameter, its place among those of the whole model; and how many those are.
    pub(crate) places: (Vec<usize>, usize),
    pub(crate) peak_live: usize,
}

/// How a learner is to work.
#[derive(Clone, Debug)]
pub struct LearnerOptions {
    /// Tokens of a row at most.
    pub context: usize,
    /// Weights and activations: f32 or bf16.
    pub dtype: DType,
    /// The optimizer's constants.
    pub adamw: AdamWConfig,
    /// Layers that run again.
    pub recompute: Recompute,
    /// Where ops compute.
    pub device: Device,
    /// Tiers the state may spread over; none: all of it stays in the memory of the device.
    pub tiers: Option<Setup>,
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
    /// Its tiers cannot be set up.
    #[error(transparent)]
    Tiers(#[from] PagerError),
}

impl Learner {
    /// Zero weights; fill them with `initialise` or from files.
    pub fn new(config: &Config, options: LearnerOptions) -> Result<Learner, LearnerError> {
        Learner::on(&Flow::solo(), config, options)
    }

    /// The same as one rank of the mesh of `flow`, with its pieces of the parameters.
    pub fn on(flow: &Flow, config: &Config, options: LearnerOptions) -> Result<Learner, LearnerError> {
        Learner::sharded(flow, config, options, Sharding::default())
    }

    /// The same, sharing the state with the ranks of `fsdp` as `sharding` says.
    pub fn sharded(
        flow: &Flow,
        config: &Config,
        options: LearnerOptions,
        sharding: Sharding,
    ) -> Result<Learner, LearnerError> {
        let LearnerOptions { context, dtype, adamw, recompute, device, tiers } = options;
        let Built { model, params, stored, spreads } = Model::build_on(config, context, flow)?;
        let (mesh, pending) = (flow.mesh.clone(), Pending::default());
        let share = (mesh.size(Axis::Fsdp), mesh.coord(Axis::Fsdp));
        let mut store = match tiers {
            Some(setup) => {
                let dtypes = (dtype, adamw.gradients, adamw.moments.dtype());
                let share = (mesh.world_size() > 1).then_some(share);
                ParamStore::paged(dtypes, &params, setup, share)?
            }
            None if mesh.world_size() == 1 => ParamStore::new(device, dtype, &params)?,
            None => ParamStore::striped(device, dtype, &params, share, sharding.away())?,
        };
        store.enable_grads()?;
        let optimizer = AdamW::new(adamw, &mut store)?;
        let schedule = flow.schedule;
        let places = match mesh.size(Axis::Pp) {
            1 => ((0..params.specs().len()).collect(), params.specs().len()),
            _ => places(&params, &Model::build_on(config, context, &Flow::solo())?.params),
        };
        let striped = store.arrays().stripes().is_some();
        let shards = striped.then(|| Shards::new(&mesh, sharding, &store, &spreads));
        Ok(Learner {
            model,
            store,
            optimizer,
            params,
            stored,
            mesh,
            spreads,
            loads: Vec::new(),
            recompute,
            pending,
            shards,
            schedule,
            places,
            peak_live: 0,
        })
    }

    /// Other budgets of the tiers from now on, between two steps; see `Arrays::set_budget`. No bit of
    /// the run changes. Of several ranks each sets its own.
    pub fn set_budget(&mut self, budgets: Budgets) -> Result<(), PagerError> {
        let parts = ranks::processes(&self.mesh);
        self.store.arrays_mut().set_budget(tiers::part(budgets, parts))
    }

    /// The budgets there are, those of all ranks together; none where everything stays in memory.
    pub fn budgets(&self) -> Option<Budgets> {
        let Budgets { hbm, dram, nvme } = self.store.arrays().budgets()?;
        let all = |bytes: Option<u64>| bytes.map(|bytes| bytes.saturating_mul(ranks::processes(&self.mesh)));
        Some(Budgets { hbm: all(hbm), dram: all(dram), nvme: all(nvme) })
    }

    /// Random initial weights from `seed`.
    pub fn initialise(&mut self, seed: u64) -> Result<(), Fault> {
        let Learner { optimizer, store, params, .. } = self;
        params.initial_values(seed, |param, first, values| {
            optimizer.set_weights(store, param, first, values)
        })?;
        self.share_weights()
    }

    /// Weights were set: ranks that share the state set their own granules, and now get those of
    /// others where they keep whole weights. Every rank calls it.
    pub fn share_weights(&mut self) -> Result<(), Fault> {
        let shards = self.shards.as_mut();
        shards.map_or(Ok(()), |shards| shards.share_weights(&mut self.store))
    }

    /// Add the gradients of this replica's rows of one microbatch, whose summed loss counts `scale`;
    /// returns the sum of the losses of all its learned targets, in nats. On a mesh this is part of a
    /// pass (`shards`), which adds the gradients of ranks up.
    pub fn accumulate(&mut self, batch: &Batch, scale: f32) -> Result<f64, Fault> {
        let (tokens, share) = (tokens_of(batch), self.share(batch, scale)?);
        let mesh = &self.mesh;
        let (pending, optimizer, shards) = (&mut self.pending, &self.optimizer, &mut self.shards);
        let mut watch = |moment: &Moment<'_>, store: &mut ParamStore| {
            mesh.set_layer(moment.layer as u32);
            pending.before(moment, optimizer, store)?;
            shards.as_mut().map_or(Ok(()), |shards| shards.moment(moment, store))
        };
        let mut tape = Tape::recording(&mut self.store).watched_by(&mut watch);
        tape.set_share(share);
        let hidden: Var = self.model.hidden(&mut tape, &tokens, self.recompute)?;
        let targets = Targets { ids: &batch.targets, scale };
        let losses = self.model.loss(&mut tape, &hidden, targets, batch.b)?;
        drop(hidden);
        tape.backward()?;
        self.loads.append(&mut tape.loads);
        ranks::sum_of_losses(&self.mesh, &losses)
    }

    /// Make the updates that wait for the next step, so that weights and state are those after the
    /// last one. Nothing to do where there are none.
    pub fn finish_updates(&mut self) -> Result<(), Fault> {
        self.pending.finish(&self.optimizer, &mut self.store)
    }

    /// Which part of a step's targets a microbatch has, over all replicas; asked of them only where a
    /// model has experts, whose balance is that of the whole microbatch.
    pub(crate) fn share(&self, batch: &Batch, scale: f32) -> Result<f32, Fault> {
        let axes: &[Axis] = if self.model.has_experts() { &ranks::ROWS } else { &[] };
        Ok(ranks::sum_over(&self.mesh, axes, batch.learned as f64)? as f32 * scale)
    }

    /// How evenly experts were asked since the last call; none where a model has none.
    pub fn balance(&mut self) -> Option<Balance> {
        Balance::of(&std::mem::take(&mut self.loads))
    }

    /// Start a step: gradients count as zero.
    pub fn clear_grads(&mut self) -> Result<(), Fault> {
        self.finish_updates()?;
        self.store.clear_grads()
    }

    /// Apply the gradients as they are.
    pub fn apply_settled(&mut self, lr: f32) -> Result<(), Fault> {
        self.store.settle_grads()?;
        if self.store.rounds_grads() {
            self.store.refs().try_for_each(|param| self.store.finish_grad(NORM, param))?;
            self.store.forget_sums(0..self.store.flat_len())?;
        }
        self.optimizer.step(&mut self.store, lr, 1.0)
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
        self.clear_grads()?;
        // A moment is told before its op runs: the time up to the next one is its own.
        let mut running: Option<(String, String, Instant)> = None;
        let mut watch = |moment: &Moment<'_>, _: &mut ParamStore| {
            if let Some((phase, op, since)) = running.take() {
                add(phase, op, since.elapsed().as_secs_f64());
            }
            running = Some((format!("{:?}", moment.phase), moment.op.to_string(), Instant::now()));
            Ok(())
        };
        let mut tape = Tape::recording(&mut self.store).watched_by(&mut watch);
        let hidden = self.model.hidden(&mut tape, &tokens, self.recompute)?;
        let targets = Targets { ids: &batch.targets, scale: 1.0 / batch.learned.max(1) as f32 };
        self.model.loss(&mut tape, &hidden, targets, batch.b)?;
        drop(hidden);
        tape.backward()?;
        drop(tape);
        if let Some((phase, op, since)) = running {
            add(phase, op, since.elapsed().as_secs_f64());
        }
        let started = Instant::now();
        self.apply_settled(0.0)?;
        add("Step".into(), "adamw".into(), started.elapsed().as_secs_f64());
        Ok(rows)
    }

    /// Sum of the losses of each of some batches without learning from them. All stages of a pipeline are
    /// asked for the same number of batches.
    pub fn evaluate(&mut self, batches: &[&Batch]) -> Result<Vec<f64>, Fault> {
        self.finish_updates()?;
        if self.is_staged() {
            return self.evaluate_staged(batches);
        }
        batches.iter().map(|batch| self.evaluate_one(batch)).collect()
    }

    fn evaluate_one(&mut self, batch: &Batch) -> Result<f64, Fault> {
        let Learner { model, store, shards, .. } = self;
        let Some(shards) = shards else { return loss_of(model, store, batch) };
        shards.begin_pass(shards::Pass::Running, store)?;
        let mut watch = |moment: &Moment<'_>, store: &mut ParamStore| shards.moment(moment, store);
        let loss = run(model, Tape::running(store).watched_by(&mut watch), batch)?;
        shards.end_pass(store)?;
        Ok(loss)
    }
}

/// Where each parameter of a stage stands in the whole model, and how many that has.
fn places(params: &ParamList, whole: &ParamList) -> (Vec<usize>, usize) {
    let names: HashMap<&str, usize> =
        whole.specs().iter().enumerate().map(|(i, spec)| (spec.name.as_str(), i)).collect();
    let places = params.specs().iter().map(|spec| names[spec.name.as_str()]).collect();
    (places, whole.specs().len())
}

pub(crate) fn tokens_of(batch: &Batch) -> Tokens {
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
    run(model, Tape::running(store), batch)
}

fn run(model: &Model, mut tape: Tape<'_>, batch: &Batch) -> Result<f64, Fault> {
    let tokens = tokens_of(batch);
    let hidden = model.hidden(&mut tape, &tokens, Recompute::Never)?;
    let losses = model.loss(&mut tape, &hidden, Targets { ids: &batch.targets, scale: 1.0 }, batch.b)?;
    Ok(sum(&losses))
}

pub(crate) fn sum(losses: &Tensor) -> f64 {
    losses.to_f32().into_iter().map(f64::from).sum()
}
