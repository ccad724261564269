//! Room of one tier of memory, given in the order in which it was promised.

use std::collections::VecDeque;

/// Who holds how much of a tier, and who is next.
#[derive(Default)]
pub(super) struct Room {
    pub capacity_bytes: u64,
    pub held_bytes: u64,
    pub peak_bytes: u64,
    /// Promised and not taken yet.
    promised_bytes: u64,
    /// By promise: what the capacity was then. A promise is kept when the capacity shrinks, or who
    /// waits for it would wait for ever.
    promises: VecDeque<u64>,
    /// Ticket of the first of them.
    next: u64,
}

impl Room {
    /// Promise room that is there once all that was decided on before is done; the ticket.
    pub fn promise(&mut self, bytes: u64) -> u64 {
        self.promised_bytes += bytes;
        self.promises.push_back(self.capacity_bytes);
        self.next + self.promises.len() as u64 - 1
    }

    /// Whether it is the turn of a ticket, and there is room.
    pub fn may_take(&self, ticket: u64, bytes: u64) -> bool {
        let capacity = self.promises.front().map_or(0, |then| self.capacity_bytes.max(*then));
        ticket == self.next && self.held_bytes + bytes <= capacity
    }

    /// Redeem a ticket.
    pub fn take(&mut self, ticket: u64, bytes: u64) {
        debug_assert!(ticket >= self.next, "a ticket is good once");
        self.promises.pop_front();
        self.next += 1;
        self.promised_bytes -= bytes;
        self.hold(bytes);
    }

    /// Take room out of turn, where that keeps nobody waiting.
    pub fn try_commit(&mut self, bytes: u64) -> bool {
        let room = self.held_bytes + self.promised_bytes + bytes <= self.capacity_bytes;
        if room {
            self.hold(bytes);
        }
        room
    }

    /// Held by nobody; nothing where a promise went beyond a capacity that shrank.
    pub fn free_bytes(&self) -> u64 {
        self.capacity_bytes.saturating_sub(self.held_bytes)
    }

    pub fn release(&mut self, bytes: u64) {
        self.held_bytes -= bytes;
    }

    /// Nobody waits any more.
    pub fn open(&mut self) {
        self.capacity_bytes = u64::MAX;
    }

    fn hold(&mut self, bytes: u64) {
        self.held_bytes += bytes;
        self.peak_bytes = self.peak_bytes.max(self.held_bytes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn room_is_given_in_the_order_of_promises() {
        let mut room = Room { capacity_bytes: 10, ..Room::default() };
        assert!(room.try_commit(6));
        let (first, second) = (room.promise(4), room.promise(4));
        assert!(room.may_take(first, 4) && !room.may_take(second, 4), "not its turn");
        assert!(!room.try_commit(1), "promised room is not given to others");
        room.take(first, 4);
        assert!(!room.may_take(second, 4), "full");
        room.release(6);
        room.capacity_bytes = 5;
        assert!(room.may_take(second, 4), "a promise is kept");
        room.take(second, 4);
        assert_eq!((room.held_bytes, room.peak_bytes), (8, 10));
    }
}
