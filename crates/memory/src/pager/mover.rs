//! Two threads that carry chunks between DRAM and the drive: one brings, one takes away, so that
//! both ways of the link are busy at once. They hold loans, never windows; they decide nothing but
//! to wait for room.

use crate::disk::{Block, Disk, DiskError, Failed, Region, Request, Ticket};
use device::Loan;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Where a chunk lies in the offload file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Slot {
    pub region: Region,
    pub offset: u64,
}

/// A chunk on its way to DRAM; without a slot it becomes zeros.
pub(super) struct Bring {
    pub loan: Loan,
    pub slot: Option<Slot>,
}

/// A chunk on its way to the drive; its memory is given back afterwards.
pub(super) struct Take {
    pub loan: Loan,
    pub slot: Slot,
}

/// What the link has carried, and DRAM held by chunks.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Carried {
    pub read_bytes: u64,
    pub written_bytes: u64,
    pub read_s: f64,
    pub written_s: f64,
    pub committed_bytes: u64,
    pub peak_bytes: u64,
}

#[derive(Default)]
struct State {
    carried: Carried,
    capacity_bytes: u64,
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

    fn update(&self, change: impl FnOnce(&mut State)) {
        change(&mut self.lock());
        self.changed.notify_all();
    }

    /// Count `bytes` as held once there is room; false when the link has failed meanwhile.
    fn take_room(&self, bytes: u64) -> bool {
        let mut state = self.lock();
        while state.failed.is_none() && state.carried.committed_bytes + bytes > state.capacity_bytes {
            state = self.changed.wait(state).unwrap_or_else(|poisoned| poisoned.into_inner());
        }
        state.commit(bytes);
        state.failed.is_none()
    }
}

impl State {
    fn commit(&mut self, bytes: u64) {
        self.carried.committed_bytes += bytes;
        self.carried.peak_bytes = self.carried.peak_bytes.max(self.carried.committed_bytes);
    }
}

/// The two threads. Dropping it waits for what is under way.
pub(super) struct Mover {
    shared: Arc<Shared>,
    bring: Option<Sender<Bring>>,
    take: Option<Sender<Take>>,
    threads: Vec<JoinHandle<()>>,
}

impl Mover {
    pub fn start(disk: Disk) -> std::io::Result<Mover> {
        let disk = Arc::new(disk);
        let shared = Arc::new(Shared { state: Mutex::default(), changed: Condvar::new() });
        let (bring, to_bring) = channel();
        let (take, to_take) = channel();
        let (ours, theirs) = (shared.clone(), disk.clone());
        let reader = std::thread::Builder::new().name("chunks in".into());
        let reader = reader.spawn(move || bring_all(&to_bring, &ours, &theirs))?;
        let ours = shared.clone();
        let writer = std::thread::Builder::new().name("chunks out".into());
        let writer = writer.spawn(move || take_all(&to_take, &ours, &disk))?;
        Ok(Mover { shared, bring: Some(bring), take: Some(take), threads: vec![reader, writer] })
    }

    /// Bytes chunks may hold from now on.
    pub fn set_capacity(&self, bytes: u64) {
        self.shared.update(|state| state.capacity_bytes = bytes);
    }

    /// Queue a chunk to come; it waits until there is room.
    pub fn bring(&self, job: Bring) {
        if let Some(queue) = &self.bring {
            // The thread ends only after this sender is gone.
            queue.send(job).ok();
        }
    }

    /// Queue a chunk to leave.
    pub fn take(&self, job: Take) {
        if let Some(queue) = &self.take {
            queue.send(job).ok();
        }
    }

    /// The owner brought a chunk itself; false, and nothing counted, when there is no room yet.
    pub fn try_commit(&self, bytes: u64) -> bool {
        let mut state = self.shared.lock();
        let room = state.carried.committed_bytes + bytes <= state.capacity_bytes;
        if room {
            state.commit(bytes);
        }
        room
    }

    /// The owner dropped a chunk itself.
    pub fn released(&self, bytes: u64) {
        self.shared.update(|state| state.carried.committed_bytes -= bytes);
    }

    /// Wait until `done` holds or the link fails; seconds waited.
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

    pub fn carried(&self) -> Carried {
        self.shared.lock().carried
    }

    /// Start a new peak from what is held now.
    pub fn reset_peak(&self) {
        self.shared.update(|state| state.carried.peak_bytes = state.carried.committed_bytes);
    }

    pub fn failure(&self) -> Option<DiskError> {
        self.shared.lock().failed.clone()
    }
}

impl Drop for Mover {
    fn drop(&mut self) {
        // Whoever waits for room would wait for ever once nothing leaves any more.
        self.shared.update(|state| state.capacity_bytes = u64::MAX);
        (self.bring, self.take) = (None, None);
        for thread in self.threads.drain(..) {
            thread.join().ok();
        }
    }
}

/// Move a chunk whole; the loan comes back either way, unless the engine died with it.
fn carry(
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

fn bring_all(jobs: &Receiver<Bring>, shared: &Shared, disk: &Disk) {
    for Bring { mut loan, slot } in jobs {
        let bytes = loan.len_bytes() as u64;
        let alive = shared.take_room(bytes);
        loan.bring();
        let started = Instant::now();
        let (loan, read) = match slot {
            Some(slot) if alive => carry(loan, slot, |request| disk.submit_read(request)),
            _ => (Some(loan), Ok(())),
        };
        let seconds = started.elapsed().as_secs_f64();
        if let (Err(_), Some(mut loan)) = (&read, loan) {
            // What could not be read whole must never be seen.
            loan.send_away();
        }
        shared.update(|state| match read {
            Ok(()) if slot.is_some() => {
                state.carried.read_bytes += bytes;
                state.carried.read_s += seconds;
            }
            Ok(()) => {}
            Err(error) => state.failed = Some(error),
        });
    }
}

fn take_all(jobs: &Receiver<Take>, shared: &Shared, disk: &Disk) {
    for Take { loan, slot } in jobs {
        let bytes = loan.len_bytes() as u64;
        let started = Instant::now();
        let (loan, written) = carry(loan, slot, |request| disk.submit_write(request));
        let seconds = started.elapsed().as_secs_f64();
        let leaves = written.is_ok();
        if let (true, Some(mut loan)) = (leaves, loan) {
            loan.send_away();
        }
        shared.update(|state| match written {
            Ok(()) => {
                state.carried.committed_bytes -= bytes;
                state.carried.written_bytes += bytes;
                state.carried.written_s += seconds;
            }
            Err(error) => state.failed = Some(error),
        });
    }
}
