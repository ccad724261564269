//! Saving beside the loop: one thread, at most one snapshot in flight.
//!
//! A snapshot is a copy that the caller has finished making, so a state never holds values newer
//! than the step it names. Buffers come back, so that no save after the first allocates.

use super::{Array, SaveReport, StateDir, StateError};
use serde_json::Value;
use std::borrow::Cow;
use std::sync::mpsc::{Receiver, Sender, TryRecvError, channel};
use std::thread::JoinHandle;

/// Named buffers of a snapshot.
type Buffers = Vec<(String, Vec<u8>)>;

struct Job {
    step: u64,
    meta: Value,
    buffers: Buffers,
}

struct Done {
    result: Result<SaveReport, StateError>,
    buffers: Buffers,
}

/// The thread that saves.
pub struct Saver {
    /// None once the thread has been told to end. `in_flight` bounds it to one job.
    jobs: Option<Sender<Job>>,
    done: Receiver<Done>,
    thread: Option<JoinHandle<()>>,
    in_flight: bool,
    spare: Buffers,
    /// Outcomes not yet told to the caller: at most the one since its last call.
    failure: Option<StateError>,
    report: Option<SaveReport>,
}

impl Saver {
    /// Start the thread.
    pub fn start(dir: StateDir) -> Result<Saver, StateError> {
        let (jobs, inbox) = channel::<Job>();
        let (outbox, done) = channel();
        let thread = std::thread::Builder::new().name("state saver".into()).spawn(move || {
            for Job { step, meta, buffers } in inbox {
                let arrays: Vec<Array<'_>> = buffers
                    .iter()
                    .map(|(name, bytes)| Array { name: name.clone(), bytes: Cow::Borrowed(bytes) })
                    .collect();
                let result = dir.save(step, &meta, &arrays);
                drop(arrays);
                if outbox.send(Done { result, buffers }).is_err() {
                    return;
                }
            }
        });
        let thread = thread.map_err(|source| StateError::Io { path: "/proc/self/task".into(), source })?;
        Ok(Saver {
            jobs: Some(jobs),
            done,
            thread: Some(thread),
            in_flight: false,
            spare: Vec::new(),
            failure: None,
            report: None,
        })
    }

    /// Hand over a snapshot. Waits while the former one is being written; if that failed, its error
    /// is returned, this snapshot is not written and its buffers are kept for `take_buffers`.
    pub fn save(&mut self, step: u64, meta: Value, buffers: Buffers) -> Result<(), StateError> {
        self.wait();
        if let Some(failure) = self.failure.take() {
            self.spare = buffers;
            return Err(failure);
        }
        let jobs = self.jobs.as_ref().ok_or(StateError::Thread)?;
        jobs.send(Job { step, meta, buffers }).map_err(|_| StateError::Thread)?;
        self.in_flight = true;
        Ok(())
    }

    /// The buffers of the former snapshot, to be filled again; waits until it is written. Empty
    /// before the first save.
    pub fn take_buffers(&mut self) -> Vec<(String, Vec<u8>)> {
        self.wait();
        std::mem::take(&mut self.spare)
    }

    /// The report of a save that has ended since the last call, or its error. Never waits.
    pub fn poll(&mut self) -> Result<Option<SaveReport>, StateError> {
        if self.in_flight {
            match self.done.try_recv() {
                Ok(done) => self.settle(done),
                Err(TryRecvError::Empty) => {}
                Err(TryRecvError::Disconnected) => self.lost(),
            }
        }
        match self.failure.take() {
            Some(failure) => Err(failure),
            None => Ok(self.report.take()),
        }
    }

    /// Wait for the snapshot in flight and end the thread. Returns the last report not yet polled.
    pub fn finish(mut self) -> Result<Option<SaveReport>, StateError> {
        self.wait();
        match self.failure.take() {
            Some(failure) => Err(failure),
            None => Ok(self.report.take()),
        }
    }

    fn wait(&mut self) {
        if self.in_flight {
            match self.done.recv() {
                Ok(done) => self.settle(done),
                Err(_) => self.lost(),
            }
        }
    }

    fn settle(&mut self, done: Done) {
        self.in_flight = false;
        self.spare = done.buffers;
        match done.result {
            Ok(report) => self.report = Some(report),
            Err(error) => self.failure = Some(error),
        }
    }

    fn lost(&mut self) {
        self.in_flight = false;
        self.failure = Some(StateError::Thread);
    }
}

impl Drop for Saver {
    /// A snapshot in flight is written to its end, even when nobody asked for the outcome.
    fn drop(&mut self) {
        self.jobs = None;
        if let Some(thread) = self.thread.take() {
            thread.join().ok();
        }
    }
}
