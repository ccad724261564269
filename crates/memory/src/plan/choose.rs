//! Which chunks rest: rules that decide every free pause of a level.
//!
//! All rules are judged by the same count of bytes (`Choice::bytes`), fit the same room and may be
//! filled up afterwards, so they compare fairly.

use super::level::{Level, PauseKind};
use super::room::Room;
use std::collections::BinaryHeap;

/// For each pause of a level: the chunk rests in the upper tier.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Choice {
    /// By pause.
    pub(super) rests: Vec<bool>,
}

/// What to evict first, when a moment lacks room.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Victim {
    /// Used longest ago.
    LeastRecent,
    /// Used again farthest from now, counting on into the next step.
    Farthest,
    /// Used again farthest from now per byte that leaving moves.
    FarthestPerByte,
    /// Used again farthest from now within this step; not at all in this step is farthest, the
    /// highest chunk first.
    FarthestThisStep,
}

impl Choice {
    /// Nothing rests but what takes no room.
    pub(super) fn none(level: &Level) -> Choice {
        let rests = level.pauses.iter().map(|pause| pause.kind == PauseKind::Free && pause.len == 0);
        Choice { rests: rests.collect() }
    }

    /// Everything rests that is worth anything.
    pub(super) fn all(level: &Level) -> Choice {
        Choice { rests: level.pauses.iter().map(|pause| pause.kind == PauseKind::Free).collect() }
    }

    /// Free pauses that take room.
    fn open(level: &Level) -> impl Iterator<Item = usize> {
        let free = |pause: &usize| {
            let pause = &level.pauses[*pause];
            pause.kind == PauseKind::Free && pause.len > 0
        };
        (0..level.pauses.len()).filter(free)
    }

    /// Bytes over the link: (up, down).
    pub(super) fn bytes(&self, level: &Level) -> (u64, u64) {
        let (mut up, mut down) = level.forced_bytes();
        let mut copied = vec![false; level.runs.len()];
        for pause in Self::open(level).filter(|pause| !self.rests[*pause] && !level.recomputes(*pause)) {
            up += level.bytes(pause);
            if let Some(run) = level.pauses[pause].run.filter(|run| !copied[*run as usize]) {
                copied[run as usize] = true;
                down += level.bytes(pause);
            }
        }
        (up, down)
    }

    /// Bytes both ways, recomputing counted as the bytes the link carries meanwhile.
    pub(super) fn cost(&self, level: &Level, up_per_s: f64) -> f64 {
        let (up, down) = self.bytes(level);
        let again = Self::open(level).filter(|pause| !self.rests[*pause] && level.recomputes(*pause));
        let again: f64 = again.map(|pause| leave_cost(level, pause, up_per_s, true)).sum();
        (up + down) as f64 + again
    }

    /// Let chunks rest in the order given, as far as room goes.
    fn in_order(level: &Level, room: &[i64], order: impl Iterator<Item = usize>) -> Choice {
        let mut choice = Self::none(level);
        let mut room = Room::new(room);
        for index in order {
            let pause = &level.pauses[index];
            choice.rests[index] =
                choice.rests[index] || room.take(pause.first, pause.len, level.bytes(index));
        }
        choice
    }

    /// Room that is left.
    pub(super) fn left(&self, level: &Level, room: &[i64]) -> Room {
        let mut room = Room::new(room);
        for (index, pause) in level.pauses.iter().enumerate().filter(|(index, _)| self.rests[*index]) {
            room.add(pause.first, pause.len, -(level.bytes(index) as i64));
        }
        room
    }

    /// Use up the room that is left: most bytes saved per byte and moment first.
    pub(super) fn fill(mut self, level: &Level, room: &[i64], up_per_s: f64) -> Choice {
        let mut left = self.left(level, room);
        let mut out: Vec<(f64, usize)> = Self::open(level)
            .filter(|pause| !self.rests[*pause])
            .map(|pause| (density(level, pause, up_per_s), pause))
            .collect();
        out.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
        for (_, index) in out {
            let pause = &level.pauses[index];
            self.rests[index] = left.take(pause.first, pause.len, level.bytes(index));
        }
        self
    }

    /// Most bytes saved per byte of room and moment first.
    pub(super) fn densest(level: &Level, room: &[i64], up_per_s: f64) -> Choice {
        Self::none(level).fill(level, room, up_per_s)
    }

    /// Whole chunks for the shares a linear program wants (`wants` is by pause).
    ///
    /// A share is not rounded pause by pause: a chunk that rests in two thirds of its pauses still pays
    /// for its copy down. Each chunk draws one threshold for all its pauses, evenly spread over the
    /// chunks, so among chunks alike as many rest as the program wants, and those rest throughout.
    pub(super) fn rounded(level: &Level, room: &[i64], wants: &[f64], up_per_s: f64) -> Choice {
        const GOLDEN: f64 = 0.618_033_988_749_895;
        let threshold = |pause: usize| (f64::from(level.pauses[pause].item + 1) * GOLDEN).fract();
        let mut order: Vec<(f64, f64, usize)> = Self::open(level)
            .filter(|pause| wants[*pause] >= threshold(*pause).max(1e-6))
            .map(|pause| (wants[pause] - threshold(pause), density(level, pause, up_per_s), pause))
            .collect();
        order.sort_by(|a, b| b.0.total_cmp(&a.0).then(b.1.total_cmp(&a.1)).then(a.2.cmp(&b.2)));
        Self::in_order(level, room, order.into_iter().map(|(_, _, pause)| pause)).fill(level, room, up_per_s)
    }

    /// A prefix of the chunks rests for good, the others leave after every use.
    pub(super) fn prefix(level: &Level, room: &[i64]) -> Choice {
        let mut choice = Self::none(level);
        let mut left = Room::new(room);
        let mut pauses: Vec<usize> = Self::open(level).collect();
        pauses.sort_by_key(|pause| (level.items[level.pauses[*pause].item as usize].chunk, *pause));
        for same in pauses.chunk_by(|a, b| level.pauses[*a].item == level.pauses[*b].item) {
            for index in same {
                let pause = &level.pauses[*index];
                if !left.take(pause.first, pause.len, level.bytes(*index)) {
                    same.iter().for_each(|pause| choice.rests[*pause] = false);
                    return choice;
                }
                choice.rests[*index] = true;
            }
        }
        choice
    }

    /// Walk through the step, evicting by a rule where room is short, until it repeats.
    pub(super) fn walk(level: &Level, room: &[i64], victim: Victim) -> Choice {
        let mut starts: Vec<Vec<usize>> = vec![Vec::new(); level.moments as usize];
        for pause in Self::open(level) {
            starts[level.pauses[pause].first as usize].push(pause);
        }
        let mut walk =
            Walk { level, victim, heap: BinaryHeap::new(), rests: vec![false; level.pauses.len()] };
        let mut taken = 0i64;
        let mut ends: Vec<Vec<usize>> = vec![Vec::new(); level.moments as usize];
        // Two laps reach the state that repeats; the third ends the pauses the second began.
        for lap in 0..3u64 {
            for moment in 0..level.moments {
                for pause in std::mem::take(&mut ends[moment as usize]) {
                    taken -= if walk.rests[pause] { level.bytes(pause) as i64 } else { 0 };
                }
                if lap < 2 {
                    for pause in &starts[moment as usize] {
                        let end = (moment + level.pauses[*pause].len) % level.moments;
                        ends[end as usize].push(*pause);
                        taken += level.bytes(*pause) as i64;
                        walk.enter(*pause, lap * u64::from(level.moments) + u64::from(moment));
                    }
                }
                while taken > room[moment as usize] {
                    let Some(bytes) = walk.evict(lap * u64::from(level.moments) + u64::from(moment)) else {
                        break;
                    };
                    taken -= bytes as i64;
                }
            }
        }
        // The steady state fits by construction except where the first lap differed from the third.
        let kept: Vec<usize> = Self::open(level).filter(|pause| walk.rests[*pause]).collect();
        Self::in_order(level, room, kept.into_iter())
    }
}

/// State of `Choice::walk`: pauses under way, the next victim on top.
struct Walk<'a> {
    level: &'a Level,
    victim: Victim,
    /// Key, end of the pause (in moments since the walk began), pause.
    heap: BinaryHeap<(u64, u64, usize)>,
    rests: Vec<bool>,
}

impl Walk<'_> {
    fn enter(&mut self, index: usize, now: u64) {
        let pause = &self.level.pauses[index];
        let end = now + u64::from(pause.len);
        let chunk = u64::from(self.level.items[pause.item as usize].chunk.0);
        let moments = u64::from(self.level.moments);
        let key = match self.victim {
            Victim::LeastRecent => u64::MAX - now,
            Victim::Farthest => end,
            // The copy down counts once for a run; a chunk that is dirty costs twice.
            Victim::FarthestPerByte => {
                if pause.run.is_some() {
                    2 * now + (end - now)
                } else {
                    2 * end
                }
            }
            Victim::FarthestThisStep if end / moments > now / moments => u64::MAX / 2 + chunk,
            Victim::FarthestThisStep => end,
        };
        self.rests[index] = true;
        self.heap.push((key, end, index));
    }

    fn evict(&mut self, now: u64) -> Option<u64> {
        while let Some((_, end, index)) = self.heap.pop() {
            if end > now && self.rests[index] {
                self.rests[index] = false;
                return Some(self.level.bytes(index));
            }
        }
        None
    }
}

/// Bytes that leaving moves, or their worth where the chunk is made again.
fn leave_cost(level: &Level, pause: usize, up_per_s: f64, dirty: bool) -> f64 {
    let bytes = level.bytes(pause) as f64;
    match level.items[level.pauses[pause].item as usize].recompute_s {
        Some(seconds) => seconds * up_per_s,
        None if dirty && level.pauses[pause].run.is_some() => 2.0 * bytes,
        None => bytes,
    }
}

fn density(level: &Level, pause: usize, up_per_s: f64) -> f64 {
    let room = level.bytes(pause).max(1) as f64 * f64::from(level.pauses[pause].len);
    leave_cost(level, pause, up_per_s, true) / room
}
