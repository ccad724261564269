//! The threads that carry chunks, two a link: one brings up, one takes down, so that both ways of
//! every link are busy at once. They hold loans, never windows; they decide nothing but to wait for
//! room. What goes to or comes from the drive they hand to its engine, several chunks at a time: on the
//! cores that compute, waking a thread for each would cost more time than the drive needs.
//!
//! Room of a tier is promised in the order in which it was decided on and given in that order. So
//! the job decided on first can always go on, and no two jobs ever wait for each other.

use super::room::Room;
use crate::disk::{Block, Disk, DiskError, Failed, Op, Region, Request};
use device::{Frames, Loan};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Tiers of memory at most: those of chunks that can be looked into.
pub(super) const MEMORIES: usize = 2;

/// Where a chunk lies in the offload file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Slot {
    pub region: Region,
    pub offset: u64,
}

/// One end of a journey.
pub(super) enum End {
    /// A place in memory, exclusively held.
    Memory(Loan),
    /// A place on the drive.
    Drive(Slot),
    /// Where zeros come from.
    Zeros,
    /// Where bytes come from that will all be overwritten, whatever they are.
    Anything,
}

/// A chunk on its way over a link.
pub(super) struct Job {
    pub from: End,
    pub to: End,
    /// Depth of the memory it takes room in, and the place in the order of those who do.
    pub room: Option<(usize, u64)>,
    /// Depth of the memory it leaves.
    pub leaves: Option<usize>,
}

/// Which way over a link.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Way {
    Up,
    Down,
}

/// What a link has carried.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Carried {
    pub up_bytes: u64,
    pub down_bytes: u64,
    pub up_s: f64,
    pub down_s: f64,
}

#[derive(Default)]
struct State {
    carried: [Carried; MEMORIES],
    /// Bytes of all jobs sent, by link: up and down.
    sent_bytes: [[u64; 2]; MEMORIES],
    rooms: [Room; MEMORIES],
    /// Pages of what has left, by depth: they wait in room that nobody holds.
    frames: [Option<Frames>; MEMORIES],
    /// By link: up and down.
    flying: [[Flying; 2]; MEMORIES],
    /// Counts what was given to links.
    turn: u64,
    failed: Option<DiskError>,
}

impl State {
    /// A chunk leaves, its bytes lost. Its pages wait for the next as far as there is room.
    fn leave(&mut self, depth: usize, bytes: u64, loan: Option<&mut Loan>) {
        match (loan, &mut self.frames[depth]) {
            (Some(loan), Some(frames)) => frames.send_away(loan),
            (Some(loan), None) => loan.send_away(),
            (None, _) => {}
        }
        self.rooms[depth].release(bytes);
        self.give_back(depth);
    }

    /// A chunk comes, from wherever. Unless it must be zeros, all its bytes are written then.
    fn come(&mut self, depth: usize, from: &End, loan: &mut Loan) {
        match (from, &mut self.frames[depth]) {
            (End::Zeros, _) => loan.bring(),
            (_, None) => loan.bring_anything(),
            (_, Some(frames)) => frames.bring(loan),
        }
    }

    /// Pages that wait leave the room that others hold.
    fn give_back(&mut self, depth: usize) {
        if let Some(frames) = &mut self.frames[depth] {
            frames.keep(self.rooms[depth].free_bytes() as usize);
        }
    }
}

struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    fn update<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        let result = change(&mut self.lock());
        self.changed.notify_all();
        result
    }

    fn wait<'a>(&self, state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        self.changed.wait(state).unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// Take promised room once there is some, and put memory behind who comes; false when a link has
    /// failed meanwhile.
    fn take_room(&self, (depth, ticket): (usize, u64), job: &mut Job) -> bool {
        let bytes = job.bytes().unwrap_or(0);
        let mut state = self.lock();
        while state.failed.is_none() && !state.rooms[depth].may_take(ticket, bytes) {
            state = self.wait(state);
        }
        state.rooms[depth].take(ticket, bytes);
        if let End::Memory(to) = &mut job.to {
            state.come(depth, &job.from, to);
        }
        state.give_back(depth);
        self.changed.notify_all();
        state.failed.is_none()
    }
}

/// Pages that wait for a chunk, at most: more than a moment sends away. They wait in room that is free
/// anyway, and what the system gets back it clears before it gives it again.
const WAITING_BYTES: usize = 1 << 30;

/// Threads of all links. Dropping it waits for what is under way.
pub(super) struct Mover {
    shared: Arc<Shared>,
    /// By link: queues up and down.
    queues: Vec<[Sender<Job>; 2]>,
    threads: Vec<JoinHandle<()>>,
}

impl Mover {
    /// For `links` links, the last of which leads to `disk` where there is one. All movers of the process
    /// move chunks of `all_bytes` in a memory.
    pub fn start(links: usize, disk: Option<Disk>, all_bytes: u64) -> std::io::Result<Mover> {
        let disk = disk.map(Arc::new);
        let frames = || Frames::new(WAITING_BYTES, MEMORIES * all_bytes as usize);
        let state = State { frames: std::array::from_fn(|_| frames()), ..State::default() };
        let shared = Arc::new(Shared { state: Mutex::new(state), changed: Condvar::new() });
        let mut mover = Mover { shared, queues: Vec::new(), threads: Vec::new() };
        for link in 0..links {
            let up = mover.spawn(link, Way::Up, disk.clone())?;
            let down = mover.spawn(link, Way::Down, disk.clone())?;
            mover.queues.push([up, down]);
        }
        Ok(mover)
    }

    fn spawn(&mut self, link: usize, way: Way, disk: Option<Arc<Disk>>) -> std::io::Result<Sender<Job>> {
        let (queue, jobs) = channel();
        let shared = self.shared.clone();
        let thread = std::thread::Builder::new().name(format!("chunks {way:?} {link}"));
        let thread = thread.spawn(move || carry_all(&jobs, &shared, disk.as_deref(), (link, way)))?;
        self.threads.push(thread);
        Ok(queue)
    }

    /// Bytes chunks may hold from now on, by depth.
    pub fn set_capacity(&self, depth: usize, bytes: u64) {
        self.shared.update(|state| {
            state.rooms[depth].capacity_bytes = bytes;
            state.give_back(depth);
        });
    }

    /// Promise room to a job that will be sent now.
    pub fn promise(&self, depth: usize, bytes: u64) -> (usize, u64) {
        (depth, self.shared.update(|state| state.rooms[depth].promise(bytes)))
    }

    /// Queue a chunk; it waits until there is room.
    pub fn send(&self, link: usize, way: Way, job: Job) {
        if matches!(job.from, End::Memory(_) | End::Drive(_)) {
            self.shared.lock().sent_bytes[link][way as usize] += job.bytes().unwrap_or(0);
        }
        // The thread ends only after this sender is gone.
        self.queues[link][way as usize].send(job).ok();
    }

    /// Brings a chunk that is copied from nowhere at once; false, and nothing done, when there is no room
    /// yet.
    pub fn try_bring(&self, depth: usize, from: &End, to: &mut Loan) -> bool {
        let mut state = self.shared.lock();
        let there = state.rooms[depth].try_commit(to.len_bytes() as u64);
        if there {
            state.come(depth, from, to);
            state.give_back(depth);
        }
        there
    }

    /// The owner drops a chunk itself.
    pub fn drop_chunk(&self, depth: usize, mut loan: Loan) {
        let bytes = loan.len_bytes() as u64;
        self.shared.update(|state| state.leave(depth, bytes, Some(&mut loan)));
    }

    /// Wait until `done` holds or a link fails; seconds waited.
    pub fn wait(&self, mut done: impl FnMut() -> bool) -> Result<f64, DiskError> {
        if done() {
            return Ok(0.0);
        }
        let started = Instant::now();
        let mut state = self.shared.lock();
        loop {
            if let Some(error) = &state.failed {
                return Err(error.clone());
            }
            if done() {
                return Ok(started.elapsed().as_secs_f64());
            }
            // A loan is returned right before its completion is told: the timeout is a belt.
            let (next, _) = self
                .shared
                .changed
                .wait_timeout(state, Duration::from_millis(100))
                .unwrap_or_else(|poisoned| poisoned.into_inner());
            state = next;
        }
    }

    /// What has arrived, and in how many seconds.
    pub fn carried(&self) -> [Carried; MEMORIES] {
        self.shared.lock().carried
    }

    /// What was sent. Bytes still on their way count, so that those of a step are the same whenever
    /// they arrive; seconds are of those that have.
    pub fn sent(&self) -> [Carried; MEMORIES] {
        let state = self.shared.lock();
        std::array::from_fn(|link| {
            let [up_bytes, down_bytes] = state.sent_bytes[link];
            Carried { up_bytes, down_bytes, ..state.carried[link] }
        })
    }

    /// Most that chunks held at once, by depth, since this was asked last.
    pub fn take_peaks(&self) -> [u64; MEMORIES] {
        self.shared.update(|state| {
            std::array::from_fn(|depth| {
                let room = &mut state.rooms[depth];
                std::mem::replace(&mut room.peak_bytes, room.held_bytes)
            })
        })
    }

    pub fn failure(&self) -> Option<DiskError> {
        self.shared.lock().failed.clone()
    }
}

impl Drop for Mover {
    fn drop(&mut self) {
        // Whoever waits for room would wait for ever once nothing leaves any more.
        self.shared.update(|state| state.rooms.iter_mut().for_each(Room::open));
        self.queues.clear();
        for thread in self.threads.drain(..) {
            thread.join().ok();
        }
    }
}

fn carry_all(jobs: &Receiver<Job>, shared: &Arc<Shared>, disk: Option<&Disk>, (link, way): (usize, Way)) {
    for mut job in jobs {
        let (Some(bytes), room) = (job.bytes(), job.room) else { continue };
        if !room.is_none_or(|room| shared.take_room(room, &mut job)) {
            continue;
        }
        let leaves = job.leaves.map(|depth| (depth, bytes));
        let journey = Journey { shared: shared.clone(), link, way, bytes, leaves };
        match (job.from, job.to, disk) {
            (End::Memory(mut from), End::Memory(mut to), _) => {
                journey.begin();
                to.copy_from(&mut from);
                journey.end(Ok(()), Some(from), Some(to));
            }
            (End::Drive(slot), End::Memory(to), Some(disk)) => {
                let turn = journey.begin();
                disk.submit_then(Op::Read, request(to, slot, turn), |arrived| {
                    let (moved, to) = returned(arrived);
                    journey.end(moved, None, to);
                });
            }
            (End::Memory(from), End::Drive(slot), Some(disk)) => {
                let turn = journey.begin();
                disk.submit_then(Op::Write, request(from, slot, turn), |arrived| {
                    let (moved, from) = returned(arrived);
                    journey.end(moved, from, None);
                });
            }
            (from, to, _) => {
                // From nowhere: nothing moves.
                drop((from, to));
                shared.update(|_| ());
            }
        }
    }
}

/// Between memory and drive; requests are served in the order of their turns.
fn request(loan: Loan, slot: Slot, turn: u64) -> Request {
    let range = 0..loan.len_bytes();
    let Slot { region, offset } = slot;
    Request { region, offset, block: Block::from_loan(loan), range, deadline: turn }
}

/// The loan comes back either way, unless the engine died with it.
fn returned(arrived: Result<Block, Failed>) -> (Result<(), DiskError>, Option<Loan>) {
    match arrived {
        Ok(block) => (Ok(()), block.into_loan()),
        Err(Failed { error, block }) => (Err(error), block.and_then(Block::into_loan)),
    }
}

/// A chunk under way over a link, whoever carries it.
struct Journey {
    shared: Arc<Shared>,
    link: usize,
    way: Way,
    bytes: u64,
    /// Depth of the memory it leaves, and how much room that frees.
    leaves: Option<(usize, u64)>,
}

impl Journey {
    /// Waits until the link takes another chunk, and counts it as under way. Returns its turn.
    fn begin(&self) -> u64 {
        let mut state = self.shared.lock();
        while state.failed.is_none() && !state.flying[self.link][self.way as usize].has_place() {
            state = self.shared.wait(state);
        }
        state.flying[self.link][self.way as usize].add(self.bytes);
        state.turn += 1;
        state.turn
    }

    /// What could not be read whole is never seen; what could not be written stays. Loans end in
    /// here, before anybody is told.
    fn end(self, moved: Result<(), DiskError>, from: Option<Loan>, to: Option<Loan>) {
        let Journey { shared, link, way, bytes, leaves } = self;
        if let (Err(_), Some(mut to)) = (&moved, to) {
            to.send_away();
        }
        shared.update(move |state| {
            let seconds = state.flying[link][way as usize].remove(bytes);
            let mut from = from;
            match moved {
                Ok(()) => {
                    let left = leaves.into_iter();
                    left.for_each(|(depth, bytes)| state.leave(depth, bytes, from.as_mut()));
                    state.carried[link].add(way, bytes, seconds);
                }
                Err(error) => state.failed = Some(error),
            }
        });
    }
}

impl Job {
    fn bytes(&self) -> Option<u64> {
        let of = |end: &End| match end {
            End::Memory(loan) => Some(loan.len_bytes() as u64),
            _ => None,
        };
        of(&self.to).or(of(&self.from))
    }
}

/// What is under way over a link one way.
#[derive(Default)]
struct Flying {
    chunks: usize,
    bytes: u64,
    since: Option<Instant>,
}

/// Bytes under way over a link one way, unless one chunk is more: enough for a drive to stay busy while
/// answers are taken, little for who comes in a hurry.
const FLYING_BYTES: u64 = 8 << 20;

impl Flying {
    fn has_place(&self) -> bool {
        self.chunks == 0 || self.bytes < FLYING_BYTES
    }

    fn add(&mut self, bytes: u64) {
        (self.chunks, self.bytes) = (self.chunks + 1, self.bytes + bytes);
        self.since.get_or_insert_with(Instant::now);
    }

    /// Seconds since something else ended, or began while nothing was under way.
    fn remove(&mut self, bytes: u64) -> f64 {
        (self.chunks, self.bytes) = (self.chunks - 1, self.bytes - bytes);
        let now = Instant::now();
        let since = self.since.replace(now).map_or(0.0, |since| (now - since).as_secs_f64());
        self.since = self.since.filter(|_| self.chunks > 0);
        since
    }
}

impl Carried {
    fn add(&mut self, way: Way, bytes: u64, seconds: f64) {
        match way {
            Way::Up => (self.up_bytes, self.up_s) = (self.up_bytes + bytes, self.up_s + seconds),
            Way::Down => (self.down_bytes, self.down_s) = (self.down_bytes + bytes, self.down_s + seconds),
        }
    }
}
