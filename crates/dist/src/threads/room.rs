//! Where the members of one group meet: what each lends, which call each is in, letters between two.

use super::world::lock;
use crate::bell::Bell;
use crate::beside::Array;
use crate::call::Call;
use device::Window;
use std::collections::VecDeque;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::SeqCst};

/// Letters that may wait between two ranks; a sender that is further ahead waits.
pub(super) const LETTERS: usize = 64;

pub(super) struct Room {
    pub(super) loans: Vec<Window>,
    pub(super) members: Vec<Member>,
    pub(super) bell: Bell,
    arrived: AtomicUsize,
    /// Meetings held so far.
    pub(super) meetings: AtomicU64,
}

/// What the room keeps of one member.
pub(super) struct Member {
    /// Its next collective.
    pub(super) number: AtomicU64,
    /// The one it is in.
    pub(super) call: Mutex<Option<Call>>,
    /// An array all members share, handed to it within a collective.
    pub(super) handed: Mutex<Option<Array>>,
    /// Letters to it, by sender.
    pub(super) letters: Vec<Mutex<Letters>>,
}

/// What one member sent another.
#[derive(Default)]
pub(super) struct Letters {
    pub(super) waiting: VecDeque<Letter>,
    pub(super) sent: u64,
    /// Letters asked for; each is taken by its number, in any order.
    pub(super) asked: u64,
}

pub(super) struct Letter {
    pub(super) array: Array,
    pub(super) call: Call,
}

impl Room {
    pub(super) fn new(size: usize) -> Room {
        let member = |_| Member {
            number: AtomicU64::new(0),
            call: Mutex::default(),
            handed: Mutex::default(),
            letters: (0..size).map(|_| Mutex::default()).collect(),
        };
        Room {
            loans: (0..size).map(|_| Window::default()).collect(),
            members: (0..size).map(member).collect(),
            bell: Bell::default(),
            arrived: AtomicUsize::new(0),
            meetings: AtomicU64::new(0),
        }
    }

    pub(super) fn ring(&self) {
        self.bell.ring();
    }

    /// Comes to the current meeting. `Some(meeting)` to wait for when others are still to come;
    /// the last one runs `check` and then opens the door.
    pub(super) fn arrive<E>(&self, check: impl FnOnce() -> Result<(), E>) -> Result<Option<u64>, E> {
        let meeting = self.meetings.load(SeqCst);
        if self.arrived.fetch_add(1, SeqCst) + 1 < self.members.len() {
            return Ok(Some(meeting));
        }
        check()?;
        self.arrived.store(0, SeqCst);
        self.meetings.store(meeting + 1, SeqCst);
        self.bell.ring();
        Ok(None)
    }

    /// Two members that came with different calls.
    pub(super) fn odd_one(&self) -> Option<(usize, usize)> {
        let first = lock(&self.members[0].call).clone()?;
        (1..self.members.len())
            .find(|i| !lock(&self.members[*i].call).as_ref().is_some_and(|call| call.matches(&first)))
            .map(|i| (0, i))
    }
}
