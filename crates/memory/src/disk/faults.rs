//! Failures on demand: a named point and the operation at which it fails. Compiled into every
//! build so that tests meet the code users run; without rules it costs one branch an operation.

use rustix::io::Errno;
use std::sync::atomic::{AtomicU64, Ordering};

/// Places that can be made to fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Point {
    /// Setting up io_uring.
    Ring,
    /// Asking for O_DIRECT.
    Direct,
    /// Reserving space.
    Reserve,
    /// One read operation given to the system.
    Read,
    /// One write operation given to the system.
    Write,
}

const POINTS: usize = 5;

/// What happens there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The operation is not done and answers this.
    Errno(Errno),
    /// The operation is done for this many bytes only (really: it is asked for no more).
    Short(usize),
}

#[derive(Clone, Copy, Debug)]
struct Rule {
    point: Point,
    first: u64,
    last: u64,
    fault: Fault,
}

/// Rules, and how often each point was passed.
#[derive(Debug, Default)]
pub struct Faults {
    rules: Vec<Rule>,
    passed: [AtomicU64; POINTS],
}

impl Faults {
    /// None: only counts.
    pub fn none() -> Faults {
        Faults::default()
    }

    /// The `nth` operation at `point` (from 0) fails, once.
    pub fn at(mut self, point: Point, nth: u64, fault: Fault) -> Faults {
        self.rules.push(Rule { point, first: nth, last: nth, fault });
        self
    }

    /// Every operation at `point` from the `nth` on fails.
    pub fn from(mut self, point: Point, nth: u64, fault: Fault) -> Faults {
        self.rules.push(Rule { point, first: nth, last: u64::MAX, fault });
        self
    }

    /// Operations that passed `point` so far.
    pub fn passed(&self, point: Point) -> u64 {
        self.passed[point as usize].load(Ordering::Relaxed)
    }

    /// Counts an operation at `point`; what should happen to it.
    pub(super) fn pass(&self, point: Point) -> Option<Fault> {
        let nth = self.passed[point as usize].fetch_add(1, Ordering::Relaxed);
        let applies = |rule: &&Rule| rule.point == point && (rule.first..=rule.last).contains(&nth);
        self.rules.iter().find(applies).map(|rule| rule.fault)
    }

    /// `pass` for points that fail whole: the errno to answer.
    pub(super) fn refuse(faults: Option<&Faults>, point: Point) -> Result<(), Errno> {
        match faults.and_then(|faults| faults.pass(point)) {
            Some(Fault::Errno(errno)) => Err(errno),
            Some(Fault::Short(_)) | None => Ok(()),
        }
    }
}
