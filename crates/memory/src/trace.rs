//! What one training step touches, in order: the only thing the planner knows of a run.
//!
//! A trace is cyclic: the use after a chunk's last one is its first one of the next step. It says
//! nothing of where bytes lie; that is the plan's answer. Never does IO.

use crate::Class;

/// Index of a chunk in `Trace::chunks`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ChunkId(pub u32);

/// Index of a moment in `Trace::moments`.
pub type MomentId = u32;

/// What a use does to a chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Access {
    /// The bytes are needed and stay as they are.
    Read,
    /// Every byte is overwritten: what was there before is not needed.
    Write,
    /// The bytes are needed and change.
    ReadWrite,
}

impl Access {
    /// Whether the bytes must be valid before the use.
    pub const fn reads(self) -> bool {
        !matches!(self, Access::Write)
    }

    /// Whether copies in other tiers are stale after the use.
    pub const fn writes(self) -> bool {
        !matches!(self, Access::Read)
    }

    /// The same of a part of the bytes.
    pub const fn in_part(self) -> Access {
        match self {
            Access::Read => Access::Read,
            Access::Write | Access::ReadWrite => Access::ReadWrite,
        }
    }

    /// One access that stands for `self` and then `next` in the same moment.
    pub const fn then(self, next: Access) -> Access {
        match (self, next) {
            (Access::Read, Access::Read) => Access::Read,
            (Access::Write, _) => Access::Write,
            _ => Access::ReadWrite,
        }
    }
}

/// A run of bytes of one class that moves as one.
///
/// A chunk whose first use of a step is `Access::Write` (a gradient, an activation) is worth nothing
/// between its last use and that one: it is dropped there, in every tier.
#[derive(Clone, Debug, PartialEq)]
pub struct Chunk {
    /// What it holds.
    pub class: Class,
    /// Its size.
    pub bytes: u64,
    /// Activations that can be made again instead of kept: predicted seconds, from chunks that the
    /// moment which needs it uses anyway.
    pub recompute_s: Option<f64>,
}

/// Part of a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Phase {
    /// Ops run.
    Forward,
    /// Gradients flow back.
    Backward,
    /// Ops run a second time.
    Recompute,
    /// State is updated.
    Optimizer,
}

/// Which tier a moment computes in.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Runs {
    /// The fastest tier of the machine.
    Fastest,
    /// The processor of the host, hence DRAM (the same thing where there is no HBM).
    Host,
    /// Where the plan finds it cheaper: an optimizer update runs where its state lives.
    Either {
        /// Seconds it takes on the host; `Moment::seconds` are those of the fastest tier.
        host_s: f64,
    },
}

/// One op of a step.
#[derive(Clone, Debug, PartialEq)]
pub struct Moment {
    /// Part of the step.
    pub phase: Phase,
    /// Name of the op.
    pub op: String,
    /// Layer it belongs to.
    pub layer: u32,
    /// Measured (or predicted) seconds it computes, all its chunks at hand.
    pub seconds: f64,
    /// Bytes of the fastest tier that are in use and no chunk: scratch, values on their way.
    pub other_bytes: u64,
    /// Where it computes.
    pub runs: Runs,
}

/// A moment needs a chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Use {
    /// When.
    pub moment: MomentId,
    /// Which.
    pub chunk: ChunkId,
    /// For what.
    pub access: Access,
}

/// One training step.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Trace {
    /// Everything that has a place.
    pub chunks: Vec<Chunk>,
    /// Ops in the order they run.
    pub moments: Vec<Moment>,
    /// Sorted by moment; a chunk at most once in a moment.
    pub uses: Vec<Use>,
}

/// A trace that means nothing; the recorder's mistake, not the user's.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadTrace {
    /// There is no moment.
    #[error("the trace has no moments: record one whole training step")]
    Empty,
    /// A use names a chunk or moment that is not there.
    #[error("use {index} names moment {moment} and chunk {chunk}, of {moments} moments and {chunks} chunks")]
    OutOfRange {
        /// Position in `uses`.
        index: usize,
        /// Moment named.
        moment: u32,
        /// Chunk named.
        chunk: u32,
        /// Moments there are.
        moments: usize,
        /// Chunks there are.
        chunks: usize,
    },
    /// Uses are not in order, or a chunk stands twice in a moment.
    #[error("use {index} of chunk {chunk} at moment {moment} is out of order or stands twice")]
    Unordered {
        /// Position in `uses`.
        index: usize,
        /// Moment named.
        moment: u32,
        /// Chunk named.
        chunk: u32,
    },
    /// More bytes than a planner counts.
    #[error("chunks and other bytes add up to {bytes} bytes: more than 2^60, some size is wrong")]
    TooLarge {
        /// The sum.
        bytes: u128,
    },
    /// A duration is negative, infinite or not a number.
    #[error("moment {moment} ({op}) takes {seconds} seconds: durations are finite and not negative")]
    BadSeconds {
        /// Which moment.
        moment: usize,
        /// Its op.
        op: String,
        /// What it claims.
        seconds: String,
    },
}

impl Trace {
    /// Append a chunk.
    pub fn add_chunk(&mut self, class: Class, bytes: u64) -> ChunkId {
        self.chunks.push(Chunk { class, bytes, recompute_s: None });
        ChunkId(self.chunks.len() as u32 - 1)
    }

    /// Append a moment.
    pub fn add_moment(&mut self, moment: Moment) -> MomentId {
        self.moments.push(moment);
        self.moments.len() as u32 - 1
    }

    /// The moment added last uses `chunk`; a second use in the same moment joins the first.
    pub fn add_use(&mut self, chunk: ChunkId, access: Access) {
        let moment = self.moments.len() as u32 - 1;
        let same = self.uses.iter_mut().rev().take_while(|u| u.moment == moment).find(|u| u.chunk == chunk);
        match same {
            Some(found) => found.access = found.access.then(access),
            None => self.uses.push(Use { moment, chunk, access }),
        }
    }

    /// The chunk of an id.
    pub fn chunk(&self, id: ChunkId) -> &Chunk {
        &self.chunks[id.0 as usize]
    }

    /// Seconds of all moments.
    pub fn compute_s(&self) -> f64 {
        self.moments.iter().map(|moment| moment.seconds).sum()
    }

    /// Bytes of all chunks of a class.
    pub fn class_bytes(&self, class: Class) -> u64 {
        self.chunks.iter().filter(|chunk| chunk.class == class).map(|chunk| chunk.bytes).sum()
    }

    /// Whether the planner may trust it.
    pub fn check(&self) -> Result<(), BadTrace> {
        if self.moments.is_empty() {
            return Err(BadTrace::Empty);
        }
        let other = self.moments.iter().map(|moment| moment.other_bytes).max().unwrap_or(0);
        let bytes = self.chunks.iter().map(|chunk| u128::from(chunk.bytes)).sum::<u128>() + u128::from(other);
        if bytes > 1 << 60 {
            return Err(BadTrace::TooLarge { bytes });
        }
        let (moments, chunks) = (self.moments.len(), self.chunks.len());
        let mut last_use = vec![None; chunks];
        let mut previous = 0;
        for (index, Use { moment, chunk, .. }) in self.uses.iter().enumerate() {
            let (moment, chunk) = (*moment, chunk.0);
            if moment as usize >= moments || chunk as usize >= chunks {
                return Err(BadTrace::OutOfRange { index, moment, chunk, moments, chunks });
            }
            if moment < previous || last_use[chunk as usize] == Some(moment) {
                return Err(BadTrace::Unordered { index, moment, chunk });
            }
            previous = moment;
            last_use[chunk as usize] = Some(moment);
        }
        for (index, moment) in self.moments.iter().enumerate() {
            let host_s = match moment.runs {
                Runs::Either { host_s } => host_s,
                Runs::Fastest | Runs::Host => 0.0,
            };
            if let Some(seconds) = [moment.seconds, host_s].into_iter().find(|s| !s.is_finite() || *s < 0.0) {
                let (op, seconds) = (moment.op.clone(), seconds.to_string());
                return Err(BadTrace::BadSeconds { moment: index, op, seconds });
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn one() -> Trace {
        let mut trace = Trace::default();
        let chunk = trace.add_chunk(Class::Param, 8);
        let (phase, op) = (Phase::Forward, "op".to_owned());
        trace.add_moment(Moment { phase, op, layer: 0, seconds: 1.0, other_bytes: 0, runs: Runs::Fastest });
        trace.add_use(chunk, Access::Read);
        trace
    }

    #[test]
    fn uses_in_one_moment_join() {
        let mut trace = one();
        assert_eq!(trace.check(), Ok(()));
        trace.add_use(ChunkId(0), Access::Write);
        assert_eq!((trace.uses.len(), trace.uses[0].access), (1, Access::ReadWrite));
        assert_eq!(Access::Write.then(Access::Read), Access::Write, "what was written first needs no bytes");
    }

    #[test]
    fn mistakes_are_named() {
        let name = |change: fn(&mut Trace)| {
            let mut trace = one();
            change(&mut trace);
            trace.check().expect_err("a mistake").to_string()
        };
        let twice = |trace: &mut Trace| trace.uses.push(trace.uses[0]);
        let messages = [
            (name(|trace| trace.moments.clear()), "no moments"),
            (name(|trace| trace.uses[0].chunk = ChunkId(9)), "chunk 9, of 1 moments and 1 chunks"),
            (name(|trace| trace.uses[0].moment = 1), "names moment 1"),
            (name(twice), "stands twice"),
            (name(|trace| trace.chunks[0].bytes = u64::MAX), "more than 2^60"),
            (name(|trace| trace.moments[0].seconds = f64::NAN), "NaN seconds"),
            (name(|trace| trace.moments[0].runs = Runs::Either { host_s: -1.0 }), "-1 seconds"),
        ];
        for (message, part) in messages {
            assert!(message.contains(part), "{message}");
        }
    }
}
