//! All ranks of a process: what each is doing, and the one error that ends them all.

use super::room::Room;
use super::seat::Seat;
use crate::call::{Call, Members, Place};
use crate::diagnosis::{Seen, absent, diagnose};
use crate::error::{CommError, LastSeen};
use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use crate::bell::Bell;

/// A sleeping rank looks this often whether another has ended: a safety net, bells wake it.
const LOOK_EVERY: Duration = Duration::from_millis(20);

pub(crate) struct World {
    /// Of every rank: in the foreground, and beside its computation.
    stations: Vec<[Mutex<Station>; 2]>,
    ended: Vec<Mutex<Option<String>>>,
    places: Vec<Arc<Place>>,
    /// By group, those for calls beside computation apart.
    rooms: [Mutex<HashMap<Arc<Members>, Arc<Room>>>; 2],
    failed: AtomicBool,
    failure: OnceLock<CommError>,
    deadline: Duration,
    /// Whether every rank has a core of its own, so that spinning takes it from nobody.
    pub(super) spin: bool,
}

/// What a rank publishes about itself.
#[derive(Default)]
struct Station {
    now: Option<Call>,
    last: Option<Call>,
}

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl World {
    pub(crate) fn new(ranks: usize, deadline: Duration) -> Arc<World> {
        Arc::new(World {
            stations: (0..ranks).map(|_| Default::default()).collect(),
            ended: (0..ranks).map(|_| Mutex::default()).collect(),
            places: (0..ranks).map(|_| Arc::default()).collect(),
            rooms: Default::default(),
            failed: AtomicBool::new(false),
            failure: OnceLock::new(),
            deadline,
            spin: ranks <= device::cores(),
        })
    }

    /// The error that ended the run, if one has.
    pub(crate) fn check(&self) -> Result<(), CommError> {
        if !self.failed.load(SeqCst) {
            return Ok(());
        }
        Err(self.failure.get().expect("set before the flag").clone())
    }

    /// Ends the run on every rank; the first error wins and is returned.
    pub(crate) fn fail(&self, error: CommError) -> CommError {
        let first = self.failure.get_or_init(|| error).clone();
        self.failed.store(true, SeqCst);
        for rooms in &self.rooms {
            lock(rooms).values().for_each(|room| room.ring());
        }
        first
    }

    /// A rank makes no more calls. With a reason to complain it takes the others along; without,
    /// whoever still waits for it finds out.
    pub(crate) fn end(&self, rank: usize, failure: Option<String>) {
        let reason =
            failure.clone().unwrap_or_else(|| "its work ended while others still waited".to_string());
        *lock(&self.ended[rank]) = Some(reason.clone());
        if failure.is_some() && !self.failed.load(SeqCst) {
            self.fail(CommError::Dead { rank, reason, last: Box::new(self.seen(rank).last) });
        }
    }

    pub(super) fn enter(&self, rank: usize, call: Call) {
        let mut station = lock(self.station(rank, call.beside));
        station.now = Some(call);
    }

    pub(super) fn leave(&self, rank: usize, beside: bool) {
        let mut station = lock(self.station(rank, beside));
        station.last = station.now.take();
    }

    fn station(&self, rank: usize, beside: bool) -> &Mutex<Station> {
        &self.stations[rank][usize::from(beside)]
    }

    fn seen(&self, rank: usize) -> Seen {
        let place = &self.places[rank];
        let last = |beside| {
            let station = lock(self.station(rank, beside));
            match &station.now {
                Some(call) => LastSeen::In(call.clone()),
                None => {
                    let (step, layer) = (place.step(), place.layer());
                    LastSeen::Computing { step, layer, after: station.last.clone() }
                }
            }
        };
        Seen { last: last(false), beside: last(true), ended: lock(&self.ended[rank]).clone() }
    }

    fn all_seen(&self) -> Vec<Seen> {
        (0..self.stations.len()).map(|rank| self.seen(rank)).collect()
    }

    /// Waits until `ready`, for as long as the deadline allows and everybody lives.
    pub(super) fn wait(
        &self,
        (rank, call): (usize, &Call),
        bell: &Bell,
        ready: impl Fn() -> bool,
    ) -> Result<(), CommError> {
        let over = || ready() || self.failed.load(SeqCst);
        if !bell.hover(self.spin, over) {
            let start = Instant::now();
            while !over() {
                let left = self.deadline.saturating_sub(start.elapsed());
                bell.sleep(left.min(LOOK_EVERY), over);
                if over() {
                    break;
                }
                let seen = self.all_seen();
                let ended = absent(&seen, rank, call).is_some_and(|rank| seen[rank].ended.is_some());
                if left.is_zero() || ended && !ready() {
                    let error = diagnose(&seen, rank, call, start.elapsed().as_secs_f64());
                    return Err(self.fail(error));
                }
            }
        }
        if ready() { Ok(()) } else { self.check() }
    }

    pub(super) fn place(&self, rank: usize) -> &Place {
        &self.places[rank]
    }

    fn room(&self, members: Arc<Members>, beside: bool) -> Arc<Room> {
        let size = members.ranks.len();
        let mut rooms = lock(&self.rooms[usize::from(beside)]);
        rooms.entry(members).or_insert_with(|| Arc::new(Room::new(size))).clone()
    }
}

/// One rank of a process whose ranks are threads.
#[derive(Clone)]
pub struct Rank {
    world: Arc<World>,
    rank: usize,
}

impl Rank {
    pub(crate) fn new(world: Arc<World>, rank: usize) -> Rank {
        Rank { world, rank }
    }

    pub(crate) fn rank(&self) -> usize {
        self.rank
    }

    pub(crate) fn world_size(&self) -> usize {
        self.world.stations.len()
    }

    pub(crate) fn place(&self) -> Arc<Place> {
        self.world.places[self.rank].clone()
    }

    pub(crate) fn seat(&self, members: Arc<Members>, index: usize, beside: bool) -> Seat {
        let room = self.world.room(members.clone(), beside);
        Seat { world: self.world.clone(), room, members, index, beside }
    }
}
