//! Who is in memory: what a moment needs comes, what is needed last leaves.

use super::mover::{End, Job, MEMORIES, Way};
use super::script::Visit;
use super::{About, Pager, PagerError, Policy};
use crate::arrays::Regions;
use crate::trace::{Access, ChunkId, Phase};
use std::time::Instant;

/// A chunk a moment needs, and what for.
type Needed = (ChunkId, Access);

/// Chunks needed soon may take one part in this many of the capacity.
const WINDOW: u64 = 3;

/// Room must be made, whoever leaves and however long it takes.
pub(super) const NOW: u64 = 0;

impl Pager {
    /// Make the chunks of one moment resident; `needs` in any order, each at most once. Returns the
    /// depth of the memory in which it computes.
    pub(crate) fn visit(
        &mut self,
        regions: &mut Regions,
        about: About,
        needs: &[(ChunkId, Access)],
    ) -> Result<usize, PagerError> {
        if let Some(error) = self.mover.failure() {
            return Err(error.into());
        }
        self.pause();
        self.begin_what_is_due(regions)?;
        self.clock += 1;
        self.measure_others();
        (self.about, self.depth) = (about, self.place(about, needs));
        let depth = self.depth;
        if self.in_step {
            self.script.enter(Visit::new(about, depth, needs));
        }
        for (id, _) in needs {
            self.chunks[id.0 as usize].pinned = self.clock;
        }
        self.demand(regions, needs)?;
        for (n, (id, _)) in needs.iter().enumerate() {
            let until = self.script.here().filter(|_| self.in_step).map(|(_, until)| until[n]);
            let chunk = &mut self.chunks[id.0 as usize];
            chunk.last_use = self.clock;
            chunk.next_use = until.map_or(chunk.next_use, |until| self.clock + u64::from(until));
        }
        self.look_ahead(regions)?;
        for (id, access) in needs {
            self.wait_until_here(regions, *id, depth)?;
            if access.writes() {
                self.outdate(regions, *id, depth)?;
            }
        }
        self.computing_since = Some(Instant::now());
        Ok(depth)
    }

    /// Depth of the memory in which a moment computes: ops where it is fastest, updates on the host,
    /// where their state lies. What only looks at chunks does so where they lie.
    fn place(&self, about: About, needs: &[(ChunkId, Access)]) -> usize {
        if self.memories == 1 || about.phase != Phase::Optimizer {
            return 0;
        }
        if needs.iter().any(|(_, access)| access.writes()) {
            return 1;
        }
        let known = self.script.next_depth(about.phase, about.op, needs).filter(|_| self.in_step);
        let above = |(id, _): &(ChunkId, Access)| {
            let valid = self.chunk(*id).valid;
            valid[0] && !valid[1..].contains(&true)
        };
        known.unwrap_or(usize::from(!needs.iter().all(above)))
    }

    fn demand(&mut self, regions: &mut Regions, needs: &[(ChunkId, Access)]) -> Result<(), PagerError> {
        let needs_bytes: u64 = needs.iter().map(|(id, _)| self.chunk(*id).bytes).sum();
        if needs_bytes > self.capacity_bytes[self.depth] {
            return Err(self.too_small(self.depth, needs_bytes));
        }
        // Others may have taken some of what there was.
        for depth in 0..self.memories {
            self.make_room(regions, depth, 0, NOW)?;
        }
        for need in needs {
            if !self.chunk(need.0).valid[self.depth] {
                self.obtain(regions, *need, self.depth)?;
            }
        }
        Ok(())
    }

    /// A visit of the known step falls out: its place in the step passes by, and nothing is brought.
    pub(crate) fn pass_over(
        &mut self,
        regions: &mut Regions,
        about: About,
        needs: &[(ChunkId, Access)],
    ) -> Result<(), PagerError> {
        if !self.in_step {
            return Ok(());
        }
        self.pause();
        self.begin_what_is_due(regions)?;
        self.clock += 1;
        let depth = self.place(about, needs);
        self.script.enter(Visit::new(about, depth, needs));
        let Some((_, until)) = self.script.here() else { return Ok(()) };
        for ((id, _), until) in needs.iter().zip(until) {
            self.chunks[id.0 as usize].next_use = self.clock + u64::from(*until);
        }
        Ok(())
    }

    fn too_small(&self, depth: usize, needs_bytes: u64) -> PagerError {
        let tier = self.tiers[depth];
        PagerError::TooSmall {
            op: self.about.op,
            layer: self.about.layer,
            tier,
            device: self.setup.device,
            needs_bytes,
            capacity_bytes: self.capacity_bytes[depth],
            budget_bytes: self.setup.budgets.of(tier).unwrap_or(0),
            other_bytes: if depth == 0 { self.other_bytes } else { 0 },
        }
    }

    /// Where to copy a chunk from to have it at `depth`; none for zeros. From below where it can be:
    /// then the copy above stays.
    pub(super) fn source(&self, id: ChunkId, depth: usize) -> Option<usize> {
        let valid = self.chunk(id).valid;
        (depth + 1..self.tiers.len()).chain(0..depth).find(|from| valid[*from])
    }

    /// Queue all it takes to have a chunk at `depth` for an access.
    fn obtain(&mut self, regions: &mut Regions, need: Needed, depth: usize) -> Result<(), PagerError> {
        let id = need.0;
        match self.source(id, depth) {
            None => self.begin(regions, need, depth),
            Some(from) if from > depth => {
                for to in (depth..from).rev() {
                    self.make_room(regions, to, self.chunk(id).bytes, NOW)?;
                    self.up(regions, id, to)?;
                }
                Ok(())
            }
            Some(from) => (from..depth).try_for_each(|from| self.down(regions, id, from, NOW).map(drop)),
        }
    }

    /// Put a chunk that has no copy where it is accessed first: zeros, where they are looked at.
    fn begin(&mut self, regions: &mut Regions, need: Needed, depth: usize) -> Result<(), PagerError> {
        let (id, access) = need;
        let bytes = self.chunk(id).bytes;
        self.make_room(regions, depth, bytes, NOW)?;
        self.wait_until_returned(regions, id, depth)?;
        self.arrives(id, depth);
        let from = if access.reads() { End::Zeros } else { End::Anything };
        let mut to = regions.lend(self.at(id, depth));
        if !self.mover.try_bring(depth, &from, &mut to) {
            let room = Some(self.mover.promise(depth, bytes));
            let job = Job { from, to: End::Memory(to), room, leaves: None };
            self.mover.send(self.link_below(depth), Way::Up, job);
        }
        Ok(())
    }

    /// Queue a copy from the tier below to `depth`, where room was made; the copy below stays.
    pub(super) fn up(&mut self, regions: &mut Regions, id: ChunkId, depth: usize) -> Result<(), PagerError> {
        // It may still be leaving, or still be on its way to where it comes from.
        self.wait_until_returned(regions, id, depth)?;
        let from = match depth + 1 < self.memories {
            true => {
                self.wait_until_here(regions, id, depth + 1)?;
                End::Memory(regions.lend(self.at(id, depth + 1)))
            }
            false => self.drive(id),
        };
        let to = End::Memory(regions.lend(self.at(id, depth)));
        let room = Some(self.mover.promise(depth, self.chunk(id).bytes));
        self.arrives(id, depth);
        self.count_move(id);
        self.mover.send(depth, Way::Up, Job { from, to, room, leaves: None });
        Ok(())
    }

    /// Queue a copy from `depth` to the tier below, in place of the one here; false, and nothing
    /// done, where that would send away what is needed before visit `beyond`.
    pub(super) fn down(
        &mut self,
        regions: &mut Regions,
        id: ChunkId,
        depth: usize,
        beyond: u64,
    ) -> Result<bool, PagerError> {
        let (bytes, below) = (self.chunk(id).bytes, depth + 1);
        let to_memory = below < self.memories;
        if to_memory && !self.make_room(regions, below, bytes, beyond)? {
            return Ok(false);
        }
        self.wait_until_here(regions, id, depth)?;
        let mut room = None;
        let to = match to_memory {
            true => {
                self.wait_until_returned(regions, id, below)?;
                room = Some(self.mover.promise(below, bytes));
                End::Memory(regions.lend(self.at(id, below)))
            }
            false => self.drive(id),
        };
        let from = End::Memory(regions.lend(self.at(id, depth)));
        self.arrives(id, below);
        self.leaves(id, depth);
        self.count_move(id);
        self.mover.send(depth, Way::Down, Job { from, to, room, leaves: Some(depth) });
        Ok(true)
    }

    fn count_move(&mut self, id: ChunkId) {
        let class = self.class_of(id.0 as usize);
        self.moved_bytes[class as usize] += self.chunk(id).bytes;
    }

    /// Forget the copy at `depth`, which nobody holds.
    pub(super) fn forget(&mut self, regions: &mut Regions, id: ChunkId, depth: usize) {
        self.leaves(id, depth);
        if depth < self.memories {
            self.mover.drop_chunk(depth, regions.lend(self.at(id, depth)));
        }
    }

    fn arrives(&mut self, id: ChunkId, depth: usize) {
        let chunk = &mut self.chunks[id.0 as usize];
        chunk.valid[depth] = true;
        self.planned_bytes.iter_mut().skip(depth).take(1).for_each(|planned| *planned += chunk.bytes);
    }

    fn leaves(&mut self, id: ChunkId, depth: usize) {
        let chunk = &mut self.chunks[id.0 as usize];
        chunk.valid[depth] = false;
        self.planned_bytes.iter_mut().skip(depth).take(1).for_each(|planned| *planned -= chunk.bytes);
    }

    fn drive(&self, id: ChunkId) -> End {
        End::Drive(self.chunk(id).slot.expect("a chunk of an array has a place on the drive"))
    }

    /// The link below a depth; of the lowest tier the one above.
    fn link_below(&self, depth: usize) -> usize {
        depth.min(self.tiers.len() - 2)
    }

    /// Wait until nobody moves the copy of a chunk at `depth`, or the place of one.
    fn wait_until_returned(
        &mut self,
        regions: &Regions,
        id: ChunkId,
        depth: usize,
    ) -> Result<(), PagerError> {
        let at = self.at(id, depth);
        self.stall_s[self.link_below(depth)] += self.mover.wait(|| !regions.is_lent(at))?;
        Ok(())
    }

    fn wait_until_here(&mut self, regions: &Regions, id: ChunkId, depth: usize) -> Result<(), PagerError> {
        let at = self.at(id, depth);
        self.stall_s[self.link_below(depth)] += self.mover.wait(|| regions.is_here(at))?;
        Ok(())
    }

    /// A chunk is about to be written at `depth`: all other copies are stale.
    fn outdate(&mut self, regions: &mut Regions, id: ChunkId, depth: usize) -> Result<(), PagerError> {
        for other in (0..self.tiers.len()).filter(|other| *other != depth) {
            if self.chunk(id).valid[other] {
                if other < self.memories {
                    self.wait_until_returned(regions, id, other)?;
                }
                self.forget(regions, id, other);
            }
        }
        Ok(())
    }

    /// Send chunks away until `bytes` more have room at `depth`. With `beyond` only such as are
    /// needed after that visit, and without waiting; false where that is not enough.
    pub(super) fn make_room(
        &mut self,
        regions: &mut Regions,
        depth: usize,
        bytes: u64,
        beyond: u64,
    ) -> Result<bool, PagerError> {
        while self.planned_bytes[depth] + bytes > self.capacity_bytes[depth] {
            match self.victim(regions, depth, beyond) {
                Some(victim) => {
                    if !self.evict(regions, victim, depth, beyond)? {
                        return Ok(false);
                    }
                }
                None if beyond != NOW => return Ok(false),
                None => self.wait_for_arrivals(regions, depth, bytes)?,
            }
        }
        Ok(true)
    }

    /// Drop a copy that there is another of below, else copy it down.
    fn evict(
        &mut self,
        regions: &mut Regions,
        id: ChunkId,
        depth: usize,
        beyond: u64,
    ) -> Result<bool, PagerError> {
        if !self.is_clean(id, depth) {
            return self.down(regions, id, depth, beyond);
        }
        self.forget(regions, id, depth);
        Ok(true)
    }

    /// Whether a tier below has the chunk, too.
    pub(super) fn is_clean(&self, id: ChunkId, depth: usize) -> bool {
        self.chunk(id).valid[depth + 1..].contains(&true)
    }

    /// Whether the present moment needs the copy of a chunk at `depth`.
    fn is_held(&self, id: ChunkId, depth: usize) -> bool {
        let chunk = self.chunk(id);
        chunk.pinned == self.clock && (depth == self.depth || !chunk.valid[self.depth])
    }

    /// Whoever may leave and is needed last; after visit `beyond` at the earliest, if that is not 0.
    fn victim(&self, regions: &Regions, depth: usize, beyond: u64) -> Option<ChunkId> {
        if depth + 1 == self.tiers.len() {
            return None;
        }
        let by_future = self.knows_future();
        let ids = (0..self.chunks.len() as u32).map(ChunkId).filter(|id| {
            let chunk = self.chunk(*id);
            chunk.valid[depth]
                && (beyond == NOW || chunk.next_use > beyond)
                && !self.is_held(*id, depth)
                && regions.is_here(self.at(*id, depth))
        });
        let score = |id: &ChunkId| {
            let chunk = self.chunk(*id);
            let rank = if by_future { chunk.next_use } else { u64::MAX - chunk.last_use };
            (!chunk.fixed[depth], rank, self.is_clean(*id, depth), std::cmp::Reverse(id.0))
        };
        ids.max_by_key(score)
    }

    /// Whether it is known when each chunk is needed next: while a step repeats, and between steps.
    fn knows_future(&self) -> bool {
        let by_future = matches!(self.setup.policy, Policy::Dynamic | Policy::Belady);
        by_future && if self.in_step { self.script.is_followed() } else { self.script.len() > 0 }
    }

    /// Nobody can leave: something must be on its way that can once it is here.
    fn wait_for_arrivals(&mut self, regions: &Regions, depth: usize, bytes: u64) -> Result<(), PagerError> {
        let coming = |id: &ChunkId| {
            self.chunk(*id).valid[depth] && !self.is_held(*id, depth) && !regions.is_here(self.at(*id, depth))
        };
        let next = (0..self.chunks.len() as u32).map(ChunkId).find(coming);
        match next.filter(|_| depth + 1 < self.tiers.len()) {
            Some(next) => self.wait_until_here(regions, next, depth),
            None => Err(self.too_small(depth, self.planned_bytes[depth] + bytes)),
        }
    }

    /// Fetch what the coming visits need, as far as that sends nothing away that is needed sooner.
    fn look_ahead(&mut self, regions: &mut Regions) -> Result<(), PagerError> {
        if !self.knows_future() || !self.in_step || self.has_plan() {
            return Ok(());
        }
        let mut ahead_bytes = [0; MEMORIES];
        for ahead in 1..self.script.len() {
            let Visit { depth, needs, .. } = self.script.ahead(ahead);
            let depth = *depth;
            ahead_bytes[depth] += needs.iter().map(|(id, _)| self.chunk(*id).bytes).sum::<u64>();
            if ahead > 1 && ahead_bytes[depth] > self.capacity_bytes[depth] / WINDOW {
                break;
            }
            let missing = needs.iter().filter(|(id, _)| !self.chunk(*id).valid[depth]);
            for need in missing.copied().collect::<Vec<_>>() {
                if !self.approach(regions, need, depth, self.clock + ahead as u64)? {
                    return Ok(());
                }
            }
        }
        Ok(())
    }

    /// Queue the next hop of a chunk needed at `depth` at visit `due`; false where there is no room.
    fn approach(
        &mut self,
        regions: &mut Regions,
        need: Needed,
        depth: usize,
        due: u64,
    ) -> Result<bool, PagerError> {
        let id = need.0;
        let source = self.source(id, depth);
        let to = match source {
            // What lies above comes down when it is needed: until then it may still change.
            Some(from) if from < depth => return Ok(true),
            Some(from) => from - 1,
            None => depth,
        };
        let waits = source.is_some() && to + 1 < self.memories && !regions.is_here(self.at(id, to + 1));
        if waits || regions.is_lent(self.at(id, to)) {
            return Ok(to > 0);
        }
        // It must not leave from where it comes.
        self.chunks[id.0 as usize].pinned = self.clock;
        if !self.make_room(regions, to, self.chunk(id).bytes, due)? {
            return Ok(false);
        }
        match source {
            Some(_) => self.up(regions, id, to)?,
            None => self.begin(regions, need, to)?,
        }
        Ok(true)
    }

    /// The bytes of a chunk are worth nothing any more: from now on it reads as zeros.
    pub(crate) fn discard(&mut self, regions: &mut Regions, id: ChunkId) -> Result<(), PagerError> {
        for depth in 0..self.tiers.len() {
            if depth < self.memories {
                self.wait_until_returned(regions, id, depth)?;
            }
            if self.chunk(id).valid[depth] {
                self.forget(regions, id, depth);
            }
        }
        Ok(())
    }
}
