//! Executes placement: makes resident what a moment needs, ahead of time where the sequence is
//! known, and takes away what is needed last.
//!
//! Every decision is made on the thread that computes, and made as if all that was queued before
//! were done; the bytes are moved by the threads of `mover`. So a chunk leaves behind the back of
//! the computation, and the computation waits for one thing only: a chunk it needs now.
//!
//! Tiers are counted by their depth, fastest first: 0 is where ops compute. Of a chunk it is known in
//! which tiers a copy is *valid*. A copy that has a valid one below it is dropped without a move; one
//! that is written makes all others stale, and their room is free at once. A chunk with no valid copy
//! reads as zeros. Two tiers or three are the same code: a link is a pair of neighbours.

mod follow;
mod mover;
mod report;
mod residency;
mod room;
mod script;
mod steps;

pub use report::{LinkCount, TierCount, TierReport};

use crate::arrays::At;
use crate::disk::{Disk, DiskError, Options, Region, Trial};
use crate::plan::Budgets;
use crate::trace::{ChunkId, Phase, Trace};
use crate::{CLASSES, Class, Tier};
use device::{DType, Device};
use follow::{Action, Follow};
use mover::{MEMORIES, Mover, Slot};
use script::Script;
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
    /// What may be used, by tier; a tier without a budget is not there. Everything that is no chunk
    /// lies in the fastest. The budgets are those of the whole process.
    pub budgets: Budgets,
    /// Pagers of this process, which share the budgets equally.
    pub ranks: u64,
    /// Where ops compute, and so whose memory the fastest tier is.
    pub device: Device,
    /// Folder of the offload file.
    pub dir: PathBuf,
    /// How the drive is best asked; none: as `disk::Options` has it.
    pub drive: Option<Trial>,
    /// Who leaves.
    pub policy: Policy,
    /// Kept free for everything that is no chunk until a step has shown what it takes.
    pub other_bytes: u64,
    /// Elements of a chunk, a multiple of 2048.
    pub chunk_elements: usize,
    /// Values that are filed on the way forth and come back on the way back.
    pub filed: Option<Filed>,
}

/// Room for values that layers keep for the way back: an array beside those of the state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Filed {
    /// Elements of all of them, a multiple of those of a chunk.
    pub elements: usize,
    /// Of what type.
    pub dtype: DType,
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
        "{op} of layer {layer} needs {needs_bytes} bytes in {tier} at once, {capacity_bytes} are left of {key} = {budget_bytes} bytes beside {other_bytes} of activations and buffers; raise {key} or lower train.batch, train.context or the model's widest matrix",
        key = key_of(*tier, *device)
    )]
    TooSmall {
        /// Which op.
        op: &'static str,
        /// Of which layer.
        layer: u32,
        /// Where.
        tier: Tier,
        /// Where ops compute.
        device: Device,
        /// What it needs.
        needs_bytes: u64,
        /// What chunks may take.
        capacity_bytes: u64,
        /// The budget.
        budget_bytes: u64,
        /// What is no chunk.
        other_bytes: u64,
    },
    /// Another budget was asked for in which the step cannot run.
    #[error(
        "{key} = {budget_bytes} bytes is too little for this run: it needs {least_bytes}; the budgets stay as they were",
        key = key_of(*tier, *device)
    )]
    Budget {
        /// Which tier.
        tier: Tier,
        /// Where ops compute.
        device: Device,
        /// What was asked for.
        budget_bytes: u64,
        /// The least.
        least_bytes: u64,
    },
    /// Budgets for other tiers than there are.
    #[error("budgets for {asked:?}, the run has {tiers:?}; tiers are set up when a run begins")]
    Tiers {
        /// Tiers with a budget.
        asked: Vec<Tier>,
        /// Tiers there are.
        tiers: Vec<Tier>,
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

/// The key of the recipe that is a tier's budget, where ops compute on `device`.
pub fn key_of(tier: Tier, device: Device) -> &'static str {
    match tier {
        Tier::Hbm if device == Device::Cuda => "memory.hbm",
        Tier::Hbm => "memory.simulate_device",
        Tier::Dram => "memory.dram",
        Tier::Nvme => "memory.nvme",
    }
}

#[derive(Clone, Copy, Debug, Default)]
struct Chunk {
    /// By depth: whether a copy is valid there, once everything queued is done.
    valid: [bool; MEMORIES + 1],
    /// By depth: stays for ever under the static policy.
    fixed: [bool; MEMORIES],
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
    /// Chunks of a class of the state. The last class has as many as its array is long.
    per_class: usize,
    /// Fastest first.
    tiers: Vec<Tier>,
    /// How many of them are memory: depths below this have room, and windows.
    memories: usize,
    /// By depth: bytes held once everything queued is done.
    planned_bytes: [u64; MEMORIES],
    capacity_bytes: [u64; MEMORIES],
    /// Largest that others were seen to hold.
    other_bytes: u64,
    /// Visits so far, over all steps.
    clock: u64,
    in_step: bool,
    /// The present moment, and the depth of the memory it computes in.
    about: About,
    depth: usize,
    script: Script,
    /// The plan for the script, once it was made.
    follow: Option<Follow>,
    /// What the plan wanted begun and could not be yet.
    late: Vec<Action>,
    computing_since: Option<Instant>,
    /// By link.
    stall_s: [f64; MEMORIES],
    /// By class: over all links and both ways.
    moved_bytes: [u64; CLASSES],
    reported: report::Snapshot,
}

impl Pager {
    /// Places for the chunks of arrays: by class, bytes of each chunk; none for a class that is
    /// not there. All begin as zeros.
    pub(crate) fn new(setup: Setup, chunk_bytes: &[(Class, Vec<usize>)]) -> Result<Pager, PagerError> {
        let per_class = chunk_bytes.first().map_or(0, |(_, chunks)| chunks.len());
        let filed = chunk_bytes.iter().find(|(class, _)| *class == Class::Activation);
        let filed = filed.map_or(0, |(_, chunks)| chunks.len());
        let mut chunks = vec![Chunk::default(); per_class * Class::STATE.len() + filed];
        for (region, (class, sizes)) in chunk_bytes.iter().enumerate() {
            let mut offset = 0;
            for (i, bytes) in sizes.iter().enumerate() {
                let chunk = &mut chunks[*class as usize * per_class + i];
                (chunk.bytes, chunk.slot) = (*bytes as u64, Some(Slot { region: Region(region), offset }));
                offset += *bytes as u64;
            }
        }
        let tiers = setup.budgets.tiers();
        let memories = tiers.iter().filter(|tier| **tier != Tier::Nvme).count();
        let disk = match setup.budgets.nvme {
            Some(nvme_bytes) => Some(offload_file(&setup, nvme_bytes / setup.ranks, chunk_bytes)?),
            None => None,
        };
        let all_bytes = setup.ranks * chunks.iter().map(|chunk| chunk.bytes).sum::<u64>();
        let mover = Mover::start(tiers.len() - 1, disk, all_bytes);
        let mover = mover.map_err(|error| PagerError::Threads(error.to_string()))?;
        let mut pager = Pager {
            setup,
            mover,
            chunks,
            per_class,
            tiers,
            memories,
            planned_bytes: [0; MEMORIES],
            capacity_bytes: [0; MEMORIES],
            other_bytes: 0,
            clock: 0,
            in_step: false,
            about: About { phase: Phase::Forward, op: "", layer: 0 },
            depth: 0,
            script: Script::default(),
            follow: None,
            late: Vec::new(),
            computing_since: None,
            stall_s: [0.0; MEMORIES],
            moved_bytes: [0; CLASSES],
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
        let fixes = self.setup.policy == Policy::Static;
        for depth in 0..self.memories {
            let mut left = self.capacity_bytes[depth] * 3 / 4;
            let computes_only = depth + 1 < self.memories;
            for (i, chunk) in self.chunks.iter_mut().enumerate() {
                // Optimizer state never comes up to where ops compute.
                let comes = !computes_only || i / self.per_class <= Class::Grad16 as usize;
                let fits = fixes && comes && chunk.bytes > 0 && chunk.bytes <= left;
                chunk.fixed[depth] = fits && !chunk.fixed[..depth].contains(&true);
                left -= if chunk.fixed[depth] { chunk.bytes } else { 0 };
            }
        }
    }

    /// Chunks `i` of `class`.
    pub(crate) fn id(&self, class: Class, i: usize) -> ChunkId {
        ChunkId((class as usize * self.per_class + i) as u32)
    }

    /// Whether it is one of ours: granules of other ranks have no place among the tiers.
    pub(crate) fn has(&self, id: ChunkId) -> bool {
        self.chunk(id).bytes > 0
    }

    /// Where the regions have a chunk at a depth of memory.
    fn at(&self, id: ChunkId, depth: usize) -> At {
        let class = self.class_of(id.0 as usize) as usize;
        At { class, depth, i: id.0 as usize - class * self.per_class }
    }

    fn class_of(&self, chunk: usize) -> Class {
        Class::ALL[(chunk / self.per_class).min(CLASSES - 1)]
    }

    /// Room for values that are filed.
    pub(crate) fn filed(&self) -> Option<Filed> {
        self.setup.filed
    }

    /// Bytes of a class moved so far.
    pub(crate) fn moved_bytes(&self, class: Class) -> u64 {
        self.moved_bytes[class as usize]
    }

    fn chunk(&self, id: ChunkId) -> &Chunk {
        &self.chunks[id.0 as usize]
    }

    /// The moment before has ended.
    fn pause(&mut self) {
        if let Some(since) = self.computing_since.take()
            && self.in_step
        {
            let measured = match self.setup.device {
                Device::Cpu => true,
                // Only who waits for a GPU knows how long it took: while the step is learnt.
                Device::Cuda => !self.script.is_settled(),
            };
            if measured && self.setup.device == Device::Cuda {
                device::cuda::synchronise();
            }
            self.script.measured(measured.then(|| since.elapsed().as_secs_f64()), self.others_peak());
        }
    }

    /// Most that was held where ops compute and is no chunk, parked blocks included.
    fn others_peak(&self) -> u64 {
        device::memory_use_of(self.setup.device).peak_other_bytes as u64
    }

    /// What is no chunk takes its share of the fastest tier's budget first.
    fn measure_others(&mut self) {
        self.other_bytes = self.other_bytes.max(self.others_peak()).max(self.setup.other_bytes);
        let capacity = self.capacities(&self.setup.budgets);
        if capacity != self.capacity_bytes {
            device::limit_parked(self.setup.device, Some(self.other_bytes as usize));
            self.capacity_bytes = capacity;
            (0..self.memories).for_each(|depth| self.mover.set_capacity(depth, capacity[depth]));
        }
    }

    /// What chunks of this pager may take of each memory.
    fn capacities(&self, budgets: &Budgets) -> [u64; MEMORIES] {
        std::array::from_fn(|depth| {
            let budget = self.tiers.get(depth).and_then(|tier| budgets.of(*tier)).unwrap_or(0);
            free_for_chunks(budget, if depth == 0 { self.other_bytes } else { 0 }) / self.setup.ranks
        })
    }

    /// The step as it was last recorded, for the planner.
    pub fn trace(&self) -> Trace {
        let chunk = |i: usize| crate::trace::Chunk {
            class: self.class_of(i),
            bytes: self.chunks[i].bytes,
            recompute_s: None,
        };
        self.script.trace(self.chunks.len(), chunk)
    }

    /// What was moved, or is on its way, since the last report.
    pub fn report(&mut self) -> TierReport {
        let now = report::Snapshot { sent: self.mover.sent(), stall_s: self.stall_s };
        let links = (0..self.tiers.len() - 1).map(|link| {
            let bound_bytes = self.follow.as_ref().and_then(|follow| follow.bound_bytes.get(link).copied());
            LinkCount { bound_bytes, ..now.since(&self.reported, link, &self.tiers) }
        });
        let links = links.collect();
        let peaks = self.mover.take_peaks();
        let tiers = (0..self.memories).map(|depth| TierCount {
            tier: self.tiers[depth],
            peak_bytes: peaks[depth],
            capacity_bytes: self.capacity_bytes[depth],
        });
        let stretches = self.follow.as_ref().and_then(|follow| follow.stretches);
        let report = TierReport { links, tiers: tiers.collect(), other_bytes: self.other_bytes, stretches };
        self.reported = now;
        report
    }
}

/// The file behind the lowest memory, with a place for every chunk.
fn offload_file(
    setup: &Setup,
    nvme_bytes: u64,
    chunk_bytes: &[(Class, Vec<usize>)],
) -> Result<Disk, PagerError> {
    let whole = |chunks: &[usize]| chunks.iter().map(|bytes| *bytes as u64).sum::<u64>();
    let layout: Vec<(String, u64)> =
        chunk_bytes.iter().map(|(class, chunks)| (class.to_string(), whole(chunks))).collect();
    let needs_bytes = layout.iter().map(|(_, bytes)| bytes).sum();
    if needs_bytes > nvme_bytes {
        return Err(PagerError::Drive { nvme_bytes, needs_bytes });
    }
    let layout: Vec<(&str, u64)> = layout.iter().map(|(name, bytes)| (name.as_str(), *bytes)).collect();
    std::fs::create_dir_all(&setup.dir)
        .map_err(|error| PagerError::Folder { dir: setup.dir.clone(), what: error.to_string() })?;
    let options = match setup.drive {
        Some(Trial { block_bytes, depth, .. }) => Options { block_bytes, depth, ..Options::default() },
        None => Options::default(),
    };
    Ok(Disk::create(&setup.dir, &layout, options)?)
}

/// Bytes a second that one thread copies within memory: what the link to a simulated device carries.
pub fn copied_per_s() -> f64 {
    const BYTES: usize = 32 << 20;
    let (from, mut to) = (vec![1u8; BYTES], vec![0u8; BYTES]);
    let mut seconds = f64::INFINITY;
    for _ in 0..3 {
        let started = Instant::now();
        to.copy_from_slice(std::hint::black_box(&from));
        std::hint::black_box(&mut to);
        seconds = seconds.min(started.elapsed().as_secs_f64());
    }
    BYTES as f64 / seconds
}

/// What chunks may take of a budget beside `other_bytes`.
pub fn free_for_chunks(budget_bytes: u64, other_bytes: u64) -> u64 {
    budget_bytes.saturating_sub(other_bytes.saturating_add(budget_bytes / SLACK))
}

/// Elements of a chunk that suits a model of `params` and a budget: large enough for the drive,
/// small enough that hundreds of chunks give the placement something to choose. Where about a hundred are
/// left, chunks are whole huge pages in every class of 2 or 4 bytes: small pages come one by one.
pub fn chunk_elements(params: usize, dram_bytes: u64) -> usize {
    let by_budget = |part: u64| usize::try_from(dram_bytes / part).unwrap_or(usize::MAX);
    let wanted = (params / 256).min(by_budget(512)).clamp(PAGE_ELEMENTS, 4 << 20);
    let huge = (params / 96).min(by_budget(256)) >= HUGE_ELEMENTS;
    let wanted = if huge { wanted.max(HUGE_ELEMENTS) } else { wanted };
    1 << wanted.ilog2()
}

/// Elements whose 2-byte form fills a huge page.
const HUGE_ELEMENTS: usize = 1 << 20;

/// Elements whose 2-byte form fills a page.
const PAGE_ELEMENTS: usize = 2048;

impl Drop for Pager {
    fn drop(&mut self) {
        device::limit_parked(self.setup.device, None);
    }
}

/// One part in this many of the budget stays free, for what grows between two moments.
const SLACK: u64 = 64;
