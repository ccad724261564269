//! Executes placement: makes resident what a moment needs, ahead of time where the sequence is
//! known, and takes away what is needed last.
//!
//! Every decision is made on the thread that computes, and made as if all that was queued before
//! were done; the bytes are moved by the threads of `mover`. So a chunk leaves behind the back of
//! the computation, and the computation waits for one thing only: a chunk it needs now.

mod follow;
mod mover;
mod report;
mod residency;
mod script;
mod steps;

pub use report::{LinkCount, TierReport};

use crate::disk::{Disk, DiskError, Options, Region};
use crate::trace::{ChunkId, Phase, Trace};
use crate::{Class, STATES};
use follow::{Action, Follow};
use mover::{Mover, Slot};
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

/// Most that was held and is no chunk, parked blocks included.
fn others_peak() -> u64 {
    device::memory_use().peak_other_bytes as u64
}
