//! Pipeline schedules as pure functions: shape in, each stage's ordered actions out.
//!
//! Letters: p stages, m microbatches, v chunks a stage. The model is cut into p v slices; slice i is
//! chunk i / p of stage i mod p, so that a microbatch walks all stages before it meets the second
//! chunk of the first. This room moves no bytes: whoever owns the loop executes the actions.

mod balance;
mod gpipe;
mod interleaved;
mod one_f_one_b;
mod simulate;
mod timeline;
mod transfers;
mod zero_bubble;

pub use balance::{balance, balance_alike};
pub use simulate::{Deadlock, Span, Times, Transport, Walk, makespan_shared, simulate, simulate_uneven};

use std::fmt;

/// In which order a stage works.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Schedule {
    /// All forwards, then all backwards (Huang et al. 2018, arXiv:1811.06965).
    GPipe,
    /// One forward, one backward: a microbatch goes back as soon as it can, so that at most p are
    /// held (Narayanan et al. 2019 and 2021, arXiv:1806.03377, arXiv:2104.04473).
    OneFOneB,
    /// The same with several slices of the model on each stage: the bubble shrinks by the number
    /// of chunks, messages grow by it (arXiv:2104.04473, section 2.2).
    Interleaved {
        /// Slices of the model on each stage, v.
        chunks: usize,
    },
    /// ZB-H1: gradients of weights are formed apart from those of inputs and fill the bubble
    /// (Qi et al. 2023, arXiv:2401.10241, section 2).
    ZeroBubble,
}

/// What a stage computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Work {
    /// Activations of the slice.
    Forward,
    /// Gradients of inputs and weights together.
    Backward,
    /// Gradients of inputs only.
    BackwardInput,
    /// Gradients of weights, any time after those of the inputs.
    BackwardWeight,
}

/// One piece of computation of one stage.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Unit {
    /// What.
    pub work: Work,
    /// For which microbatch, 0 to m - 1.
    pub microbatch: usize,
    /// On which of the stage's chunks, 0 to v - 1.
    pub chunk: usize,
}

/// What two stages tell each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Payload {
    /// Output of a slice, input of the next.
    Activation,
    /// Gradient of a slice's input, for the slice before.
    Gradient,
}

/// One message between two stages.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Message {
    /// What.
    pub payload: Payload,
    /// Of which microbatch.
    pub microbatch: usize,
    /// For which chunk of the receiver.
    pub chunk: usize,
}

/// One entry of a stage's list.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Action {
    /// Compute.
    Run(Unit),
    /// Hand a message over.
    Send {
        /// Which.
        message: Message,
        /// To which stage.
        to: usize,
    },
    /// Wait for a message.
    Recv {
        /// Which.
        message: Message,
        /// From which stage.
        from: usize,
    },
}

/// A shape no schedule fits.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum PipelineError {
    /// A size is zero.
    #[error(
        "a pipeline of {stages} stages, {microbatches} microbatches and {chunks} chunks has nothing to do; each must be at least 1"
    )]
    Empty {
        /// p.
        stages: usize,
        /// m.
        microbatches: usize,
        /// v.
        chunks: usize,
    },
    /// Interleaving walks the microbatches in groups of p.
    #[error(
        "interleaved schedules walk microbatches in groups of one per stage, but {microbatches} microbatches do not divide by {stages} stages; take {lower} or {upper} microbatches, or schedule 1f1b"
    )]
    Groups {
        /// p.
        stages: usize,
        /// m.
        microbatches: usize,
        /// The next multiple of p below, or p.
        lower: usize,
        /// The next multiple of p above.
        upper: usize,
    },
    /// A unit that takes no time, or forever, has no place in an order.
    #[error("a unit of a pipeline takes {time}; times must be finite and above 0")]
    Time {
        /// Which.
        time: f64,
    },
}

/// A pipeline whose shape its schedule fits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pipeline {
    stages: usize,
    microbatches: usize,
    schedule: Schedule,
}

impl Pipeline {
    /// Of `stages` stages and `microbatches` microbatches a step.
    pub fn new(stages: usize, microbatches: usize, schedule: Schedule) -> Result<Pipeline, PipelineError> {
        let chunks = schedule.chunks();
        if stages == 0 || microbatches == 0 || chunks == 0 {
            return Err(PipelineError::Empty { stages, microbatches, chunks });
        }
        if chunks > 1 && !microbatches.is_multiple_of(stages) {
            let lower = (microbatches / stages * stages).max(stages);
            let upper = microbatches.next_multiple_of(stages);
            return Err(PipelineError::Groups { stages, microbatches, lower, upper });
        }
        Ok(Pipeline { stages, microbatches, schedule })
    }

    /// p.
    pub fn stages(&self) -> usize {
        self.stages
    }

    /// m.
    pub fn microbatches(&self) -> usize {
        self.microbatches
    }

    /// v.
    pub fn chunks(&self) -> usize {
        self.schedule.chunks()
    }

    /// In which order.
    pub fn schedule(&self) -> Schedule {
        self.schedule
    }

    /// Each stage's actions in order, for units that take `Times::USUAL`.
    pub fn actions(&self) -> Vec<Vec<Action>> {
        transfers::with_transfers(self, &self.orders(), Times::USUAL)
    }

    /// The same for units that take `times`, which decide only where messages stand. Whoever
    /// executes the lists with sends that wait for their receivers does not deadlock; with sends
    /// that do not wait, and these times, no stage waits for a message before it needs it.
    pub fn actions_for(&self, times: Times) -> Result<Vec<Vec<Action>>, PipelineError> {
        let each = [times.forward, times.backward_input, times.backward_weight];
        match each.iter().find(|time| !time.is_finite() || **time <= 0.0) {
            Some(time) => Err(PipelineError::Time { time: *time }),
            None => Ok(transfers::with_transfers(self, &self.orders(), times)),
        }
    }

    /// What is left of `actions` when nothing is learned: forwards and their messages, of the first
    /// `microbatches` microbatches.
    pub fn forwards(&self, microbatches: usize) -> Vec<Vec<Action>> {
        let kept = |action: &Action| match action {
            Action::Run(unit) => unit.work == Work::Forward && unit.microbatch < microbatches,
            Action::Send { message, .. } | Action::Recv { message, .. } => {
                message.payload == Payload::Activation && message.microbatch < microbatches
            }
        };
        self.actions().into_iter().map(|list| list.into_iter().filter(kept).collect()).collect()
    }

    /// Each stage's computation in order, without messages.
    fn orders(&self) -> Vec<Vec<Unit>> {
        let order = match self.schedule {
            Schedule::GPipe => gpipe::order,
            Schedule::OneFOneB => one_f_one_b::order,
            Schedule::Interleaved { .. } => interleaved::order,
            Schedule::ZeroBubble => zero_bubble::order,
        };
        (0..self.stages).map(|stage| order(self, stage)).collect()
    }

    /// Most (microbatch, chunk) pairs whose activations `stage` holds at once: from the start of
    /// their forward to the end of their last backward.
    pub fn peak_live(&self, stage: usize) -> usize {
        match self.schedule {
            Schedule::GPipe => gpipe::peak_live(self),
            Schedule::OneFOneB => one_f_one_b::peak_live(self, stage),
            Schedule::Interleaved { .. } => interleaved::peak_live(self, stage),
            Schedule::ZeroBubble => zero_bubble::peak_live(self),
        }
    }

    /// Seconds (or whatever unit `times` has) the step takes when messages take none. The part of
    /// it that is bubble is `1 - work / makespan` with work = m v (f + i + w).
    ///
    /// GPipe, 1F1B, interleaved: before its first unit the last stage waits (p - 1) f, and after
    /// the last backward of the last stage p - 1 stages have a backward of their own to do, so a
    /// step takes (m v + p - 1)(f + b) with f and b the times of one chunk. For zero-bubble see
    /// `zero_bubble::makespan`: with f = i = w, 3 m + p - 1 instead of 3 (m + p - 1).
    pub fn makespan(&self, times: Times) -> f64 {
        let (m, v, p) = (self.microbatches as f64, self.chunks() as f64, self.stages as f64);
        match self.schedule {
            Schedule::ZeroBubble => zero_bubble::makespan(self, times),
            _ => (m * v + p - 1.0) * times.total(),
        }
    }

    /// The same where stages take different times: `mean` of all of them for a chunk, `longest` for one of
    /// the stage that has most to do. That stage waits while the first microbatch comes to it and the last
    /// one leaves it, through chunks of the others. Where the last stage is the longest (it has the head) no
    /// order is shorter, and none of ours takes longer than a pipeline of such stages.
    pub fn makespan_of_uneven(&self, mean: Times, longest: Times) -> f64 {
        if self.stages == 1 {
            return self.makespan(longest);
        }
        let (p, runs) = (self.stages as f64, (self.microbatches * self.chunks()) as f64);
        // What one other stage makes a stage wait.
        let wait = |times: Times| (self.makespan(times) - runs * times.total()) / (p - 1.0);
        runs * longest.total() + (p * wait(mean) - wait(longest)).max(0.0)
    }

    /// The same where stages share processors, `sharing` on each: those at work have the processors of those
    /// that wait. Times are those while all are at work; the last stage has most to do.
    pub fn makespan_of_sharing(&self, mean: Times, longest: Times, sharing: f64) -> f64 {
        let others = (self.stages as f64 - 1.0).max(1.0);
        let rest = |mean: f64, longest: f64| ((self.stages as f64 * mean - longest) / others).max(0.0);
        let other = Times {
            forward: rest(mean.forward, longest.forward),
            backward_input: rest(mean.backward_input, longest.backward_input),
            backward_weight: rest(mean.backward_weight, longest.backward_weight),
        };
        let mut times = vec![other; self.stages];
        times[self.stages - 1] = longest;
        makespan_shared(&self.actions(), &times, sharing).expect("schedules have no deadlock")
    }

    /// Share of the step a stage stands idle.
    pub fn bubble(&self, times: Times) -> f64 {
        let work = (self.microbatches * self.chunks()) as f64 * times.total();
        // Never a rounding below none.
        (1.0 - work / self.makespan(times)).max(0.0)
    }

    /// Slice of the model that is `chunk` of `stage`.
    pub fn slice(&self, stage: usize, chunk: usize) -> usize {
        chunk * self.stages + stage
    }
}

impl Schedule {
    /// v.
    pub fn chunks(self) -> usize {
        match self {
            Schedule::Interleaved { chunks } => chunks,
            _ => 1,
        }
    }

    /// Whether gradients of inputs and of weights are formed apart.
    pub fn splits_backward(self) -> bool {
        self == Schedule::ZeroBubble
    }
}

impl fmt::Display for Schedule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Schedule::GPipe => f.write_str("gpipe"),
            Schedule::OneFOneB => f.write_str("1f1b"),
            Schedule::Interleaved { chunks } => write!(f, "interleaved x{chunks}"),
            Schedule::ZeroBubble => f.write_str("zero-bubble"),
        }
    }
}

impl fmt::Display for Action {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Action::Run(Unit { work, microbatch, chunk }) => {
                write!(f, "{work:?} of microbatch {microbatch} on chunk {chunk}")
            }
            Action::Send { message, to } => write!(f, "send {message} to stage {to}"),
            Action::Recv { message, from } => write!(f, "receive {message} from stage {from}"),
        }
    }
}

impl fmt::Display for Message {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let payload = match self.payload {
            Payload::Activation => "activation",
            Payload::Gradient => "gradient",
        };
        write!(f, "{payload} of microbatch {} for chunk {}", self.microbatch, self.chunk)
    }
}

impl Unit {
    fn new(work: Work, microbatch: usize, chunk: usize) -> Unit {
        Unit { work, microbatch, chunk }
    }
}

#[cfg(test)]
mod tests;
