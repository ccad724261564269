//! What goes into the planner beside a trace, and what comes out of it. Plain data.

use super::picture::bytes;
use super::replay::Broken;
use crate::trace::{BadTrace, ChunkId, Moment, MomentId, Runs};
use crate::{Class, Tier};

/// Bytes that may be used, by tier; a tier without a budget is not there.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Budgets {
    /// Memory of the GPU, or the arena that plays it.
    pub hbm: Option<u64>,
    /// Memory of the host, staging buffers included.
    pub dram: Option<u64>,
    /// Space on the drive.
    pub nvme: Option<u64>,
}

impl Budgets {
    /// The budget of a tier.
    pub const fn of(&self, tier: Tier) -> Option<u64> {
        match tier {
            Tier::Hbm => self.hbm,
            Tier::Dram => self.dram,
            Tier::Nvme => self.nvme,
        }
    }

    /// The same with another budget for `tier`.
    pub const fn with(mut self, tier: Tier, bytes: Option<u64>) -> Budgets {
        match tier {
            Tier::Hbm => self.hbm = bytes,
            Tier::Dram => self.dram = bytes,
            Tier::Nvme => self.nvme = bytes,
        }
        self
    }

    /// Tiers that are there, fastest first.
    pub fn tiers(&self) -> Vec<Tier> {
        let all = [Tier::Hbm, Tier::Dram, Tier::Nvme];
        all.into_iter().filter(|tier| self.of(*tier).is_some()).collect()
    }
}

/// Measured bytes per second of a link, each way.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LinkRate {
    /// Towards the faster tier.
    pub up_per_s: f64,
    /// Towards the slower tier.
    pub down_per_s: f64,
}

/// Measured speeds of a machine. Compute is in the trace: seconds of each moment.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rates {
    /// Between HBM and DRAM.
    pub host: LinkRate,
    /// Between DRAM and NVMe.
    pub nvme: LinkRate,
}

impl Rates {
    /// The link below `tier`.
    pub const fn below(&self, tier: Tier) -> LinkRate {
        match tier {
            Tier::Hbm => self.host,
            _ => self.nvme,
        }
    }
}

/// What a move does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum MoveKind {
    /// Copy one tier up; the copy below stays valid.
    Fetch,
    /// Copy one tier down; the copy above stays valid until it is dropped.
    WriteBack,
    /// Forget the copy in `from`; `to` is the same tier. No bytes move.
    Drop,
    /// Make the chunk again in `to`, in the gap before `before`. No bytes move.
    Recompute,
}

/// One move of one chunk, once a step.
///
/// It may start once moment `after` has ended and must be done when moment `before` begins. Moments
/// are cyclic: `before <= after` means `before` of the next step. Room in `to` counts as taken from
/// the end of `after` on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Move {
    /// Moment after whose end it may start.
    pub after: MomentId,
    /// Moment that must not begin before it is done.
    pub before: MomentId,
    /// What moves.
    pub chunk: ChunkId,
    /// Tier of the valid copy.
    pub from: Tier,
    /// Tier of the new copy.
    pub to: Tier,
    /// What happens.
    pub kind: MoveKind,
    /// Bytes over the link: the chunk's (a wasteful rule may carry more), 0 for drops and recomputes.
    pub bytes: u64,
}

impl Move {
    /// Whether the move starts in one step and is due in the next.
    pub const fn wraps(&self) -> bool {
        self.before <= self.after
    }
}

/// What a link carries in a step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LinkReport {
    /// The faster end.
    pub upper: Tier,
    /// The slower end.
    pub lower: Tier,
    /// Bytes fetched.
    pub up_bytes: u64,
    /// Bytes written back.
    pub down_bytes: u64,
    /// No plan with these budgets (and these recomputes and places of the optimizer) moves fewer.
    pub bound_bytes: u64,
    /// Predicted seconds the step waits for this link.
    pub stall_s: f64,
}

impl LinkReport {
    /// Bytes both ways.
    pub const fn moved_bytes(&self) -> u64 {
        self.up_bytes + self.down_bytes
    }

    /// Share by which `moved_bytes` exceeds the bound; 0 where nothing moves.
    pub fn gap(&self) -> f64 {
        let (moved, bound) = (self.moved_bytes() as f64, self.bound_bytes as f64);
        if moved <= bound { 0.0 } else { (moved - bound) / bound.max(1.0) }
    }
}

/// Where everything lies and what moves when, for every step until the trace or a budget changes.
#[derive(Clone, Debug, PartialEq)]
pub struct Plan {
    /// In the order they start: sorted by `after`, and within the gap after a moment in an order in
    /// which, done one after the other, they never exceed a budget.
    pub moves: Vec<Move>,
    /// Copies that are valid when moment 0 begins. A move that wraps counts as done.
    pub initial: Vec<(ChunkId, Tier)>,
    /// By moment: the tier it computes in.
    pub runs: Vec<Tier>,
    /// By chunk: the slowest tier it ever lies in. Chunks with `Tier::Nvme` need a slot on the drive.
    pub homes: Vec<Tier>,
    /// Highest bytes in use at any moment, other bytes included, by tier, fastest first.
    pub peaks: Vec<(Tier, u64)>,
    /// By link, fastest first.
    pub links: Vec<LinkReport>,
    /// Seconds of all moments, from the trace.
    pub compute_s: f64,
    /// Predicted seconds of recomputing.
    pub recompute_s: f64,
    /// Predicted seconds the step waits, over all links.
    pub stall_s: f64,
}

impl Plan {
    /// Predicted seconds of a step.
    pub fn step_s(&self) -> f64 {
        self.compute_s + self.recompute_s + self.stall_s
    }

    /// Bytes over all links.
    pub fn moved_bytes(&self) -> u64 {
        self.links.iter().map(LinkReport::moved_bytes).sum()
    }
}

/// The trace cannot run within the budgets.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{tier} is {} short at moment {moment} ({op}), where {class} takes most: \
     give {tier} at least {least_bytes} bytes ({}){remedy}",
    bytes(*missing_bytes), bytes(*least_bytes)
)]
pub struct DoesNotFit {
    /// The tier that is too small.
    pub tier: Tier,
    /// The first moment at which most is missing.
    pub moment: MomentId,
    /// Its op.
    pub op: String,
    /// Class with the most bytes there (of one chunk) or, on the drive, altogether.
    pub class: Class,
    /// What is missing there.
    pub missing_bytes: u64,
    /// The budget of this tier with which the most modest plan that was tried fits, the others as they
    /// are.
    pub least_bytes: u64,
    /// What else would do, as `, or ...`; may be empty.
    pub remedy: String,
}

/// Seconds a moment computes in the tier it runs in.
pub(super) fn seconds(moment: &Moment, tier: Tier, fastest: Tier) -> f64 {
    match moment.runs {
        Runs::Either { host_s } if tier != fastest => host_s,
        _ => moment.seconds,
    }
}

/// No plan.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// The trace cannot run within the budgets.
    #[error(transparent)]
    DoesNotFit(Box<DoesNotFit>),
    /// The trace means nothing.
    #[error(transparent)]
    BadTrace(#[from] BadTrace),
    /// Budgets of tiers that cannot compute or do not join.
    #[error("budgets for {tiers:?} are no machine: it computes in hbm or dram, and nvme stands behind dram")]
    NoTier {
        /// Tiers with a budget.
        tiers: Vec<Tier>,
    },
    /// A speed that is none.
    #[error("the link below {tier} is said to carry {per_s} bytes/s: measure it, it must be above 0")]
    BadRate {
        /// Faster end of the link.
        tier: Tier,
        /// What was said.
        per_s: String,
    },
    /// The planner made a mistake and its own check found it.
    #[error("the plan breaks its promise ({0}): this is a bug of the planner, please report it")]
    Broken(#[from] Broken),
}
