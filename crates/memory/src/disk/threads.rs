//! The engine of last resort, which every system allows: a pool of threads, each with one
//! `pread` or `pwrite` at a time.

use super::Shared;
use super::error::DiskError;
use super::piece::{Attempt, PAUSE, Piece, Step, Trouble};
use std::sync::Arc;
use std::thread::JoinHandle;

/// Threads of the pool, and so the operations in flight at most: beyond this, drives that need
/// more depth need the ring.
pub(super) const THREADS: usize = 8;

/// Starts the pool. It ends when the schedule is closed and empty.
pub(super) fn start(shared: &Arc<Shared>) -> Result<Vec<JoinHandle<()>>, DiskError> {
    let spawn = |index| {
        let mine = shared.clone();
        let named = std::thread::Builder::new().name(format!("disk-{index}"));
        named.spawn(move || work(&mine)).map_err(|cause| DiskError::Thread { cause: cause.to_string() })
    };
    let mut threads = Vec::new();
    for index in 0..THREADS {
        match spawn(index) {
            Ok(thread) => threads.push(thread),
            // A smaller pool does the same work.
            Err(_) if !threads.is_empty() => break,
            Err(error) => return Err(error),
        }
    }
    Ok(threads)
}

/// Tells everyone who waits, should a worker panic.
struct Sentry<'a>(&'a Shared);

impl Drop for Sentry<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.lock().wreck();
            self.0.wake_all();
        }
    }
}

fn work(shared: &Shared) {
    let _sentry = Sentry(shared);
    let mut schedule = shared.lock();
    loop {
        if let Some(piece) = schedule.next_piece() {
            drop(schedule);
            let (piece, result) = run(piece, shared);
            schedule = shared.lock();
            let finished = schedule.finish(piece, result);
            shared.wake_all();
            if let Some(finished) = finished {
                drop(schedule);
                finished.deliver();
                schedule = shared.lock();
            }
        } else if schedule.closed && schedule.is_idle() {
            return;
        } else {
            schedule = shared.wait(schedule);
        }
    }
}

fn run(mut piece: Piece, shared: &Shared) -> (Piece, Result<(), Trouble>) {
    piece.prepare(&shared.sums);
    loop {
        let answer = match piece.attempt(shared.faults()) {
            Attempt::Fail(errno) => Err(errno),
            Attempt::Run { len } => {
                let (at, done) = (piece.file_offset + piece.done as u64, piece.done);
                shared.file.transfer(piece.op, at, &mut piece.memory.bytes_mut()[done..done + len])
            }
        };
        match piece.advance(answer, &shared.sums) {
            Step::Again => {}
            Step::Later => std::thread::sleep(PAUSE),
            Step::Finished(result) => return (piece, result),
        }
    }
}
