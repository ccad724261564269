//! Who carries messages between ranks: a value, one `match` an op.

use crate::call::Place;
use crate::nccl::Nccl;
use crate::threads::Rank;
use crate::wire::Process;
use std::sync::Arc;

/// Who carries messages between the ranks of a mesh, and which of them we are.
#[derive(Clone)]
pub enum Communicator {
    /// One rank: nothing to carry.
    Solo,
    /// Ranks are threads of one process and read each other's memory; [`crate::launch`] makes it.
    Threads(Rank),
    /// Ranks are processes that send each other messages.
    Processes(Process),
    /// Ranks are processes with a GPU each, whose memory goes from card to card.
    Nccl(Nccl),
    /// Nobody: calls are checked and counted, no byte moves and buffers stay as they were.
    /// Thousands of ranks fit into one process, one after the other.
    Null(NullRank),
}

/// One rank of a run that only counts.
#[derive(Clone)]
pub struct NullRank {
    rank: usize,
    world_size: usize,
    place: Arc<Place>,
}

impl Communicator {
    /// Rank `rank` of `world_size` that only counts.
    pub fn null(rank: usize, world_size: usize) -> Communicator {
        assert!(rank < world_size, "rank {rank} of {world_size}");
        Communicator::Null(NullRank { rank, world_size, place: Arc::default() })
    }

    /// Our number among all ranks.
    pub fn rank(&self) -> usize {
        match self {
            Communicator::Solo => 0,
            Communicator::Threads(rank) => rank.rank(),
            Communicator::Processes(process) => process.rank(),
            Communicator::Nccl(nccl) => nccl.process().rank(),
            Communicator::Null(null) => null.rank,
        }
    }

    /// All ranks.
    pub fn world_size(&self) -> usize {
        match self {
            Communicator::Solo => 1,
            Communicator::Threads(rank) => rank.world_size(),
            Communicator::Processes(process) => process.world_size(),
            Communicator::Nccl(nccl) => nccl.process().world_size(),
            Communicator::Null(null) => null.world_size,
        }
    }

    /// Name as tables write it.
    pub fn name(&self) -> &'static str {
        match self {
            Communicator::Solo => "solo",
            Communicator::Threads(_) => "threads",
            Communicator::Processes(process) => process.carrier(),
            Communicator::Nccl(_) => "nccl",
            Communicator::Null(_) => "null",
        }
    }

    pub(crate) fn place(&self) -> Arc<Place> {
        match self {
            Communicator::Solo => Arc::default(),
            Communicator::Threads(rank) => rank.place(),
            Communicator::Processes(process) => process.place(),
            Communicator::Nccl(nccl) => nccl.place(),
            Communicator::Null(null) => null.place.clone(),
        }
    }
}
