//! Collectives that run beside computation: `start_...` returns at once, `finish` waits for what
//! is not done yet. They own their buffers, so nobody can touch what is under way.
//!
//! A thread of the rank makes the calls, one after the other, in the order they were started; that
//! order must be the same on every member. Their numbers are apart from those of calls in the
//! foreground. A broadcast between threads needs no thread: the root hands out its buffer's handle.

use crate::Group;
use crate::call::Op;
use crate::error::CommError;
use crate::group::Carrier;
use crate::nccl::{Arriving, Landed};
use crate::threads::Seat;
use crate::traffic::{Peers, Tally, Traffic};
use crate::wire;
use device::{Buffer, DType, Device, View, ViewMut};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

/// Calls that may be under way for one rank; whoever starts more waits.
const UNDER_WAY: usize = 256;

type Job = Box<dyn FnOnce() + Send>;

/// The thread that makes a rank's calls beside its computation; started by the first of them, ended
/// when the mesh and its groups are gone.
#[derive(Default)]
pub(crate) struct Lane {
    jobs: OnceLock<Option<SyncSender<Job>>>,
}

impl Lane {
    fn run(&self, job: Job) -> Result<(), CommError> {
        let jobs = self.jobs.get_or_init(|| {
            let (sender, receiver) = sync_channel::<Job>(UNDER_WAY);
            let work = move || receiver.into_iter().for_each(|job| job());
            std::thread::Builder::new().name("beside".to_string()).spawn(work).ok().map(|_| sender)
        });
        let sent = jobs.as_ref().is_some_and(|jobs| jobs.send(job).is_ok());
        if sent { Ok(()) } else { Err(gone()) }
    }
}

fn gone() -> CommError {
    CommError::Transport("the thread for calls beside computation is gone; is memory short?".to_string())
}

/// `len` elements of `dtype` at the start of a buffer.
#[derive(Clone)]
pub struct Array {
    /// Holds them.
    pub buffer: Buffer,
    /// Their type.
    pub dtype: DType,
    /// How many.
    pub len: usize,
}

impl Array {
    /// `len` elements of unspecified contents.
    pub fn new(device: Device, dtype: DType, len: usize) -> Result<Array, CommError> {
        Ok(Array { buffer: Buffer::new(device, len * dtype.size_bytes())?, dtype, len })
    }

    /// A copy in some memory.
    pub(crate) fn copied(device: Device, data: View<'_>) -> Result<Array, CommError> {
        let mut array = Array::new(device, data.dtype(), data.len())?;
        device::copy(array.view_mut(), data);
        Ok(array)
    }

    /// Where they live.
    pub fn device(&self) -> Device {
        self.buffer.device()
    }

    /// Themselves, or a copy where they live elsewhere.
    fn on(self, device: Device) -> Result<Array, CommError> {
        if self.device() == device { Ok(self) } else { Array::copied(device, self.view()) }
    }

    /// Read them.
    pub fn view(&self) -> View<'_> {
        self.buffer.view(self.dtype, 0, self.len)
    }

    /// Write them; panics when the buffer is shared.
    pub fn view_mut(&mut self) -> ViewMut<'_> {
        self.buffer.view_mut(self.dtype, 0, self.len)
    }
}

/// A call under way. Dropping it gives up the result, not the call.
#[must_use = "a call under way ends with finish()"]
pub struct Pending {
    state: State,
    tally: Arc<Tally>,
}

enum State {
    Ready(Array),
    Lane(Receiver<Result<Landed, CommError>>),
    /// An array whose handle is on its way to us.
    Handle {
        op: Op,
        seat: Seat,
        dtype: DType,
        len: usize,
        /// The sender and the number of its letter.
        from: (usize, u64),
    },
    /// A letter between threads.
    Letter {
        seat: Seat,
        dtype: DType,
        len: usize,
        from: (usize, u64),
    },
    /// A message between processes, for an array on `device`.
    Message {
        seat: wire::Seat,
        device: Device,
        dtype: DType,
        len: usize,
        from: (usize, u64),
    },
    /// A message between GPUs.
    Arriving(Arriving),
}

/// A message on its way to a member. Dropping it gives up knowing of its end, not the message.
#[must_use = "a message under way ends with finish()"]
pub struct Sending {
    /// None: it is where it is to be.
    under_way: Option<Receiver<Result<(), CommError>>>,
    tally: Arc<Tally>,
}

impl Sending {
    /// Waits until the message has left.
    pub fn finish(self) -> Result<(), CommError> {
        let Some(result) = self.under_way else { return Ok(()) };
        let start = Instant::now();
        let done = result.recv().map_err(|_| gone())?;
        self.tally.expose(start.elapsed());
        done
    }
}

impl Pending {
    /// Waits for the end of the call and returns its result.
    pub fn finish(self) -> Result<Array, CommError> {
        let start = Instant::now();
        let done = match self.state {
            State::Ready(array) => return Ok(array),
            State::Lane(result) => result.recv().map_err(|_| gone())?.map(Landed::take),
            State::Handle { op, seat, dtype, len, from } => seat.take_handle(op, (dtype, len), from),
            State::Letter { seat, dtype, len, from } => seat.take_letter((dtype, len), from),
            State::Message { seat, device, dtype, len, from } => {
                seat.take_asked((dtype, len), from).and_then(|array| array.on(device))
            }
            State::Arriving(message) => message.finish(),
        };
        self.tally.expose(start.elapsed());
        done
    }
}

/// Several calls under way as one job, with what they own. Dropping it gives up the result, not the
/// calls.
#[must_use = "a job under way ends with finish()"]
pub struct Underway<T> {
    result: Result<T, Receiver<Done<T>>>,
    tallies: Vec<Arc<Tally>>,
}

/// What a job came to, and how long its calls took over each of its groups.
struct Done<T> {
    result: Result<T, CommError>,
    took: Vec<Duration>,
}

/// Runs `job` beside computation, on the thread that makes this rank's calls there, in the order jobs
/// and calls were started. It makes its calls over `groups`, which it is given back for that purpose.
/// Every member of every group must start the same jobs in the same order.
pub fn start_beside<T: Send + 'static>(
    groups: &[Group],
    job: impl FnOnce(&[Group]) -> Result<T, CommError> + Send + 'static,
) -> Result<Underway<T>, CommError> {
    let beside: Vec<Group> = groups.iter().map(Group::beside).collect();
    let tallies: Vec<Arc<Tally>> = groups.iter().map(|group| group.tally().clone()).collect();
    let Some(waits) = beside.iter().find(|group| group.waits()) else {
        return Ok(Underway { result: Ok(job(&beside)?), tallies });
    };
    let lane = waits.clone();
    let (sender, receiver) = sync_channel(1);
    let ticket = waits.ticket();
    let work = move || {
        let before: Vec<Duration> = beside.iter().map(|group| group.tally().beside()).collect();
        let result = ticket.whole(|| job(&beside));
        let took = beside.iter().zip(before).map(|(group, before)| group.tally().beside() - before).collect();
        // The receiver may be gone: whoever started the job gave its result up.
        drop(sender.send(Done { result, took }));
    };
    lane.lane().run(Box::new(work))?;
    Ok(Underway { result: Err(receiver), tallies })
}

impl<T> Underway<T> {
    /// Waits for the end of the job and returns its result. What was waited for is counted as exposed
    /// over the groups of the job, each for its part of the time.
    pub fn finish(self) -> Result<T, CommError> {
        let receiver = match self.result {
            Ok(result) => return Ok(result),
            Err(receiver) => receiver,
        };
        let start = Instant::now();
        let Done { result, took } = receiver.recv().map_err(|_| gone())?;
        let (waited, all) = (start.elapsed(), took.iter().sum::<Duration>());
        for (tally, took) in self.tallies.iter().zip(took) {
            tally.expose(waited.mul_f64(took.as_secs_f64() / all.as_secs_f64().max(1e-9)));
        }
        result
    }
}

impl Group {
    /// [`Group::all_reduce_sum`] beside computation; gives the array back as the sum. The handle
    /// must be the only one.
    pub fn start_all_reduce_sum(&self, mut data: Array) -> Result<Pending, CommError> {
        self.start(move |group| {
            group.all_reduce_sum(data.view_mut())?;
            Ok(data)
        })
    }

    /// [`Group::all_gather_shared`] beside computation; the result is `size` times as long.
    pub fn start_all_gather(&self, mine: Array) -> Result<Pending, CommError> {
        self.start(move |group| group.all_gather_shared(mine.view()))
    }

    /// [`Group::reduce_scatter_sum`] beside computation; the result is our piece.
    pub fn start_reduce_scatter_sum(&self, mine: Array) -> Result<Pending, CommError> {
        let mut out = Array::new(mine.device(), mine.dtype, mine.len / self.size())?;
        self.start(move |group| {
            group.reduce_scatter_sum(mine.view(), out.view_mut())?;
            Ok(out)
        })
    }

    /// [`Group::broadcast`] of `len` elements on `device` beside computation; the root gives `data`, the
    /// others nothing. Between threads the result is the root's own buffer, shared: read it only, and the
    /// root writes it again only when every member has dropped its handle.
    pub fn start_broadcast(
        &self,
        data: Option<Array>,
        (device, dtype, len): (Device, DType, usize),
        root: usize,
    ) -> Result<Pending, CommError> {
        let data = self.expect_root_data(data, (dtype, len), root)?;
        if let Some(seat) = self.sharing_seat() {
            let bytes = len * dtype.size_bytes();
            let traffic = Traffic::broadcast(self.size(), self.index(), bytes, root);
            self.tally().add(traffic, self.size(), self.index());
            return match data {
                Some(data) => {
                    seat.post_handles(&data)?;
                    Ok(self.pending(State::Ready(data)))
                }
                None => {
                    let (seat, from) = (seat.clone(), (root, seat.ask(root)));
                    Ok(self.pending(State::Handle { op: Op::Broadcast, seat, dtype, len, from }))
                }
            };
        }
        let mut data = match data {
            Some(data) => data,
            None => Array::new(device, dtype, len)?,
        };
        self.start(move |group| {
            if group.index() == root && !data.buffer.is_unique() {
                data = Array::copied(device, data.view())?;
            }
            group.broadcast(data.view_mut(), root)?;
            Ok(data)
        })
    }

    /// Around the ring of members: `data` goes to the next one, and the result is what the one before
    /// started with, as long and of the same type. Between threads handles travel: of a result that
    /// its sender kept a handle of, the receiver may only read.
    pub fn start_shift(&self, data: Array) -> Result<Pending, CommError> {
        let (size, own) = (self.size(), self.index());
        if size == 1 {
            return Ok(self.pending(State::Ready(data)));
        }
        let (to, from) = ((own + 1) % size, (own + size - 1) % size);
        let (device, dtype, len) = (data.device(), data.dtype, data.len);
        let (seat, waits) = (self.sharing_seat(), self.beside().waits());
        if seat.is_some() || !waits {
            let bytes = (len * dtype.size_bytes()) as u64;
            self.tally().add(Traffic { sent: bytes, received: 0, peers: Peers::One(to) }, size, own);
            self.tally().add(Traffic { sent: 0, received: bytes, peers: Peers::One(from) }, size, own);
        }
        if let Some(seat) = seat {
            seat.post_handle(data, to)?;
            let (seat, from) = (seat.clone(), (from, seat.ask(from)));
            return Ok(self.pending(State::Handle { op: Op::Receive, seat, dtype, len, from }));
        }
        if !waits {
            // Nothing arrives where calls are only counted; what was sent has the right length.
            return Ok(self.pending(State::Ready(data)));
        }
        self.start(move |group| {
            let mut out = Array::new(device, dtype, len)?;
            group.shift(data.view(), to, out.view_mut(), from)?;
            Ok(out)
        })
    }

    /// [`Group::send`] beside computation. The array may be shared; nobody may write it any more:
    /// between threads the receiver gets a handle of it, and no byte moves.
    pub fn start_send(&self, data: Array, to: usize) -> Result<Sending, CommError> {
        self.expect_other(Op::Send, to)?;
        let tally = self.tally().clone();
        let sent = (data.len * data.dtype.size_bytes()) as u64;
        let traffic = Traffic { sent, received: 0, peers: Peers::One(to) };
        let under_way = match self.carrier_beside() {
            Carrier::Null => None,
            Carrier::Threads(seat) => {
                seat.post_letter(data, to)?;
                None
            }
            // It waits for nobody's call: whoever it goes to takes messages in at any time.
            Carrier::Processes(seat) => {
                let ((sender, receiver), seat) = (sync_channel(1), seat.clone());
                let send = move || seat.send_to(data.on(Device::Cpu)?.view(), to);
                self.lane().run(Box::new(move || drop(sender.send(send()))))?;
                Some(receiver)
            }
            Carrier::Nccl(seat) if data.device() == Device::Cuda => {
                seat.send_array(data, to)?;
                None
            }
            Carrier::Nccl(seat) => {
                let ((sender, receiver), seat) = (sync_channel(1), seat.letters().clone());
                self.lane().run(Box::new(move || drop(sender.send(seat.send_to(data.view(), to)))))?;
                Some(receiver)
            }
        };
        tally.add(traffic, self.size(), self.index());
        Ok(Sending { under_way, tally })
    }

    /// [`Group::receive`] of `len` elements on `device` beside computation: takes the next message of `from` that
    /// nobody asked for yet. It needs no thread, so that a message that comes late holds nothing up.
    /// What comes may be shared with the sender: read it only.
    pub fn start_receive(
        &self,
        (device, dtype, len): (Device, DType, usize),
        from: usize,
    ) -> Result<Pending, CommError> {
        self.expect_other(Op::Receive, from)?;
        let received = (len * dtype.size_bytes()) as u64;
        let traffic = Traffic { sent: 0, received, peers: Peers::One(from) };
        self.tally().add(traffic, self.size(), self.index());
        Ok(self.pending(match self.carrier_beside() {
            Carrier::Null => State::Ready(Array::new(device, dtype, len)?),
            Carrier::Threads(seat) => {
                let (seat, from) = (seat.clone(), (from, seat.ask(from)));
                State::Letter { seat, dtype, len, from }
            }
            Carrier::Processes(seat) => {
                let (seat, from) = (seat.clone(), (from, seat.ask(from)));
                State::Message { seat, device, dtype, len, from }
            }
            Carrier::Nccl(seat) if device == Device::Cuda => State::Arriving(seat.ask((dtype, len), from)?),
            Carrier::Nccl(seat) => {
                let (seat, from) = (seat.letters().clone(), (from, seat.letters().ask(from)));
                State::Message { seat, device, dtype, len, from }
            }
        }))
    }

    fn start(
        &self,
        call: impl FnOnce(&Group) -> Result<Array, CommError> + Send + 'static,
    ) -> Result<Pending, CommError> {
        let group = self.beside();
        if !group.waits() {
            return Ok(self.pending(State::Ready(call(&group)?)));
        }
        let (sender, receiver) = sync_channel(1);
        // The receiver may be gone: whoever started the call gave its result up.
        let ticket = group.ticket();
        self.lane()
            .run(Box::new(move || ticket.landing(|| call(&group), |landed| drop(sender.send(landed)))))?;
        Ok(self.pending(State::Lane(receiver)))
    }

    fn pending(&self, state: State) -> Pending {
        Pending { state, tally: self.tally().clone() }
    }
}
