//! The work of one rank of a pipeline: it executes the list of actions that the schedule gives its
//! stage, forwards and backwards of several microbatches and the messages between neighbours. Which
//! action comes when is decided in `dist::pipeline`; nothing here knows one schedule from another.
//!
//! Messages are beside computation: a receive is asked for before the unit that runs before it is
//! needed, and a send does not wait for its receiver.

use crate::learner::{Learner, sum, tokens_of};
use crate::optimizer::squared_norm;
use crate::shards::{self, Shards};
use crate::step::NORM;
use crate::{balance, ranks};
use data::Batch;
use device::{Buffer, DType, Device};
use dist::pipeline::{Action, Message, Payload, Pipeline, PipelineError, Schedule, Unit, Work};
use dist::{Array, Axis, Group, Mesh, Pending, Sending};
use memory::pager::About;
use memory::trace::{self, Access};
use memory::{Class, Need};
use model::{Model, Recompute, Spread, Tokens};
use std::cell::RefCell;
use std::collections::HashMap;
use tensor::{Fault, Later, Load, Moment, ParamStore, Recorded, Tape, Targets, Tensor};

/// Validation batches under way at most, for each stage: so many activations may wait for the next one.
const VALIDATED_AT_ONCE: usize = 4;

impl Learner {
    /// Whether this learner has one stage of several.
    pub(crate) fn is_staged(&self) -> bool {
        self.mesh.size(Axis::Pp) > 1
    }

    /// `accumulate` for all microbatches of a step at once, through all stages.
    pub(crate) fn accumulate_staged(&mut self, batches: &[Batch], scale: f32) -> Result<f64, Fault> {
        let list = self.actions(batches.len(), Pipeline::actions)?;
        let of = |batch| Ok(Microbatch::of(batch, self.share(batch, scale)?));
        let microbatches = batches.iter().map(of).collect::<Result<Vec<_>, Fault>>()?;
        let mesh = self.mesh.clone();
        let shards = RefCell::new(self.shards.as_mut().expect("stages are ranks of a mesh"));
        let (pending, optimizer) = (&mut self.pending, &self.optimizer);
        let mut watch = |moment: &Moment<'_>, store: &mut ParamStore| {
            mesh.set_layer(moment.layer as u32);
            pending.before(moment, optimizer, store)?;
            shards.borrow_mut().moment(moment, store)
        };
        let tape = Tape::recording(&mut self.store).watched_by(&mut watch);
        let mut stage =
            Worker::new(&self.model, (&mesh, &shards), tape, (&microbatches, scale), self.recompute);
        stage.run(&list)?;
        let Ended { losses, loads, peak_live } = stage.end()?;
        self.peak_live = peak_live;
        if self.model.has_experts() {
            self.loads.append(&mut balance::of_stages(&mesh, loads)?);
        }
        let mut loss = 0.0;
        for losses in losses {
            loss += ranks::sum_of_losses(&mesh, &losses)?;
        }
        last_says(&mesh, loss)
    }

    /// Sum of the losses of each of some batches without learning from them, on every stage.
    pub(crate) fn evaluate_staged(&mut self, batches: &[&Batch]) -> Result<Vec<f64>, Fault> {
        let (mesh, stages) = (self.mesh.clone(), self.mesh.size(Axis::Pp));
        let mut all = Vec::with_capacity(batches.len());
        for some in batches.chunks(VALIDATED_AT_ONCE * stages) {
            // Interleaved schedules walk whole groups: what a last one lacks is left out of its lists.
            let whole = some.len().next_multiple_of(stages);
            let list = self.actions(whole, |pipeline| pipeline.forwards(some.len()))?;
            let microbatches: Vec<_> = some.iter().map(|batch| Microbatch::of(batch, 0.0)).collect();
            let losses = self.look_staged(&microbatches, &list)?;
            let losses = if losses.is_empty() { vec![0.0; some.len()] } else { losses };
            all.extend(over_stages(&mesh, &losses)?.pop().into_iter().flatten());
        }
        Ok(all)
    }

    /// Forwards alone; the sum of the losses of each microbatch on the last stage.
    fn look_staged(&mut self, microbatches: &[Microbatch<'_>], list: &[Action]) -> Result<Vec<f64>, Fault> {
        let Learner { model, store, shards, mesh, .. } = self;
        let shards = shards.as_mut().expect("stages are ranks of a mesh");
        shards.begin_pass(shards::Pass::Running, store)?;
        let told = RefCell::new(&mut *shards);
        let mut watch = |moment: &Moment<'_>, store: &mut ParamStore| told.borrow_mut().moment(moment, store);
        let tape = Tape::running(store).watched_by(&mut watch);
        let mut stage = Worker::new(model, (mesh, &told), tape, (microbatches, 1.0), Recompute::Never);
        stage.run(list)?;
        let losses = stage.end()?.losses.iter().map(sum).collect();
        shards.end_pass(store)?;
        Ok(losses)
    }

    /// Squared norm of the whole gradient, parameter by parameter: every rank adds the pieces it is the
    /// first to hold.
    pub(crate) fn squared_norm_of_stages(&mut self) -> Result<f64, Fault> {
        let (places, len) = &self.places;
        let mut squares = vec![0.0; *len];
        for ((param, spread), place) in self.store.refs().zip(&self.spreads).zip(places) {
            if ranks::is_first_but(&self.mesh, spread, Axis::Fsdp) {
                let elements = self.store.range(param);
                let class = self.store.final_class();
                self.store.bring(NORM, &[Need { class, elements, access: Access::Read }])?;
                squares[*place] = squared_norm(&self.store, param);
            }
        }
        let stages = over_stages(&self.mesh, &squares)?;
        let squares = (0..*len).map(|place| stages.iter().map(|squares| squares[place]).sum::<f64>()).sum();
        let others: Vec<Axis> = Axis::ALL.into_iter().filter(|axis| *axis != Axis::Pp).collect();
        ranks::sum_over(&self.mesh, &others, squares)
    }

    /// Most (microbatch, slice) pairs whose values this rank held at once in its last step.
    pub fn peak_live(&self) -> usize {
        self.peak_live
    }

    /// This stage's list among those that `of` takes from the pipeline.
    fn actions(
        &self,
        microbatches: usize,
        of: impl Fn(&Pipeline) -> Vec<Vec<Action>>,
    ) -> Result<Vec<Action>, Fault> {
        let pipeline = pipeline_of(&self.mesh, microbatches, self.schedule).map_err(Fault::outside)?;
        Ok(of(&pipeline).swap_remove(self.mesh.coord(Axis::Pp)))
    }
}

/// The pipeline of a step on a mesh.
pub(crate) fn pipeline_of(
    mesh: &Mesh,
    microbatches: usize,
    schedule: Schedule,
) -> Result<Pipeline, PipelineError> {
    Pipeline::new(mesh.size(Axis::Pp), microbatches, schedule)
}

/// Rows that walk the stages together.
struct Microbatch<'a> {
    batch: &'a Batch,
    tokens: Tokens,
    /// The part of the step's targets it has, over all replicas.
    share: f32,
}

impl<'a> Microbatch<'a> {
    fn of(batch: &'a Batch, share: f32) -> Microbatch<'a> {
        Microbatch { batch, tokens: tokens_of(batch), share }
    }
}

/// What a stage has when its list is done.
struct Ended {
    /// Of each microbatch, on the last stage.
    losses: Vec<Tensor>,
    /// What fell on the experts of this stage, with the microbatch it was.
    loads: Vec<(usize, Load)>,
    /// Most microbatches and slices held at once.
    peak_live: usize,
}

/// One stage at work.
struct Worker<'a> {
    model: &'a Model,
    /// The stages; member i is stage i.
    group: Group,
    /// Told of units here, of moments by the tape.
    shards: &'a RefCell<&'a mut Shards>,
    tape: Tape<'a>,
    microbatches: &'a [Microbatch<'a>],
    /// Factor of the summed losses.
    scale: f32,
    recompute: Recompute,
    asked: HashMap<Message, Pending>,
    arrived: HashMap<Message, Tensor>,
    /// What the last unit made for another stage.
    made: Option<(Payload, usize, Tensor)>,
    sending: Vec<Sending>,
    /// Forwards whose backward is still to come, by microbatch and chunk.
    recorded: HashMap<(usize, usize), Recorded>,
    /// Gradients of weights that were put off.
    later: HashMap<(usize, usize), Later>,
    /// Of each microbatch, on the last stage.
    losses: Vec<Tensor>,
    /// What fell on experts, with the microbatch.
    loads: Vec<(usize, Load)>,
    live: usize,
    peak_live: usize,
}

impl<'a> Worker<'a> {
    fn new(
        model: &'a Model,
        (mesh, shards): (&Mesh, &'a RefCell<&'a mut Shards>),
        tape: Tape<'a>,
        (microbatches, scale): (&'a [Microbatch<'a>], f32),
        recompute: Recompute,
    ) -> Worker<'a> {
        Worker {
            model,
            group: mesh.group(Axis::Pp),
            shards,
            tape,
            microbatches,
            scale,
            recompute,
            asked: HashMap::new(),
            arrived: HashMap::new(),
            made: None,
            sending: Vec::new(),
            recorded: HashMap::new(),
            later: HashMap::new(),
            losses: Vec::new(),
            loads: Vec::new(),
            live: 0,
            peak_live: 0,
        }
    }

    fn run(&mut self, list: &[Action]) -> Result<(), Fault> {
        for (i, action) in list.iter().enumerate() {
            match action {
                Action::Run(unit) => {
                    for next in list[i + 1..].iter().take_while(|next| !matches!(next, Action::Run(_))) {
                        if let Action::Recv { message, from } = next {
                            self.ask(*message, *from)?;
                        }
                    }
                    self.unit(*unit)?;
                }
                Action::Send { message, to } => self.send(*message, *to)?,
                Action::Recv { message, from } => self.receive(*message, *from)?,
            }
        }
        Ok(())
    }

    fn end(self) -> Result<Ended, Fault> {
        let left = self.recorded.len() + self.later.len() + self.arrived.len() + self.asked.len();
        assert!(left == 0 && self.made.is_none(), "the list of a stage ends with everything done");
        self.sending.into_iter().try_for_each(Sending::finish)?;
        Ok(Ended { losses: self.losses, loads: self.loads, peak_live: self.peak_live })
    }

    fn ask(&mut self, message: Message, from: usize) -> Result<(), Fault> {
        let [rows, cols] = self.model.stream_shape(&self.microbatches[message.microbatch].tokens);
        let (device, dtype) = (self.tape.params.device(), self.tape.params.dtype());
        let pending = self.group.start_receive((device, dtype, rows * cols), from)?;
        self.asked.insert(message, pending);
        Ok(())
    }

    fn receive(&mut self, message: Message, from: usize) -> Result<(), Fault> {
        if !self.asked.contains_key(&message) {
            self.ask(message, from)?;
        }
        let Some(pending) = self.asked.remove(&message) else { unreachable!("asked for above") };
        let shape = self.model.stream_shape(&self.microbatches[message.microbatch].tokens);
        let Array { buffer, dtype, .. } = pending.finish()?;
        self.arrived.insert(message, Tensor::from_buffer(buffer, dtype, &shape));
        Ok(())
    }

    fn send(&mut self, message: Message, to: usize) -> Result<(), Fault> {
        let (payload, microbatch, value) =
            self.made.take().expect("what is sent was made by the unit before");
        assert_eq!((payload, microbatch), (message.payload, message.microbatch), "the unit before made it");
        let (dtype, len) = (value.dtype(), value.len());
        let data = Array { buffer: value.into_buffer()?, dtype, len };
        self.sending.push(self.group.start_send(data, to)?);
        Ok(())
    }

    fn take(&mut self, payload: Payload, Unit { microbatch, chunk, .. }: Unit) -> Tensor {
        let message = Message { payload, microbatch, chunk };
        self.arrived.remove(&message).unwrap_or_else(|| panic!("{message} has not been received"))
    }

    fn unit(&mut self, unit: Unit) -> Result<(), Fault> {
        assert!(self.made.is_none(), "what the unit before made was not sent");
        self.shards.borrow_mut().begin_unit(unit);
        match unit.work {
            Work::Forward => self.forward(unit)?,
            Work::Backward | Work::BackwardInput => self.backward(unit)?,
            Work::BackwardWeight => {
                let later = self.later.remove(&(unit.microbatch, unit.chunk));
                self.tape.form(later.expect("weights follow inputs"))?;
                self.live -= 1;
            }
        }
        self.shards.borrow_mut().end_unit(self.tape.params)
    }

    fn forward(&mut self, unit: Unit) -> Result<(), Fault> {
        let Unit { microbatch, chunk, .. } = unit;
        let model = self.model;
        let slice = &model.stage().slices[chunk];
        let Microbatch { batch, tokens, share } = &self.microbatches[microbatch];
        self.tape.set_share(*share);
        let x = (!slice.first).then(|| self.take(Payload::Activation, unit));
        let x = x.map(|x| self.tape.input(x));
        if self.tape.is_recording() {
            self.live += 1;
            self.peak_live = self.peak_live.max(self.live);
        }
        let y = model.slice(&mut self.tape, slice, x.as_ref(), tokens, self.recompute)?;
        self.loads.extend(self.tape.loads.drain(..).map(|load| (microbatch, load)));
        let recorded = if slice.last {
            let targets = Targets { ids: &batch.targets, scale: self.scale };
            self.losses.push(model.loss(&mut self.tape, &y, targets, batch.b)?);
            self.tape.set_aside(x.as_ref(), None)
        } else {
            let recorded = self.tape.set_aside(x.as_ref(), Some(&y));
            self.made = Some((Payload::Activation, microbatch, y.value));
            recorded
        };
        if self.tape.is_recording() {
            self.recorded.insert((microbatch, chunk), recorded);
        }
        Ok(())
    }

    fn backward(&mut self, unit: Unit) -> Result<(), Fault> {
        let Unit { work, microbatch, chunk } = unit;
        let slice = &self.model.stage().slices[chunk];
        let recorded = self.recorded.remove(&(microbatch, chunk)).expect("backwards follow forwards");
        // Layers that run again ask for it; others have gone ahead meanwhile.
        self.tape.set_share(self.microbatches[microbatch].share);
        let dy = (!slice.last).then(|| self.take(Payload::Gradient, unit));
        let dx = if work == Work::BackwardInput {
            let (dx, later) = self.tape.walk_back_inputs(recorded, dy)?;
            self.later.insert((microbatch, chunk), later);
            dx
        } else {
            let dx = self.tape.walk_back(recorded, dy)?;
            self.live -= 1;
            dx
        };
        if !slice.first {
            let dx = dx.expect("what follows a stream passes a gradient on to it");
            self.made = Some((Payload::Gradient, microbatch, dx));
        }
        Ok(())
    }
}

/// Add up the gradients of parameters that the first and the last stage both have.
pub(crate) fn sum_ends(mesh: &Mesh, store: &mut ParamStore, spreads: &[Spread]) -> Result<(), Fault> {
    let shared: Vec<_> = store.refs().zip(spreads).filter(|(_, spread)| spread.both_ends).collect();
    if shared.is_empty() {
        return Ok(());
    }
    // What others share of them is where ops compute.
    let about = match mesh.size(Axis::Fsdp) {
        1 => NORM,
        _ => About { phase: trace::Phase::Backward, ..NORM },
    };
    let stages = stages_of(mesh);
    let ends = mesh.group_of("ends", &[stages[0], stages[stages.len() - 1]]);
    for (param, _) in shared {
        let elements = store.range(param);
        let need = Need { class: Class::Grad, elements: elements.clone(), access: Access::ReadWrite };
        store.bring(about, &[need])?;
        let grads = store.arrays_mut().view_mut(Class::Grad, elements);
        ends.all_reduce_sum(grads)?;
    }
    Ok(())
}

/// Ranks of the stages that this rank exchanges messages with, in order.
fn stages_of(mesh: &Mesh) -> Vec<usize> {
    mesh.shape().ranks_over(mesh.rank(), &[Axis::Pp])
}

/// `values` of every stage, in order, on every stage. They travel apart from what stages pass on, so that
/// the counters of `pp` are those of the pipeline.
pub(crate) fn over_stages(mesh: &Mesh, values: &[f64]) -> Result<Vec<Vec<f64>>, Fault> {
    let (stages, words) = (mesh.size(Axis::Pp), 4 * values.len());
    if stages == 1 {
        return Ok(vec![values.to_vec()]);
    }
    let mut mine = Buffer::new(Device::Cpu, 2 * words)?;
    let (to, _) = mine.view_mut(DType::U16, 0, words).bytes().as_chunks_mut();
    to.iter_mut().zip(values).for_each(|(to, x)| *to = x.to_ne_bytes());
    let mut all = Buffer::new(Device::Cpu, 2 * words * stages)?;
    let whole = all.view_mut(DType::U16, 0, words * stages);
    mesh.group_of("stages", &stages_of(mesh)).all_gather(mine.view(DType::U16, 0, words), whole)?;
    let bytes = all.view(DType::U16, 0, words * stages).bytes();
    let values: Vec<f64> = bytes.as_chunks().0.iter().map(|word| f64::from_ne_bytes(*word)).collect();
    Ok(values.chunks(values.len() / stages).map(<[f64]>::to_vec).collect())
}

/// `x` of the last stage, on every stage.
fn last_says(mesh: &Mesh, x: f64) -> Result<f64, Fault> {
    Ok(over_stages(mesh, &[x])?.into_iter().flatten().next_back().unwrap_or(x))
}
