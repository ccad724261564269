//! A plan as the pager carries it out: what to begin once a moment has ended.

use crate::Tier;
use crate::plan::{Move, MoveKind, Plan, Stretch};
use crate::trace::{ChunkId, Trace};

/// One thing to begin. A depth is the place of a tier among those that are there, fastest first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Action {
    /// Copy a chunk up into the memory of a depth.
    Bring(ChunkId, usize),
    /// Let a chunk go from the memory of a depth, copied down first where no deeper tier has it.
    Leave(ChunkId, usize),
}

impl Action {
    /// What it is about.
    pub fn subject(self) -> (ChunkId, usize) {
        let (Action::Bring(chunk, depth) | Action::Leave(chunk, depth)) = self;
        (chunk, depth)
    }
}

/// A plan, sorted for execution.
pub(super) struct Follow {
    /// By moment: what begins after it.
    after: Vec<Vec<Action>>,
    /// By depth of memory, then by chunk: whether it is there when moment 0 begins.
    pub initial: Vec<Vec<bool>>,
    /// By link: no plan moves fewer bytes.
    pub bound_bytes: Vec<u64>,
    /// What any plan has to do in either stretch of the step.
    pub stretches: Option<[Stretch; 2]>,
    /// By depth: room the plan was made for.
    pub capacity_bytes: Vec<u64>,
}

impl Follow {
    pub fn new(trace: &Trace, plan: &Plan, tiers: &[Tier], capacity_bytes: Vec<u64>) -> Follow {
        let depth = |tier: Tier| tiers.iter().position(|there| *there == tier);
        let mut after = vec![Vec::new(); trace.moments.len()];
        for (at, action) in plan.moves.iter().enumerate() {
            let (Some(from), Some(to)) = (depth(action.from), depth(action.to)) else { continue };
            let begin = match action.kind {
                MoveKind::Fetch => Action::Bring(action.chunk, to),
                // Nothing uses it until it is dropped: it can go as soon as it is copied.
                MoveKind::WriteBack if leaves_next(trace, plan, at) => Action::Leave(action.chunk, from),
                MoveKind::Drop if action.from != Tier::Nvme => Action::Leave(action.chunk, from),
                // While a chunk is being copied it cannot be read: one that is still to be read
                // is copied when it goes.
                MoveKind::WriteBack | MoveKind::Drop | MoveKind::Recompute => continue,
            };
            after[action.after as usize].push(begin);
        }
        let mut initial = vec![vec![false; trace.chunks.len()]; capacity_bytes.len()];
        for (chunk, tier) in &plan.initial {
            if let Some(there) = depth(*tier).and_then(|depth| initial.get_mut(depth)) {
                there[chunk.0 as usize] = true;
            }
        }
        let bound_bytes = plan.links.iter().map(|link| link.bound_bytes).collect();
        Follow { after, initial, bound_bytes, stretches: None, capacity_bytes }
    }

    /// What begins once moment `k` has ended.
    pub fn after(&self, k: usize) -> &[Action] {
        self.after.get(k).map_or(&[], Vec::as_slice)
    }
}

/// Whether the chunk of move `at` is dropped from where it is before it is used there again.
fn leaves_next(trace: &Trace, plan: &Plan, at: usize) -> bool {
    let Move { chunk, after, from, .. } = plan.moves[at];
    let count = trace.moments.len() as u32;
    // Gaps from the end of `after` on, cyclic.
    let distance = |moment: u32| (moment + count - after - 1) % count;
    let of_chunk = || plan.moves.iter().filter(|other| other.chunk == chunk && other.from == from);
    let drops = of_chunk().filter(|other| other.kind == MoveKind::Drop);
    let drop = drops.map(|drop| (drop.after + count - after) % count).min();
    let uses = trace.uses.iter().filter(|used| used.chunk == chunk);
    let here = uses.filter(|used| plan.runs[used.moment as usize] == from);
    // Bringing it up reads it, too.
    let fetches = of_chunk().filter(|other| other.kind == MoveKind::Fetch);
    let fetches = fetches.map(|fetch| (fetch.after + count - after) % count);
    let used = here.map(|used| distance(used.moment)).chain(fetches).min();
    match (drop, used) {
        (Some(drop), Some(used)) => drop <= used,
        (drop, None) => drop.is_some(),
        (None, _) => false,
    }
}
