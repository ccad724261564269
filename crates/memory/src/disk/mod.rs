//! The lowest tier: one offload file on a drive, read and written in blocks that the caller owns.
//!
//! A file is cut into named regions. Requests name a region, an offset and a part of a [`Block`];
//! the block moves into the request and comes back with the [`Ticket`]. Requests with the earliest
//! deadline are served first; those that touch the same bytes keep their order. Every page is
//! compared with a checksum kept in memory, so wrong bytes are an error and never data.
//!
//! This room never learns what the bytes mean. See docs/disk.md.

mod block;
mod error;
mod faults;
mod figures;
mod file;
#[allow(unsafe_code)]
mod piece;
mod queue;
#[allow(unsafe_code)]
mod ring;
#[allow(unsafe_code)]
mod schedule;
mod slots;
mod sums;
mod threads;

pub use block::Block;
pub use error::{DiskError, Place};
pub use faults::{Fault, Faults, Point};
pub use figures::{DriveFigures, Effort, Trial, measure};

use device::OutOfMemory;
use file::OffloadFile;
use rustix::io::Errno;
use schedule::{Job, Schedule};
use slots::Slots;
use std::fmt;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;
use sums::Sums;

/// What offsets, lengths and memory are multiples of.
pub const PAGE_BYTES: usize = 4096;

/// Direction of a transfer. Reads come first where deadlines tie: somebody waits for them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Op {
    /// From the drive.
    Read,
    /// To the drive.
    Write,
}

impl fmt::Display for Op {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Op::Read => "read",
            Op::Write => "write",
        })
    }
}

/// A region of the offload file: its place in the layout given to [`Disk::create`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Region(pub usize);

/// What a [`Disk`] may use.
#[derive(Clone, Debug)]
pub struct Options {
    /// Operations in flight at most (1 to 64; the pool of threads has 8).
    pub depth: usize,
    /// Bytes of one operation at most; rounded up to pages.
    pub block_bytes: usize,
    /// Whether io_uring may be used; without it, or where the system forbids it, a pool of threads
    /// does the same work.
    pub ring: bool,
    /// Failures on demand, for tests.
    pub faults: Option<Arc<Faults>>,
}

impl Default for Options {
    fn default() -> Options {
        Options { depth: 8, block_bytes: 1 << 20, ring: true, faults: None }
    }
}

/// A transfer: `range` of `block` from or to `region` at `offset`, all multiples of 4096.
#[derive(Debug)]
pub struct Request {
    /// Which region.
    pub region: Region,
    /// First byte, counted from the region's start.
    pub offset: u64,
    /// Memory; comes back with the ticket.
    pub block: Block,
    /// Its part that is read into or written from.
    pub range: Range<usize>,
    /// Moment by which the bytes are wanted; earlier ones are served first.
    pub deadline: u64,
}

/// A request that failed. After a failed read the range holds ones (NaN in every float type).
#[derive(Debug)]
pub struct Failed {
    /// Why.
    pub error: DiskError,
    /// The memory; absent only when the engine's thread itself died with it.
    pub block: Option<Block>,
}

impl fmt::Display for Failed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.error.fmt(f)
    }
}

impl std::error::Error for Failed {}

impl From<Failed> for DiskError {
    fn from(failed: Failed) -> DiskError {
        failed.error
    }
}

/// What an engine did since it began.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Bytes asked from the drive, failed operations included.
    pub read_bytes: u64,
    /// Bytes given to the drive, failed operations included.
    pub written_bytes: u64,
    /// Requests ended, well or not.
    pub requests: u64,
    /// Time during which anything was in flight.
    pub busy: Duration,
}

/// What serves the requests of a [`Disk`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Engine {
    /// One thread with an io_uring.
    Ring,
    /// A pool of threads with `pread` and `pwrite`.
    Threads {
        /// Why not the ring.
        why: String,
    },
}

impl fmt::Display for Engine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Engine::Ring => f.write_str("io_uring"),
            Engine::Threads { why } => write!(f, "pread and pwrite on {} threads ({why})", threads::THREADS),
        }
    }
}

/// A promise of a block.
#[derive(Debug)]
pub struct Ticket {
    reply: Receiver<Result<Block, Failed>>,
}

impl Ticket {
    /// Waits until the transfer is over; the block comes back either way.
    pub fn wait(self) -> Result<Block, Failed> {
        self.reply.recv().unwrap_or_else(|_| Err(Failed { error: DiskError::Closed, block: None }))
    }

    /// As `wait`, for at most `patience`; the ticket comes back when that was too short.
    pub fn wait_for(self, patience: Duration) -> Result<Result<Block, Failed>, Ticket> {
        match self.reply.recv_timeout(patience) {
            Ok(result) => Ok(result),
            Err(RecvTimeoutError::Timeout) => Err(self),
            Err(RecvTimeoutError::Disconnected) => Ok(Err(Failed { error: DiskError::Closed, block: None })),
        }
    }
}

/// What the engine's threads share with the handle.
struct Shared {
    file: OffloadFile,
    sums: Arc<Sums>,
    schedule: Mutex<Schedule>,
    /// Wakes the pool.
    wake: Condvar,
    /// Wakes the ring.
    event: OwnedFd,
    faults: Option<Arc<Faults>>,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Schedule> {
        self.schedule.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'a>(&self, schedule: MutexGuard<'a, Schedule>) -> MutexGuard<'a, Schedule> {
        self.wake.wait(schedule).unwrap_or_else(PoisonError::into_inner)
    }

    fn wake_all(&self) {
        self.wake.notify_all();
        // Fails only when the count is at its limit: then the ring is awake.
        rustix::io::write(&self.event, &1u64.to_ne_bytes()).ok();
    }

    fn faults(&self) -> Option<&Faults> {
        self.faults.as_deref()
    }
}

struct Extent {
    name: String,
    start: u64,
    len: u64,
}

/// An offload file and the engine that serves it. Dropping it frees the space.
pub struct Disk {
    shared: Arc<Shared>,
    slots: Arc<Slots>,
    regions: Vec<Extent>,
    threads: Vec<JoinHandle<()>>,
    engine: Engine,
}

impl Disk {
    /// Reserves a file in `dir` for the regions of `layout` (name, bytes; rounded up to pages) and
    /// starts its engine. Every region begins as zeros.
    pub fn create(dir: &Path, layout: &[(&str, u64)], options: Options) -> Result<Disk, DiskError> {
        let (mut regions, mut total) = (Vec::new(), 0u64);
        for (name, bytes) in layout {
            let too_large =
                DiskError::NoSpace { dir: dir.to_path_buf(), need_bytes: u64::MAX, free_bytes: 0 };
            let len = bytes.checked_next_multiple_of(PAGE_BYTES as u64).ok_or(too_large.clone())?;
            regions.push(Extent { name: name.to_string(), start: total, len });
            total = total.checked_add(len).filter(|total| *total < i64::MAX as u64).ok_or(too_large)?;
        }
        let total = total.max(PAGE_BYTES as u64);
        let file = OffloadFile::create(dir, total, options.faults.as_deref())?;
        let slots = Arc::new(Slots::default());
        let event = ring::new_event().map_err(|cause| DiskError::Thread { cause: cause.to_string() })?;
        let ready = match options.ring {
            true => Faults::refuse(options.faults.as_deref(), Point::Ring).and_then(|()| ring::probe(&file)),
            false => Err(Errno::CANCELED),
        };
        let max_depth = if ready.is_ok() { ring::MAX_DEPTH } else { threads::THREADS };
        let sums = Arc::new(Sums::of_zeros(total));
        let shared = Arc::new(Shared {
            file,
            schedule: Mutex::new(Schedule::new(max_depth, slots.clone(), sums.clone())),
            sums,
            wake: Condvar::new(),
            event,
            faults: options.faults,
        });
        shared.lock().tune(options.depth, options.block_bytes);
        let (threads, engine) = match ready {
            Ok(ready) => (vec![ring::start(&shared, slots.clone(), ready)?], Engine::Ring),
            Err(cause) => {
                let why = if options.ring { format!("io_uring: {cause}") } else { "as asked".into() };
                (threads::start(&shared)?, Engine::Threads { why })
            }
        };
        Ok(Disk { shared, slots, regions, threads, engine })
    }

    /// Changes how many operations are in flight at most and how large one is at most.
    pub fn tune(&self, depth: usize, block_bytes: usize) {
        self.shared.lock().tune(depth, block_bytes);
        self.shared.wake_all();
    }

    /// What serves the requests.
    pub fn engine(&self) -> &Engine {
        &self.engine
    }

    /// Memory of at least `bytes` for transfers with this disk, registered with its ring where it
    /// has one.
    pub fn block(&self, bytes: usize) -> Result<Block, OutOfMemory> {
        let mut block = Block::new(bytes)?;
        if self.engine == Engine::Ring {
            block.slot = self.slots.take();
        }
        Ok(block)
    }

    /// The region called `name` in the layout.
    pub fn region(&self, name: &str) -> Option<Region> {
        self.regions.iter().position(|extent| extent.name == name).map(Region)
    }

    /// Begins to fill the request's range from the drive.
    pub fn submit_read(&self, request: Request) -> Ticket {
        self.submit(Op::Read, request)
    }

    /// Begins to write the request's range to the drive.
    pub fn submit_write(&self, request: Request) -> Ticket {
        self.submit(Op::Write, request)
    }

    fn submit(&self, op: Op, request: Request) -> Ticket {
        let (sender, reply) = channel();
        // Nobody may wait any more: then the block is dropped.
        self.submit_then(op, request, move |result| drop(sender.send(result)));
        Ticket { reply }
    }

    /// Begins a transfer and tells `then` how it ended, on the engine's thread: what it does holds up
    /// other transfers, and must not submit one itself.
    pub fn submit_then(
        &self,
        op: Op,
        request: Request,
        then: impl FnOnce(Result<Block, Failed>) + Send + 'static,
    ) {
        let Request { region, offset, block, range, deadline } = request;
        let extent = self.regions.get(region.0);
        let place = Place {
            dir: self.shared.file.dir.clone(),
            region: extent.map_or_else(|| format!("number {}", region.0), |extent| extent.name.clone()),
            offset,
            len: range.len() as u64,
        };
        let start = match allowed(extent, offset, &range, block.len()) {
            Ok(start) => start,
            Err(why) => {
                let error = DiskError::Refused { place, why };
                return then(Err(Failed { error, block: Some(block) }));
            }
        };
        let then = Box::new(then);
        let job = Job { op, place, file_offset: start + offset, block, range, deadline, then };
        let refused = self.shared.lock().submit(job);
        self.shared.wake_all();
        if let Some(finished) = refused {
            finished.deliver();
        }
    }

    /// Whether transfers go past the page cache.
    pub fn is_direct(&self) -> bool {
        self.shared.file.direct
    }

    /// Memory of the checksums: 4 bytes for each 4096 of the file.
    pub fn table_bytes(&self) -> usize {
        self.shared.sums.table_bytes()
    }

    /// What was done so far.
    pub fn counters(&self) -> Counters {
        self.shared.lock().counters
    }
}

/// The region's start when the request keeps the rules, else the rule it breaks.
fn allowed(
    extent: Option<&Extent>,
    offset: u64,
    range: &Range<usize>,
    block: usize,
) -> Result<u64, &'static str> {
    let whole = |bytes: u64| bytes.is_multiple_of(PAGE_BYTES as u64);
    let extent = extent.ok_or("there is no such region")?;
    if range.start >= range.end {
        return Err("it is empty");
    }
    if range.end > block {
        return Err("its range ends beyond its block");
    }
    if !(whole(offset) && whole(range.start as u64) && whole(range.end as u64)) {
        return Err("offset and range must be multiples of 4096");
    }
    match offset.checked_add(range.len() as u64) {
        Some(end) if end <= extent.len => Ok(extent.start),
        _ => Err("it ends beyond the region"),
    }
}

impl AsFd for Disk {
    /// The offload file itself.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.shared.file.as_fd()
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let finished = self.shared.lock().close();
        self.shared.wake_all();
        finished.into_iter().for_each(|finished| finished.deliver());
        for thread in self.threads.drain(..) {
            thread.join().ok();
        }
    }
}

#[cfg(test)]
mod tests;
