//! Bytes that a call makes a rank send and receive, as pure formulas, and the counters they feed.
//!
//! S is the whole array in bytes, s one rank's piece, n the ranks of the group, p_i piece i of S
//! cut into n nearly equal pieces. No collective moves fewer bytes in total.
//!
//! | call | sent by rank i | received by rank i |
//! |---|---|---|
//! | all_reduce | (S - p_i) + (n - 1) p_i | the same; 2 (n - 1) / n S where n divides S |
//! | all_gather | (n - 1) s | (n - 1) s |
//! | reduce_scatter | (n - 1) s | (n - 1) s |
//! | broadcast | (n - 1) S by the root | S by the others |
//! | reduce | S by the others | (n - 1) S by the root |
//! | all_to_all | its pieces for others | the pieces of others for it |
//! | send, receive | S | S |
//! | barrier | 0 | 0 |

use crate::call::Members;
use std::collections::BTreeSet;
use std::ops::Range;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

/// Piece `index` of `len` elements cut among `ranks`: the first `len % ranks` get one more.
pub fn piece(len: usize, ranks: usize, index: usize) -> Range<usize> {
    let (each, more) = (len / ranks, len % ranks);
    let start = index * each + index.min(more);
    start..start + each + usize::from(index < more)
}

/// Bytes one call makes one rank move, and with whom.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Traffic {
    /// Bytes that leave the rank.
    pub sent: u64,
    /// Bytes that reach it.
    pub received: u64,
    /// With whom, as indices into the group.
    pub peers: Peers,
}

/// Members of a group that a call exchanges bytes with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Peers {
    /// Everybody else.
    Others,
    /// One member.
    One(usize),
}

impl Traffic {
    /// Of `all_reduce_sum` of `len` elements of `size` bytes, for member `index` of `ranks`.
    pub fn all_reduce(ranks: usize, index: usize, len: usize, size: usize) -> Traffic {
        let own = piece(len, ranks, index).len();
        let bytes = ((len - own + (ranks - 1) * own) * size) as u64;
        Traffic { sent: bytes, received: bytes, peers: Peers::Others }
    }

    /// Of `all_gather` or `reduce_scatter_sum` with pieces of `piece_bytes`.
    pub fn pieces(ranks: usize, piece_bytes: usize) -> Traffic {
        let bytes = ((ranks - 1) * piece_bytes) as u64;
        Traffic { sent: bytes, received: bytes, peers: Peers::Others }
    }

    /// Of `broadcast` of `bytes` from `root`.
    pub fn broadcast(ranks: usize, index: usize, bytes: usize, root: usize) -> Traffic {
        if index == root {
            Traffic { sent: ((ranks - 1) * bytes) as u64, received: 0, peers: Peers::Others }
        } else {
            Traffic { sent: 0, received: bytes as u64, peers: Peers::One(root) }
        }
    }

    /// Of `reduce_sum` of `bytes` to `root`: a broadcast backwards.
    pub fn reduce(ranks: usize, index: usize, bytes: usize, root: usize) -> Traffic {
        let Traffic { sent, received, peers } = Traffic::broadcast(ranks, index, bytes, root);
        Traffic { sent: received, received: sent, peers }
    }

    /// Of `all_to_all` with these elements of `size` bytes to and from each member.
    pub fn all_to_all(index: usize, send: &[usize], receive: &[usize], size: usize) -> Traffic {
        let others = |lens: &[usize]| (lens.iter().sum::<usize>() - lens[index]) * size;
        Traffic { sent: others(send) as u64, received: others(receive) as u64, peers: Peers::Others }
    }
}

/// What one rank has communicated over one set of axes. Shared by whoever counts.
#[derive(Debug)]
pub(crate) struct Tally {
    sent: AtomicU64,
    received: AtomicU64,
    calls: AtomicU64,
    exposed_ns: AtomicU64,
    beside_ns: AtomicU64,
    /// One bit a member of the group.
    peers: Mutex<Vec<u64>>,
}

impl Tally {
    pub(crate) fn new() -> Tally {
        let zero = || AtomicU64::new(0);
        Tally {
            sent: zero(),
            received: zero(),
            calls: zero(),
            exposed_ns: zero(),
            beside_ns: zero(),
            peers: Mutex::new(Vec::new()),
        }
    }

    /// Count one call of member `index` of a group of `ranks`.
    pub(crate) fn add(&self, traffic: Traffic, ranks: usize, index: usize) {
        self.calls.fetch_add(1, Relaxed);
        self.sent.fetch_add(traffic.sent, Relaxed);
        self.received.fetch_add(traffic.received, Relaxed);
        if traffic.sent + traffic.received == 0 {
            return;
        }
        let mut peers = self.peers.lock().unwrap_or_else(|e| e.into_inner());
        if peers.is_empty() {
            peers.resize(ranks.div_ceil(64), 0);
        }
        match traffic.peers {
            Peers::One(peer) => peers[peer / 64] |= 1 << (peer % 64),
            Peers::Others => {
                for (word, bits) in peers.iter_mut().enumerate() {
                    let members = ranks.saturating_sub(word * 64).min(64) as u32;
                    *bits |= u64::MAX.checked_shr(64 - members).unwrap_or(0);
                }
                peers[index / 64] &= !(1 << (index % 64));
            }
        }
    }

    /// Count time a rank could not compute because it waited.
    pub(crate) fn expose(&self, waited: Duration) {
        self.exposed_ns.fetch_add(waited.as_nanos() as u64, Relaxed);
    }

    /// Count time that a call beside computation took.
    pub(crate) fn work_beside(&self, took: Duration) {
        self.beside_ns.fetch_add(took.as_nanos() as u64, Relaxed);
    }

    /// Time that calls beside computation have taken so far.
    pub(crate) fn beside(&self) -> Duration {
        Duration::from_nanos(self.beside_ns.load(Relaxed))
    }

    /// What was counted; peers as world ranks.
    pub(crate) fn counts(&self, Members { axes, ranks }: &Members) -> Counts {
        let peers = self.peers.lock().unwrap_or_else(|e| e.into_inner());
        let met = |i: &usize| peers.get(i / 64).is_some_and(|bits| bits >> (i % 64) & 1 == 1);
        Counts {
            axes: axes.clone(),
            bytes_sent: self.sent.load(Relaxed),
            bytes_received: self.received.load(Relaxed),
            calls: self.calls.load(Relaxed),
            peers: (0..ranks.len()).filter(met).map(|i| ranks[i]).collect(),
            exposed_s: self.exposed_ns.load(Relaxed) as f64 * 1e-9,
            beside_s: self.beside().as_secs_f64(),
        }
    }
}

/// What one rank has communicated over one set of axes.
#[derive(Clone, Debug, PartialEq)]
pub struct Counts {
    /// The axes, like `x` or `dp+fsdp`.
    pub axes: String,
    /// Bytes that left the rank.
    pub bytes_sent: u64,
    /// Bytes that reached it.
    pub bytes_received: u64,
    /// Calls, barriers among them.
    pub calls: u64,
    /// World ranks it exchanged bytes with.
    pub peers: BTreeSet<usize>,
    /// Seconds the rank spent in calls instead of computing. Calls that ran beside computation
    /// count for the time their `finish` waited.
    pub exposed_s: f64,
    /// Seconds that calls beside computation took, whether anybody waited for them or not.
    pub beside_s: f64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_cover_everything_once() {
        for len in [0, 1, 7, 64, 1001] {
            for ranks in 1..=9 {
                let pieces: Vec<_> = (0..ranks).map(|i| piece(len, ranks, i)).collect();
                assert_eq!((pieces[0].start, pieces[ranks - 1].end), (0, len));
                assert!(pieces.windows(2).all(|p| p[0].end == p[1].start));
                let lens = pieces.iter().map(|p| p.len());
                assert!(lens.clone().max().unwrap() - lens.min().unwrap() <= 1);
            }
        }
    }

    #[test]
    fn what_leaves_ranks_reaches_ranks() {
        for ranks in 1..=8 {
            let total = |of: &dyn Fn(usize) -> Traffic| {
                (0..ranks).map(of).fold((0, 0), |(s, r), t| (s + t.sent, r + t.received))
            };
            let (sent, received) = total(&|i| Traffic::all_reduce(ranks, i, 1001, 4));
            assert_eq!((sent, received), (2 * (ranks as u64 - 1) * 4004, sent));
            for root in 0..ranks {
                let (sent, received) = total(&|i| Traffic::broadcast(ranks, i, 1001, root));
                assert_eq!(sent, received);
                let (sent, received) = total(&|i| Traffic::reduce(ranks, i, 1001, root));
                assert_eq!(sent, received);
            }
        }
    }

    #[test]
    fn ten_thousand_peers_are_a_set() {
        let tally = Tally::new();
        let ranks = (0..10_000).map(|i| i * 2).collect();
        let members = Members { axes: "x".to_string(), ranks };
        tally.add(Traffic::broadcast(10_000, 7, 4, 9_999), 10_000, 7);
        assert_eq!(tally.counts(&members).peers, BTreeSet::from([19_998]));
        tally.add(Traffic::pieces(10_000, 4), 10_000, 7);
        let counts = tally.counts(&members);
        assert_eq!((counts.peers.len(), counts.calls), (9_999, 2));
        assert!(!counts.peers.contains(&14));
    }
}
