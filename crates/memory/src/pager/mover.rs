//! The threads that carry chunks, two a link: one brings up, one takes down, so that both ways of
//! every link are busy at once. They hold loans, never windows; they decide nothing but to wait for
//! room.
//!
//! Room of a tier is promised in the order in which it was decided on and given in that order. So
//! the job decided on first can always go on, and no two jobs ever wait for each other.

use super::room::Room;
use crate::disk::{Block, Disk, DiskError, Failed, Region, Request, Ticket};
use device::Loan;
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
    Nothing,
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
    failed: Option<DiskError>,
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

    /// Take promised room once there is some; false when a link has failed meanwhile.
    fn take_room(&self, (depth, ticket): (usize, u64), bytes: u64) -> bool {
        let mut state = self.lock();
        while state.failed.is_none() && !state.rooms[depth].may_take(ticket, bytes) {
            state = self.changed.wait(state).unwrap_or_else(|poisoned| poisoned.into_inner());
        }
        state.rooms[depth].take(ticket, bytes);
        self.changed.notify_all();
        state.failed.is_none()
    }
}

/// Threads of all links. Dropping it waits for what is under way.
pub(super) struct Mover {
    shared: Arc<Shared>,
    /// By link: queues up and down.
    queues: Vec<[Sender<Job>; 2]>,
    threads: Vec<JoinHandle<()>>,
}

impl Mover {
    /// For `links` links, the last of which leads to `disk` where there is one.
    pub fn start(links: usize, disk: Option<Disk>) -> std::io::Result<Mover> {
        let disk = disk.map(Arc::new);
        let shared = Arc::new(Shared { state: Mutex::default(), changed: Condvar::new() });
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
        self.shared.update(|state| state.rooms[depth].capacity_bytes = bytes);
    }

    /// Promise room to a job that will be sent now.
    pub fn promise(&self, depth: usize, bytes: u64) -> (usize, u64) {
        (depth, self.shared.update(|state| state.rooms[depth].promise(bytes)))
    }

    /// Queue a chunk; it waits until there is room.
    pub fn send(&self, link: usize, way: Way, job: Job) {
        if !matches!(job.from, End::Nothing) {
            self.shared.lock().sent_bytes[link][way as usize] += job.bytes().unwrap_or(0);
        }
        // The thread ends only after this sender is gone.
        self.queues[link][way as usize].send(job).ok();
    }

    /// The owner brought a chunk itself; false, and nothing counted, when there is no room yet.
    pub fn try_commit(&self, depth: usize, bytes: u64) -> bool {
        self.shared.lock().rooms[depth].try_commit(bytes)
    }

    /// The owner dropped a chunk itself.
    pub fn released(&self, depth: usize, bytes: u64) {
        self.shared.update(|state| state.rooms[depth].release(bytes));
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

fn carry_all(jobs: &Receiver<Job>, shared: &Shared, disk: Option<&Disk>, (link, way): (usize, Way)) {
    for mut job in jobs {
        let (Some(bytes), room, leaves) = (job.bytes(), job.room, job.leaves) else { continue };
        let alive = room.is_none_or(|room| shared.take_room(room, bytes));
        if let End::Memory(to) = &mut job.to {
            to.bring();
        }
        let counts = !matches!(job.from, End::Nothing);
        let started = Instant::now();
        // Loans end in here, before anybody is told.
        let moved = if alive { job.carry(disk) } else { Ok(()) };
        let seconds = started.elapsed().as_secs_f64();
        shared.update(|state| match moved {
            Ok(()) => {
                leaves.into_iter().for_each(|depth| state.rooms[depth].release(bytes));
                if alive && counts {
                    state.carried[link].add(way, bytes, seconds);
                }
            }
            Err(error) => state.failed = Some(error),
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

    /// Move a chunk whole. What could not be read whole is never seen; what could not be written
    /// stays.
    fn carry(self, disk: Option<&Disk>) -> Result<(), DiskError> {
        let Job { from, to, leaves, .. } = self;
        let (from, moved) = match (from, to, disk) {
            (End::Memory(from), End::Memory(mut to), _) => {
                to.bytes_mut().copy_from_slice(from.bytes());
                (Some(from), Ok(()))
            }
            (End::Drive(slot), End::Memory(to), Some(disk)) => {
                let (to, read) = transfer(to, slot, |request| disk.submit_read(request));
                if let (Err(_), Some(mut to)) = (&read, to) {
                    to.send_away();
                }
                (None, read)
            }
            (End::Memory(from), End::Drive(slot), Some(disk)) => {
                transfer(from, slot, |request| disk.submit_write(request))
            }
            _ => (None, Ok(())),
        };
        if let (true, Some(_), Some(mut from)) = (moved.is_ok(), leaves, from) {
            from.send_away();
        }
        moved
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

/// Between memory and drive; the loan comes back either way, unless the engine died with it.
fn transfer(
    loan: Loan,
    slot: Slot,
    submit: impl Fn(Request) -> Ticket,
) -> (Option<Loan>, Result<(), DiskError>) {
    let range = 0..loan.len_bytes();
    let block = Block::from_loan(loan);
    let Slot { region, offset } = slot;
    match submit(Request { region, offset, block, range, deadline: 0 }).wait() {
        Ok(block) => (block.into_loan(), Ok(())),
        Err(Failed { error, block }) => (block.and_then(Block::into_loan), Err(error)),
    }
}
