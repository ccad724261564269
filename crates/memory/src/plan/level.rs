//! One link as a packing problem: which chunks rest in the upper tier between two of their uses.
//!
//! A chunk needs the upper tier at its *events*. Between two events lies a *pause*: the chunk may rest
//! (and take room) or leave (and come back over the link). A chunk that was written must be copied
//! down once before it leaves; the pauses that share this one copy form a *run*.

use crate::trace::{Access, ChunkId, MomentId};

/// A stretch of moments that needs a chunk.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Event {
    /// First moment, below the count of moments.
    pub(super) start: MomentId,
    /// Moments it lasts, at least 1; may run past the end of the step.
    pub(super) len: u32,
    /// What happens to the bytes.
    pub(super) access: Access,
    /// Whether it needs the upper tier; otherwise it needs the lower one.
    pub(super) top: bool,
}

impl Event {
    /// Last moment, counted on past the end of the step.
    pub(super) const fn last(&self) -> u32 {
        self.start + self.len - 1
    }
}

/// A chunk as one link sees it.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Item {
    /// Which chunk.
    pub(super) chunk: ChunkId,
    /// Its size.
    pub(super) bytes: u64,
    /// Seconds to make it again, if that is allowed.
    pub(super) recompute_s: Option<f64>,
    /// In order, without overlaps.
    pub(super) events: Vec<Event>,
}

/// What may happen in a pause.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum PauseKind {
    /// The bytes are overwritten next: nothing is kept.
    Dead,
    /// The lower tier writes the chunk: the upper copy is stale and is fetched again.
    Broken,
    /// The planner chooses.
    Free,
}

/// The time between two top events of a chunk.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Pause {
    /// Index of the item.
    pub(super) item: u32,
    /// First moment of the pause, below the count of moments.
    pub(super) first: MomentId,
    /// Moments it lasts; may be 0.
    pub(super) len: u32,
    /// What may happen.
    pub(super) kind: PauseKind,
    /// Moments of the pause after which the lower tier is done writing: a fetch starts later.
    pub(super) fetch_from: u32,
    /// The run that pays for leaving, if the chunk is dirty.
    pub(super) run: Option<u32>,
}

/// A write in the upper tier and the pauses until the next one.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Run {
    /// Index of the item.
    pub(super) item: u32,
    /// Moment the write ends in, below the count of moments.
    pub(super) written: MomentId,
    /// Pauses in order, by index.
    pub(super) pauses: Vec<u32>,
    /// The lower tier reads what was written: the copy is due this many moments after `written`.
    pub(super) due: Option<u32>,
}

/// All chunks that need the upper tier of a link.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Level {
    /// Count of moments of a step.
    pub(super) moments: u32,
    /// Bytes of the upper tier that no event takes, by moment; negative where events do not fit.
    pub(super) room: Vec<i64>,
    /// Chunks with at least one top event.
    pub(super) items: Vec<Item>,
    /// Their pauses, item by item in order.
    pub(super) pauses: Vec<Pause>,
    /// Their runs.
    pub(super) runs: Vec<Run>,
}

impl Level {
    /// The problem of `items` in an upper tier that has `capacity` bytes by moment.
    pub(super) fn new(items: Vec<Item>, capacity: &[i64]) -> Level {
        let moments = capacity.len() as u32;
        let items: Vec<Item> = items.into_iter().filter(|item| item.events.iter().any(|e| e.top)).collect();
        let mut level =
            Level { moments, room: capacity.to_vec(), items, pauses: Vec::new(), runs: Vec::new() };
        for index in 0..level.items.len() {
            level.take_room(index);
            level.add_pauses(index);
        }
        level
    }

    fn take_room(&mut self, index: usize) {
        let item = &self.items[index];
        for event in item.events.iter().filter(|event| event.top) {
            for moment in event.start..event.start + event.len.min(self.moments) {
                self.room[(moment % self.moments) as usize] -= item.bytes as i64;
            }
        }
    }

    fn add_pauses(&mut self, index: usize) {
        let events = std::mem::take(&mut self.items[index].events);
        let tops: Vec<usize> = (0..events.len()).filter(|i| events[*i].top).collect();
        let first_pause = self.pauses.len();
        for (nth, from) in tops.iter().enumerate() {
            let to = tops[(nth + 1) % tops.len()];
            self.pauses.push(self.pause(index as u32, &events, *from, to));
        }
        for (nth, from) in tops.iter().enumerate() {
            if events[*from].access.writes() {
                self.add_run(index as u32, &events, &tops, nth, first_pause);
            }
        }
        self.items[index].events = events;
    }

    fn pause(&self, item: u32, events: &[Event], from: usize, to: usize) -> Pause {
        let last = events[from].last();
        let mut end = events[to].start;
        while end <= last {
            end += self.moments;
        }
        let first = last + 1;
        let mut fetch_from = 0;
        let mut broken = false;
        for below in between(events, from, to).map(|i| &events[i]).filter(|e| e.access.writes()) {
            broken = true;
            fetch_from = forward(first, below.last() + 1, self.moments);
        }
        let kind = match (events[to].access.reads(), broken) {
            (false, _) => PauseKind::Dead,
            (true, true) => PauseKind::Broken,
            (true, false) => PauseKind::Free,
        };
        // A chunk whose only event fills the step has no pause at all.
        Pause { item, first: first % self.moments, len: end - first, kind, fetch_from, run: None }
    }

    /// The run of the write at the `nth` top event.
    fn add_run(&mut self, item: u32, events: &[Event], tops: &[usize], nth: usize, first_pause: usize) {
        let run = self.runs.len() as u32;
        let written = events[tops[nth]].last();
        let mut pauses = Vec::new();
        let mut due = None;
        for step in 0..tops.len() {
            let at = (nth + step) % tops.len();
            let (from, to) = (tops[at], tops[(at + 1) % tops.len()]);
            let pause = first_pause + at;
            pauses.push(pause as u32);
            let below = between(events, from, to).next().map(|i| &events[i]);
            if let Some(below) = below.filter(|below| below.access.reads()) {
                due = Some(forward(written, below.start, self.moments));
            }
            if below.is_some() || self.pauses[pause].kind != PauseKind::Free || events[to].access.writes() {
                break;
            }
        }
        if due.is_none() {
            for pause in &pauses {
                let pause = &mut self.pauses[*pause as usize];
                pause.run = (pause.kind == PauseKind::Free).then_some(run);
            }
        }
        self.runs.push(Run { item, written: written % self.moments, pauses, due });
    }

    /// Bytes that leave and come back whatever is decided: (up, down).
    pub(super) fn forced_bytes(&self) -> (u64, u64) {
        let broken = self.pauses.iter().filter(|pause| pause.kind == PauseKind::Broken);
        let due = self.runs.iter().filter(|run| run.due.is_some());
        (
            broken.map(|pause| self.items[pause.item as usize].bytes).sum(),
            due.map(|run| self.items[run.item as usize].bytes).sum(),
        )
    }

    /// Size of the chunk of a pause.
    pub(super) fn bytes(&self, pause: usize) -> u64 {
        self.items[self.pauses[pause].item as usize].bytes
    }

    /// Whether leaving in this pause means making the chunk again.
    pub(super) fn recomputes(&self, pause: usize) -> bool {
        self.items[self.pauses[pause].item as usize].recompute_s.is_some()
    }
}

/// Moments from `from` forward to `to`, cyclic.
pub(super) const fn forward(from: u32, to: u32, moments: u32) -> u32 {
    (to % moments + moments - from % moments) % moments
}

/// Indices of the events strictly between two, cyclic.
fn between(events: &[Event], from: usize, to: usize) -> impl Iterator<Item = usize> {
    let count = events.len();
    let steps = if to > from { to - from } else { to + count - from };
    (1..steps).map(move |step| (from + step) % count)
}

/// Events in order, overlapping ones joined, also over the end of the step.
pub(super) fn join_events(mut events: Vec<Event>, moments: u32) -> Vec<Event> {
    // Among events that begin together the one that brings the bytes comes first.
    events.sort_by_key(|event| (event.start, event.access.reads(), event.len));
    let mut joined: Vec<Event> = Vec::with_capacity(events.len());
    for event in events {
        match joined.last_mut() {
            Some(last) if last.top == event.top && event.start <= last.last() => absorb(last, &event, 0),
            _ => joined.push(event),
        }
    }
    while joined.len() > 1 {
        let (first, last) = (joined[0], joined[joined.len() - 1]);
        if first.top != last.top || first.start + moments > last.last() {
            break;
        }
        joined.remove(0);
        let end = joined.len() - 1;
        absorb(&mut joined[end], &first, moments);
    }
    for event in &mut joined {
        event.len = event.len.min(moments);
    }
    joined
}

fn absorb(into: &mut Event, event: &Event, shift: u32) {
    into.access = into.access.then(event.access);
    into.len = into.len.max(event.last() + shift - into.start + 1);
}
