//! A training step for the pager: compared with the one before, planned once it repeats, laid out
//! where it begins.

use super::follow::{Action, Follow};
use super::{Pager, PagerError, Place, Policy};
use crate::arrays::Regions;
use crate::plan::{Budgets, LinkRate, Rates};
use crate::trace::ChunkId;

impl Pager {
    /// A training step begins: its visits are compared with those of the one before.
    pub(crate) fn begin_step(&mut self, regions: &mut Regions) -> Result<(), PagerError> {
        self.script.begin();
        self.in_step = true;
        self.computing_since = None;
        self.late.clear();
        if self.script.is_followed() {
            self.expect_a_step();
            self.lay_out(regions)?;
        } else {
            device::reset_peak();
        }
        Ok(())
    }

    /// What is needed next is what a step needs first.
    fn expect_a_step(&mut self) {
        for (i, chunk) in self.chunks.iter_mut().enumerate() {
            let first = self.script.first(ChunkId(i as u32));
            chunk.next_use = first.map_or(u64::MAX, |first| self.clock + u64::from(first) + 1);
        }
    }

    /// Bring what the plan wants here when a step begins, and let go of the rest.
    fn lay_out(&mut self, regions: &mut Regions) -> Result<(), PagerError> {
        if !self.has_plan() {
            return Ok(());
        }
        let initial = self.follow.as_ref().map_or(Vec::new(), |follow| follow.initial.clone());
        let ids = || (0..initial.len() as u32).map(ChunkId);
        for id in ids().filter(|id| !initial[id.0 as usize]) {
            self.act(regions, Action::Leave(id))?;
        }
        for id in ids().filter(|id| initial[id.0 as usize]) {
            self.act(regions, Action::Bring(id))?;
        }
        Ok(())
    }

    /// The training step is done.
    pub(crate) fn end_step(&mut self, regions: &mut Regions) -> Result<(), PagerError> {
        self.pause();
        self.begin_what_is_due(regions)?;
        self.in_step = false;
        let changed = !self.script.end(self.chunks.len());
        if changed {
            // What others held during a whole step is known now.
            (self.setup.other_bytes, self.other_bytes) = (0, 0);
            self.measure_others();
        }
        self.expect_a_step();
        let room = self.follow.as_ref().map(|follow| follow.capacity_bytes);
        if changed || room.is_none_or(|room| room > self.capacity_bytes) {
            self.follow = self.plan();
        }
        Ok(())
    }

    /// The plan for the recorded step; none where the planner refuses, which leaves the look ahead.
    fn plan(&self) -> Option<Follow> {
        let carried = self.mover.carried();
        let rate = |bytes: u64, seconds: f64| if seconds > 0.0 { bytes as f64 / seconds } else { 1e9 };
        let nvme = LinkRate {
            up_per_s: rate(carried.read_bytes, carried.read_s),
            down_per_s: rate(carried.written_bytes, carried.written_s),
        };
        let budgets = Budgets {
            hbm: None,
            dram: Some(self.capacity_bytes),
            nvme: Some(self.setup.nvme_bytes.min(i64::MAX as u64)),
        };
        let mut trace = self.trace();
        // The capacity is what others leave, at their highest: parked blocks do not come and go.
        trace.moments.iter_mut().for_each(|moment| moment.other_bytes = 0);
        let plan = crate::plan::plan(&trace, &budgets, &Rates { host: nvme, nvme }).ok()?;
        Some(Follow::new(&trace, &plan, self.capacity_bytes))
    }

    pub(super) fn has_plan(&self) -> bool {
        self.setup.policy == Policy::Dynamic
            && self.in_step
            && self.script.is_followed()
            && self.follow.is_some()
    }

    /// The visit entered last has ended: begin what the plan says for now.
    pub(super) fn begin_what_is_due(&mut self, regions: &mut Regions) -> Result<(), PagerError> {
        if !self.has_plan() {
            return Ok(());
        }
        let Some((k, _)) = self.script.here() else { return Ok(()) };
        let actions = self.follow.as_ref().map_or(Vec::new(), |follow| follow.after(k).to_vec());
        for action in actions {
            self.act(regions, action)?;
        }
        let late = std::mem::take(&mut self.late);
        late.into_iter().try_for_each(|action| self.act(regions, action))
    }

    fn act(&mut self, regions: &mut Regions, action: Action) -> Result<(), PagerError> {
        let (Action::Bring(id) | Action::Leave(id)) = action;
        let at = self.granule(id);
        self.late.retain(|late| *late != Action::Bring(id) && *late != Action::Leave(id));
        let chunk = &mut self.chunks[id.0 as usize];
        if chunk.place == Place::Coming && regions.is_here(at) {
            chunk.place = Place::Here;
        }
        match (action, chunk.place) {
            // Zeros need no drive: they are made when they are needed.
            (Action::Bring(_), Place::Drive) => {
                let room = self.planned_bytes + chunk.bytes <= self.capacity_bytes;
                match room && !regions.is_lent(at) {
                    true => self.fetch(regions, id)?,
                    false => self.late.push(action),
                }
            }
            (Action::Leave(_), Place::Here) => self.evict(regions, id),
            (Action::Leave(_), Place::Coming) => self.late.push(action),
            _ => {}
        }
        Ok(())
    }
}
