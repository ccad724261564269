//! A training step for the pager: compared with the one before, planned once it repeats, laid out
//! where it begins.

use super::follow::{Action, Follow};
use super::mover::Carried;
use super::residency::NOW;
use super::{Pager, PagerError, Policy, SLACK};
use crate::Tier;
use crate::arrays::Regions;
use crate::plan::{Budgets, LinkRate, Rates, stretches};
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
        } else if self.setup.ranks == 1 {
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
        // What leaves the upper tier may pass through the lower one.
        let places = |wanted: bool| {
            let there = |depth: usize, of: &[bool]| -> Vec<(ChunkId, usize)> {
                let chosen = of.iter().enumerate().filter(|(_, there)| **there == wanted);
                chosen.map(|(i, _)| (ChunkId(i as u32), depth)).collect()
            };
            initial.iter().enumerate().flat_map(|(depth, of)| there(depth, of)).collect::<Vec<_>>()
        };
        for (id, depth) in places(false) {
            self.act(regions, Action::Leave(id, depth))?;
        }
        for (id, depth) in places(true).into_iter().rev() {
            self.act(regions, Action::Bring(id, depth))?;
        }
        Ok(())
    }

    /// The training step is done.
    pub(crate) fn end_step(&mut self, regions: &mut Regions) -> Result<(), PagerError> {
        self.pause();
        self.begin_what_is_due(regions)?;
        self.in_step = false;
        let changed = !self.script.end(self.chunks.len());
        if changed && self.setup.ranks == 1 {
            // What others held during a whole step is known now. Several ranks cannot tell whose step
            // they saw: for them the highest ever seen counts.
            (self.setup.other_bytes, self.other_bytes) = (0, 0);
            self.measure_others();
        }
        self.expect_a_step();
        let fits = |follow: &Follow| {
            follow.capacity_bytes.iter().zip(&self.capacity_bytes).all(|(then, now)| then <= now)
        };
        if changed || !self.follow.as_ref().is_some_and(fits) {
            self.follow = self.plan();
        }
        Ok(())
    }

    /// The plan for the recorded step; none where the planner refuses, which leaves the look ahead.
    fn plan(&self) -> Option<Follow> {
        if self.script.len() == 0 || self.setup.policy != Policy::Dynamic {
            return None;
        }
        let carried = self.mover.carried();
        let rate = |bytes: u64, seconds: f64| if seconds > 0.0 { bytes as f64 / seconds } else { 1e9 };
        let rates = |link: &Carried| LinkRate {
            up_per_s: rate(link.up_bytes, link.up_s),
            down_per_s: rate(link.down_bytes, link.down_s),
        };
        let [host, nvme] = match self.memories {
            1 => [rates(&carried[0]); 2],
            _ => carried.each_ref().map(rates),
        };
        let nvme_bytes = self.setup.budgets.nvme.map(|nvme| (nvme / self.setup.ranks).min(i64::MAX as u64));
        let mut budgets = Budgets { nvme: nvme_bytes, ..Budgets::default() };
        for depth in 0..self.memories {
            budgets = budgets.with(self.tiers[depth], Some(self.capacity_bytes[depth]));
        }
        let mut trace = self.trace();
        // The capacity is what others leave, at their highest: parked blocks do not come and go.
        trace.moments.iter_mut().for_each(|moment| moment.other_bytes = 0);
        let plan = crate::plan::plan(&trace, &budgets, &Rates { host, nvme }).ok()?;
        let capacity = self.capacity_bytes[..self.memories].to_vec();
        let mut follow = Follow::new(&trace, &plan, &self.tiers, capacity);
        follow.stretches = stretches(&trace, &budgets);
        Some(follow)
    }

    /// What all pagers of the process may use together.
    pub(crate) fn budgets(&self) -> Budgets {
        self.setup.budgets
    }

    /// Other budgets from now on.
    pub(crate) fn set_budget(&mut self, regions: &mut Regions, budgets: Budgets) -> Result<(), PagerError> {
        assert!(!self.in_step, "budgets change between two steps");
        if budgets.tiers() != self.tiers {
            return Err(PagerError::Tiers { asked: budgets.tiers(), tiers: self.tiers.clone() });
        }
        for depth in 0..self.tiers.len() {
            let (tier, least_bytes) = (self.tiers[depth], self.least_budget(depth));
            let budget_bytes = budgets.of(tier).unwrap_or(0);
            if budget_bytes < least_bytes {
                return Err(PagerError::Budget {
                    tier,
                    device: self.setup.device,
                    budget_bytes,
                    least_bytes,
                });
            }
        }
        self.setup.budgets = budgets;
        self.measure_others();
        self.fix_static();
        // Between steps no moment needs anything.
        self.clock += 1;
        for depth in 0..self.memories {
            self.make_room(regions, depth, 0, NOW)?;
        }
        self.expect_a_step();
        self.follow = self.plan();
        Ok(())
    }

    /// Budget of a tier below which the recorded step cannot run.
    fn least_budget(&self, depth: usize) -> u64 {
        let all = || self.chunks.iter().map(|chunk| chunk.bytes).sum::<u64>();
        if self.tiers[depth] == Tier::Nvme {
            return all() * self.setup.ranks;
        }
        // What comes up passes through the tier below, beside one chunk that makes room for it.
        let passes = |at: usize| at <= depth;
        let bytes = |needs: &[(ChunkId, crate::trace::Access)]| {
            needs.iter().map(|(id, _)| self.chunk(*id).bytes).sum::<u64>()
        };
        let visits = self.script.visits().filter(|(at, _)| passes(*at));
        let widest = visits.map(|(_, needs)| bytes(needs)).max().unwrap_or(0);
        let largest = self.chunks.iter().map(|chunk| chunk.bytes).max().unwrap_or(0);
        let least = match depth + 1 == self.tiers.len() {
            true => all(),
            false => widest + if depth > 0 { largest } else { 0 },
        };
        let others = if depth == 0 { self.other_bytes } else { 0 };
        // What `free_for_chunks` takes off.
        let least = least * self.setup.ranks + others;
        least + least.div_ceil(SLACK - 1) + 1
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
        let (id, depth) = action.subject();
        self.late.retain(|late| late.subject() != (id, depth));
        let begins = match action {
            Action::Bring(..) => self.begin_to_bring(regions, id, depth)?,
            Action::Leave(..) => self.begin_to_leave(regions, id, depth)?,
        };
        if !begins {
            self.late.push(action);
        }
        Ok(())
    }

    /// Whether that was done, or need not be.
    fn begin_to_bring(
        &mut self,
        regions: &mut Regions,
        id: ChunkId,
        depth: usize,
    ) -> Result<bool, PagerError> {
        // Zeros come from nowhere: they are made when they are needed.
        let Some(from) = self.source(id, depth) else { return Ok(true) };
        if self.chunk(id).valid[depth] || from < depth {
            return Ok(true);
        }
        let below = depth + 1;
        let room = self.planned_bytes[depth] + self.chunk(id).bytes <= self.capacity_bytes[depth];
        let there = from == below && (below == self.memories || regions.is_here(self.at(id, below)));
        if !room || !there || regions.is_lent(self.at(id, depth)) {
            return Ok(false);
        }
        self.up(regions, id, depth)?;
        Ok(true)
    }

    fn begin_to_leave(
        &mut self,
        regions: &mut Regions,
        id: ChunkId,
        depth: usize,
    ) -> Result<bool, PagerError> {
        if !self.chunk(id).valid[depth] {
            return Ok(true);
        }
        if !regions.is_here(self.at(id, depth)) {
            return Ok(false);
        }
        if self.is_clean(id, depth) {
            self.forget(regions, id, depth);
            return Ok(true);
        }
        let below = depth + 1;
        if below == self.tiers.len() {
            return Ok(true);
        }
        if below < self.memories {
            let room = self.planned_bytes[below] + self.chunk(id).bytes <= self.capacity_bytes[below];
            if !room || regions.is_lent(self.at(id, below)) {
                return Ok(false);
            }
        }
        self.down(regions, id, depth, NOW)
    }
}
