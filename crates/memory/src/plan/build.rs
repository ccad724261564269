//! One plan from one set of decisions: level by level from the fastest tier down.
//!
//! What a level moves over its link is what the next level must hold at that time, so a chunk that
//! goes down twice in a row has gone two tiers down.

use super::bound::wants;
use super::choose::{Choice, Victim};
use super::level::{Event, Item, Level, forward, join_events};
use super::schedule::{Clock, Setting, schedule};
use super::types::{Budgets, DoesNotFit, Move, MoveKind, Plan, Rates, seconds};
use crate::Tier;
use crate::trace::{Access, ChunkId, Runs, Trace};
use std::collections::BTreeMap;
use std::sync::Arc;

/// What there is to plan.
#[derive(Clone, Copy)]
pub(super) struct Problem<'a> {
    pub(super) trace: &'a Trace,
    pub(super) budgets: &'a Budgets,
    pub(super) rates: &'a Rates,
}

/// How chunks that may rest are chosen.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Rule {
    /// The cheapest of all rules, filled up.
    Best,
    /// Most bytes saved per byte of room, the quickest good rule.
    Densest,
    /// Evict by a rule of recency or distance.
    Walk(Victim),
    /// A prefix stays, the rest leaves after every use.
    Prefix,
    /// Gemini's: no look past the end of the step, and wasted bytes.
    Gemini,
}

/// Decisions that are made before any level is packed.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Course {
    pub(super) rule: Rule,
    /// Share of the room that is not rested in: it takes what is on its way.
    pub(super) reserve: f64,
    /// By moment: whether that is so there; none: always.
    pub(super) busy: Option<Arc<[bool]>>,
    /// By moment.
    pub(super) runs: Vec<Tier>,
    /// Chunks that can be made again are, instead of leaving.
    pub(super) recompute: bool,
    /// Transfers may run beside moments.
    pub(super) overlap: bool,
}

impl<'a> Problem<'a> {
    /// Tiers that are there, fastest first.
    pub(super) fn tiers(&self) -> Vec<Tier> {
        self.budgets.tiers()
    }

    /// Where each moment runs if the first `on_fastest` of those that may run anywhere run on the
    /// fastest tier.
    pub(super) fn runs(&self, on_fastest: usize) -> Vec<Tier> {
        let tiers = self.tiers();
        let host = if tiers.contains(&Tier::Dram) { Tier::Dram } else { tiers[0] };
        let mut left = on_fastest;
        let place = |runs: &Runs| match runs {
            Runs::Fastest => tiers[0],
            Runs::Host => host,
            Runs::Either { .. } if left > 0 => {
                left -= 1;
                tiers[0]
            }
            Runs::Either { .. } => host,
        };
        self.trace.moments.iter().map(|moment| &moment.runs).map(place).collect()
    }

    /// Bytes of a tier that chunks may take, by moment.
    pub(super) fn capacity(&self, tier: Tier) -> Vec<i64> {
        let budget = self.budgets.of(tier).unwrap_or(0).min(i64::MAX as u64 / 4) as i64;
        let fastest = self.tiers()[0] == tier;
        let other = |bytes: u64| if fastest { bytes.min(i64::MAX as u64 / 4) as i64 } else { 0 };
        self.trace.moments.iter().map(|moment| budget - other(moment.other_bytes)).collect()
    }

    /// Chunks as the fastest tier sees them; `is_top` says which tiers count as it.
    pub(super) fn items(&self, course: &Course, is_top: impl Fn(Tier) -> bool) -> Vec<Item> {
        let mut items: Vec<Item> = Vec::with_capacity(self.trace.chunks.len());
        for (index, chunk) in self.trace.chunks.iter().enumerate() {
            let recompute_s = chunk.recompute_s.filter(|_| course.recompute);
            items.push(Item {
                chunk: ChunkId(index as u32),
                bytes: chunk.bytes,
                recompute_s,
                events: Vec::new(),
            });
        }
        for used in &self.trace.uses {
            let top = is_top(course.runs[used.moment as usize]);
            let event = Event { start: used.moment, len: 1, access: used.access, top };
            items[used.chunk.0 as usize].events.push(event);
        }
        items
    }

    fn clock(&self, runs: &[Tier]) -> Clock {
        let fastest = self.tiers()[0];
        let moments = self.trace.moments.iter().zip(runs);
        Clock::new(moments.map(|(moment, tier)| seconds(moment, *tier, fastest)))
    }

    /// Chunks as the tier below `upper` sees them, given what moves over the link between.
    fn items_below(&self, course: &Course, moves: &[Move], below: Tier) -> Vec<Item> {
        let moments = self.trace.moments.len() as u32;
        let mut items = self.items(course, |_| true);
        for item in &mut items {
            item.recompute_s = None;
            item.events.retain(|event| course.runs[event.start as usize] == below);
        }
        for action in moves {
            let access = match action.kind {
                MoveKind::Fetch => Access::Read,
                MoveKind::WriteBack => Access::Write,
                MoveKind::Drop | MoveKind::Recompute => continue,
            };
            let len = match forward(action.after, action.before, moments) {
                0 => moments,
                len => len,
            };
            let start = (action.after + 1) % moments;
            items[action.chunk.0 as usize].events.push(Event { start, len, access, top: true });
        }
        for item in &mut items {
            item.events = join_events(std::mem::take(&mut item.events), moments);
        }
        items
    }

    /// The plan of a course; its links' bounds are not filled in.
    pub(super) fn build(&self, course: &Course) -> Result<Plan, Box<DoesNotFit>> {
        let tiers = self.tiers();
        let clock = self.clock(&course.runs);
        let mut moves = Vec::new();
        let mut items = self.items(course, |tier| tier == tiers[0]);
        for (depth, upper) in tiers.iter().copied().enumerate().filter(|(_, tier)| *tier != Tier::Nvme) {
            let lower = tiers.get(depth + 1).copied();
            let level = Level::new(items, &self.capacity(upper));
            let choice = self.choose(course, &level, depth, upper)?;
            let mut left = choice.left(&level, &level.room).by_moment();
            let setting = Setting {
                clock: &clock,
                rate: self.rates.below(upper),
                upper,
                lower,
                wasteful: course.rule == Rule::Gemini,
                overlap: course.overlap,
            };
            let own = schedule(&level, &choice, &mut left, &setting);
            items = lower.map_or(Vec::new(), |lower| self.items_below(course, &own, lower));
            moves.extend(own);
        }
        let moments = self.trace.moments.len() as u32;
        moves.sort_by_key(|m: &Move| {
            (m.after, rank(m), forward(m.after + 1, m.before, moments), m.chunk, m.before)
        });
        self.finish(course, moves)
    }

    /// What rests in `upper`.
    fn choose(
        &self,
        course: &Course,
        level: &Level,
        depth: usize,
        upper: Tier,
    ) -> Result<Choice, Box<DoesNotFit>> {
        self.check_events(level, upper)?;
        let last = self.tiers().len() == depth + 1;
        if last {
            return self.all_rest(level, upper);
        }
        let most = level.room.iter().copied().max().unwrap_or(0);
        let aside = (most as f64 * course.reserve) as i64;
        let takes = |moment: usize| course.busy.as_ref().is_none_or(|busy| busy[moment]);
        let left = |(moment, room): (usize, &i64)| if takes(moment) { (room - aside).max(0) } else { *room };
        let room: Vec<i64> = level.room.iter().enumerate().map(left).collect();
        let up_per_s = self.rates.below(upper).up_per_s;
        Ok(match course.rule {
            Rule::Best => best(level, &room, up_per_s),
            Rule::Densest => Choice::densest(level, &room, up_per_s),
            Rule::Walk(victim) => Choice::walk(level, &room, victim),
            Rule::Prefix => Choice::prefix(level, &room),
            Rule::Gemini => Choice::walk(level, &room, Victim::FarthestThisStep),
        })
    }

    /// Events alone must fit.
    fn check_events(&self, level: &Level, tier: Tier) -> Result<(), Box<DoesNotFit>> {
        let short = level.room.iter().enumerate().min_by_key(|(moment, room)| (**room, *moment));
        match short {
            Some((moment, room)) if *room < 0 => Err(self.refuse(tier, moment, room.unsigned_abs())),
            _ => Ok(()),
        }
    }

    /// In the slowest tier everything rests.
    fn all_rest(&self, level: &Level, tier: Tier) -> Result<Choice, Box<DoesNotFit>> {
        let choice = Choice::all(level);
        let left = choice.left(level, &level.room).by_moment();
        let short = left.iter().enumerate().min_by_key(|(moment, room)| (**room, *moment));
        match short {
            Some((moment, room)) if *room < 0 => Err(self.refuse(tier, moment, room.unsigned_abs())),
            _ => Ok(choice),
        }
    }

    fn refuse(&self, tier: Tier, moment: usize, missing_bytes: u64) -> Box<DoesNotFit> {
        let info = &self.trace.moments[moment];
        let used = self.trace.uses.iter().filter(|used| used.moment as usize == moment);
        let largest = used.map(|used| self.trace.chunk(used.chunk)).max_by_key(|chunk| chunk.bytes);
        let chunk = largest.or(self.trace.chunks.iter().max_by_key(|chunk| chunk.bytes));
        let below = match tier {
            Tier::Hbm if self.budgets.dram.is_none() => ", or give dram a budget",
            Tier::Dram if self.budgets.nvme.is_none() => ", or give nvme a budget",
            _ => "",
        };
        let smaller = ", or use a smaller batch, smaller chunks or recompute";
        Box::new(DoesNotFit {
            tier,
            moment: moment as u32,
            op: info.op.clone(),
            class: chunk.map_or(crate::Class::Param, |chunk| chunk.class),
            missing_bytes,
            least_bytes: self.budgets.of(tier).unwrap_or(0) + missing_bytes,
            remedy: if below.is_empty() { smaller.to_owned() } else { below.to_owned() },
        })
    }

    fn finish(&self, course: &Course, moves: Vec<Move>) -> Result<Plan, Box<DoesNotFit>> {
        let homes = self.homes(course, &moves);
        if let Some(budget) = self.budgets.nvme {
            let slots = homes.iter().zip(&self.trace.chunks).filter(|(home, _)| **home == Tier::Nvme);
            let mut by_class = BTreeMap::new();
            slots.for_each(|(_, chunk)| *by_class.entry(chunk.class).or_insert(0) += chunk.bytes);
            let slots: u64 = by_class.values().sum();
            if slots > budget {
                let most = by_class.iter().max_by_key(|(_, bytes)| **bytes);
                let class = most.map_or(crate::Class::Param, |(class, _)| *class);
                let remedy = ", or give dram more".to_owned();
                return Err(Box::new(DoesNotFit {
                    class,
                    remedy,
                    ..*self.refuse(Tier::Nvme, 0, slots - budget)
                }));
            }
        }
        let initial = self.initial(course, &moves, &homes);
        Ok(Plan {
            moves,
            initial,
            runs: course.runs.clone(),
            homes,
            peaks: Vec::new(),
            links: Vec::new(),
            compute_s: 0.0,
            recompute_s: 0.0,
            stall_s: 0.0,
        })
    }

    fn homes(&self, course: &Course, moves: &[Move]) -> Vec<Tier> {
        let mut homes = vec![self.tiers()[0]; self.trace.chunks.len()];
        let mut lies = |chunk: ChunkId, tier: Tier| {
            let home = &mut homes[chunk.0 as usize];
            *home = (*home).max(tier);
        };
        for used in &self.trace.uses {
            lies(used.chunk, course.runs[used.moment as usize]);
        }
        for action in moves {
            lies(action.chunk, action.from.max(action.to));
        }
        homes
    }

    /// Copies that are valid when moment 0 begins, once steps repeat.
    fn initial(&self, course: &Course, moves: &[Move], homes: &[Tier]) -> Vec<(ChunkId, Tier)> {
        // Every copy that could be there, then what a step leaves of it.
        let mut valid = vec![[false; 3]; self.trace.chunks.len()];
        for used in &self.trace.uses {
            valid[used.chunk.0 as usize][course.runs[used.moment as usize] as usize] = true;
        }
        for action in moves {
            valid[action.chunk.0 as usize][action.from as usize] = true;
        }
        for (copies, home) in valid.iter_mut().zip(homes) {
            copies[Tier::Nvme as usize] = *home == Tier::Nvme;
        }
        for _ in 0..2 {
            let (mut uses, mut moves) = (self.trace.uses.iter().peekable(), moves.iter().peekable());
            for (moment, tier) in course.runs.iter().enumerate() {
                while let Some(used) = uses.next_if(|used| used.moment as usize == moment) {
                    if used.access.writes() {
                        valid[used.chunk.0 as usize] = [false; 3];
                        valid[used.chunk.0 as usize][*tier as usize] = true;
                    }
                }
                while let Some(action) = moves.next_if(|action| action.after as usize == moment) {
                    let whole = action.kind != MoveKind::Drop;
                    valid[action.chunk.0 as usize][action.to as usize] = whole;
                }
            }
        }
        let mut initial = Vec::new();
        for (chunk, copies) in valid.iter().enumerate() {
            let tiers = [Tier::Hbm, Tier::Dram, Tier::Nvme].into_iter().filter(|tier| copies[*tier as usize]);
            initial.extend(tiers.map(|tier| (ChunkId(chunk as u32), tier)));
        }
        initial
    }
}

/// Order within a gap: what frees room below, then above, then what takes it.
fn rank(action: &Move) -> u8 {
    match (action.kind, action.from) {
        (MoveKind::WriteBack, Tier::Dram) => 0,
        (MoveKind::Drop, Tier::Dram | Tier::Nvme) => 1,
        (MoveKind::WriteBack, _) => 2,
        (MoveKind::Drop, Tier::Hbm) => 3,
        (MoveKind::Fetch, Tier::Nvme) => 4,
        (MoveKind::Fetch, _) => 5,
        (MoveKind::Recompute, _) => 6,
    }
}

/// The cheapest of all rules.
fn best(level: &Level, room: &[i64], up_per_s: f64) -> Choice {
    let mut all = vec![Choice::densest(level, room, up_per_s)];
    let victims = [Victim::Farthest, Victim::FarthestPerByte, Victim::LeastRecent, Victim::FarthestThisStep];
    all.extend(victims.map(|victim| Choice::walk(level, room, victim).fill(level, room, up_per_s)));
    all.push(Choice::prefix(level, room).fill(level, room, up_per_s));
    all.push(Choice::rounded(level, room, &wants(level, room, up_per_s), up_per_s));
    let mut best = all.swap_remove(0);
    for choice in all {
        if choice.cost(level, up_per_s) < best.cost(level, up_per_s) {
            best = choice;
        }
    }
    best
}
