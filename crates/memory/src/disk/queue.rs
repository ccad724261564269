//! Which request is served next: pure, over plain data.
//!
//! Earliest deadline first, reads before writes on a tie, then first come. A request that touches
//! bytes of an earlier one (unless both only read) waits for it, and lends it its own deadline, so
//! that an urgent read never waits behind the idle writes around the one it needs.

use super::Op;
use std::collections::{BTreeSet, HashMap};
use std::ops::Range;

type Key = (u64, Op, u64);

struct Entry {
    span: Range<u64>,
    op: Op,
    deadline: u64,
    waits_for: Vec<u64>,
    /// All of it was handed out: it is in flight, no longer on offer.
    issued: bool,
}

/// Requests by number; numbers grow in the order of submission.
#[derive(Default)]
pub(super) struct Queue {
    entries: HashMap<u64, Entry>,
    ready: BTreeSet<Key>,
}

impl Queue {
    /// Takes a request for the bytes `span` of the file. `id` is larger than any before.
    pub(super) fn push(&mut self, id: u64, op: Op, span: Range<u64>, deadline: u64) {
        let clashes = |e: &Entry| {
            (op == Op::Write || e.op == Op::Write) && e.span.start < span.end && span.start < e.span.end
        };
        let waits_for: Vec<u64> =
            self.entries.iter().filter(|(_, e)| clashes(e)).map(|(id, _)| *id).collect();
        for id in &waits_for {
            self.hurry(*id, deadline);
        }
        if waits_for.is_empty() {
            self.ready.insert((deadline, op, id));
        }
        self.entries.insert(id, Entry { span, op, deadline, waits_for, issued: false });
    }

    /// Moves a request, and what it waits for, up to `deadline`.
    fn hurry(&mut self, id: u64, deadline: u64) {
        let mut next = vec![id];
        while let Some(id) = next.pop() {
            let Some(entry) = self.entries.get_mut(&id).filter(|entry| entry.deadline > deadline) else {
                continue;
            };
            if self.ready.remove(&(entry.deadline, entry.op, id)) {
                self.ready.insert((deadline, entry.op, id));
            }
            entry.deadline = deadline;
            next.extend(&entry.waits_for);
        }
    }

    /// The request to serve now; it stays until `issued`.
    pub(super) fn first(&self) -> Option<u64> {
        self.ready.first().map(|(_, _, id)| *id)
    }

    /// All of the request is in flight.
    pub(super) fn issued(&mut self, id: u64) {
        let Some(entry) = self.entries.get_mut(&id) else { return };
        entry.issued = true;
        self.ready.remove(&(entry.deadline, entry.op, id));
    }

    /// The request is finished, well or not: those that waited for it may go.
    pub(super) fn done(&mut self, id: u64) {
        self.issued(id);
        self.entries.remove(&id);
        for (waiter, entry) in &mut self.entries {
            let before = entry.waits_for.len();
            entry.waits_for.retain(|other| *other != id);
            if before > 0 && entry.waits_for.is_empty() && !entry.issued {
                self.ready.insert((entry.deadline, entry.op, *waiter));
            }
        }
    }

    /// Whether nothing is left.
    pub(super) fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn earliest_deadline_first_and_reads_before_writes_on_a_tie() {
        let mut queue = Queue::default();
        queue.push(0, Op::Write, 0..1, 5);
        queue.push(1, Op::Write, 1..2, 3);
        queue.push(2, Op::Read, 2..3, 3);
        queue.push(3, Op::Read, 3..4, 4);
        assert_eq!(serve(&mut queue), [2, 1, 3, 0]);
    }

    #[test]
    fn a_read_waits_for_the_write_of_its_bytes_and_hurries_it() {
        let mut queue = Queue::default();
        queue.push(0, Op::Write, 0..4, 9);
        queue.push(1, Op::Write, 4..8, 8);
        queue.push(2, Op::Read, 3..4, 1);
        assert_eq!(queue.first(), Some(0));
        queue.issued(0);
        assert_eq!(queue.first(), Some(1), "the read waits until the write is done");
        queue.done(0);
        assert_eq!(serve(&mut queue), [2, 1]);
        assert!(queue.is_empty());
    }

    fn serve(queue: &mut Queue) -> Vec<u64> {
        std::iter::from_fn(|| queue.first().inspect(|id| queue.done(*id))).collect()
    }

    proptest! {
        /// Whatever the deadlines, clashing requests are served in the order they came, and all are.
        #[test]
        fn every_request_is_served_and_clashes_keep_their_order(
            requests in prop::collection::vec((0u64..12, 1u64..4, any::<bool>(), 0u64..6), 1..40)
        ) {
            let mut queue = Queue::default();
            for (id, (start, len, write, deadline)) in requests.iter().enumerate() {
                let op = if *write { Op::Write } else { Op::Read };
                queue.push(id as u64, op, *start..start + len, *deadline);
            }
            let order = serve(&mut queue);
            prop_assert_eq!(order.len(), requests.len());
            for (i, a) in order.iter().enumerate() {
                for b in &order[i + 1..] {
                    let (x, y) = (requests[*a as usize], requests[*b as usize]);
                    let clash = (x.2 || y.2) && x.0 < y.0 + y.1 && y.0 < x.0 + x.1;
                    prop_assert!(!clash || a < b, "{} before {}", a, b);
                }
            }
        }
    }
}
