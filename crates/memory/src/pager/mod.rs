//! Executes placement: makes resident what a moment needs, ahead of time where the sequence is
//! known, and takes away what is needed last.
//!
//! Every decision is made on the thread that computes, and made as if all that was queued before
//! were done; the bytes are moved by the threads of `mover`. So a chunk leaves behind the back of
//! the computation, and the computation waits for one thing only: a chunk it needs now.

mod follow;
mod mover;
mod report;
mod script;

pub use report::{LinkCount, TierReport};

use crate::arrays::Regions;
use crate::disk::{Disk, DiskError, Options, Region};
use crate::plan::{Budgets, LinkRate, Rates};
use crate::trace::{Access, ChunkId, Phase, Trace};
use crate::{Class, STATES};
use follow::{Action, Follow};
use mover::{Bring, Mover, Slot, Take};
use script::{Script, Visit};
use std::path::PathBuf;
use std::time::Instant;

/// Who leaves when there is no room.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Policy {
    /// What a plan for the recorded step says.
    Dynamic,
    /// The same without a plan for the whole step: only by when each chunk is needed next.
    Belady,
    /// A fixed part stays for ever, the rest comes and goes.
    Static,
    /// What was used longest ago.
    Lru,
}

impl Policy {
    /// Whether everything may simply stay where there is room for it.
    pub fn is_free_to_keep_all(self) -> bool {
        self == Policy::Dynamic
    }
}

/// What a pager may use.
#[derive(Clone, Debug, PartialEq)]
pub struct Setup {
    /// DRAM for chunks and everything else that is counted.
    pub dram_bytes: u64,
    /// Space on the drive.
    pub nvme_bytes: u64,
    /// Folder of the offload file.
    pub dir: PathBuf,
    /// Who leaves.
    pub policy: Policy,
    /// Kept free for everything that is no chunk until a step has shown what it takes.
    pub other_bytes: u64,
    /// Elements of a chunk, a multiple of 2048.
    pub chunk_elements: usize,
}

/// One op about to run.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct About {
    /// Part of the step.
    pub phase: Phase,
    /// Name of the op.
    pub op: &'static str,
    /// Its layer.
    pub layer: u32,
}

/// Why bytes could not be brought.
#[derive(Clone, Debug, thiserror::Error)]
pub enum PagerError {
    /// What one moment needs is more than there is.
    #[error(
        "{op} of layer {layer} needs {needs_bytes} bytes in memory at once, {capacity_bytes} are left of memory.dram = {dram_bytes} bytes beside {other_bytes} of activations and buffers; raise memory.dram or lower train.batch, train.context or the model's widest matrix"
    )]
    TooSmall {
        /// Which op.
        op: &'static str,
        /// Of which layer.
        layer: u32,
        /// What it needs.
        needs_bytes: u64,
        /// What chunks may take.
        capacity_bytes: u64,
        /// The budget.
        dram_bytes: u64,
        /// What is no chunk.
        other_bytes: u64,
    },
    /// The drive has less room than the chunks need.
    #[error(
        "memory.nvme = {nvme_bytes} bytes, the state needs {needs_bytes} on the drive; raise memory.nvme"
    )]
    Drive {
        /// The budget.
        nvme_bytes: u64,
        /// What is needed.
        needs_bytes: u64,
    },
    /// The drive failed.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// The folder cannot be made.
    #[error("cannot make {}: {what}; choose another memory.dir", dir.display())]
    Folder {
        /// Which folder.
        dir: PathBuf,
        /// Why.
        what: String,
    },
    /// No memory for the arrays.
    #[error(transparent)]
    Memory(#[from] device::OutOfMemory),
    /// No thread for the copies.
    #[error("cannot start the threads that move chunks: {0}; free threads on this machine")]
    Threads(String),
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Place {
    /// Nowhere: it reads as zeros.
    #[default]
    Void,
    /// On the drive alone.
    Drive,
    /// On its way to DRAM.
    Coming,
    /// In DRAM.
    Here,
}

#[derive(Clone, Copy, Debug, Default)]
struct Chunk {
    place: Place,
    /// Newer than what the drive holds.
    dirty: bool,
    /// Whether the drive holds a copy at all.
    on_drive: bool,
    /// Stays for ever under the static policy.
    fixed: bool,
    /// Visit that needs it now, counted over all steps.
    pinned: u64,
    last_use: u64,
    /// Visit that needs it next, counted over all steps.
    next_use: u64,
    slot: Option<Slot>,
    bytes: u64,
}

/// Places of all chunks of a model, and the threads that move them.
pub struct Pager {
    setup: Setup,
    mover: Mover,
    chunks: Vec<Chunk>,
    /// Chunks of a class.
    per_class: usize,
    /// Bytes in DRAM once everything queued is done.
    planned_bytes: u64,
    capacity_bytes: u64,
    /// Largest that others were seen to hold.
    other_bytes: u64,
    /// Visits so far, over all steps.
    clock: u64,
    in_step: bool,
    script: Script,
    /// The plan for the script, once it was made.
    follow: Option<Follow>,
    /// What the plan wanted begun and could not be yet.
    late: Vec<Action>,
    computing_since: Option<Instant>,
    stall_s: f64,
    reported: report::Snapshot,
}

impl Pager {
    /// Places for the chunks of arrays: by class, bytes of each chunk; none for a class that is
    /// not there. All begin as zeros.
    pub(crate) fn new(setup: Setup, chunk_bytes: &[(Class, Vec<usize>)]) -> Result<Pager, PagerError> {
        let per_class = chunk_bytes.first().map_or(0, |(_, chunks)| chunks.len());
        let whole = |chunks: &[usize]| chunks.iter().map(|bytes| *bytes as u64).sum::<u64>();
        let layout: Vec<(String, u64)> =
            chunk_bytes.iter().map(|(class, chunks)| (class.to_string(), whole(chunks))).collect();
        let needs_bytes = layout.iter().map(|(_, bytes)| bytes).sum();
        let nvme_bytes = setup.nvme_bytes;
        if needs_bytes > nvme_bytes {
            return Err(PagerError::Drive { nvme_bytes, needs_bytes });
        }
        let mut chunks = vec![Chunk::default(); per_class * STATES];
        for (region, (class, sizes)) in chunk_bytes.iter().enumerate() {
            let mut offset = 0;
            for (i, bytes) in sizes.iter().enumerate() {
                let chunk = &mut chunks[*class as usize * per_class + i];
                (chunk.bytes, chunk.slot) = (*bytes as u64, Some(Slot { region: Region(region), offset }));
                offset += *bytes as u64;
            }
        }
        let layout: Vec<(&str, u64)> = layout.iter().map(|(name, bytes)| (name.as_str(), *bytes)).collect();
        std::fs::create_dir_all(&setup.dir)
            .map_err(|error| PagerError::Folder { dir: setup.dir.clone(), what: error.to_string() })?;
        let disk = Disk::create(&setup.dir, &layout, Options::default())?;
        let mover = Mover::start(disk).map_err(|error| PagerError::Threads(error.to_string()))?;
        let mut pager = Pager {
            setup,
            mover,
            chunks,
            per_class,
            planned_bytes: 0,
            capacity_bytes: 0,
            other_bytes: 0,
            clock: 0,
            in_step: false,
            script: Script::default(),
            follow: None,
            late: Vec::new(),
            computing_since: None,
            stall_s: 0.0,
            reported: report::Snapshot::default(),
        };
        pager.measure_others();
        pager.fix_static();
        Ok(pager)
    }

    /// Elements of a chunk.
    pub(crate) fn chunk_elements(&self) -> usize {
        self.setup.chunk_elements
    }

    /// Under the static policy: as many chunks stay as fit into three quarters, weights first.
    fn fix_static(&mut self) {
        let mut left = self.capacity_bytes * 3 / 4;
        for chunk in &mut self.chunks {
            chunk.fixed = self.setup.policy == Policy::Static && chunk.bytes > 0 && chunk.bytes <= left;
            left -= if chunk.fixed { chunk.bytes } else { 0 };
        }
    }

    /// Chunks `i` of `class`.
    pub(crate) fn id(&self, class: Class, i: usize) -> ChunkId {
        ChunkId((class as usize * self.per_class + i) as u32)
    }

    fn granule(&self, id: ChunkId) -> (usize, usize) {
        (id.0 as usize / self.per_class, id.0 as usize % self.per_class)
    }

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

    fn has_plan(&self) -> bool {
        self.setup.policy == Policy::Dynamic
            && self.in_step
            && self.script.is_followed()
            && self.follow.is_some()
    }

    /// The visit entered last has ended: begin what the plan says for now.
    fn begin_what_is_due(&mut self, regions: &mut Regions) -> Result<(), PagerError> {
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
            let About { phase, op, layer } = about;
            let needs = needs.to_vec();
            self.script.enter(Visit { phase, op, layer, needs, seconds: 0.0, other_bytes: 0 });
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

    /// The moment before has ended.
    fn pause(&mut self) {
        if let Some(since) = self.computing_since.take()
            && self.in_step
        {
            self.script.measured(since.elapsed().as_secs_f64(), others_peak());
        }
    }

    /// What is no chunk takes its share of the budget first.
    fn measure_others(&mut self) {
        self.other_bytes = self.other_bytes.max(others_peak()).max(self.setup.other_bytes);
        let capacity = free_for_chunks(self.setup.dram_bytes, self.other_bytes);
        if capacity != self.capacity_bytes {
            device::limit_parked(Some(self.other_bytes as usize));
            self.capacity_bytes = capacity;
            self.mover.set_capacity(capacity);
        }
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

    fn is_away(&self, id: ChunkId) -> bool {
        matches!(self.chunks[id.0 as usize].place, Place::Void | Place::Drive)
    }

    /// Queue a chunk that is away to come; its room is there once what was queued before is done.
    fn fetch(&mut self, regions: &mut Regions, id: ChunkId) -> Result<(), PagerError> {
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
    fn evict(&mut self, regions: &mut Regions, id: ChunkId) {
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

    /// The step as it was last recorded, for the planner.
    pub fn trace(&self) -> Trace {
        self.script.trace(self.chunks.len(), |i| crate::trace::Chunk {
            class: Class::STATE[i / self.per_class],
            bytes: self.chunks[i].bytes,
            recompute_s: None,
        })
    }

    /// What was moved since the last report.
    pub fn report(&mut self) -> TierReport {
        let now = report::Snapshot { carried: self.mover.carried(), stall_s: self.stall_s };
        let mut report = report::between(&self.reported, &now, self.other_bytes, self.capacity_bytes);
        report.links[0].bound_bytes = self.follow.as_ref().map(|follow| follow.bound_bytes);
        self.mover.reset_peak();
        self.reported = now;
        report
    }
}

/// What chunks may take of a budget beside `other_bytes`.
pub fn free_for_chunks(dram_bytes: u64, other_bytes: u64) -> u64 {
    dram_bytes.saturating_sub(other_bytes + dram_bytes / SLACK)
}

/// Elements of a chunk that suits a model of `params` and a budget: large enough for the drive,
/// small enough that hundreds of chunks give the placement something to choose.
pub fn chunk_elements(params: usize, dram_bytes: u64) -> usize {
    let by_budget = usize::try_from(dram_bytes / 512).unwrap_or(usize::MAX);
    let wanted = (params / 256).min(by_budget).clamp(PAGE_ELEMENTS, 4 << 20);
    1 << wanted.ilog2()
}

/// Elements whose 2-byte form fills a page.
const PAGE_ELEMENTS: usize = 2048;

impl Drop for Pager {
    fn drop(&mut self) {
        device::limit_parked(None);
    }
}

/// One part in this many of the budget stays free, for what grows between two moments.
const SLACK: u64 = 64;

/// Chunks needed soon may take one part in this many of the capacity.
const WINDOW: u64 = 3;

/// Most that was held and is no chunk, parked blocks included.
fn others_peak() -> u64 {
    device::memory_use().peak_other_bytes as u64
}
