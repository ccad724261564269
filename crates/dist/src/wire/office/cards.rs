//! What the carrier of device memory asks of the office: it makes its calls without waiting here, says what is
//! under way, and hears from the others which call they are in.

use super::{GRACE, LOOK_EVERY, Message, Office, Slot, lock};
use crate::call::Call;
use crate::error::CommError;
use crate::wire::frame::Header;
use std::io::ErrorKind;
use std::sync::atomic::Ordering::SeqCst;
use std::time::{Duration, Instant};

impl Office {
    pub(crate) fn is_over(&self) -> Result<(), CommError> {
        self.check()
    }

    /// Ends the run on every rank and returns why.
    pub(crate) fn end_with(&self, error: CommError) -> CommError {
        self.fail(error)
    }

    /// What ended the run, or ends it before long.
    pub(crate) fn over_soon(&self) -> Option<CommError> {
        self.failure_within(GRACE)
    }

    /// Waits until something may have come.
    pub(crate) fn listen(&self, at_most: Duration) {
        self.bell.sleep(at_most, || self.failed.load(SeqCst));
    }

    pub(crate) fn longest_wait(&self) -> Duration {
        self.deadline()
    }

    /// The oldest calls on device memory that are under way, in the foreground and beside computation, and how many
    /// that are awaited were not compared with other members' yet.
    pub(crate) fn publish(&self, oldest: [Option<Call>; 2], not_compared: usize) {
        *lock(&self.on_device) = oldest;
        if self.not_compared.swap(not_compared, SeqCst) > not_compared {
            self.bell.ring();
        }
    }

    /// Waits until the calls on device memory were compared: work whose bytes may be wrong did not end well.
    pub(super) fn all_compared(&self) {
        self.patiently(self.deadline(), || self.not_compared.load(SeqCst) == 0 || self.failed.load(SeqCst));
    }

    /// A call on device memory is done.
    pub(crate) fn finished(&self, call: Call) {
        let lane = usize::from(call.beside);
        lock(&self.stations[lane]).last = Some(call);
    }

    /// The end of a rank that has ended without coming to where it was awaited.
    pub(crate) fn left(&self, rank: usize) -> Option<CommError> {
        let reason = lock(&self.peers[rank].ended).clone()?;
        Some(CommError::Dead { rank, reason, last: Box::new(self.last_heard(rank)) })
    }

    /// Asks everybody what they do and ends the run with who is to blame for `call`.
    pub(crate) fn blame(&self, call: &Call, since: Instant) -> CommError {
        self.overdue(call, since)
    }

    /// Sends words about a call, which are no part of it. What cannot be told shows by itself.
    pub(in crate::wire) fn say(&self, to: usize, header: &Header, bytes: &[u8]) {
        match self.post.send(to, header, bytes, self.deadline()) {
            // Of a rank that takes nothing in any more its calls will tell.
            Err(error) if error.kind() != ErrorKind::WouldBlock => self.lost(to, &super::gone(&error)),
            _ => {}
        }
    }

    /// Words that have come.
    pub(in crate::wire) fn heard(&self, slot: &Slot) -> Option<Message> {
        lock(&self.mail).remove(slot)
    }

    /// Waits for words for as long as the run goes on.
    pub(in crate::wire) fn hear(&self, from: usize, slot: &Slot) -> Result<Message, CommError> {
        loop {
            if let Some(message) = self.heard(slot) {
                return Ok(message);
            }
            self.check()?;
            if let Some(dead) = self.left(from).filter(|_| !lock(&self.mail).contains_key(slot)) {
                return Err(dead);
            }
            let ready = || lock(&self.mail).contains_key(slot) || self.failed.load(SeqCst);
            self.bell.sleep(LOOK_EVERY, ready);
        }
    }
}
