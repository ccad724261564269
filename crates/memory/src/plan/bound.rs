//! How few bytes a link can carry: the packing problem of a level with fractions of chunks allowed,
//! as a linear program.
//!
//! A variable says how much of a chunk rests in one pause; a row says that what rests at a moment fits
//! the room there. Leaving costs the fetch, and for a run one copy down of the largest part that ever
//! leaves it. Chunks may be split, so no plan moves fewer bytes, and a plan of small chunks can come
//! near.
//!
//! Large steps are made smaller in two ways that keep the value a bound: moments are left out (a
//! program with fewer rows allows more), and chunks whose pauses cover the same rows become one
//! variable (which changes nothing).

use super::level::{Level, PauseKind};
use microlp::{ComparisonOp, LinearExpr, OptimizationDirection, Problem, Variable};
use std::collections::BTreeMap;

/// Most moments that become rows, and variables for each: the bound is asked for once, what should
/// rest for every course that is tried.
const BOUND_ROWS: usize = 768;
const WANTS_ROWS: usize = 256;
const VARIABLES_PER_ROW: usize = 10;

/// Value of the program.
pub(super) struct Bound {
    /// Bytes over the link, both ways, of any plan.
    pub(super) bytes: u64,
    /// By pause: the share that rests in the solution.
    pub(super) wants: Vec<f64>,
}

/// Rows a pause covers: the first one and how many, cyclic. None: it rests for nothing.
type Cover = (u32, u32);

/// Pauses that share a copy down (or single clean ones), alike in everything but their bytes.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
struct Kind {
    /// Leaving costs one copy down, too.
    dirty: bool,
    /// Thousandths of a byte that leaving costs by byte and pause.
    worth: u64,
    covers: Vec<Cover>,
}

#[derive(Default)]
struct Group {
    bytes: u64,
    /// Pauses in the order of `Kind::covers`, chunk after chunk.
    pauses: Vec<usize>,
}

/// Solve the program of a level; `room` is free bytes by moment.
pub(super) fn bound(level: &Level, room: &[i64]) -> Bound {
    program(level, room, None, BOUND_ROWS)
}

/// What should rest; chunks that can be made again are weighed by the bytes the link carries meanwhile.
pub(super) fn wants(level: &Level, room: &[i64], up_per_s: f64) -> Vec<f64> {
    program(level, room, Some(up_per_s), WANTS_ROWS).wants
}

/// With a speed, chunks that can be made again cost what the link carries meanwhile; without, nothing.
fn program(level: &Level, room: &[i64], again: Option<f64>, most_rows: usize) -> Bound {
    let (up, down) = level.forced_bytes();
    let mut wants = vec![1.0; level.pauses.len()];
    let rows = binding_rows(level, room, again.is_some());
    let mut count = rows.len().min(most_rows);
    let (rows, groups) = loop {
        let rows = tightest(&rows, count);
        let groups = group(level, &rows, room.len(), again);
        if groups.keys().map(|kind| kind.covers.len()).sum::<usize>() <= VARIABLES_PER_ROW * most_rows
            || count < 8
        {
            break (rows, groups);
        }
        count /= 2;
    };
    // What leaving everything would move, less what the solution saves.
    let all: f64 = groups.iter().map(|(kind, group)| worth(kind) * group.bytes as f64).sum();
    let saved = if groups.is_empty() { Some(0.0) } else { solve(&rows, &groups, &mut wants) };
    // Without a solution (the solver may give up on hard numbers) the forced bytes are still a bound.
    let open = saved.map_or(0.0, |saved| (all * (1.0 - 1e-9) - saved).max(0.0));
    // Plans move whole bytes.
    Bound { bytes: up + down + open.ceil() as u64, wants }
}

/// Bytes moved per byte of a group that leaves in all its pauses.
fn worth(kind: &Kind) -> f64 {
    kind.covers.len() as f64 * kind.worth as f64 / 1000.0 + f64::from(u8::from(kind.dirty))
}

struct Row {
    moment: u32,
    room: i64,
    /// Bytes that must leave if everything rested.
    excess: i64,
}

/// The tightest moment of every stretch in which no pause begins or ends, where not everything fits.
fn binding_rows(level: &Level, room: &[i64], again: bool) -> Vec<Row> {
    let moments = room.len();
    let mut change = vec![0i64; moments + 1];
    let mut breaks = vec![false; moments];
    for pause in open(level).filter(|pause| again || !level.recomputes(*pause)) {
        let (bytes, pause) = (level.bytes(pause) as i64, &level.pauses[pause]);
        let (first, end) = (pause.first as usize, (pause.first + pause.len) as usize);
        change[first] += bytes;
        change[end.min(moments)] -= bytes;
        if end > moments {
            change[0] += bytes;
            change[end - moments] -= bytes;
        }
        breaks[first] = true;
        breaks[end % moments] = true;
    }
    let mut rows: Vec<Row> = Vec::new();
    let (mut resting, mut fresh) = (0, true);
    for moment in 0..moments {
        resting += change[moment];
        fresh |= breaks[moment];
        // More room than everything needs cannot bind; less than none holds nothing.
        let row =
            Row { moment: moment as u32, room: room[moment].max(0), excess: resting - room[moment].max(0) };
        if fresh {
            rows.push(row);
            fresh = false;
        } else if let Some(last) = rows.last_mut().filter(|last| row.excess > last.excess) {
            *last = row;
        }
    }
    rows.retain(|row| row.excess > 0);
    rows
}

/// At most `count` rows, the tightest of each of as many neighbourhoods.
fn tightest(rows: &[Row], count: usize) -> Vec<&Row> {
    let per = rows.len().div_ceil(count.max(1)).max(1);
    rows.chunks(per).filter_map(|near| near.iter().max_by_key(|row| row.excess)).collect()
}

fn open(level: &Level) -> impl Iterator<Item = usize> {
    let open = |index: &usize| {
        let pause = &level.pauses[*index];
        pause.kind == PauseKind::Free && pause.len > 0
    };
    (0..level.pauses.len()).filter(open)
}

fn group(level: &Level, rows: &[&Row], moments: usize, again: Option<f64>) -> BTreeMap<Kind, Group> {
    let mut before = vec![0u32; moments + 1];
    for row in rows {
        before[row.moment as usize + 1] += 1;
    }
    for moment in 0..moments {
        before[moment + 1] += before[moment];
    }
    let cover = |pause: usize| -> Option<Cover> {
        let pause = &level.pauses[pause];
        let (first, end) = (pause.first as usize, (pause.first + pause.len) as usize);
        let tail = before[end.saturating_sub(moments)];
        let count = before[end.min(moments)] - before[first] + tail;
        (count > 0).then(|| (before[first] % rows.len() as u32, count))
    };
    let mut groups: BTreeMap<Kind, Group> = BTreeMap::new();
    let mut join = |dirty: bool, worth: u64, pauses: &mut dyn Iterator<Item = usize>| {
        let covered: Vec<(usize, Cover)> = pauses.filter_map(|p| cover(p).map(|cover| (p, cover))).collect();
        if let Some((pause, _)) = covered.first() {
            let kind = Kind { dirty, worth, covers: covered.iter().map(|(_, cover)| *cover).collect() };
            let group = groups.entry(kind).or_default();
            group.bytes += level.bytes(*pause);
            group.pauses.extend(covered.iter().map(|(pause, _)| *pause));
        }
    };
    for pause in open(level) {
        let item = &level.items[level.pauses[pause].item as usize];
        match (item.recompute_s, again) {
            (Some(seconds), Some(per_s)) => {
                let worth = seconds * per_s * 1000.0 / item.bytes.max(1) as f64;
                join(false, worth as u64, &mut std::iter::once(pause));
            }
            (None, _) if level.pauses[pause].run.is_none() => join(false, 1000, &mut std::iter::once(pause)),
            _ => {}
        }
    }
    for (index, run) in level.runs.iter().enumerate().filter(|(_, run)| run.due.is_none()) {
        let of_run = |pause: &usize| level.pauses[*pause].run == Some(index as u32);
        let pauses = run.pauses.iter().map(|p| *p as usize).filter(of_run);
        let mut pauses = pauses.filter(|p| level.pauses[*p].len > 0 && !level.recomputes(*p));
        join(true, 1000, &mut pauses);
    }
    groups
}

/// Most bytes saved by resting, and into `wants` what rests.
fn solve(rows: &[&Row], groups: &BTreeMap<Kind, Group>, wants: &mut [f64]) -> Option<f64> {
    let unit = groups.values().map(|group| group.bytes).max().unwrap_or(1).max(1) as f64;
    let mut problem = Problem::new(OptimizationDirection::Maximize);
    // Bytes at rest in row r are those in row r - 1, and what begins, less what has ended: two terms
    // a variable instead of one for every row it covers.
    let mut flows: Vec<LinearExpr> = rows.iter().map(|_| LinearExpr::empty()).collect();
    let count = rows.len();
    let mut variables: Vec<Vec<Variable>> = Vec::new();
    for (kind, group) in groups {
        let size = group.bytes as f64 / unit;
        let alone = kind.covers.len() == 1;
        let gain = if alone { worth(kind) } else { kind.worth as f64 / 1000.0 };
        let own: Vec<Variable> = kind.covers.iter().map(|_| problem.add_var(gain, (0.0, size))).collect();
        if kind.dirty && !alone {
            let uncopied = problem.add_var(1.0, (0.0, size));
            for rests in &own {
                problem.add_constraint([(uncopied, 1.0), (*rests, -1.0)], ComparisonOp::Le, 0.0);
            }
        }
        for (rests, (first, length)) in own.iter().zip(&kind.covers) {
            let (first, end) = (*first as usize, (*first + *length) as usize);
            if first == 0 || end > count {
                flows[0].add(*rests, 1.0);
            }
            // What covers every row neither begins nor ends.
            if (*length as usize) < count {
                if first > 0 {
                    flows[first].add(*rests, 1.0);
                }
                if end != count {
                    flows[end % count].add(*rests, -1.0);
                }
            }
        }
        variables.push(own);
    }
    let mut previous: Option<Variable> = None;
    for (row, mut flow) in rows.iter().zip(flows) {
        let resting = problem.add_var(0.0, (0.0, row.room as f64 / unit));
        flow.add(resting, -1.0);
        if let Some(previous) = previous {
            flow.add(previous, 1.0);
        }
        problem.add_constraint(flow, ComparisonOp::Eq, 0.0);
        previous = Some(resting);
    }
    let solution = problem.solve().ok()?.into_solution().ok()?;
    for (own, (kind, group)) in variables.iter().zip(groups) {
        for (nth, pause) in group.pauses.iter().enumerate() {
            let rests = solution.var_value(own[nth % kind.covers.len()]);
            wants[*pause] = rests * unit / (group.bytes as f64).max(1.0);
        }
    }
    Some(solution.objective() * unit)
}

#[cfg(test)]
mod tests {
    use super::super::choose::Choice;
    use super::super::level::{Event, Item};
    use super::*;
    use crate::trace::{Access, ChunkId};
    use proptest::prelude::*;

    /// Bytes of a chunk, and moment and access of each of its events.
    type Drawn = (u64, Vec<(u32, u8)>);

    fn level(moments: u32, room: i64, chunks: &[Drawn]) -> Level {
        let item = |(index, (bytes, uses)): (usize, &Drawn)| {
            let mut events: Vec<Event> = Vec::new();
            for (start, access) in uses {
                let access = [Access::Read, Access::ReadWrite, Access::Write][*access as usize % 3];
                events.push(Event { start: start % moments, len: 1, access, top: true });
            }
            events.sort_by_key(|event| event.start);
            events.dedup_by_key(|event| event.start);
            Item { chunk: ChunkId(index as u32), bytes: *bytes, recompute_s: None, events }
        };
        Level::new(chunks.iter().enumerate().map(item).collect(), &vec![room; moments as usize])
    }

    fn fits(level: &Level, choice: &Choice) -> bool {
        choice.left(level, &level.room).by_moment().iter().all(|left| *left >= 0)
    }

    /// Fewest bytes of whole chunks, by trying everything.
    fn exact(level: &Level) -> u64 {
        let free: Vec<usize> = open(level).collect();
        let choices = (0..1u32 << free.len()).map(|bits| {
            let mut choice = Choice::none(level);
            free.iter().enumerate().for_each(|(nth, pause)| choice.rests[*pause] = bits >> nth & 1 == 1);
            choice
        });
        let bytes = |choice: Choice| choice.bytes(level).0 + choice.bytes(level).1;
        choices.filter(|choice| fits(level, choice)).map(bytes).min().expect("nothing at rest always fits")
    }

    fn chunks() -> impl Strategy<Value = Vec<Drawn>> {
        prop::collection::vec((1u64..20, prop::collection::vec((0u32..12, 0u8..3), 1..4)), 1..5)
    }

    proptest! {
        #[test]
        fn below_every_plan_of_whole_chunks(chunks in chunks(), moments in 1u32..12, more in 0i64..40) {
            let tight = level(moments, 0, &chunks);
            // At least the events fit.
            let least = -tight.room.iter().min().copied().unwrap_or(0);
            let level = level(moments, least + more, &chunks);
            let (bound, exact) = (bound(&level, &level.room).bytes, exact(&level));
            prop_assert!(bound <= exact, "bound {bound}, exact {exact}");
            let wants = wants(&level, &level.room, 1.0);
            let rounded = Choice::rounded(&level, &level.room, &wants, 1.0);
            prop_assert!(fits(&level, &rounded));
            let (up, down) = rounded.bytes(&level);
            prop_assert!(up + down >= exact);
        }
    }

    /// A scan over 48 equal chunks forward and back, and one in a circle: what theory says.
    #[test]
    fn known_scans() {
        let there_and_back: Vec<(u64, Vec<(u32, u8)>)> =
            (0..48).map(|c| (1, vec![(c, 0), (95 - c, 0)])).collect();
        let circle: Vec<Drawn> = (0..48).map(|c| (1, vec![(c, 1)])).collect();
        for capacity in [8, 16, 24, 36, 44] {
            let level_of = |moments, chunks: &[_]| level(moments, capacity, chunks);
            let scan = level_of(96, &there_and_back);
            // Weights that survive the step: 2 (L - C) loads.
            assert_eq!(bound(&scan, &scan.room).bytes, 2 * (48 - capacity as u64));
            let scan = level_of(48, &circle);
            // State is written: what leaves is copied down and comes back. A share x of every chunk
            // rests, 47 x beside the one in use: x = (C - 1) / 47, and 2 (1 - x) of each moves.
            assert_eq!(bound(&scan, &scan.room).bytes, (96 * (48 - capacity as u64)).div_ceil(47));
        }
    }
}
