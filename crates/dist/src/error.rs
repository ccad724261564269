//! Why a run of several ranks ended: one message, the same on every rank.

use crate::Call;
use std::fmt;

/// What ended a run of several ranks, or what a call was refused for. Every rank of a run that
/// failed gets the same value.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum CommError {
    /// A rank did not come to a call in time.
    #[error(
        "rank {rank} is late: rank {waiting} waited {waited_s:.1} s for it in {call}; rank {rank} {last}; \
         raise the deadline if it was only slow"
    )]
    Late {
        /// Who did not come.
        rank: usize,
        /// Who waited for it.
        waiting: usize,
        /// How long.
        waited_s: f64,
        /// Where it was awaited.
        call: Box<Call>,
        /// What it was last seen doing.
        last: Box<LastSeen>,
    },
    /// Two ranks of a group called different things, or the same in different sizes.
    #[error(
        "rank {rank} is out of step: it is in {call}, where rank {other} is in {other_call}; \
         every rank must make the same calls in the same order"
    )]
    OutOfStep {
        /// One of the two.
        rank: usize,
        /// What it called.
        call: Box<Call>,
        /// The other one.
        other: usize,
        /// What that one called.
        other_call: Box<Call>,
    },
    /// A rank ended before the others.
    #[error("rank {rank} is dead: {reason}; it {last}")]
    Dead {
        /// Who.
        rank: usize,
        /// Its own last words, or how its end was noticed.
        reason: String,
        /// What it was last seen doing.
        last: Box<LastSeen>,
    },
    /// Arguments that no group could serve.
    #[error("{op} on `{axes}` of {ranks} ranks: {problem}")]
    Argument {
        /// What was called.
        op: &'static str,
        /// Axes of the group.
        axes: String,
        /// Size of the group.
        ranks: usize,
        /// What is wrong, with values and a remedy.
        problem: String,
    },
    /// A buffer could not be made.
    #[error(transparent)]
    Memory(#[from] device::OutOfMemory),
    /// What another process said ended the run, in its words.
    #[error("{0}")]
    Reported(String),
    /// The transport between processes failed.
    #[error("{0}")]
    Transport(String),
}

impl From<CommError> for tensor::Fault {
    fn from(error: CommError) -> tensor::Fault {
        tensor::Fault::outside(error)
    }
}

/// What a rank was last seen doing.
#[derive(Clone, Debug, PartialEq)]
pub enum LastSeen {
    /// In a call.
    In(Call),
    /// Outside of calls, in this step and layer, after its last call if it had made one.
    Computing {
        /// Training step.
        step: u64,
        /// Layer, if it said.
        layer: Option<u32>,
        /// The last call it finished.
        after: Option<Call>,
    },
}

impl fmt::Display for LastSeen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            LastSeen::In(call) => write!(f, "was last seen in {call}"),
            LastSeen::Computing { step, layer, after } => {
                write!(f, "was last seen computing in step {step}")?;
                if let Some(layer) = layer {
                    write!(f, ", layer {layer}")?;
                }
                match after {
                    Some(call) => write!(f, ", after {call}"),
                    None => write!(f, ", before its first call"),
                }
            }
        }
    }
}
