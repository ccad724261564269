//! Gradients that are added up over ranks stripe by stripe, as soon as a stripe's are final, beside
//! the rest of the way back.
//!
//! A gradient is final when every use of its parameter on the way there has had its way back. First
//! the ranks of `fsdp` scatter the sum, so that each has its own granule of it; that granule is then
//! added up over whoever else has summands. Sharing gradients (ZeRO 2, 3) they do the former after
//! every microbatch and keep nothing but the sums of their granules; else microbatches are added up
//! before anything travels. A pipeline has several microbatches under way: there every unit of work is
//! what a microbatch is elsewhere (`units`).

use super::Common;
use super::units::Units;
use crate::ranks;
use device::DType;
use dist::cost::Zero;
use dist::pipeline::Unit;
use dist::{Array, Axis, CommError, Group, Underway, start_beside};
use kernels::rank_sum::{Part, rank_sum};
use memory::pager::About;
use memory::trace::{self, Access};
use memory::{Class, Need};
use model::Spread;
use std::ops::Range;
use std::sync::Arc;
use tensor::{Fault, Moment, ParamRef, ParamStore, Phase};

const SUM: About = About { phase: trace::Phase::Optimizer, op: "rank_sum", layer: 0 };

/// A run of our granule that is added up over the same axes, by their places in `Sums::axes`.
#[derive(Debug)]
struct Run {
    elements: Range<usize>,
    axes: Vec<usize>,
}

/// How our granule of a stripe is added up over ranks that do not share it.
#[derive(Debug, Default)]
struct Sums {
    axes: Vec<Axis>,
    runs: Vec<Run>,
}

/// What a reduction leaves: the sum of our granule so far, where more microbatches follow.
type Kept = Option<Array>;

enum State {
    /// Gradients of this pass are still to come.
    Open,
    Under(Underway<Kept>),
    Done,
}

pub(super) struct Buckets {
    common: Common,
    /// By parameter: stripes it lies in.
    spans: Vec<Range<usize>>,
    /// By stripe.
    sums: Vec<Arc<Sums>>,
    /// By stripe: parameters in it.
    members: Vec<usize>,
    /// By parameter: uses whose way back is still to come.
    uses: Vec<u32>,
    /// By parameter: whether its gradient of this pass is final.
    closed: Vec<bool>,
    /// By stripe: parameters whose gradient is not final.
    left: Vec<usize>,
    states: Vec<State>,
    /// By stripe: sums of the microbatches before.
    kept: Vec<Kept>,
    /// Whether this pass is the last of its step; where units set out, whether all of them have.
    last: bool,
    /// Whether stripes set out before the pass has ended. Stages of a pipeline have several microbatches
    /// under way: a gradient is final when all of them have had their way back. Over tiers a stripe that
    /// is under way could not leave: there it is added up at once, while it is at hand.
    early: bool,
    /// Of stages that share gradients: what each unit writes sets out when that is final.
    units: Option<Units>,
    /// Gradients the moment at hand writes, and whether it goes back.
    writing: (Vec<ParamRef>, bool),
    /// The layer at hand, and stripes that set out in it and in the one before.
    layer: usize,
    set_out: [Vec<usize>; 2],
}

impl Buckets {
    pub fn new(common: Common, store: &ParamStore, spreads: &[Spread]) -> Buckets {
        let stripes = common.stripes;
        let count = stripes.count(store.flat_len());
        let spans: Vec<Range<usize>> = store.refs().map(|param| stripes.of(&store.range(param))).collect();
        let mut members = vec![0; count];
        spans.iter().cloned().flatten().for_each(|stripe| members[stripe] += 1);
        let sums = (0..count).map(|stripe| Arc::new(sums_of(&common, store, spreads, stripe))).collect();
        let staged = common.mesh.size(Axis::Pp) > 1;
        Buckets {
            units: (staged && common.shares(Zero::Two)).then(|| Units::new(&spans, count)),
            uses: vec![0; spans.len()],
            closed: vec![false; spans.len()],
            left: members.clone(),
            states: (0..count).map(|_| State::Open).collect(),
            kept: (0..count).map(|_| None).collect(),
            last: true,
            early: !staged,
            writing: Default::default(),
            layer: 0,
            set_out: Default::default(),
            common,
            spans,
            sums,
            members,
        }
    }

    /// Whether gradients of this pass travel.
    fn reduces(&self) -> bool {
        self.last || self.common.shares(Zero::Two)
    }

    pub fn begin(&mut self, last: bool, store: &mut ParamStore) -> Result<(), Fault> {
        self.last = last && self.units.is_none();
        self.uses.fill(0);
        self.closed.fill(false);
        self.left.clone_from(&self.members);
        self.states.iter_mut().for_each(|state| *state = State::Open);
        self.writing.0.clear();
        self.set_out = Default::default();
        match self.common.shares(Zero::Two) {
            // What the microbatch before wrote is in the sums.
            true => store.clear_grads(),
            false => Ok(()),
        }
    }

    /// A moment is about to run: make room for the gradients it writes.
    pub fn enter(&mut self, moment: &Moment<'_>, store: &mut ParamStore) -> Result<(), Fault> {
        if self.layer != moment.layer {
            self.turn_to(moment.layer)?;
        }
        if self.units.is_some() {
            return self.enter_unit(moment, store);
        }
        match (moment.phase, moment.writes_grads) {
            (Phase::Forward, false) if self.early => {
                moment.params.iter().for_each(|param| self.uses[param.index()] += 1);
            }
            (_, true) => {
                let stripes = moment.params.iter().flat_map(|param| self.spans[param.index()].clone());
                stripes.for_each(|stripe| self.bring(stripe, store));
                if self.early {
                    self.writing.0.extend(moment.params);
                    self.writing.1 = moment.phase == Phase::Backward;
                }
            }
            _ => {}
        }
        Ok(())
    }

    /// The same in a unit of a pipeline: what the one before wrote there has gone first.
    fn enter_unit(&mut self, moment: &Moment<'_>, store: &mut ParamStore) -> Result<(), Fault> {
        self.units.iter_mut().for_each(|units| units.enter(moment));
        if moment.phase == Phase::Backward || moment.writes_grads {
            self.writing.0.extend(moment.params);
        }
        if moment.writes_grads {
            let spans = moment.params.iter().map(|param| self.spans[param.index()].clone());
            for stripe in spans.collect::<Vec<_>>().into_iter().flatten() {
                self.finish(stripe)?;
                self.states[stripe] = State::Open;
                self.bring(stripe, store);
            }
        }
        Ok(())
    }

    /// A layer begins. Where room for gradients is given back, no more than those of the layer before
    /// may be on their way beside it.
    fn turn_to(&mut self, layer: usize) -> Result<(), Fault> {
        self.layer = layer;
        if self.common.shares(Zero::Two) {
            self.set_out.swap(0, 1);
            for stripe in std::mem::take(&mut self.set_out[1]) {
                self.finish(stripe)?;
            }
        }
        Ok(())
    }

    fn bring(&self, stripe: usize, store: &mut ParamStore) {
        assert!(
            matches!(self.states[stripe], State::Open),
            "stripe {stripe} of the gradients is written after it was added up"
        );
        if self.common.shares(Zero::Two) {
            store.arrays_mut().lend_stripe(Class::Grad, stripe).bring();
        }
    }

    /// The moment at hand has ended: stripes whose gradients are all final set out.
    pub fn settle(&mut self, store: &mut ParamStore) -> Result<(), Fault> {
        let (params, back) = std::mem::take(&mut self.writing);
        if let Some(units) = &mut self.units {
            let gone = units.settle(params.into_iter().map(ParamRef::index));
            return gone.into_iter().try_for_each(|stripe| self.unit_sets_out(stripe, store));
        }
        for param in &params {
            let uses = &mut self.uses[param.index()];
            *uses -= u32::from(back);
            if *uses == 0 && !std::mem::replace(&mut self.closed[param.index()], true) {
                store.settle_grad(*param)?;
                for stripe in self.spans[param.index()].clone() {
                    self.left[stripe] -= 1;
                    if self.left[stripe] == 0 && self.reduces() {
                        match store.arrays().is_paged() {
                            // Where ops compute: there the sum of this rank was written.
                            true => self.add_up_here(stripe, store, trace::Phase::Backward)?,
                            false => self.start(stripe, store)?,
                        }
                    }
                }
            }
        }
        Ok(())
    }

    /// A unit of a pipeline begins.
    pub fn begin_unit(&mut self, unit: Unit) {
        self.units.iter_mut().for_each(|units| units.begin(unit));
    }

    /// It has ended: what it wrote was taken from every parameter, and is written anew by the next one.
    pub fn end_unit(&mut self, store: &mut ParamStore) -> Result<(), Fault> {
        self.settle(store)?;
        let Some(units) = &mut self.units else { return Ok(()) };
        units.end().into_iter().try_for_each(|stripe| self.unit_sets_out(stripe, store))?;
        store.renew_grads();
        Ok(())
    }

    /// What a unit wrote of a stripe sets out; what lies beside it there it did not write.
    fn unit_sets_out(&mut self, stripe: usize, store: &mut ParamStore) -> Result<(), Fault> {
        let start = stripe * self.common.stripes.stripe();
        store.clear_unwritten(start..start + self.common.stripes.stripe());
        self.start(stripe, store)
    }

    /// All units have ended: the sums of our granules become our gradients, and those of parameters that
    /// are `whole` come together.
    pub fn end_units(&mut self, whole: &[ParamRef], store: &mut ParamStore) -> Result<(), Fault> {
        if self.units.is_none() {
            return store.settle_grads();
        }
        let own = self.common.stripes.index;
        for stripe in 0..self.states.len() {
            self.finish(stripe)?;
            self.states[stripe] = State::Open;
            let mut stretch = store.arrays_mut().lend_stripe(Class::Grad, stripe);
            let granule = stretch.granule_mut(own, DType::F32);
            match self.kept[stripe].take() {
                Some(sum) => granule.bytes().copy_from_slice(sum.view().bytes()),
                None => device::fill_zero(granule),
            }
        }
        let mut stripes: Vec<usize> =
            whole.iter().flat_map(|param| self.spans[param.index()].clone()).collect();
        stripes.dedup();
        for stripe in stripes {
            let mut stretch = store.arrays_mut().lend_stripe(Class::Grad, stripe);
            stretch.bring();
            self.common.fsdp().all_gather_within(stretch.view_mut(DType::F32))?;
        }
        self.last = true;
        Ok(())
    }

    /// The pass has ended: what was not known to be final is so now.
    pub fn end(&mut self, store: &mut ParamStore) -> Result<(), Fault> {
        self.settle(store)?;
        if !self.reduces() {
            return Ok(());
        }
        let open: Vec<usize> =
            (0..self.states.len()).filter(|stripe| matches!(self.states[*stripe], State::Open)).collect();
        open.iter().for_each(|stripe| self.bring(*stripe, store));
        if self.units.is_none() {
            store.settle_grads()?;
        }
        if store.arrays().is_paged() {
            let mut open = open.into_iter();
            return open.try_for_each(|stripe| self.add_up_here(stripe, store, trace::Phase::Optimizer));
        }
        open.into_iter().try_for_each(|stripe| self.start(stripe, store))?;
        for stripe in 0..self.states.len() {
            self.finish(stripe)?;
        }
        Ok(())
    }

    fn start(&mut self, stripe: usize, store: &mut ParamStore) -> Result<(), Fault> {
        let Common { mesh, stripes, sharding } = &self.common;
        let sums = self.sums[stripe].clone();
        // Units have scattered theirs before the last sum.
        let scatters = stripes.ranks > 1 && !(self.units.is_some() && self.last);
        let fsdp = scatters.then(|| self.common.fsdp());
        let beyond = sums.axes.iter().filter(|_| self.last).map(|axis| mesh.group(*axis));
        let groups: Vec<Group> = fsdp.into_iter().chain(beyond).collect();
        let mut stretch = store.arrays_mut().lend_stripe(Class::Grad, stripe);
        let (own, shared, last) = (stripes.index, self.common.shares(Zero::Two), self.last);
        let rounds = store.rounds_grads();
        let kept = self.kept[stripe].take();
        let under = start_beside(&groups, move |groups| {
            if scatters {
                groups[0].reduce_scatter_sum_within(stretch.view_mut(DType::F32))?;
            }
            if shared {
                stretch.send_away_but(own);
            }
            let mut granule = stretch.granule_mut(own, DType::F32);
            if let Some(kept) = &kept {
                rank_sum(&mut [Part::Term(kept.view()), Part::TermAndSum(granule.reborrow())]);
            }
            if !last {
                let mut sum = kept.map_or_else(|| Array::new(DType::F32, granule.len()), Ok)?;
                sum.view_mut().bytes().copy_from_slice(granule.as_view().bytes());
                return Ok(Some(sum));
            }
            sums.over(&groups[usize::from(scatters)..], granule.reborrow())?;
            if rounds {
                kernels::elementwise::round_to_bf16(granule);
            }
            Ok(None)
        })?;
        self.states[stripe] = State::Under(under);
        self.set_out[1].push(stripe);
        match sharding.overlap {
            true => Ok(()),
            false => self.finish(stripe),
        }
    }

    /// The same where chunks come and go, of which our granule is one; `phase` says where.
    fn add_up_here(
        &mut self,
        stripe: usize,
        store: &mut ParamStore,
        phase: trace::Phase,
    ) -> Result<(), Fault> {
        self.states[stripe] = State::Done;
        let (sums, rounds) = (&self.sums[stripe], store.rounds_grads());
        if sums.runs.is_empty() && !rounds {
            return Ok(());
        }
        let own = self.common.stripes.own(stripe);
        let elements = own.start..own.end.min(store.flat_len());
        let need = |class| Need { class, elements: elements.clone(), access: Access::ReadWrite };
        let needs = [need(Class::Grad), need(Class::Grad16)];
        store.bring(About { phase, ..SUM }, &needs[..1 + usize::from(rounds)])?;
        let groups: Vec<Group> = sums.axes.iter().map(|axis| self.common.mesh.group(*axis)).collect();
        sums.over(&groups, store.arrays_mut().view_mut(Class::Grad, elements.clone()))?;
        if rounds {
            store.round(elements.clone());
            store.forget_sums(elements)?;
        }
        Ok(())
    }

    fn finish(&mut self, stripe: usize) -> Result<(), Fault> {
        if let State::Under(under) = std::mem::replace(&mut self.states[stripe], State::Done) {
            self.kept[stripe] = under.finish()?;
        }
        Ok(())
    }
}

impl Sums {
    /// Add a granule up; `groups` are those of `axes`.
    fn over(&self, groups: &[Group], mut granule: device::ViewMut<'_>) -> Result<(), CommError> {
        for Run { elements, axes } in &self.runs {
            for axis in axes {
                let run = granule.reborrow().narrow(elements.start, elements.len());
                groups[*axis].all_reduce_sum(run)?;
            }
        }
        Ok(())
    }
}

/// Neighbours in our granule of a stripe that are added up over the same axes travel as one.
fn sums_of(common: &Common, store: &ParamStore, spreads: &[Spread], stripe: usize) -> Sums {
    let own = common.stripes.own(stripe);
    let mut sums = Sums::default();
    for param in store.params_in(&own) {
        let range = store.range(param);
        let elements = range.start.max(own.start)..range.end.min(own.end);
        let axes = ranks::axes_of_sums(&common.mesh, &spreads[param.index()]);
        let axes: Vec<Axis> = axes.into_iter().filter(|axis| *axis != Axis::Fsdp).collect();
        if elements.is_empty() {
            continue;
        }
        let mut place = |axis: Axis| {
            let found = sums.axes.iter().position(|known| *known == axis);
            found.unwrap_or_else(|| {
                sums.axes.push(axis);
                sums.axes.len() - 1
            })
        };
        let axes: Vec<usize> = axes.into_iter().map(&mut place).collect();
        let elements = elements.start - own.start..elements.end - own.start;
        match sums.runs.last_mut() {
            Some(run) if run.axes == axes => run.elements.end = elements.end,
            _ => sums.runs.push(Run { elements, axes }),
        }
    }
    sums.runs.retain(|run| !run.axes.is_empty());
    sums
}
