//! Waiting: spin for a moment, yield for a moment, then sleep until rung.

use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::Duration;

/// Where threads sleep until something they wait for may have happened.
#[derive(Default)]
pub(crate) struct Bell {
    sleepers: AtomicUsize,
    lock: Mutex<()>,
    rung: Condvar,
}

/// Turns of a spinning thread: a few microseconds, about the length of a small collective. Spinning
/// longer would take the core from a rank that shares it.
const SPINS: usize = 300;
/// Times a waiting thread lets others run before it sleeps; falling asleep and being woken costs
/// more than all of these.
const YIELDS: usize = 60;

impl Bell {
    /// Wakes whoever sleeps. What they wait for was stored before, with `SeqCst`: a sleeper counts
    /// itself before it looks a last time, so either it sees the store or we see the sleeper.
    pub(crate) fn ring(&self) {
        if self.sleepers.load(SeqCst) > 0 {
            drop(self.lock.lock().unwrap_or_else(PoisonError::into_inner));
            self.rung.notify_all();
        }
    }

    /// Waits without sleeping; whether `ready` came true.
    pub(crate) fn hover(&self, spin: bool, ready: impl Fn() -> bool) -> bool {
        if spin {
            for _ in 0..SPINS {
                if ready() {
                    return true;
                }
                std::hint::spin_loop();
            }
        }
        for _ in 0..YIELDS {
            if ready() {
                return true;
            }
            std::thread::yield_now();
        }
        ready()
    }

    /// Sleeps until rung, at most `at_most`, unless `ready` already.
    pub(crate) fn sleep(&self, at_most: Duration, ready: impl Fn() -> bool) {
        self.sleepers.fetch_add(1, SeqCst);
        {
            let held = self.lock.lock().unwrap_or_else(PoisonError::into_inner);
            if !ready() {
                drop(self.rung.wait_timeout(held, at_most).unwrap_or_else(PoisonError::into_inner));
            }
        }
        self.sleepers.fetch_sub(1, SeqCst);
    }
}
