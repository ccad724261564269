//! When a link carries what: moves of a level, each copy down as early and each fetch as late as the
//! link's speed asks, earliest deadline first, in the room that is left.
//!
//! A transfer without room beside the running moments happens between two moments and stalls them; one
//! with room runs beside them. Nothing here changes how many bytes move.

use super::choose::Choice;
use super::level::{Level, PauseKind, forward};
use super::types::{LinkRate, Move, MoveKind};
use crate::Tier;
use crate::trace::ChunkId;

/// Seconds at which moments begin, were there no stalls.
pub(super) struct Clock {
    starts: Vec<f64>,
}

impl Clock {
    /// From the seconds of each moment.
    pub(super) fn new(seconds: impl Iterator<Item = f64>) -> Clock {
        let mut starts = vec![0.0];
        starts.extend(seconds.scan(0.0, |sum, seconds| {
            *sum += seconds;
            Some(*sum)
        }));
        Clock { starts }
    }

    fn moments(&self) -> i64 {
        self.starts.len() as i64 - 1
    }

    fn step_s(&self) -> f64 {
        self.starts[self.starts.len() - 1]
    }

    /// Start of a moment, counted on over the ends of the step both ways.
    fn start(&self, moment: i64) -> f64 {
        let lap = moment.div_euclid(self.moments());
        lap as f64 * self.step_s() + self.starts[moment.rem_euclid(self.moments()) as usize]
    }
}

/// What schedules need beside the level.
pub(super) struct Setting<'a> {
    pub(super) clock: &'a Clock,
    pub(super) rate: LinkRate,
    pub(super) upper: Tier,
    pub(super) lower: Option<Tier>,
    /// Gemini's habits: clean chunks leave with a copy, and a weight comes back in double width after
    /// the host updated it.
    pub(super) wasteful: bool,
    /// Without it every transfer happens between two moments.
    pub(super) overlap: bool,
}

/// A copy down. Moments are counted on from `ready`, over the end of the step.
struct Down {
    item: usize,
    /// It may start when this moment has ended.
    ready: i64,
    /// First moment of the pause in which the chunk leaves: from then on it takes room.
    exit: Option<(i64, usize)>,
    /// Latest moment it may be due at.
    limit: i64,
    /// Moment it is due at.
    before: i64,
}

/// A fetch. Moments are counted on from the beginning of the pause.
struct Up {
    pause: usize,
    earliest: i64,
    after: i64,
    deadline: i64,
}

/// Moves of a level.
pub(super) fn schedule(level: &Level, choice: &Choice, left: &mut [i64], setting: &Setting<'_>) -> Vec<Move> {
    let mut downs = downs(level, choice);
    let mut half: Vec<i64> = left.iter().map(|room| room / 2).collect();
    if setting.overlap {
        let before = half.clone();
        run_downs(level, &mut downs, &mut half, setting);
        left.iter_mut().zip(before.iter().zip(&half)).for_each(|(left, (was, is))| *left -= was - is);
    }
    let copied = by_pause(level, &downs);
    let mut ups = ups(level, choice, &downs, &copied);
    if setting.overlap {
        run_ups(level, &mut ups, left, setting);
        bound_by_fetch(level, &mut downs, &ups);
        run_downs(level, &mut downs, left, setting);
    }
    let mut moves = Vec::new();
    emit(level, choice, (&downs, &ups, &copied), setting, &mut moves);
    moves
}

/// Copies down that a choice asks for, each due when the chunk leaves.
fn downs(level: &Level, choice: &Choice) -> Vec<Down> {
    let mut downs = Vec::new();
    for run in &level.runs {
        let mut exit = None;
        for pause in run.pauses.iter().map(|pause| *pause as usize) {
            let kind = level.pauses[pause].kind;
            let leaves = kind == PauseKind::Free && !choice.rests[pause] && !level.recomputes(pause);
            if leaves || (run.due.is_some() && kind != PauseKind::Free) {
                exit = Some(pause);
                break;
            }
        }
        let ready = i64::from(run.written);
        let due = run.due.map(|due| ready + i64::from(due));
        let Some(limit) = limit(level, ready, exit, due) else { continue };
        let exit = exit.map(|pause| (first_after(level, ready, pause), pause));
        // A chunk that the lower tier reads before it leaves takes no room by being copied.
        let exit = exit.filter(|(first, _)| *first <= limit);
        let before = exit.map_or(limit, |(first, _)| first);
        downs.push(Down { item: run.item as usize, ready, exit, limit, before });
    }
    downs
}

/// Latest moment at which a copy may be due; none if nobody wants it.
fn limit(level: &Level, ready: i64, exit: Option<usize>, due: Option<i64>) -> Option<i64> {
    let by_exit = exit.map(|pause| {
        let len = i64::from(level.pauses[pause].len);
        let first = first_after(level, ready, pause);
        // A chunk that comes back leaves for at least half of its pause, or leaving gains nothing.
        first + if level.pauses[pause].kind == PauseKind::Dead { len } else { len / 2 }
    });
    match (by_exit, due) {
        (Some(exit), Some(due)) => Some(exit.min(due)),
        (exit, due) => exit.or(due),
    }
}

/// First moment of a pause, counted on from `ready`.
fn first_after(level: &Level, ready: i64, pause: usize) -> i64 {
    let ready_next = (ready + 1).rem_euclid(i64::from(level.moments)) as u32;
    ready + 1 + i64::from(forward(ready_next, level.pauses[pause].first, level.moments))
}

/// Index of the copy down in whose pause a chunk leaves, by pause.
fn by_pause(level: &Level, downs: &[Down]) -> Vec<Option<usize>> {
    let mut copied = vec![None; level.pauses.len()];
    for (index, down) in downs.iter().enumerate() {
        if let Some((_, pause)) = down.exit {
            copied[pause] = Some(index);
        }
    }
    copied
}

fn ups(level: &Level, choice: &Choice, downs: &[Down], copied: &[Option<usize>]) -> Vec<Up> {
    let mut ups = Vec::new();
    for (index, pause) in level.pauses.iter().enumerate() {
        let leaves = pause.kind == PauseKind::Free && !choice.rests[index] && !level.recomputes(index);
        if leaves || pause.kind == PauseKind::Broken {
            let first = i64::from(pause.first);
            let gone = copied[index].map(|down| &downs[down]).and_then(|d| d.exit.map(|e| d.before - e.0));
            let earliest = first - 1 + i64::from(pause.fetch_from).max(gone.unwrap_or(0)).max(0);
            let deadline = first + i64::from(pause.len);
            ups.push(Up { pause: index, earliest, after: deadline - 1, deadline });
        }
    }
    ups
}

/// First come, first served: as long as the link needs, if there is room.
fn run_downs(level: &Level, downs: &mut [Down], left: &mut [i64], setting: &Setting<'_>) {
    let clock = setting.clock;
    let mut order: Vec<usize> = (0..downs.len()).collect();
    order.sort_by_key(|index| downs[*index].ready);
    let mut free_s = f64::NEG_INFINITY;
    // The first lap only finds out until when the link is busy with what the step before left.
    for lap in 0..2 {
        for index in &order {
            let down = &mut downs[*index];
            let bytes = level.items[down.item].bytes;
            let done_s = free_s.max(clock.start(down.ready + 1)) + bytes as f64 / setting.rate.down_per_s;
            free_s = done_s;
            if lap == 1 {
                extend_down(down, bytes as i64, done_s, left, clock);
            }
        }
        free_s -= clock.step_s();
    }
}

fn extend_down(down: &mut Down, bytes: i64, done_s: f64, left: &mut [i64], clock: &Clock) {
    let Some((first, _)) = down.exit else {
        // Never leaves before it is due: the earliest time costs no room.
        while down.before - 1 > down.ready && clock.start(down.before - 1) >= done_s {
            down.before -= 1;
        }
        return;
    };
    while down.before == first && down.before - 1 > down.ready && clock.start(down.before - 1) >= done_s {
        down.before -= 1;
    }
    while down.before >= first && down.before < down.limit && clock.start(down.before) < done_s {
        let room = &mut left[down.before.rem_euclid(clock.moments()) as usize];
        if *room < bytes {
            break;
        }
        *room -= bytes;
        down.before += 1;
    }
}

/// Latest deadline first, backwards: each fetch starts just early enough for itself and those after it.
fn run_ups(level: &Level, ups: &mut [Up], left: &mut [i64], setting: &Setting<'_>) {
    let clock = setting.clock;
    let mut order: Vec<usize> = (0..ups.len()).collect();
    order.sort_by_key(|index| (std::cmp::Reverse(ups[*index].deadline.rem_euclid(clock.moments())), *index));
    let mut next_s = f64::INFINITY;
    for lap in 0..2 {
        for index in &order {
            let up = &mut ups[*index];
            let bytes = level.bytes(up.pause);
            let shift = up.deadline.div_euclid(clock.moments()) as f64 * clock.step_s();
            let end_s = (clock.start(up.deadline) - shift).min(next_s);
            let mut begin_s = end_s - bytes as f64 / setting.rate.up_per_s;
            if lap == 1 {
                while up.after > up.earliest && clock.start(up.after + 1) - shift > begin_s {
                    let room = &mut left[up.after.rem_euclid(clock.moments()) as usize];
                    if *room < bytes as i64 {
                        break;
                    }
                    *room -= bytes as i64;
                    up.after -= 1;
                }
                begin_s = begin_s.max(clock.start(up.after + 1) - shift);
            }
            next_s = begin_s;
        }
        next_s += clock.step_s();
    }
}

/// A copy down is done when the fetch of the same pause starts.
fn bound_by_fetch(level: &Level, downs: &mut [Down], ups: &[Up]) {
    let mut starts = vec![None; level.pauses.len()];
    for up in ups {
        starts[up.pause] = Some(up.after + 1 - i64::from(level.pauses[up.pause].first));
    }
    for down in downs {
        if let Some((first, pause)) = down.exit
            && let Some(start) = starts[pause]
        {
            down.limit = down.limit.min(first + start);
        }
    }
}

type Transfers<'a> = (&'a [Down], &'a [Up], &'a [Option<usize>]);

fn emit(
    level: &Level,
    choice: &Choice,
    transfers: Transfers<'_>,
    setting: &Setting<'_>,
    moves: &mut Vec<Move>,
) {
    let (downs, ups, copied) = transfers;
    let moments = i64::from(level.moments);
    let at = |moment: i64| moment.rem_euclid(moments) as u32;
    let upper = setting.upper;
    let lower = setting.lower.unwrap_or(upper);
    let still = |gap: i64, chunk: ChunkId, kind: MoveKind| {
        let (after, before) = (at(gap), at(gap + 1));
        Move { after, before, chunk, from: upper, to: upper, kind, bytes: 0 }
    };
    for down in downs {
        let item = &level.items[down.item];
        let (after, before) = (at(down.ready), at(down.before));
        let kind = MoveKind::WriteBack;
        moves.push(Move {
            after,
            before,
            chunk: item.chunk,
            from: upper,
            to: lower,
            kind,
            bytes: item.bytes,
        });
    }
    for up in ups {
        let item = &level.items[level.pauses[up.pause].item as usize];
        let (after, before) = (at(up.after), at(up.deadline));
        let double = setting.wasteful && level.pauses[up.pause].kind == PauseKind::Broken;
        let bytes = if double { 2 * item.bytes } else { item.bytes };
        moves.push(Move {
            after,
            before,
            chunk: item.chunk,
            from: lower,
            to: upper,
            kind: MoveKind::Fetch,
            bytes,
        });
    }
    for (index, pause) in level.pauses.iter().enumerate() {
        let chunk = level.items[pause.item as usize].chunk;
        let mut gap = i64::from(pause.first) - 1;
        if pause.len == 0 || choice.rests[index] {
            continue;
        }
        match copied[index].map(|down| &downs[down]) {
            Some(down) => gap += down.exit.map_or(0, |(first, _)| (down.before - first).max(0)),
            None if setting.wasteful && pause.kind == PauseKind::Free && !level.recomputes(index) => {
                let (after, before, bytes) = (at(gap), at(gap + 1), level.bytes(index));
                let kind = MoveKind::WriteBack;
                moves.push(Move { after, before, chunk, from: upper, to: lower, kind, bytes });
            }
            None => {}
        }
        moves.push(still(gap, chunk, MoveKind::Drop));
        if pause.kind == PauseKind::Free && level.recomputes(index) {
            moves.push(still(i64::from(pause.first + pause.len) - 1, chunk, MoveKind::Recompute));
        }
    }
}
