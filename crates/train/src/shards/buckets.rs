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
use crate::finals::Finals;
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
    /// Which gradients of this pass are final.
    finals: Finals,
    /// By stripe: parameters whose gradient is not final.
    left: Vec<usize>,
    states: Vec<State>,
    /// By stripe: sums of the microbatches before.
    kept: Vec<Kept>,
    /// By stripe: whether those lie in our granule itself, over tiers, until a moment writes in it.
    laid: Vec<bool>,
    /// Whether this pass is the last of its step; where units set out, whether all of them have.
    last: bool,
    /// Whether stripes set out before the pass has ended. Stages of a pipeline have several microbatches
    /// under way: a gradient is final when all of them have had their way back. Over tiers a stripe that
    /// is under way could not leave: there it is added up at once, while it is at hand.
    early: bool,
    /// Of stages that share gradients: what each unit writes sets out when that is final.
    units: Option<Units>,
    /// Of such a unit: gradients the moment at hand writes.
    writing: Vec<ParamRef>,
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
            finals: Finals::new(spans.len()),
            writing: Vec::new(),
            left: members.clone(),
            states: (0..count).map(|_| State::Open).collect(),
            kept: (0..count).map(|_| None).collect(),
            laid: vec![false; count],
            last: true,
            early: !staged,
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
        self.finals = Finals::new(self.spans.len());
        self.left.clone_from(&self.members);
        self.states.iter_mut().for_each(|state| *state = State::Open);
        self.writing.clear();
        self.set_out = Default::default();
        match self.common.shares(Zero::Two) {
            // Our granules have the sums.
            true if store.arrays().is_paged() => store.renew_grads(),
            // What the microbatch before wrote is in the sums.
            true => store.clear_grads()?,
            false => {}
        }
        Ok(())
    }

    /// A moment is about to run: make room for the gradients it writes.
    pub fn enter(&mut self, moment: &Moment<'_>, store: &mut ParamStore) -> Result<(), Fault> {
        if self.layer != moment.layer {
            self.turn_to(moment.layer)?;
        }
        if self.units.is_some() {
            return self.enter_unit(moment, store);
        }
        if moment.writes_grads {
            for param in moment.params {
                for stripe in self.spans[param.index()].clone() {
                    self.bring(stripe, moment.about(SUM.op), store)?;
                }
            }
        }
        if self.early {
            self.finals.enter(moment);
        }
        Ok(())
    }

    /// The same in a unit of a pipeline: what the one before wrote there has gone first.
    fn enter_unit(&mut self, moment: &Moment<'_>, store: &mut ParamStore) -> Result<(), Fault> {
        self.units.iter_mut().for_each(|units| units.enter(moment));
        if moment.phase == Phase::Backward || moment.writes_grads {
            self.writing.extend(moment.params);
        }
        if moment.writes_grads {
            let spans = moment.params.iter().map(|param| self.spans[param.index()].clone());
            for stripe in spans.collect::<Vec<_>>().into_iter().flatten() {
                self.finish(stripe)?;
                self.states[stripe] = State::Open;
                self.bring(stripe, moment.about(SUM.op), store)?;
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

    /// Make room for the gradients of a stripe.
    fn bring(&mut self, stripe: usize, about: About, store: &mut ParamStore) -> Result<(), Fault> {
        assert!(
            matches!(self.states[stripe], State::Open),
            "stripe {stripe} of the gradients is written after it was added up"
        );
        if !self.common.shares(Zero::Two) {
            return Ok(());
        }
        if std::mem::take(&mut self.laid[stripe]) {
            let elements = self.common.own(store, stripe);
            let need = Need { class: Class::Grad, elements: elements.clone(), access: Access::Read };
            store.bring(about, &[need])?;
            let mut sum = Array::new(store.device(), DType::F32, elements.len())?;
            device::copy(sum.view_mut(), store.arrays().view(Class::Grad, elements));
            self.kept[stripe] = Some(sum);
        }
        store.arrays_mut().open_stripe(Class::Grad, stripe);
        Ok(())
    }

    /// The moment at hand has ended: stripes whose gradients are all final set out.
    pub fn settle(&mut self, store: &mut ParamStore) -> Result<(), Fault> {
        if let Some(units) = &mut self.units {
            let params = std::mem::take(&mut self.writing);
            let gone = units.settle(params.into_iter().map(ParamRef::index));
            return gone.into_iter().try_for_each(|stripe| self.unit_sets_out(stripe, store));
        }
        for param in self.finals.settle() {
            store.settle_grad(param)?;
            for stripe in self.spans[param.index()].clone() {
                self.left[stripe] -= 1;
                if self.left[stripe] == 0 && self.reduces() {
                    self.start(stripe, trace::Phase::Backward, store)?;
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
        self.reach(stripe, trace::Phase::Backward, Access::ReadWrite, store)?;
        let start = stripe * self.common.stripes.stripe();
        store.clear_unwritten(start..start + self.common.stripes.stripe());
        self.start(stripe, trace::Phase::Backward, store)
    }

    /// Over tiers: have our granule of the gradients at hand.
    fn reach(
        &self,
        stripe: usize,
        phase: trace::Phase,
        access: Access,
        store: &mut ParamStore,
    ) -> Result<(), Fault> {
        let need = |class| Need { class, elements: self.common.own(store, stripe), access };
        let needs = [need(Class::Grad), need(Class::Grad16)];
        let rounds = store.rounds_grads() && self.last && access == Access::ReadWrite;
        // Granules of others are where ops compute.
        let phase = if self.common.shares(Zero::Two) { trace::Phase::Backward } else { phase };
        store.bring(About { phase, ..SUM }, &needs[..1 + usize::from(rounds)])
    }

    /// All units have ended: the sums of our granules become our gradients, and those of parameters that
    /// are `whole` come together.
    pub fn end_units(&mut self, whole: &[ParamRef], store: &mut ParamStore) -> Result<(), Fault> {
        if self.units.is_none() {
            return store.settle_grads();
        }
        for stripe in 0..self.states.len() {
            self.finish(stripe)?;
            self.states[stripe] = State::Open;
            if std::mem::take(&mut self.laid[stripe]) {
                continue;
            }
            self.reach(stripe, trace::Phase::Backward, Access::Write, store)?;
            let own = self.common.own(store, stripe);
            let granule = store.arrays_mut().view_mut(Class::Grad, own.clone());
            match self.kept[stripe].take() {
                Some(sum) => device::copy(granule, sum.view().narrow(0, own.len())),
                None => device::fill_zero(granule),
            }
        }
        let mut stripes: Vec<usize> =
            whole.iter().flat_map(|param| self.spans[param.index()].clone()).collect();
        stripes.dedup();
        for stripe in stripes {
            self.reach(stripe, trace::Phase::Backward, Access::Read, store)?;
            store.arrays_mut().open_stripe(Class::Grad, stripe);
            let mut stretch = store.arrays_mut().lend_stripe(Class::Grad, stripe);
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
        // After units our granules are all there is.
        if self.units.is_none() {
            for stripe in &open {
                self.bring(*stripe, SUM, store)?;
            }
            store.settle_grads()?;
        }
        open.into_iter().try_for_each(|stripe| self.start(stripe, trace::Phase::Optimizer, store))?;
        for stripe in 0..self.states.len() {
            self.finish(stripe)?;
        }
        Ok(())
    }

    /// A stripe's gradients are final: add them up, beside what comes next; where chunks come and go at
    /// once, while our granule is at hand. `phase` says where that is: on the way back where ops compute,
    /// there the sum of this rank was written.
    fn start(&mut self, stripe: usize, phase: trace::Phase, store: &mut ParamStore) -> Result<(), Fault> {
        let (sums, last) = (self.sums[stripe].clone(), self.last);
        let (paged, rounds) = (store.arrays().is_paged(), store.rounds_grads() && last);
        let Common { mesh, stripes, sharding } = &self.common;
        let (own, shared) = (stripes.index, self.common.shares(Zero::Two));
        // Units have scattered theirs before the last sum.
        let scatters = stripes.ranks > 1 && !(self.units.is_some() && last);
        if paged {
            self.states[stripe] = State::Done;
            let idle = sums.runs.is_empty() && !shared && !rounds;
            if idle || (!scatters && self.common.own(store, stripe).is_empty()) {
                return Ok(());
            }
            self.reach(stripe, phase, Access::ReadWrite, store)?;
        }
        let fsdp = scatters.then(|| self.common.fsdp());
        let beyond = sums.axes.iter().filter(|_| last).map(|axis| mesh.group(*axis));
        let groups: Vec<Group> = fsdp.into_iter().chain(beyond).collect();
        let mut stretch = store.arrays_mut().lend_stripe(Class::Grad, stripe);
        let kept = self.kept[stripe].take();
        let add_up = move |groups: &[Group]| {
            if scatters {
                groups[0].reduce_scatter_sum_within(stretch.view_mut(DType::F32))?;
            }
            if shared {
                stretch.send_away_but(own);
            }
            let mut granule = stretch.granule_mut(own, DType::F32);
            if let Some(kept) = &kept {
                let granule = granule.reborrow().narrow(0, kept.len);
                rank_sum(&mut [Part::Term(kept.view()), Part::TermAndSum(granule)]);
            }
            if last {
                sums.over(&groups[usize::from(scatters)..], granule.reborrow())?;
            } else if !paged {
                let new = || Array::new(granule.device(), DType::F32, granule.len());
                let mut sum = kept.map_or_else(new, Ok)?;
                device::copy(sum.view_mut(), granule.as_view());
                return Ok(Some(sum));
            }
            if rounds && !paged {
                kernels::elementwise::round_to_bf16(granule);
            }
            Ok(None)
        };
        if paged {
            add_up(&groups)?;
            self.laid[stripe] = !last && !self.common.own(store, stripe).is_empty();
            if rounds {
                let elements = self.common.own(store, stripe);
                store.round(elements.clone());
                store.forget_sums(elements)?;
            }
            return Ok(());
        }
        self.states[stripe] = State::Under(start_beside(&groups, add_up)?);
        self.set_out[1].push(stripe);
        match sharding.overlap {
            true => Ok(()),
            false => self.finish(stripe),
        }
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
