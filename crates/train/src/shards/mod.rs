//! Data parallelism as one rank sees it: which part of the state is its own (ZeRO 1, 2, 3), weights
//! that come before they are needed, gradients that are added up while the way back still runs.
//!
//! The flat arrays are shared in stripes (`memory::Stripes`) among the ranks of `fsdp`; plain
//! replicas share nothing and use stripes as buckets. Whatever the stage, sums over ranks have one
//! order, so stages differ in bytes and time, not in bits. Driven by the moments of the tape; knows
//! no layer but by its number.

mod buckets;
mod gathers;
mod norm;
mod units;

use crate::optimizer::AdamW;
use buckets::Buckets;
use dist::cost::Zero;
use dist::pipeline::Unit;
use dist::{Axis, Group, Mesh, Underway, start_beside};
use gathers::Gathers;
use memory::trace::Access;
use memory::{Class, Need, Stripes};
use model::Spread;
use std::ops::Range;
use tensor::{Fault, Moment, ParamStore};

/// How ranks share the state of a run. Changes no result.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sharding {
    /// What the ranks of `fsdp` share.
    pub zero: Zero,
    /// Whether messages travel beside computation.
    pub overlap: bool,
}

impl Default for Sharding {
    fn default() -> Sharding {
        Sharding { zero: Zero::Three, overlap: true }
    }
}

impl Sharding {
    /// Classes of which a rank keeps only its own granules.
    pub(crate) fn away(&self) -> &'static [Class] {
        match self.zero {
            Zero::One => &[Class::Master, Class::M, Class::V],
            Zero::Two => &[Class::Grad, Class::Master, Class::M, Class::V],
            Zero::Three => &[Class::Param, Class::Grad, Class::Master, Class::M, Class::V],
        }
    }
}

/// What passes over a microbatch are for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Pass {
    /// Learning; more microbatches of the step follow.
    Learning,
    /// Learning, the last one of a step.
    Last,
    /// Only looking.
    Running,
}

/// One rank's part in sharing weights, gradients and optimizer state.
pub(crate) struct Shards {
    common: Common,
    gathers: Gathers,
    buckets: Buckets,
    pass: Pass,
}

/// What both directions need.
#[derive(Clone)]
struct Common {
    mesh: Mesh,
    stripes: Stripes,
    sharding: Sharding,
}

impl Common {
    fn fsdp(&self) -> Group {
        self.mesh.group(Axis::Fsdp)
    }

    /// Whether ranks share what stage `zero` shares.
    fn shares(&self, zero: Zero) -> bool {
        self.stripes.ranks > 1 && self.sharding.zero >= zero
    }

    /// Our granule of a stripe, as far as there are elements in it.
    fn own(&self, store: &ParamStore, stripe: usize) -> Range<usize> {
        let own = self.stripes.own(stripe);
        own.start..own.end.min(store.flat_len()).max(own.start)
    }

    /// Gather stripes of weights where chunks come and go, before `moment`: granules of others are buffers
    /// until the stripe is closed. At once, since ours may leave again with the next moment.
    fn gather_here(
        &self,
        store: &mut ParamStore,
        moment: &Moment<'_>,
        stripes: &[usize],
    ) -> Result<(), Fault> {
        let need = |stripe: &usize| Need {
            class: Class::Param,
            elements: self.own(store, *stripe),
            access: Access::Read,
        };
        let needs: Vec<Need> = stripes.iter().map(need).collect();
        store.bring(moment.about("gather"), &needs)?;
        let (dtype, fsdp) = (store.dtype(), self.fsdp());
        for stripe in stripes {
            store.arrays_mut().open_stripe(Class::Param, *stripe);
            let mut stretch = store.arrays_mut().lend_stripe(Class::Param, *stripe);
            fsdp.all_gather_within(stretch.view_mut(dtype))?;
        }
        Ok(())
    }

    /// Gather a stripe of weights from its owners.
    fn gather(&self, store: &mut ParamStore, stripe: usize) -> Result<Underway<()>, Fault> {
        let (dtype, mut stretch) = (store.dtype(), store.arrays_mut().lend_stripe(Class::Param, stripe));
        Ok(start_beside(&[self.fsdp()], move |groups| {
            stretch.bring();
            groups[0].all_gather_within(stretch.view_mut(dtype))
        })?)
    }
}

impl Shards {
    /// For the parameters of `store`, which was made for this mesh and lies as `spreads` say.
    pub fn new(mesh: &Mesh, sharding: Sharding, store: &ParamStore, spreads: &[Spread]) -> Shards {
        let stripes = store.arrays().stripes().expect("the store of a mesh is striped");
        let common = Common { mesh: mesh.clone(), stripes, sharding };
        let gathers = Gathers::new(common.clone(), store);
        let buckets = Buckets::new(common.clone(), store, spreads);
        Shards { common, gathers, buckets, pass: Pass::Running }
    }

    /// A pass over a microbatch begins. `ParamStore::clear_grads` began the step.
    pub fn begin_pass(&mut self, pass: Pass, store: &mut ParamStore) -> Result<(), Fault> {
        self.pass = pass;
        self.gathers.begin(pass);
        if pass != Pass::Running {
            self.buckets.begin(pass == Pass::Last, store)?;
        }
        Ok(())
    }

    /// A moment is about to run, and the one before has ended: what it reads is here afterwards, and
    /// room for the gradients it writes.
    pub fn moment(&mut self, moment: &Moment<'_>, store: &mut ParamStore) -> Result<(), Fault> {
        let learning = self.pass != Pass::Running;
        if learning {
            self.buckets.settle(store)?;
        }
        self.gathers.enter(moment, store)?;
        if learning {
            self.buckets.enter(moment, store)?;
        }
        Ok(())
    }

    /// A unit of a pipeline's work begins.
    pub fn begin_unit(&mut self, unit: Unit) {
        if self.pass != Pass::Running {
            self.buckets.begin_unit(unit);
        }
    }

    /// It has ended.
    pub fn end_unit(&mut self, store: &mut ParamStore) -> Result<(), Fault> {
        match self.pass {
            Pass::Running => Ok(()),
            _ => self.buckets.end_unit(store),
        }
    }

    /// All units of a pass have ended: gradients of what both ends of the pipeline have are whole.
    pub fn end_units(&mut self, store: &mut ParamStore, spreads: &[Spread]) -> Result<(), Fault> {
        let ends = store.refs().zip(spreads).filter(|(_, spread)| spread.both_ends);
        let ends: Vec<_> = ends.map(|(param, _)| param).collect();
        self.buckets.end_units(&ends, store)
    }

    /// The pass has ended. After the last one of a step our granules of the gradients are final.
    pub fn end_pass(&mut self, store: &mut ParamStore) -> Result<(), Fault> {
        if self.pass != Pass::Running {
            self.buckets.end(store)?;
        }
        self.gathers.end(self.pass);
        match self.pass {
            Pass::Learning => Ok(()),
            // What is gathered now is old after the update.
            Pass::Last | Pass::Running => self.gathers.release_all(store),
        }
    }

    /// Update our granules; where every rank keeps whole weights, gather them while the update of
    /// later granules still runs.
    pub fn update(
        &mut self,
        store: &mut ParamStore,
        optimizer: &AdamW,
        (lr, factor): (f32, f32),
    ) -> Result<(), Fault> {
        let (stripes, len) = (self.common.stripes, store.flat_len());
        let mut under = Vec::new();
        for stripe in 0..stripes.count(len) {
            for piece in store.arrays().pieces(self.common.own(store, stripe)) {
                optimizer.update(store, piece, lr, factor)?;
            }
            if !self.keeps_whole_weights() {
                continue;
            }
            let gathered = self.common.gather(store, stripe)?;
            match self.common.sharding.overlap {
                true => under.push(gathered),
                false => gathered.finish()?,
            }
        }
        under.into_iter().try_for_each(|gathered| Ok(gathered.finish()?))
    }

    /// Our granules of the weights were set: bring the others where every rank keeps whole weights.
    pub fn share_weights(&mut self, store: &mut ParamStore) -> Result<(), Fault> {
        if !self.keeps_whole_weights() {
            return Ok(());
        }
        (0..self.common.stripes.count(store.flat_len()))
            .try_for_each(|stripe| Ok(self.common.gather(store, stripe)?.finish()?))
    }

    fn keeps_whole_weights(&self) -> bool {
        self.common.stripes.ranks > 1 && !self.common.shares(Zero::Three)
    }
}
