//! Memory moved between GPUs, each of another rank: what is asked of a library for it. One implementation calls
//! NCCL, the other plays it among threads for tests. Nobody here adds up: sums have an order that is not ours
//! to choose.

use super::driver::{Address, Stream};
use super::nccl;
use crate::{Device, View, ViewMut};
use std::sync::{Arc, OnceLock};

/// Bytes of an id.
pub const ID_BYTES: usize = 128;

/// By which ranks find each other; one of them makes it and tells the others.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct UniqueId(pub [u8; ID_BYTES]);

/// Why memory cannot go from card to card.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{what}; {remedy}")]
pub struct NoPeers {
    /// What is missing.
    pub what: String,
    /// What to do about it.
    pub remedy: String,
}

/// One half of a move between two ranks, the other of which makes the other half.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Move {
    /// Bytes to a rank.
    Send(Address, usize, usize),
    /// Bytes from a rank.
    Receive(Address, usize, usize),
}

/// A library that moves memory between GPUs.
pub trait Peers: Send + Sync {
    /// Its name and version.
    fn name(&self) -> String;
    /// An id nobody else has.
    fn unique_id(&self) -> Result<UniqueId, String>;
    /// Rank `rank` of the `ranks` that have `id`; does not wait for the others.
    fn join(&self, id: &UniqueId, rank: usize, ranks: usize) -> Result<Arc<dyn Team>, String>;
}

/// Ranks that move memory between each other. All make the same calls in the same order. A call returns when the
/// work is on its stream, which may be when the others have come; `abort` ends that, and the work, too.
pub trait Team: Send + Sync {
    /// Wait until all have joined.
    fn meet(&self) -> Result<(), String>;
    /// Moves that run beside each other.
    ///
    /// # Safety
    /// Addresses are of memory of our GPU that is there until the stream is done with it.
    unsafe fn exchange(&self, stream: Stream, moves: &[Move]) -> Result<(), String>;
    /// So many bytes at our address become those at the address of rank `root`.
    ///
    /// # Safety
    /// As above.
    unsafe fn broadcast(&self, stream: Stream, at: Address, bytes: usize, root: usize) -> Result<(), String>;
    /// What lies at `all` becomes so many bytes of every rank's `mine`, which may be its place there.
    ///
    /// # Safety
    /// As above.
    unsafe fn all_gather(
        &self,
        stream: Stream,
        mine: Address,
        all: Address,
        bytes: usize,
    ) -> Result<(), String>;
    /// What went wrong since, if anything has.
    fn problem(&self) -> Option<String>;
    /// End what is under way, on this rank; no call is made any more. Again and at any time, from any thread.
    fn abort(&self);
    /// All is done; no call is made any more.
    fn close(&self);
}

/// One half of a move of a window.
pub enum Leg<'a> {
    /// To a rank.
    Send(View<'a>, usize),
    /// From a rank.
    Receive(ViewMut<'a>, usize),
}

/// Moves that run beside each other, of those that have bytes. What their windows look at stays until the stream is done with it; a host
/// never looks at memory of a GPU, so what is given on too early costs right numbers, not more.
pub fn exchange(team: &dyn Team, stream: Stream, legs: &[Leg<'_>]) -> Result<(), String> {
    let bytes = |len: usize, dtype: crate::DType| len * dtype.size_bytes();
    let moves: Vec<Move> = legs
        .iter()
        .map(|leg| match leg {
            Leg::Send(x, to) => Move::Send(on_gpu(x.device(), x.address()), bytes(x.len(), x.dtype()), *to),
            Leg::Receive(x, from) => {
                Move::Receive(on_gpu(x.device(), x.address()), bytes(x.len(), x.dtype()), *from)
            }
        })
        .filter(|one| !matches!(one, Move::Send(_, 0, _) | Move::Receive(_, 0, _)))
        .collect();
    // SAFETY: windows on memory of the GPU, which is never unmapped while a stream runs.
    unsafe { team.exchange(stream, &moves) }
}

/// `data` becomes that of rank `root`; see `exchange`.
pub fn broadcast(team: &dyn Team, stream: Stream, data: &ViewMut<'_>, root: usize) -> Result<(), String> {
    let bytes = data.len() * data.dtype().size_bytes();
    // SAFETY: as above.
    unsafe { team.broadcast(stream, on_gpu(data.device(), data.address()), bytes, root) }
}

/// `all` becomes every rank's `mine`, or where there is none the place of it in its `all`; see `exchange`.
pub fn all_gather(
    team: &dyn Team,
    stream: Stream,
    (mine, place): (Option<View<'_>>, usize),
    (all, ranks): (&ViewMut<'_>, usize),
) -> Result<(), String> {
    let bytes = all.len() * all.dtype().size_bytes() / ranks;
    let first = on_gpu(all.device(), all.address());
    let mine = match mine {
        Some(mine) => {
            assert_eq!(mine.len() * ranks, all.len(), "one piece a rank");
            on_gpu(mine.device(), mine.address())
        }
        None => first + (place * bytes) as u64,
    };
    // SAFETY: as above, of as many bytes each.
    unsafe { team.all_gather(stream, mine, first, bytes) }
}

fn on_gpu(device: Device, at: Address) -> Address {
    assert!(device == Device::Cuda, "memory of the host does not go from card to card");
    at
}

static PEERS: OnceLock<Result<Box<dyn Peers>, NoPeers>> = OnceLock::new();

/// The library of this machine, looked up when first asked for, or what was set with `play_peers`.
pub fn peers() -> Result<&'static dyn Peers, NoPeers> {
    let found = PEERS.get_or_init(|| nccl::Nccl::find().map(|nccl| Box::new(nccl) as Box<dyn Peers>));
    found.as_ref().map(|peers| &**peers).map_err(Clone::clone)
}

/// Let another play the library of this process, for tests. False when there is one already.
#[cfg(feature = "emulate")]
pub fn play_peers(player: Box<dyn Peers>) -> bool {
    let mut was_set = false;
    PEERS
        .get_or_init(|| {
            was_set = true;
            Ok(player)
        })
        .as_ref()
        .is_ok_and(|_| was_set)
}
