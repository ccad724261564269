//! Executes actions on a clock instead of a machine: what the properties of schedules are tested
//! with. It trusts nothing but the lists: a message that never comes is a deadlock, not an error.

use super::{Action, Message, Unit, Work};
use std::collections::{HashMap, HashSet};

/// How long the work of one chunk takes, in any unit.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Times {
    /// Forward.
    pub forward: f64,
    /// Gradients of inputs.
    pub backward_input: f64,
    /// Gradients of weights.
    pub backward_weight: f64,
}

impl Times {
    /// Of a whole microbatch on one chunk.
    pub fn total(&self) -> f64 {
        self.forward + self.backward_input + self.backward_weight
    }

    /// A backward is twice a forward: the same products once for inputs, once for weights.
    pub const USUAL: Times = Times { forward: 1.0, backward_input: 1.0, backward_weight: 1.0 };

    pub(super) fn of(&self, work: Work) -> f64 {
        match work {
            Work::Forward => self.forward,
            Work::BackwardInput => self.backward_input,
            Work::BackwardWeight => self.backward_weight,
            Work::Backward => self.backward_input + self.backward_weight,
        }
    }
}

/// What a send does. Messages themselves take no time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transport {
    /// It waits until the receiver receives.
    Rendezvous,
    /// It leaves the message and goes on.
    Buffered,
}

/// One unit on the clock.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Span {
    /// What ran.
    pub unit: Unit,
    /// When it began.
    pub start: f64,
    /// When it ended.
    pub end: f64,
}

/// What a simulated step was like.
#[derive(Clone, Debug, PartialEq)]
pub struct Walk {
    /// Units of each stage in order.
    pub spans: Vec<Vec<Span>>,
    /// When the last unit ended.
    pub makespan: f64,
    /// Most activations each stage held at once, in (microbatch, chunk) pairs.
    pub peak_live: Vec<usize>,
}

/// Every stage that is not done waits.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[error("deadlock: {}", waiting.iter().map(|(stage, action)| format!("stage {stage} waits in: {action}")).collect::<Vec<_>>().join("; "))]
pub struct Deadlock {
    /// Which stages wait, and in which action.
    pub waiting: Vec<(usize, Action)>,
}

struct Machine<'a> {
    lists: &'a [Vec<Action>],
    times: &'a [Times],
    transport: Transport,
    next: Vec<usize>,
    clocks: Vec<f64>,
    /// Messages on their way, by (from, to, message), with the time they were left.
    mail: HashMap<(usize, usize, Message), f64>,
    spans: Vec<Vec<Span>>,
}

/// Run every stage's list to its end.
pub fn simulate(lists: &[Vec<Action>], times: Times, transport: Transport) -> Result<Walk, Deadlock> {
    simulate_uneven(lists, &vec![times; lists.len()], transport)
}

/// The same for stages whose units take different times.
pub fn simulate_uneven(
    lists: &[Vec<Action>],
    times: &[Times],
    transport: Transport,
) -> Result<Walk, Deadlock> {
    let stages = lists.len();
    let (next, clocks, spans) = (vec![0; stages], vec![0.0; stages], vec![Vec::new(); stages]);
    let mut machine = Machine { lists, times, transport, next, clocks, mail: HashMap::new(), spans };
    loop {
        let mut moved = false;
        for stage in 0..stages {
            while machine.advance(stage) {
                moved = true;
            }
        }
        if !moved {
            break;
        }
    }
    let waits = |stage: usize| lists[stage].get(machine.next[stage]).map(|action| (stage, *action));
    let waiting: Vec<_> = (0..stages).filter_map(waits).collect();
    if !waiting.is_empty() {
        return Err(Deadlock { waiting });
    }
    let makespan = machine.clocks.iter().copied().fold(0.0, f64::max);
    let peak_live = machine.spans.iter().map(|spans| peak(spans)).collect();
    Ok(Walk { spans: machine.spans, makespan, peak_live })
}

impl Machine<'_> {
    fn upcoming(&self, stage: usize) -> Option<Action> {
        self.lists[stage].get(self.next[stage]).copied()
    }

    /// Do the stage's next action if it can be done now.
    fn advance(&mut self, stage: usize) -> bool {
        let Some(action) = self.upcoming(stage) else { return false };
        match action {
            Action::Run(unit) => {
                let start = self.clocks[stage];
                let end = start + self.times[stage].of(unit.work);
                self.spans[stage].push(Span { unit, start, end });
                self.clocks[stage] = end;
            }
            Action::Send { message, to } if self.transport == Transport::Buffered => {
                self.mail.insert((stage, to, message), self.clocks[stage]);
            }
            Action::Send { message, to } => {
                if self.upcoming(to) != Some(Action::Recv { message, from: stage }) {
                    return false;
                }
                let met = self.clocks[stage].max(self.clocks[to]);
                (self.clocks[stage], self.clocks[to]) = (met, met);
                self.next[to] += 1;
            }
            Action::Recv { message, from } => {
                // In a rendezvous the sender moves both.
                let Some(left) = self.mail.remove(&(from, stage, message)) else { return false };
                self.clocks[stage] = self.clocks[stage].max(left);
            }
        }
        self.next[stage] += 1;
        true
    }
}

/// When the last unit ends where stages share processors: a stage at work goes at pace 1 while all are at work and
/// faster while others wait, up to `most`. Sends do not wait.
pub fn makespan_shared(lists: &[Vec<Action>], times: &[Times], most: f64) -> Result<f64, Deadlock> {
    let stages = lists.len();
    let (mut next, mut left) = (vec![0; stages], vec![0.0; stages]);
    let (mut mail, mut now) = (HashSet::new(), 0.0);
    loop {
        let mut moved = true;
        while std::mem::take(&mut moved) {
            for stage in 0..stages {
                while left[stage] == 0.0
                    && let Some(action) = lists[stage].get(next[stage])
                {
                    match *action {
                        Action::Run(unit) => left[stage] = times[stage].of(unit.work),
                        Action::Send { message, to } => drop(mail.insert((stage, to, message))),
                        Action::Recv { message, from } if !mail.remove(&(from, stage, message)) => break,
                        Action::Recv { .. } => {}
                    }
                    (next[stage], moved) = (next[stage] + 1, true);
                }
            }
        }
        let busy = left.iter().filter(|left| **left > 0.0).count();
        if busy == 0 {
            break;
        }
        // The shortest of what is under way ends first.
        let first = left.iter().copied().filter(|left| *left > 0.0).fold(f64::INFINITY, f64::min);
        left.iter_mut().for_each(|left| *left = if *left > first { *left - first } else { 0.0 });
        now += first / most.min(stages as f64 / busy as f64);
    }
    let waits = |stage: usize| lists[stage].get(next[stage]).map(|action| (stage, *action));
    let waiting: Vec<_> = (0..stages).filter_map(waits).collect();
    if waiting.is_empty() { Ok(now) } else { Err(Deadlock { waiting }) }
}

/// Most forwards whose last backward has not ended.
fn peak(spans: &[Span]) -> usize {
    let split = spans.iter().any(|span| span.unit.work == Work::BackwardWeight);
    let (mut live, mut most) = (0usize, 0);
    for span in spans {
        match span.unit.work {
            Work::Forward => live += 1,
            Work::BackwardInput if split => {}
            _ => live -= 1,
        }
        most = most.max(live);
    }
    most
}
