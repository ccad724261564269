//! Ranks that are processes with a GPU each: memory of the host goes as between all processes, memory of GPUs
//! from card to card over NCCL. `ledger` watches what is under way there, `seat` has the collectives of one
//! member, `line` messages between two. NCCL moves and never adds up: sums are our own kernel's, in the order of
//! members, so that they have the bits of every other communicator.

mod ledger;
mod line;
mod seat;
mod ticket;

use crate::call::{Members, Place};
use crate::error::CommError;
use crate::wire::Process;
use device::cuda::{self, NoPeers, Peers};
use device::{View, ViewMut};
use ledger::Ledger;
pub(crate) use line::Arriving;
pub(crate) use seat::Seat;
use std::sync::Arc;
pub(crate) use ticket::{Landed, Ticket};

/// One rank of a run whose ranks are processes with a GPU each.
#[derive(Clone)]
pub struct Nccl {
    process: Process,
    ledger: Arc<Ledger>,
}

/// What one rank says of itself before the first call: whether it has a card and the library, of which version,
/// and which card. As words, which travel as they are.
const STATEMENT: usize = 12;

impl Nccl {
    /// Whether every rank has a card of its own and the same library to move memory between them; all ranks
    /// must ask, and all get the same answer: the communicator, or why memory goes through the host. What this
    /// rank alone knows (`Err` of `peers()`) it may say itself.
    pub fn agree(process: &Process) -> Result<Result<Nccl, String>, CommError> {
        let ranks = process.world_size();
        let members = Arc::new(Members { axes: "cards".to_string(), ranks: (0..ranks).collect() });
        let mut all = vec![0u16; ranks * STATEMENT];
        let (mine, found) = statement();
        if ranks > 1 {
            let seat = process.seat(members, process.rank(), false);
            seat.all_gather(View::of_u16(&mine), ViewMut::of_u16(&mut all))?;
        }
        let problem = (ranks == 1).then(|| "one rank has nobody to move memory to".to_string());
        if let Some(problem) = problem.or_else(|| obstacle(&all)) {
            return Ok(Err(problem));
        }
        let peers = found.expect("a rank without it was the obstacle");
        Ok(Ok(Nccl { process: process.clone(), ledger: Ledger::new(process.office().clone(), peers) }))
    }

    /// The same without asking the others, who must do so, too.
    pub fn new(process: &Process) -> Result<Nccl, NoPeers> {
        let ledger = Ledger::new(process.office().clone(), cuda::peers()?);
        Ok(Nccl { process: process.clone(), ledger })
    }

    /// The host's side of it.
    pub fn process(&self) -> &Process {
        &self.process
    }

    pub(crate) fn place(&self) -> Arc<Place> {
        self.process.place()
    }

    pub(crate) fn seat(&self, members: Arc<Members>, index: usize, beside: bool) -> Seat {
        let host = self.process.seat(members.clone(), index, beside);
        Seat::new(host, self.ledger.clone(), members, index)
    }
}

/// `[card, library, version, version, uuid ...]`
fn statement() -> ([u16; STATEMENT], Option<&'static dyn Peers>) {
    let mut words = [0; STATEMENT];
    let (card, peers) = (cuda::gpu().ok(), cuda::peers().ok());
    if let Some(card) = card {
        words[0] = 1;
        for (word, bytes) in words[4..].iter_mut().zip(card.driver().uuid().chunks_exact(2)) {
            *word = u16::from_le_bytes([bytes[0], bytes[1]]);
        }
    }
    if let Some(peers) = peers {
        words[1] = 1;
        // The same name, the same version.
        let name = peers.name().bytes().fold(17u32, |hash, byte| hash.wrapping_mul(31) ^ u32::from(byte));
        (words[2], words[3]) = (name as u16, (name >> 16) as u16);
    }
    (words, card.and(peers))
}

/// Why the ranks that said this cannot use NCCL.
fn obstacle(all: &[u16]) -> Option<String> {
    let said: Vec<&[u16]> = all.chunks_exact(STATEMENT).collect();
    for (rank, words) in said.iter().enumerate() {
        if words[0] == 0 {
            return Some(format!("rank {rank} has no GPU"));
        }
        if words[1] == 0 {
            return Some(format!("rank {rank} does not find NCCL (libnccl.so.2); install libnccl2 there"));
        }
        if words[2..4] != said[0][2..4] {
            return Some(format!("ranks 0 and {rank} have different versions of NCCL"));
        }
        if let Some(other) = said[..rank].iter().position(|other| other[4..] == words[4..]) {
            return Some(format!("ranks {other} and {rank} share a card"));
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    fn said(ranks: &[(u16, u16, u16, u16)]) -> Vec<u16> {
        let one = |(card, library, version, uuid): &(u16, u16, u16, u16)| {
            let mut words = [0; STATEMENT];
            (words[0], words[1], words[2], words[11]) = (*card, *library, *version, *uuid);
            words
        };
        ranks.iter().flat_map(one).collect()
    }

    #[test]
    fn every_rank_needs_a_card_and_the_library() {
        assert_eq!(obstacle(&said(&[(1, 1, 5, 1), (1, 1, 5, 2)])), None);
        for (ranks, want) in [
            ([(1, 1, 5, 1), (0, 1, 5, 0)], "rank 1 has no GPU"),
            ([(1, 0, 0, 1), (1, 1, 5, 2)], "rank 0 does not find NCCL"),
            ([(1, 1, 5, 1), (1, 1, 6, 2)], "ranks 0 and 1 have different versions"),
            ([(1, 1, 5, 1), (1, 1, 5, 1)], "ranks 0 and 1 share a card"),
        ] {
            let problem = obstacle(&said(&ranks)).unwrap();
            assert!(problem.starts_with(want), "{problem}");
        }
    }
}
