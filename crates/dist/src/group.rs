//! Collectives of a group of ranks over flat arrays. Arguments are checked and bytes counted here,
//! once for every communicator.
//!
//! Sums are taken in the order of members, in f32 (bf16 is rounded once at the end), so a result
//! has the same bits on every communicator and run after run.
//!
//! Arrays may lie in memory of a GPU; what carries them may not reach there (`staged`).

mod staged;

use crate::beside::{Array, Lane};
use crate::call::{Members, Op};
use crate::error::CommError;
use crate::traffic::{Counts, Peers, Tally, Traffic};
use crate::{Communicator, nccl, threads, wire};
use device::{DType, Device, View, ViewMut};
use std::sync::Arc;
use std::time::Instant;

/// Some ranks, ourselves among them, that communicate with each other. Cheap to clone. Every member
/// must make the same calls in the same order.
#[derive(Clone)]
pub struct Group {
    members: Arc<Members>,
    index: usize,
    carrier: Carrier,
    /// The same for calls beside computation.
    carrier_beside: Carrier,
    lane: Arc<Lane>,
    tally: Arc<Tally>,
}

#[derive(Clone)]
pub(crate) enum Carrier {
    /// Moves nothing; also what a group of one needs.
    Null,
    Threads(threads::Seat),
    Processes(wire::Seat),
    Nccl(nccl::Seat),
}

impl Carrier {
    fn is_beside(&self) -> bool {
        match self {
            Carrier::Null => true,
            Carrier::Threads(seat) => seat.is_beside(),
            Carrier::Processes(seat) => seat.is_beside(),
            Carrier::Nccl(seat) => seat.is_beside(),
        }
    }
}

impl Group {
    pub(crate) fn new(to: &Communicator, axes: &str, ranks: Vec<usize>, lane: Arc<Lane>) -> Group {
        let own = to.rank();
        let index = ranks.iter().position(|rank| *rank == own).expect("we are a member of our group");
        let members = Arc::new(Members { axes: axes.to_string(), ranks });
        let carrier = |beside| match to {
            Communicator::Threads(rank) if members.ranks.len() > 1 => {
                Carrier::Threads(rank.seat(members.clone(), index, beside))
            }
            Communicator::Processes(process) if members.ranks.len() > 1 => {
                Carrier::Processes(process.seat(members.clone(), index, beside))
            }
            Communicator::Nccl(nccl) if members.ranks.len() > 1 => {
                Carrier::Nccl(nccl.seat(members.clone(), index, beside))
            }
            _ => Carrier::Null,
        };
        let (carrier, carrier_beside) = (carrier(false), carrier(true));
        Group { members, index, carrier, carrier_beside, lane, tally: Arc::new(Tally::new()) }
    }

    /// Members.
    pub fn size(&self) -> usize {
        self.members.ranks.len()
    }

    /// Our place among the members.
    pub fn index(&self) -> usize {
        self.index
    }

    /// World ranks of the members, ascending.
    pub fn ranks(&self) -> &[usize] {
        &self.members.ranks
    }

    /// Names of the axes, like `x` or `dp+fsdp`.
    pub fn axes(&self) -> &str {
        &self.members.axes
    }

    /// What we have communicated over this group so far.
    pub fn counts(&self) -> Counts {
        self.tally.counts(&self.members)
    }

    /// `data` becomes the sum over members, on every member. f32 or bf16, any length.
    pub fn all_reduce_sum(&self, data: ViewMut<'_>) -> Result<(), CommError> {
        self.expect_float(Op::AllReduce, data.dtype())?;
        if self.size() == 1 {
            return Ok(());
        }
        if self.is_staged(data.device()) {
            return self.staged_within(data, |data| self.all_reduce_sum(data));
        }
        let traffic = Traffic::all_reduce(self.size(), self.index, data.len(), data.dtype().size_bytes());
        self.counted(traffic, |carrier| match carrier {
            Carrier::Null => Ok(()),
            Carrier::Threads(seat) => seat.all_reduce_sum(data),
            Carrier::Processes(seat) => seat.all_reduce_sum(data),
            Carrier::Nccl(seat) => seat.all_reduce_sum(data),
        })
    }

    /// `out` becomes every member's `mine`, one after the other. `out.len() == size * mine.len()`.
    pub fn all_gather(&self, mine: View<'_>, out: ViewMut<'_>) -> Result<(), CommError> {
        self.expect_pieces(Op::AllGather, (mine.dtype(), mine.len()), (out.dtype(), out.len()))?;
        if self.size() == 1 {
            device::copy(out, mine);
            return Ok(());
        }
        if self.is_staged(out.device()) {
            return self.staged(mine, out, |mine, out| self.all_gather(mine, out));
        }
        let piece = mine.len() * mine.dtype().size_bytes();
        self.counted(Traffic::pieces(self.size(), piece), |carrier| match carrier {
            Carrier::Null => Ok(()),
            Carrier::Threads(seat) => seat.all_gather(mine, out),
            Carrier::Processes(seat) => seat.all_gather(mine, out),
            Carrier::Nccl(seat) => seat.all_gather(mine, out),
        })
    }

    /// [`Group::all_gather`] of what is only read afterwards: members of one process get handles of one
    /// array, in which each has written its piece, so that a byte moves once for all of them.
    pub fn all_gather_shared(&self, mine: View<'_>) -> Result<Array, CommError> {
        if let Carrier::Threads(seat) = &self.carrier {
            let traffic = Traffic::pieces(self.size(), mine.len() * mine.dtype().size_bytes());
            return self.counted(traffic, |_| seat.all_gather_shared(mine));
        }
        let mut out = Array::new(mine.device(), mine.dtype(), self.size() * mine.len())?;
        self.all_gather(mine, out.view_mut())?;
        Ok(out)
    }

    /// `out` becomes our piece of the sum over members of `mine`. `mine.len() == size * out.len()`.
    pub fn reduce_scatter_sum(&self, mine: View<'_>, out: ViewMut<'_>) -> Result<(), CommError> {
        self.expect_float(Op::ReduceScatter, mine.dtype())?;
        self.expect_pieces(Op::ReduceScatter, (out.dtype(), out.len()), (mine.dtype(), mine.len()))?;
        if self.size() == 1 {
            device::copy(out, mine);
            return Ok(());
        }
        if self.is_staged(out.device()) {
            return self.staged(mine, out, |mine, out| self.reduce_scatter_sum(mine, out));
        }
        let piece_bytes = out.len() * out.dtype().size_bytes();
        self.counted(Traffic::pieces(self.size(), piece_bytes), |carrier| match carrier {
            Carrier::Null => Ok(()),
            Carrier::Threads(seat) => seat.reduce_scatter_sum(mine, out),
            Carrier::Processes(seat) => seat.reduce_scatter_sum(mine, out),
            Carrier::Nccl(seat) => seat.reduce_scatter_sum(mine, out),
        })
    }

    /// The same in place: member i's piece lies at place i of its `data`, and everybody gets all.
    pub fn all_gather_within(&self, data: ViewMut<'_>) -> Result<(), CommError> {
        let piece = self.expect_whole(Op::AllGather, &data)?;
        if self.size() == 1 {
            return Ok(());
        }
        if self.is_staged(data.device()) {
            return self.staged_within(data, |data| self.all_gather_within(data));
        }
        self.counted(Traffic::pieces(self.size(), piece), |carrier| match carrier {
            Carrier::Null => Ok(()),
            Carrier::Threads(seat) => seat.all_gather_within(data),
            Carrier::Processes(seat) => seat.all_gather_within(data),
            Carrier::Nccl(seat) => seat.all_gather_within(data),
        })
    }

    /// The same in place: piece i of `data` becomes the sum over members on member i; of the other
    /// pieces nothing is said.
    pub fn reduce_scatter_sum_within(&self, data: ViewMut<'_>) -> Result<(), CommError> {
        self.expect_float(Op::ReduceScatter, data.dtype())?;
        let piece = self.expect_whole(Op::ReduceScatter, &data)?;
        if self.size() == 1 {
            return Ok(());
        }
        if self.is_staged(data.device()) {
            return self.staged_within(data, |data| self.reduce_scatter_sum_within(data));
        }
        self.counted(Traffic::pieces(self.size(), piece), |carrier| match carrier {
            Carrier::Null => Ok(()),
            Carrier::Threads(seat) => seat.reduce_scatter_sum_within(data),
            Carrier::Processes(seat) => seat.reduce_scatter_sum_within(data),
            Carrier::Nccl(seat) => seat.reduce_scatter_sum_within(data),
        })
    }

    /// `data` becomes what it is on member `root`, on every member.
    pub fn broadcast(&self, data: ViewMut<'_>, root: usize) -> Result<(), CommError> {
        self.expect_member(Op::Broadcast, root)?;
        if self.size() == 1 {
            return Ok(());
        }
        if self.is_staged(data.device()) {
            return self.staged_within(data, |data| self.broadcast(data, root));
        }
        let bytes = data.len() * data.dtype().size_bytes();
        self.counted(Traffic::broadcast(self.size(), self.index, bytes, root), |carrier| match carrier {
            Carrier::Null => Ok(()),
            Carrier::Threads(seat) => seat.broadcast(data, root),
            Carrier::Processes(seat) => seat.broadcast(data, root),
            Carrier::Nccl(seat) => seat.broadcast(data, root),
        })
    }

    /// `data` of member `root` becomes the sum over members; the others' stays as it is.
    pub fn reduce_sum(&self, data: ViewMut<'_>, root: usize) -> Result<(), CommError> {
        self.expect_member(Op::Reduce, root)?;
        self.expect_float(Op::Reduce, data.dtype())?;
        if self.size() == 1 {
            return Ok(());
        }
        if self.is_staged(data.device()) {
            return self.staged_within(data, |data| self.reduce_sum(data, root));
        }
        let bytes = data.len() * data.dtype().size_bytes();
        self.counted(Traffic::reduce(self.size(), self.index, bytes, root), |carrier| match carrier {
            Carrier::Null => Ok(()),
            Carrier::Threads(seat) => seat.reduce_sum(data, root),
            Carrier::Processes(seat) => seat.reduce_sum(data, root),
            Carrier::Nccl(seat) => seat.reduce_sum(data, root),
        })
    }

    /// Member i gets the i-th run of `mine`, `send[i]` elements; the i-th run of `out`, `receive[i]`
    /// elements, comes from member i, whose `send` must say the same.
    pub fn all_to_all(
        &self,
        (mine, send): (View<'_>, &[usize]),
        (out, receive): (ViewMut<'_>, &[usize]),
    ) -> Result<(), CommError> {
        self.expect_runs((mine.dtype(), mine.len(), send), (out.dtype(), out.len(), receive))?;
        if self.size() == 1 {
            device::copy(out, mine);
            return Ok(());
        }
        if self.is_staged(out.device()) {
            return self.staged(mine, out, |mine, out| self.all_to_all((mine, send), (out, receive)));
        }
        let traffic = Traffic::all_to_all(self.index, send, receive, mine.dtype().size_bytes());
        self.counted(traffic, |carrier| match carrier {
            Carrier::Null => Ok(()),
            Carrier::Threads(seat) => seat.all_to_all((mine, send), (out, receive)),
            Carrier::Processes(seat) => seat.all_to_all((mine, send), (out, receive)),
            Carrier::Nccl(seat) => seat.all_to_all((mine, send), (out, receive)),
        })
    }

    /// Gives `data` to member `to`, which must [`Group::receive`] it. Returns when `data` may be
    /// written again; the receiver may come later.
    pub fn send(&self, data: View<'_>, to: usize) -> Result<(), CommError> {
        self.expect_other(Op::Send, to)?;
        if self.is_staged(data.device()) {
            return self.send(Array::copied(Device::Cpu, data)?.view(), to);
        }
        let sent = (data.len() * data.dtype().size_bytes()) as u64;
        let traffic = Traffic { sent, received: 0, peers: Peers::One(to) };
        self.counted(traffic, |carrier| match carrier {
            Carrier::Null => Ok(()),
            Carrier::Threads(seat) => seat.send(data, to),
            Carrier::Processes(seat) => seat.send_to(data, to),
            Carrier::Nccl(seat) => seat.send(data, to),
        })
    }

    /// Takes what member `from` sends next. Length and type must be the sender's.
    pub fn receive(&self, data: ViewMut<'_>, from: usize) -> Result<(), CommError> {
        self.expect_other(Op::Receive, from)?;
        if self.is_staged(data.device()) {
            return self.staged(View::of_u16(&[]), data, |_, data| self.receive(data, from));
        }
        let received = (data.len() * data.dtype().size_bytes()) as u64;
        self.counted(Traffic { sent: 0, received, peers: Peers::One(from) }, |carrier| match carrier {
            Carrier::Null => Ok(()),
            Carrier::Threads(seat) => seat.receive(data, from),
            Carrier::Processes(seat) => seat.receive(data, from),
            Carrier::Nccl(seat) => seat.receive(data, from),
        })
    }

    /// Returns when every member has come.
    pub fn barrier(&self) -> Result<(), CommError> {
        if self.size() == 1 {
            return Ok(());
        }
        self.counted(Traffic::pieces(self.size(), 0), |carrier| match carrier {
            Carrier::Null => Ok(()),
            Carrier::Threads(seat) => seat.barrier(),
            Carrier::Processes(seat) => seat.barrier(),
            Carrier::Nccl(seat) => seat.barrier(),
        })
    }

    /// This group as the lane sees it.
    pub(crate) fn beside(&self) -> Group {
        Group { carrier: self.carrier_beside.clone(), ..self.clone() }
    }

    /// A message to one member and one from another, beside each other where that needs no host.
    pub(crate) fn shift(
        &self,
        data: View<'_>,
        to: usize,
        out: ViewMut<'_>,
        from: usize,
    ) -> Result<(), CommError> {
        let Some(seat) = self.nccl_seat(data.device()) else {
            self.send(data, to)?;
            return self.receive(out, from);
        };
        let bytes = (data.len() * data.dtype().size_bytes()) as u64;
        self.tally.add(Traffic { sent: bytes, received: 0, peers: Peers::One(to) }, self.size(), self.index);
        let traffic = Traffic { sent: 0, received: bytes, peers: Peers::One(from) };
        self.counted(traffic, |_| seat.shift(data, out))
    }

    /// Our seat for calls that go from card to card.
    fn nccl_seat(&self, device: Device) -> Option<&nccl::Seat> {
        match &self.carrier {
            Carrier::Nccl(seat) if device == Device::Cuda => Some(seat),
            _ => None,
        }
    }

    /// Where what is about to be started beside computation runs.
    pub(crate) fn ticket(&self) -> nccl::Ticket {
        match &self.carrier_beside {
            Carrier::Nccl(seat) => nccl::Ticket::on(seat.stream()),
            _ => nccl::Ticket::default(),
        }
    }

    /// Whether a call can wait for anybody.
    pub(crate) fn waits(&self) -> bool {
        !matches!(self.carrier, Carrier::Null)
    }

    pub(crate) fn carrier_beside(&self) -> &Carrier {
        &self.carrier_beside
    }

    /// Our seat for calls beside computation, where members can hand each other buffers.
    pub(crate) fn sharing_seat(&self) -> Option<&threads::Seat> {
        match &self.carrier_beside {
            Carrier::Threads(seat) => Some(seat),
            Carrier::Null | Carrier::Processes(_) | Carrier::Nccl(_) => None,
        }
    }

    pub(crate) fn lane(&self) -> &Lane {
        &self.lane
    }

    pub(crate) fn tally(&self) -> &Arc<Tally> {
        &self.tally
    }

    /// Makes a call and counts it; the exposed time of a call beside computation is exposed in `finish`.
    fn counted<R>(
        &self,
        traffic: Traffic,
        body: impl FnOnce(&Carrier) -> Result<R, CommError>,
    ) -> Result<R, CommError> {
        let start = Instant::now();
        let result = body(&self.carrier)?;
        self.tally.add(traffic, self.size(), self.index);
        match self.carrier.is_beside() {
            true => self.tally.work_beside(start.elapsed()),
            false => self.tally.expose(start.elapsed()),
        }
        Ok(result)
    }

    /// What a broadcast beside computation starts from: data at the root, nothing elsewhere.
    pub(crate) fn expect_root_data(
        &self,
        data: Option<Array>,
        (dtype, len): (DType, usize),
        root: usize,
    ) -> Result<Option<Array>, CommError> {
        self.expect_member(Op::Broadcast, root)?;
        match &data {
            Some(data) if self.index == root && (data.dtype, data.len) == (dtype, len) => {}
            None if self.index != root => {}
            _ => {
                let problem = format!("member {root} alone gives {len} {dtype}, the others give nothing");
                return Err(self.refuse(Op::Broadcast, problem));
            }
        }
        Ok(data)
    }

    fn refuse(&self, op: Op, problem: String) -> CommError {
        let axes = self.members.axes.clone();
        CommError::Argument { op: op.name(), axes, ranks: self.size(), problem }
    }

    fn expect_float(&self, op: Op, dtype: DType) -> Result<(), CommError> {
        match dtype {
            DType::F32 | DType::Bf16 => Ok(()),
            other => Err(self.refuse(op, format!("no sum of {other}; convert to f32 or bf16"))),
        }
    }

    fn expect_member(&self, op: Op, member: usize) -> Result<(), CommError> {
        if member < self.size() {
            return Ok(());
        }
        Err(self.refuse(op, format!("member {member} does not exist; members count from 0")))
    }

    pub(crate) fn expect_other(&self, op: Op, member: usize) -> Result<(), CommError> {
        self.expect_member(op, member)?;
        if member != self.index {
            return Ok(());
        }
        Err(self.refuse(op, format!("member {member} is this rank itself; copy instead")))
    }

    fn expect_pieces(
        &self,
        op: Op,
        (piece_type, piece): (DType, usize),
        (whole_type, whole): (DType, usize),
    ) -> Result<(), CommError> {
        if piece_type == whole_type && self.size().checked_mul(piece) == Some(whole) {
            return Ok(());
        }
        let problem = format!(
            "a piece of {piece} {piece_type} and a whole of {whole} {whole_type}; \
             the whole is one piece a member, so pad to a multiple"
        );
        Err(self.refuse(op, problem))
    }

    /// Bytes of a piece of `data`, which is one piece a member.
    fn expect_whole(&self, op: Op, data: &ViewMut<'_>) -> Result<usize, CommError> {
        let piece = data.len() / self.size();
        self.expect_pieces(op, (data.dtype(), piece), (data.dtype(), data.len()))?;
        Ok(piece * data.dtype().size_bytes())
    }

    fn expect_runs(
        &self,
        (send_type, sent, send): (DType, usize, &[usize]),
        (receive_type, received, receive): (DType, usize, &[usize]),
    ) -> Result<(), CommError> {
        let fits = |runs: &[usize], len: usize| {
            runs.len() == self.size()
                && runs.iter().try_fold(0usize, |sum, n| sum.checked_add(*n)) == Some(len)
        };
        if send_type == receive_type && fits(send, sent) && fits(receive, received) {
            if send[self.index] == receive[self.index] {
                return Ok(());
            }
            let problem = format!("{} to ourselves, {} from", send[self.index], receive[self.index]);
            return Err(self.refuse(Op::AllToAll, problem));
        }
        let problem = format!(
            "runs {send:?} of {sent} {send_type} and {receive:?} of {received} {receive_type}; \
             one run a member, adding up to the array"
        );
        Err(self.refuse(Op::AllToAll, problem))
    }
}

impl std::fmt::Debug for Group {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Group({}, {:?}, member {})", self.members.axes, self.members.ranks, self.index)
    }
}
