//! NCCL played among threads that share the GPU of this process, a rank each. As the real one does with long
//! messages, a rank that sends waits for whoever receives, and waits for ever for one that never comes.

use crate::cuda::driver::{Address, Stream};
use crate::cuda::peers::{ID_BYTES, Move, Peers, Team, UniqueId};
use crate::cuda::{lock, present};
use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

/// The library that is played; clones are handles of one.
#[derive(Clone, Default)]
pub struct PlayedPeers(Arc<Played>);

#[derive(Default)]
struct Played {
    ids: AtomicU64,
    rooms: Mutex<HashMap<UniqueId, Arc<Room>>>,
    problem: Mutex<Option<String>>,
}

impl PlayedPeers {
    /// From now on every team has this problem, or none.
    pub fn break_down(&self, problem: Option<&str>) {
        *lock(&self.0.problem) = problem.map(str::to_string);
    }
}

/// Where ranks with one id meet.
#[derive(Default)]
struct Room {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    joined: usize,
    /// What was sent, by sender and receiver; it lies where the sender has it until it is taken.
    sent: HashMap<(usize, usize), VecDeque<Parcel>>,
    /// Of everything sent so far, by the same.
    taken: HashMap<(usize, usize), u64>,
    given: HashMap<(usize, usize), u64>,
}

struct Parcel {
    at: Address,
    bytes: usize,
}

struct PlayedTeam {
    played: Arc<Played>,
    room: Arc<Room>,
    rank: usize,
    ranks: usize,
    aborted: AtomicBool,
}

impl Peers for PlayedPeers {
    fn name(&self) -> String {
        "played NCCL".to_string()
    }

    fn unique_id(&self) -> Result<UniqueId, String> {
        let mut id = [0; ID_BYTES];
        id[..8].copy_from_slice(&self.0.ids.fetch_add(1, SeqCst).to_le_bytes());
        Ok(UniqueId(id))
    }

    fn join(&self, id: &UniqueId, rank: usize, ranks: usize) -> Result<Arc<dyn Team>, String> {
        let room = lock(&self.0.rooms).entry(*id).or_default().clone();
        lock(&room.state).joined += 1;
        room.changed.notify_all();
        let played = self.0.clone();
        Ok(Arc::new(PlayedTeam { played, room, rank, ranks, aborted: AtomicBool::new(false) }))
    }
}

impl PlayedTeam {
    fn wait_until(&self, ready: impl Fn(&State) -> bool) -> Result<MutexGuard<'_, State>, String> {
        let mut state = lock(&self.room.state);
        loop {
            if self.aborted.load(SeqCst) {
                return Err("it was ended".to_string());
            }
            if ready(&state) {
                return Ok(state);
            }
            state = self.room.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Copies the next parcel while its sender waits.
    fn take(&self, stream: Stream, (at, bytes, from): (Address, usize, usize)) -> Result<(), String> {
        let way = (from, self.rank);
        let mut state = self.wait_until(|state| state.sent.get(&way).is_some_and(|sent| !sent.is_empty()))?;
        let parcel = state.sent.get_mut(&way).and_then(VecDeque::pop_front).expect("it was just seen");
        let driver = present().driver();
        // SAFETY: the sender waits, and our end is the caller's promise. What does not fit is lost, as it may be
        // with the real one.
        unsafe { driver.copy_within(stream, at, parcel.at, bytes.min(parcel.bytes)) };
        driver.wait(stream);
        *state.taken.entry(way).or_default() += 1;
        drop(state);
        self.room.changed.notify_all();
        Ok(())
    }
}

impl Team for PlayedTeam {
    fn meet(&self) -> Result<(), String> {
        self.wait_until(|state| state.joined == self.ranks).map(drop)
    }

    unsafe fn exchange(&self, stream: Stream, moves: &[Move]) -> Result<(), String> {
        present().driver().wait(stream);
        let mut last = HashMap::new();
        {
            let mut state = self.wait_until(|_| true)?;
            for one in moves {
                if let Move::Send(at, bytes, to) = *one {
                    let way = (self.rank, to);
                    state.sent.entry(way).or_default().push_back(Parcel { at, bytes });
                    let given = state.given.entry(way).or_default();
                    *given += 1;
                    last.insert(way, *given);
                }
            }
        }
        self.room.changed.notify_all();
        for one in moves {
            if let Move::Receive(at, bytes, from) = *one {
                self.take(stream, (at, bytes, from))?;
            }
        }
        let taken = |state: &State| last.iter().all(|(way, last)| state.taken.get(way) >= Some(last));
        self.wait_until(taken).map(drop)
    }

    unsafe fn broadcast(&self, stream: Stream, at: Address, bytes: usize, root: usize) -> Result<(), String> {
        let others = (0..self.ranks).filter(|rank| *rank != self.rank);
        let moves: Vec<Move> = match self.rank == root {
            true => others.map(|to| Move::Send(at, bytes, to)).collect(),
            false => vec![Move::Receive(at, bytes, root)],
        };
        // SAFETY: the caller's promise.
        unsafe { self.exchange(stream, &moves) }
    }

    unsafe fn all_gather(
        &self,
        stream: Stream,
        mine: Address,
        all: Address,
        bytes: usize,
    ) -> Result<(), String> {
        let place = |rank: usize| all + (rank * bytes) as u64;
        let moves: Vec<Move> = (0..self.ranks)
            .filter(|rank| *rank != self.rank)
            .flat_map(|other| [Move::Send(mine, bytes, other), Move::Receive(place(other), bytes, other)])
            .collect();
        // SAFETY: the caller's promise.
        unsafe {
            if mine != place(self.rank) {
                present().driver().copy_within(stream, place(self.rank), mine, bytes);
            }
            self.exchange(stream, &moves)
        }
    }

    fn problem(&self) -> Option<String> {
        lock(&self.played.problem).clone()
    }

    fn abort(&self) {
        {
            let mut state = lock(&self.room.state);
            self.aborted.store(true, SeqCst);
            // Nobody shall look where we may write again.
            state
                .sent
                .iter_mut()
                .filter(|((from, _), _)| *from == self.rank)
                .for_each(|(_, sent)| sent.clear());
        }
        self.room.changed.notify_all();
    }

    fn close(&self) {
        self.abort();
    }
}
