//! Requests under way: cuts them into pieces in the order of the queue, and puts them together again.

use super::block::Block;
use super::error::{DiskError, Place};
use super::piece::{Memory, Piece, Trouble};
use super::queue::Queue;
use super::slots::Slots;
use super::sums::Sums;
use super::{Counters, Failed, Op, PAGE_BYTES};
use rustix::io::Errno;
use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;

/// Largest operation: its length must fit the ring's 32 bits, and one operation must not hold up
/// an urgent one for long.
const MAX_BLOCK_BYTES: usize = 64 << 20;

/// A request the engine has taken.
pub(super) struct Job {
    pub(super) op: Op,
    pub(super) place: Place,
    pub(super) file_offset: u64,
    pub(super) block: Block,
    /// The part of the block that is read or written.
    pub(super) range: Range<usize>,
    pub(super) deadline: u64,
    pub(super) then: Then,
}

/// Who is told how a request ended.
pub(super) type Then = Box<dyn FnOnce(Result<Block, Failed>) + Send>;

struct Active {
    job: Job,
    /// Start of the block, whose bytes are not touched through `job` while pieces are out.
    start: *mut u8,
    /// Bytes cut into pieces so far.
    cut: usize,
    /// Bytes not yet back.
    left: usize,
    error: Option<DiskError>,
}

// SAFETY: `start` points into the job's own block, which moves with it.
unsafe impl Send for Active {}

/// The engine's whole state.
pub(super) struct Schedule {
    queue: Queue,
    active: HashMap<u64, Active>,
    next: u64,
    in_flight: usize,
    /// What the engine can have in flight.
    max_depth: usize,
    /// Operations in flight at most.
    depth: usize,
    /// Bytes of an operation at most, a multiple of the page.
    block_bytes: usize,
    pub(super) closed: bool,
    pub(super) counters: Counters,
    busy_since: Option<Instant>,
    slots: Arc<Slots>,
    sums: Arc<Sums>,
}

/// A request that is through, to be told to whoever waits, outside the lock.
#[must_use]
pub(super) struct Finished {
    then: Then,
    result: Result<Block, Failed>,
}

impl Finished {
    pub(super) fn deliver(self) {
        (self.then)(self.result);
    }
}

impl Schedule {
    pub(super) fn new(max_depth: usize, slots: Arc<Slots>, sums: Arc<Sums>) -> Schedule {
        Schedule {
            queue: Queue::default(),
            active: HashMap::new(),
            next: 0,
            in_flight: 0,
            max_depth,
            depth: max_depth,
            block_bytes: MAX_BLOCK_BYTES,
            closed: false,
            counters: Counters::default(),
            busy_since: None,
            slots,
            sums,
        }
    }

    /// Sets depth and size of operations, each within what an engine can do.
    pub(super) fn tune(&mut self, depth: usize, block_bytes: usize) {
        self.depth = depth.clamp(1, self.max_depth);
        self.block_bytes = block_bytes.clamp(PAGE_BYTES, MAX_BLOCK_BYTES).next_multiple_of(PAGE_BYTES);
    }

    /// Takes a request; it is told at once when the engine is closed.
    pub(super) fn submit(&mut self, mut job: Job) -> Option<Finished> {
        if self.closed {
            let failed = Failed { error: DiskError::Closed, block: Some(job.block) };
            return Some(Finished { then: job.then, result: Err(failed) });
        }
        let (id, left) = (self.next, job.range.len());
        self.next += 1;
        self.queue.push(id, job.op, job.file_offset..job.file_offset + left as u64, job.deadline);
        let start = job.block.bytes_mut().as_mut_ptr();
        self.active.insert(id, Active { job, start, cut: 0, left, error: None });
        None
    }

    /// The next operation, when there is one and the drive may have it.
    pub(super) fn next_piece(&mut self) -> Option<Piece> {
        if self.in_flight >= self.depth {
            return None;
        }
        let id = self.queue.first()?;
        let active = self.active.get_mut(&id)?;
        let len = self.block_bytes.min(active.job.range.len() - active.cut);
        // SAFETY: cut ranges never overlap and lie in the job's range; the block stays in `active`
        // until every piece is back and nobody opens it before.
        let memory = unsafe { Memory::new(active.start.add(active.job.range.start + active.cut), len) };
        let offset = active.job.file_offset + active.cut as u64;
        let slot = active.job.block.slot.as_ref().filter(|slot| slot.known && slot.is_of(&self.slots));
        let piece = Piece::new(id, active.job.op, offset, memory, slot.map(|slot| slot.index));
        active.cut += len;
        if active.cut == active.job.range.len() {
            self.queue.issued(id);
        }
        self.in_flight += 1;
        self.busy_since.get_or_insert_with(Instant::now);
        Some(piece)
    }

    /// Takes a piece back; its request when that was the last one.
    pub(super) fn finish(&mut self, piece: Piece, result: Result<(), Trouble>) -> Option<Finished> {
        self.in_flight -= 1;
        if self.in_flight == 0 {
            self.counters.busy +=
                self.busy_since.take().map_or_else(Default::default, |since| since.elapsed());
        }
        let (id, len) = (piece.job, piece.len());
        match piece.op {
            Op::Read => self.counters.read_bytes += len as u64,
            Op::Write => self.counters.written_bytes += len as u64,
        }
        let active = self.active.get_mut(&id)?;
        active.left -= len;
        if let Err(trouble) = result {
            let at = piece.file_offset - active.job.file_offset;
            let error = explain(&active.job, at, len as u64, trouble);
            self.abandon(id, error);
        }
        self.settle(id)
    }

    /// No further piece of a request is cut; its first error stands.
    fn abandon(&mut self, id: u64, error: DiskError) {
        let Some(active) = self.active.get_mut(&id) else { return };
        active.error.get_or_insert(error);
        active.left -= active.job.range.len() - active.cut;
        active.cut = active.job.range.len();
        self.queue.issued(id);
    }

    /// Ends a request of which nothing is left.
    fn settle(&mut self, id: u64) -> Option<Finished> {
        if self.active.get(&id)?.left > 0 {
            return None;
        }
        let Active { job, error, .. } = self.active.remove(&id)?;
        self.counters.requests += 1;
        let Job { op, file_offset, mut block, range, then, .. } = job;
        if error.is_some() && op == Op::Write {
            self.sums.spoil(file_offset, range.len());
        }
        // Only now may those that waited for these bytes go.
        self.queue.done(id);
        let result = match error {
            None => Ok(block),
            Some(error) => {
                if op == Op::Read {
                    // All ones are NaN in every float type: nobody trains on half-read bytes.
                    block.bytes_mut()[range].fill(0xff);
                }
                Err(Failed { error, block: Some(block) })
            }
        };
        Some(Finished { then, result })
    }

    /// Takes no more requests and drops those not begun; what is in flight comes back as usual.
    pub(super) fn close(&mut self) -> Vec<Finished> {
        self.closed = true;
        let ids: Vec<u64> = self.active.keys().copied().collect();
        for id in &ids {
            if self.active[id].cut < self.active[id].job.range.len() {
                self.abandon(*id, DiskError::Closed);
            }
        }
        ids.into_iter().filter_map(|id| self.settle(id)).collect()
    }

    /// Place and memory of a request's block, if it has a place that the ring does not know.
    pub(super) fn unknown_slot(&self, id: u64) -> Option<(u16, *mut u8, usize)> {
        let active = self.active.get(&id)?;
        let slot = active.job.block.slot.as_ref().filter(|slot| slot.is_of(&self.slots) && !slot.known)?;
        Some((slot.index, active.start, active.job.block.len()))
    }

    /// The ring knows the block's place now, or refused it: then the block goes without.
    pub(super) fn introduced(&mut self, id: u64, known: bool) {
        let Some(active) = self.active.get_mut(&id) else { return };
        match active.job.block.slot.as_mut() {
            Some(slot) if known => slot.known = true,
            _ => active.job.block.slot = None,
        }
    }

    /// The engine died: everyone who waits is told, and memory the kernel may still write into is
    /// never used again. Nothing happens when nothing is under way.
    pub(super) fn wreck(&mut self) {
        self.closed = true;
        for (_, active) in self.active.drain() {
            std::mem::forget(active.job.block);
            (active.job.then)(Err(Failed { error: DiskError::Closed, block: None }));
        }
        self.queue = Queue::default();
    }

    /// Whether nothing waits and nothing is in flight.
    pub(super) fn is_idle(&self) -> bool {
        self.queue.is_empty() && self.in_flight == 0
    }
}

fn explain(job: &Job, at: u64, len: u64, trouble: Trouble) -> DiskError {
    let op = job.op;
    let place = Place { offset: job.place.offset + at, len, ..job.place.clone() };
    match trouble {
        Trouble::Errno(Errno::NOSPC | Errno::DQUOT) if op == Op::Write => DiskError::Full { place },
        Trouble::Errno(cause) => DiskError::Io { op, place, cause },
        Trouble::End => DiskError::Truncated { op, place },
        Trouble::Damaged(bad) => {
            let place = Place { offset: place.offset + bad.at as u64, len: PAGE_BYTES as u64, ..place };
            DiskError::Damaged { place, found: bad.found, want: bad.want }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc::{Receiver, channel};

    type Reply = Receiver<Result<Block, Failed>>;

    const PAGE: usize = PAGE_BYTES;

    /// A schedule of operations of one page, two in flight.
    fn schedule() -> Schedule {
        let mut schedule = Schedule::new(8, Arc::default(), Arc::new(Sums::of_zeros(64 * PAGE as u64)));
        schedule.tune(2, PAGE);
        schedule
    }

    fn submit(schedule: &mut Schedule, op: Op, page: u64, pages: usize, deadline: u64) -> Reply {
        let (reply, receiver) = channel();
        let place = Place { dir: "x".into(), region: "m".into(), offset: 0, len: (pages * PAGE) as u64 };
        let block = Block::new(pages * PAGE).unwrap();
        let (file_offset, range) = (page * PAGE as u64, 0..block.len());
        let then = Box::new(move |result| drop(reply.send(result)));
        let refused = schedule.submit(Job { op, place, file_offset, block, range, deadline, then });
        assert!(refused.is_none());
        receiver
    }

    /// Takes a piece: the page of the file it is for.
    fn take(schedule: &mut Schedule) -> Option<(u64, Piece)> {
        schedule.next_piece().map(|piece| (piece.file_offset / PAGE as u64, piece))
    }

    #[test]
    fn an_urgent_request_overtakes_between_the_pieces_of_another() {
        let mut schedule = schedule();
        let slow = submit(&mut schedule, Op::Write, 0, 3, 9);
        let (page, first) = take(&mut schedule).unwrap();
        assert_eq!(page, 0);
        let urgent = submit(&mut schedule, Op::Read, 10, 1, 1);
        let (page, second) = take(&mut schedule).unwrap();
        assert_eq!(page, 10, "the urgent read is next");
        assert!(take(&mut schedule).is_none(), "two are in flight");
        assert!(schedule.finish(first, Ok(())).is_none());
        schedule.finish(second, Ok(())).unwrap().deliver();
        assert_eq!(urgent.recv().unwrap().unwrap().len(), PAGE);
        for page in [1, 2] {
            let (at, piece) = take(&mut schedule).unwrap();
            assert_eq!(at, page);
            if let Some(finished) = schedule.finish(piece, Ok(())) {
                finished.deliver();
            }
        }
        assert!(slow.recv().unwrap().is_ok() && schedule.is_idle());
        assert_eq!(
            (schedule.counters.read_bytes, schedule.counters.written_bytes),
            (PAGE as u64, 3 * PAGE as u64)
        );
    }

    #[test]
    fn after_an_error_no_more_pieces_are_cut_and_those_in_flight_are_awaited() {
        let mut schedule = schedule();
        let reply = submit(&mut schedule, Op::Write, 4, 5, 0);
        let (_, first) = take(&mut schedule).unwrap();
        let (_, second) = take(&mut schedule).unwrap();
        assert!(
            schedule.finish(second, Err(Trouble::Errno(Errno::NOSPC))).is_none(),
            "the first is still out"
        );
        assert!(take(&mut schedule).is_none());
        schedule.finish(first, Ok(())).unwrap().deliver();
        let failed = reply.recv().unwrap().unwrap_err();
        assert!(failed.block.is_some() && failed.to_string().contains("4096 bytes at 4096"), "{failed}");
        let zeros = [0; 5 * PAGE];
        assert!(schedule.sums.check(4 * PAGE as u64, &zeros).is_err(), "nothing of it can be read as good");
    }

    #[test]
    fn a_dead_engine_tells_everyone_and_takes_no_more() {
        let mut schedule = schedule();
        let (flying, waiting) =
            (submit(&mut schedule, Op::Read, 0, 1, 0), submit(&mut schedule, Op::Read, 1, 1, 0));
        let (_, piece) = take(&mut schedule).unwrap();
        schedule.wreck();
        for reply in [flying, waiting] {
            assert_eq!(reply.recv().unwrap().unwrap_err().error, DiskError::Closed);
        }
        assert!(schedule.finish(piece, Ok(())).is_none() && schedule.is_idle());
        let (reply, receiver) = channel();
        let place = Place { dir: "x".into(), region: "m".into(), offset: 0, len: PAGE as u64 };
        let block = Block::new(PAGE).unwrap();
        let then = Box::new(move |result| drop(reply.send(result)));
        let job = Job { op: Op::Read, place, file_offset: 0, block, range: 0..PAGE, deadline: 0, then };
        schedule.submit(job).unwrap().deliver();
        assert!(receiver.recv().unwrap().unwrap_err().block.is_some());
    }
}
