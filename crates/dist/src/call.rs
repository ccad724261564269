//! What a rank is doing: the names under which collectives are numbered, compared and reported.

use device::DType;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::Relaxed};

/// Kind of a communication call.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Op {
    /// Sum on every rank.
    AllReduce,
    /// Pieces of all on every rank.
    AllGather,
    /// Each rank its piece of the sum.
    ReduceScatter,
    /// One rank's data on every rank.
    Broadcast,
    /// Sum on one rank.
    Reduce,
    /// Every rank a piece for every other.
    AllToAll,
    /// To one rank.
    Send,
    /// From one rank.
    Receive,
    /// Nobody goes on before all are there.
    Barrier,
}

impl Op {
    /// Name in messages and tables.
    pub const fn name(self) -> &'static str {
        match self {
            Op::AllReduce => "all_reduce",
            Op::AllGather => "all_gather",
            Op::ReduceScatter => "reduce_scatter",
            Op::Broadcast => "broadcast",
            Op::Reduce => "reduce",
            Op::AllToAll => "all_to_all",
            Op::Send => "send",
            Op::Receive => "receive",
            Op::Barrier => "barrier",
        }
    }
}

/// The ranks of a group and what they are called.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Members {
    /// Axes of the group, like `x` or `dp+fsdp`.
    pub axes: String,
    /// World ranks, ascending.
    pub ranks: Vec<usize>,
}

/// One call of one rank, as it is published while the rank is in it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Call {
    /// What.
    pub op: Op,
    /// The how-manieth call of its group (of its pair of ranks for `Send` and `Receive`), from 0.
    pub number: u64,
    /// Bytes that all ranks of the group must agree on: of the whole array, 0 where sizes vary.
    pub bytes: u64,
    /// Element type, where there are elements.
    pub dtype: Option<DType>,
    /// Whether it runs beside computation; such calls are numbered apart.
    pub beside: bool,
    /// Among whom.
    pub group: Arc<Members>,
    /// World rank that gives or takes, where one alone does.
    pub root: Option<usize>,
    /// The layer the caller was in, where it said so.
    pub layer: Option<u32>,
    /// The training step the caller was in.
    pub step: u64,
}

impl Call {
    /// Whether the ranks of both calls mean the same: kind, number, size, type and root.
    pub(crate) fn matches(&self, other: &Call) -> bool {
        let key = |call: &Call| (call.op, call.number, call.bytes, call.dtype, call.root);
        key(self) == key(other)
    }
}

impl std::fmt::Display for Call {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} #{} on `{}` ({} bytes", self.op.name(), self.number, self.group.axes, self.bytes)?;
        if let Some(dtype) = self.dtype {
            write!(f, " of {dtype}")?;
        }
        if self.beside {
            write!(f, ", beside computation")?;
        }
        if let Some(root) = self.root {
            let role = match self.op {
                Op::Send => "to",
                Op::Receive => "from",
                _ => "root",
            };
            write!(f, ", {role} rank {root}")?;
        }
        match self.layer {
            Some(layer) => write!(f, ", layer {layer}, step {})", self.step),
            None => write!(f, ", no layer, step {})", self.step),
        }
    }
}

/// Where in its training a rank is; it says so before it communicates.
#[derive(Debug)]
pub(crate) struct Place {
    step: AtomicU64,
    layer: AtomicU32,
}

impl Default for Place {
    fn default() -> Place {
        Place { step: AtomicU64::new(0), layer: AtomicU32::new(u32::MAX) }
    }
}

impl Place {
    pub(crate) fn set(&self, step: u64, layer: Option<u32>) {
        self.step.store(step, Relaxed);
        self.layer.store(layer.unwrap_or(u32::MAX), Relaxed);
    }

    pub(crate) fn step(&self) -> u64 {
        self.step.load(Relaxed)
    }

    pub(crate) fn layer(&self) -> Option<u32> {
        let layer = self.layer.load(Relaxed);
        (layer != u32::MAX).then_some(layer)
    }
}
