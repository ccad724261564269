//! Replays a plan against its trace, believing nothing: what is valid where, what every tier holds at
//! every moment and between them, what the links carry, how long the step waits.
//!
//! Knows only `Trace`, `Plan` and their words; shares no code with the planner. Two steps are run: the
//! first from `Plan::initial`, the second, from which the figures are taken, from what the first left.

use super::types::{Budgets, LinkReport, Move, MoveKind, Plan, Rates};
use crate::Tier;
use crate::trace::{Access, ChunkId, MomentId, Trace};
use std::collections::BTreeMap;

/// What a replayed plan did in one step.
#[derive(Clone, Debug, PartialEq)]
pub struct Replay {
    /// Highest bytes in use by tier, fastest first.
    pub peaks: Vec<(Tier, u64)>,
    /// By link, fastest first; `bound_bytes` is 0.
    pub links: Vec<LinkReport>,
    /// Seconds of the moments.
    pub compute_s: f64,
    /// Seconds of recomputing.
    pub recompute_s: f64,
    /// Seconds waited, over all links.
    pub stall_s: f64,
    /// By moment: bytes in use of each tier of `peaks`.
    pub usage: Vec<Vec<u64>>,
}

/// The plan breaks a promise: a mistake of whoever made it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Broken {
    /// A tier holds more than its budget.
    #[error("{tier} holds {used_bytes} of {budget_bytes} bytes at moment {moment}")]
    OverBudget {
        /// Which tier.
        tier: Tier,
        /// At, or in the gap after, this moment.
        moment: MomentId,
        /// What it holds.
        used_bytes: u64,
        /// What it may hold.
        budget_bytes: u64,
    },
    /// A use or a move finds no valid copy.
    #[error("chunk {chunk} is not valid in {tier} at moment {moment}")]
    NotValid {
        /// Which chunk.
        chunk: u32,
        /// Where it was looked for.
        tier: Tier,
        /// At, or in the gap after, this moment.
        moment: MomentId,
    },
    /// A chunk is written or dropped while it is copied.
    #[error("chunk {chunk} changes in {tier} at moment {moment} while it is copied")]
    Torn {
        /// Which chunk.
        chunk: u32,
        /// Where it changes.
        tier: Tier,
        /// At, or in the gap after, this moment.
        moment: MomentId,
    },
    /// A move that makes no sense.
    #[error("move {index} makes no sense: {reason}")]
    Senseless {
        /// Position in `Plan::moves`.
        index: usize,
        /// Why.
        reason: &'static str,
    },
}

/// Replay `plan` and check everything it promises.
pub fn replay(trace: &Trace, budgets: &Budgets, rates: &Rates, plan: &Plan) -> Result<Replay, Broken> {
    let mut state = State::new(trace, budgets, rates, plan)?;
    for lap in 0..2 {
        state.begin_lap(lap);
        for moment in 0..trace.moments.len() {
            state.run_moment(moment)?;
            state.run_gap(moment)?;
        }
    }
    Ok(state.done)
}

#[derive(Clone, Copy, Default)]
struct Copy {
    present: bool,
    valid: bool,
    /// Second at which it became whole.
    whole_s: f64,
}

struct Flight<'a> {
    done_s: f64,
    action: &'a Move,
}

struct State<'a> {
    trace: &'a Trace,
    plan: &'a Plan,
    budgets: &'a Budgets,
    rates: &'a Rates,
    tiers: Vec<Tier>,
    /// By chunk: copies in HBM, DRAM, NVMe.
    copies: Vec<[Copy; 3]>,
    used: [u64; 3],
    starts: Vec<Vec<usize>>,
    uses: Vec<Vec<(ChunkId, Access)>>,
    flights: BTreeMap<MomentId, Vec<Flight<'a>>>,
    /// Moves under way by chunk.
    flying: BTreeMap<ChunkId, Vec<(Tier, Tier)>>,
    /// Second at which each directed link is free, by (from, to).
    busy_until: BTreeMap<(Tier, Tier), f64>,
    clock_s: f64,
    done: Replay,
}

impl<'a> State<'a> {
    fn new(trace: &'a Trace, budgets: &'a Budgets, rates: &'a Rates, plan: &'a Plan) -> Result<Self, Broken> {
        let tiers = budgets.tiers();
        let mut starts = vec![Vec::new(); trace.moments.len()];
        for (index, action) in plan.moves.iter().enumerate() {
            sense(index, action, trace, &tiers)?;
            if action.to == Tier::Nvme && plan.homes[action.chunk.0 as usize] != Tier::Nvme {
                return Err(Broken::Senseless { index, reason: "the chunk has no slot on the drive" });
            }
            starts[action.after as usize].push(index);
        }
        let mut uses = vec![Vec::new(); trace.moments.len()];
        for used in &trace.uses {
            uses[used.moment as usize].push((used.chunk, used.access));
        }
        let links = tiers.windows(2).map(|pair| LinkReport {
            upper: pair[0],
            lower: pair[1],
            up_bytes: 0,
            down_bytes: 0,
            bound_bytes: 0,
            stall_s: 0.0,
        });
        let done = Replay {
            peaks: tiers.iter().map(|tier| (*tier, 0)).collect(),
            links: links.collect(),
            compute_s: 0.0,
            recompute_s: 0.0,
            stall_s: 0.0,
            usage: Vec::new(),
        };
        let mut state = State {
            copies: vec![[Copy::default(); 3]; trace.chunks.len()],
            used: [0; 3],
            flights: BTreeMap::new(),
            flying: BTreeMap::new(),
            busy_until: BTreeMap::new(),
            clock_s: 0.0,
            trace,
            plan,
            budgets,
            rates,
            tiers,
            starts,
            uses,
            done,
        };
        // A drive's slots are reserved before the run and stay.
        let slots = plan.homes.iter().enumerate().filter(|(_, home)| **home == Tier::Nvme);
        state.used[2] = slots.map(|(chunk, _)| trace.chunks[chunk].bytes).sum();
        for (chunk, tier) in &plan.initial {
            state.reserve(*chunk, *tier);
            state.copies[chunk.0 as usize][*tier as usize].valid = true;
        }
        Ok(state)
    }

    fn begin_lap(&mut self, lap: usize) {
        if lap == 0 {
            return;
        }
        self.done.usage.clear();
        (self.done.compute_s, self.done.recompute_s, self.done.stall_s) = (0.0, 0.0, 0.0);
        for link in &mut self.done.links {
            (link.up_bytes, link.down_bytes, link.stall_s) = (0, 0, 0.0);
        }
    }

    fn reserve(&mut self, chunk: ChunkId, tier: Tier) {
        let copy = &mut self.copies[chunk.0 as usize][tier as usize];
        if !copy.present {
            copy.present = true;
            if tier != Tier::Nvme {
                self.used[tier as usize] += self.trace.chunk(chunk).bytes;
            }
        }
    }

    fn check_budgets(&self, moment: usize, other: u64) -> Result<(), Broken> {
        for tier in &self.tiers {
            let other = if *tier == self.tiers[0] { other } else { 0 };
            let (used, budget) = (self.used[*tier as usize] + other, self.budgets.of(*tier).unwrap_or(0));
            if used > budget {
                let moment = moment as MomentId;
                return Err(Broken::OverBudget {
                    tier: *tier,
                    moment,
                    used_bytes: used,
                    budget_bytes: budget,
                });
            }
        }
        Ok(())
    }

    fn run_moment(&mut self, moment: usize) -> Result<(), Broken> {
        let (info, tier) = (&self.trace.moments[moment], self.plan.runs[moment]);
        for (chunk, access) in self.uses[moment].clone() {
            let valid = self.copies[chunk.0 as usize][tier as usize].valid;
            if access.reads() && !valid {
                return Err(Broken::NotValid { chunk: chunk.0, tier, moment: moment as MomentId });
            }
            self.reserve(chunk, tier);
            if access.writes() {
                if self.flying.contains_key(&chunk) {
                    return Err(Broken::Torn { chunk: chunk.0, tier, moment: moment as MomentId });
                }
                self.copies[chunk.0 as usize].iter_mut().for_each(|copy| copy.valid = false);
                self.copies[chunk.0 as usize][tier as usize].valid = true;
            }
        }
        self.check_budgets(moment, info.other_bytes)?;
        let fastest = self.tiers[0];
        let usage: Vec<u64> = self
            .tiers
            .iter()
            .map(|tier| self.used[*tier as usize] + if *tier == fastest { info.other_bytes } else { 0 })
            .collect();
        for ((_, peak), used) in self.done.peaks.iter_mut().zip(&usage) {
            *peak = (*peak).max(*used);
        }
        self.done.usage.push(usage);
        let seconds = super::types::seconds(info, tier, fastest);
        self.done.compute_s += seconds;
        self.clock_s += seconds;
        for (chunk, _) in self.uses[moment].iter().filter(|(_, access)| access.writes()) {
            self.copies[chunk.0 as usize][tier as usize].whole_s = self.clock_s;
        }
        Ok(())
    }

    fn run_gap(&mut self, moment: usize) -> Result<(), Broken> {
        let next = (moment + 1) % self.trace.moments.len();
        let other = self.trace.moments[moment].other_bytes.min(self.trace.moments[next].other_bytes);
        let (mut due_s, mut late) = (self.clock_s, None);
        // Room for what is fetched now may be what these free.
        let mut freed_s = self.clock_s;
        for Flight { done_s, action } in self.flights.remove(&(next as MomentId)).unwrap_or_default() {
            self.land(action, done_s);
            if action.kind == MoveKind::WriteBack {
                freed_s = freed_s.max(done_s);
            }
            if done_s > due_s {
                (due_s, late) = (done_s, Some(action));
            }
        }
        let mut again_s = 0.0;
        for index in self.starts[moment].clone() {
            let plan = self.plan;
            let action = &plan.moves[index];
            let not_valid =
                Broken::NotValid { chunk: action.chunk.0, tier: action.from, moment: moment as MomentId };
            match action.kind {
                MoveKind::Drop => self.drop_copy(action, moment)?,
                MoveKind::Recompute => {
                    self.reserve(action.chunk, action.to);
                    self.copies[action.chunk.0 as usize][action.to as usize].valid = true;
                    again_s += self.trace.chunk(action.chunk).recompute_s.unwrap_or(0.0);
                }
                MoveKind::Fetch | MoveKind::WriteBack => {
                    if !self.copies[action.chunk.0 as usize][action.from as usize].valid {
                        return Err(not_valid);
                    }
                    let done_s = self.take_off(action, freed_s);
                    if action.before as usize != next {
                        self.flights.entry(action.before).or_default().push(Flight { done_s, action });
                    } else {
                        self.land(action, done_s);
                        if action.kind == MoveKind::WriteBack {
                            freed_s = freed_s.max(done_s);
                        }
                        if done_s > due_s {
                            (due_s, late) = (done_s, Some(action));
                        }
                    }
                }
            }
            self.check_budgets(moment, other)?;
        }
        self.wait(due_s, late);
        self.clock_s += again_s;
        self.done.recompute_s += again_s;
        Ok(())
    }

    fn wait(&mut self, due_s: f64, late: Option<&Move>) {
        let Some(late) = late else { return };
        let stall_s = due_s - self.clock_s;
        self.clock_s = due_s;
        self.done.stall_s += stall_s;
        let upper = late.from.min(late.to);
        if let Some(link) = self.done.links.iter_mut().find(|link| link.upper == upper) {
            link.stall_s += stall_s;
        }
    }

    fn take_off(&mut self, action: &'a Move, freed_s: f64) -> f64 {
        self.reserve(action.chunk, action.to);
        let (link, up) = match action.kind {
            MoveKind::Fetch => (self.rates.below(action.to).up_per_s, true),
            _ => (self.rates.below(action.from).down_per_s, false),
        };
        let busy = self.busy_until.entry((action.from, action.to)).or_insert(0.0);
        let whole_s = self.copies[action.chunk.0 as usize][action.from as usize].whole_s;
        let start_s = busy.max(self.clock_s).max(whole_s).max(if up { freed_s } else { 0.0 });
        let done_s = start_s + action.bytes as f64 / link;
        *busy = done_s;
        let upper = action.from.min(action.to);
        if let Some(report) = self.done.links.iter_mut().find(|link| link.upper == upper) {
            *(if up { &mut report.up_bytes } else { &mut report.down_bytes }) += action.bytes;
        }
        self.flying.entry(action.chunk).or_default().push((action.from, action.to));
        done_s
    }

    fn land(&mut self, action: &Move, done_s: f64) {
        let copy = &mut self.copies[action.chunk.0 as usize][action.to as usize];
        (copy.valid, copy.whole_s) = (true, done_s);
        if let Some(flying) = self.flying.get_mut(&action.chunk) {
            if let Some(at) = flying.iter().position(|ends| *ends == (action.from, action.to)) {
                flying.swap_remove(at);
            }
            if flying.is_empty() {
                self.flying.remove(&action.chunk);
            }
        }
    }

    fn drop_copy(&mut self, action: &Move, moment: usize) -> Result<(), Broken> {
        let (chunk, tier) = (action.chunk, action.from);
        let copied = self.flying.get(&chunk).is_some_and(|moves| moves.iter().any(|ends| ends.0 == tier));
        if copied {
            return Err(Broken::Torn { chunk: chunk.0, tier, moment: moment as MomentId });
        }
        let copy = &mut self.copies[chunk.0 as usize][tier as usize];
        if !copy.present {
            return Err(Broken::NotValid { chunk: chunk.0, tier, moment: moment as MomentId });
        }
        *copy = Copy::default();
        if tier != Tier::Nvme {
            self.used[tier as usize] -= self.trace.chunk(chunk).bytes;
        }
        Ok(())
    }
}

fn sense(index: usize, action: &Move, trace: &Trace, tiers: &[Tier]) -> Result<(), Broken> {
    let senseless = |reason| Err(Broken::Senseless { index, reason });
    let moments = trace.moments.len() as u32;
    if action.after >= moments || action.before >= moments || action.chunk.0 as usize >= trace.chunks.len() {
        return senseless("it names a moment or chunk that is not there");
    }
    let place = |tier| tiers.iter().position(|t| *t == tier);
    let (Some(from), Some(to)) = (place(action.from), place(action.to)) else {
        return senseless("it names a tier without a budget");
    };
    let bytes = trace.chunk(action.chunk).bytes;
    match action.kind {
        MoveKind::Fetch if from != to + 1 => senseless("a fetch goes one tier up"),
        MoveKind::WriteBack if to != from + 1 => senseless("a copy goes one tier down"),
        MoveKind::Fetch | MoveKind::WriteBack if action.bytes < bytes => {
            senseless("it carries too few bytes")
        }
        MoveKind::Drop | MoveKind::Recompute if from != to || action.bytes != 0 => {
            senseless("it stays in its tier and moves nothing")
        }
        MoveKind::Drop | MoveKind::Recompute if (action.after + 1) % moments != action.before => {
            senseless("it happens between two moments that follow each other")
        }
        MoveKind::Recompute if trace.chunk(action.chunk).recompute_s.is_none() => {
            senseless("the chunk cannot be made again")
        }
        _ => Ok(()),
    }
}
