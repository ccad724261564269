//! One operation's worth of a request, and what to do with the system's answer. Both engines run
//! this; they differ only in how an attempt reaches the drive.

use super::faults::{Fault, Faults, Point};
use super::sums::{Mismatch, Sums};
use super::{Op, PAGE_BYTES};
use rustix::io::Errno;
use std::time::Duration;

/// Attempts in a row that may bring nothing before a transfer is given up.
const MAX_FRUITLESS: u32 = 1000;

/// How long to wait after the system said "not now".
pub(super) const PAUSE: Duration = Duration::from_millis(1);

/// Bytes of a block that the schedule owns while they are being transferred.
pub(super) struct Memory {
    ptr: *mut u8,
    len: usize,
}

// SAFETY: plain bytes; the schedule hands every range out once and keeps its block until all
// pieces are back, so a `Memory` is the only access to its bytes wherever it is.
unsafe impl Send for Memory {}

impl Memory {
    /// # Safety
    /// Until the value is gone, `ptr` must point to `len` bytes that live and that nobody else uses.
    pub(super) unsafe fn new(ptr: *mut u8, len: usize) -> Memory {
        Memory { ptr, len }
    }

    pub(super) fn bytes(&self) -> &[u8] {
        // SAFETY: see `new`.
        unsafe { std::slice::from_raw_parts(self.ptr, self.len) }
    }

    pub(super) fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: see `new`; `self` is borrowed exclusively.
        unsafe { std::slice::from_raw_parts_mut(self.ptr, self.len) }
    }
}

/// A part of a request, small enough to be one operation.
pub(super) struct Piece {
    pub(super) job: u64,
    pub(super) op: Op,
    pub(super) file_offset: u64,
    pub(super) memory: Memory,
    /// Place of the block among the ring's registered buffers.
    pub(super) slot: Option<u16>,
    /// Bytes that are through.
    pub(super) done: usize,
    fruitless: u32,
}

/// What to give to the system.
pub(super) enum Attempt {
    /// `len` bytes from `done` on.
    Run { len: usize },
    /// Nothing: a fault stands in for the answer.
    Fail(Errno),
}

/// Why a piece failed.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Trouble {
    Errno(Errno),
    /// The file ended.
    End,
    Damaged(Mismatch),
}

/// What follows from an answer.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Step {
    Again,
    /// As `Again`, after a pause.
    Later,
    Finished(Result<(), Trouble>),
}

impl Piece {
    pub(super) fn new(job: u64, op: Op, file_offset: u64, memory: Memory, slot: Option<u16>) -> Piece {
        Piece { job, op, file_offset, memory, slot, done: 0, fruitless: 0 }
    }

    pub(super) fn len(&self) -> usize {
        self.memory.len
    }

    /// Once, before the first attempt.
    pub(super) fn prepare(&self, sums: &Sums) {
        if self.op == Op::Write {
            sums.record(self.file_offset, self.memory.bytes());
        }
    }

    /// The next attempt.
    pub(super) fn attempt(&self, faults: Option<&Faults>) -> Attempt {
        let left = self.len() - self.done;
        let point = match self.op {
            Op::Read => Point::Read,
            Op::Write => Point::Write,
        };
        match faults.and_then(|faults| faults.pass(point)) {
            None => Attempt::Run { len: left },
            Some(Fault::Errno(errno)) => Attempt::Fail(errno),
            // O_DIRECT takes whole pages only: a shorter wish is no bytes, which the file's end
            // would also answer, so at least a page is asked for.
            Some(Fault::Short(bytes)) => Attempt::Run { len: whole_pages(bytes).clamp(PAGE_BYTES, left) },
        }
    }

    /// What follows from the system's answer to an attempt.
    pub(super) fn advance(&mut self, answer: Result<usize, Errno>, sums: &Sums) -> Step {
        let (moved, step) = match answer {
            Ok(0) => return Step::Finished(Err(Trouble::End)),
            // What is asked for next must begin on a page: bytes of a page cut short are moved again.
            Ok(bytes) => (whole_pages(self.done + bytes) - self.done, Step::Again),
            Err(Errno::INTR) => (0, Step::Again),
            Err(Errno::AGAIN) => (0, Step::Later),
            Err(errno) => return Step::Finished(Err(Trouble::Errno(errno))),
        };
        self.done += moved;
        if self.done >= self.len() {
            return Step::Finished(self.verify(sums));
        }
        self.fruitless = if moved > 0 { 0 } else { self.fruitless + 1 };
        if self.fruitless >= MAX_FRUITLESS {
            return Step::Finished(Err(Trouble::Errno(answer.err().unwrap_or(Errno::IO))));
        }
        step
    }

    fn verify(&self, sums: &Sums) -> Result<(), Trouble> {
        match self.op {
            Op::Read => sums.check(self.file_offset, self.memory.bytes()).map_err(Trouble::Damaged),
            Op::Write => Ok(()),
        }
    }
}

fn whole_pages(bytes: usize) -> usize {
    bytes - bytes % PAGE_BYTES
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A write of `len` bytes of its own.
    fn piece(data: &mut [u8]) -> Piece {
        // SAFETY: the tests keep `data` and touch it through the piece alone.
        let memory = unsafe { Memory::new(data.as_mut_ptr(), data.len()) };
        Piece::new(0, Op::Write, 0, memory, None)
    }

    #[test]
    fn a_short_answer_is_resumed_from_a_page() {
        let mut data = vec![1; 3 * PAGE_BYTES];
        let sums = Sums::of_zeros(data.len() as u64);
        let mut piece = piece(&mut data);
        assert_eq!(piece.advance(Ok(PAGE_BYTES + 100), &sums), Step::Again);
        assert_eq!(piece.done, PAGE_BYTES);
        assert!(matches!(piece.attempt(None), Attempt::Run { len } if len == 2 * PAGE_BYTES));
        assert_eq!(piece.advance(Ok(2 * PAGE_BYTES), &sums), Step::Finished(Ok(())));
    }

    #[test]
    fn what_never_moves_is_given_up() {
        let mut data = vec![1; PAGE_BYTES];
        let sums = Sums::of_zeros(data.len() as u64);
        for (answer, errno) in [(Err(Errno::INTR), Errno::INTR), (Ok(5), Errno::IO)] {
            let mut piece = piece(&mut data);
            let mut attempts = 0;
            let end = loop {
                attempts += 1;
                match piece.advance(answer, &sums) {
                    Step::Finished(end) => break end,
                    Step::Again | Step::Later => {}
                }
            };
            assert_eq!((attempts, end), (MAX_FRUITLESS, Err(Trouble::Errno(errno))));
        }
    }

    #[test]
    fn the_end_of_the_file_and_hard_errors_end_a_piece() {
        let mut data = vec![1; PAGE_BYTES];
        let sums = Sums::of_zeros(data.len() as u64);
        assert_eq!(piece(&mut data).advance(Ok(0), &sums), Step::Finished(Err(Trouble::End)));
        let broken = piece(&mut data).advance(Err(Errno::IO), &sums);
        assert_eq!(broken, Step::Finished(Err(Trouble::Errno(Errno::IO))));
    }
}
