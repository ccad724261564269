//! A plan as the pager carries it out: what to begin once a moment has ended.

use crate::Tier;
use crate::plan::{Move, MoveKind, Plan};
use crate::trace::{ChunkId, Trace};

/// One thing to begin.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Action {
    /// Fetch a chunk.
    Bring(ChunkId),
    /// Let a chunk go, written back first where it is newer than the drive's copy.
    Leave(ChunkId),
}

/// A plan for two tiers, sorted for execution.
pub(super) struct Follow {
    /// By moment: what begins after it.
    after: Vec<Vec<Action>>,
    /// By chunk: whether it is here when moment 0 begins.
    pub initial: Vec<bool>,
    /// No plan moves fewer bytes.
    pub bound_bytes: u64,
    /// Room the plan was made for.
    pub capacity_bytes: u64,
}

impl Follow {
    pub fn new(trace: &Trace, plan: &Plan, capacity_bytes: u64) -> Follow {
        let mut after = vec![Vec::new(); trace.moments.len()];
        for (at, action) in plan.moves.iter().enumerate() {
            let begin = match action.kind {
                MoveKind::Fetch => Action::Bring(action.chunk),
                // Nothing uses it until it is dropped: it can go as soon as it is written.
                MoveKind::WriteBack if leaves_next(trace, plan, at) => Action::Leave(action.chunk),
                MoveKind::Drop if action.from == Tier::Dram => Action::Leave(action.chunk),
                // While a chunk is being written it cannot be read: one that is still to be read
                // is written when it goes.
                MoveKind::WriteBack | MoveKind::Drop | MoveKind::Recompute => continue,
            };
            after[action.after as usize].push(begin);
        }
        let mut initial = vec![false; trace.chunks.len()];
        let here = plan.initial.iter().filter(|(_, tier)| *tier == Tier::Dram);
        here.for_each(|(chunk, _)| initial[chunk.0 as usize] = true);
        let bound_bytes = plan.links.iter().map(|link| link.bound_bytes).sum();
        Follow { after, initial, bound_bytes, capacity_bytes }
    }

    /// What begins once moment `k` has ended.
    pub fn after(&self, k: usize) -> &[Action] {
        self.after.get(k).map_or(&[], Vec::as_slice)
    }
}

/// Whether the chunk of move `at` is dropped before it is used again.
fn leaves_next(trace: &Trace, plan: &Plan, at: usize) -> bool {
    let Move { chunk, after, .. } = plan.moves[at];
    let count = trace.moments.len() as u32;
    // Gaps from the end of `after` on, cyclic.
    let distance = |moment: u32| (moment + count - after - 1) % count;
    let drop = plan
        .moves
        .iter()
        .filter(|other| other.chunk == chunk && other.kind == MoveKind::Drop && other.from == Tier::Dram)
        .map(|drop| (drop.after + count - after) % count)
        .min();
    let used = trace.uses.iter().filter(|used| used.chunk == chunk).map(|used| distance(used.moment)).min();
    match (drop, used) {
        (Some(drop), Some(used)) => drop <= used,
        (drop, None) => drop.is_some(),
        (None, _) => false,
    }
}
