//! Weights that are gathered before moments need them and leave behind them (ZeRO 3).
//!
//! Walked layer by layer: while one layer runs, the stripes of the next are under way, and those of
//! the one before are gone. Which layer needs what, and which comes next, is known from the pass
//! before; in a first pass stripes are gathered when they are needed.

use super::{Common, Pass};
use dist::Underway;
use dist::cost::Zero;
use memory::Class;
use std::ops::Range;
use tensor::{Fault, Moment, ParamStore};

/// Where the foreign granules of a stripe are.
enum State {
    Away,
    Coming(Underway<()>),
    Here,
}

/// A run of moments of one layer, and the stripes they need, in the order they do first.
#[derive(Clone, Debug)]
struct Stay {
    layer: usize,
    stripes: Vec<usize>,
}

pub(super) struct Gathers {
    common: Common,
    /// Whether weights are shared at all.
    active: bool,
    /// By parameter.
    spans: Vec<Range<usize>>,
    /// By stripe.
    states: Vec<State>,
    /// Of the last pass of each kind: looking, learning.
    known: [Vec<Stay>; 2],
    /// Which of them is followed, while this pass is like it.
    following: Option<usize>,
    /// This pass up to now.
    stays: Vec<Stay>,
}

fn kind(pass: Pass) -> usize {
    usize::from(pass != Pass::Running)
}

impl Gathers {
    pub fn new(common: Common, store: &ParamStore) -> Gathers {
        let (stripes, active) = (common.stripes, common.shares(Zero::Three));
        let states = (0..stripes.count(store.flat_len())).map(|_| State::Away).collect();
        let spans = store.refs().map(|param| stripes.of(&store.range(param))).collect();
        Gathers {
            common,
            active,
            spans,
            states,
            known: Default::default(),
            following: None,
            stays: Vec::new(),
        }
    }

    pub fn begin(&mut self, pass: Pass) {
        self.following = Some(kind(pass));
        self.stays.clear();
    }

    /// Make the weights of a moment about to run whole.
    pub fn enter(&mut self, moment: &Moment<'_>, store: &mut ParamStore) -> Result<(), Fault> {
        if !self.active || !moment.reads_weights {
            return Ok(());
        }
        if self.stays.last().is_none_or(|stay| stay.layer != moment.layer) {
            self.turn_to(moment.layer, store)?;
        }
        let stripes: Vec<usize> =
            moment.params.iter().flat_map(|param| self.spans[param.index()].clone()).collect();
        for stripe in &stripes {
            if let Some(stay) = self.stays.last_mut().filter(|stay| !stay.stripes.contains(stripe)) {
                stay.stripes.push(*stripe);
            }
        }
        if store.arrays().is_paged() {
            return self.gather_here(stripes, moment, store);
        }
        for stripe in stripes {
            self.start(stripe, store)?;
            self.finish(stripe)?;
        }
        Ok(())
    }

    /// Gather what is away of some stripes, each named once or more.
    fn gather_here(
        &mut self,
        mut stripes: Vec<usize>,
        moment: &Moment<'_>,
        store: &mut ParamStore,
    ) -> Result<(), Fault> {
        stripes.retain(|stripe| {
            matches!(std::mem::replace(&mut self.states[*stripe], State::Here), State::Away)
        });
        match stripes.is_empty() {
            true => Ok(()),
            false => self.common.gather_here(store, moment, &stripes),
        }
    }

    /// A layer begins: what neither it nor the next one needs leaves, what they lack sets out.
    fn turn_to(&mut self, layer: usize, store: &mut ParamStore) -> Result<(), Fault> {
        let at = self.stays.len();
        self.following =
            self.following.filter(|kind| self.known[*kind].get(at).is_some_and(|k| k.layer == layer));
        let known = self.following.map_or(&[][..], |kind| &self.known[kind][at..]);
        let coming: Vec<usize> = known.iter().take(2).flat_map(|stay| stay.stripes.iter().copied()).collect();
        // Not knowing what this layer needs, keep what it may share with the one before.
        let kept: &[usize] = match (self.following, self.stays.last()) {
            (None, Some(before)) => &before.stripes,
            _ => &coming,
        };
        let leaving: Vec<usize> = (0..self.states.len()).filter(|stripe| !kept.contains(stripe)).collect();
        self.stays.push(Stay { layer, stripes: Vec::new() });
        for stripe in leaving {
            self.release(stripe, store)?;
        }
        if self.common.sharding.overlap && !store.arrays().is_paged() {
            coming.into_iter().try_for_each(|stripe| self.start(stripe, store))?;
        }
        Ok(())
    }

    fn start(&mut self, stripe: usize, store: &mut ParamStore) -> Result<(), Fault> {
        if matches!(self.states[stripe], State::Away) {
            self.states[stripe] = State::Coming(self.common.gather(store, stripe)?);
        }
        Ok(())
    }

    fn finish(&mut self, stripe: usize) -> Result<(), Fault> {
        if let State::Coming(under) = std::mem::replace(&mut self.states[stripe], State::Here) {
            under.finish()?;
        }
        Ok(())
    }

    fn release(&mut self, stripe: usize, store: &mut ParamStore) -> Result<(), Fault> {
        if matches!(self.states[stripe], State::Away) {
            return Ok(());
        }
        self.finish(stripe)?;
        store.arrays_mut().close_stripe(Class::Param, stripe);
        self.states[stripe] = State::Away;
        Ok(())
    }

    pub fn end(&mut self, pass: Pass) {
        self.known[kind(pass)] = std::mem::take(&mut self.stays);
    }

    /// Everything that is gathered leaves.
    pub fn release_all(&mut self, store: &mut ParamStore) -> Result<(), Fault> {
        (0..self.states.len()).try_for_each(|stripe| self.release(stripe, store))
    }
}
