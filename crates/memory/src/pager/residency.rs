//! Who is in memory: what a moment needs comes, what is needed last leaves.

use super::mover::{Bring, Take};
use super::script::Visit;
use super::{About, Pager, PagerError, Place, Policy};
use crate::arrays::Regions;
use crate::trace::{Access, ChunkId};
use std::time::Instant;

/// Chunks needed soon may take one part in this many of the capacity.
const WINDOW: u64 = 3;

impl Pager {
    /// Make the chunks of one moment resident; `needs` in any order, each at most once.
    pub(crate) fn visit(
        &mut self,
        regions: &mut Regions,
        about: About,
        needs: &[(ChunkId, Access)],
    ) -> Result<(), PagerError> {
        if let Some(error) = self.mover.failure() {
            return Err(error.into());
        }
        self.pause();
        self.begin_what_is_due(regions)?;
        self.clock += 1;
        self.measure_others();
        if self.in_step {
            self.script.enter(Visit::new(about, needs));
        }
        for (id, _) in needs {
            self.chunks[id.0 as usize].pinned = self.clock;
        }
        self.fetch_all(regions, needs, about)?;
        for (n, (id, _)) in needs.iter().enumerate() {
            let until = self.script.here().filter(|_| self.in_step).map(|(_, until)| until[n]);
            let chunk = &mut self.chunks[id.0 as usize];
            chunk.last_use = self.clock;
            chunk.next_use = until.map_or(chunk.next_use, |until| self.clock + u64::from(until));
        }
        self.look_ahead(regions)?;
        let arrived = |id: &ChunkId| regions.is_here(self.granule(*id));
        self.stall_s += self.mover.wait(|| needs.iter().all(|(id, _)| arrived(id)))?;
        for (id, access) in needs {
            let chunk = &mut self.chunks[id.0 as usize];
            chunk.place = Place::Here;
            chunk.dirty |= access.writes();
        }
        self.computing_since = Some(Instant::now());
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
        self.script.enter(Visit::new(about, needs));
        let Some((_, until)) = self.script.here() else { return Ok(()) };
        for ((id, _), until) in needs.iter().zip(until) {
            self.chunks[id.0 as usize].next_use = self.clock + u64::from(*until);
        }
        Ok(())
    }

    fn fetch_all(
        &mut self,
        regions: &mut Regions,
        needs: &[(ChunkId, Access)],
        about: About,
    ) -> Result<(), PagerError> {
        let bytes = |id: &ChunkId| self.chunks[id.0 as usize].bytes;
        let needs_bytes: u64 = needs.iter().map(|(id, _)| bytes(id)).sum();
        if needs_bytes > self.capacity_bytes {
            return Err(PagerError::TooSmall {
                op: about.op,
                layer: about.layer,
                needs_bytes,
                capacity_bytes: self.capacity_bytes,
                dram_bytes: self.setup.dram_bytes,
                other_bytes: self.other_bytes,
            });
        }
        let missing = |id: &ChunkId| self.is_away(*id);
        let missing: Vec<ChunkId> = needs.iter().map(|(id, _)| *id).filter(missing).collect();
        let wanted: u64 = missing.iter().map(|id| self.chunks[id.0 as usize].bytes).sum();
        while self.planned_bytes + wanted > self.capacity_bytes {
            match self.victim(regions, 0) {
                Some(victim) => self.evict(regions, victim),
                None => self.stall_s += self.wait_for_arrivals(regions)?,
            }
        }
        missing.into_iter().try_for_each(|id| self.fetch(regions, id))
    }

    pub(super) fn is_away(&self, id: ChunkId) -> bool {
        matches!(self.chunks[id.0 as usize].place, Place::Void | Place::Drive)
    }

    /// Queue a chunk that is away to come; its room is there once what was queued before is done.
    pub(super) fn fetch(&mut self, regions: &mut Regions, id: ChunkId) -> Result<(), PagerError> {
        let at = self.granule(id);
        // It may still be leaving.
        self.stall_s += self.mover.wait(|| !regions.is_lent(at))?;
        let chunk = &mut self.chunks[id.0 as usize];
        let slot = if chunk.place == Place::Drive { chunk.slot } else { None };
        self.planned_bytes += chunk.bytes;
        if slot.is_none() && self.mover.try_commit(chunk.bytes) {
            chunk.place = Place::Here;
            regions.bring(at);
        } else {
            chunk.place = Place::Coming;
            self.mover.bring(Bring { loan: regions.lend(at), slot });
        }
        Ok(())
    }

    /// Drop a clean chunk now, queue a dirty one to leave.
    pub(super) fn evict(&mut self, regions: &mut Regions, id: ChunkId) {
        let at = self.granule(id);
        let chunk = &mut self.chunks[id.0 as usize];
        self.planned_bytes -= chunk.bytes;
        match chunk.slot.filter(|_| chunk.dirty) {
            Some(slot) => {
                chunk.on_drive = true;
                self.mover.take(Take { loan: regions.lend(at), slot });
            }
            None => {
                regions.send_away(at);
                self.mover.released(chunk.bytes);
            }
        }
        chunk.dirty = false;
        chunk.place = if chunk.on_drive { Place::Drive } else { Place::Void };
    }

    /// Whoever may leave and is needed last; after visit `beyond` at the earliest, if that is not 0.
    fn victim(&mut self, regions: &Regions, beyond: u64) -> Option<ChunkId> {
        let (clock, by_future) = (self.clock, self.knows_future());
        let mut best: Option<((bool, u64, bool), usize)> = None;
        for (i, chunk) in self.chunks.iter_mut().enumerate() {
            if chunk.place == Place::Coming && regions.is_here((i / self.per_class, i % self.per_class)) {
                chunk.place = Place::Here;
            }
            let leaves = chunk.place == Place::Here && chunk.pinned != clock;
            if !leaves || (beyond > 0 && chunk.next_use <= beyond) {
                continue;
            }
            let rank = if by_future { chunk.next_use } else { u64::MAX - chunk.last_use };
            let score = (!chunk.fixed, rank, !chunk.dirty);
            if best.is_none_or(|(other, _)| score > other) {
                best = Some((score, i));
            }
        }
        best.map(|(_, i)| ChunkId(i as u32))
    }

    /// Whether it is known when each chunk is needed next: while a step repeats, and between steps.
    fn knows_future(&self) -> bool {
        let by_future = matches!(self.setup.policy, Policy::Dynamic | Policy::Belady);
        by_future && if self.in_step { self.script.is_followed() } else { self.script.len() > 0 }
    }

    /// Nobody can leave: something must be on its way that can once it is here.
    fn wait_for_arrivals(&mut self, regions: &Regions) -> Result<f64, PagerError> {
        let coming = |id: &ChunkId| {
            let chunk = &self.chunks[id.0 as usize];
            chunk.place == Place::Coming && chunk.pinned != self.clock
        };
        let ids = (0..self.chunks.len() as u32).map(ChunkId);
        let next = ids.into_iter().find(coming);
        let next = next.expect("a moment's needs are no more than the capacity");
        Ok(self.mover.wait(|| regions.is_here(self.granule(next)))?)
    }

    /// Fetch what the coming visits need, as far as that sends nothing away that is needed sooner.
    fn look_ahead(&mut self, regions: &mut Regions) -> Result<(), PagerError> {
        if !self.knows_future() || !self.in_step || self.has_plan() {
            return Ok(());
        }
        let window = self.capacity_bytes / WINDOW;
        let mut ahead_bytes = 0;
        for ahead in 1..self.script.len() {
            let needs = self.script.ahead(ahead);
            let needed: u64 = needs.iter().map(|(id, _)| self.chunks[id.0 as usize].bytes).sum();
            ahead_bytes += needed;
            if ahead > 1 && ahead_bytes > window {
                break;
            }
            let missing: Vec<ChunkId> =
                needs.iter().map(|(id, _)| *id).filter(|id| self.is_away(*id)).collect();
            for id in missing {
                let due = self.clock + ahead as u64;
                if regions.is_lent(self.granule(id)) || !self.room_for(regions, id, due) {
                    return Ok(());
                }
                self.fetch(regions, id)?;
            }
        }
        Ok(())
    }

    /// Make room for a chunk needed at visit `due` by sending away what is needed later.
    fn room_for(&mut self, regions: &mut Regions, id: ChunkId, due: u64) -> bool {
        let bytes = self.chunks[id.0 as usize].bytes;
        while self.planned_bytes + bytes > self.capacity_bytes {
            match self.victim(regions, due) {
                Some(victim) => self.evict(regions, victim),
                None => return false,
            }
        }
        true
    }

    /// The bytes of a chunk are worth nothing any more: from now on it reads as zeros.
    pub(crate) fn discard(&mut self, regions: &mut Regions, id: ChunkId) -> Result<(), PagerError> {
        let at = self.granule(id);
        self.stall_s += self.mover.wait(|| !regions.is_lent(at))?;
        let chunk = &mut self.chunks[id.0 as usize];
        if matches!(chunk.place, Place::Here | Place::Coming) {
            self.planned_bytes -= chunk.bytes;
            regions.send_away(at);
            self.mover.released(chunk.bytes);
        }
        (chunk.place, chunk.dirty, chunk.on_drive) = (Place::Void, false, false);
        Ok(())
    }
}
