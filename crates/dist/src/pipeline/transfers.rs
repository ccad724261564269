//! Where in each stage's list its messages stand.
//!
//! Units and messages are put into one total order, by the time they would begin if messages took
//! none: a unit at its start, a message at the end of the unit that made it, messages first where
//! times are equal. A message is made before and used after, so the order respects every need.
//! Each stage's list is its part of that order, hence:
//! - no deadlock even when a send waits for its receiver: of all entries not yet done, the first in
//!   the total order has nothing before it, on either of its stages;
//! - nothing lost when sends do not wait: a stage that waits in a receive would have begun its next
//!   unit no earlier, as long as units take the times the order was made for.

use super::{Action, Message, Payload, Pipeline, Times, Unit, Work};

/// Who gets what a unit makes: the stage and the message, where it goes to another slice.
fn product(pipeline: &Pipeline, stage: usize, unit: Unit) -> Option<(usize, Message)> {
    let (p, v) = (pipeline.stages, pipeline.chunks());
    let slice = pipeline.slice(stage, unit.chunk);
    let (payload, next) = match unit.work {
        Work::Forward => (Payload::Activation, Some(slice + 1).filter(|next| *next < p * v)),
        Work::Backward | Work::BackwardInput => (Payload::Gradient, slice.checked_sub(1)),
        Work::BackwardWeight => return None,
    };
    let next = next?;
    Some((next % p, Message { payload, microbatch: unit.microbatch, chunk: next / p }))
}

/// Ends of forwards and of (input) backwards, by slice and microbatch.
struct Ends {
    microbatches: usize,
    slices: usize,
    times: Vec<Option<f64>>,
}

impl Ends {
    fn at(&mut self, payload: Payload, slice: usize, microbatch: usize) -> &mut Option<f64> {
        &mut self.times[(payload as usize * self.slices + slice) * self.microbatches + microbatch]
    }

    /// When what `unit` of `slice` reads is there; nothing when it is not yet known.
    fn ready(&mut self, unit: Unit, slice: usize) -> Option<f64> {
        let i = unit.microbatch;
        match unit.work {
            Work::Forward if slice == 0 => Some(0.0),
            Work::Forward => *self.at(Payload::Activation, slice - 1, i),
            Work::BackwardWeight => *self.at(Payload::Gradient, slice, i),
            _ if slice + 1 == self.slices => *self.at(Payload::Activation, slice, i),
            _ => *self.at(Payload::Gradient, slice + 1, i),
        }
    }
}

/// Start of every unit when messages take no time.
fn starts(pipeline: &Pipeline, orders: &[Vec<Unit>], unit_times: Times) -> Vec<Vec<f64>> {
    let slices = pipeline.stages * pipeline.chunks();
    let (microbatches, times) = (pipeline.microbatches, vec![None; 2 * slices * pipeline.microbatches]);
    let mut ends = Ends { microbatches, slices, times };
    let mut starts: Vec<Vec<f64>> = vec![Vec::new(); orders.len()];
    let mut clocks = vec![0.0; orders.len()];
    loop {
        let mut moved = false;
        for (stage, order) in orders.iter().enumerate() {
            while let Some(unit) = order.get(starts[stage].len()) {
                let slice = pipeline.slice(stage, unit.chunk);
                let Some(ready) = ends.ready(*unit, slice) else { break };
                let start = f64::max(ready, clocks[stage]);
                clocks[stage] = start + unit_times.of(unit.work);
                let payload = match unit.work {
                    Work::Forward => Some(Payload::Activation),
                    Work::Backward | Work::BackwardInput => Some(Payload::Gradient),
                    Work::BackwardWeight => None,
                };
                if let Some(payload) = payload {
                    *ends.at(payload, slice, unit.microbatch) = Some(clocks[stage]);
                }
                starts[stage].push(start);
                moved = true;
            }
        }
        if !moved {
            let done = orders.iter().zip(&starts).all(|(order, starts)| order.len() == starts.len());
            assert!(done, "the orders of a schedule wait for each other in a circle");
            return starts;
        }
    }
}

/// Each stage's units with their sends and receives.
pub(super) fn with_transfers(pipeline: &Pipeline, orders: &[Vec<Unit>], times: Times) -> Vec<Vec<Action>> {
    /// Messages before units at the same time, each kind in the order it was found.
    #[derive(PartialEq, Eq, PartialOrd, Ord)]
    enum Event {
        Message { from: usize, message: Message, to: usize },
        Unit { stage: usize, unit: Unit },
    }
    let starts = starts(pipeline, orders, times);
    let mut events = Vec::new();
    for (stage, (order, starts)) in orders.iter().zip(&starts).enumerate() {
        for (unit, start) in order.iter().zip(starts) {
            events.push((*start, Event::Unit { stage, unit: *unit }));
            match product(pipeline, stage, *unit) {
                // On a mesh of one stage the next slice is at home.
                Some((to, message)) if to != stage => {
                    events.push((start + times.of(unit.work), Event::Message { from: stage, message, to }));
                }
                _ => {}
            }
        }
    }
    events.sort_unstable_by(|a, b| a.0.total_cmp(&b.0).then_with(|| a.1.cmp(&b.1)));
    let mut actions = vec![Vec::new(); orders.len()];
    for (_, event) in events {
        match event {
            Event::Unit { stage, unit } => actions[stage].push(Action::Run(unit)),
            Event::Message { from, message, to } => {
                actions[from].push(Action::Send { message, to });
                actions[to].push(Action::Recv { message, from });
            }
        }
    }
    actions
}
