//! Which plan: tries courses, replays each, and keeps the one that waits least or moves least.

use super::bound::bound;
use super::build::{Course, Problem, Rule as Inner};
use super::choose::Victim;
use super::level::Level;
use super::replay::{Replay, replay};
use super::types::{Budgets, DoesNotFit, MoveKind, Plan, Rates, Refusal};
use crate::Tier;
use crate::trace::{Runs, Trace};
use std::sync::Arc;

/// How it is decided what stays in a tier.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Rule {
    /// From the whole trace: what Trilith does.
    #[default]
    Dynamic,
    /// A prefix of the chunks stays for good, as large as fits; the rest leaves after every use.
    Static,
    /// What was used longest ago leaves.
    Lru,
    /// What is used again farthest from now leaves, counting on into the next step.
    Belady,
    /// Gemini's: farthest next use within the step, ties by chunk; clean chunks leave with a copy, and
    /// a weight the host updated comes back in double width.
    Gemini,
}

/// What a dynamic plan is judged by.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Aim {
    /// Predicted seconds of the step; among equals bytes moved. A plan moves more than another rule's
    /// only where its step is predicted to be shorter, and then by at most a quarter.
    #[default]
    Time,
    /// Bytes moved: never more than another rule's.
    Bytes,
}

/// Wishes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ask {
    /// Who decides.
    pub rule: Rule,
    /// By what; other rules than the dynamic one do not ask.
    pub aim: Aim,
    /// Whether chunks may be made again instead of moved.
    pub recompute: bool,
}

impl Default for Ask {
    fn default() -> Ask {
        Ask { rule: Rule::default(), aim: Aim::default(), recompute: true }
    }
}

/// Shares of a tier's room set aside for what is on its way.
const RESERVES: [f64; 6] = [0.02, 0.05, 0.1, 0.2, 0.35, 0.5];

/// Step times closer than this are the same: fewer bytes decide.
const SAME_TIME: f64 = 0.02;

/// Part of the fewest bytes that a shorter step may cost beside them.
const SPENT: f64 = 0.25;

/// The plan for a trace, with the defaults of `Ask`.
///
/// Errors: `Refusal::DoesNotFit` names tier, moment, missing bytes and remedy.
pub fn plan(trace: &Trace, budgets: &Budgets, rates: &Rates) -> Result<Plan, Refusal> {
    plan_with(trace, budgets, rates, &Ask::default())
}

/// The plan for a trace by the rule asked for.
pub fn plan_with(trace: &Trace, budgets: &Budgets, rates: &Rates, ask: &Ask) -> Result<Plan, Refusal> {
    trace.check()?;
    check_machine(budgets, rates)?;
    let problem = Problem { trace, budgets, rates };
    let search = Search { problem, ask: *ask };
    let (course, plan) = match ask.rule {
        Rule::Dynamic => search.dynamic()?,
        rule => search.fixed(rule, 0)?,
    };
    search.with_bounds(&course, plan)
}

fn check_machine(budgets: &Budgets, rates: &Rates) -> Result<(), Refusal> {
    let tiers = budgets.tiers();
    if tiers.is_empty() || tiers[0] == Tier::Nvme || (budgets.nvme.is_some() && budgets.dram.is_none()) {
        return Err(Refusal::NoTier { tiers });
    }
    for upper in &tiers[..tiers.len() - 1] {
        let rate = rates.below(*upper);
        for per_s in [rate.up_per_s, rate.down_per_s] {
            if !(per_s.is_finite() && per_s > 0.0) {
                return Err(Refusal::BadRate { tier: *upper, per_s: per_s.to_string() });
            }
        }
    }
    Ok(())
}

struct Search<'a> {
    problem: Problem<'a>,
    ask: Ask,
}

type Found = (Course, Plan);

impl Search<'_> {
    /// Build and replay.
    fn try_course(&self, course: Course) -> Result<Found, Refusal> {
        let mut plan = self.problem.build(&course)?;
        let Problem { trace, budgets, rates } = self.problem;
        let Replay { peaks, links, compute_s, recompute_s, stall_s, .. } =
            replay(trace, budgets, rates, &plan)?;
        plan.peaks = peaks;
        plan.links = links;
        (plan.compute_s, plan.recompute_s, plan.stall_s) = (compute_s, recompute_s, stall_s);
        Ok((course, plan))
    }

    fn course(&self, rule: Inner, on_fastest: usize) -> Course {
        let runs = self.problem.runs(on_fastest);
        Course { rule, reserve: 0.0, busy: None, runs, recompute: false, overlap: true }
    }

    /// A rule that is not ours; transfers are scheduled as for ours.
    fn fixed(&self, rule: Rule, on_fastest: usize) -> Result<Found, Refusal> {
        let inner = match rule {
            Rule::Dynamic => Inner::Best,
            Rule::Static => Inner::Prefix,
            Rule::Lru => Inner::Walk(Victim::LeastRecent),
            Rule::Belady => Inner::Walk(Victim::Farthest),
            Rule::Gemini => Inner::Gemini,
        };
        let course = self.course(inner, on_fastest);
        self.try_course(course.clone()).or_else(|_| self.try_course(Course { overlap: false, ..course }))
    }

    /// Moments that may run on either side, if there are two sides.
    fn either(&self) -> usize {
        let tiers = self.problem.tiers();
        let two = tiers[0] == Tier::Hbm && tiers.contains(&Tier::Dram);
        let either = |runs: &Runs| matches!(runs, Runs::Either { .. });
        if two { self.problem.trace.moments.iter().filter(|moment| either(&moment.runs)).count() } else { 0 }
    }

    fn dynamic(&self) -> Result<Found, Refusal> {
        let scouts = self.scout()?;
        let mut found = Vec::new();
        for (scout, _) in &scouts {
            let frugal = Course { rule: Inner::Best, reserve: 0.0, ..scout.clone() };
            let first = self.with_or_without_overlap(frugal.clone());
            // Room is set aside always, or only while much is on its way.
            let busy = first.as_ref().map(|(_, plan)| self.busy(plan));
            found.extend(first);
            let reserves: &[f64] = if self.ask.aim == Aim::Bytes { &[] } else { &RESERVES };
            for (reserve, busy) in
                reserves.iter().flat_map(|reserve| [(reserve, None), (reserve, Some(&busy))])
            {
                let busy = busy.cloned().flatten();
                let course = Course { reserve: *reserve, busy, ..frugal.clone() };
                found.extend(self.with_or_without_overlap(course));
            }
        }
        found.extend(scouts);
        // Other rules with the same freedom: none of them may beat ours.
        let rules = [Rule::Static, Rule::Lru, Rule::Belady, Rule::Gemini];
        found.extend(rules.iter().filter_map(|rule| self.fixed(*rule, 0).ok()));
        let fewest = found.iter().map(|(_, plan)| plan.moved_bytes()).min().unwrap_or(0);
        found.retain(|(_, plan)| plan.moved_bytes() as f64 <= fewest as f64 * (1.0 + SPENT));
        Ok(self.best_of(found))
    }

    /// Less overlap is only worth trying where what is on its way finds no room.
    fn with_or_without_overlap(&self, course: Course) -> Option<Found> {
        let plain = Course { overlap: false, ..course.clone() };
        self.try_course(course).or_else(|_| self.try_course(plain)).ok()
    }

    /// Moments around which a plan has much on its way: a quarter of the most and more, in a window of a
    /// sixteenth of the step.
    fn busy(&self, plan: &Plan) -> Arc<[bool]> {
        let moments = self.problem.trace.moments.len();
        let mut bytes = vec![0u64; moments];
        plan.moves.iter().for_each(|action| bytes[action.before as usize] += action.bytes);
        let half = moments / 32;
        let around = |moment: usize| {
            let window = (0..=2 * half).map(|i| bytes[(moment + moments + i - half) % moments]);
            window.sum::<u64>()
        };
        let windows: Vec<u64> = (0..moments).map(around).collect();
        let most = windows.iter().copied().max().unwrap_or(0);
        windows.into_iter().map(|bytes| 4 * bytes >= most.max(1)).collect()
    }

    /// Where the optimizer runs, by a quick rule, once without recomputing and, if that is possible,
    /// once with; or why nothing fits.
    fn scout(&self) -> Result<Vec<Found>, Refusal> {
        let either = self.either();
        let mut places: Vec<usize> = (0..=4).map(|quarter| either * quarter / 4).collect();
        places.dedup();
        let recomputable = self.problem.trace.chunks.iter().any(|chunk| chunk.recompute_s.is_some());
        let mut scouts = Vec::new();
        let mut refusal = None;
        for recompute in [false, true] {
            if recompute && !(recomputable && self.ask.recompute) {
                continue;
            }
            let mut found = Vec::new();
            for on_fastest in &places {
                let course = Course { recompute, reserve: 0.05, ..self.course(Inner::Densest, *on_fastest) };
                match self.frugal(course) {
                    Ok(next) => found.push(next),
                    Err(error) => refusal = Some(milder(refusal, error)),
                }
            }
            if !found.is_empty() {
                scouts.push(self.best_of(found));
            }
        }
        match refusal {
            Some(refusal) if scouts.is_empty() => Err(refusal),
            _ => Ok(scouts),
        }
    }

    /// A course, or one that takes less room below; the refusal is the mildest.
    fn frugal(&self, course: Course) -> Result<Found, Refusal> {
        let plain = Course { overlap: false, reserve: 0.0, ..course.clone() };
        let prefix = Course { rule: Inner::Prefix, ..plain.clone() };
        let mut refusal = None;
        for course in [course, prefix, plain] {
            match self.try_course(course) {
                Ok(found) => return Ok(found),
                Err(error) => refusal = Some(milder(refusal, error)),
            }
        }
        Err(refusal.expect("courses were tried"))
    }

    fn best_of(&self, found: Vec<Found>) -> Found {
        let fastest = found.iter().map(|(_, plan)| plan.step_s()).fold(f64::INFINITY, f64::min);
        let key = |(_, plan): &Found| match self.ask.aim {
            Aim::Bytes => (plan.moved_bytes() as f64, plan.step_s()),
            Aim::Time if plan.step_s() <= fastest * (1.0 + SAME_TIME) => (0.0, plan.moved_bytes() as f64),
            Aim::Time => (1.0, plan.step_s()),
        };
        let better = |a: &Found, b: &Found| {
            let (a, b) = (key(a), key(b));
            a.0.total_cmp(&b.0).then(a.1.total_cmp(&b.1))
        };
        found.into_iter().min_by(better).expect("there is always the plan that scouted")
    }

    /// Bounds of both links: the fastest tier alone, and all tiers above the drive as if they were one.
    fn with_bounds(&self, course: &Course, mut plan: Plan) -> Result<Plan, Refusal> {
        // What the plan makes again, any plan may: everything else has to move.
        let mut again = vec![false; self.problem.trace.chunks.len()];
        let recomputes = plan.moves.iter().filter(|action| action.kind == MoveKind::Recompute);
        recomputes.for_each(|action| again[action.chunk.0 as usize] = true);
        let items = |pooled: bool| {
            let fastest = self.problem.tiers()[0];
            let mut items = self.problem.items(course, |tier| pooled || tier == fastest);
            let kept = items.iter_mut().filter(|item| !again[item.chunk.0 as usize]);
            kept.for_each(|item| item.recompute_s = None);
            items
        };
        for link in &mut plan.links {
            let pooled = link.upper != self.problem.tiers()[0];
            let value = if pooled {
                let (hbm, dram) = (self.problem.capacity(Tier::Hbm), self.problem.capacity(Tier::Dram));
                let both: Vec<i64> = hbm.iter().zip(&dram).map(|(hbm, dram)| hbm + dram).collect();
                let level = Level::new(items(true), &both);
                bound(&level, &level.room)
            } else {
                let level = Level::new(items(false), &self.problem.capacity(link.upper));
                bound(&level, &level.room)
            };
            link.bound_bytes = value.bytes;
        }
        Ok(plan)
    }
}

/// Of two refusals the one that asks for less.
fn milder(first: Option<Refusal>, second: Refusal) -> Refusal {
    match (first, second) {
        (Some(Refusal::DoesNotFit(a)), Refusal::DoesNotFit(b)) if b.missing_bytes < a.missing_bytes => {
            Refusal::DoesNotFit(b)
        }
        (Some(first), _) => first,
        (None, second) => second,
    }
}

impl From<Box<DoesNotFit>> for Refusal {
    fn from(error: Box<DoesNotFit>) -> Refusal {
        Refusal::DoesNotFit(error)
    }
}
