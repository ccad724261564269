//! Processes over MPI. One thread of the rank makes every MPI call: it sends what is queued and takes
//! what comes, so that MPI progresses while the rank computes and no two sends can block each other.

use super::frame::{HEADER_BYTES, Header, Kind};
use super::office::Office;
use super::post::Post;
use crate::CommError;
use crate::beside::Array;
use device::{DType, Device};
use mpi::Threading;
use mpi::request::scope;
use mpi::topology::SimpleCommunicator;
use mpi::traits::{Communicator, Destination, Equivalence, Source};
use std::io;
use std::sync::mpsc::{Receiver, SyncSender, TryRecvError, TrySendError, channel, sync_channel};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Messages that wait to be sent; whoever sends more waits.
const QUEUED: usize = 64;
/// Sends under way at once. One to a rank that has stopped may never end; those behind it go past.
const UNDER_WAY: usize = 48;
/// How long the thread may take to send the last messages of a run that failed; one to a rank that has
/// stopped never leaves, and the end of our process makes the launcher end the job.
const FAREWELL: Duration = Duration::from_millis(500);
/// How long the thread sleeps when nothing came and nothing is to be sent: a core is worth more than
/// these microseconds.
const IDLE: Duration = Duration::from_micros(50);

enum Job {
    Office(Weak<Office>),
    Send(usize, Vec<u8>),
    /// Finalize MPI, or leave that to the launcher when the run failed.
    Close(bool),
}

pub(super) struct Mpi {
    jobs: SyncSender<Job>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl Mpi {
    pub(super) fn send(&self, to: usize, header: &Header, bytes: &[u8], limit: Duration) -> io::Result<()> {
        if HEADER_BYTES + bytes.len() > i32::MAX as usize {
            let what = format!("{} bytes are more than an MPI message holds; cut the array", bytes.len());
            return Err(io::Error::new(io::ErrorKind::InvalidInput, what));
        }
        let mut message = Vec::with_capacity(HEADER_BYTES + bytes.len());
        message.extend_from_slice(&header.encode());
        message.extend_from_slice(bytes);
        let start = Instant::now();
        let mut job = Job::Send(to, message);
        loop {
            job = match self.jobs.try_send(job) {
                Ok(()) => return Ok(()),
                Err(TrySendError::Disconnected(_)) => return Err(io::ErrorKind::NotConnected.into()),
                Err(TrySendError::Full(_)) if start.elapsed() > limit => {
                    return Err(io::ErrorKind::WouldBlock.into());
                }
                Err(TrySendError::Full(job)) => job,
            };
            std::thread::sleep(IDLE);
        }
    }

    pub(super) fn close(&self, failed: bool) {
        let Some(thread) = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take() else { return };
        let start = Instant::now();
        let mut job = Job::Close(failed);
        while let Err(TrySendError::Full(back)) = self.jobs.try_send(job) {
            if failed && start.elapsed() > FAREWELL {
                return;
            }
            job = back;
            std::thread::sleep(IDLE);
        }
        while failed && !thread.is_finished() {
            if start.elapsed() > FAREWELL {
                return;
            }
            std::thread::sleep(IDLE);
        }
        // Its panic was printed; there is nothing left to say to MPI.
        drop(thread.join());
    }
}

/// Starts MPI; its launcher decides who we are.
pub(super) fn join(deadline: Duration) -> Result<Arc<Office>, CommError> {
    let refused = |what: &str| CommError::Transport(format!("{what}; start the ranks with mpirun"));
    let (jobs, queue) = sync_channel(QUEUED);
    let (hello, who) = channel();
    let work = move || {
        // This thread initialises MPI and alone calls it, which is what `Funneled` promises.
        let Some((universe, _)) = mpi::initialize_with_threading(Threading::Funneled) else { return };
        let world = universe.world();
        // Nobody listens only when the rank has given up.
        let _ = hello.send((world.rank() as usize, world.size() as usize));
        if run(&world, &queue) {
            std::mem::forget(universe);
        }
    };
    let thread = std::thread::Builder::new().name("mpi".to_string()).spawn(work);
    let thread = thread.map_err(|error| refused(&format!("cannot start the MPI thread: {error}")))?;
    let (rank, ranks) = who.recv().map_err(|_| refused("MPI did not start, or had been started before"))?;
    let mpi = Mpi { jobs: jobs.clone(), thread: Mutex::new(Some(thread)) };
    let office = Arc::new(Office::new(rank, ranks, deadline, Post::Mpi(mpi)));
    jobs.send(Job::Office(Arc::downgrade(&office))).map_err(|_| refused("the MPI thread is gone"))?;
    Ok(office)
}

/// Sends and takes until told to close; whether the run had failed.
fn run(world: &SimpleCommunicator, queue: &Receiver<Job>) -> bool {
    let mut desk = Desk { world, queue, office: Weak::new(), closed: None };
    loop {
        if let Some(failed) = desk.closed {
            return failed;
        }
        if !desk.turn(0) {
            std::thread::sleep(IDLE);
        }
    }
}

/// What the thread works on.
struct Desk<'a> {
    world: &'a SimpleCommunicator,
    queue: &'a Receiver<Job>,
    office: Weak<Office>,
    /// Told to close, and whether the run had failed.
    closed: Option<bool>,
}

impl Desk<'_> {
    /// Takes a message and does a job, where there are any; whether there was one. `under_way` sends
    /// have begun and not ended.
    fn turn(&mut self, under_way: usize) -> bool {
        let came = self.office.strong_count() > 0 && take(self.world, &self.office);
        if under_way == UNDER_WAY {
            return came;
        }
        match self.queue.try_recv() {
            Ok(Job::Office(to)) => self.office = to,
            Ok(Job::Send(to, message)) => self.send(to, &message, under_way + 1),
            Ok(Job::Close(failed)) => self.closed = Some(failed),
            Err(TryRecvError::Disconnected) => self.closed = Some(true),
            Err(TryRecvError::Empty) => return came,
        }
        true
    }

    /// Goes on taking and sending while the message leaves: its receiver may be sending to us, or never
    /// take it.
    fn send(&mut self, to: usize, message: &[u8], under_way: usize) {
        let world = self.world;
        scope(|scope| {
            let mut request = world.process_at_rank(to as i32).immediate_send(scope, message);
            loop {
                match request.test() {
                    Ok(_) => return,
                    Err(again) => request = again,
                }
                if !self.turn(under_way) {
                    std::thread::yield_now();
                }
            }
        });
    }
}

/// Takes one message if one has come.
fn take(world: &SimpleCommunicator, office: &Weak<Office>) -> bool {
    let Some((message, status)) = world.any_process().immediate_matched_probe() else { return false };
    let from = status.source_rank() as usize;
    let mut bytes = vec![0u8; status.count(u8::equivalent_datatype()) as usize];
    message.matched_receive_into(&mut bytes[..]);
    let Some(office) = office.upgrade() else { return true };
    match read(&bytes) {
        Some((header, array)) => office.deliver(from, header, array),
        None => office.lost(from, "it sent what is no message, or memory is short"),
    }
    true
}

fn read(message: &[u8]) -> Option<(Header, Array)> {
    let (header, bytes) = message.split_first_chunk::<HEADER_BYTES>()?;
    let header = Header::decode(header).filter(|header| header.payload == bytes.len() as u64)?;
    let dtype = header.dtype.filter(|_| header.kind == Kind::Data).unwrap_or(DType::U16);
    if bytes.len() % dtype.size_bytes() != 0 {
        return None;
    }
    let mut array = Array::new(Device::Cpu, dtype, bytes.len() / dtype.size_bytes()).ok()?;
    array.view_mut().bytes().copy_from_slice(bytes);
    Some((header, array))
}
