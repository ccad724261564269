//! The engine of choice: one thread that owns an io_uring, with the file and the blocks registered.
//!
//! The thread sleeps in the kernel until a transfer ends or a new request pokes its eventfd.

use super::error::DiskError;
use super::file::OffloadFile;
use super::piece::{Attempt, PAUSE, Piece, Step, Trouble};
use super::slots::{SLOTS, Slots};
use super::{Op, PAGE_BYTES, Shared};
use io_uring::types::{Fd, Fixed};
use io_uring::{IoUring, opcode, squeue};
use rustix::event::EventfdFlags;
use rustix::io::Errno;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::Arc;
use std::thread::JoinHandle;

/// Operations in flight at most.
pub(super) const MAX_DEPTH: usize = 64;

/// Entries of the ring: every operation and the eventfd, with room.
const ENTRIES: u32 = 128;

/// `user_data` of the eventfd; pieces count from 0.
const POKE: u64 = u64::MAX;

/// The offload file in the ring's table.
const FILE: Fixed = Fixed(0);

/// A ring that has proved itself on this file.
pub(super) struct Ready {
    ring: IoUring,
    /// Whether the kernel takes registered buffers.
    registers: bool,
}

/// Sets a ring up and reads a page with it: systems forbid it in many ways (EPERM and ENOSYS from
/// seccomp, ENOMEM from limits), some only when it is used.
pub(super) fn probe(file: &OffloadFile) -> Result<Ready, Errno> {
    let errno = |error: std::io::Error| Errno::from_io_error(&error).unwrap_or(Errno::IO);
    let mut ring = IoUring::new(ENTRIES).map_err(errno)?;
    ring.submitter().register_files(&[file.as_fd().as_raw_fd()]).map_err(errno)?;
    let registers = ring.submitter().register_buffers_sparse(SLOTS.into()).is_ok();
    let mut page = Box::new(Page([0; PAGE_BYTES]));
    let read = opcode::Read::new(FILE, page.0.as_mut_ptr(), PAGE_BYTES as u32).build();
    // SAFETY: the page lives until the answer is here; without one it is leaked below.
    let pushed = unsafe { ring.submission().push(&read) };
    pushed.map_err(|_| Errno::IO)?;
    let waited = loop {
        match ring.submit_and_wait(1).map_err(errno) {
            Err(Errno::INTR) => continue,
            waited => break waited,
        }
    };
    let answer = ring.completion().next().map(|answer| answer.result());
    match (waited, answer) {
        (Ok(_), Some(bytes)) if bytes == PAGE_BYTES as i32 => Ok(Ready { ring, registers }),
        (Ok(_), Some(result)) => Err(if result < 0 { Errno::from_raw_os_error(-result) } else { Errno::IO }),
        (waited, _) => {
            Box::leak(page);
            Err(waited.err().unwrap_or(Errno::IO))
        }
    }
}

#[repr(align(4096))]
struct Page([u8; PAGE_BYTES]);

/// The eventfd by which requests wake the ring's thread.
pub(super) fn new_event() -> Result<OwnedFd, Errno> {
    rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
}

/// Starts the thread. It ends when the schedule is closed and empty.
pub(super) fn start(
    shared: &Arc<Shared>,
    slots: Arc<Slots>,
    ready: Ready,
) -> Result<JoinHandle<()>, DiskError> {
    let flying = (0..MAX_DEPTH).map(|_| None).collect();
    let Ready { ring, registers } = ready;
    let engine = Engine { ring, shared: shared.clone(), slots, registers, flying, poke_armed: false };
    let named = std::thread::Builder::new().name("disk-ring".into());
    named.spawn(move || engine.run()).map_err(|cause| DiskError::Thread { cause: cause.to_string() })
}

struct Engine {
    ring: IoUring,
    shared: Arc<Shared>,
    slots: Arc<Slots>,
    registers: bool,
    /// Pieces by their `user_data`.
    flying: Vec<Option<Piece>>,
    poke_armed: bool,
}

impl Engine {
    fn run(mut self) {
        loop {
            self.forget_dropped_blocks();
            if self.take_off() {
                return;
            }
            self.arm_poke();
            match self.ring.submit_and_wait(1) {
                Ok(_) => {}
                Err(error) => match Errno::from_io_error(&error) {
                    Some(Errno::INTR) => {}
                    // The kernel is short of memory or of room for answers: take those first.
                    Some(Errno::AGAIN | Errno::BUSY) => std::thread::sleep(PAUSE),
                    // Nothing can be known of what is in flight: `drop` tells everyone who waits.
                    _ => return,
                },
            }
            self.land_all();
        }
    }

    /// Starts pieces until the schedule has none for us; true when there will never be another.
    fn take_off(&mut self) -> bool {
        loop {
            let mut schedule = self.shared.lock();
            let Some(mut piece) = schedule.next_piece() else { return schedule.closed && schedule.is_idle() };
            let unknown = schedule.unknown_slot(piece.job).filter(|_| self.registers);
            drop(schedule);
            if let Some((index, start, len)) = unknown {
                let known = self.register(index, start, len);
                self.shared.lock().introduced(piece.job, known);
                piece.slot = known.then_some(index);
            }
            piece.prepare(&self.shared.sums);
            // The schedule keeps to the depth, which is at most the number of places.
            let Some(place) = self.flying.iter().position(Option::is_none) else {
                self.settle(piece, Err(Trouble::Errno(Errno::BUSY)));
                continue;
            };
            self.flying[place] = Some(piece);
            self.launch(place);
            // At once: the drive works while the next piece's sums are taken.
            self.ring.submit().ok();
        }
    }

    /// Gives the piece at `place` to the kernel.
    fn launch(&mut self, place: usize) {
        while let Some(piece) = self.flying[place].as_mut() {
            let answer = match piece.attempt(self.shared.faults()) {
                Attempt::Fail(errno) => Err(errno),
                Attempt::Run { len } => {
                    let entry = entry(piece, len).user_data(place as u64);
                    if self.push(&entry) {
                        return;
                    }
                    Err(Errno::AGAIN)
                }
            };
            if !self.answer(place, answer) {
                return;
            }
        }
    }

    fn push(&mut self, entry: &squeue::Entry) -> bool {
        // SAFETY: the memory of `entry` is that of a piece in `flying`, which stays there until
        // the kernel answered; should this thread end before, `drop` leaks the memory.
        unsafe { self.ring.submission().push(entry) }.is_ok()
    }

    /// Takes an answer; true when the piece at `place` needs another attempt.
    fn answer(&mut self, place: usize, answer: Result<usize, Errno>) -> bool {
        let Some(piece) = self.flying[place].as_mut() else { return false };
        match piece.advance(answer, &self.shared.sums) {
            Step::Again => true,
            Step::Later => {
                std::thread::sleep(PAUSE);
                true
            }
            Step::Finished(result) => {
                if let Some(piece) = self.flying[place].take() {
                    self.settle(piece, result);
                }
                false
            }
        }
    }

    fn settle(&self, piece: Piece, result: Result<(), Trouble>) {
        let finished = self.shared.lock().finish(piece, result);
        if let Some(finished) = finished {
            finished.deliver();
        }
    }

    /// Takes every answer the kernel has.
    fn land_all(&mut self) {
        let answers: Vec<(u64, i32)> =
            self.ring.completion().map(|answer| (answer.user_data(), answer.result())).collect();
        for (place, result) in answers {
            if place == POKE {
                self.poke_armed = false;
                // Resets the count; that it was already 0 is no harm.
                rustix::io::read(&self.shared.event, &mut [0u8; 8]).ok();
                continue;
            }
            let answer = match usize::try_from(result) {
                Ok(bytes) => Ok(bytes),
                Err(_) => Err(Errno::from_raw_os_error(-result)),
            };
            if self.answer(place as usize, answer) {
                self.launch(place as usize);
            }
        }
    }

    fn arm_poke(&mut self) {
        if !self.poke_armed {
            let event = Fd(self.shared.event.as_fd().as_raw_fd());
            let poll = opcode::PollAdd::new(event, libc::POLLIN as u32).build().user_data(POKE);
            self.poke_armed = self.push(&poll);
        }
    }

    /// Tells the kernel a block's memory. A refusal (limits on locked memory, blocks beyond 1 GiB)
    /// only costs speed.
    fn register(&self, index: u16, start: *mut u8, len: usize) -> bool {
        let memory = libc::iovec { iov_base: start.cast(), iov_len: len };
        // SAFETY: only the block that owns the slot is transferred through it, and while it is the
        // memory lives; dropped blocks are forgotten before their slot is taken again.
        unsafe { self.ring.submitter().register_buffers_update(index.into(), &[memory], None) }.is_ok()
    }

    fn forget_dropped_blocks(&mut self) {
        let stale = self.slots.stale();
        let forgotten = stale.into_iter().filter(|index| self.register(*index, std::ptr::null_mut(), 0));
        self.slots.recycle(forgotten.collect());
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        // Only after a panic or a dead ring: the kernel may still write into what is in flight.
        self.shared.lock().wreck();
    }
}

fn entry(piece: &mut Piece, len: usize) -> squeue::Entry {
    let at = piece.file_offset + piece.done as u64;
    let (done, op, slot, len32) = (piece.done, piece.op, piece.slot, len as u32);
    let memory = piece.memory.bytes_mut()[done..done + len].as_mut_ptr();
    match (op, slot) {
        (Op::Read, Some(slot)) => opcode::ReadFixed::new(FILE, memory, len32, slot).offset(at).build(),
        (Op::Read, None) => opcode::Read::new(FILE, memory, len32).offset(at).build(),
        (Op::Write, Some(slot)) => opcode::WriteFixed::new(FILE, memory, len32, slot).offset(at).build(),
        (Op::Write, None) => opcode::Write::new(FILE, memory, len32).offset(at).build(),
    }
}
