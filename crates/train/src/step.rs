//! One training step: microbatches there and back, the global norm, the update.
//!
//! Where chunks come and go, a gradient is summed for the norm the moment it is final, while it is
//! at hand (`finals`). Without clipping its chunk is updated at once, while the backward pass is still
//! going: then no gradient ever leaves. With clipping updates wait for the next step (`pending`).

use crate::finals::Finals;
use crate::learner::{Learner, sum, tokens_of};
use crate::optimizer::{AdamW, squared_norm};
use crate::shards::{self, Shards};
use crate::{ranks, stages};
use data::Batch;
use device::View;
use dist::Axis;
use memory::pager::About;
use memory::trace::Phase;
use std::cell::Cell;
use std::ops::Range;
use tensor::{Fault, Moment, ParamRef, ParamStore, Tape, Targets};

/// What a step is to do.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StepPlan {
    /// Learning rate.
    pub lr: f32,
    /// Largest global norm of the gradient; infinite: no clipping.
    pub clip: f64,
}

/// What a step did.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StepDone {
    /// Mean over the learned targets of the global batch, in nats.
    pub loss: f64,
    /// Global norm before clipping.
    pub grad_norm: f64,
    /// Whether the gradients were applied: loss and norm were finite.
    pub applied: bool,
}

/// A step that was half applied when it could not go on.
#[derive(Debug, thiserror::Error)]
#[error(
    "the gradient of {param} is not finite after other parameters were updated already; resume from the last state with a lower train.lr, or set train.clip so that the update waits for all gradients"
)]
pub struct HalfApplied {
    /// First such parameter.
    pub param: String,
}

pub(crate) const NORM: About = About { phase: Phase::Optimizer, op: "norm", layer: 0 };

impl Learner {
    /// One step over the microbatches of a global batch.
    pub fn step(&mut self, batches: &[Batch], plan: StepPlan) -> Result<StepDone, Fault> {
        let deferred = self.defers(plan);
        self.begin_grads(deferred)?;
        self.store.arrays_mut().begin_step().map_err(Fault::outside)?;
        let done = match self.shards.is_some() {
            true => self.step_over_ranks(batches, plan)?,
            false => self.step_alone(batches, plan)?,
        };
        self.store.arrays_mut().end_step().map_err(Fault::outside)?;
        Ok(done)
    }

    fn step_alone(&mut self, batches: &[Batch], plan: StepPlan) -> Result<StepDone, Fault> {
        let learned: usize = batches.iter().map(|batch| batch.learned).sum();
        let scale = 1.0 / learned.max(1) as f32;
        let mut loss = 0.0;
        let (last, others) = batches.split_last().expect("a step has a microbatch");
        for batch in others {
            loss += self.accumulate(batch, scale)?;
        }
        let applied = self.optimizer.steps;
        // Updates of the step before, which may still wait, are made with its count.
        self.optimizer.steps += u64::from(!self.defers(plan));
        let done = match self.settles_early() {
            true => self.finish_paged(last, (loss, learned), plan)?,
            false => {
                loss += self.accumulate(last, scale)?;
                self.store.settle_grads()?;
                let squares = self.squared_norm()?;
                let done = done(loss / learned.max(1) as f64, squares);
                self.update_all(done, plan)?;
                done
            }
        };
        self.optimizer.steps = applied + u64::from(done.applied);
        Ok(done)
    }

    /// Whether gradients are used as they become final.
    fn settles_early(&self) -> bool {
        self.store.arrays().is_paged()
    }

    /// Whether updates wait for the next step. Without clipping they need not: made in the backward
    /// pass they cost fewer bytes. Ranks of a mesh make none there.
    fn defers(&self, plan: StepPlan) -> bool {
        self.settles_early() && (plan.clip.is_finite() || self.shards.is_some())
    }

    /// Every gradient counts as zero, once what waits for it is done.
    fn begin_grads(&mut self, deferred: bool) -> Result<(), Fault> {
        if !deferred {
            return self.clear_grads();
        }
        self.pending.begin_step(&self.store);
        match self.pending.is_some() {
            true => self.store.renew_grads(),
            false => self.store.clear_grads()?,
        }
        Ok(())
    }

    /// The same where ranks share rows, state or pieces.
    fn step_over_ranks(&mut self, batches: &[Batch], plan: StepPlan) -> Result<StepDone, Fault> {
        let learned: usize = batches.iter().map(|batch| batch.learned).sum();
        let learned = ranks::sum_over(&self.mesh, &ranks::ROWS, learned as f64)?.max(1.0);
        let loss = match self.is_staged() {
            true => self.pass_through_stages(batches, 1.0 / learned as f32)?,
            false => self.pass_by_pass(batches, 1.0 / learned as f32)?,
        };
        let done = done(loss / learned, self.squared_norm_over_ranks()?);
        if !done.applied {
            return Ok(done);
        }
        let (deferred, factor) = (self.defers(plan), clipped(done.grad_norm, plan.clip));
        let Learner { shards, store, optimizer, pending, .. } = self;
        // Updates of the step before were made with its count.
        optimizer.steps += 1;
        match (deferred, shards) {
            (false, Some(shards)) => shards.update(store, optimizer, (plan.lr, factor))?,
            _ => pending.put(store, plan.lr, factor),
        }
        Ok(done)
    }

    /// Microbatches one after the other; the sum of their losses.
    fn pass_by_pass(&mut self, batches: &[Batch], scale: f32) -> Result<f64, Fault> {
        let mut loss = 0.0;
        for (i, batch) in batches.iter().enumerate() {
            let pass = if i + 1 < batches.len() { shards::Pass::Learning } else { shards::Pass::Last };
            let (shards, store) = self.shared();
            shards.begin_pass(pass, store)?;
            loss += self.accumulate(batch, scale)?;
            let (shards, store) = self.shared();
            shards.end_pass(store)?;
        }
        Ok(loss)
    }

    /// A pipeline takes all microbatches at once. What both its ends have is added up before replicas are.
    fn pass_through_stages(&mut self, batches: &[Batch], scale: f32) -> Result<f64, Fault> {
        let (shards, store) = self.shared();
        shards.begin_pass(shards::Pass::Last, store)?;
        let loss = self.accumulate_staged(batches, scale)?;
        let Learner { shards, store, mesh, spreads, .. } = self;
        let shards = shards.as_mut().expect("ranks share the state");
        shards.end_units(store, spreads)?;
        stages::sum_ends(mesh, store, spreads)?;
        shards.end_pass(store)?;
        Ok(loss)
    }

    /// Squared norm of the whole gradient of all ranks. Stages that share no state add the squares of
    /// parameters in the order of the whole model, so that a pipeline changes no bit; granules of shared
    /// state are added in their own order, so that sharing changes none.
    fn squared_norm_over_ranks(&mut self) -> Result<f64, Fault> {
        if self.is_staged() && self.mesh.size(Axis::Fsdp) == 1 {
            return self.squared_norm_of_stages();
        }
        let Learner { shards, store, spreads, .. } = self;
        shards.as_ref().expect("ranks share the state").squared_norm(store, spreads)
    }

    fn shared(&mut self) -> (&mut Shards, &mut ParamStore) {
        (self.shards.as_mut().expect("ranks share the state"), &mut self.store)
    }

    /// Squared norm of the whole gradient.
    fn squared_norm(&mut self) -> Result<f64, Fault> {
        for param in self.store.refs() {
            self.store.finish_grad(NORM, param)?;
        }
        // All of them are here: a GPU is waited for once.
        let grads: Vec<View<'_>> = self.store.refs().map(|param| self.store.final_grad(param)).collect();
        Ok(kernels::global_norm::sums_of_squares(&grads).into_iter().sum())
    }

    fn update_all(&mut self, done: StepDone, plan: StepPlan) -> Result<(), Fault> {
        if !done.applied {
            return Ok(());
        }
        let factor = clipped(done.grad_norm, plan.clip);
        if self.defers(plan) {
            self.pending.put(&self.store, plan.lr, factor);
            return Ok(());
        }
        self.optimizer.update_all(&mut self.store, plan.lr, factor)
    }

    /// The last microbatch, the norm and the update; `before` is the loss so far and the learned
    /// targets of the step.
    fn finish_paged(
        &mut self,
        batch: &Batch,
        (before, learned): (f64, usize),
        plan: StepPlan,
    ) -> Result<StepDone, Fault> {
        let learned = learned.max(1) as f64;
        // Updates may begin once the loss is known to be finite, which is before the way back.
        let early = Cell::new(false);
        let mut finisher = Finisher::new(&self.store, &self.optimizer, (&early, plan.lr));
        let (tokens, share) = (tokens_of(batch), batch.learned as f32 / learned as f32);
        let (pending, optimizer) = (&mut self.pending, &self.optimizer);
        let mut watch = |moment: &Moment<'_>, store: &mut ParamStore| {
            pending.before(moment, optimizer, store)?;
            finisher.moment(moment, store)
        };
        let mut tape = Tape::recording(&mut self.store).watched_by(&mut watch);
        tape.set_share(share);
        let hidden = self.model.hidden(&mut tape, &tokens, self.recompute)?;
        let targets = Targets { ids: &batch.targets, scale: 1.0 / learned as f32 };
        let losses = self.model.loss(&mut tape, &hidden, targets, batch.b)?;
        drop(hidden);
        let loss = (before + sum(&losses)) / learned;
        early.set(plan.clip.is_infinite() && loss.is_finite());
        tape.backward()?;
        self.loads.append(&mut tape.loads);
        drop(tape);
        let Ended { squares, updated } = finisher.end(&mut self.store)?;
        let done = done(loss, squares.iter().sum());
        if !updated.contains(&true) {
            self.update_all(done, plan)?;
            return Ok(done);
        }
        if !done.applied {
            return Err(half_applied(&self.store, &squares));
        }
        for (chunk, _) in chunks(&self.store).zip(updated).filter(|(_, updated)| !updated) {
            self.optimizer.update(&mut self.store, chunk, plan.lr, 1.0)?;
        }
        Ok(done)
    }
}

/// Rounds and sums gradients, and updates chunks, as they become final in the pass of a last microbatch.
struct Finisher<'a> {
    optimizer: &'a AdamW,
    /// Whether chunks may be updated at once, and the learning rate.
    update: (&'a Cell<bool>, f32),
    finals: Finals,
    /// By parameter: squared norm of its gradient, once that is final.
    squares: Vec<Option<f64>>,
    chunks: Vec<Range<usize>>,
    /// By chunk: whether it was updated.
    updated: Vec<bool>,
}

/// What a pass came to.
struct Ended {
    /// By parameter: squared norm of its gradient.
    squares: Vec<f64>,
    /// By chunk: whether it was updated.
    updated: Vec<bool>,
}

impl<'a> Finisher<'a> {
    fn new(store: &ParamStore, optimizer: &'a AdamW, update: (&'a Cell<bool>, f32)) -> Finisher<'a> {
        let (params, chunks) = (store.refs().count(), chunks(store).collect::<Vec<_>>());
        Finisher {
            optimizer,
            update,
            finals: Finals::new(params),
            squares: vec![None; params],
            updated: vec![false; chunks.len()],
            chunks,
        }
    }

    /// A moment is about to run; the one before has ended: sum what is final, and update the chunks that
    /// are complete.
    fn moment(&mut self, moment: &Moment<'_>, store: &mut ParamStore) -> Result<(), Fault> {
        let finals = self.finals.settle();
        finals.iter().try_for_each(|param| self.sum(*param, store))?;
        if self.update.0.get() {
            for param in finals {
                store.pieces_of(param).try_for_each(|chunk| self.update(chunk, store))?;
            }
        }
        self.finals.enter(moment);
        Ok(())
    }

    fn sum(&mut self, param: ParamRef, store: &mut ParamStore) -> Result<(), Fault> {
        store.finish_grad(NORM, param)?;
        self.squares[param.index()] = Some(squared_norm(store, param));
        let rounds = store.rounds_grads();
        for chunk in store.pieces_of(param).filter(|_| rounds) {
            let elements = self.chunks[chunk].clone();
            if self.squares_in(&elements, store).is_some() {
                store.forget_sums(elements)?;
            }
        }
        Ok(())
    }

    /// Squares of the gradients of all parameters in `elements`, once they are final.
    fn squares_in(&self, elements: &Range<usize>, store: &ParamStore) -> Option<Vec<f64>> {
        store.params_in(elements).map(|param| self.squares[param.index()]).collect()
    }

    fn update(&mut self, chunk: usize, store: &mut ParamStore) -> Result<(), Fault> {
        let elements = self.chunks[chunk].clone();
        // Not all of them are final yet.
        let Some(squares) = self.squares_in(&elements, store) else { return Ok(()) };
        if !squares.iter().all(|squares| squares.is_finite()) {
            self.update.0.set(false);
            return Ok(());
        }
        if !std::mem::replace(&mut self.updated[chunk], true) {
            self.optimizer.update(store, elements, self.update.1, 1.0)?;
        }
        Ok(())
    }

    /// The pass is over: sum what nobody wrote or was not known to be final.
    fn end(mut self, store: &mut ParamStore) -> Result<Ended, Fault> {
        store.settle_grads()?;
        for param in store.refs() {
            if self.squares[param.index()].is_none() {
                self.sum(param, store)?;
            }
        }
        Ok(Ended { squares: self.squares.into_iter().flatten().collect(), updated: self.updated })
    }
}

/// Factor of gradients whose norm may not be larger than `clip`.
fn clipped(norm: f64, clip: f64) -> f32 {
    if norm > clip { (clip / norm) as f32 } else { 1.0 }
}

fn done(loss: f64, squares: f64) -> StepDone {
    let grad_norm = squares.sqrt();
    StepDone { loss, grad_norm, applied: loss.is_finite() && grad_norm.is_finite() }
}

fn half_applied(store: &ParamStore, squares: &[f64]) -> Fault {
    let param = store.refs().find(|param| !squares[param.index()].is_finite());
    let param = param.map_or("the loss".into(), |param| store.spec(param).name.clone());
    Fault::outside(HalfApplied { param })
}

/// Elements of each chunk of the flat arrays.
pub(crate) fn chunks(store: &ParamStore) -> impl Iterator<Item = Range<usize>> + use<> {
    store.arrays().pieces(0..store.flat_len())
}
